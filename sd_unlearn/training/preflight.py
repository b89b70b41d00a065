"""Everything that `train` and a sweep can refuse before a model is loaded or a file is written.

Only models.performance.check comes later, because it needs the device. Imports no torch, which takes seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from sd_unlearn.choices import CLOSED_FORM
from sd_unlearn.config.checks import check_train
from sd_unlearn.config.train import TrainConfig, default_lora_targets
from sd_unlearn.data.concept import Concept
from sd_unlearn.data.dataset import (
    Example,
    describe_images,
    describe_positives,
    has_negatives,
    members_of_sets,
    scan_positives,
)
from sd_unlearn.data.layout import check_batch_size
from sd_unlearn.data.photos import check_places
from sd_unlearn.data.prior import check_countable
from sd_unlearn.data.render import check_folder
from sd_unlearn.data.render_job import (
    describe_without_images,
    find_base_of,
    make_job,
    plan_images,
    resolve_data_dir,
    with_seed_of_folder,
)
from sd_unlearn.data.several import load_concepts
from sd_unlearn.errors import UsageError, install_command
from sd_unlearn.io.files import check_writable
from sd_unlearn.io.own_files import LATER, check_no_foreign_weights, is_free, is_run
from sd_unlearn.io.run_folder import DATA_MANIFEST, EXPORT_DIR, NEGATIVE, POSITIVE, TRAINING, UNLABELED
from sd_unlearn.launch import process_count
from sd_unlearn.models.base import check_text_encoder
from sd_unlearn.models.kinds import KINDS
from sd_unlearn.models.source import Source
from sd_unlearn.models.zero_terminal_snr import check_zero_terminal_snr
from sd_unlearn.training import checkpoint
from sd_unlearn.training.concept_checks import (
    check_concept,
    check_counts,
    check_several,
    describe_few_steps,
    scan_own,
)
from sd_unlearn.training.probe_checks import check_probe


@dataclass(frozen=True)
class Inputs:
    """What a training starts from, found and checked."""

    concept: Concept
    source: Source  # of the base
    data_dir: Path
    own_images: bool  # the user's own; otherwise the folder is rendered if missing or unfinished
    tracker: str | None
    own: tuple[Example, ...] = ()  # the user's own images, with those of --positives
    notes: tuple[str, ...] = ()  # lines for the user: what own images were found, what gets few images or steps


def check_inputs(config: TrainConfig, concept: Concept | None = None) -> Inputs:
    """Check all options but the run folder, find concept and base, and read the user's own images if there are any.

    concept: instead of the one that --concept names.

    Raises:
        UsageError: names the option, its value and what to do.
    """
    concept = concept or load_concepts(config.concept, config.anchor, config.kind)
    check_train(config)
    check_concept(config, concept)
    check_several(config, concept)
    check_bitsandbytes(config)
    source = find_base_of(concept, config)
    check_base(config, source)
    if config.offload and process_count() > 1 and (config.train_text_encoder or not config.quantize_base):
        raise UsageError(
            "--offload works in one process, or with --quantize_base and without --train_text_encoder; "
            f"this training has {process_count()} processes."
        )
    data_dir = resolve_data_dir(config, concept)
    if config.objective in CLOSED_FORM:
        return Inputs(concept, source, data_dir, own_images=False, tracker=None)
    own_images = has_own_images(data_dir)
    check_data_dir(config, data_dir)
    notes = []
    if not own_images:
        job = with_seed_of_folder(make_job(concept, config, source))
        check_folder(job)
        check_counts(config, concept, data_dir)
        notes = describe_without_images(job.groups)
    own = scan_own(config, concept, data_dir) if own_images else []
    photos = find_photos(config, concept, own)
    groups = [example.group for example in own] or image_groups(config, concept, photos)
    check_batch_size(config, concept, data_dir, config.target == "teacher" or "keep" in groups)
    if config.objective == "neggrad" and config.target == "noise" and "keep" not in groups:
        raise UsageError(
            f"--objective neggrad --target noise needs images to retain: {data_dir} has none of the group keep. Add "
            "some (docs/concepts.md, Your own images), or use --target teacher."
        )
    if config.beta == "estimate":
        check_countable(groups.count("positive"), groups.count("generic") + groups.count("mixed_in"))
    sets = [len(members) for members in members_of_sets(own).values()] or [groups.count("positive")]
    check_probe(config, concept, groups, sets)
    notes += [*describe_found(config, data_dir, own, photos), *describe_few_steps(config, concept)]
    tracker = choose_tracker(config.report_to)
    return Inputs(concept, source, data_dir, own_images, tracker, tuple(own or photos), tuple(notes))


def check_bitsandbytes(config: TrainConfig) -> None:
    """Refuse options that need bitsandbytes if it is not installed.

    Raises:
        UsageError
    """
    if find_spec("bitsandbytes"):
        return
    needs = f"needs bitsandbytes: {install_command('8bit')}"
    if config.optimizer == "adamw8bit":
        raise UsageError(f"--optimizer adamw8bit {needs}, or use --optimizer adamw.")
    if config.quantize_base == "nf4":
        raise UsageError(f"--quantize_base nf4 {needs}, or use --quantize_base int8.")


def check_base(config: TrainConfig, source: Source) -> None:
    """Refuse options that the base does not support, as far as that is known before it loads.

    Raises:
        UsageError
    """
    if config.zero_terminal_snr:
        check_zero_terminal_snr(source)
    check_kind(config, source.kind, source.name)


def check_kind(config: TrainConfig, kind: str | None, name: str) -> None:
    """Refuse options that a base of this kind does not support. kind: None if it is not known yet.

    Raises:
        UsageError
    """
    if config.train_text_encoder:
        check_text_encoder(kind, name)
    if kind is None:
        return
    if not KINDS[kind].is_flow:
        if config.timestep_sampling:
            raise UsageError(
                f"--timestep_sampling {config.timestep_sampling} is for flow matching (SD 3, FLUX, Z-Image, "
                f"Qwen-Image); {name} is of kind {kind}. Use --timestep_bias."
            )
        return
    what = f"{name} is of kind {kind}, whose transformer"
    if config.method == "full":
        raise UsageError(f"--method full: {what} has billions of weights. Train a LoRA (--method lora).")
    if config.attention != "sdpa":
        raise UsageError(f"--attention {config.attention}: {what} uses torch's own attention. Use --attention sdpa.")
    targets = config.lora_targets or default_lora_targets(config.objective)
    if targets in ("cross_attention", "not_cross_attention") or config.objective in CLOSED_FORM:
        option = f"--lora_targets {targets}" if config.lora_targets else f"--objective {config.objective}"
        raise UsageError(
            f"{option} needs a base with cross-attention (SD 1.x, 2.x, XL); {what} has joint attention. Use "
            "--objective pu with --lora_targets attention, attention+mlp or all_linear+conv."
        )


def has_own_images(data_dir: Path) -> bool:
    """Whether the images are the user's own: there are image folders that `render` did not start."""
    rendered = (data_dir / "settings.json").is_file() or (data_dir / DATA_MANIFEST).is_file()
    return not rendered and ((data_dir / UNLABELED).is_dir() or (data_dir / POSITIVE).is_dir())


def check_data_dir(config: TrainConfig, data_dir: Path) -> None:
    """Refuse images in the wrong place or that the objective does not use, and a folder that is not writable.

    Raises:
        UsageError
    """
    check_places(data_dir)
    if config.objective != "pu" and has_negatives(data_dir, config.eta):
        raise UsageError(
            f"{data_dir / NEGATIVE} holds images known to be normal, which --objective {config.objective} does not "
            "use. Leave them out with --eta 0, or use --objective pu."
        )
    check_writable(data_dir, "--data_dir")


def find_photos(config: TrainConfig, concept: Concept, own: Sequence[Example]) -> list[Example]:
    """The images of --positives, among the user's own images if they were read.

    Raises:
        UsageError: as scan_positives.
    """
    folder = config.positives
    if folder is None:
        return []
    return [example for example in own if example.path.parent == folder] or scan_positives(folder, concept)


def image_groups(config: TrainConfig, concept: Concept, photos: Sequence[Example]) -> Sequence[str]:
    """The group of each training image that is to be rendered, with the user's photos for the positives if any."""
    groups = [group for group, _, count in plan_images(concept, config) for _ in range(count)]
    return [group for group in groups if group != "positive"] + ["positive"] * len(photos) if photos else groups


def describe_found(config: TrainConfig, data_dir: Path, own: Sequence[Example], photos: Sequence[Example]) -> list[str]:
    """What was found among the user's own images, in lines: in the data folder, and in --positives."""
    lines = [describe_positives(config.positives, photos)] if config.positives else []
    if own:
        lines.append(describe_images(data_dir, [e for e in own if config.positives not in e.path.parents]))
        if not any(e.group == "keep" for e in own):
            lines.append(
                f"{data_dir}: no image has the group keep, so other concepts are not retained in training "
                "(docs/concepts.md, Your own images)."
            )
    return lines


def choose_tracker(report_to: str | None) -> str | None:
    """The tracker's name for Accelerate: --report_to, by default TensorBoard if it is installed.

    Raises:
        UsageError: the tracker is not installed.
    """
    if report_to == "none":
        return None
    if report_to and not find_spec(report_to):
        raise UsageError(f"--report_to {report_to} is not installed: pip install {report_to}, or use --report_to none.")
    return report_to or ("tensorboard" if find_spec("tensorboard") else None)


def check_output(config: TrainConfig, output: Path) -> Path | None:
    """Refuse a run folder that must not be overwritten or cannot be written. Returns the checkpoint to resume from.

    Raises:
        UsageError: a finished or unfinished run without --overwrite, another kind of folder, or one that is not
            writable; not a checkpoint.
    """
    if not is_free(output) and not is_run(output):
        raise UsageError(
            f"--output_dir {output} is not an sd-unlearn run folder but holds files. Choose an empty folder."
        )
    check_no_foreign_weights(output, "--output_dir")
    if not is_finished(output) and not checkpoint.list_checkpoints(output) and not config.overwrite:
        _check_no_results(output)
    if config.resume_from_checkpoint is None and not config.overwrite:
        if is_finished(output):
            raise UsageError(
                f"--output_dir {output} holds a finished run. Choose another --output_dir, or add --overwrite."
            )
        if kept := checkpoint.list_checkpoints(output):
            raise UsageError(
                f"--output_dir {output} holds an unfinished run, saved at {kept[-1].name}. Resume it with "
                "--resume_from_checkpoint latest, or start over with --overwrite."
            )
    check_writable(output, "--output_dir")
    return checkpoint.resolve(config.resume_from_checkpoint, output)


def check_apart(data_dir: Path, output: Path) -> None:
    """Refuse a run folder inside the data folder, the reverse, and one folder for both.

    Raises:
        UsageError
    """
    data, run = data_dir.resolve(), output.resolve()
    if data == run or data in run.parents or run in data.parents:
        raise UsageError(
            f"--output_dir {output} and --data_dir {data_dir} are the same folder or one is inside the other. Keep the "
            "training images and the run in separate folders."
        )


def _check_no_results(output: Path) -> None:
    """Refuse to start over where a run has no record but results: its training.json must have been lost.

    Raises:
        UsageError
    """
    for name in (*LATER, EXPORT_DIR):
        if (output / name).exists():
            raise UsageError(
                f"--output_dir {output} holds {name} but no {TRAINING}, so its training would start over. Choose "
                "another --output_dir, or add --overwrite to delete the results."
            )


def is_finished(output: Path) -> bool:
    """Whether the run's record, which is written last, exists."""
    return (output / TRAINING).is_file()
