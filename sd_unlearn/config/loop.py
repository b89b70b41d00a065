"""Options of a training loop: optimizer, monitoring, checkpoints, speed and memory. Imports no torch."""

from dataclasses import dataclass
from typing import Annotated, Literal

from cyclopts import Group

from sd_unlearn.config.options import (
    NOT_NEGATIVE,
    POSITIVE,
    START,
    BatchSize,
    Count,
    CountOrNever,
    Range,
    option,
)
from sd_unlearn.errors import install_command

Schedule = Literal["cosine", "linear", "constant", "constant_with_warmup", "cosine_with_restarts", "polynomial"]
Attention = Literal["sdpa", "xformers", "eager"]
Quantization = Literal["int8", "nf4"]

STEPS, FLOW_STEPS = 250, 500  # docs/tuning.md
STEPS_OF_EACH = 25  # at least, of each of several concepts; docs/emoji.md

OPTIMIZER = Group("Optimizer", sort_key=4)
MONITORING = Group("Monitoring and early stopping", sort_key=5)
CHECKPOINTS = Group("Checkpoints", sort_key=6)
PERFORMANCE = Group("Speed and memory", sort_key=7)


@dataclass(kw_only=True)
class Optimizing:
    """Optimizer, learning rate schedule and amount of training."""

    max_train_steps: Annotated[
        int | None,
        option(
            f"Number of training steps. Default: {STEPS}; for transformers (SD 3, FLUX, Z-Image, Qwen-Image) "
            f"{FLOW_STEPS}; at least {STEPS_OF_EACH} for each concept.",
            START,
            Count,
        ),
    ] = None
    learning_rate: Annotated[float, option("Peak learning rate.", OPTIMIZER, POSITIVE)] = 8e-4
    optimizer: Annotated[
        Literal["adamw", "adamw8bit"],
        option(f"AdamW, or AdamW with 8-bit states (extra 8bit: {install_command('8bit')}).", OPTIMIZER),
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

    @property
    def steps(self) -> int:
        """The number of training steps, given (as in resolved options) or that of one concept and a UNet."""
        return self.max_train_steps or STEPS


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
            "of 60 images of the concept (at least one of each concept) and how many of 60 images of keep prompts show "
            "what was prompted; on a bundled base also how many of the first are clean images of something else.",
            MONITORING,
        ),
    ] = "ratio"
    early_stopping_patience: Annotated[
        int, option("Stop after N probes without improvement; 0: never.", MONITORING, CountOrNever)
    ] = 0
    stop_when_forgotten: Annotated[
        bool,
        option(
            "With --probe leakage: stop when two probes in a row find leakage <= 2 % and retention >= 98 %, on a "
            "bundled base also clean replacement >= 80 %.",
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
    resume_from_checkpoint: Annotated[str | None, option("Resume from a checkpoint: latest, or a path.", START)] = None
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
            "Store the linear layers of the frozen UNet or transformer in 8 bits (int8) or 4 bits (nf4; extra 8bit: "
            f"{install_command('8bit')}) during training. Less memory, slower steps. Default: off.",
            PERFORMANCE,
        ),
    ] = None


@dataclass(kw_only=True)
class LoopOptions(Checkpoints, Monitoring, Optimizing):
    """Options that the training loop reads."""
