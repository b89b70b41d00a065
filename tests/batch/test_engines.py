"""All engines give the same results bit for bit, past killed workers, killed drivers and time limits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import yaml
from batch_runs import IMAGES, InThisProcess, plan_of, write_list
from evaluation_runs import DIGIT_FILE

from sd_unlearn.batch.plan import Plan
from sd_unlearn.batch.record import read_state
from sd_unlearn.batch.run import Run
from sd_unlearn.errors import UnlearnError
from sd_unlearn.io.progress import Progress
from sd_unlearn.io.run_folder import RESULTS, weights_sha256

ROOT = str(Path(__file__).parents[2])
EVALUATE = {"num_images": 2, "num_keep_images": 1, "groups": "direct", "num_inference_steps": 2}
STEPS = {"max_train_steps": 20, "checkpointing_steps": 1}
Jobs = Callable[..., Path]
Start = Callable[[Path], subprocess.Popen[str]]
PATIENCE = 1000.0  # seconds, on a busy machine


@pytest.fixture
def jobs(tiny_base: Path, tmp_path: Path) -> Jobs:
    """A list of small trainings and evaluations of two concepts, with some seeds each."""
    for name in ("seven", "three"):
        (tmp_path / f"{name}.yaml").write_text(DIGIT_FILE.format(name=name) + IMAGES)

    def make(seeds: int, **content: Any) -> Path:
        content = {"concepts": [f"{tmp_path}/seven.yaml", f"{tmp_path}/three.yaml"], **content}
        shared = {"stages": ["train", "evaluate"], "evaluate": EVALUATE, "options": STEPS, "threads": 1}
        grid = {"seed": list(range(seeds))}
        return write_list(tmp_path / "jobs.yaml", tiny_base, grid=grid, **{**shared, **content})

    return make


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a driver; those that still run when the test ends are killed."""
    drivers: list[subprocess.Popen[str]] = []

    def of(path: Path) -> subprocess.Popen[str]:
        words = [sys.executable, "-m", "sd_unlearn", "batch", str(path)]
        environment = {**os.environ, "PYTHONPATH": ROOT}
        pipe = subprocess.PIPE
        drivers.append(subprocess.Popen(words, env=environment, text=True, stdout=pipe, stderr=pipe))
        return drivers[-1]

    yield of
    for driver in drivers:
        driver.kill()
        driver.communicate()


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    return out + err


def wait_for_training(plan: Plan, process: subprocess.Popen[str], past: int = 2) -> int:
    """The id of the process of a training that has saved a checkpoint, once `past` trainings are done."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        assert process.poll() is None, process.communicate()[1]
        trainings = [task for task in plan.tasks.values() if task.order.stage == "train"]
        states = [read_state(plan.folder_of(task.id)) for task in trainings]
        for task, state in zip(trainings, states, strict=True):
            saved = any((Path(task.order.target) / "checkpoints").glob("step-*/checkpoint.json"))
            if state.status == "running" and saved and sum(s.status == "done" for s in states) >= past:
                return state.pid
        time.sleep(0.05)
    raise AssertionError("no training has begun")


def results(plan: Plan) -> dict[str, Any]:
    """Of each job the hash of the weights and the rows of results.json."""
    found = {}
    for job in plan.lines:
        assert job.run
        found[job.title] = weights_sha256(job.run), json.loads((job.run / RESULTS).read_text())["rows"]
    return found


def undisturbed(path: Path) -> dict[str, Any]:
    """The results of one process, in another folder and the reverse order of concepts."""
    plan = plan_of(path)
    alone = plan_of(write_other(path))
    tasks = list(alone.tasks.values())
    outcome = Run(alone, tasks, InThisProcess(), Progress(len(tasks), "batch", "task")).all()
    assert not outcome.failed
    assert len(alone.lines) == len(plan.lines)
    return results(alone)


def write_other(path: Path) -> Path:
    content = yaml.safe_load(path.read_text())
    other = path.with_name("other.yaml")
    content |= {"output_dir": "alone", "concepts": content["concepts"][::-1]}
    other.write_text(yaml.safe_dump(content))
    return other


def parents(pid: int, name: str) -> psutil.Process:
    """The process among the parents of a task whose command contains a name."""
    return next(p for p in psutil.Process(pid).parents() if name in " ".join([p.name(), *p.cmdline()]))


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_ray_survives_a_killed_driver_and_a_killed_worker(jobs: Jobs, start: Start) -> None:
    pytest.importorskip("ray")
    path = jobs(6, engine="ray", workers=2)
    plan = plan_of(path)
    driver = start(path)
    wait_for_training(plan, driver)
    driver.kill()
    driver.communicate()

    driver = start(path)
    pid = wait_for_training(plan, driver, past=4)
    parents(pid, "ray::").send_signal(signal.SIGKILL)
    said = finish(driver)
    assert "its process was killed. Starting it again." in said
    assert len(plan.lines) == 12
    assert results(plan) == undisturbed(path)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_local_workers_survive_kills_and_ctrl_c(jobs: Jobs, start: Start) -> None:
    path = jobs(2, workers=2)
    plan = plan_of(path)
    driver = start(path)
    os.kill(wait_for_training(plan, driver, past=0), signal.SIGKILL)
    wait_for_training(plan, driver, past=1)
    driver.send_signal(signal.SIGINT)
    _, err = driver.communicate(timeout=PATIENCE)
    assert driver.returncode == 130
    assert "Run the same command again to continue." in err
    assert "its process was killed. Starting it again." in err
    assert "running" not in {read_state(plan.folder_of(task)).status for task in plan.tasks}
    finish(start(path))
    assert results(plan) == undisturbed(path)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("cluster", ["local", "debug"])
def test_submitit_gives_the_same_results(jobs: Jobs, start: Start, cluster: str) -> None:
    pytest.importorskip("submitit")
    path = jobs(1, engine="slurm", workers=2, slurm={"cluster": cluster})
    finish(start(path))
    assert results(plan_of(path)) == undisturbed(path)


def test_what_slurm_refuses_names_the_key_of_the_job_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit")
    from sd_unlearn.batch.engines.slurm import SlurmEngine

    for name, line in (("srun", "exit 0"), ("sbatch", "echo invalid partition specified: gpuu >&2; exit 1")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    engine = SlurmEngine({"slurm_partition": "gpuu"}, tmp_path / "list", None, 1)
    with pytest.raises(UnlearnError, match="slurm: the cluster refused 2 jobs: .*gpuu.*the key slurm"):
        engine.start([tmp_path / "a", tmp_path / "b"])
    (tmp_path / "sbatch").unlink()
    with pytest.raises(UnlearnError, match="slurm: the cluster refused 1 job: .*the key slurm"):
        engine.start([tmp_path / "a"])


class BrokenJob:
    """A job that the cluster ended."""

    job_id, state = "12", "OUT_OF_MEMORY"

    def done(self) -> bool:
        return True

    def result(self) -> bool:
        raise RuntimeError("Job 12 has not produced any output\nslurmstepd: error: Detected 1 oom_kill event")


def test_why_a_job_of_slurm_failed_is_reported(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("submitit")
    from sd_unlearn.batch.engines.slurm import SlurmEngine

    plan = plan_of(write_list(tmp_path / "jobs.yaml", tiny_base, stages=["render"], retries=1))
    engine = SlurmEngine({"cluster": "local"}, tmp_path / "list", None, 1)
    engine.executor = SimpleNamespace(batch=nullcontext, submit=lambda *_: BrokenJob())
    outcome = Run(plan, list(plan.tasks.values()), engine, Progress(1, "batch", "task")).all()
    why = (
        "its job 12 failed (state OUT_OF_MEMORY): Job 12 has not produced any output slurmstepd: error: Detected 1 oom_"
    )
    [said] = outcome.failed.values()
    assert said.startswith(why)
    assert f"{why}kill event. Starting it again." in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_job_at_its_time_limit_continues_from_its_checkpoint(jobs: Jobs, start: Start) -> None:
    submitit = pytest.importorskip("submitit")
    path = jobs(1, engine="slurm", workers=1, slurm={"cluster": "local"}, options=STEPS | {"max_train_steps": 60})
    plan = plan_of(path)
    driver = start(path)
    pid = wait_for_training(plan, driver, past=0)
    usr = getattr(signal, "SIG" + submitit.JobEnvironment.USR_SIG)
    parents(pid, "submitit.core._submit").send_signal(usr)  # as SLURM does shortly before the limit
    finish(driver)
    states = {task.order.title: read_state(plan.folder_of(task.id)) for task in plan.tasks.values()}
    again = [title for title, state in states.items() if state.attempts == 2]
    assert len(again) == 1
    assert again[0].startswith("train")
    log = next(plan.folder_of(t.id) / "log.txt" for t in plan.tasks.values() if t.order.title == again[0])
    assert "Saved step" in log.read_text()
    assert results(plan) == undisturbed(path)
