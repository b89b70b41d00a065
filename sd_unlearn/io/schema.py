"""Validate data read from disk against dataclasses, with errors of one line."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from sd_unlearn.errors import UsageError, reason, suggest

T = TypeVar("T")

STRICT = ConfigDict(extra="forbid", strict=True)  # as `__pydantic_config__` of a dataclass: unknown keys are errors
OPEN = ConfigDict(extra="ignore", strict=True)  # of a dataclass to which later versions may add keys

_UNKNOWN = ("unexpected_keyword_argument", "extra_forbidden")
# pydantic's error types in the words of YAML and JSON; other types keep pydantic's own message.
_MESSAGES = {
    "string_type": "must be text (in quotes)",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    **dict.fromkeys(("dict_type", "dataclass_type"), "must hold keys and values"),
}


def validate(kind: type[T], data: Any, where: str, hint: str = "") -> T:
    """Turn parsed JSON or YAML into an instance of `kind`, a dataclass or any type that pydantic knows.

    Numbers, texts and booleans are not converted into one another; a list is accepted for a tuple. A dataclass
    accepts or refuses unknown keys as its `__pydantic_config__` says: `OPEN` or `STRICT`.

    Args:
        where: Start of the error message: the file, and the option if there is one.
        hint: End of the error message: a sentence that says what to do.

    Raises:
        UsageError: `data` does not match; names the key and what it must be.
    """
    try:
        adapter: TypeAdapter[T] = _adapter(kind)  # type: ignore[arg-type]  # every type is hashable
        return adapter.validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        faults = error.errors(include_url=False)
        fault = _describe(kind, next((f for f in faults if f["type"] in _UNKNOWN), faults[0]))  # a typo explains more
    except (TypeError, ValueError, RecursionError) as error:  # a date, a set or bytes of YAML; a list inside itself
        fault = f"holds a value that is not text, a number, a list or a mapping ({reason(error)})"
    raise UsageError(f"{where}: {fault}.{' ' if hint else ''}{hint}")


def convert(kind: type[T], data: Mapping[str, Any], where: str) -> T:
    """Turn Python values into a dataclass: as `validate`, but a path may be text, and a list a tuple.

    Raises:
        UsageError: `data` does not match; names the key and what it must be.
    """
    try:
        adapter: TypeAdapter[T] = _adapter(kind)  # type: ignore[arg-type]  # every type is hashable
        return adapter.validate_python(data)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        key = str(fault["loc"][0])
        wanted = inspect.formatannotation(get_type_hints(kind)[key]).replace("NoneType", "None")
        wanted = re.sub(r"\b(typing|pathlib)\.", "", wanted)
        raise UsageError(f"{where}: {key} must be {wanted}, not {data[key]!r}.") from None


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _describe(kind: Any, fault: Mapping[str, Any]) -> str:
    """The text of an error of pydantic in this package's words."""
    *parents, key = fault["loc"] or ("",)
    place = _path(fault["loc"])
    if fault["type"] in _UNKNOWN:
        known = _keys_at(kind, parents)
        inside = f" in {_path(parents)}" if parents else ""
        listed = f" Known: {', '.join(sorted(known))}" if known else ""
        return f'unknown key "{key}"{inside}' + (f".{suggest(str(key), known)}{listed}" if known else "")
    if fault["type"] in ("missing", "missing_argument"):
        inside = f" in {_path(parents)}" if parents else ""
        return f'needs the key "{key}"{inside}'
    if fault["type"] == "value_error":  # raised by a validator of ours, whose message is complete
        return f"{place or 'the content'} {fault['ctx']['error']}"
    message = _MESSAGES.get(fault["type"]) or fault["msg"].replace("Input should be", "must be")
    shown = repr(fault["input"])
    value = f", not {shown}" if len(shown) <= 60 else ""
    return f"{place or 'the content'} {message}{value}"


def _path(parts: Any) -> str:
    """("keep", 3, "name") -> keep[3].name."""
    text = ""
    for part in parts:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _keys_at(kind: Any, parents: list[Any]) -> list[str]:
    """Field names of the dataclass at a path inside `kind`; empty if the path leads through a list or mapping."""
    for parent in parents:
        if not dataclasses.is_dataclass(kind) or not isinstance(parent, str):
            return []
        kind = get_type_hints(kind).get(parent)
    return [field.name for field in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []
