"""Only what sd-unlearn wrote is deleted or replaced."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import tree

from sd_unlearn.errors import UsageError
from sd_unlearn.io import own_files
from sd_unlearn.io.files import write_json
from sd_unlearn.io.own_files import MARKER, RUN, SWEEP, delete_own, is_free, is_run, kind_of, mark, sealed

OURS = [
    "training.json",
    "config.yaml",
    "metrics.jsonl",
    "results.json",
    "evaluate.yaml",
    "calibration.json",
    "report.html",
    "certificate.html",
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
    "unet/diffusion_pytorch_model.safetensors",
    "checkpoints/step-000010/state.pt",
    "checkpoints/step-000010/checkpoint.json",
    "checkpoints/step-000010/weights.safetensors",
    "previews/step-000010.png",
    "images/base/a-photo-of-a-dog-0123abcd-123.png",
    "images/mine/0123abcd-IMG 1.JPG",
    "tensorboard/events.out.tfevents.1",
    "tensorboard/123.4/hparams.yml",
    "export/pytorch_lora_weights.safetensors",
    "export/brad-pitt.safetensors",
    "export/README.md",
    "export/comfyui-workflow.json",
    "best/training.json",
    "best/adapter/adapter_model.safetensors",
    "best/export/brad-pitt.safetensors",
]
FOREIGN = [
    ".git/config",
    "thesis.txt",
    "1_positive/me.jpg",
    "adapter/notes.txt",
    "checkpoints/step-mine/weights.safetensors",
    "checkpoints/step-000010/notes.txt",
    "previews/holiday.png",
    "images/me/holiday.png",
    "export/other-lora.safetensors",
    "best/thesis.txt",
    "deep/training.json",
    "report.md",
    "best/results.csv",
    "best/export/README.md",
]


CONTENTS = {
    "concept.yaml": "name: Brad Pitt\n",
    "report.html": "<title>Forgetting Brad Pitt – sd-unlearn report</title>",
    "certificate.html": "<title>Measurement certificate – sd-unlearn</title>",
    "export/README.md": sealed("# A card\n"),
    "best/export/README.md": sealed("# A card\n") + "my notes\n",
}


def fill(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(CONTENTS.get(name, name))


def files(folder: Path) -> set[str]:
    return {name for name in tree(folder) if (folder / name).is_file()}


def test_a_run_is_deleted_and_nothing_else(tmp_path: Path) -> None:
    mark(tmp_path, "run")
    fill(tmp_path, "concept.yaml", *OURS)
    delete_own(tmp_path, RUN)
    assert tree(tmp_path) == {MARKER}
    fill(tmp_path, "concept.yaml", *OURS, *FOREIGN)
    delete_own(tmp_path, RUN)
    assert files(tmp_path) == {MARKER, *FOREIGN}


def test_links_are_not_followed(tmp_path: Path) -> None:
    fill(tmp_path / "elsewhere", "step-000001.png")
    fill(tmp_path / "run", "training.json")
    (tmp_path / "run" / "previews").symlink_to(tmp_path / "elsewhere")
    delete_own(tmp_path / "run", RUN)
    assert tree(tmp_path) == {"elsewhere", "elsewhere/step-000001.png", "run", "run/previews"}


def test_a_sweep_is_deleted_and_nothing_else(tmp_path: Path) -> None:
    fill(
        tmp_path,
        "sweep.yaml",
        "sweep.json",
        "factor-1/training.json",
        f"factor-1/{MARKER}",
        "factor-0.5/best/config.yaml",
    )
    (tmp_path / "sweep.html").write_text("<title>Forgetting “seven”: how strongly? – sd-unlearn sweep</title>")
    (tmp_path / "sweep.md").write_text("my own notes")
    fill(tmp_path, "factor-1/notes.txt", "training.json", "me.png")
    delete_own(tmp_path, SWEEP)
    assert files(tmp_path) == {"factor-1/notes.txt", "training.json", "me.png", "sweep.md"}
    assert not (tmp_path / "factor-0.5").exists()


@pytest.mark.parametrize(
    ("names", "recognized"),
    [
        (["concept.yaml"], False),  # a concept file alone does not make it our folder
        (["concept.yaml", "config.yaml", "checkpoints/x"], False),
        (["training.json"], False),
        (["concept.yaml", "training.json"], True),
        (["concept.yaml", "checkpoints/step-000001/checkpoint.json"], True),
    ],
)
def test_a_run_without_a_marker(tmp_path: Path, names: list[str], recognized: bool) -> None:
    fill(tmp_path, *names)
    assert is_run(tmp_path) is recognized
    mark(tmp_path, "run")
    assert is_run(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"kind": "evaluation"}'])
def test_only_the_marker_of_a_run_marks_a_run(tmp_path: Path, content: str) -> None:
    (tmp_path / MARKER).write_text(content)
    assert not is_run(tmp_path)
    mark(tmp_path, "run")
    assert kind_of(tmp_path) == "run"


def test_locks_and_leftovers_do_not_fill_a_folder(tmp_path: Path) -> None:
    assert is_free(tmp_path / "missing")
    fill(tmp_path, ".sd-unlearn.lock", ".sd-unlearn.holder.json", ".adapter.123@0123abcd.tmp", ".marker.123@host-1.tmp")
    assert is_free(tmp_path)
    fill(tmp_path, ".gitignore")
    assert not is_free(tmp_path)


@pytest.mark.parametrize("name", ["results.json", "evaluate.yaml", "images/me.png"])
def test_an_evaluation_does_not_replace_files_of_others(tmp_path: Path, name: str) -> None:
    own_files.check_evaluation_folder(tmp_path, "--output_dir")
    fill(tmp_path, "thesis.txt")
    own_files.check_evaluation_folder(tmp_path, "--output_dir")
    fill(tmp_path, name)
    with pytest.raises(UsageError, match=f"--output_dir .* holds {name.split('/')[0]}, which sd-unlearn did not write"):
        own_files.check_evaluation_folder(tmp_path, "--output_dir")
    write_json(tmp_path / "results.json", {"schema_version": 2, "subjects": [], "rows": []})
    own_files.check_evaluation_folder(tmp_path, "--output_dir")


def test_files_of_others_in_folders_that_are_replaced_are_refused(tmp_path: Path) -> None:
    fill(tmp_path, *OURS)
    own_files.check_no_foreign_weights(tmp_path, "--output_dir")
    fill(tmp_path, "best/adapter/notes.txt")
    with pytest.raises(UsageError, match=r"did not write .*notes\.txt"):
        own_files.check_no_foreign_weights(tmp_path, "--output_dir")
