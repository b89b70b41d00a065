"""Linear layers of frozen networks whose weights stay in the computer's memory (--offload).

A layer copies its weight to the device whenever it computes, in the forward and again in the backward pass, so that a
model larger than the GPU can be sampled and a LoRA trained on it. The results are the same, bit by bit.

Why not Diffusers' `enable_group_offload`: its hooks put a block's weights on the device before the block's forward pass
and take them away after it. The backward pass of a frozen linear layer needs the weight once more, to pass the gradient
on to the LoRAs before it, and finds it in the other memory; gradient checkpointing only runs the forward pass again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn


class OffloadedLinear(nn.Linear):
    """A frozen linear layer whose weight stays on the CPU. PEFT attaches a LoRA to it as to any linear layer."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")  # no memory
        self.weight = nn.Parameter(layer.weight.detach(), requires_grad=False)
        self.bias = layer.bias

    def forward(self, input: Tensor) -> Tensor:
        return Multiply.apply(input, self.weight.to, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `to` and the like call: the weight may change its data type, but comes back to the CPU."""
        super()._apply(fn, recurse)
        self.weight = nn.Parameter(self.weight.detach().cpu(), requires_grad=False)
        return self


class Multiply(torch.autograd.Function):
    """The output of a frozen linear layer. The backward pass gets the weight again instead of keeping it until then."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight_on: Callable[[torch.device], Tensor], bias: Tensor | None) -> Tensor:
        """weight_on: gives the weight [out, in] on a device."""
        ctx.weight_on, ctx.dtype = weight_on, input.dtype
        return nn.functional.linear(input, weight_on(input.device), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        weight = ctx.weight_on(gradient.device).to(gradient.dtype)  # autocast may have computed in half precision
        return (gradient @ weight).to(ctx.dtype), None, None


def offload_linear_layers(network: nn.Module) -> None:
    """Replace the linear layers of a frozen network's blocks by offloaded ones, in place.

    Layers outside of the blocks stay: they are small, and Diffusers and transformers look up a network's device there.
    """
    for name in offloaded_layers(network):
        layer = network.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        network.set_submodule(name, OffloadedLinear(layer))


def offloaded_layers(network: nn.Module) -> Iterator[str]:
    """The names of the linear layers inside of a network's lists of blocks."""
    lists = [name for name, module in network.named_modules() if isinstance(module, nn.ModuleList)]
    blocks = tuple(f"{name}." for name in lists)
    layers = [n for n, module in network.named_modules() if type(module) is nn.Linear and n.startswith(blocks)]
    return iter(layers)
