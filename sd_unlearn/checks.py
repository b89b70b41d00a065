"""Options as plain values, read from YAML with strict keys, and refused by name when they cannot be meant."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import yaml

from sd_unlearn.config import RenderConfig
from sd_unlearn.errors import UsageError, suggest
from sd_unlearn.records import SEED_SPAN
from sd_unlearn.train_config import TrainConfig


def as_dict(config: Any) -> dict[str, Any]:
    """A config as plain YAML/JSON values."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(config).items()}


def read_yaml(path: Path, option: str) -> dict[str, Any]:
    """A YAML mapping.

    Raises:
        UsageError: when the file is missing, not YAML or not a mapping; names `option`.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{option} {path}: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{option} {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise UsageError(f"{option} {path} must hold keys and values, not {type(data).__name__}.")
    return data


def check_keys(data: dict[str, Any], known: set[str], where: str) -> None:
    """Refuse the first unknown key, with the nearest known one.

    Raises:
        UsageError
    """
    for key in data:
        if key not in known:
            raise UsageError(
                f'{where}: unknown key "{key}".{suggest(str(key), known)} Known: {", ".join(sorted(known))}.'
            )


def check_render(config: RenderConfig) -> None:
    """Refuse values that cannot be meant for drawing images.

    Raises:
        UsageError: naming the option, its value and the allowed range.
    """
    check_positive(config, ("resolution", "num_inference_steps", "render_batch_size"))
    if config.guidance_scale is not None and not 0 <= config.guidance_scale < math.inf:
        raise UsageError(f"--guidance_scale {config.guidance_scale:g} must be a number from 0 up, usually 3 to 10.")
    if not 0 <= config.seed < SEED_SPAN:
        raise UsageError(f"--seed {config.seed} must lie in [0, {SEED_SPAN}): each purpose has a range of that size.")
    if config.resolution is not None and config.resolution % 8:
        raise UsageError(f"--resolution {config.resolution} must be divisible by 8, the latent's factor.")
    for name in ("unlabeled", "positive", "mixed_in", "keep"):
        count = getattr(config, f"num_{name}")
        if count is not None and count < 0:
            raise UsageError(f"--num_{name} {count} must not be negative.")


def check_train(config: TrainConfig) -> None:
    """Refuse values that cannot be meant, before anything loads.

    Raises:
        UsageError: naming the option, its value and the allowed range.
    """
    check_render(config)
    if config.num_positive is not None and config.num_positive < 2:
        raise UsageError(f"--num_positive {config.num_positive} is too few: training needs at least 2 positives.")
    if isinstance(config.beta, int | float) and not 0 < config.beta < 1:
        raise UsageError(
            f"--beta {config.beta:g} is outside (0, 1): it is the share of the concept in 0_unlabeled, e.g. 0.2."
        )
    if config.unconditional is not None and not 0 <= config.unconditional <= 1:
        raise UsageError(f"--unconditional {config.unconditional:g} is outside [0, 1]: it is a share, e.g. 0.25.")
    check_positive(
        config,
        ("rank", "max_train_steps", "learning_rate", "max_grad_norm", "temperature", "push",
         "gradient_accumulation_steps"),
    )  # fmt: skip
    if config.train_batch_size < 4:
        raise UsageError(
            f"--train_batch_size {config.train_batch_size} is below 4: a step needs unlabeled and positive images."
        )
    if config.lora_alpha is not None and config.lora_alpha <= 0:
        raise UsageError(
            f"--lora_alpha {config.lora_alpha:g} must be above 0 (the usual value is the rank, {config.rank})."
        )
    for name in ("lr_warmup_steps", "validation_steps", "timestep_bias"):
        value = getattr(config, name)
        if not 0 <= value < math.inf:
            raise UsageError(f"--{name} {value:g} must be a number from 0 up.")
    if config.report_to not in (None, "none", "tensorboard", "wandb"):
        raise UsageError(f'--report_to "{config.report_to}" is unknown; choose tensorboard, wandb or none.')


def check_positive(config: Any, names: tuple[str, ...]) -> None:
    """Refuse zero and negative values of the named options (None means: not given).

    Raises:
        UsageError
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise UsageError(f"--{name} {value:g} must be a number above 0.")
