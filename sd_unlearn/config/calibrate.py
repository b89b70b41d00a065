"""Options of `calibrate`, in groups as --help_all shows them. Imports no torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from cyclopts import Group

from sd_unlearn.config.base import Seed
from sd_unlearn.config.evaluate import Detectors, SamplerOptions, TierName
from sd_unlearn.config.options import GENERAL, START, ConfigFile, Debug, Range, SomeImages, option, several

SEARCH = Group("Search", sort_key=1)
PROMPTS = Group("Prompts and seeds", sort_key=2)


@dataclass(kw_only=True)
class CalibrateConfig(Detectors, SamplerOptions):
    """Find the strengths of a LoRA that erase enough and retain enough."""

    run: Annotated[
        Path | None, option("Run folder of a finished training; calibration.json is written there.", START)
    ] = None
    lora: Annotated[
        str | None,
        option(
            "LoRA to calibrate instead of --run: run folder, exported folder, .safetensors file or Hub id. "
            "calibration.json goes to --output_dir.",
            START,
        ),
    ] = None
    concept: Annotated[
        str | None,
        option("Concept to measure: a bundled concept or a .yaml file. Default: the one the LoRA erases.", START),
    ] = None
    leakage: Annotated[
        float,
        option(
            "Largest accepted leakage: the upper end of its 95 % interval must be below this.",
            START,
            Range(above=0, below=1),
        ),
    ] = 0.05
    retention: Annotated[
        float,
        option("Smallest accepted retention; it must be above this. 0: any.", START, Range(at_least=0, below=1)),
    ] = 0.95
    max_strength: Annotated[float, option("Largest strength to try.", SEARCH, Range(above=0, at_most=10))] = 2.0
    step: Annotated[float, option("Precision of the strengths.", SEARCH, Range(at_least=0.01, at_most=1))] = 0.05
    tier: Annotated[
        TierName | None,
        option("Number of images, as for evaluate. Default: the bundled base's, else quick.", PROMPTS),
    ] = None
    num_images: Annotated[
        int | None, option("Images per group of the concept, instead of the tier's number.", PROMPTS, SomeImages)
    ] = None
    num_keep_images: Annotated[
        int | None, option("Images per keep prompt, instead of the tier's number.", PROMPTS, SomeImages)
    ] = None
    groups: Annotated[
        list[str],
        several(
            "Prompt groups: direct held_out generic alike general. Each of the first three must satisfy --leakage. "
            "Default: direct alike general.",
            PROMPTS,
        ),
    ] = field(default_factory=lambda: ["direct", "alike", "general"])
    seed: Annotated[
        list[int], several("Evaluation seeds; each adds a full set of images. Default: 0.", PROMPTS, Seed)
    ] = field(default_factory=lambda: [0])
    output_dir: Annotated[
        Path | None,
        option("Folder for calibration.json. Default: the run folder of --run, else runs/calibration.", START),
    ] = None
    json: Annotated[bool, option("Print calibration.json instead of the table.", GENERAL)] = False
    config: ConfigFile = None
    debug: Debug = False
