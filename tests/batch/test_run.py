"""A list is run once, past failures; a second run does only what is missing; results are summed up in one table."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import huggingface_hub
import pytest
import yaml
from batch_runs import IMAGES, InThisProcess, plan_of, write_concept_file, write_list
from evaluation_runs import DIGIT_FILE
from fsspec.implementations.memory import MemoryFileSystem
from report_results import make_results, make_row

from sd_unlearn import cli
from sd_unlearn.batch import batch
from sd_unlearn.batch.engines.engine import Ended
from sd_unlearn.batch.execute import execute
from sd_unlearn.batch.job_list import JobList
from sd_unlearn.batch.record import OPTIONS, begin, finish, read_order, read_state, status_of
from sd_unlearn.batch.run import Run
from sd_unlearn.batch.summary import comparison_tasks, write_table
from sd_unlearn.errors import UnlearnError
from sd_unlearn.io.files import write_json
from sd_unlearn.io.lock import locked
from sd_unlearn.io.progress import Progress
from sd_unlearn.io.run_folder import RESULTS, weights_sha256
from sd_unlearn.results import BASE, read_results

Engines = list[InThisProcess]


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Engines:
    """The engines of all runs, in order."""
    made: Engines = []

    def make(jobs: JobList, folder: Path) -> InThisProcess:
        made.append(InThisProcess())
        return made[-1]

    monkeypatch.setattr(batch, "make_engine", make)
    return made


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open(encoding="utf-8")))


def leakage(folder: Path) -> list[float | None]:
    """The leakage of each LoRA in a results.json."""
    return [row.value for row in read_results(folder).rows if row.metric == "leakage" and row.subject != BASE]


def stages(engine: InThisProcess) -> list[str]:
    return [name.partition("-")[0] for name in engine.started]


def test_a_prompt_set_is_downloaded_before_tasks_run_but_not_for_planning(
    engines: Engines, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def fail(repository: str, *_: Any, **__: Any) -> str:
        asked.append(repository)
        raise TimeoutError

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    path = str(write_list(tmp_path / "jobs.yaml", tiny_base, stages=["evaluate"], evaluate={"prompt_set": "i2p"}))
    assert cli.main(["batch", path, "--dry_run"]) == 0
    assert cli.main(["batch", "status", path]) == 0
    assert not asked
    assert cli.main(["batch", path]) == 1
    assert asked == ["AIML-TUDA/i2p"]
    assert not engines


@pytest.mark.usefixtures("one_thread")
def test_a_second_run_does_only_what_is_missing(
    engines: Engines, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    concepts = [write_concept_file(tmp_path, name) for name in ("Brad Pitt", "Tom Cruise")]
    path = write_list(tmp_path / "jobs.yaml", tiny_base, concepts=concepts, copy_to="file://" + str(tmp_path / "copy"))
    assert cli.main(["batch", str(path)]) == 0
    assert stages(engines[0]) == ["render", "train", "render", "train"]
    lines = table(tmp_path / "runs/batch/lists/jobs/jobs.csv")
    assert [(line["concept"], line["status"]) for line in lines] == [("Brad Pitt", "done"), ("Tom Cruise", "done")]
    for line in lines:
        name = Path(line["run"]).name
        assert weights_sha256(tmp_path / "copy" / name) == weights_sha256(Path(line["run"]))
    assert (tmp_path / "copy/lists/jobs/jobs.csv").is_file()

    assert cli.main(["batch", str(path)]) == 0
    assert len(engines) == 1  # nothing was missing
    shutil.rmtree(lines[1]["run"])
    weights = weights_sha256(Path(lines[0]["run"]))
    assert cli.main(["batch", str(path)]) == 0
    assert stages(engines[1]) == ["train"]

    # another list shares the images and the training that are equal
    write_list(tmp_path / "more.yaml", tiny_base, concepts=concepts[:1], grid={"push": [2.5, 3.0]})
    assert cli.main(["batch", str(tmp_path / "more.yaml")]) == 0
    assert stages(engines[2]) == ["train"]
    first, second = table(tmp_path / "runs/batch/lists/more/jobs.csv")
    assert first["run"] == lines[0]["run"]
    assert weights_sha256(Path(second["run"])) != weights == weights_sha256(Path(first["run"]))
    capsys.readouterr()
    assert cli.main(["batch", "status", str(tmp_path / "more.yaml")]) == 0
    assert "3 tasks of 2 jobs: 3 done." in capsys.readouterr().out


class Closed(MemoryFileSystem):
    """A storage that refuses files, with an error of its own."""

    protocol = "closed"
    refused = ".sd-unlearn-check"

    def _refuse(self, path: str) -> None:
        if path.endswith(self.refused):
            raise RuntimeError("Access denied")

    def pipe_file(self, path: str, *values: Any, **options: Any) -> None:
        self._refuse(path)
        super().pipe_file(path, *values, **options)

    def put_file(self, lpath: str, rpath: str, *values: Any, **options: Any) -> None:
        self._refuse(rpath)
        super().put_file(lpath, rpath, *values, **options)


def test_a_storage_that_refuses_files_is_noticed_before_the_tasks_and_is_no_bug(
    engines: Engines,
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fsspec.register_implementation("closed", Closed, clobber=True)
    path = write_list(tmp_path / "jobs.yaml", tiny_base, stages=["render"], copy_to="closed://bucket/runs")
    assert cli.main(["batch", str(path)]) == 2
    assert "copy_to closed://bucket/runs cannot be written: Access denied." in capsys.readouterr().err
    assert not engines
    monkeypatch.setattr(Closed, "refused", "jobs.csv")
    assert cli.main(["batch", str(path)]) == 1
    assert "jobs.csv cannot be written: Access denied." in capsys.readouterr().err
    assert stages(engines[0]) == ["render"]
    assert not [name for name in Closed.store if name.endswith("check")]


def test_the_table_has_the_strongest_attack_by_the_detector_that_gives_the_verdict(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sd_unlearn.batch.summary.status_of", lambda folder: "done")
    plan = plan_of(write_list(tmp_path / "jobs.yaml", tiny_base, stages=["evaluate", "attack"]))
    [job] = plan.lines
    assert job.run
    rows = [
        make_row("leakage", "direct", "lora", 0.0),
        make_row("attack", "token", "lora", 0.9, detector="clip"),
        make_row("attack", "token", "lora", 0.1),
        make_row("attack", "soft", "lora", 0.3),
    ]
    job.run.mkdir(parents=True)
    write_json(job.run / RESULTS, make_results(rows=rows))
    [line] = table(write_table(plan, {}))
    assert (line["strongest_attack"], line["attack"]) == ("soft", "0.3")


@pytest.mark.usefixtures("one_thread")
def test_a_failed_task_is_reported_and_stops_only_what_needs_it(
    engines: Engines, tiny_base: Path, tmp_path: Path, photos: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = photos(unlabeled=4, positive=4)
    own = {"name": write_concept_file(tmp_path, "Brad Pitt"), "data_dir": str(folder)}
    concepts: list[Any] = [own, write_concept_file(tmp_path, "Tom Cruise")]
    path = write_list(tmp_path / "jobs.yaml", tiny_base, concepts=concepts, stages=["train", "export"])
    plan = plan_of(path)
    shutil.copytree(folder, tmp_path / "kept")
    shutil.move(folder / "1_positive", tmp_path / "away")
    (folder / "1_positive").mkdir()  # after planning, so that the training fails

    tasks = list(plan.tasks.values())
    outcome = Run(plan, tasks, InThisProcess(), Progress(len(tasks), "batch", "task")).all()
    broken, whole = (job.tasks for job in plan.lines)
    assert set(outcome.failed) == {broken["train"]}
    assert outcome.skipped == {broken["export"]: "train Brad Pitt"}
    assert outcome.done == {whole["render"], whole["train"], whole["export"]}
    assert "log.txt" in outcome.failed[broken["train"]]
    assert status_of(plan.folder_of(broken["train"])) == "failed"
    lines = table(write_table(plan, outcome.skipped))
    assert [line["status"] for line in lines] == ["failed", "done"]
    assert "1_positive" in lines[0]["message"]

    shutil.rmtree(folder)
    shutil.move(tmp_path / "kept", folder)
    capsys.readouterr()
    assert cli.main(["batch", str(path)]) == 0
    assert stages(engines[0]) == ["train", "export"]  # what had failed and what needed it
    assert read_state(plan.folder_of(broken["train"])).attempts == 2


@pytest.mark.usefixtures("one_thread")
def test_no_further_tasks_start_after_max_failures(engines: Engines, tiny_base: Path, tmp_path: Path) -> None:
    path = write_list(tmp_path / "jobs.yaml", tiny_base, stages=["render"], grid={"num_positive": [2, 3, 4]})
    for task in plan_of(path).tasks.values():  # a folder in the way
        Path(task.order.target).mkdir(parents=True)
        (Path(task.order.target) / "settings.json").write_text("{}")
    assert cli.main(["batch", str(path), "--max_failures", "1"]) == 1
    assert len(engines[0].started) == 2
    assert cli.main(["batch", str(path)]) == 1
    assert len(engines[1].started) == 3


class Busy:
    """An engine that does nothing but mark tasks as done, and refuses tasks while others run."""

    workers = 2

    def __init__(self, closed: bool = False) -> None:
        self.closed = closed
        self.started: list[str] = []
        self.running: list[Path] = []
        self.refused = 0

    def start(self, folders: list[Path]) -> None:
        if self.running or self.closed:
            self.refused += 1
            raise UnlearnError("The queue is full.")
        for folder in folders:
            product = Path(read_order(folder).product)
            product.parent.mkdir(parents=True, exist_ok=True)
            product.touch()
            finish(folder, begin(folder), "done")
            self.started.append(folder.name)
            self.running.append(folder)

    def wait(self, seconds: float) -> list[Ended]:
        return [Ended(self.running.pop(0))]

    def stop(self) -> None: ...

    def close(self) -> None: ...


def test_a_refused_submission_is_repeated_when_a_task_has_ended(tiny_base: Path, tmp_path: Path) -> None:
    concepts = [write_concept_file(tmp_path, name) for name in ("Brad Pitt", "Tom Cruise")]
    plan = plan_of(write_list(tmp_path / "jobs.yaml", tiny_base, concepts=concepts))
    tasks, progress = list(plan.tasks.values()), Progress(4, "batch", "task", shown=False)
    closed = Busy(closed=True)
    with pytest.raises(UnlearnError, match="The queue is full"):
        Run(plan, tasks, closed, progress).all()
    assert closed.refused == 1
    engine = Busy()
    assert Run(plan, tasks, engine, progress).all().done == set(plan.tasks)
    assert [name.partition("-")[0] for name in engine.started] == ["render", "render", "train", "train"]
    assert engine.refused == 1  # the first training, while the second rendering was running


@pytest.mark.usefixtures("one_thread")
def test_a_condition_that_holds_is_in_the_table_and_the_exit_code(
    engines: Engines, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "seven.yaml").write_text(DIGIT_FILE.format(name="seven") + IMAGES)
    evaluate = {"num_images": 1, "groups": "direct", "num_inference_steps": 2, "fail_if": "drift>0"}
    shared: dict[str, Any] = {"concepts": [f"{tmp_path}/seven.yaml"], "stages": ["evaluate"]}
    path = write_list(tmp_path / "jobs.yaml", tiny_base, **shared, evaluate=evaluate)
    for _ in range(2):  # also when nothing is missing any more
        assert cli.main(["batch", str(path)]) == 3
        assert "a condition holds in 1 of 1 job; " in capsys.readouterr().err
        [line] = table(tmp_path / "runs/batch/lists/jobs/jobs.csv")
        assert line["status"] == "done"
        assert "--fail_if: drift>0: " in line["message"]
    assert len(engines) == 1


def test_two_processes_do_not_run_the_same_list(
    engines: Engines, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_list(tmp_path / "jobs.yaml", tiny_base)
    with locked(plan_of(path).own_folder, "job list"):
        assert cli.main(["batch", str(path)]) == 1
    assert "is in use by process" in capsys.readouterr().err
    assert not engines


@pytest.mark.usefixtures("one_thread")
def test_a_list_ends_with_a_comparison_of_all_jobs_from_the_images_of_their_evaluations(
    engines: Engines, tiny_base: Path, tmp_path: Path
) -> None:
    for name in ("seven", "three"):
        (tmp_path / f"{name}.yaml").write_text(DIGIT_FILE.format(name=name) + IMAGES)
    evaluate = {"num_images": 1, "num_keep_images": 1, "groups": "direct", "num_inference_steps": 2}
    concepts = [f"{tmp_path}/seven.yaml", f"{tmp_path}/three.yaml"]
    path = write_list(tmp_path / "jobs.yaml", tiny_base, concepts=concepts, stages=["evaluate"], evaluate=evaluate)
    assert cli.main(["batch", str(path)]) == 0
    assert stages(engines[0]) == ["render", "train", "evaluate"] * 2 + ["evaluate", "report"]
    lists = tmp_path / "runs/batch/lists/jobs"
    compared = leakage(lists / "comparison")
    lines = table(lists / "jobs.csv")
    assert compared == [value for line in lines for value in leakage(Path(line["run"]))]
    assert [float(line["leakage"]) for line in lines] == compared
    assert (lists / "comparison" / "report.html").is_file()
    generated = [file for file in (lists / "cache").rglob("*.png") if not file.is_symlink()]
    assert not [file for file in generated if not file.parent.is_symlink()]  # all are links
    assert cli.main(["batch", str(path)]) == 0
    assert len(engines) == 1  # the comparison is done, too


@pytest.mark.usefixtures("one_thread")
def test_a_killed_edit_in_closed_form_is_repeated(engines: Engines, tiny_base: Path, tmp_path: Path) -> None:
    path = write_list(tmp_path / "jobs.yaml", tiny_base, options={"objective": "uce"})
    assert cli.main(["batch", str(path)]) == 0
    [job] = plan_of(path).lines
    assert job.run
    (job.run / "training.json").unlink()  # written last
    assert cli.main(["batch", str(path)]) == 0
    assert (job.run / "training.json").is_file()


def test_comparisons_are_of_one_base_and_one_schedule(
    v_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`evaluate` refuses LoRAs of which only some were trained with zero terminal SNR."""
    monkeypatch.setattr("sd_unlearn.batch.summary._is_evaluated", lambda plan, job: True)

    def compared(**grid: Any) -> dict[str, int]:
        path = write_list(tmp_path / "jobs.yaml", v_base, stages=["evaluate"], grid=grid)
        tasks = [task for task in comparison_tasks(plan_of(path)) if task.order.stage == "evaluate"]
        return {Path(task.order.target).name: len(task.options["lora"]) for task in tasks}

    seeds, zero = [0, 1], "comparison-zero-terminal-snr"
    assert compared(seed=seeds, zero_terminal_snr=[False, True]) == {"comparison": 2, zero: 2}
    assert compared(seed=seeds, zero_terminal_snr=[True]) == {"comparison": 2}
    assert compared(zero_terminal_snr=[False, True]) == {}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", ["whole.safetensors", "whole"])
def test_a_repeated_export_replaces_its_own_checkpoint_only(
    engines: Engines, tiny_base: Path, tmp_path: Path, name: str
) -> None:
    path = write_list(tmp_path / "jobs.yaml", tiny_base, stages=["export"], export={"merge": name})
    assert cli.main(["batch", str(path)]) == 0
    plan = plan_of(path)
    [job] = plan.lines
    assert job.run
    [merged] = job.run.glob("merged-*")
    place = merged / name if name.endswith(".safetensors") else merged / name / "model_index.json"
    first = place.stat().st_mtime_ns
    (plan.folder_of(job.tasks["export"]) / "state.json").unlink()  # as after a kill
    assert cli.main(["batch", str(path)]) == 0
    assert place.stat().st_mtime_ns > first

    options = plan.folder_of(job.tasks["export"]) / OPTIONS
    foreign = tmp_path / "mine.safetensors"
    foreign.write_text("of the user")
    options.write_text(yaml.safe_dump({"run": str(job.run), "merge": str(foreign)}))
    (options.parent / "state.json").unlink()
    assert execute(options.parent, threads=1) != 0
    assert foreign.read_text() == "of the user"
