"""`sd-unlearn batch`: plan a job list, run what is missing on an engine, and write its table and comparison."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from sd_unlearn.batch.copying import copy_job, copy_list, open_target
from sd_unlearn.batch.engines.engine import Engine
from sd_unlearn.batch.job_list import JobList, read_job_list
from sd_unlearn.batch.plan import Plan, Task, make_plan, missing_tasks
from sd_unlearn.batch.record import is_done
from sd_unlearn.batch.run import Outcome, Run
from sd_unlearn.batch.status import describe_progress, describe_tasks, statuses_of
from sd_unlearn.batch.summary import comparison_tasks, met_conditions, write_table
from sd_unlearn.config.batch import BatchConfig
from sd_unlearn.config.options import check_ranges
from sd_unlearn.data.prompt_sets import load_prompt_set
from sd_unlearn.errors import ConditionError, UnlearnError, UsageError, counted, install_command
from sd_unlearn.io.files import check_writable
from sd_unlearn.io.lock import locked
from sd_unlearn.io.progress import Progress


def run(config: BatchConfig) -> Path | None:
    """Do what is missing of a job list. Returns its table; None with --dry_run.

    Raises:
        UsageError: the job list or an option in it is not valid; before anything runs.
        UnlearnError: tasks have failed, after all others were done; another process runs the list.
        ConditionError: a --fail_if condition holds, after this run or an earlier one.
        KeyboardInterrupt: Ctrl-C; running tasks have saved.
    """
    plan, missing = _read(config)
    if config.dry_run:
        print(describe_tasks(plan, missing, statuses_of(plan)))
        return None
    check_writable(plan.folder, "output_dir")
    _download_prompts(plan, missing)
    target = open_target(plan.jobs.copy_to) if plan.jobs.copy_to else None
    with locked(plan.own_folder, "job list"), _terminated_as_interrupted():
        outcome = _run_all(plan, missing)
        table = write_table(plan, outcome.skipped)
        if target:
            for job in plan.lines:
                copy_job(plan, job, target)
            copy_list(plan, target)
    _check(plan, outcome, table)
    return table


def show_status(config: BatchConfig) -> str:
    """How far a job list is, in lines."""
    plan, missing = _read(config)
    return describe_progress(plan, missing, statuses_of(plan))


def _read(config: BatchConfig) -> tuple[Plan, list[Task]]:
    check_ranges(config)
    plan = make_plan(read_job_list(config))
    statuses = statuses_of(plan)
    return plan, missing_tasks(plan, {task: status == "done" for task, status in statuses.items()})


def _download_prompts(plan: Plan, missing: list[Task]) -> None:
    """Download a published prompt set that a missing evaluation uses, rather than after hours of training.

    Raises:
        UnlearnError: it cannot be downloaded.
    """
    if any(task.order.stage == "evaluate" for task in missing) and (name := plan.later["evaluate"].prompt_set):
        load_prompt_set(name, plan.later["evaluate"].prompt_category)


def _run_all(plan: Plan, missing: list[Task]) -> Outcome:
    """Run the missing tasks, and then the comparison of what is evaluated."""
    outcome = Outcome()
    with ExitStack() as stack:

        @cache
        def engine() -> Engine:  # it starts processes, so only if anything is missing
            made = make_engine(plan.jobs, plan.own_folder)
            stack.callback(made.close)
            return made

        if missing:
            outcome = _run(plan, missing, engine())
        if not outcome.stopped:
            compare = [task for task in comparison_tasks(plan) if not is_done(plan.folder_of(task.id))]
            outcome.failed |= _run(plan, compare, engine()).failed if compare else {}
    return outcome


def _run(plan: Plan, tasks: list[Task], engine: Engine) -> Outcome:
    with Progress(len(tasks), f"batch {plan.jobs.name}", "task") as progress:
        missing = f"{counted(len(tasks), 'task')} {'is' if len(tasks) == 1 else 'are'} missing"
        progress.message(f"{missing}. Engine {plan.jobs.engine}, {engine.workers} at a time.")
        return Run(plan, tasks, engine, progress).all()


def make_engine(jobs: JobList, folder: Path) -> Engine:
    """The engine of a job list, which writes its own files into `folder`.

    Raises:
        UsageError: what it needs is not installed, or one of its options is not valid.
        UnlearnError: the cluster cannot be reached.
    """
    if jobs.engine == "ray":
        from sd_unlearn.batch.engines.ray import RayEngine

        return RayEngine(jobs.ray, jobs.workers, jobs.threads)
    if jobs.engine == "slurm":
        if find_spec("submitit") is None:
            raise UsageError(f"--engine slurm needs submitit: {install_command('slurm')}, or --engine local.")
        from sd_unlearn.batch.engines.slurm import SlurmEngine

        return SlurmEngine(jobs.slurm, folder, jobs.workers, jobs.threads)
    from sd_unlearn.batch.engines.local import LocalEngine

    return LocalEngine(jobs.workers, jobs.threads)


def _check(plan: Plan, outcome: Outcome, table: Path) -> None:
    """Say what failed, after everything else was done, or in how many jobs a --fail_if condition holds.

    Raises:
        UnlearnError, ConditionError
    """
    if not outcome.failed:
        if met := [job for job in plan.lines if met_conditions(plan, job)]:
            jobs = counted(len(plan.lines), "job")
            raise ConditionError(f"--fail_if: a condition holds in {len(met)} of {jobs}; {table} says which.")
        return
    left = "The other tasks were not started (max_failures)." if outcome.stopped else "All others are done."
    skipped = f", {len(outcome.skipped)} that need them were skipped" if outcome.skipped else ""
    raise UnlearnError(
        f"{len(outcome.failed)} of {counted(len(plan.tasks), 'task')} failed{skipped}; {table} says why. {left} "
        "Run the same command again to repeat them."
    )


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Let SIGTERM end the list as Ctrl-C does, so that running tasks save."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    former = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)
