"""What a job list ends with: jobs.csv with a line per job, and one report that compares all LoRAs."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sd_unlearn.batch.identity import digest_of
from sd_unlearn.batch.options import identifying, later_config, of_concepts, task_options
from sd_unlearn.batch.plan import Job, Plan, Task
from sd_unlearn.batch.record import LOG, Order, Status, read_state, status_of
from sd_unlearn.errors import UsageError
from sd_unlearn.evaluation.loras import ModelVariant
from sd_unlearn.io.files import write_text
from sd_unlearn.io.run_folder import RESULTS
from sd_unlearn.report.cases import Case, cases_of
from sd_unlearn.report.report import HTML
from sd_unlearn.results import Row, read_results

TABLE = "jobs.csv"
COLUMNS = (
    *("concept", "setting", "status", "verdict", "leakage", "leakage_low", "leakage_high", "retention"),
    *("retention_low", "retention_high", "attack", "strongest_attack", "steps", "seconds", "run", "message"),
)


def write_table(plan: Plan, skipped: Mapping[str, str]) -> Path:
    """Write jobs.csv. skipped: task id -> title of the failed task that it needs."""
    memory = io.StringIO()
    writer = csv.DictWriter(memory, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for job in plan.lines:
        writer.writerow(_line(plan, job, skipped))
    path = plan.own_folder / TABLE
    write_text(path, memory.getvalue())
    return path


def _line(plan: Plan, job: Job, skipped: Mapping[str, str]) -> dict[str, Any]:
    states = {task: status_of(plan.folder_of(task)) for task in job.tasks.values()}
    status: Status | str = next((s for s in states.values() if s != "done"), "done")
    line: dict[str, Any] = {"concept": job.concept.name, "setting": job.setting, "status": status, "run": job.run or ""}
    line["seconds"] = round(sum(read_state(plan.folder_of(task)).seconds for task in states), 1)
    line["message"] = _fault(plan, states, skipped) or " ".join(met_conditions(plan, job))
    if job.run and states.get(job.tasks.get("evaluate") or job.tasks.get("attack", "")) == "done":
        line |= _measured(job.run)
        if states.get(job.tasks.get("attack", ""), "done") != "done":  # those of another task
            line |= {"attack": "", "strongest_attack": ""}
    return line


def _fault(plan: Plan, states: Mapping[str, Status], skipped: Mapping[str, str]) -> str:
    """Why a task of a job failed or was skipped; "" if none was."""
    for task, state in states.items():
        if state == "failed":
            return f"{read_state(plan.folder_of(task)).message} Log: {plan.folder_of(task) / LOG}"
        if task in skipped:
            return f"Needs {skipped[task]}, which failed."
    return ""


def met_conditions(plan: Plan, job: Job) -> list[str]:
    """The messages of a job's tasks after which a --fail_if condition holds."""
    folders = [plan.folder_of(task) for task in job.tasks.values()]
    return [state.message for f in folders if status_of(f) == "done" and (state := read_state(f)).message]


def _measured(run: Path) -> dict[str, Any]:
    """The metrics of a run, if it was evaluated."""
    try:
        results = read_results(run)
    except UsageError:  # not evaluated
        return {}
    cases = [case for case in cases_of(results) if case.is_target]
    case = next((c for c in cases if c.subject.strength == 1), cases[0] if cases else None)
    if case is None:
        return {}
    strongest = case.attacks[0].lora if case.attacks else None
    return {
        "verdict": case.verdict,
        **_interval("leakage", case.presence and case.presence.lora),
        **_interval("retention", case.retention and case.retention.lora),
        "attack": strongest.value if strongest else "",
        "strongest_attack": strongest.group if strongest else "",
        "steps": _steps(case),
    }


def _interval(name: str, row: Row | None) -> dict[str, Any]:
    return {name: row.value, f"{name}_low": row.low, f"{name}_high": row.high} if row else {}


def _steps(case: Case) -> Any:
    return (case.subject.cost or {}).get("steps", "")


def comparison_tasks(plan: Plan) -> Iterator[Task]:
    """An evaluation over all evaluated jobs, from cached images, and its report; one for each base and schedule.

    With a single job its own report says the same, so there is none.
    """
    groups: dict[tuple[str, bool], list[Job]] = {}
    for job in plan.lines:
        if "evaluate" in job.tasks and _is_evaluated(plan, job):
            options = plan.tasks[job.tasks["train"]].options
            groups.setdefault((job.base, options.get("zero_terminal_snr", False)), []).append(job)
    bases, schedules = len({base for base, _ in groups}), len({zero_snr for _, zero_snr in groups})
    for (base, zero_snr), jobs in groups.items():
        if len(jobs) > 1:
            parts = [base if bases > 1 else "", "zero-terminal-snr" if zero_snr and schedules > 1 else ""]
            yield from _comparison(plan, jobs, plan.own_folder / "-".join(filter(None, ["comparison", *parts])))


def _is_evaluated(plan: Plan, job: Job) -> bool:
    return status_of(plan.folder_of(job.tasks["evaluate"])) == "done"


def _joined_cache(plan: Plan, jobs: list[Job]) -> Path:
    """One folder with the images of all concepts, by links, so that the comparison generates none again.

    Links to the folders of each LoRA, which include the detectors' outputs, and to the single images of the base.
    """
    joined = plan.own_folder / "cache"
    for cache in dict.fromkeys(plan.cache_of(job.concept) for job in jobs):
        for variant in sorted(cache.glob("*/*/*/")):
            place = joined / variant.relative_to(cache)
            if variant.name == ModelVariant().folder:
                place.mkdir(parents=True, exist_ok=True)
                for image in variant.glob("*.png"):
                    _link(place / image.name, image)
            else:
                place.parent.mkdir(parents=True, exist_ok=True)
                _link(place, variant)
    return joined


def _link(place: Path, target: Path) -> None:
    if not place.exists():
        place.unlink(missing_ok=True)  # a link to what was deleted since
        place.symlink_to(target)


def _comparison(plan: Plan, jobs: list[Job], folder: Path) -> Iterator[Task]:
    config = of_concepts(plan.later["evaluate"], [job.concept for job in jobs])
    config = dataclasses.replace(config, fail_if=[])
    runs = list(dict.fromkeys(str(job.run) for job in jobs))
    needs = [read_state(plan.folder_of(job.tasks["evaluate"])).started for job in jobs]  # again after a new evaluation
    address = digest_of("compare", str(folder), identifying(config), runs, needs)
    places = {"output_dir": folder, "cache_dir": _joined_cache(plan, jobs)}
    options = task_options(config, places) | {"lora": runs}
    order = Order("evaluate", str(folder), str(folder / RESULTS), f"compare {len(runs)} runs")
    yield (first := Task(f"evaluate-{address}", order, jobs[0].concept, options))
    order = Order("report", str(folder), str(folder / HTML), "report of the comparison")
    options = task_options(later_config("report", plan.jobs.report), {"run": folder})
    yield Task(f"report-{address}", order, jobs[0].concept, options, (first.id,))
