"""What `train` can be told, in groups as --help shows them. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Group

from sd_unlearn.choices import CaptionMode, Correction, Reduction, Risk
from sd_unlearn.config.base import RenderConfig, option

Method = Literal["lora", "full"]
LoraTargets = Literal["attention", "cross_attention", "attention+mlp", "all_linear+conv"]
Schedule = Literal["cosine", "linear", "constant", "constant_with_warmup", "cosine_with_restarts", "polynomial"]
Attention = Literal["sdpa", "xformers", "eager"]

RUN = Group("The run", sort_key=0)
OBJECTIVE = Group("What is minimised", sort_key=1)
WEIGHTS = Group("What is trained", sort_key=2)
NOISE = Group("Noise and timesteps", sort_key=3)
OPTIMIZER = Group("Optimizer", sort_key=4)
STOPPING = Group("Watching and stopping", sort_key=5)
CHECKPOINTS = Group("Checkpoints", sort_key=6)
COST = Group("Speed and memory", sort_key=7)


@dataclass(kw_only=True)
class Objective:
    """The risk: which losses, how they are weighed, what the concept's share is."""

    objective: Annotated[
        Risk,
        option(
            "The risk: positive-unlabeled, or a baseline of the paper: supervised takes 0_unlabeled for normal as it "
            "is, unsupervised learns it and nothing else. Both need --target noise.",
            OBJECTIVE,
        ),
    ] = "pu"
    correction: Annotated[
        Correction, option("How the bracket of the PU risk is kept from going negative.", OBJECTIVE)
    ] = "abs"
    beta: Annotated[
        float | Literal["estimate"] | None,
        option(
            "Prior in (0, 1): share of the concept in 0_unlabeled; with a teacher it decides a bracket's sign, and "
            "--push how hard to forget. estimate: from the two folders. Default: the manifest's, else 0.1.",
            OBJECTIVE,
        ),
    ] = None
    beta_sweep: Annotated[
        str | None,
        option(
            "Several runs instead of one, e.g. 0.5,1,2: each with so many times the beta and the --push, and one "
            "report of leakage against retention.",
            OBJECTIVE,
        ),
    ] = None
    eta: Annotated[
        float,
        option(
            "Weight in [0, 1] of images known to be normal, the folder 2_negative (PNU; Sakai et al. 2017).", OBJECTIVE
        ),
    ] = 0.5
    reduction: Annotated[
        Reduction, option("Per-example loss as sum (the paper's likelihood) or mean over the latent.", OBJECTIVE)
    ] = "sum"
    temperature: Annotated[
        float,
        option("Divides every loss; above 1 it keeps the sensitive term alive where losses are large.", OBJECTIVE),
    ] = 1.0
    caption_mode: Annotated[
        CaptionMode,
        option(
            "Captions under which positives and generic images are seen: own, one shared, or both (a bracket each; "
            "the concept file's paraphrases, too).",
            OBJECTIVE,
        ),
    ] = "both"
    target: Annotated[
        Literal["teacher", "noise"],
        option(
            "What losses are measured against: the base's own prediction (the same gradient on average, with far "
            "less variance), or the noise, as in the paper.",
            OBJECTIVE,
        ),
    ] = "teacher"
    push: Annotated[
        float,
        option(
            "With a teacher: how hard positives are pushed away, in place of beta, which then only decides the "
            "bracket's sign. More forgets more and keeps less.",
            OBJECTIVE,
        ),
    ] = 2.0
    unconditional: Annotated[
        float | None,
        option(
            "With a teacher: share of what is kept that is seen under the empty caption. Default: 0.25, and 0 on "
            "digits, for which the generic caption means the same as none.",
            OBJECTIVE,
        ),
    ] = None


@dataclass(kw_only=True)
class Weights:
    """Which weights learn."""

    method: Annotated[
        Method,
        option(
            "A LoRA, or the whole UNet (full: as in the paper, with --learning_rate 1e-5; nothing to load as a LoRA).",
            WEIGHTS,
        ),
    ] = "lora"
    rank: Annotated[int, option("LoRA rank.", WEIGHTS)] = 8
    lora_alpha: Annotated[
        float | None, option("LoRA alpha; the update is scaled by alpha / rank. Default: the rank.", WEIGHTS)
    ] = None
    lora_dropout: Annotated[float, option("Dropout in [0, 1) of the LoRA's input.", WEIGHTS)] = 0.0
    use_rslora: Annotated[bool, option("Scale the update by alpha / sqrt(rank) (rank-stabilised LoRA).", WEIGHTS)] = (
        False
    )
    use_dora: Annotated[bool, option("DoRA: a trained magnitude besides the LoRA's direction.", WEIGHTS)] = False
    lora_targets: Annotated[
        LoraTargets,
        option(
            "Layers of the UNet with a LoRA: attention projections, those of cross attention only, the feed-forward "
            "layers, too, or every linear and convolutional layer.",
            WEIGHTS,
        ),
    ] = "attention"
    train_text_encoder: Annotated[
        bool, option("A LoRA on the text encoder's attention, too; its embeddings are then not cached.", WEIGHTS)
    ] = False


@dataclass(kw_only=True)
class Noise:
    """How images are noised, and how timesteps are weighed."""

    share_timesteps: Annotated[
        bool,
        option(
            "Give positives the timesteps and noise of the unlabeled images of their batch.",
            NOISE,
            negative="--no_share_timesteps",
        ),
    ] = True
    timestep_bias: Annotated[
        float,
        option(
            "Timesteps at which the concept is forgotten are drawn with a density of t^bias: 0 is uniform; 1 favours "
            "the noisy ones, where it is decided what a picture shows.",
            NOISE,
        ),
    ] = 0.0
    snr_gamma: Annotated[
        float | None, option("Min-SNR weighting of timesteps (Hang et al. 2023), usually 5. Default: none.", NOISE)
    ] = None
    noise_offset: Annotated[
        float,
        option("Adds noise that is constant over each latent channel, usually 0.05 to 0.1. Default: none.", NOISE),
    ] = 0.0
    zero_terminal_snr: Annotated[
        bool, option("Rescale the schedule so that the last step is pure noise (for v prediction only).", NOISE)
    ] = False


@dataclass(kw_only=True)
class Optimizing:
    """The optimizer and how much it sees."""

    learning_rate: Annotated[float, option("Learning rate after warm-up.", OPTIMIZER)] = 7e-4
    optimizer: Annotated[
        Literal["adamw", "adamw8bit"],
        option("AdamW, or the one with 8-bit state (needs bitsandbytes: pip install 'sd-unlearn[8bit]').", OPTIMIZER),
    ] = "adamw"
    weight_decay: Annotated[float, option("AdamW's weight decay.", OPTIMIZER)] = 1e-2
    lr_scheduler: Annotated[
        Schedule, option("What the learning rate does after warm-up, of which constant has none.", OPTIMIZER)
    ] = "cosine"
    lr_warmup_steps: Annotated[int, option("Steps of linear warm-up.", OPTIMIZER)] = 20
    max_grad_norm: Annotated[float, option("Gradients are clipped to this norm.", OPTIMIZER)] = 1.0
    train_batch_size: Annotated[
        int, option("Images of each process and micro-batch, unlabeled and positive together.", OPTIMIZER)
    ] = 40
    gradient_accumulation_steps: Annotated[
        int,
        option(
            "Micro-batches of --train_batch_size a step: the same objective as one batch of all of them.", OPTIMIZER
        ),
    ] = 1
    max_train_steps: Annotated[int, option("Optimizer steps.", OPTIMIZER)] = 500
    ema_decay: Annotated[
        float | None,
        option("Save a moving average of what is trained, e.g. with decay 0.99. Default: the last weights.", OPTIMIZER),
    ] = None


@dataclass(kw_only=True)
class Watching:
    """What is looked at while training, and when it ends before its time."""

    validation_steps: Annotated[int, option("A preview grid is drawn every so many steps; 0 draws none.", STOPPING)] = (
        250
    )
    probe_steps: Annotated[
        int, option("Every so many steps the run is judged by --probe, and the best so far kept; 0: never.", STOPPING)
    ] = 0
    probe: Annotated[
        Literal["ratio", "leakage"],
        option(
            "ratio: mean loss of held-out positives over that of held-out unlabeled images, over what it was in the "
            "base (more is better). leakage: what the judge of `evaluate` still finds in 60 images of a fixed seed, "
            "and what it still finds of 60 that must stay.",
            STOPPING,
        ),
    ] = "ratio"
    early_stopping_patience: Annotated[
        int, option("Stop after so many probes without a better one; 0: never. Needs --probe_steps.", STOPPING)
    ] = 0
    stop_when_forgotten: Annotated[
        bool,
        option(
            "With --probe leakage: stop at the second probe in a row with leakage <= 2 % and retention >= 98 %.",
            STOPPING,
        ),
    ] = False
    gradient_share_steps: Annotated[
        int, option("Every so many steps each term's share of the gradient norm is logged; 0: never.", STOPPING)
    ] = 100
    max_skipped_steps: Annotated[
        int, option("Steps whose gradient is not finite are skipped; so many in a row end the run.", STOPPING)
    ] = 20
    report_to: Annotated[
        str | None, option("Tracker: tensorboard, wandb or none. Default: tensorboard if installed.", STOPPING)
    ] = None


@dataclass(kw_only=True)
class Checkpoints:
    """What is kept so that a run can go on."""

    checkpointing_steps: Annotated[
        int, option("Everything needed to go on is saved every so many steps; 0: only on Ctrl-C.", CHECKPOINTS)
    ] = 100
    checkpoints_total_limit: Annotated[int, option("Checkpoints kept; the oldest go first.", CHECKPOINTS)] = 2
    resume_from_checkpoint: Annotated[
        str | None, option("Go on from a checkpoint: latest, or the path of one.", CHECKPOINTS)
    ] = None
    force_resume: Annotated[
        bool, option("Go on although an option that matters (beta, learning rate, data) has changed.", CHECKPOINTS)
    ] = False


@dataclass(kw_only=True)
class Cost:
    """What is traded for speed or memory."""

    gradient_checkpointing: Annotated[
        bool, option("Compute activations again in the backward pass: less memory, about a third more time.", COST)
    ] = False
    torch_compile: Annotated[bool, option("Compile the UNet: slow first steps, faster ones after.", COST)] = False
    attention: Annotated[
        Attention, option("Attention kernels: torch's own (sdpa), xformers, or plain matrix products (eager).", COST)
    ] = "sdpa"


@dataclass(kw_only=True)
class LoopOptions(Checkpoints, Watching, Optimizing):
    """What the training loop reads: steps, optimizer, probes and checkpoints."""


@dataclass(kw_only=True)
class TrainConfig(Cost, LoopOptions, Noise, Weights, Objective, RenderConfig):
    """Train a LoRA that forgets the concept (renders the folders first if they are missing)."""

    output_dir: Annotated[
        Path | None, option("Run folder. Default: runs/<concept>, and runs/<concept>-sweep with --beta_sweep.", RUN)
    ] = None
    overwrite: Annotated[
        bool, option("Replace what is in --output_dir, a finished run or one that can go on.", RUN)
    ] = False
