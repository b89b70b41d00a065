"""What the tensors of a LoRA file change in a base: find the modules, compute each change, apply and undo all.

The sum of weight and change replaces the weight, as in ComfyUI and A1111. Diffusers' own loader is not used: it applies
alphas that differ between modules to the wrong ones, and drops what it does not know without an error.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sd_unlearn.errors import UnlearnError
from sd_unlearn.models.lora_names import lookup, module_tables
from sd_unlearn.models.transformer_keys import Rows

Parts = Mapping[str, Tensor]


@dataclass(frozen=True)
class Change:
    """The change of one module's weight and bias."""

    kind: str  # a key of KINDS
    parts: dict[str, Tensor]
    scale: float | None = None  # None: the file states none, which means 1
    rows: Rows | None = None  # of the file's module that are the base's module; None: all of them

    @property
    def rank(self) -> int | None:
        """The rank that alpha is divided by; None for kinds without one."""
        return next((self.parts[p].shape[0] for p in ("down", "w1_b", "k_w1_b", "k_w2_b") if p in self.parts), None)

    def scaled(self, scale: float) -> Change:
        return dataclasses.replace(self, scale=scale)

    def delta(self, shape: Sequence[int], device: Any = "cpu", dtype: torch.dtype = torch.float32) -> Tensor | None:
        """The difference that is added to a weight of this shape, without magnitudes; None if only the bias changes.

        Raises:
            ValueError, RuntimeError: the tensors do not give this shape.
        """
        compute = KINDS[self.kind].delta
        if compute is None:
            return None
        if self.rows is not None:
            shape = (self.rows.total, *shape[1:])
        delta = compute({part: tensor.to(device, dtype) for part, tensor in self.parts.items()})
        same = len(delta) == shape[0] and delta.numel() == torch.Size(shape).numel()
        same = same and (delta.ndim != len(shape) or tuple(delta.shape) == tuple(shape))
        if not same:
            raise ValueError(f"the change has the shape {list(delta.shape)}, the weight {list(shape)}")
        return self._own(delta.reshape(shape)) * (1.0 if self.scale is None else self.scale)

    def _own(self, values: Tensor) -> Tensor:
        """The base's module's part of values [rows, ...] of the file's module."""
        return values if self.rows is None else self.rows.of(values)

    def weight(self, weight: Tensor, strength: float) -> Tensor | None:
        """The changed weight, in float32 (float64 for such a weight); None if only the bias changes.

        strength: 0 the base, 1 as trained, else the base plus that multiple of the trained difference. With DoRA (Liu
        et al. 2024, equation 5) each output channel of the trained weight has the norm of its magnitude.
        """
        dtype = torch.promote_types(weight.dtype, torch.float32)
        delta = self.delta(weight.shape, weight.device, dtype)
        if delta is None:
            return None
        plain = weight.to(dtype)
        if "magnitude" not in self.parts:
            return plain + strength * delta
        magnitude = self._own(self.parts["magnitude"].to(weight.device, dtype).flatten())
        if len(magnitude) != len(weight):
            raise ValueError(f"there are {len(magnitude)} magnitudes for {len(weight)} channels")
        total = plain + delta
        factors = magnitude / total.flatten(1).norm(dim=1)
        return plain.lerp(total * factors.view(-1, *[1] * (weight.ndim - 1)), strength)

    @property
    def bias(self) -> Tensor | None:
        """The difference that is added to the bias."""
        return next((self._own(self.parts[part]) for part in ("diff_b", "b_norm") if part in self.parts), None)


@dataclass(frozen=True)
class Kind:
    """The tensors of a kind of change and the function that computes the change of the weight."""

    needs: tuple[frozenset[str], ...]  # one of these sets
    may_have: frozenset[str]
    delta: Callable[[Parts], Tensor] | None


def _lora(parts: Parts) -> Tensor:
    """[out, in] or, for convolutions, [out, in, kh, kw]."""
    up, down = parts["up"], parts["down"]
    if "mid" in parts:  # [r, r, kh, kw]: a convolution between two 1x1 convolutions
        return torch.einsum("or,rshw,si->oihw", up.flatten(1), parts["mid"], down.flatten(1))
    return (up.flatten(1) @ down.flatten(1)).view(len(up), *down.shape[1:])


def _loha(parts: Parts) -> Tensor:
    """Hadamard product of two low-rank matrices (LyCORIS)."""
    return _hada_factor(parts, "1") * _hada_factor(parts, "2")


def _hada_factor(parts: Parts, n: str) -> Tensor:
    a, b = parts[f"w{n}_a"], parts[f"w{n}_b"]
    return torch.einsum("ijkl,jr,ip->prkl", parts[f"t{n}"], b, a) if f"t{n}" in parts else a @ b


def _lokr(parts: Parts) -> Tensor:
    """Kronecker product of two matrices, each whole or as a low-rank product (LyCORIS)."""
    first = parts["k_w1"] if "k_w1" in parts else parts["k_w1_a"] @ parts["k_w1_b"]
    if "k_w2" in parts:
        second = parts["k_w2"]
    elif "k_t2" in parts:
        second = torch.einsum("ijkl,jr,ip->prkl", parts["k_t2"], parts["k_w2_b"], parts["k_w2_a"])
    else:
        second = parts["k_w2_a"].flatten(1) @ parts["k_w2_b"].flatten(1)
    return torch.kron(first.view(*first.shape, *[1] * (second.ndim - 2)), second)


def _sets(*names: str) -> tuple[frozenset[str], ...]:
    return tuple(frozenset(each.split()) for each in names)


_BIAS = frozenset({"diff_b"})
KINDS = {
    "LoRA": Kind(_sets("down up"), _BIAS | {"alpha", "mid", "magnitude"}, _lora),
    "LoHa": Kind(_sets("w1_a w1_b w2_a w2_b", "w1_a w1_b w2_a w2_b t1 t2"), _BIAS | {"alpha"}, _loha),
    "LoKr": Kind(
        _sets(
            *("k_w1 k_w2", "k_w1 k_w2_a k_w2_b", "k_w1_a k_w1_b k_w2", "k_w1_a k_w1_b k_w2_a k_w2_b"),
            *("k_w1 k_w2_a k_w2_b k_t2", "k_w1_a k_w1_b k_w2_a k_w2_b k_t2"),
        ),
        _BIAS | {"alpha"},
        _lokr,
    ),
    "difference": Kind(_sets("diff"), _BIAS, lambda parts: parts["diff"]),
    "difference of a norm": Kind(_sets("w_norm"), frozenset({"b_norm"}), lambda parts: parts["w_norm"]),
    "difference of a bias": Kind(_sets("diff_b", "b_norm"), frozenset(), None),
}


# Part of the name of cached images. Increase it whenever this module gives other weights for the same file.
VERSION = 1
DORA_VERSION = 2  # the same of changes with magnitudes


def changes_sha256(*networks: Mapping[str, Change]) -> str:
    """SHA-256 of changes by module, for each network: their tensors, kinds and scales, and this module's VERSION."""
    digest = hashlib.sha256(f"{VERSION}".encode())
    for changes in networks:
        for name, change in sorted(changes.items()):
            digest.update(f"{name} {change.kind} {change.scale}".encode())
            if "magnitude" in change.parts:
                digest.update(f"{DORA_VERSION}".encode())
            for part, tensor in sorted(change.parts.items()):
                digest.update(f"{part} {tensor.dtype} {list(tensor.shape)}".encode())
                digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def kind_of_change(parts: Mapping[str, Any]) -> str | None:
    """The kind whose tensors these are, without one too many or too few; None if there is none."""
    for name, kind in KINDS.items():
        if any(needed <= set(parts) and set(parts) - needed <= kind.may_have for needed in kind.needs):
            return name
    return None


@dataclass(frozen=True)
class Target:
    """A module of the base and its change."""

    name: str  # in the file
    module: nn.Module
    change: Change


def find_modules(pipeline: Any, changes: Mapping[str, Change], where: str, base_name: str) -> list[Target]:
    """The modules of the pipeline that each change is for; checks that the shapes fit.

    Raises:
        UnlearnError: the base lacks a module, it has another shape, or two changes are for one module.
    """
    tables, targets, missing = module_tables(pipeline), [], []
    taken: dict[int, str] = {}
    for name, change in changes.items():
        places = lookup(tables, name)
        if places is None:
            missing.append(name)
            continue
        for module, rows in places:
            own = dataclasses.replace(change, rows=rows)
            _check_fits(name, own, module, where, base_name)
            if id(module) in taken:
                raise UnlearnError(f"{where} changes one module twice: as {taken[id(module)]} and as {name}. Keep one.")
            taken[id(module)] = name
            targets.append(Target(name, module, own))
    if missing:
        raise UnlearnError(
            f"{where} does not fit {base_name}, which lacks {len(missing)} of the {len(changes)} modules that the file "
            f"changes, e.g. {missing[0]}. Use the base it was trained on."
        )
    return targets


def _check_fits(name: str, change: Change, module: nn.Module, where: str, base_name: str) -> None:
    weight, bias = module.weight, getattr(module, "bias", None)
    assert isinstance(weight, Tensor)
    meta = dataclasses.replace(change, parts={part: tensor.to("meta") for part, tensor in change.parts.items()})
    fault = ""
    try:
        meta.weight(weight.to("meta"), 1.0)
    except (ValueError, RuntimeError, IndexError) as error:
        fault = str(error).splitlines()[0]
    if change.bias is not None and (bias is None or change.bias.shape != bias.shape):
        fault = f"the change of the bias has the shape {list(change.bias.shape)}"
    if fault:
        raise UnlearnError(f"{where} does not fit {base_name}: {name}: {fault}. Use the base it was trained on.")


@contextmanager
def apply_changes(targets: Sequence[Target], strength: float, where: str) -> Iterator[None]:
    """Apply changes at a strength, and restore the base's weights, bit by bit, when the block ends.

    Raises:
        UnlearnError: a changed weight is not finite in the base's precision.
    """
    originals: list[tuple[Tensor, Tensor]] = []

    def replace(tensor: Tensor, value: Tensor | None, name: str) -> None:
        if value is None:
            return
        originals.append((tensor, tensor.to("cpu", copy=True)))
        tensor.copy_(value)
        if not tensor.isfinite().all():
            raise UnlearnError(f"{where} at strength {strength:g}: the weight of {name} is not finite. Lower it.")

    try:
        with torch.no_grad():
            for target in targets:
                weight, change = target.module.weight, target.change.bias
                assert isinstance(weight, Tensor)
                replace(weight, target.change.weight(weight, strength), target.name)
                if change is not None:
                    bias: Any = target.module.bias
                    replace(bias, bias.float() + strength * change.to(bias.device, torch.float32), target.name)
        yield
    finally:
        with torch.no_grad():
            for tensor, original in originals:
                tensor.copy_(original)
