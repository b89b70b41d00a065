"""Render a concept's data folder: generate the images of its prompts, resumable, then write the manifest."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sd_unlearn import __version__
from sd_unlearn.config.base import RenderConfig
from sd_unlearn.config.options import check_ranges
from sd_unlearn.data.concept import Concept
from sd_unlearn.data.dataset import set_names
from sd_unlearn.data.find_concept import describe_anchored
from sd_unlearn.data.metadata import read_metadata
from sd_unlearn.data.photos import check_places, is_image_folder
from sd_unlearn.data.render_job import (
    RenderJob,
    describe_without_images,
    find_base_of,
    image_records,
    image_requests,
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
from sd_unlearn.launch import print_once, process_rank
from sd_unlearn.models.base import Base, load_base
from sd_unlearn.models.device import choose_precision
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
    check_ranges(config)
    job = make_job(concept, config, find_base_of(concept, config))
    check_places(job.folder)
    check_folder(job)
    if config.anchor is not None:
        print_once(describe_anchored(concept))
    if concept.is_replaced_with_itself:
        print_once(
            f'Warning: caption and generic prompt of {concept.name} are both "{concept.caption}". Most trainings '
            "refuse that, because nothing would be erased. Change the generic prompt (generic in the concept file, or "
            "--anchor)."
        )
    for line in describe_without_images(job.groups):
        print_once(line)
    if config.dry_run:
        from sd_unlearn.data.plan import show_plan

        show_plan(job, config)
        return job.folder
    if _is_finished(job):
        return job.folder

    from sd_unlearn.data.plan import planned_sampler

    job = dataclasses.replace(job, sampler=planned_sampler(job.source, job.sampler, config))
    return render_locked(job, lambda: load_base(job.source, choose_precision(config.mixed_precision)))


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
    if (folder / SETTINGS).is_file() and (found := _differences(job)):
        raise UsageError(
            f"--data_dir {folder} was rendered with other settings: {'; '.join(found)}. Repeat the earlier settings, "
            "choose another --data_dir, or delete the folder to render it again."
        )


def _differences(job: RenderJob) -> list[str]:
    """How the settings differ from those of the folder. A base that was moved is compared later, by check_same_base."""
    before, now = settings_in(job.folder), job.settings
    keys = [key for key in ("base", "vae") if _is_moved(before.get(key), now.get(key))]
    if _recorded_weights(job.folder):
        before |= {key: now[key] for key in keys}
    return differences(before, now)


def _is_moved(before: Any, now: Any) -> bool:
    """Whether a path of the settings no longer exists, and the one given instead does."""
    if not (isinstance(before, str) and isinstance(now, str)):
        return False
    return Path(before).is_absolute() and not Path(before).exists() and Path(now).exists()


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

    Metadata files that exist are not changed, and images that they do not list are not rendered.

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
    existing = sum(request.path.is_file() for request in requests)
    loaded: list[Base] = []

    def load() -> Base:
        base = get_base()
        check_same_base(folder, base)
        loaded.append(base)
        # After loading: a base that fails to load must not leave settings behind.
        write_json(started, settings | {WEIGHTS: base.hashes})
        return base

    try:
        generate_missing(load, requests, job.sampler, f"render {job.concept.slug}", job.share)
    except OSError as error:
        raise UnlearnError(f"--data_dir {folder} cannot be written: {reason(error)}.") from error
    wait_for_images(requests)
    if process_rank() == 0:
        for sub, rs in records.items():
            if not read_metadata(folder / sub):
                write_jsonl(folder / sub / METADATA, rs)
        base = loaded[0] if loaded else load()
        counts = Counter(record.group for rs in records.values() for record in rs)
        tiled = count_tiled(request.path for request in requests)
        write_json(folder / DATA_MANIFEST, _manifest(job, base.describe(), counts, tiled))
        print(f"Rendered {len(requests) - existing} of {len(requests)} images into {folder}.", file=sys.stderr)
    return folder


def check_same_base(folder: Path, base: Base) -> None:
    """Refuse a folder whose images were generated by other weights than the base's, although the name is the same.

    Raises:
        UsageError: names the part that differs.
    """
    record = _recorded_weights(folder)
    if key := different_hash(base.hashes, record):
        raise UsageError(
            f"--data_dir {folder} holds images of another version of {base.name}: the weights of its {base.part(key)} "
            f"differ (SHA-256 {str(record[key])[:12]} then, {base.hashes[key][:12]} now). Delete the folder or choose "
            "another --data_dir."
        )


def _recorded_weights(folder: Path) -> dict[str, Any]:
    """The hashes of the base that generated the images of a folder; empty if none are recorded."""
    for file, key in ((folder / DATA_MANIFEST, "base"), (folder / SETTINGS, WEIGHTS)):
        record = read_settings(file).get(key) if file.is_file() else None
        if record and isinstance(record, dict):
            return record
    return {}


def _manifest(job: RenderJob, base: dict[str, Any], counts: Mapping[str, int], tiled: int) -> dict[str, Any]:
    """The content of manifest.json. counts: images by group. tiled: how many of them the VAE decoded in tiles."""
    return {
        "schema_version": 1,
        "concept": job.concept.slug,
        "base": base,
        "version": __version__,
        "counts": dict(counts),
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
