"""Prompts -> images + manifest: seeded per image, resumable, sharded over processes; used before and after training.

Images are drawn in fixed chunks. A chunk of which anything is missing is drawn whole, because the rounding of a
batched matrix product depends on the batch it is in: so an interrupted run ends with the bytes of an uninterrupted one.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sd_unlearn import __version__
from sd_unlearn.config.base import RenderConfig
from sd_unlearn.config.checks import check_render
from sd_unlearn.data.concept import Concept, expand_braces, load_concept
from sd_unlearn.errors import UnlearnError, UsageError
from sd_unlearn.io.files import check_writable, read_json, read_jsonl, write_json, write_jsonl
from sd_unlearn.io.run_folder import DATA_MANIFEST, METADATA, POSITIVE, UNLABELED, ImageRecord
from sd_unlearn.launch import process_rank
from sd_unlearn.models.base import Base, load_base
from sd_unlearn.models.sampling import ImageRequest, Sampler, generate_missing, resolve_sampler, wait_for_images
from sd_unlearn.models.source import find_base
from sd_unlearn.seeds import RENDER_SEEDS, image_seed


def plan(concept: Concept, config: RenderConfig) -> list[tuple[str, str, int]]:
    """What to render: (group, prompt, count), the command's counts before the concept file's."""
    counts = dataclasses.asdict(concept.images)
    for name in counts:
        asked = getattr(config, f"num_{name}")
        if asked is not None:
            counts[name] = asked
    if min(counts.values()) < 0:
        raise UsageError(f"--num_* must not be negative: {counts}.")
    if counts["positive"] < 1 or counts["unlabeled"] + counts["mixed_in"] < 1:
        raise UsageError("--num_positive and --num_unlabeled must leave at least one image in each folder.")
    keep = [("keep", prompt, count) for line in concept.keep for prompt, count in _share_out(line, counts["keep"])]
    return [
        ("generic", concept.generic, counts["unlabeled"]),
        ("mixed_in", concept.caption, counts["mixed_in"]),
        *keep,
        ("positive", concept.caption, counts["positive"]),
    ]


def _share_out(line: str, count: int) -> list[tuple[str, int]]:
    """A keep line's images over its alternatives, so that every line weighs the same however many it lists."""
    prompts = expand_braces([line])
    return [(p.text, count // len(prompts) + (i < count % len(prompts))) for i, p in enumerate(prompts)]


def known_beta(concept: Concept, counts: dict[str, int]) -> float | None:
    """The concept's share among the unlabeled images that are not keep images: those hidden there by intent, and those
    the generic prompt draws by itself at the share the concept file states. None when that is 0 or 1."""
    generic, mixed_in = counts.get("generic", 0), counts.get("mixed_in", 0)
    share = (mixed_in + concept.generic_share * generic) / (generic + mixed_in)
    return round(share, 4) if 0 < share < 1 else None


def data_dir_of(config: RenderConfig, concept: Concept) -> Path:
    return config.data_dir or Path("data") / concept.slug


def run(config: RenderConfig) -> Path:
    """Render a concept's two folders (only what is missing) and write the manifest last. Returns the data folder.

    Raises:
        UsageError: bad options, or a folder rendered with other settings.
    """
    concept = load_concept(config.concept, config.anchor)
    check_render(config)
    source = find_base(config, concept.base)
    return render_concept(concept, config, source.name, lambda: load_base(source, config.mixed_precision or "no"))


def render_concept(concept: Concept, config: RenderConfig, name: str, get_base: Callable[[], Base]) -> Path:
    """As run(), for a resolved concept and a base that is loaded only when something is missing."""
    sampler = resolve_sampler(config, name)
    groups = plan(concept, config)
    settings = {
        "concept": concept.name,
        "base": name,
        "seed": config.seed,
        "steps": sampler.steps,
        "guidance_scale": sampler.guidance_scale,
        "batch_size": sampler.batch_size,
        "resolution": sampler.resolution,
        "plan": [list(group) for group in groups],
        **{key: value for key in ("vae", "prediction_type") if (value := getattr(config, key))},
    }
    folder = data_dir_of(config, concept)
    check_writable(folder, "--data_dir")
    started = folder / "settings.json"
    if started.is_file() and read_json(started) != settings:
        raise UsageError(
            f"--data_dir {folder} was rendered with other settings ({started}). Delete it or name another --data_dir."
        )
    if (folder / DATA_MANIFEST).is_file() and started.is_file() and _complete(folder):
        return folder
    records = _records(groups, config.seed, sampler)
    requests = [ImageRequest(folder / sub / r.file_name, r.text, r.seed) for sub, rs in records.items() for r in rs]
    loaded: list[Base] = []

    def load() -> Base:
        loaded.append(get_base())
        write_json(started, settings)  # only now: a base that cannot be had leaves nothing behind
        return loaded[0]

    try:
        drawn = generate_missing(load, requests, sampler, f"render {concept.slug}")
    except OSError as error:
        raise UnlearnError(f"--data_dir {folder} cannot be written: {error.strerror}.") from error
    wait_for_images(requests)
    if process_rank() == 0:
        for sub, rs in records.items():
            write_jsonl(folder / sub / METADATA, rs)
        identity = (loaded[0] if loaded else get_base()).describe()
        counts = _counts(records)
        write_json(folder / DATA_MANIFEST, _manifest(concept, identity, settings, counts, config.seed))
        print(f"Rendered {drawn} of {len(requests)} images into {folder}.", file=sys.stderr)
    return folder


def _records(groups: list[tuple[str, str, int]], seed: int, sampler: Sampler) -> dict[str, list[ImageRecord]]:
    records: dict[str, list[ImageRecord]] = {UNLABELED: [], POSITIVE: []}
    prompts: Counter[str] = Counter()  # hidden and labeled positives share a prompt, not a seed
    numbers: Counter[str] = Counter()
    for group, prompt, count in groups:
        for _ in range(count):
            image = ImageRecord(
                f"{group}-{numbers[group]:05d}.png",
                prompt,
                image_seed(RENDER_SEEDS, seed, prompt, prompts[prompt]),
                sampler.guidance_scale,
                sampler.steps,
                group,
            )
            records[POSITIVE if group == "positive" else UNLABELED].append(image)
            prompts[prompt] += 1
            numbers[group] += 1
    return records


def _counts(records: dict[str, list[ImageRecord]]) -> dict[str, int]:
    return dict(Counter(record.group for rs in records.values() for record in rs))


def _manifest(
    concept: Concept, base: dict[str, Any], settings: dict[str, Any], counts: dict[str, int], seed: int
) -> dict[str, Any]:
    unlabeled = sum(n for group, n in counts.items() if group != "positive")
    return {
        "schema_version": 1,
        "concept": concept.slug,
        "base": base,
        "version": __version__,
        "counts": counts,
        "beta": known_beta(concept, counts),
        "generic_share": concept.generic_share,
        "mixed_in_share_of_folder": round(counts.get("mixed_in", 0) / unlabeled, 4),
        "seeds": {"render": list(RENDER_SEEDS), "seed": seed},
        "sampler": {"name": "DDIM", "steps": settings["steps"], "guidance_scale": settings["guidance_scale"]},
    }


def _complete(folder: Path) -> bool:
    """Whether every image of both metadata files is there."""
    for sub in (UNLABELED, POSITIVE):
        if not (folder / sub / METADATA).is_file():
            return False
        if not all((folder / sub / r["file_name"]).is_file() for r in read_jsonl(folder / sub / METADATA)):
            return False
    return True
