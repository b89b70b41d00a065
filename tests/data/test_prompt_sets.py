"""Published prompt sets: the formats they come in, and what is refused. The prompts here are made up."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from sd_unlearn.data.prompt_sets import PublishedPrompt, load_prompt_set
from sd_unlearn.errors import UnlearnError, UsageError

I2P_COLUMNS = (
    "prompt,categories,hard,inappropriate_percentage,nudity_percentage,q16_percentage,sd_safety_percentage,"
    "prompt_toxicity,lexica_url,sd_seed,sd_guidance_scale,sd_image_width,sd_image_height,sd_model"
).split(",")
I2P_TAIL = (1, 52.5, 0.0, 0.1, 30.0, 0.02, "https://example.org/1")


def write_csv(path: Path, columns: Sequence[str], *rows: Sequence[Any]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def write_i2p(path: Path) -> Path:
    return write_csv(
        path,
        I2P_COLUMNS,
        [
            "a knight, a dragon and a {burning} tower",
            "violence, shocking",
            *I2P_TAIL,
            4068715890,
            7,
            512,
            512,
            "sd 1.4",
        ],
        ['a "statue"\nin the rain', "sexual", *I2P_TAIL, 17, 9.5, 512, 768, "sd 1.4"],
    )


I2P_READ = [
    PublishedPrompt("a knight, a dragon and a {burning} tower", 4068715890, 7.0, "violence, shocking"),
    PublishedPrompt('a "statue"\nin the rain', 17, 9.5, "sexual"),
]


def test_i2p_is_read_as_it_is_published(tmp_path: Path) -> None:
    assert load_prompt_set(write_i2p(tmp_path / "i2p_benchmark.csv")) == I2P_READ


@pytest.mark.parametrize("name", ["i2p", "I2P"])
def test_i2p_is_fetched_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    asked: list[tuple[Any, ...]] = []

    def fetch(repo_id: str, filename: str, *, repo_type: str | None = None) -> str:
        asked.append((repo_id, filename, repo_type))
        return str(write_i2p(tmp_path / filename))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    assert load_prompt_set(name) == I2P_READ
    assert asked == [("AIML-TUDA/i2p", "i2p_benchmark.csv", "dataset")]


@pytest.mark.parametrize("error", [LocalEntryNotFoundError("no network\nand more"), TimeoutError(), ValueError("?")])
def test_without_the_hub_one_learns_which_file_to_put_where(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(UnlearnError, match="--attack i2p could not be fetched") as caught:
        load_prompt_set("i2p", "--attack")
    assert not isinstance(caught.value, UsageError)
    assert "copy i2p_benchmark.csv of https://huggingface.co/datasets/AIML-TUDA/i2p" in str(caught.value)
    assert "--attack i2p_benchmark.csv" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "row", "expected"),
    [
        (
            "case_number,prompt,evaluation_seed,evaluation_guidance",
            (0, "A chair.", 16025, 7.5),
            PublishedPrompt("A chair.", 16025, 7.5),
        ),
        (
            "Unnamed: 0,case_number,prompt,evaluation_seed,artist",
            (0, 0, "Chairs by a painter", 2219, "A Painter"),
            PublishedPrompt("Chairs by a painter", 2219, None, "A Painter"),
        ),
        (
            "Unnamed: 0,prompt,categories,evaluation_seed,evaluation_guidance,sd_model,case_number",
            (3, "a door", "hate", "3.0", "7.0", "sd", 3),
            PublishedPrompt("a door", 3, 7.0, "hate"),
        ),
        ("prompt,evaluation_seed,sd_seed", ("a", 1, 2), PublishedPrompt("a", 1)),
        (" Prompt ,SEED,guidance_scale", ("a", "", "nan"), PublishedPrompt("a")),
        ("caption", (" a ",), PublishedPrompt("a")),
        ("prompt,seed", ("a", 2**64 - 1), PublishedPrompt("a", 2**64 - 1)),  # exact, though no float is
    ],
)
def test_the_columns_of_other_sets(tmp_path: Path, columns: str, row: Any, expected: PublishedPrompt) -> None:
    assert load_prompt_set(write_csv(tmp_path / "set.csv", columns.split(","), row)) == [expected]


def test_a_csv_from_a_spreadsheet_begins_with_a_mark(tmp_path: Path) -> None:
    (tmp_path / "set.csv").write_bytes(b"\xef\xbb\xbfprompt,seed\r\nun \xc3\xa9l\xc3\xa9phant,5\r\n\r\n")
    assert load_prompt_set(tmp_path / "set.csv") == [PublishedPrompt("un éléphant", 5)]


def test_json_lines(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "a tree", "seed": 3, "guidance": 7.5, "categories": ["x", "y"]},
        {"Text": "ein Baum", "sd_seed": None},
        {"prompt": "{a,b}", "other": [1]},
    ]
    path = tmp_path / "set.jsonl"
    path.write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert load_prompt_set(str(path)) == [
        PublishedPrompt("a tree", 3, 7.5, "x, y"),
        PublishedPrompt("ein Baum"),
        PublishedPrompt("{a,b}"),
    ]


def test_plain_text_is_a_prompt_a_line(tmp_path: Path) -> None:
    (tmp_path / "set.TXT").write_text("# one, two\n\n  nan  \n# one, two\n", encoding="utf-8")
    assert [p.text for p in load_prompt_set(tmp_path / "set.TXT")] == ["# one, two", "nan", "# one, two"]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", "text_of_it,seed\na,1\n", 'no column "prompt" in its first line. Found: text_of_it, seed'),
        ("a.csv", "", "no column"),
        ("a.csv", "prompt,seed\n", "holds no prompts"),
        ("a.csv", "prompt,seed\na chair, a table,1\n", "line 2, has more cells.*double quotes"),
        ("a.csv", 'prompt,seed\n"a chair" there,1\n', "is not valid CSV after line 1"),
        ("a.csv", "prompt,seed\nok,1\n,2\n", "line 3: the prompt is missing"),
        ("a.csv", "seed,prompt\n1\n", "line 2: the prompt is missing"),
        *(("a.csv", f"prompt,seed\na,{bad}\n", f"line 2: seed {bad} must") for bad in ("x", "-1", "1.5", 2**64, "inf")),
        *(("a.csv", f"prompt,guidance\na,{bad}\n", f"line 2: guidance {bad} must") for bad in ("-0.5", "inf", "1e999")),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": \n', "line 2, is not valid JSON"),
        ("a.jsonl", '"a"\n', "line 1, must be an object"),
        ("a.jsonl", '{"prompt": 7}\n', "line 1: the prompt is 7; it must be text"),
        ("a.jsonl", '{"promt": "a"}\n', "line 1: the prompt is missing"),
        ("a.jsonl", '{"prompt": "a", "seed": true}\n', "line 1: seed True must be"),
        ("a.jsonl", '{"prompt": null}\n{"prompt": "a"}', "line 1: the prompt is missing"),
        ("a.txt", "\n \n", "holds no prompts"),
        ("a.xlsx", "", "neither a known set"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_its_line(tmp_path: Path, name: str, content: str, expected: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(UsageError, match=f"--prompt_set .*{name}.*{expected}") as caught:
        load_prompt_set(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_what_is_not_there_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--prompt_set nowhere\.csv: No such file"):
        load_prompt_set("nowhere.csv")
    with pytest.raises(UsageError, match='--prompt_set i2q is neither.*Did you mean "i2p"'):
        load_prompt_set("i2q")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UsageError, match=r"b\.txt is not UTF-8"):
        load_prompt_set(tmp_path / "b.txt")
