"""Images of the student: what a pipeline is left with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attack_cases import make_target

from sd_unlearn.data.encoding import encode_captions
from sd_unlearn.models.base import Base


def test_the_vae_goes_back_to_where_it_was(loaded_base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the CPU during a training; an attack needs it on its device later."""
    vae, places = loaded_base.pipeline.vae, list[Any]()
    monkeypatch.setattr(type(vae), "to", lambda self, place: places.append(place) or self)
    monkeypatch.setattr(type(vae), "device", torch.device("cpu", 0))
    target = make_target(loaded_base)
    target.generate(encode_captions(loaded_base, [target.concept.caption]), [1])
    assert places[0] == loaded_base.device
    assert places[-1] == torch.device("cpu", 0)
