"""One typed dataclass a command: field + help = flag, YAML key and record of the run. Imports no torch."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Group, Parameter

DEFAULT_BASE = "CompVis/stable-diffusion-v1-4"
CLIP_MODEL, CLIP_PRETRAINED = "ViT-B-32", "laion2b_s34b_b79k"


def option(text: str, group: Group | None = None, negative: str = "") -> Parameter:
    """How an option shows in --help. `negative` names the switch that turns it off."""
    kept: dict[str, Any] = {"group": group} if group else {}  # group=None would hide the option
    return Parameter(help=text, negative=negative or (), **kept)


@dataclass(kw_only=True)
class BaseOptions:
    """Which base model, and how it is loaded."""

    pretrained_model_name_or_path: Annotated[
        str | None,
        option(
            "Base model (SD 1.x, 2.x, XL): hub id, diffusers folder, .safetensors file or digits. Default: the concept "
            f"file's, else {DEFAULT_BASE}."
        ),
    ] = None
    vae: Annotated[str | None, option("Another VAE than the base's own: hub id, folder or .safetensors file.")] = None
    prediction_type: Annotated[
        Literal["epsilon", "v_prediction"] | None,
        option(
            "What the base predicts, for a single file that cannot tell (SD 2.x; v models of SD 1.x and XL that do "
            "not say so). Default: what its own configuration says."
        ),
    ] = None
    variant: Annotated[
        str | None,
        option("Weights of a folder or hub id, e.g. fp16. Default: the usual ones, else those in half precision."),
    ] = None
    single_file_config: Annotated[
        str | None,
        option("Diffusers folder with the configuration of a single file that differs from the published models."),
    ] = None
    allow_pickle: Annotated[
        bool, option("Open .ckpt and .bin weights, too: pickles, which can run code of whoever made them.")
    ] = False


@dataclass(kw_only=True)
class Common(BaseOptions):
    """What every command that draws images shares."""

    concept: Annotated[
        str | None, option('What to forget: a name with a file in prompts/, e.g. seven or "Brad Pitt".')
    ] = None
    anchor: Annotated[
        str | None, option('Builds a concept without a file: what to draw instead, e.g. "a middle aged man".')
    ] = None
    data_dir: Annotated[Path | None, option("Folder holding 0_unlabeled and 1_positive. Default: data/<concept>.")] = (
        None
    )
    seed: Annotated[
        int, option("Seed of everything random. Rendering, training and evaluation draw from disjoint ranges.")
    ] = 0
    mixed_precision: Annotated[
        Literal["no", "fp16", "bf16"] | None,
        option(
            "Arithmetic of the networks. Default: accelerate's setting; falls back, saying so, where the device cannot."
        ),
    ] = None
    config: Annotated[Path | None, option("YAML file with these options as keys; flags on the command line win.")] = (
        None
    )
    debug: Annotated[bool, option("Show tracebacks.")] = False


@dataclass(kw_only=True)
class RenderConfig(Common):
    """Render the unlabeled and the positive folder of a concept from its prompts."""

    num_unlabeled: Annotated[
        int | None, option("Images of the generic prompt in 0_unlabeled. Default: the concept file's.")
    ] = None
    num_positive: Annotated[int | None, option("Images of the concept in 1_positive. Default: the concept file's.")] = (
        None
    )
    num_mixed_in: Annotated[
        int | None, option("Images of the concept hidden in 0_unlabeled. Default: the concept file's.")
    ] = None
    num_keep: Annotated[int | None, option("Images of each keep line in 0_unlabeled. Default: the concept file's.")] = (
        None
    )
    resolution: Annotated[int | None, option("Side of the images in pixels. Default: the base's own.")] = None
    num_inference_steps: Annotated[int | None, option("Sampler steps. Default: 25 on digits, 50 elsewhere.")] = None
    guidance_scale: Annotated[
        float | None, option("Classifier-free guidance. Default: 3 on digits, 7.5 elsewhere.")
    ] = None
    render_batch_size: Annotated[int | None, option("Images drawn at once. Default: 100 on digits, 4 elsewhere.")] = (
        None
    )


@dataclass(kw_only=True)
class ExportConfig:
    """Write the LoRA where people use it: Diffusers, ComfyUI, A1111; with a card, or baked into a checkpoint."""

    run: Annotated[Path | None, option("Run folder of a finished training.")] = None
    output_dir: Annotated[Path | None, option("Where LoRA files and card go. Default: <run>/export.")] = None
    dtype: Annotated[
        Literal["fp32", "fp16"],
        option("Numbers in the files written. fp32 is exact; fp16 takes half the space, as most published files do."),
    ] = "fp32"
    merge: Annotated[
        Path | None,
        option(
            "Also write a whole checkpoint with the LoRA baked in, which nobody can leave out: a diffusers folder, or "
            "one file for ComfyUI and A1111 if the path ends in .safetensors. Needs the base. After --method full the "
            "only way to export."
        ),
    ] = None
    strength: Annotated[
        float, option("How much of the change --merge bakes in: 1 is what was trained and measured, 0 is the base.")
    ] = 1.0
    license: Annotated[
        str | None,
        option("Licence in card and header, as the hub spells it, e.g. openrail++. Default: that of a known base."),
    ] = None
    push_to_hub: Annotated[
        str | None,
        option(
            "Upload LoRA, card and report to this repository of the Hugging Face hub (owner/name), made if it is not "
            "there. The token is the one huggingface_hub knows: HF_TOKEN, or `hf auth login`."
        ),
    ] = None
    private: Annotated[bool, option("Make the repository of --push_to_hub a private one.")] = False
    allow_pickle: Annotated[
        bool, option("Open the base even if its weights are pickles, which can run code of whoever made them.")
    ] = False
    config: Annotated[Path | None, option("YAML file with these options as keys.")] = None
    debug: Annotated[bool, option("Show tracebacks.")] = False


@dataclass(kw_only=True)
class ReportConfig:
    """Write report.html, report.md and results.csv from results.json."""

    run: Annotated[
        Path | None, option("Folder with a results.json: a run that was evaluated, or an evaluation of many.")
    ] = None
    certificate: Annotated[
        bool, option("Also write certificate.html: what was measured of each LoRA, on one printed page.")
    ] = False
    blur_faces: Annotated[
        bool, option("Blur the faces that the evaluation found, in the embedded pictures themselves.")
    ] = False
    max_pairs: Annotated[int, option("Before/after pairs in report.html at most; leaks and losses come first.")] = 1000
    config: Annotated[Path | None, option("YAML file with these options as keys.")] = None
    debug: Annotated[bool, option("Show tracebacks.")] = False


def as_dict(config: Any) -> dict[str, Any]:
    """A config as plain YAML/JSON values."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(config).items()}
