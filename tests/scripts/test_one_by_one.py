"""scripts/one_by_one.py: every request starts from the model that the former ones left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def test_each_request_is_trained_on_what_the_former_ones_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import one_by_one

    bases: dict[str, str] = {}

    def train_once(name: str, run: Path, options: dict[str, Any]) -> Path:
        bases[name] = options["pretrained_model_name_or_path"]
        return run

    def merge(run: Path) -> Path:
        folder = run / "merged"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "unet.safetensors").write_text(run.name)  # other weights after each request
        return folder

    monkeypatch.setattr(one_by_one, "train_once", train_once)
    monkeypatch.setattr(one_by_one, "merge", merge)
    names = ["pistol", "knife", "cat"]
    runs = one_by_one.serve(tmp_path / "first", names, tmp_path)
    assert list(bases.items()) == [("knife", str(runs[0] / "merged")), ("cat", str(runs[1] / "merged"))]
    assert len(set(runs)) == 3
    assert one_by_one.serve(tmp_path / "first", names, tmp_path) == runs  # repeated without any new folder
