"""`train` refuses folders of the user's own before it loads a model, and deletes nothing in them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import tree

from sd_unlearn.config.train import TrainConfig
from sd_unlearn.errors import UnlearnError, UsageError
from sd_unlearn.io.lock import locked
from sd_unlearn.io.own_files import mark
from sd_unlearn.training import trainer

Make = Callable[..., TrainConfig]


@pytest.fixture
def make(tiny_base: Path, concept_file: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Options of a training that must end before it loads the base."""
    monkeypatch.setattr(trainer, "load_base", lambda *_: pytest.fail("a model was loaded"))

    def of(output_dir: str, **changes: object) -> TrainConfig:
        settings = {
            "concept": str(concept_file),
            "pretrained_model_name_or_path": str(tiny_base),
            "output_dir": Path(output_dir),
            "report_to": "none",
        }
        return TrainConfig(**(settings | changes))  # type: ignore[arg-type]

    return of


def fill(folder: str, *names: str) -> None:
    for name in names:
        Path(folder, name).parent.mkdir(parents=True, exist_ok=True)
        Path(folder, name).write_text("precious")


def refuse(config: TrainConfig, match: str) -> None:
    before = tree(Path())
    with pytest.raises(UsageError, match=match):
        trainer.run(config)
    assert tree(Path()) == before


def test_what_was_found_is_said_before_a_model_loads(
    make: Make, photos: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load_base(*_: object) -> None:
        raise UnlearnError("no model yet")

    folder = photos(unlabeled=4, positive=3)
    for name in ("0.txt", "forgotten.txt"):
        (folder / "1_positive" / name).write_text("a caption")
    monkeypatch.setattr(trainer, "load_base", load_base)
    with pytest.raises(UnlearnError, match="no model yet"):
        trainer.run(make("run", data_dir=folder))
    found = "7 images, 1 with own captions, forgotten.txt without an image of that name."
    assert capsys.readouterr().err.count(found) == 1


STARTS = [{}, {"overwrite": True}, {"resume_from_checkpoint": "latest"}]


@pytest.mark.parametrize("start", STARTS)
def test_a_folder_with_a_concept_file_is_not_a_run(make: Make, start: dict[str, object]) -> None:
    fill("project", "concept.yaml", ".git/config", "prompts/brad.yaml")
    refuse(make("project", **start), "--output_dir project is not an sd-unlearn run folder")


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize(
    ("data", "output"), [("photos", "photos"), ("photos", "photos/run"), ("run/data", "run"), ("link", "photos")]
)
def test_data_and_run_folder_are_kept_apart(
    make: Make, photos: Callable[..., Path], start: dict[str, object], data: str, output: str
) -> None:
    photos(folder=data.replace("link", "photos"))
    Path("link").symlink_to("photos")
    fill(output, "concept.yaml", "training.json")
    refuse(
        make(output, data_dir=Path(data), **start), "--output_dir .* and --data_dir .* are the same folder or one is"
    )


@pytest.mark.parametrize("start", [{}, {"resume_from_checkpoint": "latest"}])
@pytest.mark.parametrize("name", ["results.json", "report.html", "export/brad-pitt.safetensors"])
def test_results_without_a_training_record_are_kept(make: Make, start: dict[str, object], name: str) -> None:
    mark(Path("run"), "run")
    fill("run", "concept.yaml", "adapter/adapter_model.safetensors", name)
    refuse(make("run", **start), r"--output_dir run holds .* but no training\.json.*--overwrite")


@pytest.mark.parametrize("start", STARTS)
def test_files_of_others_among_the_weights_are_kept(make: Make, start: dict[str, object]) -> None:
    mark(Path("run"), "run")
    fill("run", "concept.yaml", "adapter/notes.txt")
    refuse(make("run", **start), r"did not write run/adapter/notes\.txt")


def test_a_run_in_use_is_refused(make: Make) -> None:
    with (
        locked(Path("run"), "--output_dir"),
        pytest.raises(UnlearnError, match="--output_dir run is in use by process"),
    ):
        trainer.run(make("run"))
    with (
        locked(Path("data"), "--data_dir"),
        pytest.raises(UnlearnError, match="--data_dir data is in use by process"),
    ):
        trainer.run(make("run", data_dir=Path("data")))
    assert not Path("run").exists()


def test_a_place_that_cannot_be_written_is_refused_before_rendering(make: Make) -> None:
    refuse(make("/proc/x"), "--output_dir /proc/x cannot be written")
