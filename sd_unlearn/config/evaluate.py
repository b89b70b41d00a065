"""Options of `evaluate`, in groups as --help_all shows them. Imports no torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Group

from sd_unlearn.choices import Precision, SafetyPreset
from sd_unlearn.config.base import (
    BASE_FORMS,
    CLIP_MODEL,
    CLIP_PRETRAINED,
    DEFAULT_BASE,
    BaseOptions,
    GuidanceScale,
    Resolution,
    Seed,
    Strength,
)
from sd_unlearn.config.options import (
    START,
    BatchSize,
    ConfigFile,
    Debug,
    InferenceSteps,
    Range,
    SomeImages,
    many,
    option,
    several,
)
from sd_unlearn.config.planning import PlanOptions

PROMPTS = Group("Prompts and seeds", sort_key=2)
SAMPLER = Group("Sampler", sort_key=3)
DETECTORS = Group("Detectors and metrics", sort_key=4)
OUTPUT = Group("Output", sort_key=5)

TierName = Literal["digits", "emoji", "quick", "standard", "full"]


@dataclass(kw_only=True)
class Inputs:
    """What is compared with the base."""

    run: Annotated[Path | None, option("Run folder of a finished training; results.json is written there.", START)] = (
        None
    )
    lora: Annotated[
        list[str],
        several(
            "LoRAs to compare: run folders, exported folders, .safetensors files in Diffusers or kohya format or "
            "folders of them, Hub ids. Results go to --output_dir.",
            START,
        ),
    ] = many()
    images: Annotated[
        list[str],
        several(
            "Folders of images made by another method, as [name=]folder; needs --concept. With the file names of "
            "--write_plan they are compared with the base pair by pair. Other folders need a metadata.jsonl "
            "(file_name, text, group) or subfolders direct/, held_out/, generic/, alike/, general/.",
            START,
        ),
    ] = many()
    sld: Annotated[
        list[SafetyPreset],
        several(
            "Also evaluate the base with safe latent diffusion, which guides sampling away from the concept's name: "
            "weak, medium, strong, max (the paper's presets). Without a LoRA it needs --concept.",
            PROMPTS,
        ),
    ] = many()
    concept: Annotated[
        list[str],
        several(
            "Concepts to evaluate every LoRA on: bundled concepts, names of files in prompts/, or YAML files. Default: "
            "the concept each LoRA was trained on.",
            START,
        ),
    ] = many()
    strengths: Annotated[
        list[float],
        several(
            "LoRA strengths, e.g. 0.5 1 1.5. Default: 1; with --tier standard or full, 0 to 1.5 in steps of 0.25.",
            PROMPTS,
            Strength,
        ),
    ] = many()


@dataclass(kw_only=True)
class Prompts:
    """Which prompts are used, and how many images are generated for them."""

    tier: Annotated[
        TierName | None,
        option(
            "How many images. quick: 100 each of direct, alike and general. standard: 500 each of direct, held_out, "
            "generic and alike, and 1,000 of general. full: 2,500 and 10,000. digits: 200 each of direct, held_out and "
            "generic, and 100 per keep prompt. emoji: 100, 100 and 200, 20 per alike and 4 per general prompt. "
            "standard and full evaluate seven strengths, 0 to 1.5. Default: the bundled base's, else quick.",
            START,
        ),
    ] = None
    num_images: Annotated[
        int | None,
        option("Images for each of direct, held_out and generic, instead of the tier's number.", PROMPTS, SomeImages),
    ] = None
    num_keep_images: Annotated[
        int | None, option("Images per keep prompt, instead of the tier's number.", PROMPTS, SomeImages)
    ] = None
    groups: Annotated[
        list[str], several("Prompt groups: direct held_out generic alike general. Default: the tier's.", PROMPTS)
    ] = many()
    seed: Annotated[
        list[int],
        several("Evaluation seeds; each adds a full set of images. Default: 0.", PROMPTS, Seed),
    ] = field(default_factory=lambda: [0])
    prompt_set: Annotated[
        str | None,
        option(
            "Extra prompts that ask for the concept: i2p (downloaded on first use), or a CSV, JSONL or text file. Each "
            "gets at least one image unless --num_images is given.",
            PROMPTS,
        ),
    ] = None
    prompt_category: Annotated[
        str | None,
        option("Only the prompts of --prompt_set with this category, e.g. sexual of i2p. Default: all.", PROMPTS),
    ] = None


@dataclass(kw_only=True)
class SamplerOptions(BaseOptions):
    """How images are generated."""

    pretrained_model_name_or_path: Annotated[
        str | None,
        option(
            f"{BASE_FORMS} Default: the base that the run or file records; without a record the concept file's base, "
            f"else {DEFAULT_BASE}.",
            START,
        ),
    ] = None
    num_inference_steps: Annotated[
        int | None,
        option(
            "Sampling steps. Default: 25 on digits, 12 on emoji, else as usual for the base (SD 1.x: 50, SD 3: 28).",
            SAMPLER,
            InferenceSteps,
        ),
    ] = None
    guidance_scale: Annotated[
        float | None,
        option(
            "Classifier-free guidance. Default: 3 on the bundled bases, else as usual for the base (SD 1.x: 7.5).",
            SAMPLER,
            GuidanceScale,
        ),
    ] = None
    resolution: Annotated[
        int | None, option("Width and height of the images in pixels. Default: the base's own.", SAMPLER, Resolution)
    ] = None
    render_batch_size: Annotated[
        int | None,
        option(
            "Images generated at once. Default: 100 on the bundled bases, 4 otherwise; fewer if memory is short.",
            SAMPLER,
            BatchSize,
        ),
    ] = None
    mixed_precision: Annotated[Precision, option("Precision of the networks; fp16 and bf16 need a GPU.", START)] = "no"
    cache_dir: Annotated[
        Path, option("Folder where images and detector outputs are cached and shared between evaluations.", SAMPLER)
    ] = Path("data/evaluation")


@dataclass(kw_only=True)
class Detectors:
    """Which detectors and metrics are applied, and their settings."""

    metrics: Annotated[
        list[str],
        several(
            "Metrics: digits emoji clip identity nudity classifier fidelity cmmd lpips. Default: the installed metrics "
            "that suit the concept's type (docs/metrics.md).",
            START,
        ),
    ] = many()
    clip_model: Annotated[
        str, option("open_clip architecture of the zero-shot classifier (bases that are not bundled).", DETECTORS)
    ] = CLIP_MODEL
    clip_pretrained: Annotated[str, option("open_clip weights: tag or local file.", DETECTORS)] = CLIP_PRETRAINED
    reference: Annotated[
        list[str],
        several(
            "Photos of the person for identity, as [concept=]folder; name the concept if several people are evaluated. "
            "Default: the positive images.",
            START,
        ),
    ] = many()
    others: Annotated[
        Path | None, option("Folder with photos of other people; calibrates the identity threshold.", START)
    ] = None
    false_accept_rate: Annotated[
        float | None,
        option(
            "Accepted share of other people's faces that count as the person. Default: 0.001 with 1,000 or more faces, "
            "else 0.01.",
            DETECTORS,
            Range(above=0, below=1),
        ),
    ] = None
    face_model: Annotated[
        Literal["facenet", "dlib", "arcface"],
        option("Face embedding model. The weights of dlib are installed with it.", DETECTORS),
    ] = "facenet"
    face_weights: Annotated[Path | None, option("Weights of facenet, or ONNX file of an ArcFace model.", DETECTORS)] = (
        None
    )
    nudity_preset: Annotated[
        str | None, option("Classes and threshold of a paper; docs/metrics.md lists the presets.", DETECTORS)
    ] = None
    nudity_classes: Annotated[
        list[str], several("NudeNet classes that count as nudity, instead of the preset's.", DETECTORS)
    ] = many()
    nudity_threshold: Annotated[
        float | None, option("Minimum NudeNet score of a detection, instead of the preset's.", DETECTORS)
    ] = None
    classifier: Annotated[
        str | None, option("timm or transformers image classifier: name, folder or checkpoint.", DETECTORS)
    ] = None
    label: Annotated[
        str | None,
        option(
            "Class of --classifier that is the concept, if one is evaluated. Default: the concept file's label.",
            DETECTORS,
        ),
    ] = None
    inception_weights: Annotated[
        Path | None, option("Inception weights for FID. Default: downloaded on first use.", DETECTORS)
    ] = None
    real_images: Annotated[
        Path | None, option("Folder of real images for FID and KID, in addition to images of the base.", DETECTORS)
    ] = None


@dataclass(kw_only=True)
class EvaluateConfig(PlanOptions, Detectors, SamplerOptions, Prompts, Inputs):
    """Generate images from the same seeds with and without LoRAs, and measure erasure and retention."""

    output_dir: Annotated[
        Path | None,
        option("Folder for results.json. Default: the run folder of --run, else runs/evaluation.", START),
    ] = None
    fail_if: Annotated[
        list[str],
        several('Exit 3 if a condition holds: "leakage>0.02", "leakage.held_out.high>5%", "retention<0.95".', START),
    ] = many()
    keep_going: Annotated[
        bool,
        option("Evaluate the other LoRAs if one cannot be evaluated, and print the outcome of each.", OUTPUT),
    ] = False
    write_plan: Annotated[
        Path | None,
        option(
            "Write prompts, seeds and file names as JSONL for generation by another program, and exit. Only an "
            "earlier plan is replaced.",
            OUTPUT,
        ),
    ] = None
    json: Annotated[bool, option("Print results.json instead of the table.", OUTPUT)] = False
    config: ConfigFile = None
    debug: Debug = False
