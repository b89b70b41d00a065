"""Contents of files that a user may have by accident or by malice, as strategies of hypothesis."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import yaml
from hypothesis import strategies as st

# Fragments of JSON and YAML text that no Python value is dumped as.
JSON_FRAGMENTS = (
    "9" * 5_000,
    "-" + "9" * 4_000,
    "1e999",
    "NaN",
    "-Infinity",
    r'"\ud83d"',
    r'"\u0000"',
    r'"a\u0000b.png"',
    "[" * 50_000,
    "[" * 400 + "]" * 400,
    '{"a":' * 300 + "1" + "}" * 300,
)
YAML_FRAGMENTS = (
    *JSON_FRAGMENTS[:-3],
    "[" * 1_000,
    '!!int ""',
    '!!float ""',
    "!!bool maybe",
    "!!timestamp never",
    "2026-13-45",
    "2026-11-28",
    "!!binary x",
    "!!python/object:os.system {}",
    "!!set {a, b}",
    "&a [*a]",
    "*nothing",
    "{? [1, 2] : 3}",
    "{1: 2, null: 3, 1.5: x}",
    "0x" + "f" * 10_000,
    "190:20:30.15",
)
LEAVES = (
    st.none()
    | st.booleans()
    | st.sampled_from((0, -1, 1, 2, 10**6, 10**18, 2**63, 10**400, -(10**18)))
    | st.floats()
    | st.sampled_from((1e-320, 1e308, -1.0, 0.0))
    | st.text(max_size=6)
    | st.sampled_from(("", " ", "nan", "../x", "/", "x" * 300, "{a,b}", "{a,b" * 20 + "}" * 20, "a\nb", "\u2028", "%s"))
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def changed_bytes(draw: Callable[..., Any], valid: bytes) -> bytes:
    """A valid file with some bytes replaced, removed, doubled or cut off."""
    data = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, max(0, len(data) - 1)))
        end = start + draw(st.integers(0, 12))
        kind = draw(st.sampled_from(("replace", "insert", "remove", "double", "cut")))
        if kind == "cut":
            del data[start:]
        elif kind == "double":
            data[start:start] = data[start:end]
        else:
            new = b"" if kind == "remove" else draw(st.binary(min_size=1, max_size=6))
            data[start : start if kind == "insert" else end] = new
    return bytes(data)


def _places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside a value, itself included."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place, *(inner for key, item in items for inner in _places(item, (*place, key)))]


@st.composite
def changed_text(draw: Callable[..., Any], valid: Any, dump: Callable[[Any], str], fragments: tuple[str, ...]) -> bytes:
    """A valid JSON or YAML value, of which one or two parts are removed or replaced by an odd value or fragment."""
    data = copy.deepcopy(valid)
    used = {}
    for number in range(draw(st.integers(1, 2))):
        place = draw(st.sampled_from(_places(data)))
        kind = draw(st.sampled_from(("value", "value", "fragment", "remove")))
        new = draw(VALUES) if kind == "value" else f"@fragment{number}"
        if kind == "fragment":
            used[f'"@fragment{number}"'] = draw(st.sampled_from(fragments))
        if not place:
            data = None if kind == "remove" else new
            continue
        parent = data
        for key in place[:-1]:
            parent = parent[key]
        if kind == "remove":
            del parent[place[-1]]
        else:
            parent[place[-1]] = new
    text = dump(data)
    for mark, fragment in used.items():
        text = text.replace(mark, fragment)
    return text.encode("utf-8", "surrogatepass")


def as_jsonl(rows: Any) -> str:
    return "\n".join(map(json.dumps, rows)) if isinstance(rows, list) else json.dumps(rows)


def json_contents(valid: Any) -> st.SearchStrategy[bytes]:
    text = changed_text(valid, json.dumps, JSON_FRAGMENTS)
    return st.one_of(text, text, text, changed_bytes(json.dumps(valid).encode()), st.binary(max_size=60))


def jsonl_contents(valid: list[Any]) -> st.SearchStrategy[bytes]:
    text = changed_text(valid, as_jsonl, JSON_FRAGMENTS)
    return st.one_of(text, text, text, changed_bytes(as_jsonl(valid).encode()), st.binary(max_size=60))


def yaml_contents(valid: Any) -> st.SearchStrategy[bytes]:
    text = changed_text(valid, json.dumps, YAML_FRAGMENTS)  # JSON is YAML
    plain = yaml.safe_dump(valid, sort_keys=False).encode()
    return st.one_of(text, text, text, changed_bytes(plain), st.binary(max_size=60))


def byte_contents(*valid: bytes) -> st.SearchStrategy[bytes]:
    return st.one_of(*(changed_bytes(data) for data in valid), st.binary(max_size=60))


@st.composite
def safetensors_contents(draw: Callable[..., Any], valid: bytes) -> bytes:
    """A .safetensors file whose header is changed as text, or whose bytes are changed."""
    length = int.from_bytes(valid[:8], "little")
    header, tensors = json.loads(valid[8 : 8 + length]), valid[8 + length :]
    if draw(st.booleans()):
        return draw(changed_bytes(valid))
    text = draw(changed_text(header, json.dumps, JSON_FRAGMENTS))
    return len(text).to_bytes(8, "little") + text + tensors
