"""The folder of a task: what is to be done (task.json, options.yaml, concept.yaml), its state (state.json) and its log.

Everything is written atomically, so that other processes can read it at any time.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from filelock import FileLock, Timeout

from sd_unlearn.attacks.attack import attack_names
from sd_unlearn.batch.identity import digest_of
from sd_unlearn.batch.job_list import Stage
from sd_unlearn.config.attack import AttackConfig
from sd_unlearn.data.concept import Concept
from sd_unlearn.data.several import write_concepts
from sd_unlearn.errors import UsageError
from sd_unlearn.evaluation.earlier import earlier_results
from sd_unlearn.io.files import write_json, write_text
from sd_unlearn.io.lock import LOCK
from sd_unlearn.io.reading import file_sha256, read_json, read_yaml
from sd_unlearn.io.run_folder import EVALUATION, RESULTS
from sd_unlearn.io.schema import OPEN, convert, validate
from sd_unlearn.results import BASE, FLOOR

TASK, OPTIONS, STATE, LOG, CONCEPT = "task.json", "options.yaml", "state.json", "log.txt", "concept.yaml"
MERGED = "merged-"  # and the address of a task: its own folder in the run folder, for a merged checkpoint
Status = Literal["missing", "running", "done", "failed", "interrupted"]


@dataclass(frozen=True)
class Order:
    """The content of task.json: what the process of a task must know besides the options."""

    __pydantic_config__ = OPEN

    stage: Stage
    target: str  # the folder that the stage writes into
    product: str  # the file that it writes last
    title: str = ""


@dataclass(frozen=True)
class State:
    """The content of state.json."""

    __pydantic_config__ = OPEN

    status: Status = "missing"
    started: float = 0.0  # seconds since the epoch
    seconds: float = 0.0  # of the attempt that finished
    attempts: int = 0
    host: str = ""
    pid: int = 0
    message: str = ""  # why it failed, or which --fail_if condition holds
    evidence: str = ""  # see evidence_of


def write_order(folder: Path, order: Order, concept: Concept, options: dict[str, Any]) -> None:
    """Write what a task does, unless it is done. Again before every attempt: some options do not change its address.

    options.yaml can be given to the stage's command with --config.
    """
    if is_done(folder):
        return
    write_concepts(folder / CONCEPT, concept)
    write_text(folder / OPTIONS, yaml.safe_dump(options, sort_keys=False, allow_unicode=True))
    write_json(folder / TASK, dataclasses.asdict(order))


def read_order(folder: Path) -> Order:
    return validate(Order, read_json(folder / TASK), str(folder / TASK))


def read_state(folder: Path) -> State:
    """The state of a task; missing if there is none, or if the file is damaged."""
    try:
        return validate(State, read_json(folder / STATE), str(folder / STATE))
    except UsageError:
        return State()


def write_state(folder: Path, state: State) -> None:
    write_json(folder / STATE, dataclasses.asdict(state))


def begin(folder: Path) -> State:
    """Record that this process now carries out a task."""
    attempts = read_state(folder).attempts + 1
    state = State("running", time.time(), attempts=attempts, host=socket.gethostname(), pid=os.getpid())
    write_state(folder, state)
    return state


def finish(folder: Path, state: State, status: Status, message: str = "", evidence: str = "") -> None:
    """Record how a task ended."""
    seconds = round(time.time() - state.started, 3)
    write_state(folder, dataclasses.replace(state, status=status, seconds=seconds, message=message, evidence=evidence))


def evidence_of(folder: Path, order: Order) -> str:
    """What tells the results of a task from those that a later one with other options wrote in their place.

    "" if there are none, and for stages whose results have a folder of their own.
    """
    if order.stage == "attack":
        return _attacks_of(folder, Path(order.target) / RESULTS)
    settings = Path(order.target) / EVALUATION
    return file_sha256(settings) if order.stage == "evaluate" and settings.is_file() else ""


def _attacks_of(folder: Path, results: Path) -> str:
    """What identifies how a task's attacks in results.json were made and judged; "" without any or if it is damaged.

    Ids of LoRAs are left out, because an evaluation at several strengths changes them.
    """
    config = convert(AttackConfig, read_yaml(folder / OPTIONS, "task"), str(folder / OPTIONS))
    names, found = attack_names(config), earlier_results(results)
    thresholds = {card.get("detector"): card.get("threshold") for card in found.get("cards", ())}
    attacks = {
        digest_of(
            [entry.get(key) for key in ("attack", "budget", "settings", "seed", "detector")],
            thresholds.get(entry.get("detector")),
            entry.get("subject") in (BASE, FLOOR) and entry["subject"],
        )
        for entry in found.get("attacks", ())
        if entry.get("attack") in names
    }
    sampler = {key: value for key, value in found.get("sampler", {}).items() if key != "tiled_images"}
    return digest_of(sorted(attacks), sampler) if attacks else ""


def is_done(folder: Path) -> bool:
    """Whether a task has finished and what it wrote is still there."""
    state = read_state(folder)
    if state.status != "done":
        return False
    order = read_order(folder)
    product, results = Path(order.product), Path(order.target) / RESULTS
    if not product.exists() or evidence_of(folder, order) != state.evidence:
        return False
    if order.stage == "attack":  # "": an evaluation left its attacks out
        return bool(state.evidence)
    if order.stage == "report":
        return results.is_file() and product.stat().st_mtime >= results.stat().st_mtime
    return True


def status_of(folder: Path) -> Status:
    """The state of a task as it is now: what was done but is gone is missing, what was killed is interrupted."""
    status = read_state(folder).status
    if status == "running" and not is_locked(folder):
        return "interrupted"
    if status == "done" and not is_done(folder):
        return "missing"
    return status


def is_locked(folder: Path) -> bool:
    """Whether a process, on any machine, holds the lock of a task. The system releases the locks of killed ones."""
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except (Timeout, OSError):
        return True
    lock.release()
    return False
