"""Options of `train` on what is learned: objective, trained weights and noise. Imports no torch."""

from dataclasses import dataclass
from typing import Annotated, Literal

from cyclopts import Group

from sd_unlearn.choices import CaptionMode, Correction, ObjectiveName, Reduction
from sd_unlearn.config.options import (
    NOT_NEGATIVE,
    POSITIVE,
    START,
    Count,
    Range,
    option,
)

Method = Literal["lora", "full"]
LoraTargets = Literal["attention", "cross_attention", "attention+mlp", "all_linear+conv", "not_cross_attention"]
TimestepSampling = Literal["shift", "uniform", "logit_normal"]
REUSE = 5  # default of --teacher_reuse

OBJECTIVE = Group("Objective", sort_key=1)
WEIGHTS = Group("Trained weights", sort_key=2)
NOISE = Group("Noise and timesteps", sort_key=3)


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
            "generic caption for all. both: every image under the generic caption, under the concept's caption and "
            "under its paraphrases, of which at most four are in a step and the others take turns.",
            OBJECTIVE,
        ),
    ] = "both"
    target: Annotated[
        Literal["teacher", "noise"],
        option(
            "What the model learns to predict. teacher: what the frozen base predicts (less variance); images of the "
            "concept are pushed by --push. noise: the noise itself, as in the paper.",
            OBJECTIVE,
        ),
    ] = "teacher"
    teacher_reuse: Annotated[
        int | None,
        option(
            "Use the images and noise of each step N times, in repeated blocks of 20 steps, so that the base predicts "
            "for them only once (with --objective pu and --target teacher). Higher values make training faster with "
            f"fewer samples of noise. Default: {REUSE}; 1 for several concepts at once.",
            OBJECTIVE,
            Count,
        ),
    ] = None
    push: Annotated[
        float,
        option(
            "How far predictions of the concept are pushed beyond those of the generic caption, where 1 is the "
            "distance between the two (with --target teacher). Higher values erase more but preserve less.",
            START,
            POSITIVE,
        ),
    ] = 2.5
    robust: Annotated[
        bool,
        option(
            "During training, search for embeddings that bring the concept back, and unlearn under them, too. Slower; "
            "learned prompts (the attack soft) then succeed less often.",
            OBJECTIVE,
        ),
    ] = False
    unconditional: Annotated[
        float | None,
        option(
            "Share of the keep images that get the empty caption (with --target teacher). Without keep images, "
            "other images take their place, all with the empty caption. Default: 0.25; 0 on digits, where the generic "
            "and the empty caption mean the same, and where images are generated without classifier-free guidance.",
            OBJECTIVE,
            Range(at_least=0, at_most=1, note="it is a share, e.g. 0.25"),
        ),
    ] = None
    erase_guidance: Annotated[
        float,
        option(
            "With --objective esd-x or esd-u: how far the target is moved from the base's prediction away from the "
            "concept. 1 is the prediction without a caption. (1 more than eta in the paper's equation 7.)",
            OBJECTIVE,
            POSITIVE,
        ),
    ] = 2.0
    forget_weight: Annotated[
        float,
        option("With --objective neggrad: weight of the concept's loss, which is maximized.", OBJECTIVE, POSITIVE),
    ] = 1.0
    rece_epochs: Annotated[
        int | None,
        option(
            "With --objective rece: how often the embedding that is still projected as the concept was is edited, too. "
            "Default: 3 for nudity, else 1, as in the paper.",
            OBJECTIVE,
            Count,
        ),
    ] = None
    erase_weight: Annotated[
        float,
        option(
            "With --objective uce or rece: weight of the embeddings of the concept, relative to those of the keep "
            "prompts.",
            OBJECTIVE,
            POSITIVE,
        ),
    ] = 1.0
    null_space_threshold: Annotated[
        float,
        option(
            "With --objective speed: directions are free to edit if the eigenvalue of the keep prompts' embeddings is "
            "below this.",
            OBJECTIVE,
            POSITIVE,
        ),
    ] = 0.1
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
            "Layers of the UNet or transformer with a LoRA: attention projections, cross-attention projections, "
            "attention and feed-forward layers, all linear and convolutional layers, or all of these outside "
            "cross-attention. With fewer layers, prompts and fine-tuning bring the concept back more easily. Default: "
            "all_linear+conv; cross_attention with --objective esd-x and not_cross_attention with esd-u.",
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
            "Density of timesteps for flow matching (transformers). shift: as the model's scheduler spaces its "
            "sampling steps. logit_normal: mostly medium noise (Esser et al. 2024). Default: shift.",
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
