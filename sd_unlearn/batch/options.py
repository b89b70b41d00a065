"""Options in a job list: checked, turned into a command's config, and back into the options of a task."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from sd_unlearn.attacks.attack import attack_names
from sd_unlearn.config.attack import AttackConfig
from sd_unlearn.config.base import ExportConfig, ReportConfig
from sd_unlearn.config.checks import check_evaluate
from sd_unlearn.config.evaluate import Detectors, EvaluateConfig
from sd_unlearn.config.options import check_ranges
from sd_unlearn.config.paths import as_dict, recorded
from sd_unlearn.data.concept import Concept
from sd_unlearn.errors import UsageError
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
        UsageError: as config_of, or a value is out of range.
    """
    config = config_of(LATER[stage], options, stage)
    check_ranges(config)
    if isinstance(config, EvaluateConfig):
        check_evaluate(config)
    if isinstance(config, AttackConfig):
        attack_names(config)
    return config


def check_metrics_of(config: EvaluateConfig, concept: Concept) -> None:
    """Refuse metrics that are not installed. Identity is left to evaluate: its photos are rendered first.

    Raises:
        UsageError
    """
    if "identity" not in config.metrics:
        without = dataclasses.replace(config, others=None, reference=[])
        check_metrics(MetricContext(concept, without, None, config.tier or "quick"))


def metrics_of(config: Detectors, concepts: Iterable[Concept]) -> list[str]:
    """The metrics of concepts (also of each part of several) in evaluate and attack.

    Raises:
        UsageError: as `choose_metrics`.
    """
    tier, rendered = getattr(config, "tier", None) or "quick", Path()  # of a person: what the training renders
    names = (choose_metrics(MetricContext(p, config, rendered, tier)) for c in concepts for p in c.parts)
    return list(dict.fromkeys(chain(*names)))


def suited_to(config: Any, concepts: Iterable[Concept]) -> Any:
    """The config without options of metrics that these concepts do not have: a list can be of people and of styles."""
    if not isinstance(config, Detectors):
        return config
    unused = unused_options(config, metrics_of(config, concepts))
    return dataclasses.replace(config, **{name: getattr(Detectors(), name) for name in unused})


def identifying(config: Any) -> dict[str, Any]:
    """The options of a stage after the training that change what it makes."""
    return {key: value for key, value in as_dict(config).items() if key not in NOT_IDENTIFYING}


def task_options(config: Any, places: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a task's options.yaml: those that differ from the defaults, and where it reads and writes."""
    changed = {k: v for k, v in recorded(config).items() if v != _default(type(config), k)}
    return changed | {key: str(path) for key, path in places.items()}


def _default(kind: type, name: str) -> Any:
    field = next(f for f in dataclasses.fields(kind) if f.name == name)
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return str(value) if isinstance(value, Path) else value
