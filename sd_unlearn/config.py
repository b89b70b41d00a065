"""One typed dataclass a command: field + help = flag, YAML key and record of the run. Imports no torch."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from cyclopts import Parameter

from sd_unlearn.errors import UsageError, suggest
from sd_unlearn.records import SEED_SPAN

DEFAULT_BASE = "CompVis/stable-diffusion-v1-4"
Correction = Literal["abs", "nn", "none"]
CaptionMode = Literal["both", "own", "shared"]
Reduction = Literal["sum", "mean"]


def _help(text: str) -> Parameter:
    return Parameter(help=text)


@dataclass(kw_only=True)
class Common:
    """What every command that draws images shares."""

    concept: Annotated[
        str | None, _help('What to forget: a name with a file in prompts/, e.g. seven or "Brad Pitt".')
    ] = None
    anchor: Annotated[
        str | None, _help('Builds a concept without a file: what to draw instead, e.g. "a middle aged man".')
    ] = None
    pretrained_model_name_or_path: Annotated[
        str | None,
        _help(f"Base model: hub id, diffusers folder or digits. Default: the concept file's, else {DEFAULT_BASE}."),
    ] = None
    data_dir: Annotated[Path | None, _help("Folder holding 0_unlabeled and 1_positive. Default: data/<concept>.")] = (
        None
    )
    seed: Annotated[
        int, _help("Seed of everything random. Rendering, training and evaluation draw from disjoint ranges.")
    ] = 0
    mixed_precision: Annotated[
        Literal["no", "fp16", "bf16"] | None,
        _help(
            "Arithmetic of the networks. Default: accelerate's setting; falls back, saying so, where the device cannot."
        ),
    ] = None
    config: Annotated[Path | None, _help("YAML file with these options as keys; flags on the command line win.")] = None
    debug: Annotated[bool, _help("Show tracebacks.")] = False


@dataclass(kw_only=True)
class RenderConfig(Common):
    """Render the unlabeled and the positive folder of a concept from its prompts."""

    num_unlabeled: Annotated[
        int | None, _help("Images of the generic prompt in 0_unlabeled. Default: the concept file's.")
    ] = None
    num_positive: Annotated[int | None, _help("Images of the concept in 1_positive. Default: the concept file's.")] = (
        None
    )
    num_mixed_in: Annotated[
        int | None, _help("Images of the concept hidden in 0_unlabeled. Default: the concept file's.")
    ] = None
    num_keep: Annotated[int | None, _help("Images of each keep line in 0_unlabeled. Default: the concept file's.")] = (
        None
    )
    resolution: Annotated[int | None, _help("Side of the images in pixels. Default: the base's own.")] = None
    num_inference_steps: Annotated[int | None, _help("Sampler steps. Default: 25 on digits, 50 elsewhere.")] = None
    guidance_scale: Annotated[float | None, _help("Classifier-free guidance. Default: 3 on digits, 7.5 elsewhere.")] = (
        None
    )
    render_batch_size: Annotated[int | None, _help("Images drawn at once. Default: 100 on digits, 4 elsewhere.")] = None


@dataclass(kw_only=True)
class TrainConfig(RenderConfig):
    """Train a LoRA that forgets the concept (renders the folders first if they are missing)."""

    output_dir: Annotated[Path | None, _help("Run folder. Default: runs/<concept>.")] = None
    overwrite: Annotated[bool, _help("Replace a finished run of the same --output_dir.")] = False
    rank: Annotated[int, _help("LoRA rank.")] = 8
    lora_alpha: Annotated[
        float | None, _help("LoRA alpha; the update is scaled by alpha / rank. Default: the rank.")
    ] = None
    correction: Annotated[Correction, _help("How the bracket of the PU risk is kept from going negative.")] = "abs"
    beta: Annotated[
        float | None,
        _help(
            "Prior in (0, 1): share of the concept in 0_unlabeled; with a teacher it decides a bracket's sign, and "
            "--push how hard to forget. Default: the manifest's, else 0.1."
        ),
    ] = None
    reduction: Annotated[
        Reduction, _help("Per-example loss as sum (the paper's likelihood) or mean over the latent.")
    ] = "sum"
    temperature: Annotated[
        float, _help("Divides every loss; above 1 it keeps the sensitive term alive where losses are large.")
    ] = 1.0
    share_timesteps: Annotated[
        bool,
        Parameter(
            help="Give positives the timesteps and noise of the unlabeled images of their batch.",
            negative="--no_share_timesteps",
        ),
    ] = True
    caption_mode: Annotated[
        CaptionMode,
        _help("Captions under which positives and generic images are seen: own, one shared, or both (a bracket each)."),
    ] = "both"
    target: Annotated[
        Literal["teacher", "noise"],
        _help(
            "What losses are measured against: the base's own prediction (the adapter off: the same gradient on "
            "average, with far less variance), or the noise, as in the paper."
        ),
    ] = "teacher"
    push: Annotated[
        float,
        _help(
            "With a teacher: how hard positives are pushed away, in place of beta, which then only decides the "
            "bracket's sign. More forgets more and keeps less."
        ),
    ] = 2.0
    unconditional: Annotated[
        float | None,
        _help(
            "With a teacher: share of what is kept that is seen under the empty caption. Default: 0.25, and 0 on "
            "digits, for which the generic caption means the same as none."
        ),
    ] = None
    timestep_bias: Annotated[
        float,
        _help(
            "Timesteps at which the concept is forgotten are drawn with a density of t^bias: 0 is uniform; 1 favours "
            "the noisy ones, where it is decided what a picture shows."
        ),
    ] = 0.0
    learning_rate: Annotated[float, _help("AdamW learning rate after warm-up.")] = 7e-4
    lr_warmup_steps: Annotated[int, _help("Steps of linear warm-up; a cosine to zero follows.")] = 20
    max_grad_norm: Annotated[float, _help("Gradients are clipped to this norm.")] = 1.0
    train_batch_size: Annotated[
        int,
        _help("Images of each process and micro-batch, unlabeled and positive together."),
    ] = 40
    gradient_accumulation_steps: Annotated[
        int, _help("Micro-batches of --train_batch_size a step: the same objective as one batch of all of them.")
    ] = 1
    max_train_steps: Annotated[int, _help("Optimizer steps.")] = 500
    validation_steps: Annotated[int, _help("A preview grid is drawn every so many steps; 0 draws none.")] = 250
    report_to: Annotated[
        str | None, _help("Tracker: tensorboard, wandb or none. Default: tensorboard if installed.")
    ] = None


@dataclass(kw_only=True)
class EvaluateConfig:
    """Draw the same seeds with and without the LoRA, and measure what is gone and what stayed."""

    run: Annotated[Path | None, _help("Run folder of a finished training.")] = None
    num_images: Annotated[int, _help("Images of each direct, held-out or generic prompt set (quick tier: 200).")] = 200
    num_keep_images: Annotated[int, _help("Images of each prompt that must stay.")] = 100
    clip_model: Annotated[str, _help("open_clip architecture of the zero-shot judge (bases other than digits).")] = (
        "ViT-B-32"
    )
    clip_pretrained: Annotated[str, _help("open_clip weights: tag or path of a local file.")] = "laion2b_s34b_b79k"
    cache_dir: Annotated[Path, _help("Where the base's images are kept and shared between runs.")] = Path(
        "data/base-images"
    )
    seed: Annotated[int, _help("Seed of the evaluation; its range is disjoint from training's.")] = 0
    num_pairs: Annotated[int, _help("Before/after pairs kept as pictures for each group of prompts.")] = 24
    json: Annotated[bool, _help("Print results.json instead of the table.")] = False
    config: Annotated[Path | None, _help("YAML file with these options as keys.")] = None
    debug: Annotated[bool, _help("Show tracebacks.")] = False


@dataclass(kw_only=True)
class ExportConfig:
    """Write the LoRA where people use it: Diffusers, ComfyUI, A1111."""

    run: Annotated[Path | None, _help("Run folder of a finished training.")] = None
    output_dir: Annotated[Path | None, _help("Where the files go. Default: <run>/export.")] = None
    config: Annotated[Path | None, _help("YAML file with these options as keys.")] = None
    debug: Annotated[bool, _help("Show tracebacks.")] = False


@dataclass(kw_only=True)
class ReportConfig:
    """Write report.html, report.md and results.csv from results.json."""

    run: Annotated[Path | None, _help("Run folder of a finished evaluation.")] = None
    config: Annotated[Path | None, _help("YAML file with these options as keys.")] = None
    debug: Annotated[bool, _help("Show tracebacks.")] = False


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
    if config.beta is not None and not 0 < config.beta < 1:
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
