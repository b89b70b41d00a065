"""The kinds of base models: what their pipelines consist of. How captions condition each one is in conditioning.py.

Imports no torch: kinds are recognized before anything loads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

SUPPORTED = "Stable Diffusion 1.x, 2.x, XL, 3 and 3.5, FLUX.1, FLUX.2, Z-Image and Qwen-Image can be trained"
# How captions become tokens: CLIP's alone, CLIP's and T5's, or those of a language model with a chat template.
Reading = Literal["clip", "t5", "chat"]
# Where the pipeline puts the prompts if it guides: into half of the network's batch, or into a pass of their own.
PromptsIn = Literal["first half", "second half", "first pass"]


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
    prompts_in: PromptsIn = "second half"
    is_large: bool = False  # made for 1024 pixels: the VAE processes one image at a time
    network_class: str = "UNet2DConditionModel"  # in Diffusers
    vae_class: str = "AutoencoderKL"  # in Diffusers
    reading: Reading = "clip"
    chat_class: str = ""  # of the text encoder in transformers, if it is a language model
    hidden_states: int = 1  # of the text encoder that are put side by side
    channels: int = 4  # that the network takes
    extra_guidance: float = 0.0  # what the pipeline adds to --guidance_scale: Z-Image's is f + g (f - u)

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

    def guidance_of(self, scale: float) -> float:
        """The s of u + s (f - u) with which images are generated at this --guidance_scale; 1 without guidance."""
        return max(1.0, scale + self.extra_guidance) if self.uses_guidance else 1.0


def _transformer(name: str, pipeline: str, network_class: str, channels: int, **own: Any) -> Kind:
    """A kind with a transformer that is trained by flow matching at 1024 pixels."""
    common = {"network": "transformer", "title": "transformer", "is_flow": True, "is_large": True, "reading": "t5"}
    return Kind(name, pipeline, network_class=network_class, channels=channels, **(common | own))  # type: ignore[arg-type]


def _chat(name: str, pipeline: str, network_class: str, channels: int, chat_class: str, **own: Any) -> Kind:
    """The same with a language model as text encoder."""
    return _transformer(name, pipeline, network_class, channels, reading="chat", chat_class=chat_class, **own)


_FLUX2: dict[str, Any] = {"hidden_states": 3, "vae_class": "AutoencoderKLFlux2", "prompts_in": "first pass"}
_QWEN: dict[str, Any] = {"vae_class": "AutoencoderKLQwenImage", "prompts_in": "first pass"}
_Z: dict[str, Any] = {"extra_guidance": 1.0, "prompts_in": "first half"}
_MISTRAL, _QWEN_VL = "Mistral3ForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"
_TWO, _THREE = ("text_encoder", "text_encoder_2"), ("text_encoder", "text_encoder_2", "text_encoder_3")
KINDS = {
    kind.name: kind
    for kind in (
        Kind("sd1", "StableDiffusionPipeline"),
        Kind("sd2", "StableDiffusionPipeline"),
        Kind("sdxl", "StableDiffusionXLPipeline", text_encoders=_TWO, is_large=True),
        _transformer("sd3", "StableDiffusion3Pipeline", "SD3Transformer2DModel", 16, text_encoders=_THREE),
        _transformer("flux", "FluxPipeline", "FluxTransformer2DModel", 64, text_encoders=_TWO, uses_guidance=False),
        _chat("flux2", "Flux2Pipeline", "Flux2Transformer2DModel", 128, _MISTRAL, uses_guidance=False, **_FLUX2),
        _chat("flux2-klein", "Flux2KleinPipeline", "Flux2Transformer2DModel", 128, "Qwen3ForCausalLM", **_FLUX2),
        _chat("z-image", "ZImagePipeline", "ZImageTransformer2DModel", 16, "Qwen3Model", **_Z),
        _chat("qwen-image", "QwenImagePipeline", "QwenImageTransformer2DModel", 64, _QWEN_VL, **_QWEN),
    )
}
PIPELINES = tuple(dict.fromkeys(kind.pipeline for kind in KINDS.values()))
NETWORKS = tuple(dict.fromkeys(kind.network for kind in KINDS.values()))
COMPONENTS = tuple(dict.fromkeys(name for kind in KINDS.values() for name in kind.components))


def kind_of(network: Mapping[str, Any]) -> str:
    """A key of KINDS, by the configuration of a UNet or transformer, whatever its width.

    Among UNets only XL embeds sizes and a pooled caption, and only SD 1.x enters its transformers by a convolution.
    """
    if "cap_feat_dim" in network:
        return "z-image"
    if "timestep_guidance_channels" in network:
        return "flux2" if network.get("guidance_embeds", True) else "flux2-klein"
    if "num_single_layers" in network:
        return "flux"
    if "axes_dims_rope" in network:
        return "qwen-image"
    if "caption_projection_dim" in network:
        return "sd3"
    if network.get("addition_embed_type") == "text_time":
        return "sdxl"
    return "sd2" if network.get("use_linear_projection") else "sd1"


def text_width_of(network: Mapping[str, Any]) -> int | None:
    """Width of the text encoders' hidden states that a network takes; None if its configuration does not say."""
    names = ("joint_attention_dim", "cap_feat_dim", "cross_attention_dim")
    found = next((network[name] for name in names if network.get(name)), None)
    return found // KINDS[kind_of(network)].hidden_states if isinstance(found, int) else found


def pooled_width_of(network: Mapping[str, Any]) -> int | None:
    """Width of the pooled text embedding that a network takes besides the tokens; None if it takes none."""
    if "pooled_projection_dim" in network and KINDS[kind_of(network)].reading != "chat":
        return int(network["pooled_projection_dim"])
    if kind_of(network) == "sdxl":
        return int(network["projection_class_embeddings_input_dim"] - 6 * network["addition_time_embed_dim"])
    return None


def channels_of(vae: Mapping[str, Any]) -> int:
    """The channels of a VAE's latents, by its configuration."""
    return int(vae.get("latent_channels") or vae.get("z_dim") or 4)


def sampler_of(base: Mapping[str, Any]) -> str:
    """The name of the sampler that images of a base are generated with. base: its record (Base.describe)."""
    return KINDS[base.get("kind", "sd1")].sampler


def network_name(pipeline: Any) -> str:
    """The attribute of a pipeline that holds its UNet or transformer."""
    return next(name for name in NETWORKS if hasattr(pipeline, name))
