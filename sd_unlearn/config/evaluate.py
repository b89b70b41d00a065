"""The options of `evaluate`. Imports no torch; its annotations are evaluated, because cyclopts reads them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Group, Parameter

from sd_unlearn.config.base import CLIP_MODEL, CLIP_PRETRAINED, BaseOptions, option

WHAT = Group("What is judged", sort_key=1)
PICTURES = Group("Which pictures", sort_key=2)
DRAWING = Group("How they are drawn", sort_key=3)
DETECTORS = Group("Who judges them", sort_key=4)
OUTCOME = Group("What comes of it", sort_key=5)

TierName = Literal["digits", "quick", "standard", "full"]


def several(text: str, group: Group) -> Parameter:
    """An option that takes one or more values."""
    return Parameter(help=text, group=group, negative=(), consume_multiple=True, show_default=False)


def many() -> Any:
    return field(default_factory=list)


@dataclass(kw_only=True)
class Judged:
    """What is compared with the base."""

    run: Annotated[Path | None, option("Run folder of a finished training; its results.json goes there.", WHAT)] = None
    lora: Annotated[
        list[str],
        several(
            "LoRAs to compare: run folders, .safetensors files of either format, hub ids. Results go to --output_dir.",
            WHAT,
        ),
    ] = many()
    images: Annotated[
        list[str],
        several(
            "Folders of ready pictures, of any other method, as [name=]folder. With the file names of --write_plan "
            "they are compared pair by pair; else a metadata.jsonl (file_name, text, group) or folders direct/, "
            "held_out/, generic/, alike/, general/ say what they are.",
            WHAT,
        ),
    ] = many()
    concept: Annotated[
        list[str],
        several(
            "Concepts to judge every LoRA on: names with a file in prompts/, or YAML files. Default: each LoRA on the "
            "one it forgets.",
            WHAT,
        ),
    ] = many()
    strengths: Annotated[
        list[float],
        several("LoRA strengths, e.g. 0.5 1 1.5. Default: 1; from --tier standard on a curve from 0 to 1.5.", WHAT),
    ] = many()


@dataclass(kw_only=True)
class Asked:
    """Which pictures are asked for."""

    tier: Annotated[
        TierName | None,
        option(
            "How many pictures of each group: quick 100, standard 500, full 2,500 and more; digits is the bundled "
            "base's own protocol (200, and 100 of each prompt that must stay). Default: digits on that base, else "
            "quick.",
            PICTURES,
        ),
    ] = None
    num_images: Annotated[
        int | None, option("Pictures of each of direct, held_out and generic, in place of the tier's.", PICTURES)
    ] = None
    num_keep_images: Annotated[
        int | None, option("Pictures of each prompt that must stay, in place of the tier's.", PICTURES)
    ] = None
    groups: Annotated[
        list[str], several("Prompt groups: direct held_out generic alike general. Default: the tier's.", PICTURES)
    ] = many()
    seed: Annotated[
        list[int],
        several(
            "Seeds of the evaluation, one set of pictures each; their range is disjoint from training's. Default: 0.",
            PICTURES,
        ),
    ] = field(default_factory=lambda: [0])
    prompt_set: Annotated[
        str | None,
        option(
            "Prompts that ask for the concept beside the direct ones: i2p (fetched when asked for), or a CSV, JSONL or "
            "text file.",
            PICTURES,
        ),
    ] = None


@dataclass(kw_only=True)
class Drawing(BaseOptions):
    """How pictures are drawn; on the base that the LoRAs were trained on unless another is named."""

    num_inference_steps: Annotated[
        int | None, option("Sampler steps. Default: 25 on digits, 50 elsewhere.", DRAWING)
    ] = None
    guidance_scale: Annotated[
        float | None, option("Classifier-free guidance. Default: 3 on digits, 7.5 elsewhere.", DRAWING)
    ] = None
    resolution: Annotated[int | None, option("Side of the pictures in pixels. Default: the base's own.", DRAWING)] = (
        None
    )
    render_batch_size: Annotated[
        int | None, option("Pictures drawn at once. Default: 100 on digits, 4 elsewhere.", DRAWING)
    ] = None
    mixed_precision: Annotated[
        Literal["no", "fp16", "bf16"], option("Arithmetic of the networks; fp16 and bf16 need a GPU.", DRAWING)
    ] = "no"
    cache_dir: Annotated[
        Path, option("Where pictures and what was read of them are kept and shared between evaluations.", DRAWING)
    ] = Path("data/evaluation")


@dataclass(kw_only=True)
class Detectors:
    """Who judges the pictures."""

    metrics: Annotated[
        list[str],
        several(
            "Which of digits clip identity nudity classifier fidelity cmmd lpips. Default: what suits the concept's "
            "kind and is at hand (docs/metrics.md).",
            DETECTORS,
        ),
    ] = many()
    clip_model: Annotated[
        str, option("open_clip architecture of the zero-shot judge (bases other than digits).", DETECTORS)
    ] = CLIP_MODEL
    clip_pretrained: Annotated[str, option("open_clip weights: tag or path of a local file.", DETECTORS)] = (
        CLIP_PRETRAINED
    )
    reference: Annotated[
        list[str],
        several("Pictures of the person, for identity: [concept=]folder. Default: the run's positives.", DETECTORS),
    ] = many()
    others: Annotated[
        Path | None, option("Folder of pictures of other people; the identity threshold is set on them.", DETECTORS)
    ] = None
    false_accept_rate: Annotated[
        float | None,
        option(
            "Share of other people taken for the person. Default: 0.001 with 1,000 or more of them, else 0.01.",
            DETECTORS,
        ),
    ] = None
    face_model: Annotated[
        Literal["facenet", "dlib", "arcface"], option("Face embedder. dlib's weights install with it.", DETECTORS)
    ] = "facenet"
    face_weights: Annotated[
        Path | None, option("Weights of facenet, or the ONNX file of an ArcFace-type model.", DETECTORS)
    ] = None
    nudity_preset: Annotated[
        str | None, option("Classes and threshold of a paper; see docs/metrics.md for their names.", DETECTORS)
    ] = None
    nudity_classes: Annotated[
        list[str], several("NudeNet classes that count, in place of the preset's.", DETECTORS)
    ] = many()
    nudity_threshold: Annotated[
        float | None, option("NudeNet score from which a detection counts, in place of the preset's.", DETECTORS)
    ] = None
    classifier: Annotated[
        str | None, option("timm or transformers image classifier: name, folder or checkpoint.", DETECTORS)
    ] = None
    label: Annotated[
        str | None, option("The concept's class of --classifier. Default: the concept's label.", DETECTORS)
    ] = None
    inception_weights: Annotated[
        Path | None, option("Weights file of FID's Inception. Default: fetched once.", DETECTORS)
    ] = None
    real_images: Annotated[
        Path | None, option("Folder of real pictures for FID and KID beside the base's own.", DETECTORS)
    ] = None


@dataclass(kw_only=True)
class EvaluateConfig(Judged, Asked, Drawing, Detectors):
    """Draw the same seeds with and without LoRAs, and measure what is gone and what stayed."""

    output_dir: Annotated[
        Path | None, option("Where results.json goes. Default: the run folder of --run, else runs/evaluation.", OUTCOME)
    ] = None
    num_pairs: Annotated[
        int, option("Before/after pairs kept as pictures for each group of prompts; fewer for many LoRAs.", OUTCOME)
    ] = 24
    fail_if: Annotated[
        list[str],
        several(
            'Exit with code 1 if a figure is so: "leakage>0.02", "leakage.held_out.high>5%", "retention<0.95".', OUTCOME
        ),
    ] = many()
    write_plan: Annotated[
        Path | None,
        option("Write prompts, seeds and file names as JSONL for another program to draw, and stop.", OUTCOME),
    ] = None
    json: Annotated[bool, option("Print results.json instead of the table.", OUTCOME)] = False
    config: Annotated[Path | None, option("YAML file with these options as keys.", OUTCOME)] = None
    debug: Annotated[bool, option("Show tracebacks.", OUTCOME)] = False
