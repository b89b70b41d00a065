"""Tasks as jobs of a SLURM cluster, through submitit: each wave of tasks is an array.

At the time limit a job saves, is requeued, and continues from its last checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from submitit import AutoExecutor
from submitit.core.utils import FailedJobError
from submitit.helpers import Checkpointable, DelayedSubmission

from sd_unlearn.batch.engines.engine import Ended
from sd_unlearn.batch.execute import PATIENCE, start_task, stop_tasks, was_killed
from sd_unlearn.batch.record import is_locked
from sd_unlearn.errors import UnlearnError, UsageError, counted, reason

WORKERS = 1000  # jobs in the queue at the same time: a common limit of arrays
POLL = 1.0  # seconds
TIMEOUT_MIN = 240  # time limit of a job unless the list sets it
LOGGED = 500  # last characters of a failed job's log that are shown
SIGNAL_DELAY_S = 90  # seconds before the time limit at which a job gets the signal to save


class TaskJob(Checkpointable):
    """What a job of the cluster does."""

    process: BaseProcess | None = None

    def __call__(self, folder: str, threads: int) -> bool:
        """Carry out a task. Returns whether its process was killed."""
        self.process = start_task(Path(folder), threads)
        try:
            self.process.join()
        except KeyboardInterrupt:
            stop_tasks([self.process])
        return was_killed(self.process)

    def checkpoint(self, folder: str, threads: int) -> DelayedSubmission:
        """Called shortly before the time limit or a preemption: save, and submit the same task again."""
        stop_tasks([self.process] if self.process else [])
        return DelayedSubmission(TaskJob(), folder, threads)


class SlurmEngine:
    """Submits tasks and waits for their jobs. Jobs of a driver that was killed go on."""

    def __init__(self, options: Mapping[str, Any], folder: Path, workers: int | None, threads: int) -> None:
        self.workers, self.threads = workers or WORKERS, threads
        cluster = options.get("cluster", "slurm")
        parameters = {"name": "sd-unlearn", "cpus_per_task": threads, "timeout_min": TIMEOUT_MIN}
        parameters |= {"slurm_signal_delay_s": SIGNAL_DELAY_S}
        parameters |= {key: value for key, value in options.items() if key != "cluster"}
        try:
            self.executor = AutoExecutor(folder / "slurm", cluster=cluster)
            self.executor.update_parameters(**parameters)
        except (RuntimeError, ValueError, NameError, AssertionError, TypeError) as error:
            raise UsageError(f"slurm: {reason(error)}. Correct the key slurm of the job list.") from error
        self.runs_when_asked = cluster == "debug"  # in this process, when its result is asked for
        self.running: dict[Path, Any] = {}

    def start(self, folders: list[Path]) -> None:
        try:
            with self.executor.batch():
                jobs = [self.executor.submit(TaskJob(), str(folder), self.threads) for folder in folders]
        except (FailedJobError, OSError) as error:
            raise UnlearnError(
                f"slurm: the cluster refused {counted(len(folders), 'job')}: {reason(error)}. Check the key slurm of "
                "the job list, e.g. slurm_partition, and run the same command again."
            ) from error
        self.running.update(zip(folders, jobs, strict=True))

    def wait(self, seconds: float) -> list[Ended]:
        end = time.monotonic() + seconds
        while not (ended := [f for f, job in self.running.items() if self.runs_when_asked or job.done()]):
            if time.monotonic() > end:
                return []
            time.sleep(min(POLL, seconds))
        return [_how_ended(folder, self.running.pop(folder)) for folder in ended]

    def stop(self) -> None:
        for job in self.running.values():
            job.cancel(check=False)
        end = time.monotonic() + PATIENCE
        while any(is_locked(folder) for folder in self.running) and time.monotonic() < end:
            time.sleep(POLL)

    def close(self) -> None:
        """Jobs that still run are those of `stop`, which end by themselves."""


def _how_ended(folder: Path, job: Any) -> Ended:
    """Whether a job ended without a result (its node failed, or it was cancelled), or its task was killed."""
    try:
        return Ended(folder, lost=bool(job.result()))
    except Exception as error:  # submitit raises what it finds in the job's log
        end = " ".join(str(error).split())[-LOGGED:]
        return Ended(folder, lost=True, why=f"its job {job.job_id} failed (state {job.state}): {end}")
