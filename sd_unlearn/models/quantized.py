"""Linear layers of a frozen network with their weights in 8 or 4 bits (--quantize_base).

int8: one scale for each output channel. nf4: 4-bit NormalFloat (Dettmers et al. 2023, "QLoRA", section 3), one scale
for each 64 weights, packed by bitsandbytes. A layer dequantizes its weight whenever it computes, in the forward and
again in the backward pass, so that only the small weight stays in memory.

Why not bitsandbytes' own layers: Linear8bitLt also rounds the activations to 8 bits (on a GPU always, on a CPU only in
evaluation mode), and it keeps its input where gradient checkpointing cannot drop it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sd_unlearn.config.loop import Quantization
from sd_unlearn.errors import UsageError, reason
from sd_unlearn.models.offload import Multiply, OffloadedLinear

BLOCK = 64  # weights that share a scale in nf4


class QuantizedLinear(nn.Linear):
    """A frozen linear layer that stores its weight quantized. PEFT attaches a LoRA to it as to any linear layer."""

    def __init__(self, layer: nn.Linear, kind: Quantization, device: torch.device | None = None) -> None:
        """device: to quantize on and keep the weight on; None: the layer's."""
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")  # no memory
        self.kind, self.computes_in = kind, layer.weight.dtype
        packed, scale = _quantize(layer.weight.detach().to(device or layer.weight.device), kind)
        # Parameters, because DistributedDataParallel sends buffers to all processes in every step.
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = layer.bias

    def dequantized(self) -> Tensor:
        """The weight [out, in] in the data type that it had."""
        if self.kind == "int8":
            return self.weight.to(self.computes_in) * self.scale.to(self.computes_in)
        shape = [self.out_features, self.in_features]
        unpack: Any = torch.ops.bitsandbytes.dequantize_4bit
        return unpack(self.weight, self.scale, BLOCK, "nf4", shape, self.computes_in)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The data type of inputs, which Z-Image's transformer asks for where a weight is not a floating-point one."""
        return self.computes_in

    def forward(self, input: Tensor) -> Tensor:
        # A sampler may pass float32: Diffusers takes a network's precision from its first parameter, here a scale.
        return Multiply.apply(input.to(self.computes_in), lambda device: self.dequantized(), self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kind={self.kind}"


def quantize_linear_layers(network: nn.Module, kind: Quantization) -> None:
    """Replace the linear layers of a frozen network by quantized ones, in place, one at a time.

    Layers that are offloaded come to the device of the network.
    """
    device = next(network.parameters()).device  # never that of an offloaded layer
    for name in [name for name, module in network.named_modules() if type(module) in (nn.Linear, OffloadedLinear)]:
        layer = network.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        network.set_submodule(name, QuantizedLinear(layer, kind, device))


def check_nf4(device: torch.device) -> None:
    """Try to quantize a small weight on the device, before the base is loaded.

    Raises:
        UsageError: bitsandbytes does not work there; the message says why.
    """
    try:
        QuantizedLinear(nn.Linear(BLOCK, 2, device=device), "nf4").dequantized()
    except (ImportError, RuntimeError, NotImplementedError, AttributeError, OSError) as error:
        raise UsageError(
            f"--quantize_base nf4: bitsandbytes does not work on {device.type} ({reason(error)}). Use --quantize_base "
            "int8, which does not need it."
        ) from error


def _quantize(weight: Tensor, kind: Quantization) -> tuple[Tensor, Tensor]:
    """(packed weight, scales) of a weight [out, in]."""
    if kind == "int8":  # [out, in] and [out, 1]
        scale = weight.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
        return (weight.float() / scale).round().to(torch.int8), scale
    import bitsandbytes  # noqa: F401  registers the operators

    packed, scale = torch.ops.bitsandbytes.quantize_4bit(weight.contiguous(), BLOCK, "nf4", torch.uint8)
    return packed, scale  # [out * in / 2, 1] and [out * in / 64]
