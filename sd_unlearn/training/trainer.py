"""`train` from options to run folder: read `run`, then `_train`. The loop itself is in loop.py."""

from __future__ import annotations

import atexit
import dataclasses
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from sd_unlearn.choices import CLOSED_FORM
from sd_unlearn.config.batching import Batching, default_batching, with_options
from sd_unlearn.config.checks import unused_options
from sd_unlearn.config.paths import recorded
from sd_unlearn.config.train import TrainConfig
from sd_unlearn.data.concept import Concept
from sd_unlearn.data.dataset import fingerprint
from sd_unlearn.data.find_concept import describe_anchored
from sd_unlearn.data.photos import CACHE_DIR
from sd_unlearn.data.render import check_same_base, render_locked
from sd_unlearn.data.render_job import make_job, with_seed_of_folder
from sd_unlearn.errors import UnlearnError, counted, reason
from sd_unlearn.io.files import write_json
from sd_unlearn.io.lock import locked, remove_leftovers
from sd_unlearn.io.run_folder import BEST_DIR, CHECKPOINT_DIR, DATA_MANIFEST, PREVIEW_DIR, TRAINING
from sd_unlearn.launch import leave_process_group, print_once, process_count, process_rank
from sd_unlearn.models.base import Base, load_base
from sd_unlearn.models.device import choose_precision
from sd_unlearn.models.zero_terminal_snr import use_zero_terminal_snr
from sd_unlearn.seeds import TRAIN_SEEDS
from sd_unlearn.training import checkpoint
from sd_unlearn.training.memory import CannotRepeat, remedies
from sd_unlearn.training.preflight import Inputs, check_apart, check_inputs, check_kind, check_output, is_finished
from sd_unlearn.training.provenance import (
    check_same_run,
    device_name,
    identity_of,
    open_run,
    peak_memory_mb,
    training_record,
)

if TYPE_CHECKING:  # imported in functions: torch takes seconds to import, and wrong options must be refused at once
    from accelerate import Accelerator

    from sd_unlearn.training.loop import Training
    from sd_unlearn.training.state import TrainingState

# How long processes wait for the first one, which alone generates previews and probes (on a CPU for hours).
PATIENCE = timedelta(hours=12)
RecordOf = Callable[[dict[str, Any]], dict[str, Any]]  # cost of a training -> its record


def run(config: TrainConfig, concept: Concept | None = None) -> Path:
    """Train on a concept, rendering its folders first if they are missing. Returns the run folder.

    concept: instead of the one that --concept names.

    Raises:
        UsageError, UnlearnError: wherever possible before a model is loaded.
        Interrupted: Ctrl-C, SIGTERM or SIGHUP while training; a checkpoint was saved.
    """
    inputs = check_inputs(config, concept)
    output = config.output_dir or Path("runs") / inputs.concept.slug
    check_apart(inputs.data_dir, output)
    _find_checkpoint(config, inputs, output)
    if config.anchor is not None:
        print_once(describe_anchored(inputs.concept, inputs.own_images))
    if config.objective in CLOSED_FORM:
        from sd_unlearn.training import closed_form

        return closed_form.run(config, inputs, output)
    if config.dry_run:
        from sd_unlearn.training.plan import show_plan

        show_plan(config, inputs, output)
        return output
    with locked(output, "--output_dir"):
        return _run(config, inputs, output)


def _run(config: TrainConfig, inputs: Inputs, output: Path) -> Path:
    """`run` once the options are checked, while no other process uses the run folder."""
    resume = _find_checkpoint(config, inputs, output)  # again: another process may have finished since
    if process_rank() == 0:
        places = [output / name for name in ("", BEST_DIR, CHECKPOINT_DIR, PREVIEW_DIR)]
        for folder in (*places, inputs.data_dir / CACHE_DIR):
            remove_leftovers(folder)
        for line in inputs.notes:
            print(line, file=sys.stderr)
    if config.resume_from_checkpoint and not resume:
        if is_finished(output):  # saved without checkpoints, or they were deleted since
            print_once(f"{output} is finished and has no checkpoints. Start over with --overwrite.")
            return output
        print_once(f"--output_dir {output} has no checkpoints yet: starting from the beginning.")

    from accelerate.utils import set_seed

    from sd_unlearn.models import performance

    accelerator = _make_accelerator(config, output, inputs.tracker)
    performance.check(config, accelerator.device)
    planned = _plan(config, inputs)  # before the seed is set, so that it cannot depend on it
    set_seed(TRAIN_SEEDS[0] + config.seed, device_specific=True)

    @cache
    def get_base() -> Base:  # what is trained must be in full precision; autocast computes in half precision anyway
        precision = "no" if config.method == "full" else accelerator.mixed_precision
        return load_base(inputs.source, precision, accelerator.device)

    if not inputs.own_images:
        _render(config, inputs, planned.render_batch_size, get_base)
        check_same_base(inputs.data_dir, get_base())
        accelerator.wait_for_everyone()  # the first process writes the metadata after the last image
    config = dataclasses.replace(config, data_dir=inputs.data_dir, output_dir=output)
    return _train(config, inputs, get_base(), accelerator, planned, resume)


def _find_checkpoint(config: TrainConfig, inputs: Inputs, output: Path) -> Path | None:
    """The checkpoint to resume from, once the run folder is checked.

    Raises:
        UsageError: as check_output, or a finished run without checkpoints is of another training.
    """
    resume = check_output(config, output)
    if config.resume_from_checkpoint and not resume and is_finished(output):
        check_same_run(output, config, inputs.concept, inputs.source.name)
    return resume


def _make_accelerator(config: TrainConfig, output: Path, tracker: str | None) -> Accelerator:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import InitProcessGroupKwargs

    AcceleratorState._reset_state()  # a former training in this process may have had another precision
    return Accelerator(
        mixed_precision=choose_precision(config.mixed_precision),
        log_with=tracker,
        project_dir=str(output),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )


def _render(config: TrainConfig, inputs: Inputs, at_once: int, get_base: Callable[[], Base]) -> None:
    """Render the data folder. at_once: images generated together in this process."""
    if not (inputs.data_dir / DATA_MANIFEST).is_file():
        print_once(f"{inputs.data_dir} is missing or unfinished: rendering it first.")
    job = with_seed_of_folder(make_job(inputs.concept, config, inputs.source))
    if job.seed != config.seed:
        print_once(
            f"{job.folder} was rendered with --seed {job.seed} and is used as it is; --seed {config.seed} applies to "
            "the training only."
        )
    render_locked(dataclasses.replace(job, sampler=dataclasses.replace(job.sampler, batch_size=at_once)), get_base)


def _train(
    config: TrainConfig,
    inputs: Inputs,
    base: Base,
    accelerator: Accelerator,
    planned: Batching,
    resume: Path | None,
) -> Path:
    from sd_unlearn.training.encoded_data import read_data
    from sd_unlearn.training.loop import fit
    from sd_unlearn.training.setup import make_training, resolve_defaults

    assert config.output_dir is not None
    output, forced, concept = config.output_dir, config.force_resume, inputs.concept
    if config.zero_terminal_snr:  # only now: the folders are rendered with the base's own schedule
        use_zero_terminal_snr(base)
    check_kind(config, base.kind, base.name)
    data = read_data(config, concept, base, planned.encode_batch_size, resume, inputs.own if inputs.own_images else ())
    batching = _choose_batching(config, accelerator, planned, resume)
    config = resolve_defaults(config, base, data, accelerator.num_processes)
    config = dataclasses.replace(config, mixed_precision=accelerator.mixed_precision)
    identity = identity_of(config, concept, base, fingerprint(data.images.examples), accelerator.num_processes)
    if resume:
        checkpoint.check_same(resume, identity, forced)
        if is_finished(output) and not forced:
            accelerator.print(f"{output} is finished. Start over with --overwrite.", file=sys.stderr)
            return output
    training = make_training(config, concept, base, data, accelerator, batching, identity)
    _open_run(config, concept, training, keep=resume is not None)
    accelerator.init_trackers("sd-unlearn" if config.report_to == "wandb" else "tensorboard")
    betas = " ".join(f"{beta:g}" for beta in ([data.beta] if data.beta is not None else data.betas.values()))
    beta = "" if "beta" in unused_options(config.objective) else f", beta {betas} ({data.prior.source})"
    summary = f"Forgetting {concept.name!r} in {base.name}: {data.counts()}{beta}."
    for line in (*filter(None, [data.note]), *data.prior.notes, summary):
        accelerator.print(line, file=sys.stderr)
    with _explained_write_errors(output), _explained_memory_errors(config, base, output), _named_checkpoint(output):
        state = fit(config, training, resume)
        if accelerator.is_main_process:
            _close_run(config, training, state, partial(training_record, config, concept, base, data.prior, data.betas))
    accelerator.wait_for_everyone()
    for tracker in accelerator.trackers:
        tracker.finish()
    atexit.register(leave_process_group)  # not before: this program may train again
    return output


def _plan(config: TrainConfig, inputs: Inputs) -> Batching:
    """The batches that fit into the memory of the device, or that the options say."""
    from sd_unlearn.training.plan import plan_run

    plan = plan_run(config, inputs)
    return plan.batching if plan else default_batching(config, process_count())


def _choose_batching(config: TrainConfig, accelerator: Accelerator, planned: Batching, resume: Path | None) -> Batching:
    """How steps are cut: as the options say, as in the checkpoint, or as planned for this device."""
    from accelerate.utils import gather_object

    processes = accelerator.num_processes
    batching = checkpoint.saved_batching(resume) if resume else None
    batching = with_options(batching, config, processes) if batching else planned
    batching = dataclasses.replace(
        batching, render_batch_size=planned.render_batch_size, preview_batch_size=planned.preview_batch_size
    )
    # the same everywhere, so that all processes agree when nothing smaller is left
    return min(gather_object([batching]), key=lambda b: (b.micro_batch_size, not b.gradient_checkpointing))


def _open_run(config: TrainConfig, concept: Concept, training: Training, keep: bool) -> None:
    """Create the run folder in the first process."""
    if training.accelerator.is_main_process:
        open_run(training.output, concept, recorded(config), training.probe is not None, keep)
    training.accelerator.wait_for_everyone()


@contextmanager
def _explained_write_errors(output: Path) -> Iterator[None]:
    """Turn write errors, e.g. of a full disk, into an UnlearnError that says how to continue."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        kept = checkpoint.list_checkpoints(output)
        hint = f"resume from {kept[-1]} with --resume_from_checkpoint latest" if kept else "start again"
        raise UnlearnError(f"Cannot write to {output}: {reason(error)}. Free some disk space and {hint}.") from error


@contextmanager
def _explained_memory_errors(config: TrainConfig, base: Base, output: Path) -> Iterator[None]:
    """Add the last checkpoint and what would need less memory."""
    try:
        yield
    except CannotRepeat as error:
        kept, resolution = checkpoint.list_checkpoints(output), config.resolution or base.resolution
        found = remedies(config, base.kind, resolution, config.mixed_precision or "no", base.device.type == "cuda")
        retry = f"resume from {kept[-1]} with --resume_from_checkpoint latest" if kept else "repeat the command"
        raise UnlearnError(
            f"{error} Free memory of the device and {retry}, or start over (--overwrite) with: {', '.join(found)}."
        ) from error


@contextmanager
def _named_checkpoint(output: Path) -> Iterator[None]:
    """Name the last checkpoint after a second Ctrl-C, which saves none."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        kept = checkpoint.list_checkpoints(output)
        if str(interrupt) or not kept:
            raise
        raise KeyboardInterrupt(f"The last checkpoint is {kept[-1]}.") from None


def _close_run(config: TrainConfig, training: Training, state: TrainingState, record_of: RecordOf) -> None:
    """Save the trained weights and, last, the record that marks the run as finished."""
    accelerator, output, best = training.accelerator, training.output, training.output / BEST_DIR
    training.student.save(output)
    cost = {
        "seconds": round(state.seconds, 1),
        "steps": state.step,
        "images_seen": state.step * training.batches.images_per_step,
        "peak_memory_mb": peak_memory_mb(),
        "device": device_name(accelerator.device),
        "processes": accelerator.num_processes,
        "effective_batch_size": config.effective_batch_size,
        "micro_batch_size": state.batching.micro_batch_size,
        "gradient_checkpointing": state.batching.gradient_checkpointing,
        "teacher_batch_size": state.batching.teacher_batch_size,
        "mixed_precision": accelerator.mixed_precision,
        "stopped": state.stopped or "max_train_steps",
    }
    if training.probe and state.best_step:
        seen = {"steps": state.best_step, "images_seen": state.best_step * training.batches.images_per_step}
        best_cost = cost | seen | {"stopped": f"best of the probes, {config.probe}"}
        write_json(best / TRAINING, record_of(best_cost))
        print(f"Best step by --probe {config.probe}: {state.best_step}, saved in {best}.", file=sys.stderr)
    write_json(output / TRAINING, record_of(cost))
    stopped = f" ({state.stopped})" if state.stopped else ""
    print(f"Trained {counted(state.step, 'step')} in {state.seconds:.0f} s{stopped}: {output}.", file=sys.stderr)
