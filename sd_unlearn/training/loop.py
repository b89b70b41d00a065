"""The training loop: read `fit` from top to bottom.

It waits for the device only at logging steps, previews, probes and checkpoints. Waiting at every step is limited to
Accelerate's gradient scaler (fp16), the 8-bit optimizer, the signs of the brackets where a step has several
micro-batches (`accumulate_gradients`), the baselines of other papers, which search rows on the device, and several
processes, which agree on whether memory ran out.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from sd_unlearn.config.batching import Batching
from sd_unlearn.config.loop import LoopOptions
from sd_unlearn.data.batch import Batch
from sd_unlearn.data.repeated import Steps
from sd_unlearn.errors import UnlearnError
from sd_unlearn.io.files import write_json
from sd_unlearn.io.run_folder import BEST_DIR, PROBE
from sd_unlearn.models.memory_errors import free_memory, is_out_of_memory
from sd_unlearn.models.student import Student
from sd_unlearn.objectives.base import LOGGED, Objective
from sd_unlearn.objectives.movement import Movement
from sd_unlearn.objectives.teacher import PredictionBank
from sd_unlearn.training import checkpoint
from sd_unlearn.training.gradient_shares import gradient_shares
from sd_unlearn.training.metrics_log import Interrupted, MetricsLog, Throughput, stop_requests
from sd_unlearn.training.probe import Probe, ProbeResult
from sd_unlearn.training.provenance import reset_peak_memory
from sd_unlearn.training.state import Losses, TrainingState

LOG_EVERY = 10
MAX_SKIPPED_STEPS = 20  # non-finite gradients in a row that end a run


@dataclass(frozen=True)
class Training:
    """What `fit` trains and where it saves. What changes during training is in TrainingState."""

    output: Path
    title: str  # of the progress bar
    student: Student
    wrapped: nn.Module  # the student's model as Accelerate prepared it
    losses: Losses
    batches: Steps
    objectives: Sequence[Objective]  # of each turn (Batch.turn)
    accelerator: Accelerator
    batching: Batching  # how the first step is cut; later ones may be cut smaller
    identity: dict[str, Any]  # what a resumed run must have in common with this one
    preview: Callable[[int], None] | None = None  # called with the step
    probe: Probe | None = None
    movements: Sequence[Movement] = ()  # of each turn; the losses add to them. None without a teacher
    offsets: PredictionBank | None = None  # `Teacher.offsets`


def fit(options: LoopOptions, training: Training, resume: Path | None = None) -> TrainingState:
    """Minimise the objective; write metrics.jsonl, previews, checkpoints and the best weights so far.

    resume: the checkpoint to start from. Returns the state at the end, with the moving average as the student's weights
    if there is one.

    Raises:
        Interrupted: Ctrl-C, SIGTERM or SIGHUP; a checkpoint was saved.
        UnlearnError: too many steps in a row were skipped, or a checkpoint cannot be written.
        CannotRepeat: a step does not fit into memory.
    """
    accelerator, total = training.accelerator, options.steps
    state = TrainingState.start(
        *(options, training.student, training.batches, training.objectives, training.movements),
        *(accelerator, training.batching),
    )
    state.offsets = training.offsets
    if resume:
        state.load(resume, options)
        state.check_best(training.output / BEST_DIR / PROBE)
        accelerator.print(f"Resuming from {resume}.", file=sys.stderr)
    last = state.step if state.stopped else total  # it may have been interrupted at an early stop
    started = time.monotonic() - state.seconds
    with (
        MetricsLog(training.output, training.title, state.step, total, accelerator) as log,
        stop_requests(accelerator) as stop_requested,
    ):
        _preview_base(options, training, state)
        reset_peak_memory()
        speed = Throughput(training.batches.images_per_step, state.step)
        for step, batch in zip(range(state.step + 1, last + 1), training.batches, strict=False):
            metrics, norm = state.take_step(
                training.wrapped, training.losses, batch, options.max_grad_norm, log.write_note
            )
            state.step, state.seconds = step, time.monotonic() - started
            if due(step, LOG_EVERY) or step == total or due(step, options.gradient_share_steps):
                logged = _step_metrics(state, metrics, norm, batch.turn) | speed.read(step)
                with speed.paused():
                    log.write(logged | _shares(options, training, state, batch))
                _check_skipped(options, training, state)
            with speed.paused():
                if due(step, options.validation_steps):
                    _preview(training, state)
                if due(step, options.probe_steps):
                    log.write(_probe(options, training, state))
            interrupted = stop_requested()
            if interrupted or _should_save(options, state):
                with speed.paused():
                    state.save(training.output, training.identity, options.checkpoints_total_limit)
            if interrupted:
                raise Interrupted(f"Saved step {step} of {total} in {training.output}.")
            log.advance()
            if state.stopped:
                break
    if state.average:
        state.average.swap()
    return state


def due(step: int, every: int) -> bool:
    """Whether something that happens every N steps happens at this one; 0 means never."""
    return every > 0 and step % every == 0


def _should_save(options: LoopOptions, state: TrainingState) -> bool:
    """Not while steps are skipped: a diverged run resumes from the state before that."""
    return due(state.step, options.checkpointing_steps) and not (state.stopped or state.last_step_skipped())


def _step_metrics(state: TrainingState, metrics: Tensor, norm: Tensor, turn: int) -> dict[str, float]:
    """The logged metrics of a step. .tolist() waits for the device."""
    assert state.brackets is not None
    values = torch.cat([state.optimizer.skipped[:1], norm.float().view(1), metrics, state.brackets]).tolist()
    (skipped, grad_norm), brackets = values[:2], values[2 + len(LOGGED) :]
    logged = dict(zip(LOGGED, values[2 : 2 + len(LOGGED)], strict=True))
    logged["ratio"] = logged["mean_s"] / logged["mean_u"] if logged["mean_u"] else math.nan  # some steps have no U
    logged["negative_brackets"] = sum(bracket < 0 for bracket in brackets)
    logged |= state.movements[turn].read() if state.movements else {}
    rate = state.schedule.get_last_lr()[0]
    return {"step": state.step, **logged, "lr": rate, "grad_norm": grad_norm, "skipped_steps": skipped}


def _shares(options: LoopOptions, training: Training, state: TrainingState, batch: Batch) -> dict[str, float]:
    """Each term's share of the gradient norm on the first process's images, at the steps where that is due."""
    if not due(state.step, options.gradient_share_steps) or not training.accelerator.is_main_process:
        return {}
    assert state.brackets is not None
    batching, model = state.batching, training.student.model
    stored = replace(batch, is_repeated=True)  # the step has stored the base's predictions, if they are stored at all
    try:
        shares = gradient_shares(
            lambda part: training.losses(model, part, batching.teacher_batch_size),
            state.objectives[batch.turn],
            stored.to(training.accelerator.device),
            batching.micro_batch_size,
            state.brackets,
            state.parameters,
        )
    except (RuntimeError, MemoryError) as error:  # each term has a gradient of its own, which a step does not need
        if not is_out_of_memory(error):
            raise
        shares = {}
    if not shares:
        free_memory()
        training.accelerator.print(f"Out of memory for --gradient_share_steps at step {state.step}.", file=sys.stderr)
        return {}
    return dict(zip(shares, torch.stack(list(shares.values())).tolist(), strict=True))


def _check_skipped(options: LoopOptions, training: Training, state: TrainingState) -> None:
    total, in_a_row = state.optimizer.skipped.tolist()
    at_end = state.step == options.steps
    if in_a_row < MAX_SKIPPED_STEPS and not (at_end and 2 * in_a_row > state.step):
        return
    kept = checkpoint.list_checkpoints(training.output)
    hint = "No checkpoint was saved before: start over (--overwrite)"
    if kept:
        hint = f"The last good state is {kept[-1]}: resume it (--resume_from_checkpoint latest --force_resume)"
    raise UnlearnError(
        f"Training diverged at step {state.step}: the gradient was not finite for {in_a_row:.0f} steps in a row "
        f"({total:.0f} in total). {hint} with a lower "
        f"--learning_rate (now {options.learning_rate:g}), a lower --push or --mixed_precision bf16."
    )


def _preview_base(options: LoopOptions, training: Training, state: TrainingState) -> None:
    """The first preview, to compare the others with: nothing is trained yet. None if there will be no others."""
    if state.step == 0 and 0 < options.validation_steps <= options.steps:
        _preview(training, state)


def _preview(training: Training, state: TrainingState) -> None:
    if training.preview and training.accelerator.is_main_process:
        with state.averaged_weights():
            training.preview(state.step)


def _probe(options: LoopOptions, training: Training, state: TrainingState) -> dict[str, float]:
    """Run the probe, save the student in best/ if it is the best so far, and return what to log."""
    seconds, started = state.seconds - state.probe_seconds, time.monotonic()
    results: list[Any] = [None]
    if training.accelerator.is_main_process and training.probe:
        with state.averaged_weights():
            results = [training.probe()]
            if state.is_best(results[0]):
                best = training.output / BEST_DIR
                training.student.save(best)
                write_json(best / PROBE, {"step": state.step, **results[0].metrics})
    result: ProbeResult = broadcast_object_list(results)[0]
    state.record_probe(result, options)
    state.probe_seconds += time.monotonic() - started
    images = state.step * training.batches.images_per_step
    return {"step": state.step, **result.metrics, "seconds": round(seconds, 1), "images": images}
