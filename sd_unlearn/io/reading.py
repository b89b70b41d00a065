"""Read files: errors name the file, and what cannot be printed or written again is refused."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import stat
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from sd_unlearn.errors import UsageError, reason, suggest

MAX_VALUES = 3_000_000  # in one YAML file, or one JSON file with surrogates
MAX_BITS = 10_000  # of an integer: Python refuses to print more than 4,300 digits
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # as JSON escapes it
_SURROGATES = re.compile("[\ud800-\udfff]")


def check_regular(path: Path) -> None:
    """Refuse pipes, sockets and devices: opening a pipe would wait forever, and a device need not end.

    Raises:
        OSError: it is not a file or folder, or does not exist.
        ValueError: the path contains a NUL character.
    """
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError("it is a pipe, socket or device, not a file")


def read_text(path: Path, option: str = "") -> str:
    """The content of a UTF-8 file, without a byte order mark.

    Raises:
        UsageError: the file is missing, unreadable, not a regular file or not UTF-8. Names the file, after `option` if
            it is given.
    """
    name = f"{option} {path}".strip()
    try:
        check_regular(path)
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise UsageError(f"{name}: {reason(error)}." if option else f"{path} does not exist.") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is not UTF-8 text ({error.reason}). Save it as UTF-8.") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{name} cannot be read: {reason(error)}.") from None


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        UsageError: the file is missing, unreadable or not JSON.
    """
    text = read_text(path)
    try:
        return parse_json(text)
    except ValueError as error:
        raise UsageError(f"{path} is not valid JSON ({reason(error)}). Delete it and run the stage again.") from None


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: the text is not JSON, or has an integer of thousands of digits, thousands of nested values or text
            with half a surrogate pair.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None
    if _SURROGATE.search(text):
        _check_plain(value)
    return value


def read_jsonl_lines(path: Path, option: str = "") -> dict[int, dict[str, Any]]:
    """Line number (from 1) -> object of a JSONL file. Blank lines are skipped.

    Raises:
        UsageError: the file is missing or unreadable, or a line, which is named, is not a JSON object.
    """
    name, records = f"{option} {path}".strip(), {}
    lines = read_text(path, option).split("\n")  # JSON strings may contain U+2028: no splitlines
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = parse_json(line)
        except ValueError as error:
            raise UsageError(f"{name} line {number} is not JSON ({reason(error)}). Fix or delete the line.") from None
        if not isinstance(record, dict):
            raise UsageError(f"{name} line {number} is not a JSON object. Fix or delete the line.")
        records[number] = record
    return records


def read_csv_lines(
    path: Path, option: str = "", skip_spaces: bool = False
) -> tuple[list[str], dict[int, dict[str, Any]]]:
    """The columns of a CSV file, and line number (from 1) -> row. The first line names the columns.

    skip_spaces: leave out spaces after commas, so that a quoted cell may follow one.

    Raises:
        UsageError: the file is missing or unreadable, or a line, which is named, is not valid.
    """
    name = f"{option} {path}".strip()
    text = io.StringIO(read_text(path, option), newline="")
    reader = csv.DictReader(text, strict=True, skipinitialspace=skip_spaces)
    rows: dict[int, dict[str, Any]] = {}
    try:
        columns = list(reader.fieldnames or ())
        for row in reader:
            if None in row:
                raise UsageError(
                    f"{name} line {reader.line_num} has more than the {len(columns)} columns of the first line. Put "
                    "texts with commas in double quotes."
                )
            rows[reader.line_num] = row
    except csv.Error as error:
        raise UsageError(f"{name} is not valid CSV after line {reader.line_num} ({reason(error)}). Fix it.") from None
    return columns, rows


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file.

    Raises:
        UsageError: as `read_jsonl_lines`.
    """
    return list(read_jsonl_lines(path).values())


def read_yaml(path: Path, option: str) -> dict[str, Any]:
    """The content of a YAML file that holds a mapping.

    Raises:
        UsageError: the file is missing, unreadable, not YAML or not a mapping. Names `option` and the file.
    """
    data = read_yaml_value(path, option)
    if not isinstance(data, dict):
        name = f"{option} {path}".strip()
        raise UsageError(f"{name} must hold keys and values, not {type(data).__name__}.")
    return data


def read_yaml_value(path: Path, option: str) -> Any:
    """The content of a YAML file, whatever it holds.

    Raises:
        UsageError: the file is missing, unreadable or not YAML, or has a key twice. Names `option` and the file.
    """
    text = read_text(path, option)
    try:
        data = yaml.load(text, _Loader)
        _check_plain(data)
    except Exception as error:  # for odd tags (!!int "", !!bool x) PyYAML raises IndexError, KeyError and others
        name = f"{option} {path}".strip()
        raise UsageError(f"{name} is not valid YAML: {reason(error)}.") from None
    return data


class _Loader(yaml.SafeLoader):
    """Refuses a key that a mapping holds twice. PyYAML would take the last one."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
                continue
            name, line = (key.tag, key.value), key.start_mark.line + 1
            if name in lines:
                raise ValueError(f'the key "{key.value}" is in line {lines[name]} and again in line {line}; keep one')
            lines[name] = line
        return node


def _check_plain(data: Any) -> None:
    """Refuse parsed values that cannot be printed or written again.

    Raises:
        ValueError: text with half a surrogate pair, an integer of thousands of digits, or more than MAX_VALUES values
            (aliases of YAML let a short file stand for billions).
    """
    left, values = [data], 0
    while left:
        value = left.pop()
        values += 1
        if values > MAX_VALUES:
            if _holds_itself(data):
                raise ValueError("a list or mapping holds itself: its alias (*) is inside its anchor (&)")
            raise ValueError(f"it holds more than {MAX_VALUES:,} values")
        if isinstance(value, str) and _SURROGATES.search(value):
            raise ValueError(f"it holds the text {value[:60]!r}, which is not valid Unicode")
        if isinstance(value, int) and value.bit_length() > MAX_BITS:
            raise ValueError("it holds an integer of thousands of digits")
        if isinstance(value, dict):
            left += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set):
            left += value


def _holds_itself(value: Any, parents: tuple[int, ...] = (), done: set[int] | None = None) -> bool:
    """Whether a list or mapping is inside itself, as an alias inside its own anchor makes it."""
    done = set() if done is None else done
    if not isinstance(value, dict | list) or id(value) in done:
        return False
    if id(value) in parents:
        return True
    inner = value.values() if isinstance(value, dict) else value
    found = any(_holds_itself(item, (*parents, id(value)), done) for item in inner)
    done.add(id(value))
    return found


def check_keys(data: dict[str, Any], known: set[str], where: str) -> None:
    """Check that a mapping has known keys only.

    Raises:
        UsageError: naming the first unknown key, the most similar known key and all known keys.
    """
    for key in data:
        if key not in known:
            raise UsageError(
                f'{where}: unknown key "{key}".{suggest(str(key), known)} Known: {", ".join(sorted(known))}.'
            )


def read_options(path: Path, known: Collection[str]) -> dict[str, Any]:
    """The options in a command's --config file; those that are null are left out.

    Raises:
        UsageError: the file cannot be read, or has an unknown key or a value that no option takes.
    """
    data = read_yaml(path, "--config")
    check_keys(data, set(known), f"--config {path}")
    given = {key: value for key, value in data.items() if value is not None and key != "config"}
    for key, value in given.items():
        if not all(isinstance(item, str | int | float) for item in (value if isinstance(value, list) else [value])):
            raise UsageError(f"--config {path}: {key} must be text, a number, true or false, or a list of these.")
    return given


def file_sha256(*files: Path) -> str:
    """SHA-256 (hexadecimal) of the concatenated content of files."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as data:
            while block := data.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def json_sha256(value: Any) -> str:
    """SHA-256 (hexadecimal) of a value that JSON can hold; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
