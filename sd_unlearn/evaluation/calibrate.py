"""`sd-unlearn calibrate`: the smallest LoRA strength that erases enough, and the largest that retains enough.

Strengths are compared on the same prompts and seeds. Images and detector outputs are cached by strength, together with
those of `evaluate`, so an interrupted calibration resumes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sd_unlearn import __version__
from sd_unlearn.calibration import Calibration, Point
from sd_unlearn.config.calibrate import CalibrateConfig
from sd_unlearn.config.evaluate import EvaluateConfig
from sd_unlearn.config.options import check_ranges
from sd_unlearn.data.concept import Concept
from sd_unlearn.errors import UsageError
from sd_unlearn.evaluation.bisection import exceptions, first_holding, strengths_up_to
from sd_unlearn.evaluation.generate import BaseLoader, ImageCache, planned_cache
from sd_unlearn.evaluation.job import EvaluationJob, resolve_job
from sd_unlearn.evaluation.loras import Lora, ModelVariant
from sd_unlearn.evaluation.problems import NEVER_THERE, base_problems, known_gaps
from sd_unlearn.evaluation.score import ConceptResults, SubjectImages, run_metrics
from sd_unlearn.io.files import full_disk_explained, timestamp, write_json
from sd_unlearn.io.lock import locked
from sd_unlearn.io.own_files import mark_evaluation
from sd_unlearn.io.progress import say
from sd_unlearn.io.run_folder import CALIBRATION
from sd_unlearn.launch import check_one_process
from sd_unlearn.metrics.base import CONCEPT_GROUPS, KEEP_GROUPS, Metric
from sd_unlearn.metrics.option_users import check_used_by_command
from sd_unlearn.metrics.registry import DETECTORS, choose_metrics, find_detectors, make_metrics
from sd_unlearn.metrics.statistics import Z, wilson
from sd_unlearn.models.device import default_device
from sd_unlearn.models.kinds import sampler_of
from sd_unlearn.report.formatting import GONE
from sd_unlearn.report.metric_names import presence_order
from sd_unlearn.results import BASE, Row, as_json

OUTPUT = Path("runs/calibration")
SUBJECT = "lora"
_BY_LIMITS = ("retention", "few", "never", "rarely")  # problems that depend on --leakage and --retention here


def run(config: CalibrateConfig, concepts: Sequence[Concept] = ()) -> Calibration:
    """Search the strengths and write calibration.json. concepts: instead of the one that --concept names.

    Raises:
        UsageError: invalid options, no single LoRA, too few images to show so little leakage, or `evaluate` would give
            no verdict: the metrics cannot show that the concept is gone, or the LoRA was trained on another base.
        UnlearnError: a model or detector cannot be loaded.
    """
    job = _resolve(config, concepts)
    lora, (slug, concept) = job.loras[0], next(iter(job.concepts.items()))
    context = job.metric_context(concept)
    names = [name for name in choose_metrics(context) if name in DETECTORS]  # the others say nothing of strengths
    check_used_by_command(job.config, names, "calibrate")
    if gaps := known_gaps(context, job.plans[slug], names):
        raise UsageError(f"No strength can be recommended, because evaluate would give no verdict. {' '.join(gaps)}")
    names = find_detectors(context)
    with full_disk_explained(), locked(job.output, "--output_dir"):
        measure = Measurement(config, job, lora, slug, names)
        calibration = dataclasses.replace(
            search(config, measure, slug, lora.sha256), base_sha256=measure.cache.base.get("sha256") or ""
        )
        mark_evaluation(job.output)
        write_json(job.output / CALIBRATION, measure.record() | as_json(calibration))
    return calibration


def search(config: CalibrateConfig, measure: Measurement, slug: str, sha256: str) -> Calibration:
    """Find both ends by bisection. `measure` is called once for each tried strength.

    If the base itself hardly shows the concept, no strength erases it.
    """
    values = strengths_up_to(config.max_strength, config.step)
    known = [1.0] if 1.0 in values else []  # its images exist after an evaluation
    points: dict[float, Point] = {}

    def point(strength: float) -> Point:
        if strength not in points:
            points[strength] = measure(strength)
        return points[strength]

    smallest = first_holding(values, lambda strength: point(strength).erases, known)
    downwards = values[::-1]
    largest = first_holding(downwards, lambda strength: point(strength).retains, list(points))
    both = [strength for strength, found in points.items() if found.erases and found.retains]
    against = exceptions(values, smallest, {strength: found.erases for strength, found in points.items()})
    against += exceptions(downwards, largest, {strength: found.retains for strength, found in points.items()})
    low = (found for found in points.values() if found.leakage_high is not None and found.leakage_high < config.leakage)
    doubt = next((found.problems[0] for found in low if found.problems), "") if smallest is None else ""
    if smallest == 0:
        smallest, both, doubt = None, [], NEVER_THERE
    strength = min(both, default=None)
    return Calibration(
        schema_version=1,
        concept=slug,
        sha256=sha256,
        leakage=config.leakage,
        retention=config.retention,
        smallest=smallest,
        largest=largest,
        strength=strength,
        message=_outcome(config, smallest, largest, strength, sorted(set(against)), doubt),
        points=tuple(points[strength] for strength in sorted(points)),
        exceptions=tuple(sorted(set(against))),
    )


def _outcome(
    config: CalibrateConfig,
    smallest: float | None,
    largest: float | None,
    strength: float | None,
    against: Sequence[float],
    doubt: str = "",
) -> str:
    """The outcome in words. doubt: why no strength with little leakage counts."""
    erases, retains = f"leakage below {100 * config.leakage:g} %", f"retention above {100 * config.retention:g} %"
    if doubt:
        text = f"There is no verdict at any tried strength that has {erases}: {doubt}"
    elif smallest is None:
        text = f"No tried strength up to {config.max_strength:g} has {erases} (upper end of the 95 % interval)"
        text += "." if largest is None else f"; {retains} holds up to {largest:g}."
        text += " Train longer or with a higher --push, or accept more leakage."
    elif largest is None:
        text = f"No tried strength has {retains}; {erases} holds from {smallest:g} on."
    elif strength is None:
        text = f"No strength does both: {erases} holds from {smallest:g} on, {retains} only up to {largest:g}."
    else:
        text = f"Strength {strength:g}: {erases} from {smallest:g} on, {retains} up to {largest:g}."
    if against:
        several = ", ".join(f"{value:g}" for value in against)
        text += f" Leakage or retention is not monotone (see {several}), so other strengths may do as well or better."
    return text


class Measurement:
    """Generates the images of a strength and measures them."""

    def __init__(self, config: CalibrateConfig, job: EvaluationJob, lora: Lora, slug: str, names: list[str]) -> None:
        self.config, self.job, self.lora, self.slug = config, job, lora, slug
        self.loader = BaseLoader(job)
        self.cache: ImageCache = planned_cache(job, self.loader)
        self.concept, self.specs = job.concepts[slug], job.plans[slug]
        _check_base(job, lora, self.cache)
        context = job.metric_context(self.concept, default_device())
        self.metrics: list[Metric] = make_metrics(names, context)[0]
        self.cache.generate(self.loader.load, ModelVariant(), self.specs, "generate base")

    def __call__(self, strength: float) -> Point:
        """The point of a strength; strength 0 is the base itself."""
        variant = ModelVariant(self.lora, strength)
        self.cache.generate(self.loader.load, variant, self.specs, f"generate strength {strength:g}")
        images = [self._images(BASE, ModelVariant()), self._images(SUBJECT, variant)]
        point = point_of(strength, run_metrics(self.concept, self.metrics, [], images, []), self.config)
        leakage, retention = (
            "unknown" if value is None else f"{100 * value:.3g} %" for value in (point.leakage, point.retention)
        )
        say(f"Strength {strength:g}: leakage {leakage}, retention {retention}.")
        return point

    def _images(self, subject: str, variant: ModelVariant) -> SubjectImages:
        return SubjectImages(subject, self.specs, self.cache.paths(variant, self.specs), self.cache.folder(variant))

    def record(self) -> dict[str, Any]:
        """How it was measured."""
        sampler = self.cache.sampler
        return {
            "created": timestamp(),
            "version": __version__,
            "detectors": [metric.name for metric in self.metrics],
            "groups": list(dict.fromkeys(spec.group for spec in self.specs)),
            "seeds": list(self.config.seed),
            "images_per_strength": len(self.specs),
            "sampler": {
                "name": sampler_of(self.cache.base),
                "steps": sampler.steps,
                "guidance_scale": sampler.guidance_scale,
            },
        }


def point_of(strength: float, results: ConceptResults, config: CalibrateConfig) -> Point:
    """What counts at a strength, of all groups and detectors: the highest upper end of leakage, the lowest retention.

    What prevents a verdict of `evaluate` prevents `erases`, e.g. images that cannot be used or unknown retention: a
    model that generates nothing has not erased a concept. So does a base whose leakage is not above `config.leakage`,
    either. Which retention is too low, `config` says.
    """
    rows = [row for row in results.rows if row.subject == SUBJECT]
    detecting = presence_order(results.concept.kind, {row.metric for row in rows})
    presence = [row for row in rows if row.metric in detecting and row.group in CONCEPT_GROUPS]
    kept = [row for row in rows if row.metric == "retention" and row.group in (*KEEP_GROUPS, "kept")]
    kept = [row for row in kept if row.group == "kept"] or kept
    leakage = max(presence, key=lambda row: math.inf if row.high is None else row.high, default=None)
    retention = min(kept, key=lambda row: -math.inf if row.value is None else row.value, default=None)
    faults = [p for p in results.problems if p.concerns(results.concept.slug, SUBJECT) and p.kind not in _BY_LIMITS]
    faults += base_problems(results.concept, results.rows, max(GONE, config.leakage))
    high, value = leakage.high if leakage else None, retention.value if retention else None
    return Point(
        strength,
        *_numbers(leakage),
        *_numbers(retention),
        erases=high is not None and high < config.leakage and not faults,
        retains=config.retention == 0 or (value is not None and value > config.retention),
        problems=tuple(problem.message for problem in faults),
    )


def _numbers(row: Row | None) -> tuple[float | None, float | None, float | None, int]:
    return (row.value, row.low, row.high, row.n) if row else (None, None, None, 0)


def _resolve(config: CalibrateConfig, concepts: Sequence[Concept]) -> EvaluationJob:
    """The evaluation that the calibration repeats at several strengths, checked; loads no model."""
    check_ranges(config)
    check_one_process("calibrate")
    if (config.run is None) == (config.lora is None):
        raise UsageError("Give one of --run (a run folder) and --lora (any LoRA).")
    shared = {f.name for f in dataclasses.fields(EvaluateConfig)} & {f.name for f in dataclasses.fields(config)}
    options = {name: getattr(config, name) for name in shared}
    options["lora"] = [] if config.lora is None else [config.lora]
    options["concept"] = [] if config.concept is None else [config.concept]
    options["output_dir"] = config.output_dir or config.run or OUTPUT
    job = resolve_job(EvaluateConfig(**options, strengths=[1.0]), concepts)
    if len(job.loras) != 1:
        raise UsageError(f"--lora {config.lora} holds {len(job.loras)} LoRAs. Calibrate one at a time.")
    if len(job.concepts) > 1:
        raise UsageError(
            f"The LoRA removes {len(job.concepts)} concepts, and calibrate measures one. Choose it with --concept, for "
            f'example "{next(iter(job.concepts.values())).name}".'
        )
    _check_images(config, job)
    return job


def _check_images(config: CalibrateConfig, job: EvaluationJob) -> None:
    """Refuse too few images: even without a single leak, the interval would not lie below --leakage.

    Raises:
        UsageError
    """
    specs = next(iter(job.plans.values()))
    groups = [spec.group for spec in specs]
    counts = {group: groups.count(group) for group in CONCEPT_GROUPS if group in groups}
    if not counts:
        raise UsageError(f"--groups {' '.join(config.groups)} has no prompts that ask for the concept. Add direct.")
    group, count = min(counts.items(), key=lambda item: item[1])
    if wilson(0, count)[1] >= config.leakage:
        needed = int(Z * Z * (1 - config.leakage) / config.leakage) + 1
        raise UsageError(
            f"{count} {group} images cannot show a leakage below {config.leakage:g}: without a single leak the upper "
            f"end of the interval is {wilson(0, count)[1]:.2g}. Give --num_images {needed} or more, or a higher "
            "--leakage."
        )


def _check_base(job: EvaluationJob, lora: Lora, cache: ImageCache) -> None:
    """Refuse a LoRA that was trained on another base; if the command names the base, one line says so.

    Raises:
        UsageError
    """
    message = lora.other_base(cache.base)
    if message and not job.base_named:
        raise UsageError(f"{message} Name the base with --pretrained_model_name_or_path.")
    if message:
        say(message)
