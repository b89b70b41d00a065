"""Options of `train`, in groups as --help_all shows them. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from sd_unlearn.choices import ObjectiveName
from sd_unlearn.config.base import RenderConfig
from sd_unlearn.config.loop import FLOW_STEPS, STEPS, STEPS_OF_EACH, LoopOptions, Performance
from sd_unlearn.config.objective import REUSE, LoraTargets, Noise, Objective, Weights
from sd_unlearn.config.options import (
    START,
    option,
)


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
    overwrite: Annotated[bool, option("Delete an existing run in --output_dir and start over.", START)] = False


# --objective -> the layers that it trains by definition
TARGETS_OF: dict[ObjectiveName, LoraTargets] = {"esd-x": "cross_attention", "esd-u": "not_cross_attention"}


def default_lora_targets(objective: ObjectiveName) -> LoraTargets:
    """The layers that get a LoRA if --lora_targets is not given."""
    return TARGETS_OF.get(objective, "all_linear+conv")


def resolve_steps(config: TrainConfig, concepts: int, is_flow: bool) -> int:
    """The number of training steps, given or by default. concepts: at once; is_flow: of a transformer."""
    return config.max_train_steps or max(FLOW_STEPS if is_flow else STEPS, STEPS_OF_EACH * concepts)


def resolve_teacher_reuse(config: TrainConfig, concepts: int) -> int:
    """How often the images and noise of a step are used, given or by default. concepts: at once."""
    if config.teacher_reuse is not None:
        return config.teacher_reuse
    return REUSE if (config.objective, config.target, concepts) == ("pu", "teacher", 1) else 1
