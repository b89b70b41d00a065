"""Rename Diffusers' weights to the LDM (sgm) layout of single-file checkpoints.

ComfyUI, A1111 and Forge read whole checkpoints in this layout, and the UNet part of SDXL LoRAs under its names
(kohya.py builds LoRA keys). A key may name a parameter or a module:

    unet_key("down_blocks.1.attentions.0.proj_in.weight")    "input_blocks.4.1.proj_in.weight"
    unet_key("mid_block.resnets.1.conv1")                    "middle_block.2.in_layers.2"
    vae_key("decoder.up_blocks.0.resnets.1.conv1.weight", blocks=4)    "decoder.up.3.block.1.conv1.weight"

Transformers (SD 3, FLUX, Z-Image) have layouts of their own (transformer_keys.py).

input_blocks.4: block 0 is conv_in, blocks 1 and 2 are the two layers of down block 0, block 3 is its downsampler, and
block 4 is the first layer of down block 1. In that layer, 0 is the resnet and 1 the attention.
Diffusers' from_single_file does the reverse; the tests check that each undoes the other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sd_unlearn.errors import UnlearnError
from sd_unlearn.models.checkpoint_header import FILE_TEXT_ENCODERS, UNET
from sd_unlearn.models.kinds import KINDS
from sd_unlearn.models.transformer_keys import original_weights

VAE = "first_stage_model."
CLIP = {"sd1": "cond_stage_model.transformer.text_model.", "sdxl": "conditioner.embedders.0.transformer.text_model."}
OPEN_CLIP = {"sd2": "cond_stage_model.model.", "sdxl": "conditioner.embedders.1.model."}


_PREFIXES = {
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
class UNetBlocks:
    """The sizes of a UNet that determine how the LDM layout numbers its blocks. Defaults: SDXL."""

    layers_per_block: int = 2
    up_attention: tuple[bool, ...] = (True, True, False)  # for each up block, whether it has attention


SDXL_BLOCKS = UNetBlocks()


def blocks_of(unet_config: Mapping[str, Any]) -> UNetBlocks:
    """Read the block sizes from the config of a UNet2DConditionModel.

    Raises:
        UnlearnError: the blocks differ in their number of layers.
    """
    layers = unet_config["layers_per_block"]
    if not isinstance(layers, int):
        raise UnlearnError(
            f"The base's UNet has {layers} layers in its blocks, but the LDM layout needs one number for all blocks. "
            "Choose a run on another base."
        )
    return UNetBlocks(layers, tuple(kind.startswith("CrossAttn") for kind in unet_config["up_block_types"]))


def unet_key(key: str, blocks: UNetBlocks = SDXL_BLOCKS) -> str:
    """Rename a UNet's key: `down_blocks.1.attentions.0.proj_in` -> `input_blocks.4.1.proj_in`.

    Raises:
        UnlearnError: a UNet with these blocks has no such module, or the LDM layout has no name for it.
    """
    match = _BLOCK.fullmatch(key)
    if match is not None and _exists(match, blocks):
        prefix, part, rest = _block(match, blocks), match["part"], match["inner"]
    else:
        known = next((name for name in _PREFIXES if f"{key}.".startswith(f"{name}.")), None)
        if known is None:
            raise UnlearnError(
                f'The UNet\'s "{key}" has no name in the LDM layout, so it cannot be written. '
                "Choose a run on a base with the blocks of Stable Diffusion."
            )
        prefix, part, rest = _PREFIXES[known], known, key[len(known) + 1 :]
    if "resnets" in part:
        layer, dot, parameter = rest.partition(".")
        rest = _RESNET[layer] + dot + parameter
    elif part == "downsamplers":  # `op` at the end of the prefix already names the convolution
        rest = rest.removeprefix("conv").removeprefix(".")
    return f"{prefix}.{rest}" if rest else prefix


def _exists(match: re.Match[str], blocks: UNetBlocks) -> bool:
    """Whether a UNet with these blocks has the matched block, and the matched layer in it."""
    count, layers, i, j = len(blocks.up_attention), blocks.layers_per_block, int(match["i"]), int(match["j"])
    if match["part"] in ("downsamplers", "upsamplers"):  # the last block has none
        return i < count - 1 and j == 0
    if match["side"] == "down":
        return i < count and j < layers
    return i < count and j <= layers and (match["part"] != "attentions" or blocks.up_attention[i])


def _block(match: re.Match[str], blocks: UNetBlocks) -> str:
    """The LDM prefix of a part of a down or up block.

    The LDM layout numbers the layers of all blocks in sequence. A downsampler counts as a layer of its own; an
    upsampler does not, it is the last part of its block's last layer.
    """
    i, j, size = int(match["i"]), int(match["j"]), blocks.layers_per_block + 1
    slot = {"resnets": 0, "attentions": 1, "downsamplers": 0}.get(match["part"], 1 + blocks.up_attention[i])
    if match["part"] == "downsamplers":
        return f"input_blocks.{(i + 1) * size}.{slot}.op"
    if match["part"] == "upsamplers":
        return f"output_blocks.{(i + 1) * size - 1}.{slot}"
    if match["side"] == "down":
        return f"input_blocks.{1 + i * size + j}.{slot}"
    return f"output_blocks.{i * size + j}.{slot}"


def vae_key(key: str, blocks: int) -> str:
    """Rename an AutoencoderKL's key. The LDM layout counts the decoder's `blocks` from the last to the first."""
    key = re.sub(r"^decoder\.up_blocks\.(\d+)\.", lambda match: f"decoder.up.{blocks - 1 - int(match[1])}.", key)
    return _replaced(key, _VAE_RULES)


def vae_weights(state: dict[str, Tensor], blocks: int) -> dict[str, Tensor]:
    """Rename a VAE's weights. LDM's attention layers are 1x1 convolutions: [C, C] becomes [C, C, 1, 1]."""
    renamed = {vae_key(key, blocks): value for key, value in state.items()}
    return {k: v[:, :, None, None] if ".attn_1." in k and v.ndim == 2 else v for k, v in renamed.items()}


def open_clip_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert a CLIP text encoder's weights to open_clip's names and shapes.

    q, k and v become one tensor, and the text projection is transposed. SD 2 uses the second to last of 24 layers, so
    Diffusers stores 23. Readers of single files expect 24; the unused last layer becomes a copy of the 23rd.
    """
    renamed: dict[str, Tensor] = {}
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
        renamed[name] = value
    last = "transformer.resblocks.22."
    if not any(key.startswith("transformer.resblocks.23.") for key in renamed):
        renamed |= {key.replace(".22.", ".23.", 1): value for key, value in renamed.items() if key.startswith(last)}
    return renamed


def checkpoint(pipeline: Any, kind: str) -> dict[str, Tensor]:
    """All weights of a pipeline under their names in a single-file checkpoint.

    Args:
        kind: of KINDS; of FLUX and Z-Image the transformer alone, as they were published.

    Raises:
        UnlearnError: the layout has no name for a part of the UNet or transformer.
    """
    if kind == "sd3":
        return _sd3_checkpoint(pipeline)
    if KINDS[kind].is_flow:
        return original_weights(kind, pipeline.transformer.state_dict())
    unet_blocks, vae_blocks = blocks_of(pipeline.unet.config), len(pipeline.vae.config.up_block_types)
    weights = {UNET + unet_key(key, unet_blocks): value for key, value in pipeline.unet.state_dict().items()}
    weights |= {VAE + key: value for key, value in vae_weights(pipeline.vae.state_dict(), vae_blocks).items()}
    if kind in CLIP:
        state = pipeline.text_encoder.state_dict()
        weights |= {CLIP[kind] + key.removeprefix("text_model."): value for key, value in state.items()}
    if kind in OPEN_CLIP:
        encoder = pipeline.text_encoder_2 if kind == "sdxl" else pipeline.text_encoder
        weights |= {OPEN_CLIP[kind] + key: value for key, value in open_clip_weights(encoder.state_dict()).items()}
    if kind == "sdxl" and pipeline.scheduler.config.prediction_type == "v_prediction":
        weights["v_pred"] = torch.tensor([])  # ComfyUI and Forge look for this key; for SD 2 they test the weights
    if getattr(pipeline.scheduler.config, "rescale_betas_zero_snr", False):
        weights["ztsnr"] = torch.tensor([])  # read by A1111 and Forge, of SDXL also by ComfyUI
    return weights


def _sd3_checkpoint(pipeline: Any) -> dict[str, Tensor]:
    """As `checkpoint`: transformer, VAE and the text encoders that the pipeline has.

    Raises:
        UnlearnError: the projection of the first text encoder is not the identity, which the layout leaves out.
    """
    weights = {UNET + key: value for key, value in original_weights("sd3", pipeline.transformer.state_dict()).items()}
    vae = vae_weights(pipeline.vae.state_dict(), len(pipeline.vae.config.up_block_types))
    weights |= {VAE + key: value for key, value in vae.items()}
    for component, name in FILE_TEXT_ENCODERS["sd3"].items():
        if (encoder := getattr(pipeline, component, None)) is None:
            continue
        state = {key: value for key, value in encoder.state_dict().items() if not key.endswith("position_ids")}
        if name == "clip_l":
            projection = state.pop("text_projection.weight")
            if not torch.equal(projection, torch.eye(len(projection)).to(projection)):
                raise UnlearnError(
                    "The projection of the base's first text encoder is not the identity, as in Stable Diffusion 3, so "
                    "it has no place in a single file. Write a folder instead."
                )
        weights |= {f"text_encoders.{name}.transformer.{key}": value for key, value in state.items()}
    return weights


def _replaced(key: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key
