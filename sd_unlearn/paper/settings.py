"""Resolve and check the options of `paper run` before anything loads. Imports no torch."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from sd_unlearn.choices import Correction, Reduction
from sd_unlearn.config.options import check_ranges
from sd_unlearn.errors import UsageError, suggest
from sd_unlearn.io.paths import slugify
from sd_unlearn.paper.ddpm.split import with_contamination
from sd_unlearn.paper.experiments import CLASSES, Counts, Experiment, Sampler, Size
from sd_unlearn.paper.options import ObjectiveName, RunOptions

LABELED_SHARE = 3  # unlabeled images per labeled image of a step
PAPER_BETA = 0.1
WITH_BRACKET = ("pu", "pnu")
BetaSource = Literal["fixed", "known", "estimated"]


@dataclass(frozen=True)
class ExperimentSettings:
    """Everything that affects the results of a run except its seed; "settings" in results.json."""

    objective: ObjectiveName
    correction: Correction
    beta: float | None  # in (0, 1); None: unsupervised
    beta_source: BetaSource
    eta: float  # 0 without labeled normal images
    conditional: bool
    missing: tuple[str, ...]  # sensitive classes without labeled images
    contamination: float  # the true beta
    num_negative: int
    reduction: Reduction
    snr_gamma: float | None
    max_ratio: float | None  # None: no cap
    train_batch_size: int
    max_train_steps: int
    learning_rate: float
    lr_warmup_steps: int
    ema_decay: float | None
    mixed_precision: str
    sampler: Sampler
    num_inference_steps: int
    num_images: int
    base: str | None

    @property
    def conditions(self) -> int:
        """Number of classes of the conditional network; 0: unconditional."""
        return 5 if self.conditional else 0


def resolve(experiment: Experiment, options: RunOptions) -> tuple[ExperimentSettings, Counts, Size]:
    """The settings, numbers of images and size for these options.

    Raises:
        UsageError: an invalid option or combination of options.
    """
    _check(experiment, options)
    size = options.size or experiment.default_size
    if size not in experiment.sizes:
        raise UsageError(
            f"--size {size}: {experiment.name} fine-tunes a published model of fixed size. Remove the option."
        )
    recipe = experiment.recipe_of(size)
    counts = experiment.counts
    if options.contamination is not None:
        counts = with_contamination(counts, options.contamination)
    batch = options.train_batch_size or recipe.train_batch_size
    epochs = options.epochs or recipe.epochs
    default = experiment.counts  # equal numbers of steps at every contamination, so that they can be compared
    steps = options.max_train_steps or epochs * math.ceil((default.normal + default.mixed_in) / batch)
    pnu = options.objective == "pnu"
    settings = ExperimentSettings(
        objective=options.objective,
        correction=options.correction,
        **_beta(options, counts),  # type: ignore[arg-type]
        eta=options.eta if pnu else 0.0,
        conditional=options.conditional,
        missing=missing_classes(experiment, options),
        contamination=counts.contamination,
        num_negative=(options.num_negative or counts.positive) if pnu else 0,
        reduction=options.reduction or recipe.reduction,
        snr_gamma=_or_none(options.snr_gamma, recipe.snr_gamma),
        max_ratio=_or_none(options.max_ratio, recipe.max_ratio) if options.objective in WITH_BRACKET else None,
        train_batch_size=batch,
        max_train_steps=steps,
        learning_rate=options.learning_rate or recipe.learning_rate,
        lr_warmup_steps=min(recipe.lr_warmup_steps, steps // 2),
        ema_decay=recipe.ema_decay,
        mixed_precision=options.mixed_precision,
        sampler=options.sampler or recipe.sampler,
        num_inference_steps=options.num_inference_steps or recipe.num_inference_steps,
        num_images=options.num_images or recipe.num_images,
        base=options.pretrained_model_name_or_path or experiment.base,
    )
    return settings, counts, size


def variant_of(settings: ExperimentSettings, defaults: ExperimentSettings, size: Size, seed: int) -> str:
    """Name of a run folder: size, objective, the settings that differ from the defaults, seed.

    defaults: as `default_settings`.
    """
    parts: list[str] = [size, settings.objective]
    if settings.objective in ("pu", "pnu", "supervised"):
        parts.append(f"beta{settings.beta:g}" if settings.beta_source == "fixed" else f"beta-{settings.beta_source}")
    skipped = {"objective", "beta", "beta_source", "lr_warmup_steps"}  # the last follows from the others
    for field in dataclasses.fields(ExperimentSettings):
        value = getattr(settings, field.name)
        if field.name not in skipped and value != getattr(defaults, field.name):
            parts.append(_name_part(field.name, value))
    return "-".join([*parts, f"seed{seed}"])


def default_settings(experiment: Experiment, settings: ExperimentSettings, size: Size) -> ExperimentSettings:
    """The settings of the same objective and size with no other option."""
    return resolve(experiment, RunOptions(objective=settings.objective, size=size))[0]


def missing_classes(experiment: Experiment, options: RunOptions) -> tuple[str, ...]:
    """The classes of --missing.

    Raises:
        UsageError: a class that is not a sensitive one of the experiment, or all of them.
    """
    names = tuple(word.strip() for word in (options.missing or "").split(",") if word.strip())
    for name in names:
        if name not in experiment.sensitive:
            raise UsageError(
                f'--missing "{name}" is not a sensitive class of {experiment.name}.'
                f"{suggest(name, experiment.sensitive)} Sensitive classes: {', '.join(experiment.sensitive)}."
            )
    if set(names) == set(experiment.sensitive):
        raise UsageError(f"--missing {options.missing} leaves no labeled images; list fewer classes.")
    return names


def _beta(options: RunOptions, counts: Counts) -> dict[str, object]:
    if options.objective == "unsupervised":
        return {"beta": None, "beta_source": "fixed"}
    if options.beta == "known":
        return {"beta": counts.contamination, "beta_source": "known"}
    if options.beta == "estimate":  # training starts with the paper's value
        return {"beta": PAPER_BETA, "beta_source": "estimated"}
    return {"beta": PAPER_BETA if options.beta is None else options.beta, "beta_source": "fixed"}


def _or_none(value: float | None, default: float | None) -> float | None:
    """The value of an option, or its default; 0 means None."""
    return (default if value is None else value) or None


def _name_part(name: str, value: object) -> str:
    if value is True:
        return name
    words = ".".join(value) if isinstance(value, tuple) else f"{value:.3g}" if isinstance(value, float) else str(value)
    return f"{name.replace('_', '-')}-{words if isinstance(value, float) else slugify(words)}"


def _check(experiment: Experiment, options: RunOptions) -> None:
    check_ranges(options)
    if options.beta is not None and options.objective == "unsupervised":
        raise UsageError(
            f"--beta {options.beta} cannot be used with --objective unsupervised, which has no beta. Remove it."
        )
    if options.method != "full":
        raise UsageError(
            f"--method {options.method} is for text-to-image models; {experiment.name} trains a DDPM. Remove it."
        )
    if options.contamination == 0 and options.objective != "unsupervised":
        raise UsageError(
            "--contamination 0 needs --objective unsupervised: without sensitive images there is nothing to unlearn."
        )
    if options.eta != RunOptions.eta and options.objective != "pnu":
        raise UsageError(f"--eta {options.eta:g} is for --objective pnu, not {options.objective}. Remove it.")
    if options.num_negative is not None and options.objective != "pnu":
        raise UsageError(f"--num_negative is for --objective pnu, not {options.objective}.")
    if options.correction != "abs" and options.objective not in WITH_BRACKET:
        raise UsageError(f"--correction is for pu and pnu; --objective {options.objective} has no bracket.")
    if options.max_ratio and options.objective not in WITH_BRACKET:
        raise UsageError(f"--max_ratio is for --objective pu and pnu, not {options.objective}.")
    if options.max_ratio is not None and 0 < options.max_ratio < 1:
        raise UsageError(f"--max_ratio {options.max_ratio:g} must be at least 1, or 0 for no cap.")
    if options.conditional and CLASSES[experiment.dataset] != CLASSES["mnist"]:
        raise UsageError(
            f"--conditional is for the MNIST experiments: it conditions on pairs of digits, and {experiment.name} has "
            "none. Remove it."
        )
