"""Published prompt sets: I2P, or a file of prompts.

I2P (Schramowski et al. 2023, "Safe Latent Diffusion", 4,703 prompts, MIT) is downloaded from the Hub only when it is
named. Other sets are files: CSV with a prompt column (such as UnlearnDiffAtk's, Zhang et al. 2024), JSON lines, or
plain text with one prompt per line. No row is skipped: a row without a prompt is an error that names its line.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sd_unlearn.errors import UnlearnError, UsageError, reason, suggest
from sd_unlearn.io.reading import check_regular, parse_json

I2P = "i2p"
I2P_REPOSITORY, I2P_FILE = "AIML-TUDA/i2p", "i2p_benchmark.csv"
PROMPT_COLUMNS = ("prompt", "text", "caption")  # the first of these that a set has

NumberedRows = Iterator[tuple[int, Mapping[str, Any]]]  # (line number from 1, {column: value})


def load_prompt_set(name_or_path: str | Path, option: str = "--prompt_set") -> list[str]:
    """The prompts of a set in their order: "i2p", or a .csv, .jsonl or .txt file.

    Prompts are taken word for word: braces do not list alternatives, as they do in concept files.

    Raises:
        UnlearnError: I2P cannot be downloaded.
        UsageError: no such set or file, no prompts in it, or a row without a prompt; names `option`.
    """
    path = _download_i2p(option) if str(name_or_path).lower() == I2P else Path(name_or_path)
    read_rows = READERS.get(path.suffix.lower())
    where = f"{option} {path}"
    if read_rows is None:
        raise UsageError(
            f"{where} is neither a known set ({I2P}) nor a {', '.join(READERS)} file."
            f"{suggest(str(name_or_path), [I2P])}"
        )
    try:
        check_regular(path)
        prompts = [_prompt(row, f"{where}, line {number}") for number, row in read_rows(path, where)]
    except UnicodeDecodeError as error:
        raise UsageError(f"{where} is not UTF-8 text ({error.reason}). Save it as UTF-8.") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{where}: {reason(error)}. Known sets: {I2P}.") from None
    if not prompts:
        raise UsageError(f"{where} holds no prompts.")
    return prompts


def _download_i2p(option: str) -> Path:
    """The file of I2P in the Hub's cache, downloaded if it is not there yet."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(I2P_REPOSITORY, I2P_FILE, repo_type="dataset"))
    except Exception as error:  # the hub raises OSError, its own and httpx's errors alike
        raise UnlearnError(
            f"{option} {I2P} could not be downloaded: {reason(error)}. Without a network, download {I2P_FILE} of "
            f"https://huggingface.co/datasets/{I2P_REPOSITORY} elsewhere and give its path: {option} {I2P_FILE}."
        ) from error


def _csv_rows(path: Path, where: str) -> NumberedRows:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, strict=True)
        try:
            columns = [name.strip().lower() for name in rows.fieldnames or ()]
            if not set(columns) & set(PROMPT_COLUMNS):
                names = ", ".join(columns) or "nothing"
                raise UsageError(f'{where} has no column "{PROMPT_COLUMNS[0]}" in its first line. Found: {names}.')
            rows.fieldnames = columns
            for row in rows:
                if None in row:
                    raise UsageError(
                        f"{where}, line {rows.line_num}, has more cells than the first line has columns. "
                        "Put prompts that contain commas in double quotes."
                    )
                yield rows.line_num, row
        except csv.Error as error:
            raise UsageError(f"{where} is not valid CSV after line {rows.line_num}: {error}.") from None


def _json_rows(path: Path, where: str) -> NumberedRows:
    for number, line in _lines(path):
        try:
            row = parse_json(line)
        except ValueError as error:
            raise UsageError(f"{where}, line {number}, is not valid JSON: {reason(error)}.") from None
        if not isinstance(row, dict):
            raise UsageError(f'{where}, line {number}, must be an object with a key "{PROMPT_COLUMNS[0]}".')
        yield number, {key.strip().lower(): value for key, value in row.items()}


def _text_rows(path: Path, where: str) -> NumberedRows:
    yield from ((number, {PROMPT_COLUMNS[0]: line}) for number, line in _lines(path))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, stripped, with their numbers from 1."""
    with path.open(encoding="utf-8-sig") as file:
        yield from ((number, line.strip()) for number, line in enumerate(file, start=1) if line.strip())


READERS: dict[str, Callable[[Path, str], NumberedRows]] = {".csv": _csv_rows, ".jsonl": _json_rows, ".txt": _text_rows}


def _prompt(row: Mapping[str, Any], where: str) -> str:
    text = next((row[column] for column in PROMPT_COLUMNS if column in row), None)
    if not isinstance(text, str) or not text.strip():
        raise UsageError(f"{where}: the prompt is {repr(text) if text else 'missing'}; it must be text.")
    return text.strip()
