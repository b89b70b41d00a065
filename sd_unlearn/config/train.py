"""Options of `train`, in groups as --help_all shows them. Imports no torch."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Group

from sd_unlearn.choices import CaptionMode, Correction, ObjectiveName, Reduction
from sd_unlearn.config.base import RenderConfig
from sd_unlearn.config.options import (
    GENERAL,
    NOT_NEGATIVE,
    POSITIVE,
    START,
    BatchSize,
    Count,
    CountOrNever,
    Range,
    option,
)

Method = Literal["lora", "full"]
LoraTargets = Literal["attention", "cross_attention", "attention+mlp", "all_linear+conv", "not_cross_attention"]
Schedule = Literal["cosine", "linear", "constant", "constant_with_warmup", "cosine_with_restarts", "polynomial"]
TimestepSampling = Literal["shift", "uniform", "logit_normal"]
Attention = Literal["sdpa", "xformers", "eager"]
Quantization = Literal["int8", "nf4"]

OBJECTIVE = Group("Objective", sort_key=1)
WEIGHTS = Group("Trained weights", sort_key=2)
NOISE = Group("Noise and timesteps", sort_key=3)
OPTIMIZER = Group("Optimizer", sort_key=4)
MONITORING = Group("Monitoring and early stopping", sort_key=5)
CHECKPOINTS = Group("Checkpoints", sort_key=6)
PERFORMANCE = Group("Speed and memory", sort_key=7)


@dataclass(kw_only=True)
class Objective:
    """What training minimizes."""

    objective: Annotated[
        ObjectiveName,
        option(
            "What training minimizes. pu: the positive-unlabeled risk. supervised (treats all unlabeled images as "
            "normal) and unsupervised (trains on them alone): the paper's baselines, which need --target noise. esd-x, "
            "esd-u, anchor and neggrad: methods of other papers. uce, speed and rece: edits of cross-attention in "
            "closed form, without images or steps (docs/training.md, Baselines).",
            OBJECTIVE,
        ),
    ] = "pu"
    correction: Annotated[
        Correction,
        option(
            "What to do when the term mean_U l - beta mean_S l is negative: abs takes its absolute value (paper), nn "
            "reverses it alone (nnPU), none leaves it (uPU).",
            OBJECTIVE,
        ),
    ] = "abs"
    beta: Annotated[
        float | Literal["estimate"] | None,
        option(
            "The concept's share among the unlabeled images (without keep images): a number between 0 and 1, or the "
            "word estimate. Default: known for generated images, else 0.1.",
            OBJECTIVE,
            Range(above=0, below=1, note="it is the concept's share among the unlabeled images, e.g. 0.2"),
        ),
    ] = None
    beta_sweep: Annotated[
        str | None,
        option(
            "Train and evaluate one run per factor, e.g. 0.5,1,2; each scales beta and --push by that factor. The "
            "report plots leakage against retention.",
            OBJECTIVE,
        ),
    ] = None
    eta: Annotated[
        float,
        option(
            "Weight of the images known not to show the concept, in 2_negative (PNU; Sakai et al. 2017).",
            OBJECTIVE,
            Range(at_least=0, at_most=1, note="it is a weight, e.g. 0.5"),
        ),
    ] = 0.5
    reduction: Annotated[
        Reduction, option("Per-example loss: sum (the paper's likelihood) or mean over the latent.", OBJECTIVE)
    ] = "sum"
    caption_mode: Annotated[
        CaptionMode,
        option(
            "Captions of the positive and generic images in training. own: each image's own caption. shared: the "
            "generic caption for all. both: every image under the generic caption and under the concept's caption.",
            OBJECTIVE,
        ),
    ] = "both"
    target: Annotated[
        Literal["teacher", "noise"],
        option(
            "What the model learns to predict. teacher: what the frozen base predicts (the same gradient on average, "
            "with far less variance). noise: the noise itself, as in the paper.",
            OBJECTIVE,
        ),
    ] = "teacher"
    teacher_reuse: Annotated[
        int,
        option(
            "Use the images and noise of each step N times within a few hundred steps, so that the base predicts for "
            "them only once (with --target teacher). Higher values make training faster with fewer samples of noise.",
            OBJECTIVE,
            Count,
        ),
    ] = 1
    push: Annotated[
        float,
        option(
            "How strongly the model is pushed away from the concept (with --target teacher). Higher values erase more "
            "but preserve less.",
            START,
            POSITIVE,
        ),
    ] = 2.0
    robust: Annotated[
        bool,
        option(
            "While training, search embeddings that bring the concept back, and unlearn under them, too. Slower; "
            "learned prompts (the attack soft) then succeed less often.",
            OBJECTIVE,
        ),
    ] = False
    unconditional: Annotated[
        float | None,
        option(
            "Share of the keep images that get the empty caption (with --target teacher). Default: 0.25; 0 on digits, "
            "where the generic and the empty caption mean the same.",
            OBJECTIVE,
            Range(at_least=0, at_most=1, note="it is a share, e.g. 0.25"),
        ),
    ] = None
    erase_guidance: Annotated[
        float,
        option(
            "With --objective esd-x or esd-u: how far the target is moved away from the concept (eta in the paper).",
            OBJECTIVE,
            POSITIVE,
        ),
    ] = 2.0
    forget_weight: Annotated[
        float,
        option("With --objective neggrad: weight of the concept's loss, which is maximized.", OBJECTIVE, POSITIVE),
    ] = 1.0
    retain: Annotated[
        bool,
        option(
            "With --objective esd-x, esd-u or anchor: also train on the keep images with the base's prediction as the "
            "target, as pu does. --no_retain leaves them out, as in the papers.",
            OBJECTIVE,
            negative="--no_retain",
        ),
    ] = True


@dataclass(kw_only=True)
class Weights:
    """Which weights are trained."""

    method: Annotated[
        Method, option("Train a LoRA, or the full UNet as in the paper (use --learning_rate 1e-5).", WEIGHTS)
    ] = "lora"
    rank: Annotated[
        int,
        option("LoRA rank.", WEIGHTS, Range(above=0, at_most=4096, note="no layer of a UNet needs more")),
    ] = 8
    lora_alpha: Annotated[
        float | None,
        option(
            "LoRA alpha; the update is scaled by alpha / rank. Default: the rank.",
            WEIGHTS,
            Range(above=0, note="the usual value is the rank"),
        ),
    ] = None
    lora_dropout: Annotated[
        float,
        option("Dropout of the LoRA's input.", WEIGHTS, Range(at_least=0, below=1, note="it is a share, e.g. 0.1")),
    ] = 0.0
    use_dora: Annotated[bool, option("Train a DoRA: magnitude and direction of each weight.", WEIGHTS)] = False
    lora_targets: Annotated[
        LoraTargets | None,
        option(
            "UNet layers with a LoRA: attention projections, cross-attention projections, attention and feed-forward "
            "layers, all linear and convolutional layers, or all of these outside cross-attention. Default: attention; "
            "cross_attention with --objective esd-x and not_cross_attention with esd-u.",
            WEIGHTS,
        ),
    ] = None
    train_text_encoder: Annotated[
        bool, option("Also train a LoRA on the text encoder. Caption embeddings are then not cached.", WEIGHTS)
    ] = False


@dataclass(kw_only=True)
class Noise:
    """How images are noised and how timesteps are sampled and weighted."""

    share_timesteps: Annotated[
        bool,
        option(
            "Use the same timesteps and noise for the positive and unlabeled images of a batch (lower variance).",
            NOISE,
            negative="--no_share_timesteps",
        ),
    ] = True
    timestep_bias: Annotated[
        float,
        option(
            "Sample the erasing timesteps with density t^bias. 0 is uniform; 1 favours high-noise timesteps, which "
            "determine image content.",
            NOISE,
            NOT_NEGATIVE,
        ),
    ] = 0.0
    timestep_sampling: Annotated[
        TimestepSampling | None,
        option(
            "Density of timesteps for SD 3 and FLUX. shift: as the model's scheduler spaces its sampling steps. "
            "logit_normal: mostly medium noise (Esser et al. 2024). Default: shift.",
            NOISE,
        ),
    ] = None
    snr_gamma: Annotated[
        float | None,
        option("Min-SNR weighting of timesteps (Hang et al. 2023), usually 5. Default: off.", NOISE, POSITIVE),
    ] = None
    zero_terminal_snr: Annotated[
        bool, option("Rescale the noise schedule to zero terminal SNR (v-prediction bases only).", NOISE)
    ] = False


@dataclass(kw_only=True)
class Optimizing:
    """Optimizer, learning rate schedule and amount of training."""

    max_train_steps: Annotated[int, option("Number of training steps.", START, Count)] = 500
    learning_rate: Annotated[float, option("Peak learning rate.", OPTIMIZER, POSITIVE)] = 7e-4
    optimizer: Annotated[
        Literal["adamw", "adamw8bit"],
        option("AdamW, or AdamW with 8-bit states (extra 8bit: pip install 'sd-unlearn[8bit]').", OPTIMIZER),
    ] = "adamw"
    weight_decay: Annotated[float, option("Weight decay of AdamW.", OPTIMIZER, NOT_NEGATIVE)] = 1e-2
    lr_scheduler: Annotated[
        Schedule,
        option(
            "Learning rate schedule after warm-up. constant skips the warm-up; constant_with_warmup has it.", OPTIMIZER
        ),
    ] = "cosine"
    lr_warmup_steps: Annotated[int, option("Steps of linear warm-up.", OPTIMIZER, CountOrNever)] = 20
    max_grad_norm: Annotated[float, option("Clip gradients to this norm.", OPTIMIZER, POSITIVE)] = 1.0
    effective_batch_size: Annotated[
        int | None,
        option(
            "Images of one training step, over all processes and micro-batches, of all kinds together. Default: "
            "--train_batch_size x --gradient_accumulation_steps x processes if both are given, else 40.",
            OPTIMIZER,
            BatchSize,
        ),
    ] = None
    ema_decay: Annotated[
        float | None,
        option(
            "Save an exponential moving average of the weights with this decay. Default: off, the last weights.",
            OPTIMIZER,
            Range(at_least=0, below=1, note="e.g. 0.99"),
        ),
    ] = None


@dataclass(kw_only=True)
class Monitoring:
    """What is logged during training, and when training stops early."""

    validation_steps: Annotated[
        int, option("Generate a grid of preview images every N steps; 0: never.", MONITORING, CountOrNever)
    ] = 250
    probe_steps: Annotated[
        int,
        option(
            "Measure every N steps whether the concept is forgotten (a probe), and save the best weights; 0: never.",
            MONITORING,
            CountOrNever,
        ),
    ] = 0
    probe: Annotated[
        Literal["ratio", "leakage"],
        option(
            "What a probe measures. ratio: how much worse the model has become at the concept than at other images "
            "(loss of held-out positives / loss of held-out unlabeled images, relative to the base). leakage: how many "
            "of 60 generated images show the concept, and how many of 60 others show what their keep prompt asks for.",
            MONITORING,
        ),
    ] = "ratio"
    early_stopping_patience: Annotated[
        int, option("Stop after N probes without improvement; 0: never.", MONITORING, CountOrNever)
    ] = 0
    stop_when_forgotten: Annotated[
        bool,
        option(
            "With --probe leakage: stop when two probes in a row find leakage <= 2 % and retention >= 98 %.",
            MONITORING,
        ),
    ] = False
    gradient_share_steps: Annotated[
        int,
        option("Log each loss term's share of the gradient norm every N steps; 0: never.", MONITORING, CountOrNever),
    ] = 100
    report_to: Annotated[
        Literal["tensorboard", "wandb", "none"] | None,
        option("Experiment tracker. Default: tensorboard if it is installed.", MONITORING),
    ] = None


@dataclass(kw_only=True)
class Checkpoints:
    """What is saved for resuming a run."""

    checkpointing_steps: Annotated[
        int, option("Save a checkpoint every N steps; 0: only on Ctrl-C.", CHECKPOINTS, CountOrNever)
    ] = 100
    checkpoints_total_limit: Annotated[
        int, option("Number of checkpoints to keep; the oldest are deleted first.", CHECKPOINTS, Count)
    ] = 2
    resume_from_checkpoint: Annotated[
        str | None, option("Resume from a checkpoint: latest, or a path.", CHECKPOINTS)
    ] = None
    force_resume: Annotated[
        bool, option("Resume even if an option that affects the result has changed.", CHECKPOINTS)
    ] = False


@dataclass(kw_only=True)
class Performance:
    """What is traded for speed or memory."""

    train_batch_size: Annotated[
        int | None,
        option(
            "Images that each GPU processes at once (a micro-batch), from 1. Default: as many as its memory holds. The "
            "result is the same, to rounding.",
            PERFORMANCE,
            BatchSize,
        ),
    ] = None
    gradient_accumulation_steps: Annotated[
        int | None,
        option(
            "Micro-batches of one training step on each GPU. Default: as many as --effective_batch_size takes.",
            PERFORMANCE,
            BatchSize,
        ),
    ] = None
    gradient_checkpointing: Annotated[
        bool | None,
        option(
            "Recompute activations in the backward pass: less memory, about a third slower. Default: only if memory "
            "needs it.",
            PERFORMANCE,
            negative="--no_gradient_checkpointing",
        ),
    ] = None
    torch_compile: Annotated[
        bool, option("Compile the UNet: minutes of compilation, then faster steps.", PERFORMANCE)
    ] = False
    attention: Annotated[
        Attention, option("Attention implementation: torch's own (sdpa), xformers, or eager.", PERFORMANCE)
    ] = "sdpa"
    quantize_base: Annotated[
        Quantization | None,
        option(
            "Store the linear layers of the frozen UNet in 8 bits (int8) or 4 bits (nf4; extra 8bit: pip install "
            "'sd-unlearn[8bit]') during training. Less memory, slower steps. Default: off.",
            PERFORMANCE,
        ),
    ] = None


@dataclass(kw_only=True)
class LoopOptions(Checkpoints, Monitoring, Optimizing):
    """Options that the training loop reads."""


@dataclass(kw_only=True)
class TrainConfig(Performance, LoopOptions, Noise, Weights, Objective, RenderConfig):
    """Train a LoRA that erases the concept. Missing training images are generated first."""

    positives: Annotated[
        Path | None,
        option(
            "Folder with your own photos of the concept, used instead of the generated images of it in 1_positive.",
            START,
        ),
    ] = None
    output_dir: Annotated[
        Path | None,
        option("Run folder. Default: runs/<concept>, or runs/<concept>-sweep with --beta_sweep.", START),
    ] = None
    overwrite: Annotated[bool, option("Delete an existing run in --output_dir and start over.", GENERAL)] = False


# --objective -> the layers that it trains by definition
TARGETS_OF: dict[ObjectiveName, LoraTargets] = {"esd-x": "cross_attention", "esd-u": "not_cross_attention"}


def with_lora_targets(config: TrainConfig) -> TrainConfig:
    """The options with the layers that get a LoRA filled in."""
    return replace(config, lora_targets=config.lora_targets or TARGETS_OF.get(config.objective, "attention"))
