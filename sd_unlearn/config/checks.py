"""Options as plain values, read from YAML with strict keys, and refused by name when they cannot be meant."""

from __future__ import annotations

import math
from typing import Any

from sd_unlearn.config.base import RenderConfig
from sd_unlearn.config.evaluate import EvaluateConfig
from sd_unlearn.config.train import TrainConfig
from sd_unlearn.errors import UsageError
from sd_unlearn.seeds import SEED_SPAN


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
    for name, low, high, example in (
        ("unconditional", 0, 1, 0.25),
        ("eta", 0, 1, 0.5),
        ("lora_dropout", 0, 0.999, 0.1),
        ("ema_decay", 0, 0.99999, 0.99),
    ):
        value = getattr(config, name)
        if value is not None and not low <= value <= high:
            raise UsageError(
                f"--{name} {value:g} is outside [{low}, {math.ceil(high)}]: it is a share, e.g. {example}."
            )
    check_positive(
        config,
        (
            "rank",
            "max_train_steps",
            "learning_rate",
            "max_grad_norm",
            "temperature",
            "push",
            "snr_gamma",
            "gradient_accumulation_steps",
            "checkpoints_total_limit",
            "max_skipped_steps",
        ),
    )
    _check_together(config)
    if config.train_batch_size < 4:
        raise UsageError(
            f"--train_batch_size {config.train_batch_size} is below 4: a step needs unlabeled and positive images."
        )
    if config.lora_alpha is not None and config.lora_alpha <= 0:
        raise UsageError(
            f"--lora_alpha {config.lora_alpha:g} must be above 0 (the usual value is the rank, {config.rank})."
        )
    for name in (
        "lr_warmup_steps",
        "validation_steps",
        "timestep_bias",
        "noise_offset",
        "weight_decay",
        "probe_steps",
        "early_stopping_patience",
        "gradient_share_steps",
        "checkpointing_steps",
    ):
        value = getattr(config, name)
        if not 0 <= value < math.inf:
            raise UsageError(f"--{name} {value:g} must be a number from 0 up.")
    if config.report_to not in (None, "none", "tensorboard", "wandb"):
        raise UsageError(f'--report_to "{config.report_to}" is unknown; choose tensorboard, wandb or none.')


def _check_together(config: TrainConfig) -> None:
    """Options that mean nothing, or something else, beside each other."""
    for name in ("use_dora", "use_rslora", "train_text_encoder", "lora_dropout", "lora_targets"):
        if config.method == "full" and getattr(config, name) != getattr(TrainConfig, name):
            raise UsageError(f"--{name} is for --method lora; --method full trains the UNet itself.")
    for name in ("early_stopping_patience", "stop_when_forgotten"):
        if getattr(config, name) and not config.probe_steps:
            raise UsageError(f"--{name} needs probes to go by: add --probe_steps, e.g. 50.")
    if config.probe == "leakage" and not config.probe_steps:
        raise UsageError("--probe leakage needs to know when: add --probe_steps, e.g. 50.")
    if config.stop_when_forgotten and config.probe != "leakage":
        raise UsageError(f"--stop_when_forgotten needs --probe leakage; --probe is {config.probe}.")
    if config.force_resume and config.resume_from_checkpoint is None:
        raise UsageError("--force_resume needs --resume_from_checkpoint: name the checkpoint, or latest.")
    if config.overwrite and config.resume_from_checkpoint is not None:
        raise UsageError("--overwrite starts over and --resume_from_checkpoint goes on; give one of them.")
    if config.objective != "pu":
        _check_baseline(config)


def _check_baseline(config: TrainConfig) -> None:
    """The paper's baselines, which lack most of what the PU risk can be told."""
    asked = f"--objective {config.objective}"
    if config.target == "teacher":
        raise UsageError(
            f"{asked} needs --target noise: against --target teacher, the base's own prediction, unlabeled images "
            "teach nothing."
        )
    if config.correction != "abs":
        raise UsageError(f"--correction {config.correction} is for --objective pu; {asked} has no bracket to correct.")
    if config.objective == "unsupervised" and config.beta_sweep is not None:
        raise UsageError(f"--beta_sweep {config.beta_sweep}: {asked} does not depend on beta. Take another objective.")


def check_positive(config: Any, names: tuple[str, ...]) -> None:
    """Refuse zero and negative values of the named options (None means: not given).

    Raises:
        UsageError
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise UsageError(f"--{name} {value:g} must be a number above 0.")


def check_evaluate(config: EvaluateConfig) -> None:
    """Refuse values that cannot be meant for an evaluation.

    Raises:
        UsageError: naming the option, its value and the allowed range.
    """
    check_positive(config, ("num_images", "num_keep_images", "num_inference_steps", "render_batch_size", "resolution"))
    if config.num_pairs < 0:
        raise UsageError(f"--num_pairs {config.num_pairs} must be 0 or more.")
    for strength in config.strengths:
        if not -10 <= strength <= 10:
            raise UsageError(f"--strengths {strength:g} must lie in [-10, 10]; 1 is as trained.")
    if len(set(config.seed)) < len(config.seed) or not config.seed:
        raise UsageError(f"--seed {' '.join(map(str, config.seed))}: give each seed once.")
    for seed in config.seed:
        if not 0 <= seed < SEED_SPAN:
            raise UsageError(f"--seed {seed} must lie in [0, {SEED_SPAN}): each purpose has a range of that size.")
    if config.false_accept_rate is not None and not 0 < config.false_accept_rate < 1:
        raise UsageError(f"--false_accept_rate {config.false_accept_rate:g} must lie between 0 and 1.")
    if config.guidance_scale is not None and not 0 <= config.guidance_scale < math.inf:
        raise UsageError(f"--guidance_scale {config.guidance_scale:g} must be a number from 0 up, usually 3 to 10.")
