"""`bench.py forget`: time until a concept of digits is unlearned and the others are retained, for several settings."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from sd_unlearn.io.reading import read_json, read_jsonl_lines
from sd_unlearn.io.run_folder import METRICS, TRAINING
from sd_unlearn.training.probe import CLEAN_LIMIT, LEAKAGE_LIMIT, RETENTION_LIMIT

MARGIN = 60.0  # seconds for loading, which the time limit does not count
# The paper's setting for Stable Diffusion: all weights, own captions, no teacher, a small constant learning rate.
# The time limit ends it, so the number of steps is larger than any run takes.
PAPER = {
    "method": "full",
    "target": "noise",
    "caption_mode": "own",
    "learning_rate": 1e-5,
    "effective_batch_size": 16,
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
    """The first of two consecutive probes of a run that met the goal, else the best probe."""

    reached: bool
    seconds: float | None  # of training until that probe, without the time of the probes
    images: int | None
    leakage: float | None
    retention: float | None
    clean: float | None  # clean replacement
    probes: int
    last_seconds: float | None  # at the last probe
    stopped: str  # why training ended: the entry of training.json, or "cut off"


def read_outcome(run: Path) -> Outcome:
    """Read the outcome of a finished or killed run. Without any probe, the goal counts as not reached."""
    probes = [line for line in _lines(run / METRICS) if "probe_clean" in line]
    met = [probe for probe, after in pairwise(probes) if _shortfall(probe) == _shortfall(after) == 0]
    best = met[:1] or sorted(probes, key=_shortfall)[:1]
    finished = (run / TRAINING).is_file()
    stopped = str(read_json(run / TRAINING)["cost"].get("stopped") or "finished") if finished else "cut off"
    if not best:
        return Outcome(False, None, None, None, None, None, 0, None, stopped)
    probe = best[0]
    return Outcome(
        bool(met),
        probe["seconds"],
        probe["images"],
        probe["probe_leakage"],
        probe["probe_retention"],
        probe["probe_clean"],
        len(probes),
        probes[-1]["seconds"],
        stopped,
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    whole = path.with_suffix(".whole.jsonl")  # a killed run can leave an incomplete line at the end
    whole.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")
    try:
        return list(read_jsonl_lines(whole).values())
    finally:
        whole.unlink()


def _shortfall(probe: dict[str, Any]) -> float:
    missing = RETENTION_LIMIT - probe["probe_retention"], CLEAN_LIMIT - probe["probe_clean"]
    return max(0.0, probe["probe_leakage"] - LEAKAGE_LIMIT) + sum(max(0.0, part) for part in missing)


def run(
    minutes: float, concept: str, probe_steps: int, paper_probe_steps: int, work: Path, names: Sequence[str]
) -> dict[str, Outcome]:
    """Render the data folder once, then train with each setting in a separate process until it ends or times out.

    Args:
        minutes: Time limit for each setting.
        probe_steps, paper_probe_steps: Steps between two probes.
        work: Folder for the data and the runs.
        names: Keys of SETTINGS.
    """
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
    """Run a training and end it after `limit` seconds. Its files stay.

    Raises:
        subprocess.CalledProcessError: the training failed.
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
