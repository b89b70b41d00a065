"""A random-weight base of each kind in miniature: the block types and the conditioning of the real one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import TOKENS, make_tokenizer
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

SIDE = 8
WIDTHS = {"sd1": 16, "sd2": 1024, "sdxl": 36}  # of the text; 1024 is how an SD 2 is known
PREDICTION = {"sd1": "epsilon", "sd2": "v_prediction", "sdxl": "epsilon"}
_TIME, _POOLED = 8, 16


def make_base(kind: str, folder: Path, prediction_type: str | None = None) -> Path:
    """Save a pipeline of the kind (sd1, sd2 with v prediction, sdxl)."""
    torch.manual_seed(0)
    scheduler = DDIMScheduler(
        clip_sample=False,
        steps_offset=1,
        prediction_type=prediction_type or PREDICTION[kind],
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=2,
        sample_size=2 * SIDE,
    )
    shared: dict[str, Any] = {"vae": vae, "unet": make_unet(kind), "scheduler": scheduler}
    shared["tokenizer"] = make_tokenizer()
    if kind == "sdxl":
        StableDiffusionXLPipeline(
            **shared,
            text_encoder=_encoder(CLIPTextModel, 16),
            tokenizer_2=make_tokenizer(),
            text_encoder_2=_encoder(CLIPTextModelWithProjection, 20),  # readers tell the two by their widths
        ).save_pretrained(folder)
    else:
        StableDiffusionPipeline(
            **shared,
            text_encoder=_encoder(CLIPTextModel, WIDTHS[kind]),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(folder)
    return folder


def make_unet(kind: str) -> UNet2DConditionModel:
    two: dict[str, Any] = {
        "block_out_channels": (8, 12),
        "layers_per_block": 1,
        "attention_head_dim": 2,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "use_linear_projection": kind == "sd2",
    }
    xl: dict[str, Any] = {
        "block_out_channels": (8, 12, 16),
        "layers_per_block": 2,
        "attention_head_dim": (2, 2, 4),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "use_linear_projection": True,
        "transformer_layers_per_block": (1, 1, 2),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": _TIME,
        "projection_class_embeddings_input_dim": 6 * _TIME + _POOLED,
    }
    settings = xl if kind == "sdxl" else two
    return UNet2DConditionModel(sample_size=SIDE, norm_num_groups=4, cross_attention_dim=WIDTHS[kind], **settings)


def _encoder(made: type, width: int) -> Any:
    tokenizer = make_tokenizer()
    return made(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=TOKENS,
            projection_dim=_POOLED,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def open_pipeline(folder: Path) -> Any:
    kind = StableDiffusionXLPipeline if (folder / "text_encoder_2").is_dir() else StableDiffusionPipeline
    options = {} if kind is StableDiffusionXLPipeline else {"safety_checker": None}
    pipeline = kind.from_pretrained(folder, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def predict(unet: nn.Module) -> Tensor:
    """What the UNet predicts for two fixed latents under fixed text states; [2, 4, 8, 8]."""
    rng = torch.Generator().manual_seed(3)
    latents = torch.randn(2, 4, SIDE, SIDE, generator=rng)
    text = torch.randn(2, TOKENS, unet.config.cross_attention_dim, generator=rng)
    added = {"text_embeds": torch.randn(2, _POOLED, generator=rng), "time_ids": torch.full((2, 6), 64.0)}
    given = {"added_cond_kwargs": added} if unet.config.addition_embed_type else {}
    return unet(latents, torch.tensor([700, 20]), encoder_hidden_states=text, **given).sample


def spelled(module: nn.Module, prefix: str) -> dict[str, nn.Module]:
    """Every module under the name a kohya file would give it, found by walking down the network."""
    found = {}
    for name, child in module.named_children():
        found |= {f"{prefix}_{name}": child} | spelled(child, f"{prefix}_{name}")
    return found


def sgm_spelled(unet: Any) -> dict[str, nn.Module]:
    """The same under the sgm code's names: blocks are lists of layers there, gone through one after another."""
    inputs: list[list[nn.Module]] = [[unet.conv_in]]
    for block in unet.down_blocks:
        inputs += _layers(block)
        inputs += [[down] for down in block.downsamplers or []]
    outputs: list[list[nn.Module]] = []
    for block in unet.up_blocks:
        layers = _layers(block)
        layers[-1] += list(block.upsamplers or [])
        outputs += layers
    middle = [[unet.mid_block.resnets[0]], [unet.mid_block.attentions[0]], [unet.mid_block.resnets[1]]]
    found = {
        "lora_unet_time_embed_0": unet.time_embedding.linear_1,
        "lora_unet_time_embed_2": unet.time_embedding.linear_2,
        "lora_unet_label_emb_0_0": unet.add_embedding.linear_1,
        "lora_unet_label_emb_0_2": unet.add_embedding.linear_2,
        "lora_unet_out_2": unet.conv_out,
        "lora_unet_input_blocks_0_0": unet.conv_in,
    }
    for side, blocks in (("input_blocks", inputs[1:]), ("output_blocks", outputs)):
        for number, layers in enumerate(blocks, start=1 if side == "input_blocks" else 0):
            for slot, layer in enumerate(layers):
                found |= _inside(layer, f"lora_unet_{side}_{number}_{slot}")
    for slot, (layer,) in enumerate(middle):
        found |= _inside(layer, f"lora_unet_middle_block_{slot}")
    return found


def _layers(block: Any) -> list[list[nn.Module]]:
    attentions = getattr(block, "attentions", None) or [None] * len(block.resnets)
    pairs = zip(block.resnets, attentions, strict=True)
    return [[resnet, *([attention] if attention else [])] for resnet, attention in pairs]


def _inside(layer: Any, place: str) -> dict[str, nn.Module]:
    kind = type(layer).__name__
    if kind == "ResnetBlock2D":
        found = {
            f"{place}_in_layers_2": layer.conv1,
            f"{place}_emb_layers_1": layer.time_emb_proj,
            f"{place}_out_layers_3": layer.conv2,
        }
        return found | ({f"{place}_skip_connection": layer.conv_shortcut} if layer.conv_shortcut is not None else {})
    if kind == "Downsample2D":
        return {f"{place}_op": layer.conv}
    return {f"{place}_conv": layer.conv} if kind == "Upsample2D" else spelled(layer, place)
