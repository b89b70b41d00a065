"""What an engine is: it runs tasks, several at a time, and says how their processes ended."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Protocol


class Ended(NamedTuple):
    """A task whose process has ended; its state.json says how."""

    folder: Path
    lost: bool = False  # the process or its worker was killed, so that the task did not end by itself
    why: str = "its process was killed"  # if it is lost


class Engine(Protocol):
    """Runs tasks. Every engine calls execute.start_task, so that the results do not depend on the engine."""

    workers: int  # tasks at the same time

    def start(self, folders: list[Path]) -> None:
        """Start all of the tasks; never more than `workers` at a time.

        Raises:
            UnlearnError: none of them was started.
        """

    def wait(self, seconds: float) -> list[Ended]:
        """The tasks that have ended since the last call; waits for the first of them at most so long."""

    def stop(self) -> None:
        """Let running tasks save and end; returns when they have."""

    def close(self) -> None:
        """Release workers."""
