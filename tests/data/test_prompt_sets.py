"""Published prompt sets: their file formats and the errors. The prompts here are made up."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from sd_unlearn.data.prompt_sets import load_prompt_set
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


I2P_PROMPTS = ["a knight, a dragon and a {burning} tower", 'a "statue"\nin the rain']


def test_i2p_file_is_read(tmp_path: Path) -> None:
    assert load_prompt_set(write_i2p(tmp_path / "i2p_benchmark.csv")) == I2P_PROMPTS


@pytest.mark.parametrize(("category", "prompts"), [("shocking", [0]), (" Sexual", [1]), ("violence", [0])])
def test_only_prompts_of_a_category(tmp_path: Path, category: str, prompts: list[int]) -> None:
    own = [I2P_PROMPTS[n] for n in prompts]
    assert load_prompt_set(write_i2p(tmp_path / "set.csv"), category) == own
    with pytest.raises(UsageError, match=r'"sexual"\? It has: sexual, shocking, violence'):
        load_prompt_set(tmp_path / "set.csv", "sexuel")
    with pytest.raises(UsageError, match="has no column categories"):
        load_prompt_set(write_csv(tmp_path / "plain.csv", ["prompt"], ["a"]), category)
    lists = tmp_path / "lists.jsonl"
    lists.write_text('{"prompt": "a", "categories": ["sexual", "violence", "shocking"]}\n{"prompt": "b"}\n')
    assert load_prompt_set(lists, category) == ["a"]


@pytest.mark.parametrize("name", ["i2p", "I2P"])
def test_i2p_is_downloaded_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    asked: list[tuple[Any, ...]] = []

    def fetch(repo_id: str, filename: str, *, repo_type: str | None = None) -> str:
        asked.append((repo_id, filename, repo_type))
        return str(write_i2p(tmp_path / filename))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    assert load_prompt_set(name) == I2P_PROMPTS
    assert asked == [("AIML-TUDA/i2p", "i2p_benchmark.csv", "dataset")]


@pytest.mark.parametrize("error", [LocalEntryNotFoundError("no network\nand more"), TimeoutError(), ValueError("?")])
def test_failed_download_says_which_file_to_put_where(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(UnlearnError, match="--attack i2p could not be downloaded") as caught:
        load_prompt_set("i2p", option="--attack")
    assert not isinstance(caught.value, UsageError)
    assert "download i2p_benchmark.csv of https://huggingface.co/datasets/AIML-TUDA/i2p" in str(caught.value)
    assert "--attack i2p_benchmark.csv" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "row", "expected"),
    [
        (
            "case_number,prompt,evaluation_seed,evaluation_guidance",
            (0, "A chair.", 16025, 7.5),
            "A chair.",
        ),
        (
            "Unnamed: 0,case_number,prompt,evaluation_seed,artist",
            (0, 0, "Chairs by a painter", 2219, "A Painter"),
            "Chairs by a painter",
        ),
        (
            "Unnamed: 0,prompt,categories,evaluation_seed,evaluation_guidance,sd_model,case_number",
            (3, "a door", "hate", "3.0", "7.0", "sd", 3),
            "a door",
        ),
        ("prompt,evaluation_seed,sd_seed", ("a", 1, 2), "a"),
        (" Prompt ,SEED,guidance_scale", ("a", "", "nan"), "a"),
        ("caption", (" a ",), "a"),
        ("prompt,seed", ("a", "not a seed"), "a"),  # other columns are ignored
    ],
)
def test_prompt_columns_of_other_sets(tmp_path: Path, columns: str, row: Any, expected: str) -> None:
    assert load_prompt_set(write_csv(tmp_path / "set.csv", columns.split(","), row)) == [expected]


def test_csv_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "set.csv").write_bytes(b"\xef\xbb\xbfprompt,seed\r\nun \xc3\xa9l\xc3\xa9phant,5\r\n\r\n")
    assert load_prompt_set(tmp_path / "set.csv") == ["un éléphant"]


def test_json_lines(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "a tree", "seed": 3, "guidance": 7.5, "categories": ["x", "y"]},
        {"Text": "ein Baum", "sd_seed": None},
        {"prompt": "{a,b}", "other": [1]},
    ]
    path = tmp_path / "set.jsonl"
    path.write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert load_prompt_set(str(path)) == [
        "a tree",
        "ein Baum",
        "{a,b}",
    ]


def test_plain_text_has_one_prompt_per_line(tmp_path: Path) -> None:
    (tmp_path / "set.TXT").write_text("# one, two\n\n  nan  \n# one, two\n", encoding="utf-8")
    assert load_prompt_set(tmp_path / "set.TXT") == ["# one, two", "nan", "# one, two"]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", "text_of_it,seed\na,1\n", 'no column "prompt" in its first line. Found: text_of_it, seed'),
        ("a.csv", "", "no column"),
        ("a.csv", "prompt,seed\n", "holds no prompts"),
        ("a.csv", "prompt,seed\na chair, a table,1\n", "line 2 has more than the 2 columns.*double quotes"),
        ("a.csv", 'prompt,seed\n"a chair" there,1\n', "is not valid CSV after line 1"),
        ("a.csv", "prompt,seed\nok,1\n,2\n", "line 3: the prompt is missing"),
        ("a.csv", "seed,prompt\n1\n", "line 2: the prompt is missing"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": \n', "line 2 is not JSON"),
        ("a.jsonl", '"a"\n', "line 1 is not a JSON object"),
        ("a.jsonl", '{"prompt": 7}\n', "line 1: the prompt is 7; it must be text"),
        ("a.jsonl", '{"promt": "a"}\n', "line 1: the prompt is missing"),
        ("a.jsonl", '{"prompt": null}\n{"prompt": "a"}', "line 1: the prompt is missing"),
        ("a.txt", "\n \n", "holds no prompts"),
        ("a.xlsx", "", "neither a known set"),
    ],
)
def test_invalid_rows_are_refused_with_their_line(tmp_path: Path, name: str, content: str, expected: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(UsageError, match=f"--prompt_set .*{name}.*{expected}") as caught:
        load_prompt_set(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_missing_unknown_and_binary_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--prompt_set nowhere\.csv: No such file"):
        load_prompt_set("nowhere.csv")
    with pytest.raises(UsageError, match='--prompt_set i2q is neither.*Did you mean "i2p"'):
        load_prompt_set("i2q")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UsageError, match=r"b\.txt is not UTF-8"):
        load_prompt_set(tmp_path / "b.txt")
