"""`bench.py forget`: how long until a concept of digits is gone and the rest still there, by two settings."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from sd_unlearn.io.files import read_json, read_jsonl_lines
from sd_unlearn.io.run_folder import METRICS, TRAINING

LEAKAGE, RETENTION = 0.02, 0.98
MARGIN = 60.0  # seconds a run may take to load before its own clock starts
# The paper's own setting for Stable Diffusion: all weights, own captions, no teacher, a small constant learning rate.
# Its end is the time limit, so the number of steps is only large.
PAPER = {
    "method": "full",
    "target": "noise",
    "caption_mode": "own",
    "learning_rate": 1e-5,
    "train_batch_size": 16,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 0,
    "max_train_steps": 1_000_000,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "ours": {},
    "paper-0.1": PAPER | {"beta": 0.1},
    "paper-0.2": PAPER | {"beta": 0.2},
}


@dataclass(frozen=True)
class Outcome:
    """What a run folder says: the first of two probes in a row that met the goal, else the best one."""

    reached: bool
    seconds: float | None  # of training without the probes, at that probe
    images: int | None
    leakage: float | None
    retention: float | None
    probes: int
    last_seconds: float | None  # at the last probe
    stopped: str  # why training ended: what training.json says, or that it was cut off


def read_outcome(run: Path) -> Outcome:
    """Of a finished run or of one that was cut off in the middle of a line; without a probe nothing was reached."""
    probes = [line for line in _lines(run / METRICS) if "probe_leakage" in line and "probe_retention" in line]
    met = [probe for probe, after in pairwise(probes) if _shortfall(probe) == _shortfall(after) == 0]
    best = met[:1] or sorted(probes, key=_shortfall)[:1]
    finished = (run / TRAINING).is_file()
    stopped = str(read_json(run / TRAINING)["cost"].get("stopped") or "finished") if finished else "cut off"
    if not best:
        return Outcome(False, None, None, None, None, 0, None, stopped)
    found = best[0]
    return Outcome(
        bool(met),
        found["seconds"],
        found["images"],
        found["probe_leakage"],
        found["probe_retention"],
        len(probes),
        probes[-1]["seconds"],
        stopped,
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    whole = path.with_suffix(".whole.jsonl")  # a killed run may leave half a line at the end
    whole.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")
    try:
        return list(read_jsonl_lines(whole).values())
    finally:
        whole.unlink()


def _shortfall(probe: dict[str, Any]) -> float:
    return max(0.0, probe["probe_leakage"] - LEAKAGE) + max(0.0, RETENTION - probe["probe_retention"])


def run(
    minutes: float, concept: str, probe_steps: int, paper_probe_steps: int, work: Path, names: Sequence[str]
) -> dict[str, Outcome]:
    """Render the concept's folder once, then train by each setting in a process of its own until it is done or late."""
    command = [sys.executable, "-m", "sd_unlearn.cli"]
    data = work / "data"
    subprocess.run([*command, "render", "--concept", concept, "--data_dir", str(data)], check=True, stdout=sys.stderr)
    outcomes = {}
    for name in names:
        setting = SETTINGS[name]
        output = work / name
        options = {
            "concept": concept,
            "data_dir": data,
            "output_dir": output,
            "probe": "leakage",
            "probe_steps": paper_probe_steps if setting else probe_steps,
            "validation_steps": 0,
            "checkpointing_steps": 0,
            "report_to": "none",
            **setting,
        }
        flags = [text for key, value in options.items() for text in (f"--{key}", str(value))]
        train([*command, "train", *flags, "--stop_when_forgotten", "--overwrite"], minutes * 60 + MARGIN)
        outcomes[name] = read_outcome(output)
    return outcomes


def train(command: list[str], limit: float) -> None:
    """Run a training and end it at the limit (seconds); what it wrote until then stays.

    Raises:
        subprocess.CalledProcessError: it failed by itself.
    """
    process = subprocess.Popen(command, stdout=sys.stderr)
    try:
        code = process.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        process.terminate()
        time.sleep(1)
        process.kill()
        process.wait()
        return
    if code:
        raise subprocess.CalledProcessError(code, command)
