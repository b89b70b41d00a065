"""The UNet of the LDM / sgm code as names and shapes of its weights, built from its settings as that code builds it."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel

Shapes = dict[str, tuple[int, ...]]
SD1 = {"multiples": (1, 2, 4, 4), "depths": (1, 1, 1, 0), "context": 768, "linear": False, "label": 0}
SD2 = {"multiples": (1, 2, 4, 4), "depths": (1, 1, 1, 0), "context": 1024, "linear": True, "label": 0}
SDXL = {"multiples": (1, 2, 4), "depths": (0, 2, 10), "context": 2048, "linear": True, "label": 2816}
WIDTH, LAYERS = 320, 2


def sgm_modules(
    multiples: tuple[int, ...], depths: tuple[int, ...], context: int, linear: bool, label: int, layers: int = LAYERS
) -> Shapes:
    """Module name -> shape of its weight, for every linear layer and convolution."""
    found: Shapes = {
        "time_embed.0": (4 * WIDTH, WIDTH),
        "time_embed.2": (4 * WIDTH, 4 * WIDTH),
        "input_blocks.0.0": (WIDTH, 4, 3, 3),
        "out.2": (4, WIDTH, 3, 3),
    }
    if label:
        found |= {"label_emb.0.0": (4 * WIDTH, label), "label_emb.0.2": (4 * WIDTH, 4 * WIDTH)}
    number, channels, skipped = 0, WIDTH, [WIDTH]
    for level, (multiple, depth) in enumerate(zip(multiples, depths, strict=True)):
        for _ in range(layers):
            number += 1
            found |= _resnet(f"input_blocks.{number}.0", channels, multiple * WIDTH)
            channels = multiple * WIDTH
            found |= _transformer(f"input_blocks.{number}.1", channels, depth, context, linear)
            skipped.append(channels)
        if level < len(multiples) - 1:
            number += 1
            found[f"input_blocks.{number}.0.op"] = (channels, channels, 3, 3)
            skipped.append(channels)
    found |= _resnet("middle_block.0", channels, channels) | _resnet("middle_block.2", channels, channels)
    found |= _transformer("middle_block.1", channels, depths[-1] or 1, context, linear)
    number = 0
    for level, (multiple, depth) in reversed(list(enumerate(zip(multiples, depths, strict=True)))):
        for layer in range(layers + 1):
            place = f"output_blocks.{number}"
            found |= _resnet(f"{place}.0", channels + skipped.pop(), multiple * WIDTH)
            channels = multiple * WIDTH
            found |= _transformer(f"{place}.1", channels, depth, context, linear)
            if level and layer == layers:
                found[f"{place}.{2 if depth else 1}.conv"] = (channels, channels, 3, 3)
            number += 1
    return found


def _resnet(place: str, given: int, made: int) -> Shapes:
    found: Shapes = {
        f"{place}.in_layers.2": (made, given, 3, 3),
        f"{place}.emb_layers.1": (made, 4 * WIDTH),
        f"{place}.out_layers.3": (made, made, 3, 3),
    }
    return found | ({f"{place}.skip_connection": (made, given, 1, 1)} if given != made else {})


def _transformer(place: str, width: int, depth: int, context: int, linear: bool) -> Shapes:
    if not depth:
        return {}
    one: tuple[int, ...] = () if linear else (1, 1)
    found: Shapes = {f"{place}.proj_in": (width, width, *one), f"{place}.proj_out": (width, width, *one)}
    for i in range(depth):
        block = f"{place}.transformer_blocks.{i}"
        for attention, seen in (("attn1", width), ("attn2", context)):
            found[f"{block}.{attention}.to_q"] = (width, width)
            found[f"{block}.{attention}.to_k"] = found[f"{block}.{attention}.to_v"] = (width, seen)
            found[f"{block}.{attention}.to_out.0"] = (width, width)
        found |= {f"{block}.ff.net.0.proj": (8 * width, width), f"{block}.ff.net.2": (width, 4 * width)}
    return found


DOWN, CROSS = "DownBlock2D", "CrossAttnDownBlock2D"
UP, CROSS_UP = "UpBlock2D", "CrossAttnUpBlock2D"
REAL: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "sd1": (SD1, {"cross_attention_dim": 768, "attention_head_dim": 8}, 282),
    "sd2": (
        SD2,
        {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
        282,
    ),
    "sdxl": (
        SDXL,
        {
            "cross_attention_dim": 2048,
            "attention_head_dim": [5, 10, 20],
            "use_linear_projection": True,
            "block_out_channels": (320, 640, 1280),
            "transformer_layers_per_block": [1, 2, 10],
            "down_block_types": (DOWN, CROSS, CROSS),
            "up_block_types": (CROSS_UP, CROSS_UP, UP),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        794,
    ),
}


def real_unet(kind: str) -> UNet2DConditionModel:
    """The UNet in its real size, without memory."""
    with torch.device("meta"):
        return UNet2DConditionModel(**REAL[kind][1])
