"""Published files (report, certificate, results, model card, LoRA headers) hold no path of the user's machine."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from metric_tools import build_clip
from PIL import Image

from sd_unlearn.cli import main
from sd_unlearn.models.source import DIGITS_DIR

TELLTALE = "jane-doe-at-home"
PUBLISHED = ("report.html", "report.md", "certificate.html", "results.csv", "results.json")
TRAIN = "--max_train_steps 1 --validation_steps 0 --effective_batch_size 8 --report_to none --gradient_share_steps 0"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose every input and output lies in a folder with a tell-tale name, given by absolute paths."""
    home = tmp_path_factory.mktemp("private") / TELLTALE
    shutil.copytree(DIGITS_DIR, home / "base")
    data, folder = home / "photos", home / "runs" / "seven"
    for kind in ("0_unlabeled", "1_positive"):
        (data / kind).mkdir(parents=True)
        for number in range(4):
            Image.effect_noise((32, 32), 40 + number).save(data / kind / f"{number}.png")
    (home / "prompts.txt").write_text("a photo of the digit seven, upside down\n")
    (home / "others").mkdir()
    for group in ("direct", "alike"):
        (home / "others" / group).mkdir()
        Image.effect_noise((32, 32), 40).save(home / "others" / group / "0.png")
        (home / "others" / group / "damaged.png").write_bytes(b"x")
    (home / "real").mkdir()
    for number in range(10):
        Image.effect_noise((32, 32), 40 + number).save(home / "real" / f"{number}.png")
    base = ["--pretrained_model_name_or_path", str(home / "base")]
    shown = ["--num_images", "6", "--num_keep_images", "1", "--num_inference_steps", "2", "--metrics", "digits"]
    if find_spec("open_clip"):
        clip = build_clip(tmp_path_factory.mktemp("clip"))
        shown += ["cmmd", "--clip_model", clip, "--clip_pretrained", "", "--real_images", str(home / "real")]
    assert main(["train", "seven", *base, "--data_dir", str(data), "--output_dir", str(folder), *TRAIN.split()]) == 0
    cache = ["--cache_dir", str(home / "cache"), "--prompt_set", str(home / "prompts.txt")]
    assert main(["evaluate", "--run", str(folder), *shown, *cache]) == 0
    assert main(["export", "--run", str(folder)]) == 0
    assert main(["report", "--run", str(folder), "--certificate"]) == 0
    several = home / "runs" / "several"
    images = ["--images", str(home / "others"), "--output_dir", str(several), "--concept", "seven"]
    assert main(["evaluate", "--lora", str(folder), str(folder / "export"), *images, *shown, *cache, *base]) == 0
    assert main(["report", "--run", str(several), "--certificate"]) == 0
    return folder


def published(run: Path) -> list[Path]:
    folders = (run, run.parent / "several")
    files = [folder / name for folder in folders for name in PUBLISHED]
    return [*files, *(path for path in (run / "export").rglob("*") if path.is_file())]


def test_published_files_hold_no_path_of_the_machine(run: Path) -> None:
    files = published(run)
    assert {path.name for path in files} >= {*PUBLISHED, "README.md", "seven.safetensors"}
    for path in files:
        content = path.read_bytes()
        where = content.find(TELLTALE.encode())
        assert where < 0, (path.name, content[max(0, where - 200) : where + 100])


def test_what_resuming_needs_keeps_its_paths(run: Path) -> None:
    """config.yaml and training.json are not published: they repeat the run and find its base again."""
    assert TELLTALE in (run / "config.yaml").read_text()
    assert TELLTALE in (run / "training.json").read_text()


def test_only_published_files_are_uploaded(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploaded: list[Any] = []
    api = SimpleNamespace(endpoint="hub", create_repo=lambda *args, **_: None)
    api.create_commit = lambda repo, operations, **_: uploaded.extend(operations)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: api)
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    assert main(["export", "--run", str(run), "--push_to_hub", "owner/name"]) == 0
    files = [Path(operation.path_or_fileobj) for operation in uploaded]
    assert {file.name for file in files} >= {"README.md", "seven.safetensors", "report.html"}
    assert {file.parent for file in files} == {run, run / "export"}
    assert {file.name for file in files if file.parent == run} == {"report.html", "report.md"}
    assert not any(TELLTALE.encode() in file.read_bytes() for file in files)
