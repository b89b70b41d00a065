"""What a data folder must hold: the images of each prompt, with their files and seeds, and the beta that follows."""

from __future__ import annotations

import dataclasses
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from sd_unlearn.choices import TemplateKind
from sd_unlearn.config.base import RenderConfig
from sd_unlearn.config.options import MAX_IMAGES
from sd_unlearn.config.paths import local_path
from sd_unlearn.data.concept import Concept, expand_braces, normalized
from sd_unlearn.data.concept_kinds import TEMPLATES
from sd_unlearn.data.dataset import set_names
from sd_unlearn.data.metadata import normalize, read_metadata
from sd_unlearn.data.render_settings import ImageGroup, seed_in
from sd_unlearn.errors import UsageError
from sd_unlearn.io.run_folder import UNLABELED, ImageRecord
from sd_unlearn.models.find_base import find_base
from sd_unlearn.models.sampling import ImageRequest, Sampler, resolve_sampler
from sd_unlearn.models.source import BUNDLED, OPTION, Source
from sd_unlearn.seeds import RENDER_SEEDS, image_seed


@dataclass(frozen=True)
class RenderJob:
    """Everything that determines the content of a rendered data folder."""

    concept: Concept
    source: Source
    groups: list[ImageGroup]
    sampler: Sampler
    seed: int
    folder: Path
    share: int  # images that one of several processes renders before it is the next one's turn; see generate_missing

    @property
    def settings(self) -> dict[str, Any]:
        """The content of settings.json. A folder is only resumed with the same settings (render_settings.py)."""
        source = self.source
        overrides = {
            "vae": local_path(source.vae),
            "prediction_type": source.prediction_type,
            "drop_t5": source.drop_t5,
        }
        return {
            "concept": self.concept.name,
            "base": local_path(source.name),
            "seed": self.seed,
            **dataclasses.asdict(self.sampler),
            "plan": [list(group) for group in self.groups],
            **{key: value for key, value in overrides.items() if value},
        }


def find_base_of(concept: Concept, config: RenderConfig) -> Source:
    """The base that a concept is removed from.

    Raises:
        UsageError: as find_base and check_base_of.
    """
    source = find_base(config, concept.base)
    check_base_of(concept, source)
    return source


def check_base_of(concept: Concept, source: Source, makes_files: bool = True) -> None:
    """Refuse a concept file for a bundled base on another base. (A folder may hold another build of a bundled base.)

    makes_files: the command itself has --kind and --anchor.

    Raises:
        UsageError: the concept's file is for a bundled base and the base is a Hub id.
    """
    if concept.base not in BUNDLED or source.name in BUNDLED or source.place.exists():
        return
    part = concept.parts[0]
    kind = part.kind if part.kind in get_args(TemplateKind) else "other"
    options = ["--kind", kind, "--anchor", TEMPLATES[kind].anchor]  # type: ignore[index]
    command = f"--concept {shlex.join([part.name, *options])}"
    if not makes_files or len(concept.parts) > 1:
        file = f"my-{part.slug}.yaml"
        command = (
            f"--concept {file} after sd-unlearn concepts new {shlex.join([part.name, *options, '--output', file])}"
        )
        command += ", and the like for the others" if len(concept.parts) > 1 else ""
    raise UsageError(
        f"{OPTION} {source.name}: the concept file of {part.name} is for the base {concept.base}: its prompt is "
        f'"{part.caption}". For this base use {command} (--anchor is what to generate instead).'
    )


def make_job(concept: Concept, config: RenderConfig, source: Source) -> RenderJob:
    """The rendering that a command's options ask for."""
    sampler = resolve_sampler(config, source)
    groups = plan_images(concept, config)
    folder = resolve_data_dir(config, concept)
    return RenderJob(concept, source, groups, sampler, config.seed, folder, share=sampler.batch_size)


def with_seed_of_folder(job: RenderJob) -> RenderJob:
    """The job with the seed that its folder was rendered with, so that trainings with other seeds can use the folder.

    Raises:
        UsageError: settings.json is not readable.
    """
    seed = seed_in(job.folder)
    return job if seed is None else dataclasses.replace(job, seed=seed)


def resolve_data_dir(config: RenderConfig, concept: Concept) -> Path:
    return config.data_dir or Path("data") / concept.slug


def plan_images(concept: Concept, config: RenderConfig) -> list[ImageGroup]:
    """How many images to render of each prompt: the --num_* options, else the concept file's numbers.

    Images that several concepts need, of generic and keep prompts, are rendered once: as many as the one that needs
    the most. Prompts that differ only in case or white space are the same.

    Raises:
        UsageError: a negative number, more than MAX_IMAGES images, or a folder without images.
    """
    planned: list[ImageGroup] = []
    for part in concept.parts:
        before: dict[tuple[str, str], int] = {}
        for name, prompt, images in planned:
            key = (name, normalized(prompt))
            before[key] = before.get(key, 0) + images
        for name, prompt, images in _plan_of(part, config):
            key = (name, normalized(prompt))
            missing = images - before.get(key, 0)
            if key not in before or missing > 0:
                planned.append(ImageGroup(name, prompt, missing))
    return planned


def _plan_of(concept: Concept, config: RenderConfig) -> list[ImageGroup]:
    """The images of one concept."""
    counts = dataclasses.asdict(concept.images)
    options = {name: getattr(config, f"num_{name}") for name in counts}
    counts |= {name: value for name, value in options.items() if value is not None}
    if min(counts.values()) < 0:
        raise UsageError(f"--num_* must not be negative: {counts}.")
    if counts["positive"] < 1 or counts["unlabeled"] + counts["mixed_in"] < 1:
        raise UsageError("--num_positive and --num_unlabeled must leave at least one image in each folder.")
    total = sum(counts.values()) + counts["keep"] * (len(concept.keep) - 1)
    if total > MAX_IMAGES:
        raise UsageError(f"--num_* ask for {total:,} images, but at most {MAX_IMAGES:,} can be rendered: {counts}.")
    keep = [group for line in concept.keep for group in _split_evenly(line, counts["keep"])]
    return [
        ImageGroup("generic", concept.generic, counts["unlabeled"]),
        ImageGroup("mixed_in", concept.caption, counts["mixed_in"]),
        *keep,
        ImageGroup("positive", concept.caption, counts["positive"]),
    ]


def _split_evenly(keep_line: str, images: int) -> list[ImageGroup]:
    """Split a keep line's images over its alternatives, so that every line has the same weight."""
    prompts = expand_braces([keep_line])
    each, rest = divmod(images, len(prompts))
    return [ImageGroup("keep", prompt.text, each + (i < rest)) for i, prompt in enumerate(prompts)]


def describe_without_images(groups: Sequence[ImageGroup]) -> list[str]:
    """A line that warns of keep prompts without images, unless none has any."""
    keep: Counter[str] = Counter()
    for group in groups:
        if group.name == "keep":
            keep[group.prompt] += group.images
    without = [prompt for prompt, images in keep.items() if not images]
    if not without or not keep.total():
        return []
    return [
        f'Warning: {len(without)} of {len(keep)} keep prompts get no image, e.g. "{without[0]}", and are not retained. '
        "Raise --num_keep, or keep under images in the concept file: the images of each keep line are split over its "
        "alternatives."
    ]


def images_by_group(groups: Sequence[ImageGroup]) -> dict[str, int]:
    """Number of images of each group that has any."""
    counts: Counter[str] = Counter()
    for group in groups:
        counts[group.name] += group.images
    return {name: images for name, images in counts.items() if images}


def known_beta(generic_share: float, counts: Mapping[str, int]) -> float | None:
    """beta, the share of the concept among the unlabeled images without the keep images; None if it is 0 or 1.

    The concept is in all `mixed_in` images, and in `generic_share` of the images of the generic prompt.
    counts: images by group.
    """
    generic, mixed_in = counts.get("generic", 0), counts.get("mixed_in", 0)
    beta = (mixed_in + generic_share * generic) / max(1, generic + mixed_in)
    return round(beta, 4) if 0 < beta < 1 else None


def image_requests(job: RenderJob) -> list[ImageRequest]:
    """Every image of the folder, as image_records, whether it exists or not."""
    records = image_records(job).items()
    return [ImageRequest(job.folder / sub / r.file_name, r.text, r.seed) for sub, rs in records for r in rs]


def image_records(job: RenderJob) -> dict[str, list[ImageRecord]]:
    """Folder -> one record per image: those that its metadata file lists, or all of the plan if it has none yet.

    Each image of a prompt has its own seed, in whatever group it is.
    """
    positives = dict(zip((part.caption for part in job.concept.parts), set_names(job.concept), strict=True))
    records: dict[str, list[ImageRecord]] = {folder: [] for folder in (UNLABELED, *positives.values())}
    per_prompt: Counter[str] = Counter()
    numbers: Counter[tuple[str, str]] = Counter()  # of the files of a group in a folder
    for name, prompt, images in job.groups:
        folder = positives[prompt] if name == "positive" else UNLABELED
        for _ in range(images):
            record = ImageRecord(
                file_name=f"{name}-{numbers[folder, name]:05d}.png",
                text=prompt,
                seed=image_seed(RENDER_SEEDS, job.seed, prompt, per_prompt[prompt]),
                guidance_scale=job.sampler.guidance_scale,
                steps=job.sampler.steps,
                group=name,
            )
            records[folder].append(record)
            per_prompt[prompt] += 1
            numbers[folder, name] += 1
    return {folder: _listed(job.folder / folder, of_folder) for folder, of_folder in records.items()}


def _listed(place: Path, records: list[ImageRecord]) -> list[ImageRecord]:
    """The records of the images that a folder's metadata file lists. The user may have removed others."""
    names = {normalize(line.file_name) for line in read_metadata(place).values()}
    return [record for record in records if record.file_name in names] if names else records
