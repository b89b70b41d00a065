"""Options of `fuse`. Imports no torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from sd_unlearn.choices import Precision
from sd_unlearn.config.options import GENERAL, NOT_NEGATIVE, START, ConfigFile, Debug, Range, option, several
from sd_unlearn.config.paths import PathOptions

FuseMethod = Literal["least_squares", "sum"]


@dataclass(kw_only=True)
class FuseConfig(PathOptions):
    """Fuse LoRAs that were trained apart on the same base into one."""

    lora: Annotated[
        list[str],
        several("LoRAs to fuse: run folders, exported folders or .safetensors files that name their concept.", START),
    ] = field(default_factory=list, kw_only=False)
    output_dir: Annotated[
        Path | None, option("Run folder of the fused LoRA. Default: runs/<concepts>-fused.", START)
    ] = None
    pretrained_model_name_or_path: Annotated[
        str | None,
        option(
            "Where the base is now: Hub id, folder or .safetensors file. Its weights must be those of the trainings. "
            "Default: where it was then.",
            START,
        ),
    ] = None
    method: Annotated[
        FuseMethod,
        option(
            "least_squares: for each layer, the change that best keeps each LoRA's effect on images of its own "
            "concepts and the base's output on what all of them retain. sum: the sum of the changes.",
            START,
        ),
    ] = "least_squares"
    rank: Annotated[
        int | None,
        option(
            "Rank of the fused LoRA. Default: the sum of the ranks, which needs no truncation.",
            START,
            Range(above=0, at_most=4096, note="no layer of a UNet needs more"),
        ),
    ] = None
    keep_weight: Annotated[
        float,
        option(
            "Weight of retained concepts, relative to all erased ones. Higher values preserve more but erase less. Not "
            "for --method sum.",
            START,
            NOT_NEGATIVE,
        ),
    ] = 1.0
    num_images: Annotated[
        int,
        option(
            "Images to generate for each LoRA, and of retained concepts, to record the inputs of the layers; at "
            "least one per prompt. Not for --method sum.",
            START,
            Range(above=0, at_most=1000),
        ),
    ] = 4
    mixed_precision: Annotated[
        Precision,
        option(
            "Precision of the base's networks. The LoRA is computed in full precision. fp16 and bf16 need a GPU.",
            GENERAL,
        ),
    ] = "no"
    offload: Annotated[
        bool,
        option(
            "Keep the base's large layers in the computer's memory and copy each to the GPU when it computes, for "
            "bases larger than the GPU. Slower, with the same result.",
            GENERAL,
        ),
    ] = False
    allow_pickle: Annotated[
        bool, option("Also load a base with pickled weights. Pickles can run arbitrary code.", GENERAL)
    ] = False
    overwrite: Annotated[bool, option("Delete an existing run in --output_dir and start over.", GENERAL)] = False
    config: ConfigFile = None
    debug: Debug = False
