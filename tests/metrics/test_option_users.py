"""An option that no chosen metric uses is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from sd_unlearn.config.evaluate import Detectors, EvaluateConfig
from sd_unlearn.errors import UsageError
from sd_unlearn.evaluation.job import resolve_job
from sd_unlearn.metrics.option_users import USED_BY, check_used, unused_options
from sd_unlearn.metrics.registry import NAMES


def test_every_option_of_detectors_has_its_metrics() -> None:
    assert set(USED_BY) | {"metrics"} == {field.name for field in dataclasses.fields(Detectors)}
    assert all(set(users) <= set(NAMES) for users in USED_BY.values())


@pytest.mark.parametrize(
    ("options", "names", "message"),
    [
        (
            {"others": Path("people")},
            ["digits"],
            "--others people is for --metrics identity; the .* are digits",
        ),
        ({"nudity_classes": ["A", "B"]}, ["clip"], "--nudity_classes A B is for --metrics nudity"),
        ({"clip_model": "foo"}, ["digits"], "--clip_model foo is for --metrics clip or cmmd"),
        ({"real_images": Path("real")}, ["clip", "lpips"], "--real_images real is for --metrics fidelity or cmmd"),
        ({"label": "bar"}, ["clip"], "--label bar is for --metrics classifier"),
    ],
)
def test_unused_options_are_refused(options: dict[str, Any], names: list[str], message: str) -> None:
    given = Detectors(**options)
    with pytest.raises(UsageError, match=message):
        check_used(given, names)
    assert unused_options(given, names) == list(options)
    check_used(given, [*names, *USED_BY[next(iter(options))][:1]])


def test_evaluate_refuses_them_unless_one_of_several_concepts_uses_them(tiny_base: Path) -> None:
    config = EvaluateConfig(
        concept=["seven", "three"], sld=["max"], nudity_threshold=0.5, pretrained_model_name_or_path=str(tiny_base)
    )
    with pytest.raises(UsageError, match=r"--nudity_threshold 0\.5 is for --metrics nudity; .* are digits\."):
        resolve_job(config)
