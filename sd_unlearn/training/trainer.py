"""`train` from options to run folder: read `run`, then `_train`; the loop itself is loop.py."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, set_seed
from safetensors import SafetensorError

from sd_unlearn.config.base import as_dict
from sd_unlearn.config.checks import check_train
from sd_unlearn.config.train import TrainConfig
from sd_unlearn.data.batches import check_batch_size
from sd_unlearn.data.concept import Concept, load_concept, write_concept
from sd_unlearn.data.dataset import fingerprint, has_negatives, scan
from sd_unlearn.data.prior import check_countable
from sd_unlearn.data.render import data_dir_of, plan, render_concept
from sd_unlearn.errors import UnlearnError, UsageError
from sd_unlearn.io.files import check_writable, write_json, write_text
from sd_unlearn.io.run_folder import BEST_DIR, CONCEPT, CONFIG, DATA_MANIFEST, NEGATIVE, POSITIVE, TRAINING, UNLABELED
from sd_unlearn.models import performance
from sd_unlearn.models.base import (
    Base,
    check_text_encoder,
    check_zero_terminal_snr,
    choose_precision,
    load_base,
    use_zero_terminal_snr,
)
from sd_unlearn.models.source import Source, find_base
from sd_unlearn.seeds import TRAIN_SEEDS
from sd_unlearn.training import checkpoint
from sd_unlearn.training.loop import Progress, Training, fit
from sd_unlearn.training.optim import check_optimizer
from sd_unlearn.training.probe import check_probe
from sd_unlearn.training.provenance import device_name, identity_of, peak_memory_mb, training_record
from sd_unlearn.training.setup import Data, assemble, read_data, resolved

# How long processes wait for the first one, which alone draws previews and probes: minutes on a GPU, hours on a CPU.
PATIENCE = timedelta(hours=12)


def run(config: TrainConfig) -> Path:
    """Train on a concept, rendering its folders first if they are missing. Returns the run folder.

    Raises:
        UsageError, UnlearnError: what is wrong, checked before a model is loaded wherever that is possible.
        Interrupted: Ctrl-C or SIGTERM while training; a checkpoint was saved.
    """
    concept = load_concept(config.concept, config.anchor)
    check_train(config)
    check_optimizer(config)
    groups = [group for group, _, count in plan(concept, config) for _ in range(count)]
    source = find_base(config, concept.base)
    check_base(config, source)
    folder, output = data_dir_of(config, concept), config.output_dir or Path("runs") / concept.slug
    own_photos = has_own_photos(folder)
    check_folder(config, folder)
    check_batch_size(config, concept, folder)
    if own_photos:
        groups = [example.group for example in scan(folder, concept, config.eta)]
    if config.beta == "estimate":
        check_countable(groups.count("positive"), groups.count("generic") + groups.count("mixed_in"))
    check_probe(config, concept, groups)
    check_output(output, config)
    resume = checkpoint.resolve(config.resume_from_checkpoint, output)
    if config.resume_from_checkpoint and not resume:
        if (output / TRAINING).is_file():  # saved without checkpoints, or they were deleted since
            print(f"{output} is finished and holds no checkpoint; --overwrite starts over.", file=sys.stderr)
            return output
        print(f"--output_dir {output} holds no checkpoint yet: starting from the beginning.", file=sys.stderr)
    check_writable(folder, "--data_dir")

    precision = choose_precision(config.mixed_precision)
    tracker = choose_tracker(config.report_to)
    accelerator = Accelerator(
        mixed_precision=precision,
        log_with=tracker,
        project_dir=str(output),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    performance.check(config, accelerator.device)
    set_seed(TRAIN_SEEDS[0] + config.seed, device_specific=True)
    loaded: list[Base] = []

    def get_base() -> Base:
        if not loaded:  # what is trained must be in full precision; autocast computes in half all the same
            loaded.append(load_base(source, "no" if config.method == "full" else precision, accelerator.device))
        return loaded[0]

    if not own_photos:
        if not (folder / DATA_MANIFEST).is_file():
            print(f"{folder} is missing or unfinished: rendering it first.", file=sys.stderr)
        render_concept(concept, config, source.name, get_base)
        accelerator.wait_for_everyone()  # the metadata is written by the first process, after the last image
    config = dataclasses.replace(config, data_dir=folder, output_dir=output)
    return _train(config, concept, get_base(), accelerator, resume)


def check_base(config: TrainConfig, source: Source) -> None:
    """Refuse options that the base cannot be trained with, as far as that is known before it loads.

    Raises:
        UsageError
    """
    if config.zero_terminal_snr:
        check_zero_terminal_snr(source)
    if config.train_text_encoder:
        check_text_encoder(source.kind, source.name)


def check_folder(config: TrainConfig, folder: Path) -> None:
    """Refuse images that the objective has no use for.

    Raises:
        UsageError
    """
    if config.objective != "pu" and has_negatives(folder, config.eta):
        raise UsageError(
            f"{folder / NEGATIVE} holds images known to be normal, which --objective {config.objective} does not "
            "learn from. Leave them out with --eta 0, or take --objective pu."
        )


def has_own_photos(folder: Path) -> bool:
    """Whether somebody put images there by hand: folders that `render` did not start."""
    started = (folder / "settings.json").is_file() or (folder / DATA_MANIFEST).is_file()
    return not started and ((folder / UNLABELED).is_dir() or (folder / POSITIVE).is_dir())


def check_output(output: Path, config: TrainConfig) -> None:
    """Refuse, touching nothing, a run folder that must not or cannot be written.

    Raises:
        UsageError: a finished run or one that can go on without --overwrite, a folder of something else, a place that
            cannot be written.
    """
    if output.is_dir() and any(output.iterdir()) and not (output / CONCEPT).is_file():
        raise UsageError(f"--output_dir {output} holds files that are no run of sd-unlearn; name an empty folder.")
    kept = checkpoint.found(output)
    if config.resume_from_checkpoint is None and not config.overwrite:
        if (output / TRAINING).is_file():
            raise UsageError(
                f"--output_dir {output} holds a finished run. Name another --output_dir, or add --overwrite."
            )
        if kept:
            raise UsageError(
                f"--output_dir {output} holds an unfinished run, saved at {kept[-1].name}. Go on from there with "
                "--resume_from_checkpoint latest, or start over with --overwrite."
            )
    check_writable(output, "--output_dir")


def choose_tracker(asked: str | None) -> str | None:
    """The tracker's name for Accelerate: the option, else TensorBoard if it is installed.

    Raises:
        UsageError: a tracker that is not installed.
    """
    if asked == "none":
        return None
    if asked and not find_spec(asked):
        raise UsageError(f"--report_to {asked} is not installed: pip install {asked}, or --report_to none.")
    return asked or ("tensorboard" if find_spec("tensorboard") else None)


def _train(config: TrainConfig, concept: Concept, base: Base, accelerator: Accelerator, resume: Path | None) -> Path:
    assert config.data_dir is not None
    assert config.output_dir is not None
    output = config.output_dir
    if config.zero_terminal_snr:  # not sooner: the folders are rendered with the base's own schedule
        use_zero_terminal_snr(base)
    if config.train_text_encoder:
        check_text_encoder(base.kind, base.name)
    data = read_data(config, concept, base)
    forced = config.force_resume
    config = dataclasses.replace(resolved(config, base, data), mixed_precision=accelerator.mixed_precision)
    identity = identity_of(config, concept, base, fingerprint(data.examples), accelerator.num_processes)
    if resume:
        checkpoint.check_same(resume, identity, forced)
        if (output / TRAINING).is_file() and not forced:
            accelerator.print(f"{output} is finished; --overwrite starts over.", file=sys.stderr)
            return output
    training = assemble(config, concept, base, data, accelerator, identity)
    _open_run(training, keep=resume is not None)
    accelerator.init_trackers("sd-unlearn" if config.report_to == "wandb" else "tensorboard")
    about = f"Forgetting {concept.name!r} in {base.name}: {data.counts()}, beta {config.beta:g} ({data.prior.source})."
    for line in (*data.prior.notes, about):
        accelerator.print(line, file=sys.stderr)
    with _told_where_writing_fails(output):
        progress = fit(training, resume)
        if accelerator.is_main_process:
            _close_run(training, progress, base, data)
    accelerator.wait_for_everyone()
    accelerator.end_training()  # last: it takes the process group down
    return output


def _open_run(training: Training, keep: bool) -> None:
    """Make the run folder; an earlier run goes only now that nothing can be refused any more."""
    if training.accelerator.is_main_process:
        output = training.output
        if not keep:
            shutil.rmtree(output, ignore_errors=True)
        (output / TRAINING).unlink(missing_ok=True)
        settings = yaml.safe_dump(as_dict(training.config), sort_keys=False, allow_unicode=True)
        for folder in (output, output / BEST_DIR) if training.probe else (output,):
            write_concept(folder / CONCEPT, training.concept)  # first: by it check_output knows a run
            write_text(folder / CONFIG, settings)
    training.accelerator.wait_for_everyone()


@contextmanager
def _told_where_writing_fails(output: Path) -> Iterator[None]:
    """A full disk is no fault of ours: say what to do, and that what was saved before is still there."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        kept = checkpoint.found(output)
        way_on = f"go on from {kept[-1]} with --resume_from_checkpoint latest" if kept else "start again"
        raise UnlearnError(f"Cannot write to {output}: {reason}. Make room, and {way_on}.") from error


def _close_run(training: Training, progress: Progress, base: Base, data: Data) -> None:
    """Save what was learned, and last the record that says the run is finished."""
    accelerator, config = training.accelerator, training.config
    training.student.save(training.output)
    cost = {
        "seconds": round(progress.seconds, 1),
        "steps": progress.step,
        "images_seen": progress.step * training.batches.layout.total(len(training.batches.brackets)),
        "peak_memory_mb": peak_memory_mb(),
        "device": device_name(accelerator.device),
        "processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        "stopped": progress.stopped or "max_train_steps",
    }
    best = training.output / BEST_DIR
    if training.probe and progress.best_step:
        of_best = cost | {"steps": progress.best_step, "stopped": f"best of the probes, {config.probe}"}
        write_json(best / TRAINING, _record(training, base, data, of_best))
        said = f"The best by --probe {config.probe} was step {progress.best_step}: {best}."
        print(said, file=sys.stderr)
    write_json(training.output / TRAINING, _record(training, base, data, cost))
    why = f" ({progress.stopped})" if progress.stopped else ""
    print(f"Trained {progress.step} steps in {progress.seconds:.0f} s{why}: {training.output}.", file=sys.stderr)


def _record(training: Training, base: Base, data: Data, cost: dict[str, Any]) -> dict[str, Any]:
    record = training_record(training.config, training.concept, base, data.prior, cost)
    return record | {"betas": data.betas}
