"""Wrong usage and help are answered without torch, which takes seconds to import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# torch cannot be imported in this process, so a command that needs it before its options are checked fails with code 1.
WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
from sd_unlearn import cli
for line in sys.stdin.read().splitlines():
    print(cli.main(line.split()), line)
"""
HELP = [
    "--help",
    "--version",
    "train --help_all",
    "render --help",
    "evaluate --help_all",
    "attack --help",
    "calibrate --help_all",
    "ui --help",
    "paper --help",
]
WRONG = [
    "train",
    "train --concept sevn",
    "train --concept seven --rank 0",
    "train --concept seven --rank x",
    "train --concept seven --lora_targets everything",
    "train --concept seven --optimizer adamw9bit",
    "train --concept seven --pretrained_model_name_or_path nowhere.safetensors",
    "train --concept seven --data_dir here --output_dir here/run",
    "train --concept seven --data_dir photos",
    "train --concept seven --resume_from_checkpoint nowhere",
    "train --concept seven --probe_steps 5 --num_positive 3",
    "train --concept seven --beta_sweep x",
    "train --concept seven --config nowhere.yaml",
    "train --concept seven --overwrit",
    "render",
    "render --concept seven --resolution 30",
    "evaluate",
    "evaluate --run nowhere",
    "attack",
    "attack --run nowhere",
    "attack --run nowhere --attacks sofft",
    "evaluate --lora nowhere.safetensors",
    "evaluate --lora nowhere.safetensors --fail_if leakage",
    "calibrate",
    "calibrate --run nowhere",
    "ui --port 0",
    "export",
    "export --run nowhere",
    "export --run photos",
    "export --run nowhere --private",
    "export --run nowhere --merge model.ckpt",
    "report",
    "report --run nowhere",
]


@pytest.mark.parametrize(("code", "commands"), [(0, HELP), (2, WRONG)], ids=["help", "wrong"])
def test_answers_without_torch(tmp_path: Path, code: int, commands: list[str]) -> None:
    (tmp_path / "photos" / "0_unlabeled").mkdir(parents=True)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH],
        input="\n".join(commands),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ,
        check=True,
    )
    answered = [line for line in done.stdout.splitlines() if line.startswith(f"{code} ")]
    assert answered == [f"{code} {line}" for line in commands], done.stderr
