"""Leaving a digit or an ink out of the training data of the bundled base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("concept", "left"), [("seven", [0, 3]), ("red", [0, 1])])
def test_a_pool_without_a_concept(concept: str, left: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from build_digits import leave_out

    latents = torch.arange(4.0).view(4, 1, 1, 1)
    digits, inks = torch.tensor([1, 7, 7, 0]), torch.tensor([0, 3, 1, 1])
    kept = leave_out((latents, digits, inks), concept)
    assert [rows.tolist() for rows in (kept[1], kept[2])] == [digits[left].tolist(), inks[left].tolist()]
    assert kept[0].flatten().tolist() == left
