"""results.json as it is read: checked, whatever version it was written as."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from sd_unlearn.errors import UsageError
from sd_unlearn.results import BASE, Row, as_json, judged, loras, read_results, upgrade, view


def old(**changes: Any) -> dict[str, Any]:
    row = {"metric": "leakage", "group": "direct", "n": 10, "low": 0.0, "high": 0.3, "detector": "judge"}
    return {
        "schema_version": 1,
        "concept": "seven",
        "caption": "a seven",
        "generic": "a digit",
        "kind": "digit",
        "base": {"name": "digits", "sha256": "ab"},
        "run": "mine",
        "adapter_sha256": "cd",
        "detector": "judge",
        "rows": [{**row, "subject": "base", "value": 1.0}, {**row, "subject": "lora", "value": 0.1}],
        "pairs": [{"prompt": "a seven", "group": "direct", "base": "b.png", "lora": "l.png", "lora_read": "two"}],
        "seeds": {"evaluate": [2, 3], "seed": 7},
        "training": {"beta": 0.1},
        "cost": {"seconds": 3},
        **changes,
    }


def new(**changes: Any) -> dict[str, Any]:
    return {**upgrade(old()), **changes}


def read(folder: Path, content: Any) -> dict[str, Any]:
    (folder / "results.json").write_text(json.dumps(content))
    return read_results(folder)


def test_version_1_is_read_as_version_2(tmp_path: Path) -> None:
    found = read(tmp_path, old())
    assert found["schema_version"] == 2
    assert [(s["id"], s["what"]) for s in found["subjects"]] == [("base", "base"), ("mine", "lora")]
    assert [(r["concept"], r["subject"], r["value"]) for r in found["rows"]] == [
        ("seven", BASE, 1.0),
        ("seven", "mine", 0.1),
    ]
    assert found["pairs"][0]["image"] == "l.png"
    assert found["seeds"]["seeds"] == [7]
    (tmp_path / "again").mkdir()
    assert read(tmp_path / "again", found) == found  # and is then written as such


def test_a_run_called_base_is_not_taken_for_the_base() -> None:
    found = upgrade(old(run="base"))
    assert [s["id"] for s in loras(found)] == ["base-lora"]


def test_a_view_is_one_lora_against_the_base() -> None:
    seen = view(new(), "seven", "mine")
    assert [(row["subject"], row["value"]) for row in seen["rows"]] == [("base", 1.0), ("lora", 0.1)]
    assert (seen["run"], seen["caption"], seen["detector"], seen["cost"]) == (
        "mine",
        "a seven",
        "judge",
        {"seconds": 3},
    )
    assert seen["pairs"][0]["lora"] == "l.png"
    assert [(c["slug"], s["id"]) for c, s in judged(new())] == [("seven", "mine")]
    with pytest.raises(KeyError):
        view(new(), "eight", "mine")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"schema_version": 3}, "schema_version is 3"),
        ([], "schema_version is None"),
        (old(rows=[{"metric": "leakage"}]), r"rows\[0\] needs metric, group, subject"),
        (old(base=None), '"base" is missing or not a dict'),
        (
            new(rows=[{"concept": "seven", "subject": "mine", "metric": "m", "group": "g", "value": "1", "n": 1}]),
            r"rows\[0\] needs a number as value",
        ),
        (
            new(rows=[{"concept": "seven", "subject": "mine", "metric": "m", "group": "g", "value": 1, "n": 1.5}]),
            r"rows\[0\] needs a whole number as n",
        ),
        (
            new(rows=[{"concept": "seven", "subject": "who", "metric": "m", "group": "g", "value": 1, "n": 1}]),
            r'rows\[0\] is of "who"',
        ),
        (new(subjects=[{"id": "x", "name": "x", "what": "lore"}]), 'subjects.0. is a "lore"'),
        (new(differences=[{"concept": "seven", "subject": "mine", "against": "base"}]), r"differences\[0\] needs"),
    ],
)
def test_what_does_not_hold_what_it_should_is_named(content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        read(tmp_path, content)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no results.json"):
        read_results(tmp_path)
    with pytest.raises(UsageError, match="does not exist"):
        read_results(tmp_path / "nowhere")


def test_a_row_survives_being_written() -> None:
    row = Row("leakage", "direct", "mine", 0.1, 10, 0.0, 0.3, "judge", "wilson", "", "seven", (0.1, 0.2))
    again = json.loads(json.dumps(as_json(row)))
    assert Row.from_dict({**again, "later": 1}, group="kept") == dataclasses.replace(row, group="kept")
