"""Options in a job list: checked, turned into a command's config, and back into the options of a task."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from sd_unlearn.attacks.attack import check_options as check_attack
from sd_unlearn.batch.identity import content_of
from sd_unlearn.config.attack import AttackConfig
from sd_unlearn.config.base import ExportConfig, ReportConfig
from sd_unlearn.config.evaluate import Detectors, EvaluateConfig
from sd_unlearn.config.options import check_ranges
from sd_unlearn.config.paths import as_dict, recorded
from sd_unlearn.config.train import TrainConfig
from sd_unlearn.data.concept import Concept
from sd_unlearn.data.prompt_sets import is_published, load_prompt_set
from sd_unlearn.errors import UsageError
from sd_unlearn.evaluation.job import check_options as check_evaluation
from sd_unlearn.evaluation.references import check_label, reference_folders
from sd_unlearn.export.export import check_options as check_export
from sd_unlearn.io.reading import check_keys
from sd_unlearn.io.schema import convert
from sd_unlearn.metrics.option_users import unused_options
from sd_unlearn.metrics.registry import MetricContext, check_metrics, choose_metrics

LATER: dict[str, type] = {
    "evaluate": EvaluateConfig,
    "attack": AttackConfig,
    "export": ExportConfig,
    "report": ReportConfig,
}
# Options that a job list chooses itself, or that make no sense in it.
OWN = {
    *("concept", "anchor", "kind", "data_dir", "positives", "output_dir", "run", "lora", "images", "cache_dir"),
    *("overwrite", "resume_from_checkpoint", "force_resume", "beta_sweep", "config", "debug", "dry_run", "vram"),
    *("write_plan", "json", "keep_going", "push_to_hub", "private"),
}
NOT_IDENTIFYING = OWN | {"render_batch_size", "allow_pickle", "offload"}


def config_of(kind: type, options: Mapping[str, Any], where: str, own: Mapping[str, Any] | None = None) -> Any:
    """The config of a command from options of a job list, and those that the list chooses itself (`own`).

    Raises:
        UsageError: an unknown option, one that a job list chooses itself, or a value of the wrong type.
    """
    hints = get_type_hints(kind)
    for key in options:
        if key in OWN and key in hints:
            raise UsageError(f"{where}: {key} cannot be set here, because a job list chooses it. Leave it out.")
    check_keys(dict(options), set(hints) - OWN, where)
    values = {k: [v] if get_origin(hints[k]) is list and not isinstance(v, list) else v for k, v in options.items()}
    return convert(kind, values | dict(own or {}), where)


def later_config(stage: str, options: Mapping[str, Any]) -> Any:
    """The config of a stage after the training.

    Raises:
        UsageError: as config_of, or the stage would refuse a value whatever the LoRA.
    """
    config = config_of(LATER[stage], options, stage)
    check_ranges(config)
    try:
        if isinstance(config, EvaluateConfig):
            check_evaluation(config)
            if config.prompt_set and not is_published(config.prompt_set):
                load_prompt_set(config.prompt_set, config.prompt_category)
        if isinstance(config, AttackConfig):
            check_attack(config)
        if isinstance(config, ExportConfig):
            check_export(config)
            if config.merge is not None and config.merge.name in ("", ".."):
                raise UsageError(f"--merge {config.merge} names no file or folder in the run folder.")
    except UsageError as error:
        raise UsageError(f"{stage}: {error}") from None
    return config


def check_export_of(config: ExportConfig, training: TrainConfig) -> bool:
    """Refuse options of export that do not fit the training of a job. Returns whether LoRA files are written.

    Raises:
        UsageError
    """
    obstacle = "--method full" if training.method == "full" else ""
    if training.use_dora and training.train_text_encoder:
        obstacle = "--use_dora with --train_text_encoder"
    if obstacle and config.merge is None:
        raise UsageError(f"export: {obstacle} cannot be exported as LoRA files. Add merge to export.")
    name = config.pretrained_model_name_or_path
    if name is not None and config.merge is None and not training.use_dora:
        raise UsageError(
            f"export: --pretrained_model_name_or_path {name} is for merge and DoRA, which need the base. Leave it out."
        )
    return not obstacle


def check_metrics_of(config: Detectors, concept: Concept) -> None:
    """Refuse options of the metrics of a concept. The photos for identity may have to be rendered first.

    config: as `of_concepts` returns it, so that the choice of metrics is valid.

    Raises:
        UsageError
    """
    metrics = [name for name in config.metrics if name != "identity"]
    without = dataclasses.replace(config, metrics=metrics, others=None, reference=[])
    check_metrics(MetricContext(concept, without, None, _tier(config)))


def metrics_of(config: Detectors, concepts: Iterable[Concept]) -> list[str]:
    """The metrics of concepts (also of each part of several) in evaluate and attack.

    Raises:
        UsageError: as `choose_metrics`.
    """
    rendered = Path()  # of a person: what the training renders
    names = (choose_metrics(MetricContext(p, config, rendered, _tier(config))) for c in concepts for p in c.parts)
    return list(dict.fromkeys(chain(*names)))


def _tier(config: Detectors) -> str:
    """The tier of an evaluation; an attack has none."""
    return getattr(config, "tier", None) or "quick"


def with_names(config: Any, concepts: Mapping[str, Concept]) -> Any:
    """The config of a stage with the concept of each folder of `reference`: SLUG=FOLDER.

    Args:
        concepts: All concepts of the list, by slug.

    Raises:
        UsageError: it is unclear whose photos a folder holds, or `label` is given for several concepts.
    """
    if not isinstance(config, Detectors):
        return config
    check_label(config.label, concepts)
    folders = reference_folders(config.reference, concepts)
    return dataclasses.replace(config, reference=[f"{slug}={folder}" for slug, folder in folders.items()])


def of_concepts(config: Any, concepts: Collection[Concept]) -> Any:
    """The config of a stage (`with_names`) for some of the concepts: with the photos of these only.

    Options of metrics that they do not have are left out: a list can be of people and of styles.
    """
    if not isinstance(config, Detectors):
        return config
    slugs = {concept.slug for concept in concepts}
    config = dataclasses.replace(config, reference=[r for r in config.reference if r.partition("=")[0] in slugs])
    unused = unused_options(config, metrics_of(config, concepts))
    return dataclasses.replace(config, **{name: getattr(Detectors(), name) for name in unused})


def uses_rendered_photos(config: Detectors, concept: Concept) -> bool:
    """Whether a stage compares faces with the rendered images of a person, as no photos are given."""
    own = of_concepts(config, [concept])
    return "identity" in metrics_of(own, [concept]) and not own.reference


def identifying(config: Any) -> dict[str, Any]:
    """The options of a stage after the training that change what it makes, with the content of files and folders."""
    return {key: content_of(key, value) for key, value in as_dict(config).items() if key not in NOT_IDENTIFYING}


def task_options(config: Any, places: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a task's options.yaml: those that differ from the defaults, and where it reads and writes."""
    defaults = recorded(type(config)())
    changed = {key: value for key, value in recorded(config).items() if value != defaults[key]}
    return changed | {key: str(path) for key, path in places.items()}
