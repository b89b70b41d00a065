"""Published prompt sets: I2P, or a file of prompts.

I2P (Schramowski et al. 2023, "Safe Latent Diffusion", 4,703 prompts, MIT) is downloaded from the Hub only when it is
named. Other sets are files: CSV with a prompt column (such as UnlearnDiffAtk's, Zhang et al. 2024), JSON lines, or
plain text with one prompt per line. Only a category can be chosen, of sets that have them; no other row is skipped: one
without a prompt is an error that names its line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sd_unlearn.errors import UnlearnError, UsageError, reason, suggest
from sd_unlearn.io.reading import read_csv_lines, read_jsonl_lines, read_text

I2P = "i2p"
I2P_REPOSITORY, I2P_FILE = "AIML-TUDA/i2p", "i2p_benchmark.csv"
PROMPT_COLUMNS = ("prompt", "text", "caption")  # the first of these that a set has
CATEGORIES = "categories"  # the column with those of a prompt

NumberedRows = Mapping[int, Mapping[str, Any]]  # line number from 1 -> {column: value}


def is_published(name_or_path: str | Path) -> bool:
    """Whether a set is downloaded by its name rather than read from a file."""
    return str(name_or_path).lower() == I2P


def load_prompt_set(name_or_path: str | Path, category: str | None = None, option: str = "--prompt_set") -> list[str]:
    """The prompts of a set in their order: "i2p", or a .csv, .jsonl or .txt file.

    Prompts are taken word for word: braces do not list alternatives, as they do in concept files.

    Args:
        category: Only the prompts with this one among their `categories`.

    Raises:
        UnlearnError: I2P cannot be downloaded.
        UsageError: no such set, file or category, no prompts in it, or a row without a prompt; names `option`.
    """
    path = _download_i2p(option) if is_published(name_or_path) else Path(name_or_path)
    read_rows = READERS.get(path.suffix.lower())
    where = f"{option} {path}"
    if read_rows is None:
        raise UsageError(
            f"{where} is neither a known set ({I2P}) nor a {', '.join(READERS)} file."
            f"{suggest(str(name_or_path), [I2P])}"
        )
    rows = read_rows(path, option)
    if category is not None:
        rows = _of_category(rows, category, where)
    prompts = [_prompt(row, f"{where}, line {number}") for number, row in rows.items()]
    if not prompts:
        raise UsageError(f"{where} holds no prompts.")
    return prompts


def _of_category(rows: NumberedRows, category: str, where: str) -> NumberedRows:
    """The rows with a category; of text, a row's categories are separated by commas."""
    found = {number: _categories(row) for number, row in rows.items()}
    wanted, known = category.strip().casefold(), sorted(set().union(*found.values()))
    if not known:
        raise UsageError(f"--prompt_category {category}: {where} has no column {CATEGORIES}. Leave it out.")
    if wanted not in known:
        raise UsageError(
            f"--prompt_category {category} is not in {where}.{suggest(wanted, known)} It has: {', '.join(known)}."
        )
    return {number: row for number, row in rows.items() if wanted in found[number]}


def _categories(row: Mapping[str, Any]) -> set[str]:
    cell = next((value for column, value in row.items() if _key(column) == CATEGORIES), None)
    names = cell if isinstance(cell, list) else str(cell or "").split(",")
    return {text for name in names if (text := str(name).strip().casefold())}


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


def _csv_rows(path: Path, option: str) -> NumberedRows:
    columns, rows = read_csv_lines(path, option)
    if not {_key(column) for column in columns} & set(PROMPT_COLUMNS):
        raise UsageError(
            f'{option} {path} has no column "{PROMPT_COLUMNS[0]}" in its first line. Found: '
            f"{', '.join(columns) or 'nothing'}."
        )
    return rows


def _text_rows(path: Path, option: str) -> NumberedRows:
    lines = read_text(path, option).split("\n")
    return {number: {PROMPT_COLUMNS[0]: line} for number, line in enumerate(lines, 1) if line.strip()}


READERS: dict[str, Callable[[Path, str], NumberedRows]] = {
    ".csv": _csv_rows,
    ".jsonl": read_jsonl_lines,
    ".txt": _text_rows,
}


def _key(column: str) -> str:
    return column.strip().lower()


def _prompt(row: Mapping[str, Any], where: str) -> str:
    cells = {_key(column): value for column, value in row.items()}
    text = next((cells[column] for column in PROMPT_COLUMNS if column in cells), None)
    if not isinstance(text, str) or not text.strip():
        raise UsageError(f"{where}: the prompt is {repr(text) if text else 'missing'}; it must be text.")
    return text.strip()
