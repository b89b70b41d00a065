"""The PU risks equal their formulas, computed by hand and in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sd_unlearn.risk import (
    NORMAL,
    SMALLEST_NLL,
    UNLABELED,
    PUTerms,
    corrected,
    pnu_corrected,
    pnu_risk,
    pu_risk,
    pu_terms,
    sensitive_nll,
    several_pu_risk,
    supervised,
    supervised_risk,
    unsupervised,
    unsupervised_risk,
)

BETA = 0.25
# Five numbers: U = 2, 4, 6 (mean 4), S = ln 2 twice, of which -log(1 - exp(-l)) is ln 2 again.
FIVE = torch.tensor([2.0, 4.0, 6.0, math.log(2), math.log(2)], dtype=torch.float64)
POSITIVE = torch.tensor([False, False, False, True, True])
NORMALS = torch.tensor([True, False, False, False, False])
# The same with large S: the bracket 4 - 0.25 * 40 = -6 is negative.
NEGATIVE = torch.tensor([2.0, 4.0, 6.0, 30.0, 50.0], dtype=torch.float64)


def parts_of(nll: Tensor, is_positive: Tensor) -> PUTerms:
    return pu_terms(nll, torch.where(is_positive, 0, UNLABELED), [BETA])


def sensitive(value: float) -> float:
    return -math.log(-math.expm1(-value))


def sensitive_slope(value: float) -> float:
    """d/dl of -log(1 - exp(-l)) = -exp(-l) / (1 - exp(-l))."""
    return -math.exp(-value) / -math.expm1(-value)


def value_and_gradient(function: Callable[[Tensor], Tensor], nll: Tensor) -> tuple[float, list[float]]:
    leaf = nll.clone().requires_grad_()
    value = function(leaf)
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.item(), gradient.tolist()


def test_five_numbers_by_hand() -> None:
    terms = parts_of(FIVE, POSITIVE)
    assert terms.mean_u.item() == pytest.approx(4)
    assert terms.mean_s.item() == pytest.approx(math.log(2))
    assert terms.positive.item() == pytest.approx(0.25 * math.log(2))
    assert terms.bracket.item() == pytest.approx(4 - 0.25 * math.log(2))
    for correction in ("abs", "nn", "none"):  # the bracket is positive: all three are the same, here exactly 4
        assert pu_risk(FIVE, POSITIVE, BETA, correction).item() == pytest.approx(4)
    assert unsupervised_risk(FIVE, POSITIVE).item() == pytest.approx(4)
    assert supervised_risk(FIVE, POSITIVE, BETA).item() == pytest.approx(0.75 * 4 + 0.25 * math.log(2))


@pytest.mark.parametrize("positives", [0, 1, 3, 5])
def test_baselines_from_terms_equal_those_from_examples(positives: int) -> None:
    nll, is_positive = FIVE * 0.7, torch.arange(5) < positives
    terms = parts_of(nll, is_positive)
    assert supervised(terms, BETA).item() == pytest.approx(supervised_risk(nll, is_positive, BETA).item())
    assert unsupervised(terms).item() == pytest.approx(unsupervised_risk(nll, is_positive).item())


@pytest.mark.parametrize("weight", [None, torch.full((5,), 0.2, dtype=torch.float64)])
@pytest.mark.parametrize("betas", [[], [BETA], [0.1, 0.2]])
def test_without_positives_the_bracket_is_the_unlabeled_mean_and_other_terms_are_zero(
    weight: Tensor | None, betas: list[float]
) -> None:
    leaf = FIVE.clone().requires_grad_()
    terms = pu_terms(leaf, torch.full((5,), UNLABELED), betas, weight)
    assert (terms.positive.item(), terms.mean_s.item(), terms.mean_n.item()) == (0, 0, 0)
    assert terms.bracket.item() == terms.mean_u.item() == pytest.approx(FIVE.mean().item())
    for risk in (supervised(terms, BETA), unsupervised(terms), corrected(terms, "abs")):
        (gradient,) = torch.autograd.grad(risk, leaf, retain_graph=True)
        assert gradient.isfinite().all()
        assert (gradient > 0).all()


def test_corrections_of_a_negative_bracket_by_hand() -> None:
    tail = 0.25 * (sensitive(30) + sensitive(50)) / 2
    assert pu_risk(NEGATIVE, POSITIVE, BETA, "none").item() == pytest.approx(tail - 6)
    assert pu_risk(NEGATIVE, POSITIVE, BETA, "abs").item() == pytest.approx(tail + 6)
    assert pu_risk(NEGATIVE, POSITIVE, BETA, "nn").item() == pytest.approx(6)


@pytest.mark.parametrize("correction", ["abs", "nn", "none"])
@pytest.mark.parametrize("scale_s", [1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0, 1e3, 1e4])
@pytest.mark.parametrize("scale_u", [1e-3, 1.0, 1e4])
def test_value_and_gradient_equal_the_formula(correction: str, scale_s: float, scale_u: float) -> None:
    u, s = [1.0 * scale_u, 1.5 * scale_u, 3.0 * scale_u], [1.0 * scale_s, 0.5 * scale_s]
    got, gradient = value_and_gradient(
        lambda nll: pu_risk(nll, POSITIVE, BETA, correction), torch.tensor([*u, *s], dtype=torch.float64)
    )
    bracket = sum(u) / 3 - BETA * sum(s) / 2
    positive = BETA * sum(map(sensitive, s)) / 2
    sign = -1.0 if bracket < 0 and correction != "none" else 1.0
    has_positive = not (bracket < 0 and correction == "nn")
    assert got == pytest.approx(has_positive * positive + sign * bracket, rel=1e-9)
    want = [sign / 3] * 3
    want += [sign * -BETA / 2 + has_positive * BETA / 2 * sensitive_slope(value) for value in s]
    assert gradient == pytest.approx(want, rel=1e-9, abs=1e-12)


def test_those_scales_give_both_signs_of_the_bracket() -> None:
    signs = {math.copysign(1, 11 / 6 * u - BETA * 0.75 * s) for u in (1e-3, 1, 1e4) for s in (1e-3, 1e4)}
    assert signs == {1.0, -1.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finite_from_zero_to_a_million(dtype: torch.dtype) -> None:
    values = torch.tensor([0.0, 1e-30, 1e-8, 1e-6, 1e-3, 1.0, 88.0, 104.0, 1e3, 1e5, 1e6]).to(dtype)
    for value in values:
        for correction in ("abs", "nn", "none"):
            nll = value.expand(5).clone()
            got, gradient = value_and_gradient(lambda x, c=correction: pu_risk(x, POSITIVE, BETA, c), nll)
            assert math.isfinite(got)
            assert all(map(math.isfinite, gradient))
    assert pu_risk(values[:5], POSITIVE, BETA).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("correction", ["abs", "nn", "none"])
def test_autocast_changes_nothing(dtype: torch.dtype, correction: str) -> None:
    """Losses are float32 (per_example_loss), and 1e6 overflows float16, so nothing may be computed in less."""

    def risk(x: Tensor) -> Tensor:
        return pnu_risk(x, POSITIVE, NORMALS, BETA, 0.4, correction)  # type: ignore[arg-type]

    for low in (0.0, 1e-8, 1e-3, 1.0, 1e3, 1e6):
        for high in (0.0, 1.0, 1e6):
            nll = torch.tensor([low, high, low, high, 2 * low])
            with torch.autocast("cpu", dtype):
                found = value_and_gradient(risk, nll)
            assert found == value_and_gradient(risk, nll)
            assert all(map(math.isfinite, [found[0], *found[1]]))


def test_the_sensitive_loss_has_a_gradient_for_small_l_and_none_for_large_l() -> None:
    _, gradient = value_and_gradient(lambda x: sensitive_nll(x).sum(), torch.tensor([1e-3, 1.0, 1e3]))
    assert gradient[0] == pytest.approx(-1e3, rel=1e-3)
    assert gradient[1] == pytest.approx(sensitive_slope(1.0), rel=1e-5)
    assert gradient[2] == 0
    below = sensitive_nll(torch.tensor([0.0, SMALLEST_NLL / 10]))
    assert below.tolist() == pytest.approx([-math.log(SMALLEST_NLL)] * 2, rel=1e-3)


def test_without_positives_the_risk_is_the_unsupervised_part() -> None:
    got, gradient = value_and_gradient(lambda x: pu_risk(x, torch.zeros(5).bool(), BETA), FIVE)
    assert got == pytest.approx(FIVE.mean().item())
    assert gradient == pytest.approx([0.2] * 5)


@pytest.mark.parametrize("correction", ["abs", "nn", "none"])
def test_without_unlabeled_images_the_risk_and_its_gradient_are_zero(correction: str) -> None:
    got, gradient = value_and_gradient(lambda x: pu_risk(x, torch.ones(5).bool(), BETA, correction), FIVE)
    assert got == 0
    assert gradient == [0] * 5


@pytest.mark.parametrize(("nll", "other"), [(FIVE, -1.0), (NEGATIVE, 1.0)])
@pytest.mark.parametrize("correction", ["abs", "nn"])
def test_the_given_bracket_determines_only_the_sign(nll: Tensor, other: float, correction: str) -> None:
    def by_own(x: Tensor) -> Tensor:
        terms = parts_of(x, POSITIVE)
        return corrected(terms, correction, terms.bracket.detach() * 1e-9)

    def by_other(x: Tensor) -> Tensor:
        return corrected(parts_of(x, POSITIVE), correction, torch.tensor(other))

    assert value_and_gradient(by_own, nll) == value_and_gradient(lambda x: pu_risk(x, POSITIVE, BETA, correction), nll)
    terms = parts_of(nll, POSITIVE)
    got, gradient = value_and_gradient(by_other, nll)
    kept_positive = terms.positive.item() if correction == "abs" or other > 0 else 0.0
    assert got == pytest.approx(kept_positive + math.copysign(1, other) * terms.bracket.item())
    assert gradient[:3] == pytest.approx([math.copysign(1, other) / 3] * 3)


def test_parts_of_a_batch_give_the_whole_risk_with_the_whole_bracket() -> None:
    """Two processes with brackets +1.5 and -11.5 use the sign of the mean."""
    shares = [torch.tensor([4.0, 10.0], dtype=torch.float64), torch.tensor([1.0, 50.0], dtype=torch.float64)]
    mask = torch.tensor([False, True])
    whole = torch.tensor([4.0, 1.0, 10.0, 50.0], dtype=torch.float64)
    whole_mask = torch.tensor([False, False, True, True])
    bracket = parts_of(whole, whole_mask).bracket
    leaves = [share.clone().requires_grad_() for share in shares]
    risk = torch.stack([corrected(parts_of(leaf, mask), "abs", bracket) for leaf in leaves]).mean()
    value, gradient = value_and_gradient(lambda x: pu_risk(x, whole_mask, BETA), whole)
    assert bracket < 0 < parts_of(shares[0], mask).bracket
    assert risk.item() == pytest.approx(value)
    risk.backward()
    merged = [leaves[0].grad[0], leaves[1].grad[0], leaves[0].grad[1], leaves[1].grad[1]]  # type: ignore[index]
    assert [g.item() for g in merged] == pytest.approx(gradient)


def test_supervised_with_a_part_missing() -> None:
    none, every = torch.zeros(5).bool(), torch.ones(5).bool()
    assert supervised_risk(FIVE, none, BETA).item() == pytest.approx(0.75 * FIVE.mean().item())
    want = 0.25 * sum(map(sensitive, FIVE.tolist())) / 5
    assert supervised_risk(FIVE, every, BETA).item() == pytest.approx(want)


def test_pnu_is_pu_at_eta_zero_and_pn_at_eta_one() -> None:
    nll = torch.tensor([2.0, 4.0, 6.0, 0.5, 1.5, 3.0, 9.0], dtype=torch.float64)
    positive = torch.tensor([False, False, False, True, True, False, False])
    normal = torch.tensor([False, False, False, False, False, True, True])
    pu = pu_risk(nll[:5], positive[:5], BETA)
    pn = 0.75 * 6 + 0.25 * (sensitive(0.5) + sensitive(1.5)) / 2
    assert pnu_risk(nll, positive, normal, BETA, 0.0).item() == pytest.approx(pu.item())
    assert pnu_risk(nll, positive, normal, BETA, 1.0).item() == pytest.approx(pn)
    assert pnu_risk(nll, positive, normal, BETA, 0.3).item() == pytest.approx(0.7 * pu.item() + 0.3 * pn)
    _, at_zero = value_and_gradient(lambda x: pnu_risk(x, positive, normal, BETA, 0.0), nll)
    _, at_one = value_and_gradient(lambda x: pnu_risk(x, positive, normal, BETA, 1.0), nll)
    assert at_zero[5:] == [0, 0]  # normal images have no gradient in the PU risk
    assert at_one[:3] == [0, 0, 0]  # nor have unlabeled ones in the PN risk


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_a_beta_outside_its_range_is_refused(beta: float) -> None:
    with pytest.raises(ValueError, match="beta"):
        pu_risk(FIVE, POSITIVE, beta)


def test_wrong_shapes_and_corrections_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[B\]"):
        pu_risk(FIVE, POSITIVE[:4], BETA)
    with pytest.raises(ValueError, match=r"\[B\]"):
        pu_risk(FIVE.view(1, 5), POSITIVE.view(1, 5), BETA)
    with pytest.raises(ValueError, match="nnpu"):
        pu_risk(FIVE, POSITIVE, BETA, "nnpu")  # type: ignore[arg-type]


SETS = torch.tensor([-1, 0, -1, 1, 1, -1, 0, 2])
LOSSES = torch.tensor([2.0, 0.5, 4.0, 1.5, 3.0, 9.0, 0.1, 6.0], dtype=torch.float64)


@pytest.mark.parametrize("correction", ["abs", "nn", "none"])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_several_sets_equal_the_formula(correction: str, scale: float) -> None:
    """sum_k beta_k mean_k[-log(1 - exp(-l))] + |mean_U[l] - sum_k beta_k mean_k[l]|, its gradient."""
    betas = [0.2, 0.3, 0.1]
    factor = torch.where(SETS < 0, 1.0, scale).double()
    nll = LOSSES * factor
    losses, sets = nll.tolist(), SETS.tolist()
    count = {k: sets.count(k) for k in (-1, 0, 1, 2)}
    share = [1 / count[-1] if k < 0 else betas[k] / count[k] for k in sets]
    bracket = sum(w * v * (1 if k < 0 else -1) for w, v, k in zip(share, losses, sets, strict=True))
    assert (bracket < 0) == (scale > 1)
    positive = sum(w * sensitive(v) for w, v, k in zip(share, losses, sets, strict=True) if k >= 0)
    sign = -1 if correction == "abs" and bracket < 0 else 1
    slopes = [
        sign * w if k < 0 else w * (sensitive_slope(v) - sign) for w, v, k in zip(share, losses, sets, strict=True)
    ]
    want = positive + sign * bracket
    if correction == "nn" and bracket < 0:
        want, slopes = -bracket, [-w if k < 0 else w for w, k in zip(share, sets, strict=True)]
    value, gradient = value_and_gradient(
        lambda leaf: several_pu_risk(leaf, SETS, betas, correction),
        nll,  # type: ignore[arg-type]
    )
    assert value == pytest.approx(want, rel=1e-9)
    assert gradient == pytest.approx(slopes, rel=1e-9, abs=1e-12)


def test_one_set_is_the_ordinary_risk() -> None:
    for nll in (FIVE, NEGATIVE):
        one = several_pu_risk(nll, torch.where(POSITIVE, 0, -1), [BETA])
        assert one.item() == pytest.approx(pu_risk(nll, POSITIVE, BETA).item(), rel=1e-12)


def test_splitting_a_set_with_its_beta_changes_nothing() -> None:
    """The beta is divided in proportion to the examples."""
    whole = pu_terms(LOSSES, torch.where(SETS < 0, -1, 0), [0.5])
    halves = pu_terms(LOSSES, SETS, [0.2, 0.2, 0.1])  # two, two and one example
    for name in ("positive", "bracket", "mean_u", "mean_s"):
        assert getattr(whole, name).item() == pytest.approx(getattr(halves, name).item(), rel=1e-12)


def test_a_set_without_examples_is_left_out() -> None:
    missing = torch.where(SETS == 1, -1, SETS)
    without = torch.where(missing == 2, 1, missing)
    a = several_pu_risk(LOSSES, missing, [0.2, 0.3, 0.1])
    b = several_pu_risk(LOSSES, without, [0.2, 0.1])
    assert a.item() == pytest.approx(b.item(), rel=1e-12)
    nothing = torch.full_like(SETS, -1)
    assert several_pu_risk(LOSSES, nothing, [0.2]).item() == pytest.approx(LOSSES.mean().item())
    assert several_pu_risk(LOSSES, torch.zeros_like(SETS), [0.2]).item() == 0


@pytest.mark.parametrize(
    ("betas", "sets", "message"),
    [
        ([0.5, 0.5], SETS, "less than 1"),
        ([], SETS, "must lie"),
        ([0.2, 0.0, 0.1], SETS, "0.0"),
        ([0.2, 0.1], SETS, "2 betas are given"),
        ([0.2, 0.1, 0.1], SETS[:3], "must both be"),
    ],
)
def test_invalid_betas_and_sets_are_refused(betas: list[float], sets: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        several_pu_risk(LOSSES, sets, betas)


@pytest.mark.parametrize("correction", ["abs", "nn", "none"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_value_and_gradient_of_pnu_equal_the_formula(correction: str, scale: float) -> None:
    """(1 - eta) PU + eta [(1 - beta) mean_N l + beta mean_S -log(1 - exp(-l))], for losses from 1e-3 to 1e4."""
    nll, eta = torch.tensor([2.0, 5.0, 7.0, scale, 0.5 * scale, 3.0], dtype=torch.float64), 0.3
    positive, normal = torch.tensor([0, 0, 0, 1, 1, 0]).bool(), torch.tensor([0, 0, 1, 0, 0, 1]).bool()
    bracket, tail = 3.5 - BETA * 0.75 * scale, BETA * (sensitive(scale) + sensitive(0.5 * scale)) / 2
    sign = -1.0 if bracket < 0 and correction != "none" else 1.0
    has_tail = not (bracket < 0 and correction == "nn")
    want = (1 - eta) * (has_tail * tail + sign * bracket) + eta * ((1 - BETA) * 5.0 + tail)
    got, gradient = value_and_gradient(
        lambda x: pnu_risk(x, positive, normal, BETA, eta, correction),
        nll,  # type: ignore[arg-type]
    )
    assert got == pytest.approx(want, rel=1e-9)
    slopes = [sensitive_slope(value) * BETA / 2 for value in (scale, 0.5 * scale)]
    of_s = [(1 - eta) * (has_tail * slope - sign * BETA / 2) + eta * slope for slope in slopes]
    of_u, of_n = (1 - eta) * sign / 2, eta * (1 - BETA) / 2
    assert gradient == pytest.approx([of_u, of_u, of_n, *of_s, of_n], rel=1e-9, abs=1e-12)
    assert (bracket < 0) == (scale == 1e4)


@pytest.mark.parametrize("correction", ["abs", "nn", "none"])
@pytest.mark.parametrize("nll", [FIVE, NEGATIVE])
def test_pnu_from_terms_equals_pnu_from_examples(nll: Tensor, correction: str) -> None:
    label = torch.where(NORMALS, NORMAL, torch.where(POSITIVE, 0, UNLABELED))
    terms = pu_terms(nll, label, [BETA])
    for eta in (0.0, 0.4, 1.0):
        got = pnu_corrected(terms, correction, eta)  # type: ignore[arg-type]
        want = pnu_risk(nll, POSITIVE, NORMALS, BETA, eta, correction)  # type: ignore[arg-type]
        assert got.item() == pytest.approx(want.item(), rel=1e-12)
    assert terms.mean_n.item() == nll[0]
    assert pu_terms(nll, torch.where(POSITIVE, 0, UNLABELED), [BETA]).negative == 0


def test_pnu_with_a_part_missing() -> None:
    nothing, unlabeled = torch.zeros(5).bool(), ~POSITIVE & ~NORMALS
    only = {"N": NORMALS, "U": unlabeled, "S": POSITIVE}

    def risk(*parts: str) -> float:
        here = torch.stack([only[p] for p in parts]).any(0)
        return pnu_risk(FIVE[here], POSITIVE[here], NORMALS[here], BETA, 0.4).item()

    tail = BETA * math.log(2)
    assert risk("U", "S") == pytest.approx(0.6 * (tail + abs(5 - tail)) + 0.4 * tail)
    assert risk("U", "N") == pytest.approx(0.6 * 5 + 0.4 * 0.75 * 2)
    assert risk("S", "N") == pytest.approx(0.4 * (0.75 * 2 + tail))  # never the bracket of positives alone
    assert risk("S") == pytest.approx(0.4 * tail)
    assert pnu_risk(FIVE, nothing, nothing, BETA, 0.4).item() == pytest.approx(0.6 * FIVE.mean().item())


def test_pnu_refuses_invalid_eta_and_shapes() -> None:
    for eta in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="eta"):
            pnu_risk(FIVE, POSITIVE, NORMALS, BETA, eta)
    with pytest.raises(ValueError, match="shapes"):
        pnu_risk(FIVE, POSITIVE, NORMALS[:3], BETA, 0.5)
