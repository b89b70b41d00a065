"""Images of the page: seeds, strengths, several LoRAs, and what the classifier says. No Gradio."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from evaluation_runs import make_run
from PIL import Image

from sd_unlearn.errors import UsageError
from sd_unlearn.ui import generate
from sd_unlearn.ui.generate import GRID, GRID_SEEDS, Generator, Request, enlarged

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def root(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ui")
    make_run(folder / "runs" / "seven", tiny_base)
    make_run(folder / "runs" / "four", tiny_base, "four", 1)
    return folder


@pytest.fixture(scope="module")
def generator(root: Path) -> Generator:
    return Generator(root)


ASKED = Request(("runs/seven",), "a photo of the digit seven", 0, 1.0, steps=2)


def difference(a: Image.Image, b: Image.Image) -> float:
    return float(np.abs(np.asarray(a, float) - np.asarray(b, float)).mean())


def test_a_request_always_gives_the_same_image_and_strength_0_is_the_base(generator: Generator, root: Path) -> None:
    base = generator.picture(replace(ASKED, strength=0.0)).image
    with_lora = generator.picture(ASKED).image
    assert difference(base, with_lora) > 0
    assert difference(base, generator.picture(replace(ASKED, strength=0.0, loras=("runs/four",))).image) == 0
    assert difference(base, generator.picture(replace(ASKED, strength=0.0, seed=1)).image) > 0
    assert difference(with_lora, Generator(root).picture(ASKED).image) == 0  # in a new process, too


def test_several_loras_are_applied_together_and_the_base_is_restored(generator: Generator) -> None:
    both = generator.picture(replace(ASKED, loras=("runs/seven", "runs/four"))).image
    assert difference(both, generator.picture(ASKED).image) > 0
    generator.images.clear()
    assert difference(both, generator.picture(replace(ASKED, loras=("runs/seven", "runs/four"))).image) == 0


def test_an_image_that_was_generated_is_not_generated_again(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator.picture(ASKED)
    monkeypatch.setattr(generate, "generate_images", pytest.fail)
    generator.picture(ASKED)


def test_the_reading_says_whether_the_concept_of_every_lora_is_shown(generator: Generator) -> None:
    lines = generator.picture(replace(ASKED, loras=("runs/seven", "runs/four"))).reading.splitlines()
    assert len(lines) == 2
    for line, name in zip(lines, ("seven", "four"), strict=True):
        verdict, _, words = line.partition(", read as ")
        assert verdict in (f"shows {name}", f"does not show {name}")
        assert (name in words) == (verdict == f"shows {name}")
    assert generator.picture(replace(ASKED, loras=(), base="digits")).reading.startswith("No classifier")


def test_the_grid_has_a_column_for_each_strength(generator: Generator) -> None:
    grid = generator.grid(replace(ASKED, strength=0.7))
    side = 3 * 32  # images of 32 pixels, enlarged
    assert grid.size == (len(GRID) * (side + 4) + 4, 36 + GRID_SEEDS * (side + 4))
    first = grid.crop((4, 36, 4 + side, 36 + side)).resize((32, 32), Image.Resampling.NEAREST)
    assert difference(first, generator.picture(replace(ASKED, strength=0.0)).image) == 0
    fifth = 4 + 4 * (side + 4)
    at_one = grid.crop((fifth, 36, fifth + side, 36 + side)).resize((32, 32), Image.Resampling.NEAREST)
    assert difference(at_one, generator.picture(ASKED).image) == 0


def test_small_images_are_enlarged() -> None:
    assert enlarged(Image.new("RGB", (32, 32))).size == (256, 256)
    assert enlarged(Image.new("RGB", (512, 512))).size == (512, 512)


def test_nothing_outside_the_working_folder_is_used(generator: Generator, root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "runs" / "seven", tmp_path / "outside")
    (root / "link").symlink_to(tmp_path / "outside")
    for given in (
        replace(ASKED, loras=(str(tmp_path / "outside"),)),
        replace(ASKED, loras=("../outside",)),
        replace(ASKED, loras=("link",)),
        replace(ASKED, base=str(tmp_path)),
        replace(ASKED, base="../base"),
    ):
        with pytest.raises(UsageError, match="is not in the folder"):
            generator.picture(given)
    (root / "link").unlink()
    with pytest.raises(UsageError, match="The prompt is empty"):
        generator.picture(replace(ASKED, prompt=" "))
