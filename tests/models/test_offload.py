"""Layers whose weights stay in the computer's memory: the same outputs and gradients, also through a LoRA."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from sd_unlearn.config.objective import Weights
from sd_unlearn.data.encoding import encode_captions
from sd_unlearn.models import lora
from sd_unlearn.models.base import load_base
from sd_unlearn.models.denoiser import Denoiser
from sd_unlearn.models.footprint import StepOptions, count_inference, count_training
from sd_unlearn.models.meta import read_configs
from sd_unlearn.models.offload import OffloadedLinear, offload_linear_layers
from sd_unlearn.models.quantized import QuantizedLinear, quantize_linear_layers
from sd_unlearn.models.sampling import Sampler, generate_images
from sd_unlearn.models.source import Source

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradient_of_a_layer(bias: bool) -> None:
    layer = nn.Linear(5, 3, bias=bias).requires_grad_(False)
    offloaded, inputs = OffloadedLinear(layer), torch.randn(2, 4, 5).requires_grad_()
    wanted, found = layer(inputs), offloaded(inputs)
    assert torch.equal(found, wanted)
    given = torch.randn(2, 4, 3)
    assert torch.equal(*(torch.autograd.grad(output, inputs, given)[0] for output in (found, wanted)))
    assert offloaded.to(torch.float64).weight.dtype == torch.float64
    assert set(offloaded.state_dict()) == set(layer.state_dict())


def test_layers_inside_of_blocks_are_offloaded(tiny_sd3: Path) -> None:
    base = load_base(Source(str(tiny_sd3), offload=True), device="cpu")
    plain = load_base(str(tiny_sd3), device="cpu")
    assert base.describe() == plain.describe()
    network = base.network
    kinds = {name: type(module) for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    assert kinds["context_embedder"] is kinds["proj_out"] is nn.Linear  # diffusers looks up the device here
    assert all(kind is OffloadedLinear for name, kind in kinds.items() if name.startswith("transformer_blocks."))
    assert any(isinstance(module, OffloadedLinear) for module in base.pipeline.text_encoder_3.modules())
    images = [generate_images(one, ["seven"], [1], Sampler(2, 3.0, 1))[0] for one in (base, plain)]
    assert images[0].tobytes() == images[1].tobytes()


def test_a_lora_on_offloaded_layers_has_the_same_gradient(tiny_flux: Path) -> None:
    gradients = []
    for offload in (False, True):
        base = load_base(Source(str(tiny_flux), offload=offload), device="cpu")
        text = encode_captions(base, ["seven"])
        targets = lora.network_targets(base.network, None)
        model = lora.attach(base.network, Weights(rank=2), targets, seed=0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
        noisy = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
        Denoiser.of(base, model).predict(noisy, torch.tensor([500.0]), text).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    assert any(gradient.any() for gradient in gradients[0])


def test_offloaded_layers_can_be_quantized() -> None:
    network = nn.Sequential(nn.ModuleList([nn.Linear(8, 8)]), nn.Linear(8, 2)).requires_grad_(False)
    wanted = QuantizedLinear(network[0][0], "int8").dequantized()  # type: ignore[index]
    offload_linear_layers(network)
    quantize_linear_layers(network, "int8")
    layer = network[0][0]  # type: ignore[index]
    assert isinstance(layer, QuantizedLinear)
    assert torch.equal(layer.dequantized(), wanted)


def test_offloaded_weights_are_not_counted(tiny_flux: Path) -> None:
    plain, offloaded = (read_configs(Source(str(tiny_flux), offload=offload)) for offload in (False, True))
    frozen, kept = (count_inference(configs, "no", 64) for configs in (plain, offloaded))
    assert 0 < kept.network < 0.5 * frozen.network
    assert 0 < kept.text_encoders < frozen.text_encoders
    assert kept.sample == frozen.sample
    options = StepOptions(quantize_base="int8")
    assert count_training(plain, options, "no", 64).network == count_training(offloaded, options, "no", 64).network
    step = [count_training(configs, StepOptions(), "no", 64).network for configs in (plain, offloaded)]
    assert step == [frozen.network, kept.network]
