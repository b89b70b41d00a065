"""Options of `render`, `export` and `report`: each field is a flag, a YAML key and part of the run's record."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Group

from sd_unlearn.choices import Precision, TemplateKind
from sd_unlearn.config.options import (
    GENERAL,
    START,
    BatchSize,
    ConfigFile,
    Count,
    Debug,
    InferenceSteps,
    NumImages,
    Range,
    option,
    several,
)
from sd_unlearn.config.paths import PathOptions
from sd_unlearn.config.planning import PlanOptions
from sd_unlearn.seeds import SEED_SPAN

DEFAULT_BASE = "CompVis/stable-diffusion-v1-4"
CLIP_MODEL, CLIP_PRETRAINED = "ViT-B-32", "laion2b_s34b_b79k"

BASE_FORMS = (
    "Base model (SD 1.x, 2.x, XL, 3, 3.5, FLUX.1, FLUX.2, Z-Image, Qwen-Image): Hub id, folder, .safetensors file, "
    "digits, digits-sd3 or emoji."
)

BASE = Group("Base model", sort_key=10)
IMAGES = Group("Training images to generate", sort_key=11)

Seed = Range(at_least=0, below=SEED_SPAN)
Resolution = Range(above=0, at_most=8192, multiple_of=8, note="the VAE scales images down by 8")
Strength = Range(at_least=-10, at_most=10, note="1 is as trained")
GuidanceScale = Range(at_least=0, note="usually 3 to 10")


@dataclass(kw_only=True)
class ConceptOption(PathOptions):
    """The concept, as a flag or as the first argument: cyclopts accepts it in both ways if it is the first field."""

    concept: Annotated[
        list[str] | str | None,
        several(
            'Concept to erase: a bundled concept (e.g. seven or "Brad Pitt"), a .yaml file, or any name with --anchor. '
            "Several are erased together: seven three, or a .yaml file with a list.",
            START,
        ),
    ] = field(default=None, kw_only=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.concept, list) and len(self.concept) == 1:  # recorded as it was given
            self.concept = self.concept[0]


@dataclass(kw_only=True)
class BaseOptions(PathOptions):
    """Which base model is used, and how it is loaded."""

    pretrained_model_name_or_path: Annotated[
        str | None,
        option(f"{BASE_FORMS} Default: the concept file's base, else {DEFAULT_BASE}.", START),
    ] = None
    vae: Annotated[
        str | None, option("VAE to use instead of the base's own: Hub id, folder or .safetensors file.", BASE)
    ] = None
    prediction_type: Annotated[
        Literal["epsilon", "v_prediction"] | None,
        option("Prediction type of a single file that does not record it. Default: read from the base.", BASE),
    ] = None
    variant: Annotated[
        str | None,
        option("Weights to load from a folder or Hub id, e.g. fp16. Default: the full weights, else fp16.", BASE),
    ] = None
    single_file_config: Annotated[
        str | None,
        option("Diffusers folder with the configuration of a single file with a non-standard architecture.", BASE),
    ] = None
    drop_t5: Annotated[
        bool,
        option(
            "Load Stable Diffusion 3 or 3.5 without its third text encoder, T5, which takes 9.5 GB in fp16.",
            BASE,
        ),
    ] = False
    offload: Annotated[
        bool,
        option(
            "Keep the base's large layers in the computer's memory and copy each to the GPU when it computes, for "
            "bases larger than the GPU. Slower, with the same result.",
            BASE,
        ),
    ] = False
    allow_pickle: Annotated[
        bool, option("Also load .ckpt and .bin weights. They are pickles, which can run arbitrary code.", BASE)
    ] = False


@dataclass(kw_only=True)
class RenderConfig(PlanOptions, BaseOptions, ConceptOption):
    """Generate the unlabeled and the positive training images of a concept from its prompts."""

    anchor: Annotated[
        str | None,
        option(
            'For a concept without a file: what to generate instead, e.g. "a middle aged man". --kind chooses the '
            "prompts and what is retained.",
            START,
        ),
    ] = None
    kind: Annotated[
        TemplateKind | None,
        option("Kind of a concept without a file (--anchor). Default: other.", START),
    ] = None
    data_dir: Annotated[
        Path | None,
        option("Folder with the training images in 0_unlabeled and 1_positive. Default: data/<concept>.", START),
    ] = None
    num_unlabeled: Annotated[
        int | None,
        option("Images of the generic prompt in 0_unlabeled. Default: the concept file's.", IMAGES, NumImages),
    ] = None
    num_positive: Annotated[
        int | None, option("Images of the concept in 1_positive. Default: the concept file's.", IMAGES, NumImages)
    ] = None
    num_mixed_in: Annotated[
        int | None,
        option("Images of the concept among those in 0_unlabeled. Default: the concept file's.", IMAGES, NumImages),
    ] = None
    num_keep: Annotated[
        int | None,
        option(
            "Images of each keep line in 0_unlabeled, split over its alternatives. Default: the concept file's.",
            IMAGES,
            NumImages,
        ),
    ] = None
    resolution: Annotated[
        int | None, option("Width and height of the images in pixels. Default: the base's own.", IMAGES, Resolution)
    ] = None
    num_inference_steps: Annotated[
        int | None,
        option(
            "Sampling steps. Default: 25 on digits, 12 on emoji, else as usual for the base (SD 1.x: 50, SD 3: 28).",
            IMAGES,
            InferenceSteps,
        ),
    ] = None
    guidance_scale: Annotated[
        float | None,
        option(
            "Classifier-free guidance. Default: 3 on the bundled bases, else as usual for the base (SD 1.x: 7.5).",
            IMAGES,
            GuidanceScale,
        ),
    ] = None
    render_batch_size: Annotated[
        int | None,
        option(
            "Images generated at once. Default: 100 on the bundled bases, 4 otherwise; fewer if memory is short.",
            IMAGES,
            BatchSize,
        ),
    ] = None
    seed: Annotated[
        int,
        option(
            "Random seed of the training, and of new training images; existing ones are used as they are.",
            GENERAL,
            Seed,
        ),
    ] = 0
    mixed_precision: Annotated[
        Precision | None,
        option(
            "Precision of the networks. Default: what `accelerate launch` sets, else no. Without a GPU it is full "
            "precision, with a message.",
            START,
        ),
    ] = None
    config: ConfigFile = None
    debug: Debug = False


@dataclass(kw_only=True)
class ExportConfig(PathOptions):
    """Write the LoRA for Diffusers, ComfyUI and A1111 with a model card, or merge it into a checkpoint."""

    run: Annotated[Path | None, option("Run folder of a finished training.")] = None
    output_dir: Annotated[
        Path | None, option("Folder for the LoRA files and the model card. Default: <run>/export.")
    ] = None
    dtype: Annotated[
        Literal["fp32", "fp16"],
        option("Data type of the written weights. fp32 is exact; fp16 takes half the space and is common."),
    ] = "fp32"
    merge: Annotated[
        Path | None,
        option(
            "Also write a whole checkpoint with the LoRA merged into the base: a Diffusers folder, or one file for "
            "ComfyUI and A1111 if the path ends in .safetensors. After --method full this is the only export."
        ),
    ] = None
    pretrained_model_name_or_path: Annotated[
        str | None,
        option(
            "Where the base is now, for --merge and DoRA: Hub id, folder or .safetensors file. Its weights must be "
            "those of the training. Default: where it was then."
        ),
    ] = None
    strength: Annotated[
        float,
        option("LoRA strength that --merge applies: 1 is as trained and evaluated, 0 is the base.", None, Strength),
    ] = 1.0
    license: Annotated[
        str | None,
        option(
            "License of the LoRA for the model card and the file header, as a Hub id, e.g. openrail++. Default: the "
            "license of the base, if the base is a common one."
        ),
    ] = None
    push_to_hub: Annotated[
        str | None,
        option(
            "Upload LoRA, model card and report to this Hugging Face repository (owner/name); it is created if "
            "missing. Log in first with `hf auth login`, or set HF_TOKEN."
        ),
    ] = None
    private: Annotated[bool, option("Create the repository of --push_to_hub as private.")] = False
    allow_pickle: Annotated[bool, option("Also load a base with pickled weights. Pickles can run arbitrary code.")] = (
        False
    )
    config: ConfigFile = None
    debug: Debug = False


@dataclass(kw_only=True)
class ReportConfig(PathOptions):
    """Write report.html, report.md and results.csv from results.json."""

    run: Annotated[
        Path | None, option("Folder with a results.json: an evaluated run, or an evaluation of several LoRAs.")
    ] = None
    certificate: Annotated[
        bool, option("Also write certificate.html: one printable page per LoRA with what was measured.")
    ] = False
    blur_faces: Annotated[bool, option("Blur the faces that the evaluation found, in the image data itself.")] = False
    max_pairs: Annotated[
        int, option("Maximum number of before/after pairs in report.html; leaks and losses come first.", None, Count)
    ] = 1000
    config: ConfigFile = None
    debug: Debug = False
