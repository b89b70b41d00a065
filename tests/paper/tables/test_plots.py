"""The plots are PNGs of the size that was asked for and show every figure that there is."""

from __future__ import annotations

import io
from typing import Any

import pytest
from paper_runs import make_run
from PIL import Image

pytest.importorskip("matplotlib")

from sd_unlearn.paper.tables import plots
from sd_unlearn.paper.tables.groups import grouped


def make_sweep(betas: tuple[float, ...], **changes: Any) -> list[Any]:
    return [make_run("pu", 0.9 + beta / 10, 10.0, seed=s, beta=beta, **changes) for beta in betas for s in (1, 2)]


def opened(png: bytes) -> Image.Image:
    assert len(png) < 100_000
    return Image.open(io.BytesIO(png)).convert("RGB")


def has_colour(image: Image.Image, colour: str) -> bool:
    wanted = tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return any(found == wanted for _, found in image.getcolors(1 << 20) or [])


def test_main_plot_shows_the_arms_that_there_are() -> None:
    arms = grouped([make_run("unsupervised", 0.9), make_run("pu", 0.98)])
    image = opened(plots.main_plot([arms], "fid-digits"))
    assert image.width == round(7.5 * plots.DPI)
    shown = {name: has_colour(image, colour) for name, (colour, _) in plots.STYLE.items()}
    assert shown == {"unsupervised": True, "supervised": False, "pu": True}
    taller = opened(plots.main_plot([arms] * 6, "fid-digits"))
    assert taller.height > image.height


def test_without_a_fid_there_is_one_panel() -> None:
    arms = grouped([make_run("unsupervised", 0.9, None), make_run("pu", 0.98, None)])
    assert opened(plots.main_plot([arms], "")).width == round(4.5 * plots.DPI)
    assert list(plots.draw(arms)) == ["main-tiny.png"]


@pytest.mark.parametrize("betas", [(0.05, 0.1, 0.2), (0.01, 0.1, 0.5, 0.9)])
def test_a_sweep_is_drawn_with_and_without_its_baseline(betas: tuple[float, ...]) -> None:
    sweep = make_sweep(betas)
    alone = opened(plots.sweep_plot(grouped(sweep), "fid-digits"))
    level = opened(plots.sweep_plot(grouped([*sweep, make_run("unsupervised", 0.85, 9.0)]), "fid-digits"))
    assert has_colour(alone, plots.STYLE["pu"][0])
    assert alone.tobytes() != level.tobytes()


def test_one_beta_is_no_sweep() -> None:
    assert list(plots.draw(grouped(make_sweep((0.1,))))) == ["main-tiny-fid-digits.png"]


def test_each_sweep_fid_and_recipe_has_a_plot_of_its_own() -> None:
    made = make_sweep((0.1, 0.2)) + make_sweep((0.1, 0.2), max_train_steps=10)
    made += make_sweep((0.1, 0.3), experiment="cifar10-animals", size="paper", fid_name="fid-inception")
    assert sorted(plots.draw(grouped(made))) == [
        "beta-cifar10-animals-paper-fid-inception.png",
        "beta-mnist5k-even-tiny-fid-digits-2.png",
        "beta-mnist5k-even-tiny-fid-digits.png",
        "main-paper-fid-inception.png",
        "main-tiny-fid-digits.png",
    ]


def test_the_same_figures_give_the_same_picture() -> None:
    groups = grouped(make_sweep((0.1, 0.2)))
    assert plots.draw(groups) == plots.draw(groups)
