"""A training that the page starts: its command, plan, progress and stop. No Gradio."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sd_unlearn.errors import UsageError
from sd_unlearn.ui import training
from sd_unlearn.ui.training import Job, Training, make_plan

JOB = Job("seven", "seven", 40, seed=3)
# Writes what a training writes, then waits for SIGTERM.
FAKE = """
import pathlib, signal, sys, time
def stop(*_):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(1)
    sys.exit("saved")
signal.signal(signal.SIGTERM, stop)
run = pathlib.Path("runs/seven")
(run / "previews").mkdir(parents=True)
(run / "config.yaml").write_text("max_train_steps: 40\\n")
(run / "metrics.jsonl").write_text('{"step": 10}\\n{"step": 20}\\n')
(run / "previews" / "step-000000.png").touch()
(run / "previews" / "step-000020.png").touch()
print("train seven:  0%\\rtrain seven: 50%", file=sys.stderr, flush=True)
time.sleep(60)
"""


def test_the_command_line_and_the_plan_of_a_training(tmp_path: Path) -> None:
    assert JOB.arguments()[:5] == ["train", "--concept", "seven", "--output_dir", "runs/seven"]
    assert JOB.arguments()[-2:] == ["--max_train_steps", "40"]
    assert "--max_train_steps" not in Job("seven", "seven").arguments()  # the command's default
    plan = make_plan(tmp_path, JOB)
    assert "Predicted memory" in plan
    assert "into runs/seven" in plan
    assert list(tmp_path.iterdir()) == []  # a plan writes nothing
    with pytest.raises(UsageError, match='Did you mean "seven"'):
        make_plan(tmp_path, Job("sevn", "seven", 40))


@pytest.mark.parametrize(
    "job",
    [
        Job("", "seven", 1),
        Job("seven", "../elsewhere", 1),
        Job("seven", "a/b", 1),
        Job("seven", "", 1),
        Job("--config=x", "seven", 1),
        Job("/etc/concept.yaml", "seven", 1),
        Job("../concept.yaml", "seven", 1),
        Job("seven", "seven", 1, base="/models/base.safetensors"),
        Job("seven", "seven", 1, base="--vae"),
    ],
)
def test_a_job_cannot_leave_the_working_folder(tmp_path: Path, job: Job) -> None:
    with pytest.raises(UsageError):
        Training(tmp_path).start(job)


def until(condition: Callable[[], bool]) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.1)
    pytest.fail("did not happen within a minute")


def test_progress_previews_and_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_COMMAND", (sys.executable, "-c", FAKE))
    page = Training(tmp_path)
    assert page.progress().state == "No training was started."
    page.start(JOB)
    until(lambda: "50%" in page.progress().output)
    assert page.process is not None
    assert os.getsid(page.process.pid) == page.process.pid  # Ctrl-C in the terminal does not reach it
    with pytest.raises(UsageError, match="A training is running"):
        page.start(JOB)
    found = page.progress()
    assert (found.state, found.running, found.step, found.steps) == ("Training.", True, 20, 40)
    assert found.preview == tmp_path / "runs" / "seven" / "previews" / "step-000020.png"
    assert found.output == "train seven: 50%"  # the last state of the bar
    page.stop()
    assert "Stopping" in page.progress().state
    page.stop()  # a second signal would end it without a checkpoint
    until(lambda: not page.running)
    found = page.progress()
    assert found.state.startswith("Stopped.")
    assert "saved" in found.output
    assert page.process.returncode != -signal.SIGKILL


def test_a_training_that_fails_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_COMMAND", (sys.executable, "-c", "raise SystemExit('Error: no disk')"))
    page = Training(tmp_path)
    page.start(JOB)
    until(lambda: not page.running)
    assert page.progress().state == "Failed with exit code 1; see the output."
    assert "no disk" in page.progress().output
