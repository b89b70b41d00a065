"""`sd-unlearn batch status`: how far a job list is, read from the files of its tasks."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

from sd_unlearn.batch.plan import Plan, Task
from sd_unlearn.batch.record import LOG, Status, read_state, status_of
from sd_unlearn.errors import counted

TAIL_BYTES = 4096


def statuses_of(plan: Plan) -> dict[str, Status]:
    """The state of each task of a plan, by id."""
    return {task: status_of(plan.folder_of(task)) for task in plan.tasks}


def describe_tasks(plan: Plan, missing: list[Task], statuses: Mapping[str, Status]) -> str:
    """One line per task: done or missing, what it is and where it is recorded."""
    wanted = {task.id for task in missing}
    lines = []
    for task in plan.tasks.values():
        status = statuses[task.id] if task.id in wanted or statuses[task.id] == "done" else "not needed"
        lines.append(f"{status:<11} {task.order.title}  {plan.folder_of(task.id)}")
    counts = Counter(statuses[task.id] for task in plan.tasks.values())
    return "\n".join([*lines, f"{_size(plan)}: {_counted(counts)}."])


def describe_progress(plan: Plan, missing: list[Task], statuses: Mapping[str, Status]) -> str:
    """One line per running task and per failure, then how much is done and about how long the rest takes."""
    lines = []
    for task in plan.tasks.values():
        folder, status = plan.folder_of(task.id), statuses[task.id]
        state = read_state(folder)
        if status == "running":
            elapsed = tqdm.format_interval(time.time() - state.started)
            lines.append(f"running     {task.order.title} on {state.host}, {elapsed}{_last_line(folder / LOG)}")
        elif status == "failed":
            lines.append(f"failed      {task.order.title}: {' '.join(state.message.split())} Log: {folder / LOG}")
    counts = Counter(statuses.values())
    running = counts["running"]
    left = f", about {tqdm.format_interval(seconds)} left" if (seconds := _seconds_left(plan, missing, running)) else ""
    return "\n".join([*lines, f"{_size(plan)}: {_counted(counts)}{left}."])


def _size(plan: Plan) -> str:
    return f"{counted(len(plan.tasks), 'task')} of {counted(len(plan.lines), 'job')}"


def _counted(counts: Mapping[Status, int]) -> str:
    order: tuple[Status, ...] = ("done", "running", "failed", "interrupted", "missing")
    return ", ".join(f"{counts[status]} {status}" for status in order if counts.get(status))


def _seconds_left(plan: Plan, missing: list[Task], running: int) -> float:
    """Time for the missing tasks on as many workers as run now, from the mean time of each stage; 0: unknown."""
    known: dict[str, list[float]] = {}
    for task in plan.tasks.values():
        state = read_state(plan.folder_of(task.id))
        if state.status == "done":
            known.setdefault(task.order.stage, []).append(state.seconds)
    means = {stage: sum(seconds) / len(seconds) for stage, seconds in known.items()}
    if not running or any(task.order.stage not in means for task in missing):
        return 0.0
    return sum(means[task.order.stage] for task in missing) / running


def _last_line(log: Path) -> str:
    """The last line of a log, which says how far the task is."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL_BYTES))
            lines = file.read().decode("utf-8", "replace").split("\n")
    except OSError:
        return ""
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f": {last[:100]}" if last else ""
