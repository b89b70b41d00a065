"""Quantized linear layers: their values, their gradients, and what they keep in memory."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import Kinds
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

from sd_unlearn.attacks.quantisation import to_int8, to_nf4
from sd_unlearn.errors import UsageError
from sd_unlearn.models.base import load_base
from sd_unlearn.models.footprint import StepOptions, count_training, size_of
from sd_unlearn.models.meta import read_configs
from sd_unlearn.models.quantized import QuantizedLinear, check_nf4, quantize_linear_layers
from sd_unlearn.models.source import Source

EXPECTED = {"int8": to_int8, "nf4": to_nf4}


def made(kind: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, QuantizedLinear]:
    """A linear layer with rows of different size, and its quantized copy."""
    if kind == "nf4":
        pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    layer = nn.Linear(24, 48).requires_grad_(False)
    layer.weight *= torch.logspace(-2, 1, 48).view(-1, 1)
    layer.to(dtype)
    return layer, QuantizedLinear(layer, kind)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", EXPECTED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_weights_are_rounded_to_the_levels_of_the_format(kind: str, dtype: torch.dtype) -> None:
    layer, quantized = made(kind, dtype)
    found = quantized.dequantized()
    assert found.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float32 else 2e-3
    torch.testing.assert_close(found, EXPECTED[kind](layer.weight), rtol=tolerance, atol=tolerance)
    assert not torch.equal(found, layer.weight)
    bits = 8 * sum(p.numel() * p.element_size() for p in (quantized.weight, quantized.scale)) / layer.weight.numel()
    assert bits == {"int8": 8 + 32 / 24, "nf4": 4 + 32 / 64}[kind]


@pytest.mark.parametrize("kind", EXPECTED)
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_a_lora_gets_the_gradient_of_a_layer_with_the_rounded_weights(kind: str, half: bool, training: bool) -> None:
    """In training and evaluation mode alike, with autocast and without, and through to the input."""
    layer, quantized = made(kind)
    rounded = nn.Linear(24, 48).requires_grad_(False)
    rounded.load_state_dict({"weight": quantized.dequantized(), "bias": layer.bias})
    found = []
    for inner in (quantized, rounded):
        torch.manual_seed(1)
        model = PeftModel(nn.Sequential(inner), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))  # type: ignore[arg-type]
        model.train(training)
        given = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(2)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            output = model(given)
        output.float().square().sum().backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        assert len(gradients) == 2
        found.append([output, given.grad, *gradients])
    for one, other in zip(*found, strict=True):
        assert isinstance(one, Tensor)
        assert isinstance(other, Tensor)
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=1e-2 if half else 1e-5, atol=1e-2 if half else 1e-5)


@pytest.mark.parametrize("kind", EXPECTED)
def test_nothing_is_kept_for_the_backward_pass(kind: str) -> None:
    """Neither the input, which gradient checkpointing could not drop, nor the full weight."""
    _, quantized = made(kind)
    leaf = torch.randn(3, 24, requires_grad=True)
    given = leaf + 1
    input_alive = weakref.ref(given)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        output = quantized(given)
    del given
    assert not saved
    assert input_alive() is None
    output.sum().backward()
    assert leaf.grad is not None


@pytest.mark.parametrize("kind", EXPECTED)
@pytest.mark.parametrize("base", ["sd1", "sdxl"])
def test_the_plan_counts_the_weights_that_a_quantized_unet_has(kinds: Kinds, base: str, kind: Any) -> None:
    if kind == "nf4":
        pytest.importorskip("bitsandbytes")
    place = str(kinds.folder(base))
    unet = load_base(place, device="cpu").network
    linear = sum(type(module) is nn.Linear for module in unet.modules())
    quantize_linear_layers(unet, kind)
    assert sum(isinstance(module, QuantizedLinear) for module in unet.modules()) == linear
    counts = [count_training(read_configs(Source(place)), StepOptions(quantize_base=q), "no", 64) for q in (None, kind)]
    assert counts[1].network == size_of(unet) < counts[0].network
    assert counts[1].saved == counts[0].saved
    assert counts[1].constant == counts[0].constant


def test_a_device_where_bitsandbytes_fails_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr("sd_unlearn.models.quantized._quantize", fail)
    with pytest.raises(UsageError, match=r"--quantize_base nf4: bitsandbytes does not work on cpu \(no kernel.*int8"):
        check_nf4(torch.device("cpu"))
