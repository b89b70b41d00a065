"""Resolve the options of `evaluate` into a job: LoRAs and image folders, concepts, the image plan and the base.

Everything that can be checked without loading a model is checked here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from sd_unlearn.choices import Precision
from sd_unlearn.config.checks import check_evaluate
from sd_unlearn.config.evaluate import EvaluateConfig
from sd_unlearn.data.concept import Concept, Prompt
from sd_unlearn.data.dataset import set_names
from sd_unlearn.data.prompt_sets import load_prompt_set
from sd_unlearn.data.render_job import check_base_of
from sd_unlearn.data.several import load_concepts, without_others
from sd_unlearn.errors import UnlearnError, UsageError
from sd_unlearn.evaluation.fail_if import parse_condition
from sd_unlearn.evaluation.loras import Lora, open_lora, open_run
from sd_unlearn.evaluation.prompts import BASE_TIERS, TIERS, ImageSpec, count_used, override_counts, plan_images
from sd_unlearn.evaluation.references import check_label, reference_folders
from sd_unlearn.evaluation.subjects import Subject, check_guidance, resolve_subjects
from sd_unlearn.io.files import check_writable
from sd_unlearn.io.own_files import check_evaluation_folder
from sd_unlearn.io.paths import public_name
from sd_unlearn.io.reading import read_yaml
from sd_unlearn.io.run_folder import CONFIG, DIFFUSERS_FILE, TRAINING
from sd_unlearn.metrics.option_users import check_used
from sd_unlearn.metrics.registry import MetricContext, check_metrics
from sd_unlearn.models.device import choose_precision
from sd_unlearn.models.find_base import find_base
from sd_unlearn.models.recorded_base import OPTIONS, different_hash, recorded_source
from sd_unlearn.models.source import Source

OUTPUT = Path("runs/evaluation")


@dataclass(frozen=True)
class EvaluationJob:
    """A checked evaluation."""

    config: EvaluateConfig
    concepts: dict[str, Concept]  # by slug
    subjects: list[Subject]
    plans: dict[str, list[ImageSpec]]  # the images to generate, by concept
    source: Source  # of the base
    base_named: bool  # the command names the base, which may differ from the one the LoRAs were trained on
    tier: str
    output: Path
    loras: list[Lora]
    failed: dict[str, str]  # with --keep_going: LoRA -> why it cannot be evaluated
    references: dict[str, Path]  # of --reference, by concept
    prompt_set: tuple[int, int] | None  # how many prompts of --prompt_set are used, and how many it has

    @property
    def needs_base(self) -> bool:
        """Whether base images are needed: for LoRAs, and for folders with the images of the plan."""
        return any(s.variant or any(folder.planned for folder in s.folders.values()) for s in self.subjects)

    @property
    def zero_terminal_snr(self) -> bool:
        return any(lora.zero_terminal_snr for lora in self.loras)

    @cached_property
    def precision(self) -> Precision:
        """The precision in which images are generated: that of --mixed_precision, but full precision on a CPU."""
        return choose_precision(self.config.mixed_precision)

    def give_up(self, lora: Lora, error: UnlearnError) -> None:
        """With --keep_going leave out a LoRA that cannot be applied; else raise the error."""
        others = [subject for subject in self.subjects if subject.variant is None or subject.variant.lora is not lora]
        if not self.config.keep_going or not others:
            raise error
        self.failed[str(lora.path)] = str(error)
        self.subjects[:] = others

    def metric_context(self, concept: Concept, device: Any = "cpu") -> MetricContext:
        reference = _reference_folder(self.references, concept, self.loras)
        return MetricContext(concept, self.config, reference, self.tier, device)


def resolve_job(config: EvaluateConfig, concepts: Sequence[Concept] = (), needs_subjects: bool = True) -> EvaluationJob:
    """Resolve and check the options; loads no model.

    Args:
        concepts: Instead of those that --concept names.
        needs_subjects: Refuse a job without a LoRA and image folders. If False, a concept is enough.

    Raises:
        UsageError: invalid options, or a file or folder that does not exist or does not fit.
        UnlearnError: a LoRA or prompt set cannot be downloaded.
    """
    check_options(config)
    loras, failed = _open_loras(config)
    if not loras and not config.images and not config.sld and (needs_subjects or not config.concept):
        raise UsageError(
            "Nothing to evaluate. Give a run folder (--run runs/seven), LoRAs (--lora A B), folders of images "
            "(--images) or --sld."
        )
    by_slug = _resolve_concepts(config, loras, concepts)
    references = reference_folders(config.reference, by_slug)
    check_label(config.label, by_slug)
    source, base_named = _resolve_base(config, loras, by_slug)
    for concept in by_slug.values():
        check_base_of(concept, source, makes_files=False)
    check_guidance(config, source)
    tier_name = config.tier or BASE_TIERS.get(source.name, "quick")
    tier = override_counts(TIERS[tier_name], config.num_images, config.num_keep_images, config.groups)
    texts = load_prompt_set(config.prompt_set, config.prompt_category) if config.prompt_set else []
    extra_prompts = [Prompt(text) for text in texts]
    every_direct = bool(extra_prompts) and config.num_images is None
    plans = {
        slug: plan_images(concept, tier, config.seed, extra_prompts, every_direct) for slug, concept in by_slug.items()
    }
    for slug, specs in plans.items():
        if not specs:
            raise UsageError(f"{slug}: the concept file has no prompts in the groups to evaluate. Change --groups.")
    subjects = resolve_subjects(config, loras, by_slug, plans, tier)
    alone = config.run if not (config.lora or config.images or config.sld) else None
    output = config.output_dir or alone or OUTPUT
    check_writable(output, "--output_dir")
    check_evaluation_folder(output, "--output_dir")
    check_writable(config.cache_dir, "--cache_dir")
    job = EvaluationJob(
        config,
        by_slug,
        subjects,
        plans,
        source,
        base_named,
        tier_name,
        output,
        loras,
        failed,
        references,
        count_used(plans, extra_prompts) if extra_prompts else None,
    )
    check_used(config, list(dict.fromkeys(chain(*(check_metrics(job.metric_context(c)) for c in by_slug.values())))))
    return job


def check_options(config: EvaluateConfig) -> None:
    """Check the options that depend on neither LoRAs nor concepts.

    Raises:
        UsageError: invalid options, or a folder that does not exist.
    """
    check_evaluate(config)
    if config.others is not None and not config.others.is_dir():
        raise UsageError(f"--others {config.others} is not a folder. Give a folder of photos of other people.")
    for condition in config.fail_if:
        parse_condition(condition)
    override_counts(TIERS["quick"], config.num_images, config.num_keep_images, config.groups)


def _open_loras(config: EvaluateConfig) -> tuple[list[Lora], dict[str, str]]:
    """The LoRAs, and with --keep_going why the others cannot be opened."""
    loras = [open_run(config.run)] if config.run is not None else []
    failed: dict[str, str] = {}
    for given in chain.from_iterable(map(_lora_files, config.lora)):
        try:
            lora = open_lora(given)
            _check_goes_with(lora, loras, config)
            loras.append(lora)
        except UnlearnError as error:
            if not config.keep_going:
                raise
            failed[given] = str(error)
    if failed and not loras and not config.images and not config.sld:
        raise UnlearnError(f"No LoRA can be evaluated. {' '.join(failed.values())}")
    return loras, failed


def _check_goes_with(lora: Lora, others: Sequence[Lora], config: EvaluateConfig) -> None:
    """Refuse a LoRA that names no concept, or cannot be evaluated in one command with the LoRAs before it.

    Raises:
        UsageError
    """
    if not config.concept and not config.images:
        if lora.concept is None:
            raise UsageError(f"--lora {lora.path} does not name the concept it unlearns. Give it as --concept.")
        of_others = {concept.slug: concept for other in others for concept in other.concepts}
        for concept in lora.concepts:
            same = of_others.get(concept.slug, concept)
            if _evaluation_fields(same) != _evaluation_fields(concept):
                raise UsageError(
                    f"{lora.path} was trained with another concept file for {concept.slug} than the LoRAs before it, "
                    "or together with other concepts. Evaluate all with one file: --concept."
                )
    known = {other.zero_terminal_snr for other in (*others, lora)} - {None}
    if len(known) > 1:
        raise UsageError(
            "Some of the LoRAs were trained with --zero_terminal_snr and some without. Evaluate them separately."
        )
    if config.pretrained_model_name_or_path is not None:
        return
    separately = "Evaluate them separately, or choose one base with --pretrained_model_name_or_path."
    first = next((other for other in others if other.base_name), None)
    if lora.base_name and first and first.base_name and first.base_name != lora.base_name:
        bases = f"{public_name(first.base_name)}, {public_name(lora.base_name)}"
        raise UsageError(f"The LoRAs were trained on different bases ({bases}). {separately}")
    run = next((other for other in others if other.is_run), None)
    if lora.is_run and run and different_hash(lora.base_hashes, run.base_hashes):
        raise UsageError(f"{lora.name} was trained on other weights of the base than {run.name}. {separately}")


def _lora_files(given: str) -> list[str]:
    """The files of a folder with several .safetensors files; a run, an exported folder or anything else is itself."""
    folder = Path(given)
    if not folder.is_dir() or (folder / TRAINING).is_file() or (folder / DIFFUSERS_FILE).is_file():
        return [given]
    suffix = ".safetensors"
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() == suffix and not f.name.startswith("."))
    return [str(file) for file in files] if len(files) > 1 else [given]


def _resolve_concepts(config: EvaluateConfig, loras: Sequence[Lora], given: Sequence[Concept]) -> dict[str, Concept]:
    if config.concept:
        named = given or [load_concepts(name) for name in config.concept]
        of_slugs: dict[str, Concept] = {}
        for concept in (concept for each in named for concept in each.parts):
            if of_slugs.setdefault(concept.slug, concept) != concept:
                raise UsageError(
                    f"--concept: {of_slugs[concept.slug].name} and {concept.name} are both called {concept.slug} in "
                    "results. Evaluate them separately, or rename one."
                )
        return {slug: _without_what_goes_with(concept, loras) for slug, concept in of_slugs.items()}
    if config.images:
        raise UsageError("--images needs --concept: a folder of images does not name the unlearned concept.")
    if not loras:
        raise UsageError(f"--sld {' '.join(config.sld)} needs --concept: the concept to guide away from.")
    concepts: dict[str, Concept] = {}
    for concept in (concept for lora in loras for concept in lora.concepts):
        concepts.setdefault(concept.slug, concept)
    return concepts


def _without_what_goes_with(concept: Concept, loras: Sequence[Lora]) -> Concept:
    """The concept without the retained prompts that name what one of the LoRAs erases together with it."""
    having = [lora.concepts for lora in loras if concept.slug in {own.slug for own in lora.concepts}]
    others = {own.slug: own for concepts in having for own in concepts if own.slug != concept.slug}
    return without_others(concept, list(others.values())) if others else concept


def _evaluation_fields(concept: Concept) -> tuple[Any, ...]:
    """The fields of a concept that its evaluation depends on."""
    names = (concept.name, concept.caption, concept.generic, concept.kind, concept.label)
    return (*names, concept.alternatives, concept.evaluate)


def _resolve_base(config: EvaluateConfig, loras: Sequence[Lora], concepts: dict[str, Concept]) -> tuple[Source, bool]:
    """The base, and whether the command names it (rather than the LoRAs)."""
    if config.pretrained_model_name_or_path is not None:
        return find_base(config), True
    if records := [lora.training["base"] for lora in loras if lora.is_run]:
        _check_base_options(config)
        return replace(recorded_source(records[0], config.allow_pickle), offload=config.offload), False
    name = next((lora.base_name for lora in loras if lora.base_name), None)
    return find_base(config, name or next(iter(concepts.values())).base), False


def _check_base_options(config: EvaluateConfig) -> None:
    """Refuse options of another base: that of a run is loaded as the run records it.

    Raises:
        UsageError
    """
    for name in OPTIONS:
        value = getattr(config, name)
        if value != getattr(EvaluateConfig, name):
            given = f"--{name}" if value is True else f"--{name} {value}"
            raise UsageError(
                f"{given} needs --pretrained_model_name_or_path: without it, the base is loaded as the run records it. "
                "Name the base, or leave the option out."
            )


def _reference_folder(given: Mapping[str, Path], concept: Concept, loras: Sequence[Lora]) -> Path | None:
    """The folder of images of the person: --reference, else what a run was trained on: --positives, or 1_positive."""
    if concept.slug in given:
        return given[concept.slug]
    for lora in loras:
        slugs = [own.slug for own in lora.concepts]
        if lora.is_run and lora.concept and concept.slug in slugs and (lora.path / CONFIG).is_file():
            settings = read_yaml(lora.path / CONFIG, "--run")
            if (photos := settings.get("positives")) and Path(photos).is_dir():
                return Path(photos)
            name = set_names(lora.concept)[slugs.index(concept.slug)]
            data_dir = settings.get("data_dir")
            if data_dir and (Path(data_dir) / name).is_dir():
                return Path(data_dir) / name
    return None
