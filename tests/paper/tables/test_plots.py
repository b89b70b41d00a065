"""The plots are PNGs of the right size and show every value."""

from __future__ import annotations

import io
from typing import Any

import pytest
from paper_runs import make_run
from PIL import Image

pytest.importorskip("matplotlib")

from sd_unlearn.paper.tables import plots
from sd_unlearn.paper.tables.groups import summarize
from sd_unlearn.paper.tables.records import FinishedRun


def make_sweep(betas: tuple[float, ...], **changes: Any) -> list[FinishedRun]:
    return [make_run("pu", 0.9 + beta / 10, 10.0, seed=s, beta=beta, **changes) for beta in betas for s in (1, 2)]


def opened(png: bytes) -> Image.Image:
    assert len(png) < 100_000
    return Image.open(io.BytesIO(png)).convert("RGB")


def has_color(image: Image.Image, color: str) -> bool:
    wanted = tuple(int(color[i : i + 2], 16) for i in (1, 3, 5))
    return any(pixel == wanted for _, pixel in image.getcolors(1 << 20) or [])


def sweep_of(runs: list[FinishedRun]) -> Image.Image:
    summary = summarize(runs)
    return opened(plots.sweep_plot(summary, summary.groups, "fid-digits"))


def test_main_plot_shows_the_objectives_with_runs() -> None:
    summary = summarize([make_run("unsupervised", 0.9), make_run("pu", 0.98)])
    image = opened(plots.main_plot(summary, [summary.groups], "fid-digits"))
    assert image.width == round(7.5 * plots.DPI)
    shown = {name: has_color(image, color) for name, (color, _) in plots.STYLE.items()}
    assert shown == {"unsupervised": True, "supervised": False, "pu": True}
    taller = opened(plots.main_plot(summary, [summary.groups] * 6, "fid-digits"))
    assert taller.height > image.height


def test_without_a_fid_there_is_one_panel() -> None:
    summary = summarize([make_run("unsupervised", 0.9, None), make_run("pu", 0.98, None)])
    assert opened(plots.main_plot(summary, [summary.groups], "")).width == round(4.5 * plots.DPI)
    assert list(plots.draw(summary)) == ["main-tiny.png"]


@pytest.mark.parametrize("betas", [(0.05, 0.1, 0.2), (0.01, 0.1, 0.5, 0.9)])
def test_a_sweep_is_plotted_with_and_without_its_baseline(betas: tuple[float, ...]) -> None:
    runs = make_sweep(betas)
    alone = sweep_of(runs)
    with_baseline = sweep_of([*runs, make_run("unsupervised", 0.85, 9.0)])
    assert has_color(alone, plots.STYLE["pu"][0])
    assert alone.tobytes() != with_baseline.tobytes()


def test_one_beta_is_not_a_sweep() -> None:
    assert list(plots.draw(summarize(make_sweep((0.1,))))) == ["main-tiny-fid-digits.png"]


def test_each_sweep_fid_and_recipe_has_a_plot_of_its_own() -> None:
    runs = make_sweep((0.1, 0.2)) + make_sweep((0.1, 0.2), max_train_steps=10)
    runs += make_sweep((0.1, 0.3), experiment="cifar10-animals", size="paper", fid_name="fid-inception")
    assert sorted(plots.draw(summarize(runs))) == [
        "beta-cifar10-animals-paper-fid-inception.png",
        "beta-mnist5k-even-tiny-fid-digits-2.png",
        "beta-mnist5k-even-tiny-fid-digits.png",
        "main-paper-fid-inception.png",
        "main-tiny-fid-digits.png",
    ]


def test_the_same_values_give_the_same_image() -> None:
    summary = summarize(make_sweep((0.1, 0.2)))
    assert plots.draw(summary) == plots.draw(summary)
