"""Every command survives kill -9 at random moments: the same command then gives the undisturbed result."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import tree
from evaluation_runs import DIGIT_FILE

ROOT = str(Path(__file__).parent.parent)
KILLS = int(os.environ.get("KILLS", "5"))
IMAGES = "images: {positive: 4, unlabeled: 6, mixed_in: 2, keep: 1}\nkeep: ['a photo']\n"
CONCEPT = DIGIT_FILE.format(name="seven") + IMAGES
TRAIN = (
    "--rank 2 --max_train_steps 12 --effective_batch_size 8 --learning_rate 0.01 --validation_steps 6 "
    "--checkpointing_steps 1 --report_to none"
)
FEW = "--num_images 6 --num_keep_images 2 --num_inference_steps 2 --render_batch_size 2"


def start(command: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "sd_unlearn", *command.split()]
    environment = {**os.environ, "PYTHONPATH": ROOT}
    return subprocess.Popen(words, env=environment, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(command: str) -> float:
    """Run a command to its end. Returns its seconds."""
    started = time.monotonic()
    process = start(command)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return time.monotonic() - started


def killed(command: str, seconds: float, moments: random.Random) -> None:
    """Start the command KILLS times and kill it each time, in its second half: the first is spent on imports."""
    for _ in range(KILLS):
        process = start(command)
        try:
            process.wait(timeout=moments.uniform(0.5, 1) * seconds)
        except subprocess.TimeoutExpired:
            pass
        process.kill()
        process.communicate()


def contents(folder: Path, names: Callable[[str], bool]) -> dict[str, bytes]:
    """The files whose relative path is wanted. Of results.json without the time."""
    found = {name: (folder / name).read_bytes() for name in sorted(tree(folder)) if (folder / name).is_file()}
    found = {name: data for name, data in found.items() if names(name)}
    if "results.json" in found:
        found["results.json"] = json.dumps(json.loads(found["results.json"]) | {"created": ""}).encode()
    return found


@pytest.mark.slow
def test_five_kills_of_each_command_lose_nothing(tiny_base: Path) -> None:
    moments = random.Random(os.environ.get("KILL_SEED", "0"))
    Path("seven.yaml").write_text(CONCEPT)
    base = f"--pretrained_model_name_or_path {tiny_base}"
    same = f"--concept seven.yaml {base} --num_inference_steps 2 --render_batch_size 2"
    train = f"train {same} {TRAIN} --data_dir data --resume_from_checkpoint latest --output_dir"
    steps = {
        "data": (f"render {same} --data_dir data", lambda name: True),
        "run": (
            f"{train} run",
            lambda name: name.startswith(("adapter/", "metrics", "previews", "concept")),
        ),
        "results": (f"evaluate --run run {FEW} --cache_dir cache --output_dir results", lambda name: name[0] != "."),
        "out": ("export --run run --output_dir out", lambda name: True),
        "report": ("report --run report", lambda name: name.startswith(("report", "results.csv"))),
    }
    for folder, (command, names) in steps.items():
        if folder == "report":
            shutil.copytree("results", "report")
        seconds = finish(command)
        whole = contents(Path(folder), names)
        assert whole
        inputs = Path("results") if folder == "report" else None
        for place in (folder, "cache") if folder == "results" else (folder,):
            shutil.rmtree(place)
        if inputs:
            shutil.copytree(inputs, folder)
        killed(command, seconds, moments)
        finish(command)
        assert contents(Path(folder), names) == whole, folder
        left = [name for name in tree(Path()) if name.endswith((".tmp", ".old", ".lock"))]
        assert left == [], folder
