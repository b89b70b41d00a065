"""The bundled configurations of the flow-matching models: their networks have the published numbers of parameters."""

from __future__ import annotations

import pytest
import torch

from sd_unlearn.config.train import TrainConfig
from sd_unlearn.models.footprint import StepOptions, count_inference, count_training
from sd_unlearn.models.kinds import KINDS
from sd_unlearn.models.meta import Configs, build_meta_base, known_id, read_configs
from sd_unlearn.models.published import PUBLISHED
from sd_unlearn.models.source import Source

IDS = {
    "sd3-medium": "stabilityai/stable-diffusion-3-medium-diffusers",
    "sd3.5-medium": "stabilityai/stable-diffusion-3.5-medium",
    "sd3.5-large": "stabilityai/stable-diffusion-3.5-large",
    "flux-dev": "black-forest-labs/FLUX.1-dev",
    "flux-schnell": "black-forest-labs/FLUX.1-schnell",
    "flux2-dev": "black-forest-labs/FLUX.2-dev",
    "flux2-klein-4b": "black-forest-labs/FLUX.2-klein-4B",
    "flux2-klein-9b": "black-forest-labs/FLUX.2-klein-base-9B",
    "z-image": "Tongyi-MAI/Z-Image-Turbo",
    "qwen-image": "Qwen/Qwen-Image",
}
# In billions, as published; with SD 3's table of positions, which Diffusers keeps as a buffer. Z-Image: "6B".
TRANSFORMERS = {"sd3-medium": 2.08, "sd3.5-medium": 2.5, "sd3.5-large": 8.1, "flux-dev": 11.9, "flux-schnell": 11.9}
TRANSFORMERS |= {"flux2-dev": 32, "flux2-klein-4b": 3.9, "flux2-klein-9b": 9.1, "z-image": 6.1, "qwen-image": 20.4}
# CLIP L (and G), T5's encoder; Qwen3 4B
ENCODERS = {
    "sd3": [0.124, 0.695, 4.76],
    "flux": [0.123, 4.76],
    "z-image": [4.02],
    "flux2": [24.0],
    "qwen-image": [8.29],
}


def configs_of(name: str, drop_t5: bool = False) -> Configs:
    return read_configs(Source(IDS[name], drop_t5=drop_t5))


@pytest.mark.parametrize("name", PUBLISHED)
def test_numbers_of_parameters(name: str) -> None:
    base = build_meta_base(configs_of(name), torch.bfloat16)
    assert known_id(IDS[name]) == name

    def billions(network: torch.nn.Module) -> float:
        return sum(tensor.numel() for tensor in (*network.parameters(), *network.buffers())) / 1e9

    assert billions(base.network) == pytest.approx(TRANSFORMERS[name], rel=0.02)
    encoders = ENCODERS.get(base.kind) or ([4.02] if name == "flux2-klein-4b" else [8.19])
    assert [billions(encoder) for encoder in base.text_encoders] == pytest.approx(encoders, rel=0.01)
    assert base.resolution == 1024
    assert base.channels == (32 if name.startswith("flux2") else 16)
    flux2 = {"flux2": (512, 15360), "flux2-klein": (512, 7680 if name.endswith("4b") else 12288)}
    flux = ((513 if name == "flux-dev" else 257), 4096)
    assert (
        base.text_shape
        == {"sd3": (334, 4096), "flux": flux, "z-image": (512, 2560), "qwen-image": (512, 3584), **flux2}[base.kind]
    )


def test_sd3_is_counted_without_t5() -> None:
    base = build_meta_base(configs_of("sd3.5-medium", drop_t5=True), torch.bfloat16)
    assert len(base.text_encoders) == 2
    assert base.text_shape == (77 + 77 + 1, 4096)
    assert KINDS[base.kind].text_encoders[2] == "text_encoder_3"


@pytest.mark.slow
def test_a_step_of_flux_is_counted() -> None:
    """A LoRA of rank 8 on attention; weights in bf16, and those of nf4 in a quarter."""
    configs = configs_of("flux-dev")
    found = [
        count_training(configs, StepOptions.of(TrainConfig(quantize_base=kind)), "bf16", 512)  # type: ignore[arg-type]
        for kind in (None, "nf4")
    ]
    assert found[0].network == pytest.approx(23.8e9, rel=0.02)
    assert found[1].network < 0.3 * found[0].network
    assert 0 < found[0].checkpointed < found[0].activations
    assert count_inference(configs, "bf16", 512).text_encoders == pytest.approx(9.8e9, rel=0.02)
