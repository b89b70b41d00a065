"""Names of the LDM layout for every module of the real architectures, and back again by Diffusers' own reader."""

from __future__ import annotations

from typing import Any

import pytest
import sgm_unet
import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from sgm_unet import REAL, UP, real_unet
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sd_unlearn.errors import UnlearnError
from sd_unlearn.models import ldm_keys


@pytest.mark.parametrize("kind", list(REAL))
def test_every_module_of_the_real_unet_has_its_ldm_name_and_shape(kind: str) -> None:
    unet = real_unet(kind)
    blocks = ldm_keys.blocks_of(unet.config)
    modules = {n: m for n, m in unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    found = {ldm_keys.unet_key(name, blocks): tuple(module.weight.shape) for name, module in modules.items()}
    assert len(found) == len(modules) == REAL[kind][2]
    assert found == sgm_unet.sgm_modules(**REAL[kind][0])


@pytest.mark.parametrize("kind", list(REAL))
def test_diffusers_reads_every_weight_of_the_real_unet_back(kind: str) -> None:
    unet = real_unet(kind)
    blocks, state = ldm_keys.blocks_of(unet.config), unet.state_dict()
    written = {ldm_keys.UNET + ldm_keys.unet_key(key, blocks): value for key, value in state.items()}
    assert len(written) == len(state)
    read = convert_ldm_unet_checkpoint(written, dict(unet.config))
    assert {k: v.shape for k, v in read.items()} == {k: v.shape for k, v in state.items()}


def test_default_blocks_are_those_of_sdxl() -> None:
    assert ldm_keys.blocks_of(real_unet("sdxl").config) == ldm_keys.SDXL_BLOCKS


def test_a_module_without_an_ldm_name_is_refused() -> None:
    with pytest.raises(UnlearnError, match="class_embedding.weight.* no name"):
        ldm_keys.unet_key("class_embedding.weight")


@pytest.mark.parametrize(
    "key",
    [
        "up_blocks.1.resnets.3.conv1",
        "down_blocks.1.attentions.2.proj_in",
        "up_blocks.2.attentions.0.proj_in",
        "up_blocks.3.resnets.0.conv1",
        "down_blocks.2.downsamplers.0.conv",
        "up_blocks.2.upsamplers.0.conv",
    ],
)
def test_a_module_that_sdxl_lacks_does_not_get_the_name_of_another(key: str) -> None:
    with pytest.raises(UnlearnError, match=f"{key}.* no name"):
        ldm_keys.unet_key(key)


def test_blocks_with_different_numbers_of_layers_are_refused() -> None:
    with pytest.raises(UnlearnError, match=r"\[1, 2, 2\] layers"):
        ldm_keys.blocks_of({"layers_per_block": [1, 2, 2], "up_block_types": [UP] * 3})


@pytest.mark.parametrize("blocks", [2, 4])
def test_diffusers_reads_the_vae_back(blocks: int) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=(4, 8, 8, 12)[:blocks],
        layers_per_block=2,
        norm_num_groups=2,
    )
    state = vae.state_dict()
    written = {ldm_keys.VAE + key: value for key, value in ldm_keys.vae_weights(state, blocks).items()}
    assert written["first_stage_model.decoder.mid.attn_1.q.weight"].ndim == 4
    assert (
        written[f"first_stage_model.decoder.up.{blocks - 1}.block.0.conv1.weight"].shape[0]
        == state["decoder.up_blocks.0.resnets.0.conv1.weight"].shape[0]
    )
    read = convert_ldm_vae_checkpoint(written, dict(vae.config))
    assert read.keys() == state.keys()
    assert all(torch.equal(read[key], state[key]) for key in state)


def encoder(kind: type, layers: int, width: int = 8) -> Any:
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=20,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=5,
        projection_dim=6,
    )
    return kind(config)


@pytest.mark.parametrize(("kind", "layers"), [(CLIPTextModel, 2), (CLIPTextModelWithProjection, 3)])
def test_diffusers_reads_an_open_clip_encoder_back(kind: type, layers: int) -> None:
    model = encoder(kind, layers)
    state = {key.removeprefix("text_model."): value for key, value in model.state_dict().items()}
    written = {f"a.{key}": value for key, value in ldm_keys.open_clip_weights(model.state_dict()).items()}
    read = convert_open_clip_checkpoint(model, dict(written), prefix="a.")
    read = {key.removeprefix("text_model."): value for key, value in read.items()}
    assert read.keys() == state.keys()
    assert all(torch.equal(read[key], state[key]) for key in state)
    assert written["a.transformer.resblocks.1.attn.in_proj_weight"].shape == (24, 8)


def test_a_text_encoder_of_23_layers_gets_a_24th() -> None:
    weights = ldm_keys.open_clip_weights(encoder(CLIPTextModel, 23).state_dict())
    layers = {key.split(".")[2] for key in weights if key.startswith("transformer.resblocks.")}
    assert layers == {str(i) for i in range(24)}
    key = "transformer.resblocks.{}.mlp.c_fc.weight"
    assert torch.equal(weights[key.format(22)], weights[key.format(23)])
    whole = ldm_keys.open_clip_weights(encoder(CLIPTextModel, 24).state_dict())
    assert not torch.equal(whole[key.format(22)], whole[key.format(23)])
