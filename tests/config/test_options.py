"""Ranges of options, and docs/options.md, which says of every option when to change it."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from sd_unlearn import concepts
from sd_unlearn.commands import COMMANDS
from sd_unlearn.config.batch import BatchConfig
from sd_unlearn.config.checks import check_evaluate, check_train
from sd_unlearn.config.evaluate import EvaluateConfig
from sd_unlearn.config.options import Range, check_ranges
from sd_unlearn.config.train import TrainConfig
from sd_unlearn.errors import UsageError
from sd_unlearn.paper.options import RunOptions

PAGE = Path(__file__).parent.parent.parent / "docs" / "options.md"


def names(command: str) -> set[str]:
    return {field.name for field in fields(COMMANDS[command])}


def test_the_page_lists_exactly_the_options_of_each_command() -> None:
    sections = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    rows = {s.splitlines()[0]: re.findall(r"^\| `--(\w+)` \| \S.* \|$", s, re.MULTILINE) for s in sections}
    assert all(len(options) == len(set(options)) for options in rows.values())
    assert {title: set(options) for title, options in rows.items()} == {
        "render and train": names("render"),
        "train only": names("train") - names("render"),
        **{command: names(command) for command in ("evaluate", "attack", "calibrate", "fuse", "export", "report")},
        "batch": {field.name for field in fields(BatchConfig)} - {"jobs"},
        "concepts new": set(inspect.signature(concepts.new).parameters) - {"name"},
        "doctor": {"json", "skip_smoke_run"},
        "ui": {"port", "listen"},
    }


@pytest.mark.parametrize(
    ("valid", "inside", "outside", "words"),
    [
        (Range(above=0), [1e-9, 5], [0, -1], "above 0"),
        (Range(at_least=0, below=1), [0, 0.99], [-0.1, 1], "at least 0 and below 1"),
        (Range(at_least=-10, at_most=10), [-10, 10], [-10.1, 11], "at least -10 and at most 10"),
        (Range(above=0, multiple_of=8), [8, 512], [0, 12], "above 0 and a multiple of 8"),
    ],
)
def test_range(valid: Range, inside: list[float], outside: list[float], words: str) -> None:
    valid(float, inside)
    for number in inside:
        valid(float, number)
    for number in outside:
        with pytest.raises(ValueError, match=rf"^{number} must be {words}\.$"):
            valid(float, number)
    for number in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="must be a finite number"):
            valid(float, number)
    for other in (None, "estimate", []):
        valid(float, other)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        (
            "beta",
            1,
            "--beta 1 must be above 0 and below 1: it is the concept's share among the unlabeled images, e.g. 0.2.",
        ),
        ("resolution", 100, "--resolution 100 must be above 0, at most 8192 and a multiple of 8: "),
        ("num_keep", -1, "--num_keep -1 must be at least 0 and at most 1000000."),
        ("num_unlabeled", 10**11, "--num_unlabeled 100000000000 must be at least 0 and at most 1000000."),
        ("num_positive", 1, "--num_positive 1 must be at least 2 for training."),
        ("train_batch_size", 0, "--train_batch_size 0 must be above 0 and at most 10000."),
    ],
)
def test_configs_made_in_python_are_checked_too(option: str, value: Any, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_train(TrainConfig(**{option: value}))
    assert str(caught.value).startswith(message)


WHOLE_NUMBERS = [
    (kind, name)
    for kind in (*COMMANDS.values(), RunOptions)
    for name, hint in get_type_hints(kind).items()
    if int in (hint, *get_args(hint)) and name != "seed"
]


@pytest.mark.parametrize(("kind", "name"), WHOLE_NUMBERS, ids=lambda value: getattr(value, "__name__", value))
def test_absurd_whole_numbers_are_refused_with_the_range(kind: Any, name: str) -> None:
    with pytest.raises(UsageError, match=rf"^--{name} 100000000000 must be .* at most \d+"):
        check_ranges(kind(**{name: 10**11}))


def test_defaults_are_valid() -> None:
    for kind in COMMANDS.values():
        check_ranges(kind())
    check_ranges(TrainConfig())
    check_train(TrainConfig())
    check_evaluate(EvaluateConfig())


def test_lists_of_numbers_and_repeated_seeds() -> None:
    with pytest.raises(UsageError, match=r"--strengths 11 must be at least -10 and at most 10: 1 is as trained"):
        check_evaluate(EvaluateConfig(strengths=[1, 11]))
    for seeds in ([], [1, 1]):
        with pytest.raises(UsageError, match="give each seed once"):
            check_evaluate(EvaluateConfig(seed=seeds))
