"""Validate what is read from disk against a dataclass: one clear line per fault, never a traceback."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from sd_unlearn.errors import UsageError, reason, suggest

T = TypeVar("T")

STRICT = ConfigDict(extra="forbid", strict=True)  # as `__pydantic_config__` of a dataclass: unknown keys are errors
OPEN = ConfigDict(extra="ignore", strict=True)  # of a dataclass that later versions may add keys to

# pydantic's error types in the words of YAML and JSON; other types keep pydantic's own message.
_MESSAGES = {
    "string_type": "must be text (in quotes)",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    **dict.fromkeys(("dict_type", "dataclass_type"), "must hold keys and values"),
}


def validate(kind: type[T], data: Any, where: str, hint: str = "") -> T:
    """Turn parsed JSON or YAML into an instance of `kind`, a dataclass or any type that pydantic knows.

    Numbers, texts and booleans are not converted into one another; a list is accepted for a tuple. How a dataclass
    treats unknown keys is its `__pydantic_config__`: `STRICT` or `OPEN`.

    Args:
        where: Names the file (and option) at the start of the error.
        hint: A sentence that says what to do, at the end of the error.

    Raises:
        UsageError: `data` does not fit; names the key and what it must be.
    """
    try:
        adapter: TypeAdapter[T] = _adapter(kind)  # type: ignore[arg-type]  # every type is hashable
        return adapter.validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        fault = _describe(kind, error.errors(include_url=False)[0])
    except (TypeError, ValueError, RecursionError) as error:  # a date, a set or bytes of YAML; a list inside itself
        fault = f"holds a value that is not text, a number, a list or a mapping ({reason(error)})"
    raise UsageError(f"{where}: {fault}.{' ' if hint else ''}{hint}")


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _describe(kind: Any, fault: Mapping[str, Any]) -> str:
    """One pydantic error in the words of this package."""
    *parents, key = fault["loc"] or ("",)
    place = _path(fault["loc"])
    if fault["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = _keys_at(kind, parents)
        inside = f" in {_path(parents)}" if parents else ""
        listed = f" Known: {', '.join(sorted(known))}" if known else ""
        return f'unknown key "{key}"{inside}.{suggest(str(key), known)}{listed}'
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
    """The fields of the dataclass that lies at a path inside `kind`; empty where it is not a plain nested field."""
    for parent in parents:
        if not dataclasses.is_dataclass(kind) or not isinstance(parent, str):
            return []
        annotated = _hints(kind).get(parent)
        kind = annotated
    return [field.name for field in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []


def _hints(kind: Any) -> dict[str, Any]:
    from typing import get_type_hints

    return get_type_hints(kind)
