"""The conditioning of each kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sd_unlearn.models.chat import (
    Flux2DevConditioning,
    Flux2KleinConditioning,
    QwenImageConditioning,
    ZImageConditioning,
)
from sd_unlearn.models.conditioning import FluxConditioning, SD3Conditioning, TextConditioning, XLConditioning
from sd_unlearn.models.kinds import kind_of, pooled_width_of


def conditioning_of(network: Mapping[str, Any], pixels_per_latent: int, pipeline: Any = None) -> TextConditioning:
    """The conditioning of a base's network, by its configuration. pipeline: None if nothing is loaded."""
    kind, pooled = kind_of(network), pooled_width_of(network)
    if kind == "z-image":
        return ZImageConditioning()
    if kind == "qwen-image":
        return QwenImageConditioning(*([pipeline.prompt_template_encode] if pipeline else []))
    if kind in ("flux2", "flux2-klein"):
        is_distilled = pipeline and pipeline.config.get("is_distilled")
        return (Flux2DevConditioning if kind == "flux2" else Flux2KleinConditioning)(4 if is_distilled else 50)
    if pooled is None:
        return TextConditioning()
    if kind == "flux":
        return FluxConditioning(pooled, pixels_per_latent, bool(network.get("guidance_embeds")))
    return (SD3Conditioning if kind == "sd3" else XLConditioning)(pooled, pixels_per_latent)
