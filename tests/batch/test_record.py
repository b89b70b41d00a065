"""Which tasks are done: those whose results are still there, and not replaced by other ones."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from batch_runs import plan_of, write_list

from sd_unlearn.batch.job_list import Stage
from sd_unlearn.batch.plan import Plan
from sd_unlearn.batch.record import OPTIONS, Order, begin, evidence_of, finish, is_done, write_order
from sd_unlearn.batch.summary import write_table
from sd_unlearn.data.concept import Concept
from sd_unlearn.io.files import write_json
from sd_unlearn.io.reading import read_yaml

CONCEPT = Concept(name="Brad Pitt", caption="a photo of Brad Pitt", generic="a photo of a man")
ATTACK = {"concept": "brad-pitt", "attack": "soft", "budget": "quick", "seed": 0, "detector": "clip"}
TRIED = ATTACK | {"subject": "a", "settings": {"steps": 400}, "tries": []}


def write_results(folder: Path, *attacks: dict[str, Any], lora: str = "a", **changes: Any) -> None:
    """A results.json of a LoRA with half of the leakage of the base. lora: its id."""
    loras = [{"id": lora, "name": "a", "what": "lora", "strength": 1.0, "sha256": "w"}]
    shared = {"concept": "brad-pitt", "n": 100, "detector": "clip", "low": 0.0, "high": 1.0}
    values = (("leakage", "direct", "base", 1.0), ("leakage", "direct", lora, 0.5), ("attack", "soft", lora, 0.7))
    content: dict[str, Any] = {
        "schema_version": 2,
        "concepts": [{"slug": "brad-pitt", "name": "Brad Pitt", "caption": "a", "generic": "b"}],
        "subjects": [{"id": "base", "name": "base", "what": "base"}, *loras],
        "rows": [shared | dict(zip(("metric", "group", "subject", "value"), row, strict=True)) for row in values],
        "sampler": {"steps": 25},
        "cards": [{"detector": "clip", "threshold": "the most probable"}],
        "attacks": list(attacks),
    }
    write_json(folder / "results.json", content | changes)


def finished(folder: Path, order: Order, status: Any = "done", **options: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_order(folder, order, CONCEPT, options)
    finish(folder, begin(folder), status, evidence=evidence_of(folder, order))


@pytest.mark.parametrize(
    ("replaced", "changes", "done"),
    [
        ([TRIED], {}, True),
        ([TRIED | {"budget": "standard", "settings": {"steps": 1000}}], {}, False),
        ([TRIED | {"settings": {"steps": 300}}], {}, False),
        ([TRIED | {"seed": 1}], {}, False),
        ([TRIED | {"attack": "token"}], {}, False),
        ([], {}, False),
        ([TRIED, TRIED | {"attack": "ring", "budget": "standard"}], {}, True),  # of another task
        ([TRIED | {"subject": "a at 1"}], {"lora": "a at 1", "sampler": {"steps": 25, "tiled_images": 3}}, True),
        ([TRIED], {"sampler": {"steps": 50}}, False),
        ([TRIED], {"cards": [{"detector": "clip", "threshold": "another"}]}, False),
    ],
)
def test_attacks_are_done_until_others_replace_them(
    replaced: list[dict[str, Any]], changes: dict[str, Any], done: bool, tmp_path: Path
) -> None:
    write_results(tmp_path, TRIED)
    finished(tmp_path / "task", Order("attack", str(tmp_path), str(tmp_path / "results.json")))
    assert is_done(tmp_path / "task")
    write_results(tmp_path, *replaced, **changes)
    assert is_done(tmp_path / "task") == done


def test_attacks_on_the_base_alone_are_not_those_on_the_lora(tmp_path: Path) -> None:
    write_results(tmp_path, TRIED, TRIED | {"subject": "base"})
    finished(tmp_path / "task", Order("attack", str(tmp_path), str(tmp_path / "results.json")))
    write_results(tmp_path, TRIED | {"subject": "base"})
    assert not is_done(tmp_path / "task")


@pytest.mark.parametrize("stage", ["evaluate", "attack", "report"])
@pytest.mark.parametrize("left", [None, "{", "[]"])
def test_tasks_whose_results_were_deleted_or_damaged_are_not_done(
    left: str | None, stage: Stage, tmp_path: Path
) -> None:
    results = tmp_path / "results.json"
    write_results(tmp_path, TRIED)
    (tmp_path / "report.html").touch()
    product = tmp_path / "report.html" if stage == "report" else results
    finished(tmp_path / "task", Order(stage, str(tmp_path), str(product)))
    assert is_done(tmp_path / "task")
    results.write_text(left) if left else results.unlink()
    assert is_done(tmp_path / "task") == (left is not None and stage == "evaluate")  # which does not read it


def test_a_failed_task_is_repeated_with_the_options_that_are_given_now(tmp_path: Path) -> None:
    folder, order = tmp_path / "task", Order("render", str(tmp_path / "data"), str(tmp_path / "data" / "manifest.json"))
    finished(folder, order, "failed", render_batch_size=100)
    write_order(folder, order, CONCEPT, {"render_batch_size": 2})
    assert read_yaml(folder / OPTIONS, "task") == {"render_batch_size": 2}
    write_json(Path(order.product), {})
    finished(folder, order, render_batch_size=2)
    write_order(folder, order, CONCEPT, {"render_batch_size": 4})
    assert read_yaml(folder / OPTIONS, "task") == {"render_batch_size": 2}  # of the images that are there


def line_of(plan: Plan, **statuses: Any) -> dict[str, str]:
    """The line of the only job in jobs.csv, after its stages ended like this."""
    [job] = plan.lines
    for stage, task in job.tasks.items():
        finished(plan.folder_of(task), plan.tasks[task].order, statuses.get(stage, "done"))
    [line] = csv.DictReader(write_table(plan, {}).open(encoding="utf-8"))
    return line


@pytest.mark.parametrize("stages", [["evaluate", "attack"], ["evaluate"], ["attack"]])
def test_jobs_csv_has_no_metrics_of_an_earlier_evaluation(stages: list[Stage], tiny_base: Path, tmp_path: Path) -> None:
    plan = plan_of(write_list(tmp_path / "jobs.yaml", tiny_base, stages=stages))
    run = plan.lines[0].run
    assert run is not None
    run.mkdir(parents=True)
    for order in (task.order for task in plan.tasks.values()):
        Path(order.product).parent.mkdir(parents=True, exist_ok=True)
        Path(order.product).touch()
    write_results(run, TRIED)
    line = line_of(plan)
    assert (line["status"], line["leakage"], line["attack"]) == ("done", "0.5", "0.7")
    for status in ("failed", "interrupted"):
        line = line_of(plan, **{stages[0]: status})
        assert line["status"] == status
        assert {line[key] for key in ("verdict", "leakage", "leakage_low", "retention", "attack", "steps")} == {""}
    line = line_of(plan, attack="failed")
    assert line["leakage"] == ("0.5" if "evaluate" in stages else "")
    assert line["attack"] == ("0.7" if "attack" not in stages else "")
