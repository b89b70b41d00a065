"""The kinds of base models: what their pipelines consist of. How captions condition each one is in conditioning.py.

Imports no torch: kinds are recognized before anything loads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SUPPORTED = "Stable Diffusion 1.x, 2.x, XL, 3 and 3.5 and FLUX.1 can be trained"


@dataclass(frozen=True)
class Kind:
    """What a kind's pipeline in Diffusers consists of, and how it samples."""

    name: str
    pipeline: str  # its class
    network: str = "unet"  # the component that predicts noise (or velocity), and is trained
    title: str = "UNet"  # of the network, in messages
    text_encoders: tuple[str, ...] = ("text_encoder",)
    is_flow: bool = False  # flow matching (flow.py) instead of DDPM's diffusion (diffusion.py)
    uses_guidance: bool = True  # sampling combines the prompt's prediction with that of the empty caption
    is_large: bool = False  # made for 1024 pixels: the VAE processes one image at a time

    @property
    def captions_at_once(self) -> int:
        """Captions that are encoded at once at most. T5 takes about 0.1 GB for each."""
        return 16 if self.is_flow else 256

    @property
    def components(self) -> tuple[str, ...]:
        """The pipeline's networks."""
        return (self.network, "vae", *self.text_encoders)

    @property
    def sampler(self) -> str:
        """The name of the sampler that images are generated with."""
        return "FlowMatchEuler" if self.is_flow else "DDIM"

    @property
    def multiple(self) -> int:
        """What an image's side is a multiple of, in pixels: the VAE scales down by 8, and transformers take patches."""
        return 16 if self.is_flow else 8


_TWO, _THREE = ("text_encoder", "text_encoder_2"), ("text_encoder", "text_encoder_2", "text_encoder_3")
KINDS = {
    kind.name: kind
    for kind in (
        Kind("sd1", "StableDiffusionPipeline"),
        Kind("sd2", "StableDiffusionPipeline"),
        Kind("sdxl", "StableDiffusionXLPipeline", text_encoders=_TWO, is_large=True),
        Kind("sd3", "StableDiffusion3Pipeline", "transformer", "transformer", _THREE, is_flow=True, is_large=True),
        Kind("flux", "FluxPipeline", "transformer", "transformer", _TWO, True, uses_guidance=False, is_large=True),
    )
}
PIPELINES = tuple(dict.fromkeys(kind.pipeline for kind in KINDS.values()))
NETWORKS = tuple(dict.fromkeys(kind.network for kind in KINDS.values()))
COMPONENTS = tuple(dict.fromkeys(name for kind in KINDS.values() for name in kind.components))


def kind_of(network: Mapping[str, Any]) -> str:
    """A key of KINDS, by the configuration of a UNet or transformer, whatever its width.

    Among UNets only XL embeds sizes and a pooled caption, and only SD 1.x enters its transformers by a convolution.
    """
    if "num_single_layers" in network:
        return "flux"
    if "caption_projection_dim" in network:
        return "sd3"
    if network.get("addition_embed_type") == "text_time":
        return "sdxl"
    return "sd2" if network.get("use_linear_projection") else "sd1"


def pooled_width_of(network: Mapping[str, Any]) -> int | None:
    """Width of the pooled text embedding that a network takes besides the tokens; None if it takes none."""
    if "pooled_projection_dim" in network:
        return int(network["pooled_projection_dim"])
    if kind_of(network) == "sdxl":
        return int(network["projection_class_embeddings_input_dim"] - 6 * network["addition_time_embed_dim"])
    return None


def sampler_of(base: Mapping[str, Any]) -> str:
    """The name of the sampler that images of a base are generated with. base: its record (Base.describe)."""
    return KINDS[base.get("kind", "sd1")].sampler


def network_name(pipeline: Any) -> str:
    """The attribute of a pipeline that holds its UNet or transformer."""
    return next(name for name in NETWORKS if hasattr(pipeline, name))
