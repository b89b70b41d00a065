"""A training that the page starts as a process of its own: its plan, progress, previews and stop. Needs no Gradio."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd_unlearn.errors import UnlearnError, UsageError
from sd_unlearn.io.paths import path_inside
from sd_unlearn.io.reading import read_jsonl, read_yaml
from sd_unlearn.io.run_folder import CONFIG, METRICS, PREVIEW_DIR, TRAINING

LINES = 15  # of the output that are shown
PLAN_SECONDS = 300
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,99}")


@dataclass(frozen=True)
class Job:
    """A training as the page describes it. None takes the command's default."""

    concept: str
    name: str  # of the run folder, in runs/
    steps: int | None = None
    base: str | None = None
    seed: int = 0

    def arguments(self) -> list[str]:
        """The command line after `sd-unlearn`."""
        given = ["train", "--concept", self.concept, "--output_dir", f"runs/{self.name}"]
        given += ["--seed", str(self.seed), "--resume_from_checkpoint", "latest"]
        given += ["--max_train_steps", str(self.steps)] if self.steps else []
        return [*given, "--pretrained_model_name_or_path", self.base] if self.base else given


@dataclass(frozen=True)
class Progress:
    """The state of the training."""

    state: str  # in words
    running: bool
    step: int
    steps: int  # 0: not known yet
    preview: Path | None
    output: str  # the last lines


def check_job(root: Path, job: Job) -> None:
    """Refuse names that leave the working folder; the command checks the rest.

    Raises:
        UsageError
    """
    if not job.concept.strip():
        raise UsageError("Choose a concept.")
    if not _NAME.fullmatch(job.name):
        raise UsageError(f'"{job.name}" is not the name of a run folder: use letters, digits, dots and hyphens.')
    for given in (job.concept, job.base or ""):
        if given.startswith("-"):
            raise UsageError(f"{given} looks like an option.")
        is_path = given.startswith((".", "/", "~")) or ".." in Path(given).parts or given.endswith((".yaml", ".yml"))
        if is_path and path_inside(root, given) is None:
            raise UsageError(f"{given} is not in the folder {root.name}, in which sd-unlearn ui was started.")


def make_plan(root: Path, job: Job) -> str:
    """What `train --dry_run` prints.

    Raises:
        UsageError, UnlearnError: the training would be refused; says why.
    """
    check_job(root, job)
    try:
        done = subprocess.run(
            [*_COMMAND, *job.arguments(), "--dry_run"], cwd=root, capture_output=True, text=True, timeout=PLAN_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise UnlearnError(f"The plan was not ready after {PLAN_SECONDS} seconds.") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["The plan failed."])[-1]
        raise UsageError(last.removeprefix("Error: "))
    return done.stdout.strip()


_COMMAND = (sys.executable, "-m", "sd_unlearn")


class Training:
    """The one training of the page. It has a session of its own: Ctrl-C in the terminal would be a second signal."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.process: subprocess.Popen[bytes] | None = None
        self.job: Job | None = None
        self.log: Any = None
        self.stopping = False

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self, job: Job) -> None:
        """Start a training.

        Raises:
            UsageError: another one is running, or the job is not valid.
        """
        if self.running:
            raise UsageError("A training is running. Stop it first, or wait.")
        check_job(self.root, job)
        self.log = tempfile.NamedTemporaryFile(suffix=".log")
        self.process = subprocess.Popen(
            [*_COMMAND, *job.arguments()],
            cwd=self.root,
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.job, self.stopping = job, False

    def stop(self, wait: float = 0) -> None:
        """Ask the training to save a checkpoint and stop, as Ctrl-C does. wait: seconds to wait for its end."""
        if self.process is None or not self.running:
            return
        if not self.stopping:  # a second signal would end it without a checkpoint
            self.stopping = True
            self.process.terminate()  # not SIGINT, which processes started in the background of a script ignore
        if wait:
            try:
                self.process.wait(wait)
            except subprocess.TimeoutExpired:
                self.process.kill()

    def progress(self) -> Progress:
        """The state of the training now."""
        if self.process is None or self.job is None:
            return Progress("No training was started.", False, 0, 0, None, "")
        run, running = self.root / "runs" / self.job.name, self.running
        step = _last_step(run)
        if running:
            state = "Stopping after this step." if self.stopping else "Training." if step else "Preparing."
        elif (run / TRAINING).is_file() and self.process.returncode == 0:
            state = f"Finished: runs/{self.job.name}."
        elif self.stopping:
            state = "Stopped. Show the plan and start again to continue."
        else:
            state = f"Failed with exit code {self.process.returncode}; see the output."
        previews = sorted((run / PREVIEW_DIR).glob("step-*.png"))
        return Progress(state, running, step, _all_steps(run), previews[-1] if previews else None, self._output())

    def _output(self) -> str:
        """The last lines of the output; of a progress bar only its last state."""
        text = Path(self.log.name).read_bytes().decode("utf-8", "replace")  # read_text would turn \r into \n
        lines = [line.rpartition("\r")[2] for line in text.replace("\r\n", "\n").split("\n")]
        return "\n".join([line for line in lines if line.strip()][-LINES:])


def _last_step(run: Path) -> int:
    try:
        steps = [line.get("step") for line in read_jsonl(run / METRICS)]
    except UsageError:  # not there yet, or its last line is being written
        return 0
    return max((int(step) for step in steps if isinstance(step, int | float)), default=0)


def _all_steps(run: Path) -> int:
    """The number of steps of the training, 0 before its options are recorded."""
    try:
        steps = read_yaml(run / CONFIG, "").get("max_train_steps")
    except UsageError:
        return 0
    return steps if isinstance(steps, int) else 0
