"""Closed-form edits of cross-attention: baselines that need no images and no training steps.

Each edits a key or value projection W0 [out, in] so that the text embedding c of the concept is projected as that of an
anchor a was, and embeddings p to preserve as before. Every edit is a sum of n outer products, n the number of edited
embeddings, so it is written as a LoRA of rank n without truncation: W = W0 + up @ down.

Embeddings are rows: concepts C [n, in], anchors A [n, in], preserved P [m, in]. All is computed in float64. Each
function takes the weights of all edited layers and returns one edit for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


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

    def of_rank(self, rank: int) -> Edit:
        """The closest change of this rank, by its singular values, padded with zeros if its rank is lower.

        Both factors have the same norms, so that half precision can store them.
        """
        left, across = torch.linalg.qr(self.up)
        right, down = torch.linalg.qr(self.down.T)
        u, values, v = torch.linalg.svd(across @ down.T, full_matrices=False)
        root, missing = values[:rank].sqrt(), max(0, rank - len(values))
        return Edit(
            pad(left @ u[:, :rank] * root, (0, missing)),
            pad(root[:, None] * (v[:rank] @ right.T), (0, 0, 0, missing)),
        )


def uce(
    weights: Sequence[Tensor],
    concepts: Tensor,
    anchors: Tensor,
    preserved: Tensor,
    erase_weight: float = 1.0,
    strength: float = 0.5,
) -> list[Edit]:
    """Unified Concept Editing (Gandikota et al. 2024, arXiv 2308.14761, equation 7).

    W = (lam W0 + w sum W0 a c' + sum W0 p p') (lam I + w sum c c' + sum p p')^-1, lam = `strength` > 0. The paper has
    no w = `erase_weight` > 0; the authors' code does. The difference to W0 is w W0 (A - C)' C (lam I + w C'C + P'P)^-1:
    our way of writing it, which shows the rank.
    """
    concepts, anchors, preserved = _double(concepts, anchors, preserved)
    gram = strength * _eye_like(concepts) + erase_weight * concepts.T @ concepts + preserved.T @ preserved
    down = erase_weight * torch.linalg.solve(gram, concepts.T).T  # the same in all layers
    return [Edit(weight.double() @ (anchors - concepts).T, down) for weight in weights]


def speed(
    weights: Sequence[Tensor],
    concepts: Tensor,
    anchors: Tensor,
    preserved: Tensor,
    threshold: float = 0.1,
) -> list[Edit]:
    """Null-space constrained edit (Li et al. 2025, "SPEED", arXiv 2503.07392).

    Without the paper's refinements of the preserved set (filtering, augmentation, invariants), which the caller may do.
    The change acts only in the space in which the preserved embeddings have (almost) no part: D = W0 (A - C)' C Q
    (C'C Q + I)^-1 with Q the projection onto the eigenvectors of P'P with eigenvalues below `threshold`.
    """
    concepts, anchors, preserved = _double(concepts, anchors, preserved)
    projection = null_space(preserved, threshold)
    inner = concepts.T @ concepts @ projection + _eye_like(concepts)
    down = torch.linalg.solve(inner.T, (concepts @ projection).T).T  # the same in all layers
    return [Edit(weight.double() @ (anchors - concepts).T, down) for weight in weights]


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
    erase_weight: float = 1.0,
    epochs: int = 1,
    strength: float = 0.5,
    regularization: float = 0.1,
) -> list[Edit]:
    """Reliable and Efficient Concept Erasure (Gong et al. 2024, arXiv 2407.12383): UCE, repeated on what came back.

    After each edit the embedding c' is found whose projections by all edited weights are closest to those of c by the
    original ones (section 3.2, with `regularization` times |c'|^2), and mapped to the anchor by another UCE edit. The
    concept's own embedding is not part of later edits, so later epochs can move it back. The authors' code uses 3 for
    nudity, and 1 for objects and styles.
    """
    edits = uce(weights, concepts, anchors, preserved, erase_weight, strength)
    for _ in range(epochs):
        edited = [edit.apply(weight) for edit, weight in zip(edits, weights, strict=True)]
        returned = returning_embedding(weights, edited, concepts, regularization)
        more = uce(edited, returned, anchors, preserved, erase_weight, strength)
        edits = [edit.plus(extra) for edit, extra in zip(edits, more, strict=True)]
    return edits


def returning_embedding(
    weights: Sequence[Tensor], edited: Sequence[Tensor], concepts: Tensor, regularization: float
) -> Tensor:
    """[n, in] embeddings c' that minimize sum over layers |W c' - W0 c|^2 + regularization |c'|^2."""
    left = regularization * _eye_like(concepts.double())
    right = torch.zeros_like(left)
    for weight, new in zip(weights, edited, strict=True):
        left = left + new.double().T @ new.double()
        right = right + new.double().T @ weight.double()
    return torch.linalg.solve(left, right @ concepts.double().T).T


def _eye_like(embeddings: Tensor) -> Tensor:
    """[in, in] the identity for embeddings [n, in]."""
    return torch.eye(embeddings.shape[1], dtype=embeddings.dtype, device=embeddings.device)


def _double(*tensors: Tensor) -> list[Tensor]:
    return [tensor.double() for tensor in tensors]
