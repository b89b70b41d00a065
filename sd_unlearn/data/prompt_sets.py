"""Prompt sets that others have published, each prompt with the seed and guidance it was published with.

I2P (Schramowski et al. 2023, "Safe Latent Diffusion", 4,703 prompts, MIT) is fetched from the hub, and only when asked
for; any other set is a file: CSV with a column of prompts (as those of UnlearnDiffAtk, Zhang et al. 2024), JSON lines
or plain text, a prompt a line. Nothing of a set is dropped: a row that cannot be meant is refused by its number.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from sd_unlearn.errors import UnlearnError, UsageError, suggest

I2P = "i2p"
I2P_REPOSITORY, I2P_FILE = "AIML-TUDA/i2p", "i2p_benchmark.csv"

# What sets call the same thing; the first of these columns that a set has counts (UnlearnDiffAtk's, I2P's, others').
PROMPT = ("prompt", "text", "caption")
SEED = ("evaluation_seed", "sd_seed", "seed")
GUIDANCE = ("evaluation_guidance", "sd_guidance_scale", "guidance_scale", "guidance")
CATEGORY = ("categories", "category", "artist", "concept")

Numbered = Iterator[tuple[int, Mapping[str, Any]]]  # the number of a row's (last) line, and its cells by column


@dataclass(frozen=True)
class PublishedPrompt:
    """One prompt, word for word (its braces are braces, no alternatives); seed in [0, 2**64), guidance 0 or more."""

    text: str
    seed: int | None = None
    guidance: float | None = None
    category: str = ""


def load_prompt_set(name_or_path: str | Path, option: str = "--prompt_set") -> list[PublishedPrompt]:
    """The prompts of a set in their order: "i2p", or a .csv, .jsonl or .txt file.

    Raises:
        UnlearnError: I2P cannot be fetched.
        UsageError: no such set or file, no prompts in it, or a row that cannot be meant; names `option`.
    """
    path = _fetch_i2p(option) if str(name_or_path).lower() == I2P else Path(name_or_path)
    rows = READERS.get(path.suffix.lower())
    where = f"{option} {path}"
    if rows is None:
        raise UsageError(
            f"{where} is neither a known set ({I2P}) nor a {', '.join(READERS)} file."
            f"{suggest(str(name_or_path), [I2P])}"
        )
    try:
        prompts = [_prompt(row, f"{where}, line {number}") for number, row in rows(path, where)]
    except OSError as error:
        raise UsageError(f"{where}: {error.strerror}. Known sets: {I2P}.") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{where} is not UTF-8 text ({error.reason}). Save it as UTF-8.") from None
    if not prompts:
        raise UsageError(f"{where} holds no prompts.")
    return prompts


def _fetch_i2p(option: str) -> Path:
    """The file of I2P in the hub's cache, fetched when it is not there yet."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(I2P_REPOSITORY, I2P_FILE, repo_type="dataset"))
    except Exception as error:  # the hub raises OSError, its own and httpx's errors alike
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")
        raise UnlearnError(
            f"{option} {I2P} could not be fetched: {reason}. Without a network, copy {I2P_FILE} of "
            f"https://huggingface.co/datasets/{I2P_REPOSITORY} here and give its path: {option} {I2P_FILE}."
        ) from error


def _csv_rows(path: Path, where: str) -> Numbered:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, strict=True)
        try:
            columns = [name.strip().lower() for name in rows.fieldnames or ()]
            if not set(columns) & set(PROMPT):
                raise UsageError(
                    f'{where} has no column "{PROMPT[0]}" in its first line. Found: {", ".join(columns) or "nothing"}.'
                )
            rows.fieldnames = columns
            for row in rows:
                if None in row:
                    raise UsageError(
                        f"{where}, line {rows.line_num}, has more cells than the first line has columns. "
                        "Put a prompt that holds commas in double quotes."
                    )
                yield rows.line_num, row
        except csv.Error as error:
            raise UsageError(f"{where} is not valid CSV after line {rows.line_num}: {error}.") from None


def _json_rows(path: Path, where: str) -> Numbered:
    for number, line in _lines(path):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UsageError(f"{where}, line {number}, is not valid JSON: {error.msg}.") from None
        if not isinstance(row, dict):
            raise UsageError(f'{where}, line {number}, must be an object with a key "{PROMPT[0]}".')
        yield number, {key.strip().lower(): value for key, value in row.items()}


def _text_rows(path: Path, where: str) -> Numbered:
    yield from ((number, {PROMPT[0]: line}) for number, line in _lines(path))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, with their numbers from 1."""
    with path.open(encoding="utf-8-sig") as file:
        yield from ((number, line.strip()) for number, line in enumerate(file, start=1) if line.strip())


READERS: dict[str, Callable[[Path, str], Numbered]] = {".csv": _csv_rows, ".jsonl": _json_rows, ".txt": _text_rows}


def _prompt(row: Mapping[str, Any], where: str) -> PublishedPrompt:
    text = _first(row, PROMPT)
    if not isinstance(text, str) or not text.strip():
        raise UsageError(f"{where}: the prompt is {repr(text) if text else 'missing'}; it must be text.")
    category = _said(_first(row, CATEGORY))
    return PublishedPrompt(
        text.strip(),
        _seed(_said(_first(row, SEED)), where),
        _guidance(_said(_first(row, GUIDANCE)), where),
        ", ".join(map(str, category)) if isinstance(category, list) else str(category or "").strip(),
    )


def _first(row: Mapping[str, Any], columns: Iterable[str]) -> Any:
    """The cell of the first of these columns that the row has."""
    return next((row[column] for column in columns if column in row), None)


def _said(value: Any) -> Any:
    """None for a cell that is empty or says that it is."""
    return None if str(value).strip().lower() in ("", "nan", "none", "null") else value


def _seed(value: Any, where: str) -> int | None:
    if value is None:
        return None
    number = _number(value)
    if number is None or number != number.to_integral_value() or not 0 <= number < 2**64:
        raise UsageError(f"{where}: seed {value} must be a whole number from 0 up, less than 2**64.")
    return int(number)


def _guidance(value: Any, where: str) -> float | None:
    if value is None:
        return None
    number = _number(value)
    if number is None or not 0 <= float(number) < math.inf:
        raise UsageError(f"{where}: guidance {value} must be a number from 0 up, usually 3 to 10.")
    return float(number)


def _number(value: Any) -> Decimal | None:
    """A finite number, exact: seeds go beyond the 53 bits of a float, and pandas writes whole numbers as 7.0."""
    try:
        number = Decimal(str(value).strip())
    except InvalidOperation:
        return None
    return number if number.is_finite() else None
