"""results.json is validated when it is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from report_results import make_pair, make_results, make_row, parsed

from sd_unlearn.errors import UsageError
from sd_unlearn.results import BASE, Results, Row, as_json, parse_results, read_results


def read(folder: Path, content: Any) -> Results:
    (folder / "results.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return read_results(folder)


def changed(key: str, **changes: Any) -> dict[str, Any]:
    """`make_results` with a change in the first item of a list."""
    results = make_results()
    results[key][0] |= changes
    return results


def test_rows_of_a_subject_come_with_those_of_the_base() -> None:
    results = parsed(
        subjects=[{"id": name, "name": name, "what": "base" if name == BASE else "lora"} for name in (BASE, "a", "b")],
        rows=[make_row("leakage", "direct", name, value) for name, value in ((BASE, 1.0), ("a", 0.1), ("b", 0.2))],
        pairs=[],
    )
    assert [(row.subject, row.value) for row in results.rows_of("seven", "b")] == [(BASE, 1.0), ("b", 0.2)]
    assert results.rows_of("eight", "b") == []
    assert [subject.id for subject in results.compared] == ["a", "b"]
    assert [(concept.slug, subject.id) for concept, subject in results.evaluated] == [("seven", "a"), ("seven", "b")]


def test_keys_of_later_versions_are_ignored(tmp_path: Path) -> None:
    results = make_results(later=1)
    results["rows"][0]["later"] = {"a": [1]}
    assert read(tmp_path, results) == parsed()
    assert read_results(tmp_path / "results.json") == parsed()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (make_results(schema_version=3), "schema_version must be 2, not 3"),
        (make_results(schema_version=1), "schema_version must be 2, not 1"),
        (make_results(schema_version=None), "schema_version must be 2, not None"),
        ([], "must hold keys and values"),
        ({}, 'needs the key "schema_version"'),
        (make_results(rows={}), "rows must be a list"),
        (make_results(pairs=3), "pairs must be a list, not 3"),
        (make_results(concept={"caption": None}), r"concepts\[0\].caption must be text .*, not None"),
        (make_results(rows=[{"metric": "leakage"}]), r'needs the key "group" in rows\[0\]'),
        (changed("rows", value="1 %"), r"rows\[0\].value must be a valid number, not '1 %'"),
        (changed("rows", value=True), r"rows\[0\].value must be a valid number, not True"),
        (changed("rows", n=1.5), r"rows\[0\].n must be a valid integer, not 1.5"),
        (changed("rows", n=None), r"rows\[0\].n must be a valid integer, not None"),
        (changed("rows", subject="teacher"), r'subject "teacher" of rows\[0\] is not listed'),
        (changed("rows", concept="eight"), r'concept "eight" of rows\[0\] is not listed'),
        (changed("pairs", subject="teacher"), r'subject "teacher" of pairs\[0\] is not listed'),
        (make_results(pairs=[{"prompt": "x"}]), r'needs the key "concept" in pairs\[0\]'),
        (make_results(pairs=[make_pair("direct", 1, "a.png", faces=[[0, 0, 1]])]), r"pairs\[0\].faces\[0\]"),
        (changed("subjects", what="lore"), r"subjects\[0\].what must be 'base', 'lora' or 'images', not 'lore'"),
        (
            make_results(differences=[{"concept": "seven", "subject": "lora", "against": "base"}]),
            r'needs the key "metric" in differences\[0\]',
        ),
        (
            make_results(differences=[make_row("leakage", "direct", "lora", 0.1) | {"against": "other"}]),
            r'against "other" of differences\[0\] is not listed',
        ),
        ('{"schema_version": 2, "ro', "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ('{"schema_version": ' + "9" * 10_000 + "}", "is not valid JSON"),
        (make_results(base={"name": json.loads("[" * 900 + "]" * 900)}), "recursion limit"),
    ],
)
def test_an_invalid_file_gives_one_line_that_names_the_key(content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        read(tmp_path, content)
    assert str(caught.value).startswith(str(tmp_path / "results.json"))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_missing_file_or_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no results.json. Run sd-unlearn evaluate --run .* first"):
        read_results(tmp_path)
    with pytest.raises(UsageError, match="--run .*nowhere does not exist"):
        read_results(tmp_path / "nowhere")


def test_a_row_is_read_as_it_was_written(tmp_path: Path) -> None:
    row = Row("leakage", "direct", "lora", 0.1, 10, 0.0, 0.3, "judge", "wilson", "", "seven", (0.1, 0.2))
    assert read(tmp_path, make_results(rows=[as_json(row)])).rows == (row,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": float("nan")}, "not finite"),
        ({"low": float("inf")}, "not finite"),
        ({"n": -1}, "n = -1"),
        ({"low": 0.5, "high": 0.1}, "low = 0.5 above high = 0.1"),
        ({"value": 1.5}, "is a share of 1.5"),
    ],
)
def test_impossible_values_are_refused(change: dict[str, Any], message: str) -> None:
    content = make_results()
    content["rows"] = [content["rows"][0] | change]
    with pytest.raises(UsageError, match=rf"rows\[0\] \(leakage\).*{message}.*again"):
        parse_results(content, hint="Run evaluate again.")


@pytest.mark.parametrize("key", ["rows", "subjects", "concepts"])
def test_an_entry_listed_twice_is_refused(key: str) -> None:
    content = make_results()
    content[key] = [*content[key], content[key][0]]
    with pytest.raises(UsageError, match=f"{key} lists .* twice"):
        parse_results(content)
