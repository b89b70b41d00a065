"""The positive-unlabeled risks, as pure functions of per-example losses.

Takahashi et al., "Positive-Unlabeled Diffusion Models for Preventing Sensitive Data Generation", ICLR 2025
(arXiv 2503.03789). With l the noise-prediction loss of an example, p(normal | x) = exp(-l), so the loss of
calling x normal is l and that of calling it sensitive is -log(1 - exp(-l)). Unlabeled images U are a mixture,
p_U = beta p_S + (1 - beta) p_N, hence (1 - beta) E_N[l] = E_U[l] - beta E_S[l]: the *bracket*. A flexible model
can drive its estimate below zero, although the expectation of a loss cannot be negative; `correction` selects how that
is handled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sd_unlearn.choices import Correction

UNLABELED, NORMAL = -1, -2  # labels of examples; a sensitive image has the number of its set, from 0
# Below this l the sensitive loss -log(1 - exp(-l)) is held constant: it and its gradient 1/l stay finite in float32.
SMALLEST_NLL = 1e-6


@dataclass(frozen=True)
class PUTerms:
    """The terms of one PU or PNU risk: scalar tensors, differentiable."""

    positive: Tensor  # sum_k beta_k mean_k[-log(1 - exp(-l))], over the sensitive sets k
    bracket: Tensor  # mean_U[l] - sum_k beta_k mean_k[l]
    mean_u: Tensor
    mean_s: Tensor  # mean over the sets, weighted by beta_k
    negative: Tensor  # (1 - sum_k beta_k) mean_N[l]; zero without images known to be normal
    mean_n: Tensor


def sensitive_nll(nll: Tensor) -> Tensor:
    """-log(1 - exp(-l)) in its stable form -log(-expm1(-l)); nll [B] >= 0 -> [B]."""
    return -torch.log(-torch.expm1(-nll.clamp(min=SMALLEST_NLL)))


def pu_terms(nll: Tensor, label: Tensor, betas: Sequence[float], weight: Tensor | None = None) -> PUTerms:
    """The terms of the risk of a batch; terms of kinds that the batch lacks are zero.

    p_U = sum_k beta_k p_k + (1 - sum_k beta_k) p_N: all sensitive sets share one bracket.

    nll: [B] >= 0; label: [B] long, UNLABELED, NORMAL or the number of a positive's set; betas: of each set, in (0, 1),
    together below 1; weight: [B], for a part of a larger batch, such that the average of these terms over all parts is
    the larger batch's. Without weights each kind is averaged, and a set that the batch lacks is left out of all sums.
    Computed in float32 or float64.
    """
    nll = _wide(nll)
    sets = [(beta, label == k) for k, beta in enumerate(betas)]
    if weight is None:
        sets = [(beta, here) for beta, here in sets if here.any()]
        weight = _equal_weights(label)
    weight = weight.to(nll.dtype)

    def mean(values: Tensor, here: Tensor) -> Tensor:  # indexing by a mask would wait for the device
        return torch.where(here, weight * values, 0).sum()

    total = sum(beta for beta, _ in sets)
    means = [(beta, mean(nll, here)) for beta, here in sets]
    sensitive = sensitive_nll(nll)
    zero = torch.zeros_like(sensitive).sum()  # the sum if there are no sets

    def added(scalars: Sequence[Tensor]) -> Tensor:
        return torch.stack([zero, *scalars]).sum()

    positive = added([beta * mean(sensitive, here) for beta, here in sets])
    mean_u, mean_n = (mean(nll, here) for here in (label == UNLABELED, label == NORMAL))
    bracket = mean_u - added([beta * mean_k for beta, mean_k in means])
    mean_s = added([beta / total * mean_k for beta, mean_k in means])
    return PUTerms(positive, bracket, mean_u, mean_s, (1 - total) * mean_n, mean_n)


def _wide(nll: Tensor) -> Tensor:
    return nll if nll.dtype == torch.float64 else nll.float()


def _equal_weights(label: Tensor) -> Tensor:
    """[B] float64: one over the number of examples with the same label."""
    _, kind, counts = label.unique(return_inverse=True, return_counts=True)
    return 1 / counts[kind].double()


def corrected(terms: PUTerms, correction: Correction, bracket: Tensor | None = None) -> Tensor:
    """The risk to minimise.

    abs:  positive + |bracket|                                      (the paper's choice)
    nn:   positive + bracket while it is >= 0, else -bracket alone  (Kiryo et al. 2017, algorithm 1)
    none: positive + bracket                                        (du Plessis et al. 2015)

    `bracket`: the value whose sign counts, when these terms are only a part of the batch: d|R| = sign(R) dR needs the
    sign of the whole batch's R, but only the part's own dR.
    """
    negative = (terms.bracket if bracket is None else bracket).detach() < 0
    if correction == "none":
        return terms.positive + terms.bracket
    if correction == "abs":
        return terms.positive + torch.where(negative, -terms.bracket, terms.bracket)
    if correction == "nn":
        return torch.where(negative, -terms.bracket, terms.positive + terms.bracket)
    raise ValueError(f"correction {correction!r} is unknown; choose abs, nn or none")


def pnu_corrected(terms: PUTerms, correction: Correction, eta: float, bracket: Tensor | None = None) -> Tensor:
    """(1 - eta) PU risk + eta PN risk (Sakai et al. 2017); eta in [0, 1], the rest as in `corrected`.

    The PN risk is (1 - beta) mean_N[l] + beta mean_S[-log(1 - exp(-l))].
    """
    risk = corrected(terms, correction, bracket)
    return (1 - eta) * risk + eta * (terms.negative + terms.positive) if eta else risk


def supervised(terms: PUTerms, beta: float) -> Tensor:
    """`supervised_risk` from the terms of the examples; beta: of all sets together, in (0, 1)."""
    return (1 - beta) * terms.mean_u + terms.positive


def unsupervised(terms: PUTerms) -> Tensor:
    """`unsupervised_risk` from the terms of the examples."""
    return terms.mean_u


def pu_risk(nll: Tensor, is_positive: Tensor, beta: float, correction: Correction = "abs") -> Tensor:
    """The PU risk of one batch, a scalar.

    nll: [B] >= 0, per-example noise-prediction losses; is_positive: [B] bool, True for labeled sensitive images;
    beta: prior in (0, 1). Without positives the risk is the unsupervised part, mean_U[l]; without unlabeled examples
    it is zero, because under abs the bracket of positives alone would train the concept in.

    Raises:
        ValueError: beta outside (0, 1), shapes that differ, an unknown correction.
    """
    return several_pu_risk(nll, torch.where(is_positive.bool(), 0, UNLABELED), [beta], correction)


def several_pu_risk(
    nll: Tensor, positive_set: Tensor, betas: Sequence[float], correction: Correction = "abs"
) -> Tensor:
    """The PU risk with several sensitive sets, a scalar: p_U = sum_k beta_k p_k + (1 - sum_k beta_k) p_N.

    nll: [B] >= 0; positive_set: [B] long, -1 for unlabeled examples, else the number of the set, from 0; betas: of
    each set. Sets or unlabeled examples may be missing, as in pu_risk.

    Raises:
        ValueError: a beta outside (0, 1), betas that add up to 1 or more, a set without a beta, shapes that differ.
    """
    check_betas(betas)
    if nll.shape != positive_set.shape or nll.ndim != 1:
        raise ValueError(f"nll {tuple(nll.shape)} and the labels {tuple(positive_set.shape)} must both be [B]")
    if len(positive_set) and not UNLABELED <= int(positive_set.min()) <= int(positive_set.max()) < len(betas):
        raise ValueError(f"sets {positive_set.unique().tolist()}: {len(betas)} betas are given, counted from 0")
    unlabeled = positive_set == UNLABELED
    if unlabeled.all() or not unlabeled.any():
        return unsupervised_risk(nll, ~unlabeled)
    return corrected(pu_terms(nll, positive_set, betas), correction)


def check_betas(betas: Sequence[float]) -> None:
    """Check that the priors can be those of disjoint sets in one mixture.

    Raises:
        ValueError: the list is empty, a beta is outside (0, 1), or their sum is 1 or more.
    """
    if not betas or not all(0 < beta < 1 for beta in betas) or sum(betas) >= 1:
        raise ValueError(f"beta is {list(betas)}; each must lie in (0, 1) and all together must be less than 1")


def unsupervised_risk(nll: Tensor, is_positive: Tensor | None = None) -> Tensor:
    """mean_U[l]: ordinary training on the unlabeled examples; zero (with a gradient of zero) if there are none."""
    nll = _wide(nll)
    u = nll if is_positive is None else nll[~is_positive.bool()]
    return u.mean() if len(u) else nll.sum() * 0


def supervised_risk(nll: Tensor, is_positive: Tensor, beta: float) -> Tensor:
    """(1 - beta) mean_U[l] + beta mean_S[-log(1 - exp(-l))]: treats all of U as normal; a baseline of the paper.

    nll: [B] >= 0; is_positive: [B] bool; beta: in (0, 1). A missing part counts as zero.
    """
    wide = _wide(nll)
    s = wide[is_positive.bool()]
    sensitive = sensitive_nll(s).mean() if len(s) else wide.sum() * 0
    return (1 - beta) * unsupervised_risk(wide, is_positive) + beta * sensitive


def pnu_risk(
    nll: Tensor, is_positive: Tensor, is_normal: Tensor, beta: float, eta: float, correction: Correction = "abs"
) -> Tensor:
    """PNU: (1 - eta) PU risk + eta PN risk, for a batch that also holds images known to be normal (Sakai et al. 2017).

    nll: [B] >= 0; is_positive, is_normal: [B] bool, disjoint, the rest unlabeled; beta in (0, 1); eta in [0, 1].
    The PN risk is (1 - beta) mean_N[l] + beta mean_S[-log(1 - exp(-l))]. Both risks are defined if a part of the batch
    is missing, see pu_risk and supervised_risk.

    Raises:
        ValueError: eta outside [0, 1], shapes that differ, and as pu_risk.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}; it must lie in [0, 1]")
    if not nll.shape == is_positive.shape == is_normal.shape:
        raise ValueError(f"shapes differ: {tuple(nll.shape)}, {tuple(is_positive.shape)}, {tuple(is_normal.shape)}")
    unlabeled_or_positive = ~is_normal.bool()
    pu = pu_risk(nll[unlabeled_or_positive], is_positive[unlabeled_or_positive], beta, correction)
    labeled = (is_positive | is_normal).bool()
    return (1 - eta) * pu + eta * supervised_risk(nll[labeled], is_positive[labeled], beta)
