"""Progress bar, metrics.jsonl and Ctrl-C handling."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from sd_unlearn.io.files import write_text
from sd_unlearn.io.progress import Progress
from sd_unlearn.io.reading import read_jsonl, read_text
from sd_unlearn.io.run_folder import METRICS
from sd_unlearn.training.provenance import peak_memory_mb

# Logged with the metrics; they differ between equal runs. Memory as `peak_memory_mb`.
COST = {"images_per_second": "img/s", "peak_memory_gib": "GiB"}
HANGUP = getattr(signal, "SIGHUP", None)  # of a closed terminal; Windows has none
SECOND_SIGNAL = 2.0  # seconds; a signal sooner after the first may be the same one, passed on by a launcher


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, SIGTERM or SIGHUP, raised after a checkpoint was saved."""


class MetricsLog:
    """metrics.jsonl, the tracker and the progress bar. Only the first process shows and writes anything."""

    def __init__(self, run: Path, title: str, step: int, steps: int, accelerator: Accelerator) -> None:
        self.accelerator, self.path = accelerator, run / METRICS
        main = self.accelerator.is_main_process
        if main:  # a resumed run drops what was logged after its checkpoint
            _drop_torn_line(self.path)
            kept = [line for line in read_jsonl(self.path) if _step(line) <= step] if self.path.is_file() else []
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self.file = open(self.path if main else os.devnull, "a", encoding="utf-8")
        self.progress = Progress(steps, title, "step", done=step, shown=main)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.progress.close()

    def advance(self) -> None:
        self.progress.advance()

    def write_note(self, text: str, values: dict[str, float]) -> None:
        """Show a line of text and append what it is about to metrics.jsonl."""
        self.progress.message(text)
        self.file.write(json.dumps(values) + "\n")
        self.file.flush()

    def write(self, metrics: dict[str, float]) -> None:
        """Append one line; values that are not finite become null."""
        finite = {k: v for k, v in metrics.items() if math.isfinite(v)}
        if {"mean_u", "mean_s"} <= set(finite):
            losses = {"mean_u": "U", "mean_s": "S", "ratio": "ratio"}
            moved = {"moved": "moved", "spillover": "spillover"}
            shown = {"loss": "loss", **(moved if "moved" in finite else losses), **COST}
            self.progress.show(**{name: f"{finite[key]:.3g}" for key, name in shown.items() if key in finite})
        elif "ratio" not in metrics:
            self.progress.message(f"step {metrics['step']}: {finite}")
        self.accelerator.log({k: v for k, v in finite.items() if k != "step"}, step=int(metrics["step"]))
        self.file.write(json.dumps({k: finite.get(k) for k in metrics}) + "\n")
        self.file.flush()


class Throughput:
    """Images a second since the last reading, without what runs in `paused` (previews, probes, checkpoints)."""

    def __init__(self, images_per_step: int, step: int) -> None:
        self.images_per_step, self.step = images_per_step, step
        self.since, self.pauses = time.monotonic(), 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.pauses += time.monotonic() - began

    def read(self, step: int) -> dict[str, float]:
        """What to log at a step, once the device has finished it: the keys of COST."""
        now = time.monotonic()
        speed = (step - self.step) * self.images_per_step / max(now - self.since - self.pauses, 1e-9)
        self.step, self.since, self.pauses = step, now, 0.0
        return {"images_per_second": round(speed, 3), "peak_memory_gib": round(peak_memory_mb() / 1024, 3)}


def _step(line: dict[str, Any]) -> float:
    """The step of a line; a line without one is dropped when a run is resumed."""
    step = line.get("step")
    return step if isinstance(step, int | float) else math.inf


def _drop_torn_line(path: Path) -> None:
    """Remove a last line without a line end, as a full disk leaves it."""
    text = read_text(path) if path.is_file() else ""
    if text and not text.endswith("\n"):
        write_text(path, text[: text.rfind("\n") + 1])


@contextmanager
def stop_requests(accelerator: Accelerator) -> Iterator[Any]:
    """Catch Ctrl-C, SIGTERM and SIGHUP (a closed terminal).

    Yields stop_requested() -> whether to stop after this step.

    A second Ctrl-C after SECOND_SIGNAL seconds raises KeyboardInterrupt at once.

    Several processes must stop at the same step, so they agree on it, after every step: torch's launcher kills them
    some time after a Ctrl-C (usually 30 seconds), and every step waits for all of them anyway (`memory.together`).
    """
    signals: list[float] = []
    terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]

    def note(number: int, frame: Any) -> None:
        if number == HANGUP:
            _discard_output(terminals)
        now = time.monotonic()
        if signals and now - signals[0] > SECOND_SIGNAL:
            raise KeyboardInterrupt
        if not signals:
            accelerator.print("\nSaving after this step. Press Ctrl-C again to quit without saving.", file=sys.stderr)
        signals.append(now)

    def stop_requested() -> bool:
        if accelerator.num_processes == 1:
            return bool(signals)
        return bool(accelerator.reduce(torch.tensor(float(bool(signals)), device=accelerator.device), "sum") > 0)

    before = _catch(note)
    try:
        yield stop_requested
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _discard_output(descriptors: list[int]) -> None:
    """Send what is written to a closed terminal nowhere: writing to it would raise before the checkpoint is saved."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in descriptors:
        os.dup2(nowhere, descriptor)
    os.close(nowhere)


def _catch(handler: Any) -> dict[int, Any]:
    """Install a handler of the signals that stop a training. Returns the handlers before."""
    caught = [signal.SIGINT, signal.SIGTERM]
    if HANGUP and signal.getsignal(HANGUP) is not signal.SIG_IGN:  # nohup ignores it
        caught.append(HANGUP)
    try:
        return {number: signal.signal(number, handler) for number in caught}
    except ValueError:  # not the main thread: the caller handles signals
        return {}
