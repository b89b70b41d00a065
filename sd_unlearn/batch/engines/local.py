"""Tasks in processes of this machine: one worker per GPU, or N on the CPU."""

from __future__ import annotations

import multiprocessing.connection
import os
from multiprocessing.process import BaseProcess
from pathlib import Path

from sd_unlearn.batch.engines.engine import Ended
from sd_unlearn.batch.execute import start_task, stop_tasks, was_killed


class LocalEngine:
    """Each worker has a GPU of its own; with more workers than GPUs they share them, without a GPU the CPU."""

    def __init__(self, workers: int | None, threads: int) -> None:
        gpus = visible_gpus()
        self.workers, self.threads = workers or len(gpus) or 1, threads
        self.free: list[str | None] = [gpus[i % len(gpus)] if gpus else None for i in range(self.workers)]
        self.running: dict[Path, tuple[BaseProcess, str | None]] = {}

    def start(self, folders: list[Path]) -> None:
        for folder in folders:
            gpu = self.free.pop(0)
            self.running[folder] = (start_task(folder, self.threads, gpu), gpu)

    def wait(self, seconds: float) -> list[Ended]:
        multiprocessing.connection.wait([process.sentinel for process, _ in self.running.values()], seconds)
        ended = []
        for folder, (process, gpu) in list(self.running.items()):
            if process.exitcode is not None:
                process.join()
                del self.running[folder]
                self.free.append(gpu)
                ended.append(Ended(folder, lost=was_killed(process)))
        return ended

    def stop(self) -> None:
        stop_tasks(process for process, _ in self.running.values())

    def close(self) -> None:
        for process, _ in self.running.values():
            process.kill()


def visible_gpus() -> list[str]:
    """The values of CUDA_VISIBLE_DEVICES that show one GPU each; empty without CUDA."""
    import torch

    count = torch.cuda.device_count()
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    return shown.split(",")[:count] if shown else [str(i) for i in range(count)]
