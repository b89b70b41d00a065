"""What the user sees and says while a run trains: metrics.jsonl, the progress bar, Ctrl-C."""

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
from tqdm import tqdm

from sd_unlearn.io.files import read_jsonl, write_text
from sd_unlearn.io.run_folder import METRICS

AGAIN = 2.0  # seconds after which a signal is a second one


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, after everything was saved."""


class MetricsLog:
    """metrics.jsonl, the tracker and the progress bar; only the first process shows and writes anything."""

    def __init__(self, run: Path, title: str, step: int, steps: int, accelerator: Accelerator) -> None:
        self.accelerator, self.path = accelerator, run / METRICS
        shown = self.accelerator.is_main_process
        if shown:  # a resumed run takes back what was logged after its checkpoint
            _drop_torn_line(self.path)
            kept = [line for line in read_jsonl(self.path) if line["step"] <= step] if self.path.is_file() else []
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self.file = open(self.path if shown else os.devnull, "a", encoding="utf-8")
        self.bar = tqdm(total=steps, initial=step, desc=title, unit="step", file=sys.stderr, disable=not shown)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.bar.close()

    def advance(self) -> None:
        self.bar.update()

    def write(self, figures: dict[str, float]) -> None:
        """One line of figures; those that are not finite are null."""
        known = {k: v for k, v in figures.items() if math.isfinite(v)}
        if {"mean_u", "mean_s", "ratio"} <= set(known):
            self.bar.set_postfix(U=f"{known['mean_u']:.3g}", S=f"{known['mean_s']:.3g}", ratio=f"{known['ratio']:.2f}")
        elif "ratio" not in figures:
            self.bar.write(f"step {figures['step']}: {known}", file=sys.stderr)
        self.accelerator.log({k: v for k, v in known.items() if k != "step"}, step=int(figures["step"]))
        self.file.write(json.dumps({k: known.get(k) for k in figures}) + "\n")
        self.file.flush()


def _drop_torn_line(path: Path) -> None:
    """Take back a last line without an end, as a full disk leaves it."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if text and not text.endswith("\n"):
        write_text(path, text[: text.rfind("\n") + 1])


@contextmanager
def stop_requests(accelerator: Accelerator) -> Iterator[Any]:
    """Ctrl-C and SIGTERM are noted, not obeyed at once; yields asked(together) -> whether to stop after this step.

    A second Ctrl-C, two seconds later or more, is obeyed at once; sooner it may be the same one, which the terminal and
    a launcher both pass on. Several processes must stop at the same step, so they agree on it, which waits
    for a GPU: there only where `together` says so. On a CPU, where steps are slow, at every step: after a Ctrl-C
    torch's launcher waits only so long (usually 30 seconds) before it kills.
    """
    noted: list[float] = []

    def note(number: int, frame: Any) -> None:
        now = time.monotonic()
        if noted and now - noted[0] > AGAIN:
            raise KeyboardInterrupt
        if not noted:
            accelerator.print("\nStopping after this step, saving. Once more: at once, without.", file=sys.stderr)
        noted.append(now)

    def asked(together: bool) -> bool:
        if accelerator.num_processes == 1:
            return bool(noted)
        if not together and accelerator.device.type != "cpu":
            return False
        return bool(accelerator.reduce(torch.tensor(float(bool(noted)), device=accelerator.device), "sum") > 0)

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: whoever runs us there handles signals
        before = {}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
