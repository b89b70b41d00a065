"""`sd-unlearn attack`: try to bring a removed concept back, and record how often that succeeds.

The options are checked here, without torch; `runner` does the work.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from sd_unlearn.attacks.files import attacker_files
from sd_unlearn.config.attack import ATTACKS, DEFAULT_ATTACKS, AttackConfig
from sd_unlearn.config.evaluate import EvaluateConfig
from sd_unlearn.data.concept import Concept
from sd_unlearn.errors import UsageError, suggest
from sd_unlearn.evaluation.fail_if import parse_condition
from sd_unlearn.evaluation.job import check_options as check_evaluation
from sd_unlearn.evaluation.job import resolve_job
from sd_unlearn.metrics.option_users import check_used_by_command
from sd_unlearn.metrics.registry import DETECTORS, find_detectors
from sd_unlearn.models.find_base import find_base
from sd_unlearn.models.source import OPTION


def run(config: AttackConfig, concepts: Sequence[Concept] = ()) -> dict[str, Any]:
    """Attack, classify the images, and add the results to results.json. What was done before is not repeated.

    Processes of a distributed launch share the attacks; the first one writes the results. concepts: instead of those
    that --concept names.

    Returns:
        The content of results.json; {} in all processes but the first.

    Raises:
        UsageError: invalid options, or nothing to attack.
        UnlearnError: a model or detector cannot be loaded, or a LoRA does not fit the base.
    """
    check_options(config)
    base_alone = bool(config.concept) and (config.ceiling or config.floor is not None)
    if config.run is None and not config.lora and not base_alone:
        raise UsageError(
            "Nothing to attack. Give a run folder (--run runs/seven), LoRAs (--lora A B), or --concept to attack the "
            "base alone."
        )
    job = resolve_job(_as_evaluation(config), concepts, needs_subjects=not (config.ceiling or config.floor))
    metrics = {slug: find_detectors(job.metric_context(concept)) for slug, concept in job.concepts.items()}
    for slug, concept in job.concepts.items():
        if metrics[slug] == ["nudity"] and concept.kind not in ("nudity", "other"):
            raise UsageError(f"--metrics nudity cannot tell whether an image shows {concept.name}. Add another metric.")
    from sd_unlearn.attacks.runner import attack_all

    conditions = [parse_condition(text) for text in config.fail_if]
    return attack_all(config, job, attack_names(config), metrics, conditions)


def check_options(config: AttackConfig) -> None:
    """Check the options that depend on neither LoRAs nor concepts.

    Raises:
        UsageError: invalid options, or a folder or model that does not exist.
    """
    attack_names(config)
    check_used_by_command(config, DETECTORS, "attack")
    check_evaluation(_as_evaluation(config))
    if config.attacker_images is not None:
        attacker_files(config.attacker_images)
    if config.floor:
        _check_floor(config, config.floor)
    if config.metrics and not set(config.metrics) & set(DETECTORS):
        raise UsageError(
            f"--metrics {' '.join(config.metrics)} cannot tell whether an image shows the concept. An attack needs one "
            f"of {', '.join(DETECTORS)}."
        )


def _check_floor(config: AttackConfig, floor: str) -> None:
    try:
        find_base(dataclasses.replace(config, pretrained_model_name_or_path=floor))
    except UsageError as error:
        raise UsageError(str(error).replace(OPTION, "--floor")) from None


def attack_names(config: AttackConfig) -> tuple[str, ...]:
    """The attacks to carry out.

    Raises:
        UsageError: an unknown attack.
    """
    for name in config.attacks:
        if name not in ATTACKS:
            raise UsageError(f"--attacks {name} is not one of {', '.join(ATTACKS)}.{suggest(name, ATTACKS)}")
    return tuple(dict.fromkeys(config.attacks)) or DEFAULT_ATTACKS[config.budget]


def _as_evaluation(config: AttackConfig) -> EvaluateConfig:
    """The options that attack and evaluate share; a single image of the direct prompts, which is not generated."""
    shared = {f.name: getattr(config, f.name) for f in dataclasses.fields(EvaluateConfig) if hasattr(config, f.name)}
    return EvaluateConfig(**shared | {"seed": [config.seed], "groups": ["direct"], "num_images": 1, "strengths": [1.0]})
