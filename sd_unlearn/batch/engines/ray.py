"""Tasks on a Ray cluster: one actor per worker, which starts the process of each task on its node.

A worker that is lost, with its node or killed, is replaced, and its task is started again.
"""

from __future__ import annotations

import os
import threading
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from sd_unlearn.batch.engines.engine import Ended
from sd_unlearn.batch.execute import PATIENCE, start_task, stop_tasks, was_killed
from sd_unlearn.batch.job_list import RayOptions
from sd_unlearn.errors import UnlearnError, UsageError, install_command, reason

OBJECT_STORE = 100 * 2**20  # bytes, of a cluster started here: only names of folders are passed


class Worker:
    """The actor: runs one task at a time in a process of its own."""

    def __init__(self) -> None:
        self.process: BaseProcess | None = None
        self.stopped = threading.Event()

    def run(self, folder: str, threads: int) -> bool:
        """Carry out a task. Returns whether its process was killed."""
        if self.stopped.is_set():
            return False
        self.process = start_task(Path(folder), threads)
        self.process.join()
        return was_killed(self.process)

    def stop(self) -> None:
        """Let the running task save and end."""
        self.stopped.set()
        stop_tasks([self.process] if self.process else [])


class RayEngine:
    """The actors of a list, on a cluster that runs already (address) or on one started on this machine."""

    def __init__(self, options: RayOptions, workers: int | None, threads: int) -> None:
        self.ray, self.threads = _import(), threads
        cpus = options.num_cpus or threads
        self._connect(options.address, (workers or 1) * cpus)
        cluster = self.ray.cluster_resources()
        gpus = options.num_gpus if options.num_gpus is not None else float(cluster.get("GPU", 0) > 0)
        share = cluster.get("GPU", 0) / gpus if gpus else cluster.get("CPU", 1) / cpus
        self.workers = workers or max(1, int(share))
        actor = self.ray.remote(Worker)
        self.make = actor.options(num_cpus=cpus, num_gpus=gpus, max_concurrency=2).remote  # run and stop
        self.free: list[Any] = []
        self.running: dict[Any, tuple[Path, Any]] = {}

    def _connect(self, address: str | None, cpus: float) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        shared: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        try:
            if address is not None:
                self.ray.init(address, **shared)
            else:
                cpus = max(cpus, os.cpu_count() or 1)
                memory = {"object_store_memory": OBJECT_STORE, "include_dashboard": False}
                self.ray.init("local", num_cpus=int(cpus), **memory, **shared)
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
            raise UnlearnError(
                f"Ray cannot be reached ({reason(error)}). Start it with ray start --head, or give its --address."
            ) from error

    def start(self, folders: list[Path]) -> None:
        for folder in folders:
            actor = self.free.pop() if self.free else self.make()
            self.running[actor.run.remote(str(folder), self.threads)] = (folder, actor)

    def wait(self, seconds: float) -> list[Ended]:
        ready, _ = self.ray.wait(list(self.running), timeout=seconds)
        return [self._end(ref) for ref in ready]

    def _end(self, ref: Any) -> Ended:
        folder, actor = self.running.pop(ref)
        try:
            lost = self.ray.get(ref)
        except self.ray.exceptions.RayError:  # the actor died: another one takes its place
            return Ended(folder, lost=True)
        self.free.append(actor)
        return Ended(folder, lost=lost)

    def stop(self) -> None:
        stopping = [actor.stop.remote() for _, actor in self.running.values()]
        if stopping:
            self.ray.wait(stopping, num_returns=len(stopping), timeout=PATIENCE)

    def close(self) -> None:
        for actor in (*self.free, *(actor for _, actor in self.running.values())):
            self.ray.kill(actor)
        self.ray.shutdown()


def _import() -> Any:
    try:
        import ray
    except ImportError:
        raise UsageError(f"--engine ray needs Ray: {install_command('ray')}, or --engine local.") from None
    return ray
