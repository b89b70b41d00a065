"""The street on another device than the CPU, where a tensor on the wrong device or in the wrong precision is an error.

The device is a stand-in (stand_in.cpp), which is compiled for this test.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from train_runs import flags

pytestmark = pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")
HERE = Path(__file__).parent
FEW = {
    "num_unlabeled": 6,
    "num_mixed_in": 4,
    "num_positive": 6,
    "num_keep": 3,
    "max_train_steps": 3,
    "effective_batch_size": 8,
    "validation_steps": 2,
    "report_to": "none",
}


def on_stand_in(commands: Sequence[Sequence[str]], place: Path) -> None:
    ended = subprocess.run(
        [sys.executable, str(HERE / "stand_in.py"), str(place / "build")],
        input=json.dumps(commands),
        cwd=place,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]


def test_the_street_in_half_precision(tiny_base: Path, tmp_path: Path) -> None:
    common = flags({"mixed_precision": "fp16", "num_inference_steps": 2})
    run = ["--run", "runs/seven", "--debug", *common]
    commands = [
        ["train", "seven", "--debug", *common, *flags({"pretrained_model_name_or_path": tiny_base, **FEW})],
        ["evaluate", *run, *flags({"num_images": 2, "num_keep_images": 1})],
        ["attack", *run, "--attacks", "inversion", "quantisation"],
    ]
    on_stand_in(commands, tmp_path)
    training = json.loads((tmp_path / "runs" / "seven" / "training.json").read_text())
    assert training["cost"]["device"] == "npu"
    log = (tmp_path / "runs" / "seven" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(log[-1])["skipped_steps"] == 0
    results = json.loads((tmp_path / "runs" / "seven" / "results.json").read_text())
    assert {entry["attack"] for entry in results["attacks"]} == {"inversion", "quantisation"}
