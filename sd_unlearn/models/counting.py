"""Count the memory of a base's network passes on the meta device: no weights, no device, about a second a network.

Activations are counted as autograd saves them (`torch.autograd.graph.saved_tensors_hooks`), and passes without
gradient as tensors are created and released. All are proportional to the number of images, so one image suffices.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

# torch's autocast on CUDA: functions that it runs in half precision, and in full precision.
HALF = {"linear", "conv2d", "conv_transpose2d", "matmul", "__matmul__", "bmm", "baddbmm", "addmm"}
FULL = {"group_norm", "layer_norm", "softmax", "log_softmax", "mse_loss", "pow", "norm", "exp", "log"}


class _Attention(torch.autograd.Function):
    """A memory-efficient attention kernel: keeps its inputs, its output and one number per row, never the scores."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, tokens, _ = query.shape
        output = query.new_empty(batch, tokens, heads, value.shape[-1]).transpose(1, 2)  # as the kernels lay it out
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


class DeviceKernels(TorchFunctionMode):
    """Meta tensors as a device computes them: memory-efficient attention, and autocast to `half` if it is given.

    torch has neither on the meta device: scaled_dot_product_attention would create all scores.
    """

    def __init__(self, half: torch.dtype | None = None) -> None:
        super().__init__()
        self.half = half
        self.cast_weights: dict[int, Tensor] = {}  # autocast's copies of weights: not proportional to the images

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if self.half and (name in HALF or name in FULL):
            to = self.half if name in HALF else torch.float32
            args, kwargs = tree_map_only(Tensor, lambda tensor: self._cast(tensor, to), (args, kwargs))
        if name == "scaled_dot_product_attention":
            given = (*args, *(kwargs[key] for key in ("query", "key", "value")[len(args) :]))[:3]
            return _Attention.apply(*(self._cast(t, self.half) if self.half else t for t in given))
        return func(*args, **kwargs)

    def _cast(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        if not tensor.is_floating_point() or tensor.dtype == dtype:
            return tensor
        cast = tensor.to(dtype)
        if isinstance(tensor, nn.Parameter):
            self.cast_weights[_key(cast)] = cast
        return cast


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that exist, and their maximum. Weights that exist before are not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._storages: dict[int, Any] = {}

    def ignore(self, network: nn.Module) -> LiveBytes:
        for tensor in (*network.parameters(), *network.buffers()):
            self._watch(tensor.untyped_storage(), 0)
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._watch(storage, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return output

    def _watch(self, storage: Any, size: int) -> None:
        key = storage._cdata
        if key not in self._storages:
            self.now += size
            self._storages[key] = weakref.ref(storage, lambda _: self._release(key, size))

    def _release(self, key: int, size: int) -> None:
        del self._storages[key]
        self.now -= size


class SavedBytes:
    """What autograd saves in a forward pass, in bytes: everything, and what is left with gradient checkpointing."""

    def __init__(self, network: nn.Module, kernels: DeviceKernels) -> None:
        self.kernels = kernels
        self._weights = {_key(tensor) for tensor in (*network.parameters(), *network.buffers())}
        self._all: dict[int, int] = {}  # storage -> bytes
        self._outside: dict[int, int] = {}  # of the blocks that are recomputed
        self._block: dict[int, int] | None = None
        self._alive: list[Tensor] = []  # a storage's number is only unique while it exists
        self.largest_block = 0

    @property
    def total(self) -> int:
        """Without gradient checkpointing."""
        return sum(self._all.values())

    @property
    def kept(self) -> int:
        """With gradient checkpointing, without the block that is being recomputed (`largest_block`)."""
        return sum(self._outside.values())

    @property
    def largest(self) -> int:
        """The largest tensor. The backward pass holds about one more of its size, the gradient of an activation."""
        return max(self._all.values(), default=0)

    @property
    def casts(self) -> int:
        """Autocast's copies of weights, which do not depend on the number of images."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.kernels.cast_weights.values())

    def save(self, tensor: Tensor) -> Tensor:
        """A hook of saved_tensors_hooks."""
        if _key(tensor) not in self._weights and _key(tensor) not in self.kernels.cast_weights:
            self._add(tensor, self._all)
            self._add(tensor, self._outside if self._block is None else self._block)
        return tensor

    def run_block(self, block: Callable[..., Any], *inputs: Any) -> Any:
        """Run a block that gradient checkpointing recomputes; checkpointing keeps its inputs."""
        if self._block is not None:  # a block within a block
            return block(*inputs)
        self._block = {}
        output = block(*inputs)
        inside, self._block = self._block, None
        if inside:
            for tensor in inputs:
                if isinstance(tensor, Tensor):
                    self._add(tensor, self._outside)
            recomputed = sum(size for key, size in inside.items() if key not in self._outside)
            self.largest_block = max(self.largest_block, recomputed)
        return output

    def _add(self, tensor: Tensor, to: dict[int, int]) -> None:
        self._alive.append(tensor)
        to[_key(tensor)] = tensor.untyped_storage().nbytes()


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
