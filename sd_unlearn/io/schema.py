"""Validate data read from disk against dataclasses, with errors of one line."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

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
    """Turn Python values into a dataclass: as `validate`, but a path may be text, a list a tuple, and false "no".

    Raises:
        UsageError: `data` does not match; names the key and what it must be.
    """
    values, hints = with_no(kind, data), get_type_hints(kind)
    wrong = next((k for k, v in values.items() if _has_bool(v) and bool not in _parts(hints.get(k))), None)
    try:
        adapter: TypeAdapter[T] = _adapter(kind)  # type: ignore[arg-type]  # every type is hashable
        if wrong is None:  # pydantic would take true for 1
            return adapter.validate_python(values)
    except ValidationError as error:
        wrong = str(error.errors(include_url=False)[0]["loc"][0])
    wanted = inspect.formatannotation(hints[wrong]).replace("NoneType", "None")
    wanted = re.sub(r"\b(typing|pathlib)\.", "", wanted)
    raise UsageError(f"{where}: {wrong} must be {wanted}, not {data[wrong]!r}.")


def with_no(kind: type, data: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a dataclass in YAML, where `no` is false: the text for options with the choice "no"."""
    hints = get_type_hints(kind)
    return {key: "no" if value is False and "no" in _parts(hints.get(key)) else value for key, value in data.items()}


def _parts(hint: Any) -> list[Any]:
    """A type and everything it consists of: of a list or union the types, of a Literal the values."""
    return [hint, *(part for argument in get_args(hint) for part in _parts(argument))]


def _has_bool(value: Any) -> bool:
    return any(isinstance(item, bool) for item in (value if isinstance(value, list | tuple) else [value]))


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _describe(kind: Any, fault: Mapping[str, Any]) -> str:
    """The text of an error of pydantic in this package's words."""
    *parents, key = fault["loc"] or ("",)
    place, outer = _path(_at(kind, fault["loc"])[1]), _path(_at(kind, parents)[1])
    inside = f" in {outer}" if outer else ""
    if fault["type"] in _UNKNOWN:
        holder = _at(kind, parents)[0]
        known = [field.name for field in dataclasses.fields(holder)] if dataclasses.is_dataclass(holder) else []
        listed = f" Known: {', '.join(sorted(known))}" if known else ""
        return f'unknown key "{key}"{inside}' + (f".{suggest(str(key), known)}{listed}" if known else "")
    if fault["type"] in ("missing", "missing_argument"):
        return f'needs the key "{key}"{inside}'
    if fault["type"] == "value_error":  # raised by a validator of ours, whose message is complete
        return f"{place or 'the content'} {fault['ctx']['error']}"
    message = _MESSAGES.get(fault["type"]) or fault["msg"].replace("Input should be", "must be")
    shown = repr(fault["input"])
    value = f", not {shown}" if len(shown) <= 60 else ""
    return f"{place or 'the content'} {message}{value}"


def _path(parts: Sequence[Any]) -> str:
    """("keep", 3, "name") -> keep[3].name."""
    text = ""
    for part in parts:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _at(kind: Any, parts: Sequence[Any]) -> tuple[Any, list[Any]]:
    """The type at a path inside `kind` (None: not known), and the path without pydantic's names of a union's types."""
    path = []
    for part in parts:
        types = [one for one in (get_args(kind) if isinstance(kind, UnionType) else (kind,)) if one is not NoneType]
        if len(types) > 1 and (named := [one for one in types if getattr(one, "__name__", "") == part]):
            kind = named[0]
            continue
        path.append(part)
        kind = next((inner for one in types if (inner := _inside(one, part)) is not None), None)
    return kind, path


def _inside(kind: Any, part: Any) -> Any:
    """The type of an item of a list or mapping, or of a field of a dataclass; None for others."""
    if dataclasses.is_dataclass(kind):
        return get_type_hints(kind).get(part)
    return get_args(kind)[-1 if get_origin(kind) is dict else 0] if get_args(kind) else None
