"""beta and what the brackets make of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from sd_unlearn.prior import ASSUMED_BETA, bracket_betas, resolve_beta
from sd_unlearn.records import DATA_MANIFEST, write_json


@pytest.mark.parametrize(
    ("arguments", "want"),
    [
        ((0.2, 0.0, 0.2, "both"), (0.2, 0.2)),  # the paper's risk
        ((0.2, 0.1, None, "both"), (0.5, 0.28)),
        ((0.2, 0.1, 0.3, "both"), (0.3, 0.28)),
        ((0.6, 0.1, None, "both"), (0.64, 0.64)),
        ((0.2, 0.1, None, "own"), (0.28,)),
        ((0.2, 0.1, None, "shared"), (0.5,)),
    ],
)
def test_betas_of_the_brackets(arguments: tuple[float, float, float | None, str], want: tuple[float, ...]) -> None:
    assert bracket_betas(*arguments) == pytest.approx(want)  # type: ignore[arg-type]


@pytest.mark.parametrize("beta", [0.001, 0.5, 0.999])
@pytest.mark.parametrize("margin", [0.0, 0.5, 0.99])
def test_a_margin_never_leaves_the_unit_interval(beta: float, margin: float) -> None:
    assert all(beta <= b < 1 for b in bracket_betas(beta, margin, None, "both"))


def test_the_option_wins_over_the_manifest_and_the_manifest_over_the_assumption(tmp_path: Path) -> None:
    assert resolve_beta(None, tmp_path) == (ASSUMED_BETA, "assumed")
    write_json(tmp_path / DATA_MANIFEST, {"beta": None})
    assert resolve_beta(None, tmp_path) == (ASSUMED_BETA, "assumed")
    write_json(tmp_path / DATA_MANIFEST, {"beta": 0.2})
    assert resolve_beta(None, tmp_path) == (0.2, "manifest")
    assert resolve_beta(0.3, tmp_path) == (0.3, "option")
