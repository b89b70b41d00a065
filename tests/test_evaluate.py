"""Evaluation: with which schedule both sides are drawn (the whole stage is tested by test_street.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sd_unlearn import evaluate, render
from sd_unlearn.base import Base, load_base
from sd_unlearn.concept import Prompt
from sd_unlearn.config import EvaluateConfig
from sd_unlearn.render import Sampler
from sd_unlearn.student import make_student
from sd_unlearn.train_config import Weights

pytestmark = pytest.mark.usefixtures("one_thread")


def test_both_sides_are_drawn_with_the_schedule_of_the_training(
    v_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_base(str(v_base), device="cpu")
    make_student(base, Weights(rank=2), 0, needs_teacher=False).save(tmp_path)
    training: dict[str, Any] = {"base": {"sha256": base.sha256}}
    config = EvaluateConfig(run=tmp_path, cache_dir=tmp_path / "cache")
    shots = [evaluate.Shot("direct", Prompt("a dog"), 1)]
    last: list[float] = []
    draw = render.draw

    def watched(base: Base, *arguments: Any) -> Any:
        last.append(base.pipeline.scheduler.alphas_cumprod[-1].item())
        return draw(base, *arguments)

    monkeypatch.setattr(render, "draw", watched)
    sampler = Sampler(2, 3.0, 1)
    plain, of_old, zero = (
        evaluate._draw_both(config, tmp_path, training | record, str(v_base), shots, sampler)
        for record in ({"zero_terminal_snr": False}, {}, {"zero_terminal_snr": True})
    )
    assert plain == of_old  # a run of before the option; its pictures were there already
    assert [value == 0 for value in last] == [False, False, True, True]
    for subject in ("base", "lora"):
        assert plain[subject] != zero[subject]
        assert plain[subject][0].read_bytes() != zero[subject][0].read_bytes()
