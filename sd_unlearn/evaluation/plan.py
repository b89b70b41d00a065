"""The plan of an evaluation, for `evaluate --dry_run`: memory for generating images, and how many there are."""

from __future__ import annotations

from sd_unlearn.data.plan import (
    SMALLER,
    check_fits,
    choose_device,
    choose_precision_for,
    count_missing,
    describe_images,
    describe_memory,
    fit_sampler,
    plan_inference,
)
from sd_unlearn.errors import counted
from sd_unlearn.evaluation.generate import BaseLoader, image_cache
from sd_unlearn.evaluation.job import EvaluationJob
from sd_unlearn.evaluation.loras import ModelVariant
from sd_unlearn.evaluation.prompts import ImageSpec
from sd_unlearn.launch import process_rank
from sd_unlearn.models.sampling import resolve_sampler


def show_plan(job: EvaluationJob) -> None:
    """Print the plan of an evaluation. The memory of detectors is not part of it.

    Raises:
        UnlearnError: not even one image fits.
    """
    config, names = job.config, ", ".join(concept.name for concept in job.concepts.values())
    if not job.needs_base:
        print(f"Plan: evaluate {counted(len(job.subjects), 'image folder')} on {names}. No images are generated.")
        return
    device, sampler = choose_device(config.vram), resolve_sampler(config, job.source)
    precision = choose_precision_for(device, config.mixed_precision)
    inference = plan_inference(job.source, device, precision, sampler.resolution)
    phase, notes = fit_sampler(inference, sampler, config.render_batch_size)
    missing, total, known = _count_images(job)
    models = counted(len(job.subjects), "model")
    title = f"Plan: evaluate {models} on {names} with the base {job.source.name}, precision {precision}."
    lines = [title, "", *describe_memory([phase], device), *notes, ""]
    lines += describe_images(missing, total, inference.footprint.resolution, sampler)
    if not known:
        lines.append("Images of earlier evaluations are used again; which exist is known once the base is loaded.")
    lines.append("Time: unknown. The memory of detectors is not included.")
    if process_rank() == 0:
        print("\n".join(lines))
    check_fits([phase], device, SMALLER)


def _count_images(job: EvaluationJob) -> tuple[int, int, bool]:
    """(missing, total, whether it is known which images exist: the cache's folder depends on the base's weights)."""
    known = not job.base_named and any(lora.is_run for lora in job.loras)
    variants = [(ModelVariant(), list(job.plans))]
    variants += [(subject.variant, list(subject.concepts)) for subject in job.subjects if subject.variant]
    cache = image_cache(job, BaseLoader(job)) if known else None
    folders: dict[str, tuple[ModelVariant, dict[str, ImageSpec]]] = {}  # strength 0 has the base's images
    for variant, slugs in variants:
        _, specs = folders.setdefault(variant.folder, (variant, {}))
        specs |= {spec.file_name: spec for slug in slugs for spec in job.plans[slug]}
    total = sum(len(specs) for _, specs in folders.values())
    if cache is None:
        return total, total, known
    missing = sum(count_missing(cache.paths(variant, list(specs.values()))) for variant, specs in folders.values())
    return missing, total, known
