"""How well `sd-unlearn batch` uses two workers of one core each: the same list with one worker and with two."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from sd_unlearn.batch.job_list import read_job_list
from sd_unlearn.batch.plan import make_plan
from sd_unlearn.batch.record import read_state
from sd_unlearn.config.batch import BatchConfig

SEEDS = 6


def job_list(folder: Path, steps: int, engine: str) -> dict[str, Any]:
    """12 trainings and evaluations of two concepts on digits."""
    return {
        "concepts": ["seven", "three"],
        "options": {"max_train_steps": steps, "validation_steps": 0, "report_to": "none"},
        "grid": {"seed": list(range(SEEDS))},
        "stages": ["train", "evaluate"],
        "evaluate": {"num_images": 20, "num_keep_images": 2},
        "output_dir": str(folder / "runs"),
        "engine": engine,
        "threads": 1,
    }


def batch(args: argparse.Namespace) -> dict[str, Any]:
    """Run the list once with each number of workers, in new folders: {engine, steps, seconds, tasks, efficiency}."""
    seconds: dict[int, float] = {}
    by_stage: dict[str, list[float]] = {}
    for workers in (1, 2):
        with tempfile.TemporaryDirectory() as place:
            path = Path(place) / "jobs.yaml"
            path.write_text(yaml.safe_dump(job_list(Path(place), args.steps, args.engine)))
            command = [sys.executable, "-m", "sd_unlearn", "batch", str(path), "--workers", str(workers)]
            subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
            plan = make_plan(read_job_list(BatchConfig(path)))
            states = {task: read_state(plan.folder_of(task)) for task in plan.tasks}
            begun = min(state.started for state in states.values())
            seconds[workers] = max(state.started + state.seconds for state in states.values()) - begun
            if workers == 1:
                for task, state in states.items():
                    by_stage.setdefault(plan.tasks[task].order.stage, []).append(state.seconds)
    return {
        "engine": args.engine,
        "steps": args.steps,
        "seconds": seconds,
        "tasks": {stage: sum(times) / len(times) for stage, times in by_stage.items()},
        "efficiency": seconds[1] / (2 * seconds[2]),
    }


def batch_table(result: dict[str, Any]) -> str:
    """The result as a Markdown table, and the mean time of a task of each stage."""
    means = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in result["tasks"].items())
    lines = ["| engine | 1 worker | 2 workers | efficiency |", "|---|---|---|---|"]
    one, two = result["seconds"][1], result["seconds"][2]
    lines.append(f"| {result['engine']} | {one:.0f} s | {two:.0f} s | {result['efficiency']:.2f} |")
    return "\n".join([*lines, "", f"Mean of a task with 1 worker: {means} ({result['steps']} steps)."])
