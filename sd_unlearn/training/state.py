"""Everything that changes while a run trains, saved to and restored from checkpoints."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from sd_unlearn.config.batching import Batching
from sd_unlearn.config.loop import LoopOptions
from sd_unlearn.data.batch import Batch
from sd_unlearn.data.repeated import Steps
from sd_unlearn.errors import reason
from sd_unlearn.io.reading import read_json
from sd_unlearn.models.memory_errors import is_out_of_memory
from sd_unlearn.models.student import Student
from sd_unlearn.objectives.base import Objective
from sd_unlearn.objectives.movement import Movement
from sd_unlearn.objectives.teacher import PredictionBank
from sd_unlearn.training import checkpoint
from sd_unlearn.training.gradients import accumulate_gradients
from sd_unlearn.training.memory import CannotRepeat, OutOfMemoryInStep, describe_change, together
from sd_unlearn.training.optim import GuardedSteps, MovingAverage, make_optimizer, make_schedule, set_rates
from sd_unlearn.training.probe import ProbeResult

# l [B] of a batch under a model, differentiable; the number is the rows that the teacher predicts at once
Losses = Callable[[nn.Module, Batch, int], Tensor]
PROBES_TO_STOP = 2  # a probe sees few images: a single one may find the concept forgotten by chance
PROGRESS = (
    *("step", "seconds", "best_score", "best_step", "probes_since_best", "forgotten_in_a_row"),
    *("probe_seconds", "stopped", "beta", "probe"),
)
BEST = ("best_score", "best_step", "probes_since_best", "forgotten_in_a_row")  # scores of one probe


@dataclass
class TrainingState:
    """What moves the weights, and how far the run is."""

    accelerator: Accelerator
    student: Student
    batches: Steps
    objectives: Sequence[Objective]  # of each turn (Batch.turn)
    movements: Sequence[Movement]  # of each turn; none without a teacher
    parameters: list[nn.Parameter]
    optimizer: GuardedSteps
    schedule: Any
    average: MovingAverage | None
    batching: Batching
    brackets: Tensor | None = None  # of the last step; the next step assumes their signs
    offsets: PredictionBank | None = None  # of this process; a resumed step has the weights of a later one

    step: int = 0
    seconds: float = 0.0
    best_score: float = -math.inf
    best_step: int = 0
    probes_since_best: int = 0
    forgotten_in_a_row: int = 0  # probes
    probe_seconds: float = 0.0  # part of `seconds`
    stopped: str = ""  # why training ended before --max_train_steps
    beta: float | None = None  # the last estimate of a probe; None: as given
    probe: str = ""  # --probe if there are probes

    @classmethod
    def start(
        cls,
        options: LoopOptions,
        student: Student,
        batches: Steps,
        objectives: Sequence[Objective],
        movements: Sequence[Movement],
        accelerator: Accelerator,
        batching: Batching,
    ) -> TrainingState:
        parameters = student.trainable()
        inner = make_optimizer(parameters, options)
        schedule = make_schedule(inner, options)
        optimizer = GuardedSteps(accelerator.prepare(inner), accelerator.scaler, accelerator.device)
        average = MovingAverage(parameters, options.ema_decay) if options.ema_decay else None
        student.set_checkpointing(batching.gradient_checkpointing)
        moving = (objectives, movements, parameters, optimizer, schedule, average)
        probe = options.probe if options.probe_steps else ""
        return cls(accelerator, student, batches, *moving, batching, probe=probe)

    def take_step(
        self,
        model: nn.Module,
        losses: Losses,
        batch: Batch,
        max_grad_norm: float,
        note: Callable[[str, dict[str, float]], None] = lambda text, values: None,
    ) -> tuple[Tensor, Tensor]:
        """One optimizer step. Returns (metrics [LOGGED], norm of the gradient before clipping).

        If memory runs out, the step is repeated with the same random numbers in smaller parts, and so are all later
        ones. note: called with a line about it and what changed.

        Raises:
            CannotRepeat: there are no smaller parts, or memory ran out while the weights were updated.
        """
        random_state = checkpoint.random_state()
        while True:
            try:
                metrics, self.brackets = self._gradient(model, losses, batch)
                break
            except OutOfMemoryInStep as error:
                self._use_less_memory(str(error), note)
            checkpoint.restore_random_state(random_state)
        try:
            return metrics, self._update(max_grad_norm)
        except (RuntimeError, MemoryError) as error:  # some weights may have changed already
            if not is_out_of_memory(error):
                raise
            raise CannotRepeat(
                f"Out of memory while step {self.step + 1} updated the weights: {reason(error)}."
            ) from error

    def _update(self, max_grad_norm: float) -> Tensor:
        """Clip the gradient and change the weights. Returns the norm of the gradient before clipping."""
        norm: Tensor = self.accelerator.clip_grad_norm_(self.parameters, max_grad_norm)
        self.optimizer.step(norm)
        self.schedule.step()
        if self.average:
            self.average.update()
        return norm

    def _gradient(self, model: nn.Module, losses: Losses, batch: Batch) -> tuple[Tensor, Tensor]:
        """The step's gradient, and the optimizer's memory, which it takes in the first step."""
        of_batch, size = partial(losses, model), self.batching.micro_batch_size
        objective, previous = self.objectives[batch.turn], self.brackets
        if previous is not None and len(previous) != objective.num_brackets:
            previous = None  # of another turn, or from before --force_resume
        movement = self.movements[batch.turn] if self.movements else None
        if movement:
            movement.start_step()
        found = accumulate_gradients(
            self.accelerator,
            model,
            lambda part: of_batch(part, self.batching.teacher_batch_size),
            objective,
            batch,
            size,
            previous,
        )
        if movement:
            movement.end_step(self.accelerator.reduce)
        if self.step == 0:
            together(self.accelerator, self.optimizer.reserve)
        return found

    def _use_less_memory(self, why: str, note: Callable[[str, dict[str, float]], None]) -> None:
        for parameter in self.parameters:
            parameter.grad = None
        smaller = self.batching.smaller_step()
        if smaller is None:
            raise CannotRepeat(f"Out of memory with one image at once and gradient checkpointing: {why}.")
        note(*describe_change(self.step + 1, self.batching, smaller))
        self.batching = smaller
        self.student.set_checkpointing(smaller.gradient_checkpointing)

    def last_step_skipped(self) -> bool:
        """Waits for the device."""
        return float(self.optimizer.skipped[1]) > 0

    def _load_progress(self, progress: dict[str, Any]) -> None:
        """Restore PROGRESS; after --force_resume with another --probe without BEST, because scores do not compare."""
        now, before = self.probe, progress.get("probe")  # earlier versions did not save it
        skipped = BEST if now and before and now != before else ()
        for name, value in progress.items():
            if name not in skipped:
                setattr(self, name, value)
        self.probe = now or self.probe

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """The student temporarily has its moving average as weights, if there is one."""
        if self.average:
            self.average.swap()
        try:
            yield
        finally:
            if self.average:
                self.average.swap()

    def is_best(self, probe: ProbeResult) -> bool:
        return probe.score > self.best_score

    def check_best(self, file: Path) -> None:
        """Of a resumed run: let the next probe replace the best weights if they are of a step that is trained again.

        With other options (--force_resume), that step may give other weights. file: the record beside the weights.
        """
        if file.is_file() and read_json(file)["step"] != self.best_step:
            self.best_score, self.best_step = -math.inf, 0

    def record_probe(self, probe: ProbeResult, options: LoopOptions) -> None:
        """Update best score and beta; set `stopped` if training should end."""
        if probe.beta is not None:
            self.use_beta(probe.beta)
        self.probes_since_best += 1
        if self.is_best(probe):
            self.best_score, self.best_step, self.probes_since_best = probe.score, self.step, 0
        self.forgotten_in_a_row = self.forgotten_in_a_row + 1 if probe.forgotten else 0
        if options.stop_when_forgotten and self.forgotten_in_a_row >= PROBES_TO_STOP:
            self.stopped = "forgotten"
        elif 0 < options.early_stopping_patience <= self.probes_since_best:
            self.stopped = f"no better probe in {self.probes_since_best}"

    def use_beta(self, beta: float) -> None:
        """Continue with this beta in every caption group."""
        self.beta = beta
        self.objectives = [objective.with_beta(beta) for objective in self.objectives]

    def save(self, run: Path, identity: dict[str, Any], limit: int) -> None:
        """Write a checkpoint; see checkpoint.save."""
        scaler = self.accelerator.scaler
        state = {
            "optimizer": self.optimizer.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": scaler.state_dict() if scaler else None,
            "sampler": self.batches.state_dict(),
            "average": self.average.state_dict() if self.average else None,
            "brackets": self.brackets,
            "moved": [movement.smoothed for movement in self.movements],
            "offsets": gather_object([[tensor.cpu() for tensor in self.offsets.stored] if self.offsets else []]),
            "skipped": self.optimizer.skipped,
            "progress": {name: getattr(self, name) for name in PROGRESS},
        }
        record = identity | {checkpoint.BATCHING: dataclasses.asdict(self.batching)}
        checkpoint.save(run, self.step, self.student.state(), state, record, self.accelerator, limit)

    def load(self, path: Path, options: LoopOptions) -> None:
        """Restore a checkpoint, with the learning rate and weight decay of `options`.

        Raises:
            UsageError: see checkpoint.load.
        """
        weights, state = checkpoint.load(path, self.accelerator)
        device, scaler = self.accelerator.device, self.accelerator.scaler
        self.student.load_state(weights)
        self.optimizer.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        set_rates(self.optimizer.optimizer, self.schedule, options)  # --force_resume may have changed them
        if scaler and state["scaler"]:
            scaler.load_state_dict(state["scaler"])
        if self.average and state["average"]:
            self.average.load_state_dict(state["average"])
        self.batches.load_state_dict(state["sampler"])
        self.optimizer.skipped = state["skipped"].to(device)
        brackets = state["brackets"]  # --force_resume may have changed the number of caption groups
        self.brackets = None if brackets is None else brackets.to(device)
        for movement, smoothed in zip(self.movements, state.get("moved", ()), strict=False):
            movement.smoothed = None if smoothed is None else smoothed.to(device)
        if self.offsets and "offsets" in state:  # checkpoints of earlier versions have none, and start a new block
            stored = state["offsets"][self.accelerator.process_index]
            self.offsets.stored = tuple(tensor.to(device) for tensor in stored)
        self._load_progress(state["progress"])
        if self.beta is not None:
            self.use_beta(self.beta)
