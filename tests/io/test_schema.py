"""Validation of data from disk: errors of one line that name the file, the key and what to do."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest

from sd_unlearn.errors import UsageError
from sd_unlearn.io.schema import OPEN, STRICT, validate


@dataclass(frozen=True)
class Line:
    __pydantic_config__: ClassVar = STRICT
    prompt: str
    count: int = 1


@dataclass(frozen=True)
class File:
    __pydantic_config__: ClassVar = STRICT
    name: str
    share: float | None = None
    first: Line = Line("a")
    lines: tuple[Line, ...] = ()
    labels: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Growing:
    __pydantic_config__: ClassVar = OPEN
    name: str


def refused(data: Any, kind: type = File) -> str:
    with pytest.raises(UsageError) as caught:
        validate(kind, data, "x.yaml", "Fix the file.")
    message = str(caught.value)
    assert message.startswith("x.yaml: ")
    assert message.endswith(" Fix the file.")
    assert len(message.splitlines()) == 1
    return message


def test_a_valid_file() -> None:
    data = {"name": "ü", "share": 1, "lines": [{"prompt": "p", "count": 2}], "labels": {"a": 3}}
    assert validate(File, data, "x.yaml") == File("ü", 1.0, lines=(Line("p", 2),), labels={"a": 3})
    assert validate(list[int], [1, 2], "x.json") == [1, 2]


def test_unknown_keys_are_refused_with_a_suggestion() -> None:
    assert 'unknown key "nam". Did you mean "name"?' in refused({"nam": "x"})
    in_list = refused({"name": "x", "lines": [{"prompt": "p"}, {"promt": "p"}]})
    assert 'unknown key "promt" in lines[1]. Did you mean "prompt"? Known: count, prompt. Fix' in in_list
    nested = refused({"name": "x", "first": {"prompt": "p", "cuont": 1}})
    assert 'unknown key "cuont" in first. Did you mean "count"?' in nested
    assert "Known: count, prompt" in nested
    assert validate(Growing, {"name": "x", "new": 1}, "x.json") == Growing("x")


def test_a_wrong_value_is_named_by_its_path() -> None:
    assert "lines[1].count must be a valid integer, not 'many'" in refused(
        {"name": "x", "lines": [{"prompt": "p"}, {"prompt": "p", "count": "many"}]}
    )
    assert "labels.a must be a valid integer" in refused({"name": "x", "labels": {"a": 1.5}})
    assert 'needs the key "name"' in refused({})
    assert 'needs the key "prompt" in lines[0]' in refused({"name": "x", "lines": [{}]})
    assert "must hold keys and values" in refused([])
    assert "must hold keys and values" in refused(None)


@pytest.mark.parametrize("value", [7, True, None, ["x"], {"a": 1}])
def test_text_is_not_converted_from_other_values(value: Any) -> None:
    assert "name must be text (in quotes)" in refused({"name": value})


@pytest.mark.parametrize("value", ["1", True, [1], {"a": 1}])
def test_numbers_are_not_converted_from_other_values(value: Any) -> None:
    assert "share" in refused({"name": "x", "share": value})


def test_a_long_value_is_not_repeated() -> None:
    assert "9999" not in refused({"name": "x", "share": "9" * 100})


@pytest.mark.parametrize(
    "value", [datetime.date(2024, 1, 1), datetime.datetime(2024, 1, 1), b"bytes", {1, 2}, object(), {(1, 2): 3}]
)
def test_odd_values_of_yaml(value: Any) -> None:
    assert "not text, a number, a list or a mapping" in refused({"name": value})


def test_nested_too_deeply_or_inside_itself() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    refused({"name": deep})
    inside: list[Any] = []
    inside.append(inside)
    refused({"name": inside})


def test_nan_and_infinity_are_numbers_only_where_a_number_is_expected() -> None:
    for value in (float("nan"), float("inf")):
        assert "count" in refused({"name": "x", "first": {"prompt": "p", "count": value}})
        assert "name" in refused({"name": value})


def test_surrogates_are_refused() -> None:
    refused({"name": "\ud800"})
    refused({"\ud800": 1})
