"""Closed-form edits of cross-attention: baselines that need no images and no training steps.

Each edits a key or value projection W0 [out, in] so that the text embedding c of the concept is projected as that of an
anchor a was, and embeddings p to preserve as before. Every edit is a sum of n outer products, n the number of edited
embeddings, so it is written as a LoRA of rank n without truncation: W = W0 + up @ down.

Embeddings are rows: concepts C [n, in], anchors A [n, in], preserved P [m, in]. All is computed in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Edit:
    """A change of a weight, up @ down."""

    up: Tensor  # [out, n]
    down: Tensor  # [n, in]

    def apply(self, weight: Tensor) -> Tensor:
        """weight [out, in] + up @ down, in float64."""
        return weight.double() + self.up @ self.down

    def plus(self, other: Edit) -> Edit:
        """Both changes together, of rank n + m."""
        return Edit(torch.cat([self.up, other.up], dim=1), torch.cat([self.down, other.down]))


def uce(weight: Tensor, concepts: Tensor, anchors: Tensor, preserved: Tensor, strength: float = 0.5) -> Edit:
    """Unified Concept Editing (Gandikota et al. 2024, arXiv 2308.14761, equation 7).

    W = (lam W0 + sum W0 a c' + sum W0 p p') (lam I + sum c c' + sum p p')^-1, lam = `strength` > 0. The difference to
    W0 is W0 (A - C)' C (lam I + C'C + P'P)^-1: our way of writing it, which shows the rank.
    """
    weight, concepts, anchors, preserved = _double(weight, concepts, anchors, preserved)
    eye = torch.eye(weight.shape[1], dtype=torch.float64, device=weight.device)
    gram = strength * eye + concepts.T @ concepts + preserved.T @ preserved
    return Edit(weight @ (anchors - concepts).T, torch.linalg.solve(gram, concepts.T).T)


def speed(weight: Tensor, concepts: Tensor, anchors: Tensor, preserved: Tensor, threshold: float = 0.1) -> Edit:
    """Null-space constrained edit (Li et al. 2025, "SPEED", arXiv 2503.07392).

    Without the paper's refinements of the preserved set (filtering, augmentation, invariants), which the caller may do.
    The change acts only in the space in which the preserved embeddings have (almost) no part: D = W0 (A - C)' C Q
    (C'C Q + I)^-1 with Q the projection onto the eigenvectors of P'P with eigenvalues below `threshold`.
    """
    weight, concepts, anchors, preserved = _double(weight, concepts, anchors, preserved)
    projection = null_space(preserved, threshold)
    eye = torch.eye(weight.shape[1], dtype=torch.float64, device=weight.device)
    inner = concepts.T @ concepts @ projection + eye
    return Edit(weight @ (anchors - concepts).T, torch.linalg.solve(inner.T, (concepts @ projection).T).T)


def null_space(preserved: Tensor, threshold: float) -> Tensor:
    """[in, in] the projection onto the eigenvectors of P'P with eigenvalues below `threshold`."""
    values, vectors = torch.linalg.eigh(preserved.double().T @ preserved.double())
    kept = vectors[:, values < threshold]
    return kept @ kept.T


def rece(
    weights: Sequence[Tensor],
    concepts: Tensor,
    anchors: Tensor,
    preserved: Tensor,
    strength: float = 0.5,
    epochs: int = 3,
    regularization: float = 0.1,
) -> list[Edit]:
    """Reliable and Efficient Concept Erasure (Gong et al. 2024, arXiv 2407.12383): UCE, repeated on what came back.

    After each edit the embedding c' is found whose projections by all edited weights are closest to those of c by the
    original ones (section 3.2, with `regularization` times |c'|^2), and mapped to the anchor by another UCE edit.
    weights: of all edited layers. Returns one edit for each.
    """
    edits = [uce(weight, concepts, anchors, preserved, strength) for weight in weights]
    for _ in range(epochs):
        edited = [edit.apply(weight) for edit, weight in zip(edits, weights, strict=True)]
        returned = returning_embedding(weights, edited, concepts, regularization)
        more = [uce(weight, returned, anchors, preserved, strength) for weight in edited]
        edits = [edit.plus(extra) for edit, extra in zip(edits, more, strict=True)]
    return edits


def returning_embedding(
    weights: Sequence[Tensor], edited: Sequence[Tensor], concepts: Tensor, regularization: float
) -> Tensor:
    """[n, in] embeddings c' that minimize sum over layers |W c' - W0 c|^2 + regularization |c'|^2."""
    size = weights[0].shape[1]
    left = regularization * torch.eye(size, dtype=torch.float64, device=weights[0].device)
    right = torch.zeros_like(left)
    for weight, new in zip(weights, edited, strict=True):
        left = left + new.double().T @ new.double()
        right = right + new.double().T @ weight.double()
    return torch.linalg.solve(left, right @ concepts.double().T).T


def _double(*tensors: Tensor) -> list[Tensor]:
    return [tensor.double() for tensor in tensors]
