"""Run the missing tasks of a plan on an engine: in order of their needs, with retries, past failures."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from sd_unlearn.batch.engines.engine import Ended, Engine
from sd_unlearn.batch.plan import Plan, Task
from sd_unlearn.batch.record import LOG, is_done, read_state, write_order
from sd_unlearn.errors import UnlearnError
from sd_unlearn.io.progress import Progress

POLL = 1.0  # seconds


@dataclass
class Outcome:
    """How the tasks of a run ended, by id."""

    done: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)  # id -> why
    skipped: dict[str, str] = field(default_factory=dict)  # id -> title of the failed task that it needs
    stopped: bool = False  # more than max_failures failed


class Run:
    """Starts each task when those it needs are done."""

    def __init__(self, plan: Plan, tasks: list[Task], engine: Engine, progress: Progress) -> None:
        self.plan, self.engine, self.progress = plan, engine, progress
        self.waiting = {task.id: task for task in tasks}
        self.running: dict[Path, Task] = {}
        self.lost: dict[str, int] = {}
        self.outcome = Outcome()

    def all(self) -> Outcome:
        """Run the tasks.

        Raises:
            UnlearnError: the engine starts no tasks. None is running any more.
            KeyboardInterrupt: running tasks have saved and ended.
        """
        try:
            while self.running or self._start():
                ended = self.engine.wait(POLL)
                for each in ended:
                    self._end(self.running.pop(each.folder), each)
                if ended:
                    self._start()
        except KeyboardInterrupt:
            self.progress.message("Interrupted: waiting until the running tasks have saved.")
            self.engine.stop()
            raise
        return self.outcome

    def _start(self) -> bool:
        """Start tasks on the free workers. Returns whether any were started."""
        if self.outcome.stopped:
            return False
        free = self.engine.workers - len(self.running)
        ready = [task for task in self.waiting.values() if not any(need in self.waiting for need in task.needs)]
        ready = [task for task in ready if not self._running(task.needs)][:free]
        if not ready:
            return False
        folders = {self.plan.folder_of(task.id): task for task in ready}
        for folder, task in folders.items():
            write_order(folder, task.order, task.concept, task.options)
        try:
            self.engine.start(list(folders))
        except UnlearnError as error:
            if not self.running:
                raise
            self.progress.message(f"{error} Trying again when a running task has ended.")
            return False
        self.running |= folders
        for task in ready:
            del self.waiting[task.id]
        self._show()
        return True

    def _running(self, ids: tuple[str, ...]) -> bool:
        return any(task.id in ids for task in self.running.values())

    def _end(self, task: Task, ended: Ended) -> None:
        state = read_state(ended.folder)
        if is_done(ended.folder):
            self.outcome.done.add(task.id)
            note = f" {state.message}" if state.message else ""
            self._advance(f"{task.order.title}: done in {state.seconds:.0f} s.{note}")
        elif ended.lost and self.lost.get(task.id, 0) < self.plan.jobs.retries:
            self.lost[task.id] = self.lost.get(task.id, 0) + 1
            self.waiting = {task.id: task, **self.waiting}
            self.progress.message(f"{task.order.title}: {ended.why}. Starting it again.")
        else:
            why = ended.why if ended.lost else state.message or "its process ended"
            self._fail(task, f"{' '.join(why.split())} Log: {ended.folder / LOG}")

    def _fail(self, task: Task, why: str) -> None:
        self.outcome.failed[task.id] = why
        self._advance(f"{task.order.title}: failed. {why}")
        unreachable = {task.id}
        for other in list(self.waiting.values()):  # needs come first, so one pass finds all
            if unreachable.intersection(other.needs):
                unreachable.add(other.id)
                del self.waiting[other.id]
                self.outcome.skipped[other.id] = task.order.title
                self._advance(f"{other.order.title}: skipped, because it needs {task.order.title}.")
        limit = self.plan.jobs.max_failures
        self.outcome.stopped = limit is not None and len(self.outcome.failed) > limit

    def _advance(self, line: str) -> None:
        self.progress.message(line)
        self.progress.advance()
        self._show()

    def _show(self) -> None:
        self.progress.show(running=str(len(self.running)), failed=str(len(self.outcome.failed)))
