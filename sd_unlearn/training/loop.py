"""The Accelerate loop: read `fit` top to bottom.

It waits for the device at logging steps only (`_figures`), and where pictures are drawn, a probe is taken or a
checkpoint written. Once a step wait: Accelerate's gradient scaler (fp16), the 8-bit optimizer, and the brackets' signs
where a step has several micro-batches (`accumulate_gradients`).
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from sd_unlearn.config.train import TrainConfig
from sd_unlearn.data.batches import Batch, StratifiedBatches
from sd_unlearn.data.concept import Concept
from sd_unlearn.errors import UnlearnError
from sd_unlearn.io.run_folder import BEST_DIR
from sd_unlearn.models.denoiser import Denoiser
from sd_unlearn.models.student import Student
from sd_unlearn.objectives.losses import example_losses
from sd_unlearn.objectives.pu import LOGGED, PUObjective
from sd_unlearn.objectives.teacher import Teacher
from sd_unlearn.training import checkpoint
from sd_unlearn.training.gradient_shares import gradient_shares
from sd_unlearn.training.gradients import Losses, accumulate_gradients
from sd_unlearn.training.metrics_log import Interrupted, MetricsLog, stop_requests
from sd_unlearn.training.optim import GuardedSteps, MovingAverage, make_optimizer, make_schedule, set_rates
from sd_unlearn.training.previews import Painter
from sd_unlearn.training.probe import Probe, Verdict

LOG_EVERY = 10
TWICE = 2  # a probe sees few pictures, and one that finds nothing may be chance


@dataclass
class Training:
    """All that `fit` works with; what changes is in Progress, the student and the optimizer."""

    config: TrainConfig
    concept: Concept
    output: Path
    student: Student
    wrapped: Any  # the student's model as Accelerate prepared it
    denoiser: Denoiser  # of `wrapped`
    batches: StratifiedBatches
    objective: PUObjective
    teacher: Teacher | None
    painter: Painter | None
    probe: Probe | None
    identity: dict[str, Any]  # what a resumed run must have in common with this one
    accelerator: Accelerator


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0
    seconds: float = 0.0
    best_score: float = -math.inf
    best_step: int = 0
    probes_since_best: int = 0
    forgotten_in_a_row: int = 0  # probes
    probe_seconds: float = 0.0  # of `seconds`, spent on probes
    stopped: str = ""  # why before --max_train_steps
    beta: float | None = None  # as a probe last estimated it; None: as it was given


def fit(training: Training, resume: Path | None) -> Progress:
    """Minimise the objective; writes metrics.jsonl, previews, checkpoints and the best so far. Returns how far it came.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; a checkpoint was saved.
        UnlearnError: too many steps in a row had to be skipped, or a checkpoint cannot be written.
    """
    config, accelerator, batches = training.config, training.accelerator, training.batches
    tools = Tools.of(training)
    progress = tools.load(training, resume) if resume else Progress()
    started = time.monotonic() - progress.seconds

    losses = partial(losses_of, training, training.denoiser)
    title = f"forget {training.concept.slug}"
    with (
        MetricsLog(training.output, title, progress.step, config.max_train_steps, accelerator) as log,
        stop_requests(accelerator) as stop_asked,
    ):
        last = progress.step if progress.stopped else config.max_train_steps  # it may have been interrupted as it ended
        for step, parts in zip(range(progress.step + 1, last + 1), batches, strict=False):
            logs, norm = tools.step(training, losses, parts)
            progress.step, progress.seconds = step, time.monotonic() - started
            if step % LOG_EVERY == 0 or step == config.max_train_steps or due(step, config.gradient_share_steps):
                log.write(_figures(step, logs, tools, norm) | _shares(training, tools, parts[-1], step))
                _check_skipped(training, tools, step)
            _look(training, tools, progress, log)
            interrupted = stop_asked(step % LOG_EVERY == 0)
            # Not while steps are skipped: the state before that is the one to go back to.
            if interrupted or (due(step, config.checkpointing_steps) and not (progress.stopped or tools.skipping())):
                tools.save(training, progress)
            if interrupted:
                raise Interrupted(f"Saved step {step} of {config.max_train_steps} in {training.output}.")
            log.advance()
            if progress.stopped:
                break
    if tools.average:
        tools.average.swap()
    return progress


def losses_of(training: Training, denoiser: Denoiser, batch: Batch) -> Tensor:
    """l [B] of a batch, with the gradient to follow."""
    config = training.config
    return example_losses(denoiser, batch, config.reduction, training.teacher, config.temperature, config.snr_gamma)


def due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps happens now; 0: never."""
    return every > 0 and step % every == 0


@dataclass
class Tools:
    """What moves the weights, with everything of it that a checkpoint must hold."""

    parameters: list[torch.nn.Parameter]
    optimizer: GuardedSteps
    schedule: Any
    average: MovingAverage | None
    brackets: Tensor | None = None  # of the last step: the signs to assume for the next

    @classmethod
    def of(cls, training: Training) -> Tools:
        config, accelerator = training.config, training.accelerator
        parameters = training.student.trainable()
        inner = make_optimizer(parameters, config)
        schedule = make_schedule(inner, config)
        optimizer = GuardedSteps(accelerator.prepare(inner), accelerator.scaler, accelerator.device)
        average = MovingAverage(parameters, config.ema_decay) if config.ema_decay else None
        return cls(parameters, optimizer, schedule, average)

    def step(self, training: Training, losses: Losses, parts: Sequence[Batch]) -> tuple[Tensor, Tensor]:
        """One optimizer step. Returns (figures [LOGGED], norm of the gradient before clipping)."""
        accelerator = training.accelerator
        logs, self.brackets = accumulate_gradients(
            accelerator, training.wrapped, losses, training.objective, parts, self.brackets
        )
        norm = accelerator.clip_grad_norm_(self.parameters, training.config.max_grad_norm)
        self.optimizer.step(norm)
        self.schedule.step()
        if self.average:
            self.average.update()
        return logs, norm

    def skipping(self) -> bool:
        """Whether the last step was skipped; waits for the device."""
        return float(self.optimizer.skipped[1]) > 0

    def save(self, training: Training, progress: Progress) -> None:
        """Write a checkpoint."""
        scaler = training.accelerator.scaler
        state = {
            "optimizer": self.optimizer.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": scaler.state_dict() if scaler else None,
            "sampler": training.batches.state_dict(),
            "average": self.average.state_dict() if self.average else None,
            "brackets": self.brackets,
            "skipped": self.optimizer.skipped,
            "progress": asdict(progress),
        }
        checkpoint.save(
            training.output,
            progress.step,
            training.student.state(),
            state,
            training.identity,
            training.accelerator,
            training.config.checkpoints_total_limit,
        )

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The student has its moving average for weights, if there is one."""
        if self.average:
            self.average.swap()
        yield
        if self.average:
            self.average.swap()

    def load(self, training: Training, place: Path) -> Progress:
        """Put everything back as it was."""
        weights, state = checkpoint.load(place, training.accelerator)
        training.student.load_state(weights)
        self.optimizer.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        set_rates(self.optimizer.optimizer, self.schedule, training.config)  # which --force_resume may have changed
        if training.accelerator.scaler and state["scaler"]:
            training.accelerator.scaler.load_state_dict(state["scaler"])
        if self.average and state["average"]:
            self.average.load_state_dict(state["average"])
        training.batches.load_state_dict(state["sampler"])
        device = training.accelerator.device
        self.optimizer.skipped = state["skipped"].to(device)
        known = state["brackets"]  # other captions by --force_resume have other brackets
        alike = known is not None and len(known) == len(training.objective.betas)
        self.brackets = known.to(device) if alike else None
        training.accelerator.print(f"Going on from {place}.", file=sys.stderr)
        progress = Progress(**state["progress"])
        _take_beta(training, progress.beta)
        return progress


def _figures(step: int, logs: Tensor, tools: Tools, norm: Tensor) -> dict[str, float]:
    """What is logged. .tolist() waits for the device."""
    assert tools.brackets is not None
    skipped, *values = torch.cat([tools.optimizer.skipped[:1], norm.float().view(1), logs, tools.brackets]).tolist()
    grad_norm, figures, brackets = values[0], values[1 : 1 + len(LOGGED)], values[1 + len(LOGGED) :]
    found = dict(zip(LOGGED, figures, strict=True))
    found["ratio"] = found["mean_s"] / max(found["mean_u"], 1e-12)
    found["negative_brackets"] = sum(bracket < 0 for bracket in brackets)
    rate = tools.schedule.get_last_lr()[0]
    return {"step": step, **found, "lr": rate, "grad_norm": grad_norm, "skipped_steps": skipped}


def _shares(training: Training, tools: Tools, batch: Batch, step: int) -> dict[str, float]:
    """What share of the gradient each term has, where that is due: after the step, on its last micro-batch."""
    if not due(step, training.config.gradient_share_steps):
        return {}
    alone = replace(training.denoiser, model=training.student.model)
    shares = gradient_shares(partial(losses_of, training, alone), training.objective, batch, tools.parameters)
    return dict(zip(shares, torch.stack(list(shares.values())).tolist(), strict=True))


def _check_skipped(training: Training, tools: Tools, step: int) -> None:
    config = training.config
    total, in_a_row = tools.optimizer.skipped.tolist()
    if in_a_row < config.max_skipped_steps and not (step == config.max_train_steps and 2 * in_a_row > step):
        return
    kept = checkpoint.found(training.output)
    way_out = "Nothing good was saved: start over (--overwrite)"
    if kept:
        way_out = f"The last good state is {kept[-1]}: go on (--resume_from_checkpoint latest --force_resume)"
    raise UnlearnError(
        f"Training diverged at step {step}: the gradient was not finite for {in_a_row:.0f} steps in a row "
        f"({total:.0f} in all; --max_skipped_steps is {config.max_skipped_steps}). {way_out} with a lower "
        f"--learning_rate (now {config.learning_rate:g}), a lower --push or --mixed_precision bf16."
    )


def _look(training: Training, tools: Tools, progress: Progress, log: MetricsLog) -> None:
    """Draw a preview and take a probe where they are due."""
    config, step = training.config, progress.step
    if due(step, config.validation_steps) and training.painter and training.accelerator.is_main_process:
        with tools.averaged():
            training.painter.preview(training.concept, config.seed, training.output, step)
    if due(step, config.probe_steps):
        trained, started = progress.seconds - progress.probe_seconds, time.monotonic()
        verdict = _probe(training, tools, progress)
        progress.probe_seconds += time.monotonic() - started
        images = step * training.batches.layout.total(len(training.batches.brackets))
        log.write({"step": step, **verdict.figures, "seconds": round(trained, 1), "images": images})


def _probe(training: Training, tools: Tools, progress: Progress) -> Verdict:
    """Judge the run, keep it under best/ if it is the best so far, and say in progress.stopped if it is to end."""
    told: list[Any] = [None]
    if training.accelerator.is_main_process and training.probe:
        with tools.averaged():
            told = [training.probe()]
            if told[0].score > progress.best_score:
                training.student.save(training.output / BEST_DIR)
    verdict: Verdict = broadcast_object_list(told)[0]
    if verdict.beta is not None:
        progress.beta = verdict.beta
        _take_beta(training, verdict.beta)
    progress.probes_since_best += 1
    if verdict.score > progress.best_score:
        progress.best_score, progress.best_step, progress.probes_since_best = verdict.score, progress.step, 0
    progress.forgotten_in_a_row = progress.forgotten_in_a_row + 1 if verdict.forgotten else 0
    if training.config.stop_when_forgotten and progress.forgotten_in_a_row == TWICE:
        progress.stopped = "forgotten"
    elif 0 < training.config.early_stopping_patience <= progress.probes_since_best:
        progress.stopped = f"no better probe in {progress.probes_since_best}"
    return verdict


def _take_beta(training: Training, beta: float | None) -> None:
    """Go on with a beta that was estimated on the way, in every bracket."""
    if beta is not None:
        training.objective = replace(training.objective, betas=[[beta]] * len(training.objective.betas))
