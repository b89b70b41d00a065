"""Where beta is from."""

from __future__ import annotations

from pathlib import Path

from sd_unlearn.prior import ASSUMED_BETA, resolve_beta
from sd_unlearn.records import DATA_MANIFEST, write_json


def test_the_option_wins_over_the_manifest_and_the_manifest_over_the_assumption(tmp_path: Path) -> None:
    assert resolve_beta(None, tmp_path) == (ASSUMED_BETA, "assumed")
    write_json(tmp_path / DATA_MANIFEST, {"beta": None})
    assert resolve_beta(None, tmp_path) == (ASSUMED_BETA, "assumed")
    write_json(tmp_path / DATA_MANIFEST, {"beta": 0.2})
    assert resolve_beta(None, tmp_path) == (0.2, "manifest")
    assert resolve_beta(0.3, tmp_path) == (0.3, "option")
