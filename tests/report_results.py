"""A results.json to report, and a parser of the page made from it."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

from sd_unlearn.results import Results, Row, parse_results

EVIL = "<script>alert(1)</script>"
DETECTOR = "digits-reader sha256:abcdef"
COST = {"seconds": 41.2, "steps": 400, "images_seen": 12800, "peak_memory_mb": 912, "device": "cpu"}


def make_row(metric: str, group: str, subject: str, value: Any, n: Any = 200, **rest: Any) -> dict[str, Any]:
    keys = {"metric": metric, "group": group, "subject": subject, "value": value, "n": n}
    return keys | {"concept": "seven", "detector": DETECTOR, "note": ""} | rest


def make_pair(group: str, seed: int, image: str, **rest: Any) -> dict[str, Any]:
    keys = {"concept": "seven", "subject": "lora", "group": group, "seed": seed, "image": image}
    return keys | {"base": "images/a.png", "prompt": "a photo of the digit seven"} | rest


ROWS = (
    make_row("leakage", "direct", "base", 0.965, low=0.93, high=0.983, interval="wilson"),
    make_row("leakage", "direct", "lora", 0.01, low=0.00275, high=0.0357, interval="wilson"),
    make_row("clean_replacement", "direct", "lora", 0.974, interval="none"),
    make_row("retention", "kept", "lora", 1.023, 900, low=0.991, high=1.041, interval="paired-bootstrap"),
    make_row("fid-digits", "kept", "lora", 5.377, 900),
    make_row("sharpness", "elsewhere", "lora", 12.34, 7),
)
PAIRS = (
    make_pair("direct", 11, "images/b.png", expected="seven", base_read="seven white", image_read="two white"),
    make_pair(
        "direct", 12, "images/big.png", expected="seven", base_read="seven white", image_read="seven white", leak=True
    ),
    make_pair("alike", 13, "../../secret.png", prompt="a photo of the digit one", expected="one", lost=True)
    | {"base": "images/none.png", "base_read": "one white", "image_read": "four white"},
)


def make_results(
    concept: dict[str, Any] | None = None, subject: dict[str, Any] | None = None, **changes: Any
) -> dict[str, Any]:
    """One LoRA with the id "lora" on one concept; `concept` and `subject` change their entries."""
    entry = {"slug": "seven", "name": "seven", "kind": "digit", "caption": "a photo of the digit seven"}
    entry |= {"generic": "a photo of a handwritten digit"} | (concept or {})
    lora = {"id": "lora", "name": "seven", "what": "lora", "strength": 1.0, "sha256": "cd" * 32}
    lora |= {"training": {"beta": 0.1}, "cost": COST} | (subject or {})
    own = {"concept": entry["slug"]}
    return {
        "schema_version": 2,
        "created": "2026-11-22T10:00:00+00:00",
        "version": "0.1.0",
        "base": {"name": "digits", "sha256": "ab" * 32},
        "seeds": {"evaluate": [2, 3], "seeds": [0]},
        "concepts": [entry],
        "subjects": [{"id": "base", "name": "digits", "what": "base"}, lora],
        "rows": [row | own for row in ROWS],
        "pairs": [pair | own for pair in PAIRS],
        **changes,
    }


def parsed(**changes: Any) -> Results:
    """`make_results`, as the report reads it."""
    return parse_results(make_results(**changes))


def rows(*given: dict[str, Any]) -> list[Row]:
    """Rows of `make_row`, as the report reads them."""
    return list(parsed(rows=list(given)).rows)


class Page(HTMLParser):
    """Tags with their attributes, and the visible text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def plain(text: str) -> str:
    return text.replace("\u00a0", " ").replace("\u2060", "")
