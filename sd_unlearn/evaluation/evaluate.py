"""`sd-unlearn evaluate`: generate images with and without LoRAs from the same seeds, run metrics, write results.json.

The format of results.json is described in docs/results.md.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from sd_unlearn import __version__
from sd_unlearn.config.evaluate import EvaluateConfig
from sd_unlearn.config.paths import recorded
from sd_unlearn.data.concept import Concept, concept_sha256
from sd_unlearn.errors import ConditionError, UnlearnError, counted
from sd_unlearn.evaluation.earlier import carry_attacks, earlier_results
from sd_unlearn.evaluation.fail_if import met_conditions, outcomes, parse_condition
from sd_unlearn.evaluation.generate import ImageCache, generate_images
from sd_unlearn.evaluation.job import EvaluationJob, resolve_job
from sd_unlearn.evaluation.loras import ModelVariant
from sd_unlearn.evaluation.pairs import MAX_PAIRS, PAIRS_PER_GROUP, count_outcomes, pick_pairs
from sd_unlearn.evaluation.problems import known_gaps
from sd_unlearn.evaluation.prompts import GROUPS, ImageSpec, group_prompts, write_plan
from sd_unlearn.evaluation.score import ConceptResults, SubjectImages, run_metrics
from sd_unlearn.evaluation.subjects import main_subjects
from sd_unlearn.io.files import full_disk_explained, timestamp, write_json, write_text
from sd_unlearn.io.lock import locked, remove_leftovers
from sd_unlearn.io.own_files import mark_evaluation
from sd_unlearn.io.paths import public_name, public_text
from sd_unlearn.io.run_folder import EVALUATION, IMAGE_DIR, RESULTS
from sd_unlearn.launch import print_once, process_rank
from sd_unlearn.metrics.registry import find_metrics, make_metrics, merge_cards, metric_cards, missing_evidence
from sd_unlearn.models.device import default_device
from sd_unlearn.models.kinds import sampler_of
from sd_unlearn.models.sampling import count_tiled
from sd_unlearn.results import BASE, SCHEMA_VERSION, Pair, Problem, as_json, parse_results
from sd_unlearn.seeds import EVALUATE_SEEDS


def run(config: EvaluateConfig, concepts: Sequence[Concept] = ()) -> dict[str, Any]:
    """Evaluate and write results.json. Existing images and cached detector outputs are reused.

    All processes of a distributed launch generate images; the first one runs the metrics. concepts: instead of those
    that --concept names.

    Returns:
        The content of results.json; {} with --write_plan or --dry_run, and in all processes but the first.

    Raises:
        UsageError: invalid options, nothing to evaluate, or LoRAs of different bases.
        UnlearnError: a model or detector cannot be loaded.
    """
    job = resolve_job(config, concepts, needs_subjects=config.write_plan is None)
    if job.prompt_set and job.prompt_set[0] < job.prompt_set[1]:
        used, size = job.prompt_set
        print_once(
            f"--prompt_set {config.prompt_set}: {used:,} of {size:,} prompts are used. To use all, leave out "
            "--num_images, and --groups or add direct to it."
        )
    if config.dry_run:
        from sd_unlearn.evaluation.plan import show_plan

        show_plan(job)
        return {}
    if config.write_plan is not None:
        write_plan(config.write_plan, job.plans)
        return {}
    metrics = {slug: find_metrics(job.metric_context(concept)) for slug, concept in job.concepts.items()}
    with full_disk_explained(), locked(job.output, "--output_dir"):
        if process_rank() == 0:
            for slug, concept in job.concepts.items():
                generated = any(subject.variant and slug in subject.concepts for subject in job.subjects)
                for message in known_gaps(
                    job.metric_context(concept), job.plans[slug] if generated else [], metrics[slug]
                ):
                    print(f"No verdict will be given. {message}", file=sys.stderr)  # before hours of generating
            for folder in (job.output, *(job.output / IMAGE_DIR).glob("*/")):
                remove_leftovers(folder)
        return _run(config, job, metrics)


def _run(config: EvaluateConfig, job: EvaluationJob, metrics: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """`run` once the options are checked, while no other process uses the output folder.

    metrics: the names of each concept's metrics.
    """
    cache = generate_images(job)
    if process_rank() > 0:
        return {}
    evaluated, cards = _run_all_metrics(job, cache, metrics)
    mark_evaluation(job.output)
    results = assemble(job, cache, evaluated, cards)
    if earlier := earlier_results(job.output / RESULTS):
        results = carry_attacks(results, earlier)
    conditions = outcomes([parse_condition(text) for text in config.fail_if], parse_results(results))
    results["conditions"] = [as_json(outcome) for outcome in conditions]
    write_text(job.output / EVALUATION, yaml.safe_dump(recorded(config), sort_keys=False, allow_unicode=True))
    write_json(job.output / RESULTS, results)
    return results


def check_conditions(results: dict[str, Any], fail_if: Sequence[str]) -> str:
    """A line that says how many conditions of --fail_if were checked; "" without any.

    Conditions of an earlier command, which `attack` keeps in results.json, are not checked.

    Raises:
        ConditionError: at least one condition holds; names each of them with its value.
    """
    conditions = [found for found in results["conditions"] if found["condition"] in fail_if]
    met = [f"{found['condition']}: {reason}" for found in conditions for reason in found["reasons"]]
    if met:
        raise ConditionError(f"--fail_if: {'; '.join(met)}.")
    count = len(conditions)
    return f"Passed {count} of {count} --fail_if checks: no condition holds." if count else ""


def check_evaluated(results: dict[str, Any]) -> None:
    """Refuse results of an evaluation that left out LoRAs (--keep_going). Attacks keep them in results.json.

    Raises:
        UnlearnError
    """
    if failed := results["failed"]:
        raise UnlearnError(f"Not evaluated: {', '.join(entry['lora'] for entry in failed)}.")


def check_attacked(results: dict[str, Any]) -> None:
    """Refuse results with an attack that failed.

    Raises:
        UnlearnError
    """
    if failed := results.get("failed_attacks"):
        names = ", ".join(f"{entry['attack']} on {entry['subject']}" for entry in failed)
        raise UnlearnError(f"{counted(len(failed), 'attack')} failed: {names}. {failed[0]['message']}")


def pass_or_fail(config: EvaluateConfig, results: dict[str, Any]) -> list[str]:
    """With --keep_going a line for each LoRA and image folder: whether it passes --fail_if, if given, and why not."""
    if not config.keep_going:
        return []
    conditions, found, lines = [parse_condition(text) for text in config.fail_if], parse_results(results), []
    for subject in main_subjects(found.compared):
        because = met_conditions(conditions, found, only=subject.id)
        passed = f"{'pass' if conditions else 'evaluated'} {subject.name}"
        lines.append(f"fail {subject.name}: {'; '.join(because)}" if because else passed)
    return lines + [f"fail {failed.lora}: {failed.message}" for failed in found.failed]


def _run_all_metrics(
    job: EvaluationJob, cache: ImageCache | None, names: Mapping[str, Sequence[str]]
) -> tuple[list[ConceptResults], list[dict[str, Any]]]:
    """The results of each concept that has images, and the metrics' cards."""
    device = default_device()
    evaluated, cards = [], []
    for slug, concept in job.concepts.items():
        metrics, pair_metrics = make_metrics(names[slug], job.metric_context(concept, device))
        images = _images_of(job, cache, slug)
        if images:
            main = [subject.id for subject in main_subjects(job.subjects) if slug in subject.concepts]
            evaluated.append(run_metrics(concept, metrics, pair_metrics, images, main))
            if message := missing_evidence(job.metric_context(concept), names[slug]):
                evaluated[-1].problems.append(Problem(slug, BASE, "evidence", message))
            cards += metric_cards([*metrics, *pair_metrics])
    return evaluated, merge_cards(cards)


def _images_of(job: EvaluationJob, cache: ImageCache | None, slug: str) -> list[SubjectImages]:
    """The images of one concept: the base's, then each subject's."""
    specs = job.plans[slug]
    subjects = [subject for subject in job.subjects if slug in subject.concepts]
    images = []
    if cache is not None and subjects:
        images.append(_generated(cache, BASE, ModelVariant(), specs))
    for subject in subjects:
        if subject.variant is not None and cache is not None:
            images.append(_generated(cache, subject.id, subject.variant, specs))
        elif subject.folders:
            folder = subject.folders[slug]
            detections = job.config.cache_dir / f"images-{_digest(folder.folder)}"
            images.append(SubjectImages(subject.id, folder.specs, folder.paths, detections, folder.planned))
    return images


def _generated(cache: ImageCache, subject: str, variant: ModelVariant, specs: Sequence[ImageSpec]) -> SubjectImages:
    return SubjectImages(subject, specs, cache.paths(variant, specs), cache.folder(variant))


def _digest(folder: Path) -> str:
    return hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:12]


def assemble(
    job: EvaluationJob, cache: ImageCache | None, evaluated: Sequence[ConceptResults], cards: list[dict[str, Any]]
) -> dict[str, Any]:
    """The content of results.json; copies the images of the before/after pairs into the output folder."""
    config = job.config
    base = [{"id": BASE, "name": public_name(job.source.name), "what": "base"}] if cache else []
    custom_counts = config.num_images is not None or config.num_keep_images is not None or bool(config.groups)
    return {
        "schema_version": SCHEMA_VERSION,
        "created": timestamp(),
        "version": __version__,
        "tier": "" if custom_counts else job.tier,
        "base": _published_base(cache.base) if cache else {},
        "sampler": _sampler_entry(job, cache, evaluated) if cache else {},
        "seeds": {"evaluate": list(EVALUATE_SEEDS), "seeds": list(config.seed)},
        "prompt_set": config.prompt_set and public_name(config.prompt_set),
        "prompt_category": config.prompt_category,
        "prompt_set_used": job.prompt_set and dict(zip(("used", "of"), job.prompt_set, strict=True)),
        "concepts": [_concept_entry(concept) for concept in job.concepts.values()],
        "subjects": base + [subject.describe() for subject in job.subjects],
        "cards": cards,
        "rows": [as_json(row) for concept in evaluated for row in concept.rows],
        "differences": [as_json(difference) for concept in evaluated for difference in concept.differences],
        "pairs": [as_json(pair) for pair in _pick_all_pairs(job, evaluated)],
        "pair_counts": [as_json(count) for concept in evaluated for count in count_outcomes(concept)],
        "attacks": [],
        "problems": [
            as_json(problem)
            for problem in (*_base_problems(job, cache), *(p for concept in evaluated for p in concept.problems))
        ],
        "failed": [
            {"lora": public_name(lora), "message": public_text(message, lora)} for lora, message in job.failed.items()
        ],
        "skipped": [
            {"subject": subject, "path": _public_path(path), "why": reason}
            for concept in evaluated
            for path, (subject, reason) in concept.skipped.items()
        ],
    }


def _published_base(record: Mapping[str, Any]) -> dict[str, Any]:
    """The base's record without paths of this machine."""
    return {k: public_name(v) if isinstance(v, str) else v for k, v in record.items() if k != "path"}


def _base_problems(job: EvaluationJob, cache: ImageCache | None) -> list[Problem]:
    """A problem for each LoRA that was trained on another base; only a message if the user named the base."""
    problems, messages = [], []
    for subject in job.subjects:
        variant = subject.variant
        message = variant.lora.other_base(cache.base) if cache and variant and variant.lora else None
        if message and job.base_named:
            messages.append(message)
        elif message:
            advice = "Name the base with --pretrained_model_name_or_path."
            problems.append(Problem("", subject.id, "base", f"{message} {advice}"))
    for message in dict.fromkeys(messages):
        print(message, file=sys.stderr)
    return problems


def _public_path(path: Path) -> str:
    """A path as it was given; of an absolute one only the folder and the name of the file."""
    return "/".join(path.parts[-2:]) if path.is_absolute() else str(path)


def _pick_all_pairs(job: EvaluationJob, evaluated: Sequence[ConceptResults]) -> list[Pair]:
    """PAIRS_PER_GROUP of each subject and group; fewer for many subjects, at least 2."""
    num_subjects = sum(len(concept.images) for concept in evaluated)
    count = min(PAIRS_PER_GROUP, max(2, MAX_PAIRS // max(1, num_subjects * len(GROUPS))))
    return [pair for concept in evaluated for pair in pick_pairs(concept, job.output, count)]


def _sampler_entry(job: EvaluationJob, cache: ImageCache, evaluated: Sequence[ConceptResults]) -> dict[str, Any]:
    paths = {path for concept in evaluated for images in concept.images for path in images.paths}
    tiled = count_tiled(path for path in paths if path.is_relative_to(cache.base_folder))
    return {
        "name": sampler_of(cache.base),
        "steps": cache.sampler.steps,
        "guidance_scale": cache.sampler.guidance_scale,
        "resolution": cache.sampler.resolution,
        "zero_terminal_snr": job.zero_terminal_snr,
        "mixed_precision": job.precision,
        **({"tiled_images": tiled} if tiled else {}),
    }


def _concept_entry(concept: Concept) -> dict[str, Any]:
    return {
        "slug": concept.slug,
        "name": concept.name,
        "kind": concept.kind,
        "caption": concept.caption,
        "generic": concept.generic,
        "sha256": concept_sha256(concept),
        "prompts": {group: [p.text for p in group_prompts(concept, group)] for group in GROUPS},
    }
