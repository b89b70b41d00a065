"""Refuse pipelines that cannot be trained: by their class, network, noise schedule and prediction type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sd_unlearn.errors import UsageError
from sd_unlearn.models.kinds import KINDS, PIPELINES, SUPPORTED, Kind, kind_of
from sd_unlearn.models.source import FLOW, OPTION, Source

PREDICTIONS = ("epsilon", "v_prediction")


def check_class(name: str, pipeline: object) -> None:
    """Refuse a pipeline class (of model_index.json) that cannot be trained.

    Raises:
        UsageError
    """
    if pipeline not in PIPELINES:
        raise UsageError(f"{OPTION} {name} is a {pipeline}. {SUPPORTED} ({' or '.join(PIPELINES)}).")


def check_drop_t5(source: Source, kind: str) -> None:
    """Refuse --drop_t5 for another kind than SD 3.

    Raises:
        UsageError
    """
    if source.drop_t5 and kind != "sd3":
        raise UsageError(f"--drop_t5 is for Stable Diffusion 3 and 3.5; {source.name} is of kind {kind}. Leave it out.")


def check_network(name: str, network: Mapping[str, Any], latent_channels: int) -> None:
    """Refuse a UNet or transformer that takes more than latents (of the VAE), a timestep and a caption.

    Raises:
        UsageError
    """
    channels = network.get("in_channels", 4)
    if KINDS[kind_of(network)].is_flow:
        kind = KINDS[kind_of(network)]
        expected = network.get("out_channels") or kind.channels
        if kind.name == "qwen-image":  # whose configuration counts the channels of a latent, not of a patch
            expected = kind.channels
        if channels != expected:
            raise UsageError(f"{OPTION} {name} takes {channels} channels instead of {expected}. {SUPPORTED}.")
        return
    if channels != latent_channels:
        what = {9: ", an inpainting model", 8: ", an InstructPix2Pix model"}.get(channels, "")
        raise UsageError(
            f"{OPTION} {name} takes {channels} channels instead of a latent's {latent_channels}{what}. {SUPPORTED}."
        )
    if network.get("time_cond_proj_dim"):
        raise UsageError(f"{OPTION} {name} is a distilled (LCM) model. {SUPPORTED}; use its teacher model.")


def check_schedule(name: str, kind: Kind, scheduler: str) -> None:
    """Refuse a scheduler class whose noise schedule is not the kind's: DDPM's, or that of flow matching.

    Raises:
        UsageError
    """
    if kind.is_flow:
        if not scheduler.startswith("FlowMatch"):
            raise UsageError(f"{OPTION} {name} has the scheduler {scheduler}, but {kind.pipeline} needs FlowMatch.")
        return
    if scheduler.startswith(("EDM", "FlowMatch")):
        raise UsageError(f"{OPTION} {name} has the noise schedule of {scheduler}, not DDPM's. {SUPPORTED}.")


def check_prediction(source: Source, prediction_type: str | None) -> None:
    """Refuse a prediction type that is not supported or contradicts --prediction_type.

    prediction_type: None if it is not known yet.

    Raises:
        UsageError
    """
    if prediction_type is None:
        return
    if prediction_type not in (*PREDICTIONS, FLOW):
        raise UsageError(
            f"{OPTION} {source.name} predicts {prediction_type}; {' and '.join(PREDICTIONS)} are supported."
        )
    if source.prediction_type not in (None, prediction_type):
        raise UsageError(
            f"--prediction_type {source.prediction_type}: {source.name} predicts {prediction_type} according to its "
            "configuration. Leave the option out."
        )
