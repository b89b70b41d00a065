"""Photos in the wrong place of a data folder are refused before anything is rendered."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import tree
from PIL import Image

from sd_unlearn.config.base import RenderConfig
from sd_unlearn.config.train import TrainConfig
from sd_unlearn.data import render
from sd_unlearn.data.photos import check_places
from sd_unlearn.errors import UsageError
from sd_unlearn.training import trainer

WHERE = "Move images of the concept into mine/1_positive and all others into mine/0_unlabeled"


def add(*folders: str, name: str = "img{}.png") -> None:
    for folder in folders:
        Path(folder).mkdir(parents=True, exist_ok=True)
        for i in range(4):
            Image.new("RGB", (8, 8), (60 * i, 0, 0)).save(Path(folder) / name.format(i), "PNG")


@pytest.mark.parametrize("command", ["render", "train"])
@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["mine"], "4 images in mine would not be read (the first is img0.png). " + WHERE),
        (["mine", "mine/0_unlabeled", "mine/1_positive"], "4 images in mine would not be read"),
        (["mine/0_unlabeled/some", "mine/1_positive"], "4 images in mine/0_unlabeled/some would not be read"),
        (["mine/0_unlabeled", "mine/1_positive", "mine/1_positive/a/b"], "4 images in mine/1_positive/a/b would not"),
        (["mine/0_unlabeled", "mine/1_positive", "mine/2_negative/a"], "4 images in mine/2_negative/a would not"),
        (["mine/0_Unlabeled", "mine/1_Positive"], "0_Unlabeled holds 4 images, but a folder of this name is not read."),
        (["mine/0_unlabeled", "mine/1_Positive_2"], "1_Positive_2 holds 4 images.* Rename it to 1_positive_2."),
        (["mine/0_unlabeled", "mine/1_positive", "mine/2-Negatives"], "2-Negatives holds 4.* Rename it to 2_negative."),
        (["mine/0_unlabelled", "mine/1_positive"], "0_unlabelled holds 4 images.* Rename it to 0_unlabeled."),
        (["mine/positive", "mine/unlabeled"], "positive holds 4 images.* Rename it to 1_positive."),
        (["mine/photos"], "4 images in mine/photos would not be read"),
        (["mine/photos/me/2024"], "4 images in mine/photos/me/2024 would not be read"),
        (["mine/photos/0_unlabeled", "mine/photos/1_positive"], "use --data_dir mine/photos."),
    ],
)
def test_misplaced_photos_are_refused(
    concept_file: Path, tiny_base: Path, folders: list[str], message: str, command: str
) -> None:
    add(*folders)
    before = tree(Path("mine"))
    options = {"concept": str(concept_file), "pretrained_model_name_or_path": str(tiny_base), "data_dir": Path("mine")}
    run = {
        "render": lambda: render.run(RenderConfig(**options)),  # type: ignore[arg-type]
        "train": lambda: trainer.run(TrainConfig(**options, output_dir=Path("run"))),  # type: ignore[arg-type]
    }
    with pytest.raises(UsageError) as caught:
        run[command]()
    start, _, end = message.partition(".*")
    assert start in str(caught.value)
    assert end in str(caught.value)
    assert str(caught.value).startswith("--data_dir mine")
    assert tree(Path("mine")) == before
    assert not Path("run").exists()


def test_suffixes_in_any_case_and_formats_that_need_a_package_count() -> None:
    for suffix in ("PNG", "Jfif", "TIF", "avif", "HEIC"):
        add(f"mine-{suffix}", name=f"{{}}.{suffix}")
        with pytest.raises(UsageError, match="4 images in"):
            check_places(Path(f"mine-{suffix}"))


def test_right_folders_and_folders_without_images_pass() -> None:
    check_places(Path("none"))
    add("mine/0_unlabeled", "mine/1_positive", "mine/1_positive_2", "mine/2_negative", "mine/originals", "mine/cache")
    add("mine/.thumbnails", "mine/0_unlabeled/.thumbnails", "mine/1_positive/@eaDir/.x")
    add("mine", "mine/0_unlabeled/sub", name="._img{}.png")
    for name in ("mine/settings.json", "mine/0_Unlabeled.txt", "mine/0_unlabeled/sub/notes.txt"):
        Path(name).write_text("{}")
    Path("mine/1_Positive").mkdir()  # empty
    check_places(Path("mine"))


def test_links_to_folders_work_and_loops_end() -> None:
    add("elsewhere", "mine/1_positive")
    Path("mine/0_unlabeled").symlink_to(Path("elsewhere").resolve())
    Path("mine/1_positive/again").symlink_to(Path("mine").resolve())
    Path("mine/loop").symlink_to("loop")
    with pytest.raises(UsageError, match=r"mine/1_positive/again/\w+ would not be read"):
        check_places(Path("mine"))
    Path("mine/1_positive/again").unlink()
    check_places(Path("mine"))
