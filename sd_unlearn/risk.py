"""The positive-unlabeled risks, as pure functions of per-example losses.

Takahashi et al., "Positive-Unlabeled Diffusion Models for Preventing Sensitive Data Generation", ICLR 2025
(arXiv 2503.03789). With l the noise-prediction loss of an example, p(normal | x) = exp(-l), so the loss of
calling x normal is l and that of calling it sensitive is -log(1 - exp(-l)). Unlabeled images U are a mixture,
p_U = beta p_S + (1 - beta) p_N, hence (1 - beta) E_N[l] = E_U[l] - beta E_S[l]: the *bracket*. A flexible model
can drive its estimate below zero, which no expectation of l can be; `correction` says what happens then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Correction = Literal["abs", "nn", "none"]
# Below this l the sensitive loss -log(1 - exp(-l)) is held constant: it and its gradient 1/l stay finite in float32.
SMALLEST_NLL = 1e-6


@dataclass(frozen=True)
class PUTerms:
    """The parts of one PU risk, each a scalar tensor with its gradient."""

    positive: Tensor  # beta mean_S[-log(1 - exp(-l))]
    bracket: Tensor  # mean_U[l] - beta mean_S[l]
    mean_u: Tensor
    mean_s: Tensor


def sensitive_nll(nll: Tensor) -> Tensor:
    """-log(1 - exp(-l)) in its stable form -log(-expm1(-l)); nll [B] >= 0 -> [B]."""
    return -torch.log(-torch.expm1(-nll.clamp(min=SMALLEST_NLL)))


def pu_terms(nll: Tensor, is_positive: Tensor, beta: float, weight: Tensor | None = None) -> PUTerms:
    """The parts of the risk of a batch with at least one positive and one unlabeled example.

    nll: [B] >= 0; is_positive: [B] bool; beta: in (0, 1); weight: [B], for a part of a larger batch, so that the
    average of these terms over all parts is the larger batch's. Computed in float32 or wider.
    """
    nll = nll if nll.dtype == torch.float64 else nll.float()
    if weight is None:
        weight = 1 / torch.where(is_positive, is_positive.sum(), (~is_positive).sum()).to(nll.dtype)
    of_s, of_u = weight.to(nll.dtype)[is_positive], weight.to(nll.dtype)[~is_positive]
    s = nll[is_positive]
    mean_u, mean_s = (of_u * nll[~is_positive]).sum(), (of_s * s).sum()
    return PUTerms(beta * (of_s * sensitive_nll(s)).sum(), mean_u - beta * mean_s, mean_u, mean_s)


def corrected(terms: PUTerms, correction: Correction, bracket: Tensor | None = None) -> Tensor:
    """The risk whose gradient is to be followed.

    abs:  positive + |bracket|                                      (the paper's choice)
    nn:   positive + bracket while it is >= 0, else -bracket alone  (Kiryo et al. 2017, algorithm 1)
    none: positive + bracket                                        (du Plessis et al. 2015)

    `bracket` gives the value whose sign decides when these terms are only one rank's share of the batch:
    d|R| = sign(R) dR needs the sign of the whole batch's R, and only its own dR.
    """
    negative = (terms.bracket if bracket is None else bracket).detach() < 0
    if correction == "none":
        return terms.positive + terms.bracket
    if correction == "abs":
        return terms.positive + torch.where(negative, -terms.bracket, terms.bracket)
    if correction == "nn":
        return torch.where(negative, -terms.bracket, terms.positive + terms.bracket)
    raise ValueError(f"correction {correction!r} is unknown; choose abs, nn or none")


def pu_risk(nll: Tensor, is_positive: Tensor, beta: float, correction: Correction = "abs") -> Tensor:
    """The PU risk of one batch, a scalar.

    nll: [B] >= 0, per-example noise-prediction losses; is_positive: [B] bool, True for labeled sensitive images;
    beta: prior in (0, 1). A batch without positives is the unsupervised part alone, mean_U[l]; one without
    unlabeled examples is zero, because the bracket of positives alone would, under abs, train the concept in.

    Raises:
        ValueError: beta outside (0, 1), shapes that differ, an unknown correction.
    """
    if not 0 < beta < 1:
        raise ValueError(f"beta is {beta}; it must lie in (0, 1)")
    if nll.shape != is_positive.shape or nll.ndim != 1:
        raise ValueError(f"nll {tuple(nll.shape)} and is_positive {tuple(is_positive.shape)} must both be [B]")
    is_positive = is_positive.bool()
    if not is_positive.any() or is_positive.all():
        return unsupervised_risk(nll, is_positive)
    return corrected(pu_terms(nll, is_positive, beta), correction)


def several_pu_terms(nll: Tensor, positive_set: Tensor, betas: Sequence[float]) -> PUTerms:
    """The parts of the risk of several sensitive sets: p_U = sum_k beta_k p_k + (1 - sum_k beta_k) p_N, one bracket.

    nll: [B] >= 0, at least one example unlabeled and one positive; positive_set: [B] long, -1 for unlabeled, else k;
    betas: of each set, in (0, 1). A set without an example in the batch is left out of both sums. mean_s is the mean
    over sets, weighted by beta_k.
    """
    unlabeled = positive_set < 0
    sets = []
    for k, beta in enumerate(betas):
        here = positive_set == k
        if here.any():
            sets.append((beta, pu_terms(nll[here | unlabeled], here[here | unlabeled], beta)))
    positive = torch.stack([terms.positive for _, terms in sets]).sum()
    pushed = torch.stack([beta * terms.mean_s for beta, terms in sets]).sum()
    mean_u = sets[0][1].mean_u
    return PUTerms(positive, mean_u - pushed, mean_u, pushed / sum(beta for beta, _ in sets))


def several_pu_risk(
    nll: Tensor, positive_set: Tensor, betas: Sequence[float], correction: Correction = "abs"
) -> Tensor:  # fmt: skip
    """The PU risk with several sensitive sets, a scalar; arguments as in several_pu_terms, and any batch as in pu_risk.

    Raises:
        ValueError: a beta outside (0, 1), betas that add up to 1 or more, a set without a beta, shapes that differ.
    """
    if not betas or not all(0 < beta < 1 for beta in betas) or sum(betas) >= 1:
        raise ValueError(f"betas are {list(betas)}; each must lie in (0, 1) and they must add up to less than 1")
    if nll.shape != positive_set.shape or nll.ndim != 1:
        raise ValueError(f"nll {tuple(nll.shape)} and positive_set {tuple(positive_set.shape)} must both be [B]")
    if len(positive_set) and int(positive_set.max()) >= len(betas):
        raise ValueError(f"set {int(positive_set.max())} has no beta; {len(betas)} are given, counted from 0")
    unlabeled = positive_set < 0
    if unlabeled.all() or not unlabeled.any():
        return unsupervised_risk(nll, ~unlabeled)
    return corrected(several_pu_terms(nll, positive_set, betas), correction)


def unsupervised_risk(nll: Tensor, is_positive: Tensor | None = None) -> Tensor:
    """mean_U[l]: ordinary training on the unlabeled examples; zero (with a gradient of zero) if there are none."""
    nll = nll if nll.dtype == torch.float64 else nll.float()
    u = nll if is_positive is None else nll[~is_positive.bool()]
    return u.mean() if len(u) else nll.sum() * 0


def supervised_risk(nll: Tensor, is_positive: Tensor, beta: float) -> Tensor:
    """(1 - beta) mean_U[l] + beta mean_S[-log(1 - exp(-l))]: U taken for normal as it is; the baseline of the paper.

    nll: [B] >= 0; is_positive: [B] bool; beta: in (0, 1). A missing part counts zero.
    """
    wide = nll if nll.dtype == torch.float64 else nll.float()
    s = wide[is_positive.bool()]
    sensitive = sensitive_nll(s).mean() if len(s) else wide.sum() * 0
    return (1 - beta) * unsupervised_risk(wide, is_positive) + beta * sensitive


def pnu_risk(
    nll: Tensor, is_positive: Tensor, is_normal: Tensor, beta: float, eta: float, correction: Correction = "abs"
) -> Tensor:
    """PNU: (1 - eta) PU risk + eta PN risk, for a batch that also holds images known to be normal (Sakai et al. 2017).

    nll: [B] >= 0; is_positive, is_normal: [B] bool, disjoint, the rest unlabeled; beta in (0, 1); eta in [0, 1].
    The PN risk is (1 - beta) mean_N[l] + beta mean_S[-log(1 - exp(-l))].
    """
    unlabeled_or_positive = ~is_normal.bool()
    pu = pu_risk(nll[unlabeled_or_positive], is_positive[unlabeled_or_positive], beta, correction)
    labeled = (is_positive | is_normal).bool()
    return (1 - eta) * pu + eta * supervised_risk(nll[labeled], is_positive[labeled], beta)
