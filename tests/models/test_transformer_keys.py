"""The layout of single files of transformers: diffusers' converters undo ours, on the real architectures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import Flux2Transformer2DModel, FluxTransformer2DModel, SD3Transformer2DModel, ZImageTransformer2DModel
from diffusers.loaders.single_file_utils import (
    convert_flux2_transformer_checkpoint_to_diffusers,
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_sd3_transformer_checkpoint_to_diffusers,
    convert_z_image_transformer_checkpoint_to_diffusers,
)
from torch import Tensor, nn

from sd_unlearn.errors import UnlearnError
from sd_unlearn.models.transformer_keys import diffusers_weights, original_modules, original_weights

SD3 = {"num_layers": 3, "attention_head_dim": 64, "num_attention_heads": 2, "caption_projection_dim": 128}
FLUX = {"num_layers": 2, "num_single_layers": 2}  # diffusers' converter knows the real width only
KLEIN = {"num_layers": 2, "num_single_layers": 2, "guidance_embeds": False}
ARCHITECTURES: dict[str, tuple[str, Callable[..., nn.Module], dict[str, Any]]] = {
    "SD 3": ("sd3", SD3Transformer2DModel, SD3),
    "SD 3.5 large": ("sd3", SD3Transformer2DModel, SD3 | {"qk_norm": "rms_norm"}),
    "SD 3.5 medium": ("sd3", SD3Transformer2DModel, SD3 | {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}),
    "FLUX.1 dev": ("flux", FluxTransformer2DModel, FLUX | {"guidance_embeds": True}),
    "FLUX.1 schnell": ("flux", FluxTransformer2DModel, FLUX),
    "FLUX.2 dev": ("flux2", Flux2Transformer2DModel, {"num_layers": 2, "num_single_layers": 2}),
    "FLUX.2 klein": ("flux2-klein", Flux2Transformer2DModel, KLEIN),
    "Z-Image": ("z-image", ZImageTransformer2DModel, {"n_layers": 2}),
}
CONVERT = {
    "sd3": convert_sd3_transformer_checkpoint_to_diffusers,
    "flux": convert_flux_transformer_checkpoint_to_diffusers,
    "flux2": convert_flux2_transformer_checkpoint_to_diffusers,
    "flux2-klein": convert_flux2_transformer_checkpoint_to_diffusers,
    "z-image": convert_z_image_transformer_checkpoint_to_diffusers,
}


def narrow_state(make: Callable[..., nn.Module], settings: dict[str, Any]) -> dict[str, Tensor]:
    """Weights with the rows of a real transformer, each row another one, and one column: renaming only moves rows."""
    with torch.device("meta"):
        network = make(**settings)
    torch.manual_seed(0)
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    return {name: torch.rand(shape[0], *[1] * (len(shape) - 1)) for name, shape in shapes.items()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_diffusers_reads_every_weight_back(architecture: str) -> None:
    kind, make, settings = ARCHITECTURES[architecture]
    state = narrow_state(make, settings)
    original = original_weights(kind, state)
    ours = diffusers_weights(kind, {name: tuple(value.shape) for name, value in state.items()}, original)
    prefix = "" if kind.startswith("flux2") else "model.diffusion_model."  # which that converter does not know
    theirs = CONVERT[kind]({f"{prefix}{name}": value for name, value in original.items()})
    for read in (ours, theirs):
        assert read.keys() == state.keys()
        assert all(torch.equal(read[name], value) for name, value in state.items())


def test_the_rows_of_a_fused_module_cover_it_once() -> None:
    kind, make, settings = ARCHITECTURES["FLUX.1 dev"]
    state = narrow_state(make, settings)
    rows = {name.removesuffix(".weight"): len(value) for name, value in state.items() if name.endswith(".weight")}
    modules = original_modules(kind, rows)
    assert sorted(part.module for parts in modules.values() for part in parts) == sorted(rows)
    linear = modules["single_blocks.1.linear1"]
    assert [(part.start, part.stop) for part in linear] == [(0, 3072), (3072, 6144), (6144, 9216), (9216, 21504)]
    assert {part.total for part in linear} == {21504}


def test_a_weight_without_a_name_and_a_wrong_file_are_named() -> None:
    kind, make, settings = ARCHITECTURES["SD 3"]
    state = narrow_state(make, settings)
    with pytest.raises(UnlearnError, match=r'"ip_adapter\.weight" has no name'):
        original_weights(kind, state | {"ip_adapter.weight": torch.ones(2, 1)})
    shapes, original = {name: tuple(value.shape) for name, value in state.items()}, original_weights(kind, state)
    for change, says in (
        ({"x_embedder.proj.bias": None}, r"lacks x_embedder\.proj\.bias"),
        ({"extra": torch.ones(1)}, "1 tensors too many, e.g. extra"),
        ({"context_embedder.bias": torch.ones(3)}, r"context_embedder\.bias has the shape \[3\] instead of \[128\]"),
    ):
        changed = {name: value for name, value in (original | change).items() if value is not None}
        with pytest.raises(UnlearnError, match=says):
            diffusers_weights(kind, shapes, changed)
