"""Render a concept's data folder: generate the images of its prompts, resumable, then write the manifest."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sd_unlearn import __version__
from sd_unlearn.config.base import RenderConfig
from sd_unlearn.config.checks import check_render
from sd_unlearn.data.concept import Concept, describe_anchored
from sd_unlearn.data.dataset import set_names
from sd_unlearn.data.metadata import read_metadata
from sd_unlearn.data.photos import check_places, is_image_folder
from sd_unlearn.data.render_job import (
    RenderJob,
    image_records,
    image_requests,
    images_by_group,
    make_job,
)
from sd_unlearn.data.render_settings import SETTINGS, WEIGHTS, differences, read_settings, settings_in
from sd_unlearn.data.several import load_concepts
from sd_unlearn.errors import UnlearnError, UsageError, reason
from sd_unlearn.io.files import check_writable, write_json, write_jsonl
from sd_unlearn.io.images import is_intact
from sd_unlearn.io.lock import locked, remove_leftovers
from sd_unlearn.io.reading import read_json
from sd_unlearn.io.run_folder import DATA_MANIFEST, METADATA, NEGATIVE, UNLABELED
from sd_unlearn.launch import process_rank
from sd_unlearn.models.base import Base, load_base
from sd_unlearn.models.find_base import find_base
from sd_unlearn.models.kinds import sampler_of
from sd_unlearn.models.recorded_base import different_hash
from sd_unlearn.models.sampling import count_tiled, generate_missing, wait_for_images
from sd_unlearn.seeds import RENDER_SEEDS


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
    records = image_records(job)
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
        "mixed_in_share_of_folder": round(counts.get("mixed_in", 0) / unlabeled, 4),
        "seeds": {"render": list(RENDER_SEEDS), "seed": job.seed},
        "sampler": {
            "name": sampler_of(base),
            "steps": job.sampler.steps,
            "guidance_scale": job.sampler.guidance_scale,
            **({"tiled_images": tiled} if tiled else {}),
        },
    }


def _positive_folders(job: RenderJob) -> list[Path]:
    return [job.folder / name for name in set_names(job.concept)]


def _is_complete(place: Path) -> bool:
    """Whether an image folder has metadata and every image it lists, undamaged."""
    lines = read_metadata(place)
    return bool(lines) and all(is_intact(place / line.file_name) for line in lines.values())
