"""Render a concept's data folder: generate the images of its prompts, resumable, then write the manifest."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd_unlearn import __version__
from sd_unlearn.config.base import RenderConfig
from sd_unlearn.config.checks import check_render
from sd_unlearn.config.options import MAX_IMAGES
from sd_unlearn.config.paths import local_path
from sd_unlearn.data.concept import Concept, describe_anchored, expand_braces
from sd_unlearn.data.dataset import set_names
from sd_unlearn.data.metadata import read_metadata
from sd_unlearn.data.photos import check_places, is_image_folder
from sd_unlearn.data.render_settings import (
    SETTINGS,
    WEIGHTS,
    ImageGroup,
    differences,
    read_settings,
    seed_in,
    settings_in,
)
from sd_unlearn.data.several import load_concepts
from sd_unlearn.errors import UnlearnError, UsageError, reason
from sd_unlearn.io.files import check_writable, write_json, write_jsonl
from sd_unlearn.io.images import is_intact
from sd_unlearn.io.lock import locked, remove_leftovers
from sd_unlearn.io.reading import read_json
from sd_unlearn.io.run_folder import DATA_MANIFEST, METADATA, NEGATIVE, UNLABELED, ImageRecord
from sd_unlearn.launch import process_rank
from sd_unlearn.models.base import Base, load_base
from sd_unlearn.models.find_base import find_base
from sd_unlearn.models.kinds import sampler_of
from sd_unlearn.models.recorded_base import different_hash
from sd_unlearn.models.sampling import (
    ImageRequest,
    Sampler,
    count_tiled,
    generate_missing,
    resolve_sampler,
    wait_for_images,
)
from sd_unlearn.models.source import Source
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


def run(config: RenderConfig, concept: Concept | None = None) -> Path:
    """The `render` command. Renders what is missing in a concept's data folder and returns the folder.

    concept: instead of the one that --concept names.

    Raises:
        UsageError: invalid options, a folder that was rendered with other settings, or images in the wrong place.
    """
    concept = concept or load_concepts(config.concept, config.anchor, config.kind)
    check_render(config)
    job = make_job(concept, config, find_base(config, concept.base))
    check_places(job.folder)
    check_folder(job)
    if config.anchor is not None:
        print(describe_anchored(concept), file=sys.stderr)
    if config.dry_run:
        from sd_unlearn.data.plan import show_plan

        show_plan(job, config)
        return job.folder
    if not _is_finished(job):
        from sd_unlearn.data.plan import planned_sampler

        job = dataclasses.replace(job, sampler=planned_sampler(job.source, job.sampler, config))
    return render_locked(job, lambda: load_base(job.source, config.mixed_precision or "no"))


def make_job(concept: Concept, config: RenderConfig, source: Source) -> RenderJob:
    """The rendering that a command's options ask for."""
    sampler = resolve_sampler(config, source.name)
    groups = plan_images(concept, config)
    return RenderJob(concept, source, groups, sampler, config.seed, resolve_data_dir(config, concept))


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
    the most.

    Raises:
        UsageError: a negative number, more than MAX_IMAGES images, or a folder without images.
    """
    planned: list[ImageGroup] = []
    for part in concept.parts:
        before: dict[tuple[str, str], int] = {}
        for name, prompt, images in planned:
            before[name, prompt] = before.get((name, prompt), 0) + images
        for name, prompt, images in _plan_of(part, config):
            missing = images - before.get((name, prompt), 0)
            if (name, prompt) not in before or missing > 0:
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


def images_by_group(groups: Sequence[ImageGroup]) -> dict[str, int]:
    """Number of images of each group that has any."""
    counts: Counter[str] = Counter()
    for group in groups:
        counts[group.name] += group.images
    return {name: images for name, images in counts.items() if images}


def images_of_part(groups: Sequence[ImageGroup], part: Concept) -> dict[str, int]:
    """As `images_by_group`, without the images of other concepts' prompts."""
    own = {"generic": part.generic, "mixed_in": part.caption, "positive": part.caption}
    return images_by_group([group for group in groups if own.get(group.name, group.prompt) == group.prompt])


def known_beta(generic_share: float, counts: Mapping[str, int]) -> float | None:
    """beta, the share of the concept among the unlabeled images without the keep images; None if it is 0 or 1.

    The concept is in all `mixed_in` images, and in `generic_share` of the images of the generic prompt.
    counts: images by group.
    """
    generic, mixed_in = counts.get("generic", 0), counts.get("mixed_in", 0)
    beta = (mixed_in + generic_share * generic) / (generic + mixed_in)
    return round(beta, 4) if 0 < beta < 1 else None


def render_locked(job: RenderJob, get_base: Callable[[], Base]) -> Path:
    """`render_concept` while no other process renders into the folder; a complete folder is not locked.

    Raises:
        UnlearnError: another process renders into it; and as render_concept.
    """
    check_writable(job.folder, "--data_dir")
    check_ours(job.folder)
    if _is_finished(job):
        return job.folder
    with locked(job.folder, "--data_dir"):
        for folder in (job.folder, job.folder / UNLABELED, *_positive_folders(job)):
            remove_leftovers(folder)
        return render_concept(job, get_base)


def check_ours(folder: Path) -> None:
    """Refuse to render into folders of the user's own images, and over a settings.json or manifest.json of others.

    Raises:
        UsageError
    """
    if _is_ours(folder / SETTINGS):
        return
    names = [name for name in (SETTINGS, DATA_MANIFEST) if (folder / name).exists()]
    if folder.is_dir():
        found = sorted(sub for sub in folder.iterdir() if sub.is_dir() and is_image_folder(sub.name))
        names += [sub.name for sub in found if sub.name != NEGATIVE and any(sub.iterdir())]
    if names:
        raise UsageError(
            f"--data_dir {folder} holds {names[0]}, which sd-unlearn did not render, so nothing is rendered into it. "
            "Train on your own images with sd-unlearn train --data_dir, or choose another folder."
        )


def check_folder(job: RenderJob) -> None:
    """Refuse to render into a folder that is not ours, or that was rendered with other settings.

    Raises:
        UsageError: names what differs, with both values.
    """
    folder = job.folder
    check_ours(folder)
    if (folder / SETTINGS).is_file() and (found := differences(settings_in(folder), job.settings)):
        raise UsageError(
            f"--data_dir {folder} was rendered with other settings: {'; '.join(found)}. Repeat the earlier settings, "
            "choose another --data_dir, or delete the folder to render it again."
        )


def _is_ours(settings: Path) -> bool:
    """Whether settings.json is the one that render_concept writes."""
    try:
        content = read_json(settings)
    except UsageError:
        return False
    return isinstance(content, dict) and {"concept", "base", "seed", "plan"} <= content.keys()


def _is_finished(job: RenderJob) -> bool:
    """Whether everything is rendered already, with these settings."""
    folder = job.folder
    if not (folder / DATA_MANIFEST).is_file() or not (folder / SETTINGS).is_file():
        return False
    if differences(settings_in(folder), job.settings):
        return False
    return all(_is_complete(place) for place in (folder / UNLABELED, *_positive_folders(job)))


def render_concept(job: RenderJob, get_base: Callable[[], Base]) -> Path:
    """Render what is missing in the data folder, write metadata and manifest, and return the folder.

    get_base: loads the base; called only if something is missing.

    Raises:
        UsageError: the folder was rendered with other settings or by other weights, or holds images of the user's own.
        UnlearnError: the folder cannot be written, or the base's images are not finite.
    """
    folder, settings, started = job.folder, job.settings, job.folder / SETTINGS
    check_writable(folder, "--data_dir")
    check_folder(job)
    if _is_finished(job):
        return folder
    records = _image_records(job)
    requests = image_requests(job)
    loaded: list[Base] = []

    def load() -> Base:
        base = get_base()
        check_same_base(folder, base)
        loaded.append(base)
        # After loading: a base that fails to load must not leave settings behind.
        write_json(started, settings | {WEIGHTS: base.hashes})
        return base

    try:
        generated = generate_missing(load, requests, job.sampler, f"render {job.concept.slug}")
    except OSError as error:
        raise UnlearnError(f"--data_dir {folder} cannot be written: {reason(error)}.") from error
    wait_for_images(requests)
    if process_rank() == 0:
        for sub, rs in records.items():
            write_jsonl(folder / sub / METADATA, rs)
        base = loaded[0] if loaded else get_base()
        tiled = count_tiled(request.path for request in requests)
        write_json(folder / DATA_MANIFEST, _manifest(job, base.describe(), tiled))
        print(f"Rendered {generated} of {len(requests)} images into {folder}.", file=sys.stderr)
    return folder


def check_same_base(folder: Path, base: Base) -> None:
    """Refuse a folder whose images were generated by other weights than the base's, although the name is the same.

    Raises:
        UsageError: names the part that differs.
    """
    manifest, started = folder / DATA_MANIFEST, folder / SETTINGS
    record = read_settings(manifest).get("base") if manifest.is_file() else None
    record = record or (read_settings(started).get(WEIGHTS) if started.is_file() else None)
    if not isinstance(record, dict):
        return
    if key := different_hash(base.hashes, record):
        raise UsageError(
            f"--data_dir {folder} holds images of another version of {base.name}: the weights of its {base.part(key)} "
            f"differ (SHA-256 {str(record[key])[:12]} then, {base.hashes[key][:12]} now). Delete the folder or choose "
            "another --data_dir."
        )


def image_requests(job: RenderJob) -> list[ImageRequest]:
    """Every image of the folder, whether it exists or not."""
    records = _image_records(job).items()
    return [ImageRequest(job.folder / sub / r.file_name, r.text, r.seed) for sub, rs in records for r in rs]


def _image_records(job: RenderJob) -> dict[str, list[ImageRecord]]:
    """Folder -> one record per image. Each image of a prompt has its own seed, in whatever group it is."""
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
    return records


def _manifest(job: RenderJob, base: dict[str, Any], tiled: int) -> dict[str, Any]:
    """The content of manifest.json. tiled: number of images that the VAE decoded in tiles."""
    counts = images_by_group(job.groups)
    unlabeled = sum(images for group, images in counts.items() if group != "positive")
    return {
        "schema_version": 1,
        "concept": job.concept.slug,
        "base": base,
        "version": __version__,
        "counts": counts,
        **_betas(job),
        "mixed_in_share_of_folder": round(counts.get("mixed_in", 0) / unlabeled, 4),
        "seeds": {"render": list(RENDER_SEEDS), "seed": job.seed},
        "sampler": {
            "name": sampler_of(base),
            "steps": job.sampler.steps,
            "guidance_scale": job.sampler.guidance_scale,
            **({"tiled_images": tiled} if tiled else {}),
        },
    }


def _betas(job: RenderJob) -> dict[str, Any]:
    """beta and generic_share for manifest.json; of several concepts by their slugs."""
    parts = job.concept.parts
    betas = {p.slug: known_beta(p.generic_share, images_of_part(job.groups, p)) for p in parts}
    shares = {p.slug: p.generic_share for p in parts}
    if len(parts) > 1:
        return {"betas": betas, "generic_shares": shares}
    (beta,), (share,) = betas.values(), shares.values()
    return {"beta": beta, "generic_share": share}


def _positive_folders(job: RenderJob) -> list[Path]:
    return [job.folder / name for name in set_names(job.concept)]


def _is_complete(place: Path) -> bool:
    """Whether an image folder has metadata and every image it lists, undamaged."""
    lines = read_metadata(place)
    return bool(lines) and all(is_intact(place / line.file_name) for line in lines.values())
