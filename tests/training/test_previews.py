"""Images of the student: what a pipeline is left with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from attack_cases import make_target

from sd_unlearn.data.encoding import encode_captions
from sd_unlearn.models.base import Base
from sd_unlearn.training.previews import ImageGenerator, PreviewWriter


def test_the_vae_goes_back_to_where_it_was(loaded_base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the CPU during a training; an attack needs it on its device later."""
    vae, places = loaded_base.pipeline.vae, list[Any]()
    monkeypatch.setattr(type(vae), "to", lambda self, place: places.append(place) or self)
    monkeypatch.setattr(type(vae), "device", torch.device("cpu", 0))
    target = make_target(loaded_base)
    target.generate(encode_captions(loaded_base, [target.concept.caption]), [1])
    assert places[0] == loaded_base.device
    assert places[-1] == torch.device("cpu", 0)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("another fault")])
def test_a_vae_that_does_not_fit_costs_the_preview_only(
    loaded_base: Base, tmp_path: Path, capsys: pytest.CaptureFixture[str], error: RuntimeError
) -> None:
    target, network = make_target(loaded_base), loaded_base.network
    vae, moves = loaded_base.pipeline.vae, list[Any]()

    def to(place: Any) -> None:
        moves.append(place)
        if len(moves) == 1:
            raise error

    vae.to = to
    generator = ImageGenerator(loaded_base, target.sampler, lambda captions: torch.zeros(len(captions), 1), network)
    write = PreviewWriter(generator, target.concept, 0, tmp_path)
    network.train()
    if isinstance(error, torch.OutOfMemoryError):
        write(7)
        assert "Preview of step 7 skipped" in capsys.readouterr().err
    else:
        with pytest.raises(RuntimeError, match="another fault"):
            write(7)
    assert network.training
