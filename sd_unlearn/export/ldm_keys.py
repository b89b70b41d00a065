"""The LDM (sgm) layout of single-file checkpoints: its names for what Diffusers calls otherwise, as small rules.

A key may be a parameter's or a module's. ComfyUI, A1111 and Forge read checkpoints in this layout, and SDXL LoRAs
under its names. Diffusers' own from_single_file goes the other way; both are held against each other in the tests.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sd_unlearn.errors import UnlearnError

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP = {"sd1": "cond_stage_model.transformer.text_model.", "sdxl": "conditioner.embedders.0.transformer.text_model."}
OPEN_CLIP = {"sd2": "cond_stage_model.model.", "sdxl": "conditioner.embedders.1.model."}

_PLACES = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_BLOCK = re.compile(r"(?P<side>down|up)_blocks\.(?P<i>\d+)\.(?P<part>\w+)\.(?P<j>\d+)\.(?P<inner>.+)")

_VAE_RULES = (
    (r"^encoder\.down_blocks\.(\d+)\.", r"encoder.down.\1."),
    (r"\.resnets\.(\d+)\.", r".block.\1."),
    (r"\.downsamplers\.0\.", ".downsample."),
    (r"\.upsamplers\.0\.", ".upsample."),
    (r"\.mid_block\.block\.0\.", ".mid.block_1."),
    (r"\.mid_block\.block\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
    (r"\.attn_1\.to_([qkv])\.", r".attn_1.\1."),
    (r"\.attn_1\.to_out\.0\.", ".attn_1.proj_out."),
    (r"\.attn_1\.group_norm\.", ".attn_1.norm."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
)
_OPEN_CLIP_RULES = (
    (r"^embeddings\.token_embedding\.", "token_embedding."),
    (r"^embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^final_layer_norm\.", "ln_final."),
    (r"^text_projection\.weight$", "text_projection"),
    (r"^encoder\.layers\.", "transformer.resblocks."),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"\.self_attn\.", ".attn."),
)


@dataclass(frozen=True)
class Layout:
    """What the numbering of a UNet's blocks depends on; as it is, SDXL's."""

    layers_per_block: int = 2
    up_attention: tuple[bool, ...] = (True, True, False)  # whether each up block has attention


SDXL = Layout()


def layout_of(unet_config: Mapping[str, Any]) -> Layout:
    """The layout of a UNet2DConditionModel's config.

    Raises:
        UnlearnError: its blocks differ in their number of layers.
    """
    layers = unet_config["layers_per_block"]
    if not isinstance(layers, int):
        raise UnlearnError(f"The base's UNet has {layers} layers in its blocks; the LDM layout has one number for all.")
    return Layout(layers, tuple(kind.startswith("CrossAttn") for kind in unet_config["up_block_types"]))


def unet_key(key: str, layout: Layout = SDXL) -> str:
    """A UNet's key in the LDM layout: `down_blocks.1.attentions.0.proj_in` -> `input_blocks.4.1.proj_in`.

    Raises:
        UnlearnError: the layout has no name for it.
    """
    match = _BLOCK.fullmatch(key)
    if match is not None and _exists(match, layout):
        place, part, inner = _block(match, layout), match["part"], match["inner"]
    else:
        known = next((name for name in _PLACES if f"{key}.".startswith(f"{name}.")), None)
        if known is None:
            raise UnlearnError(f'The UNet\'s "{key}" has no name in the LDM layout, so it cannot be written.')
        place, part, inner = _PLACES[known], known, key[len(known) + 1 :]
    if "resnets" in part:
        head, dot, rest = inner.partition(".")
        inner = _RESNET[head] + dot + rest
    elif part == "downsamplers":  # the convolution itself is `op`
        inner = inner.removeprefix("conv").removeprefix(".")
    return f"{place}.{inner}" if inner else place


def _exists(match: re.Match[str], layout: Layout) -> bool:
    """Whether a UNet of the layout has such a block, and such a layer in it."""
    blocks, layers, i, j = len(layout.up_attention), layout.layers_per_block, int(match["i"]), int(match["j"])
    if match["part"] in ("downsamplers", "upsamplers"):  # the last block has none
        return i < blocks - 1 and j == 0
    if match["side"] == "down":
        return i < blocks and j < layers
    return i < blocks and j <= layers and (match["part"] != "attentions" or layout.up_attention[i])


def _block(match: re.Match[str], layout: Layout) -> str:
    """Where a part of a down or up block lies. Blocks are counted through: their layers, then one to change the size.

    An upsampler has no number of its own: it is the last part of its block's last layer.
    """
    i, j, size = int(match["i"]), int(match["j"]), layout.layers_per_block + 1
    slot = {"resnets": 0, "attentions": 1, "downsamplers": 0}.get(match["part"], 1 + layout.up_attention[i])
    if match["part"] == "downsamplers":
        return f"input_blocks.{(i + 1) * size}.{slot}.op"
    if match["part"] == "upsamplers":
        return f"output_blocks.{(i + 1) * size - 1}.{slot}"
    if match["side"] == "down":
        return f"input_blocks.{1 + i * size + j}.{slot}"
    return f"output_blocks.{i * size + j}.{slot}"


def vae_key(key: str, blocks: int) -> str:
    """An AutoencoderKL's key in the LDM layout, which counts a decoder's `blocks` from the other end."""
    key = re.sub(r"^decoder\.up_blocks\.(\d+)\.", lambda found: f"decoder.up.{blocks - 1 - int(found[1])}.", key)
    return _replaced(key, _VAE_RULES)


def vae_weights(state: dict[str, Tensor], blocks: int) -> dict[str, Tensor]:
    """A VAE's weights in the LDM layout; its attention is made of 1x1 convolutions there: [C, C] -> [C, C, 1, 1]."""
    made = {vae_key(key, blocks): value for key, value in state.items()}
    return {k: v[:, :, None, None] if ".attn_1." in k and v.ndim == 2 else v for k, v in made.items()}


def open_clip_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A CLIP text encoder's weights as open_clip names and shapes them: q, k and v in one, the projection transposed.

    SD 2 reads the last layer but one of 24, and Diffusers leaves out the last, 23. Readers look for 24: the unused
    one is filled with a copy of the 23rd.
    """
    made: dict[str, Tensor] = {}
    state = {key.removeprefix("text_model."): value for key, value in state.items()}
    for key, value in state.items():
        if key.endswith("position_ids"):
            continue
        name = _replaced(key, _OPEN_CLIP_RULES)
        if name == "text_projection":
            value = value.T
        elif ".attn.k_proj." in name or ".attn.v_proj." in name:
            continue
        elif ".attn.q_proj." in name:
            value = torch.cat([state[key.replace("q_proj", f"{side}_proj")] for side in "qkv"])
            name = name.replace(".q_proj.", ".in_proj_")
        made[name] = value
    last = "transformer.resblocks.22."
    if not any(key.startswith("transformer.resblocks.23.") for key in made):
        made |= {key.replace(".22.", ".23.", 1): value for key, value in made.items() if key.startswith(last)}
    return made


def checkpoint(pipeline: Any, kind: str) -> dict[str, Tensor]:
    """All weights of an SD 1, SD 2 or SDXL pipeline in the LDM layout; kind: sd1, sd2 or sdxl.

    Raises:
        UnlearnError: the layout has no name for a part of the UNet.
    """
    layout, blocks = layout_of(pipeline.unet.config), len(pipeline.vae.config.up_block_types)
    made = {UNET + unet_key(key, layout): value for key, value in pipeline.unet.state_dict().items()}
    made |= {VAE + key: value for key, value in vae_weights(pipeline.vae.state_dict(), blocks).items()}
    if kind in CLIP:
        state = pipeline.text_encoder.state_dict()
        made |= {CLIP[kind] + key.removeprefix("text_model."): value for key, value in state.items()}
    if kind in OPEN_CLIP:
        encoder = pipeline.text_encoder_2 if kind == "sdxl" else pipeline.text_encoder
        made |= {OPEN_CLIP[kind] + key: value for key, value in open_clip_weights(encoder.state_dict()).items()}
    if kind == "sdxl" and pipeline.scheduler.config.prediction_type == "v_prediction":
        made["v_pred"] = torch.tensor([])  # how ComfyUI and Forge tell; an SD 2 that predicts v is known by its weights
        if pipeline.scheduler.config.get("rescale_betas_zero_snr"):
            made["ztsnr"] = torch.tensor([])
    return made


def _replaced(key: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key
