"""A results.json to be reported, and a parser of the page made of it."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

EVIL = "<script>alert(1)</script>"


JUDGE = "digits-reader sha256:abcdef"


def make_row(metric: str, group: str, subject: str, value: Any, n: int = 200, **rest: Any) -> dict[str, Any]:
    return {
        "metric": metric,
        "group": group,
        "subject": subject,
        "value": value,
        "n": n,
        "detector": JUDGE,
        "note": "",
        **rest,
    }


def make_results(**changes: Any) -> dict[str, Any]:
    rows = [
        make_row("leakage", "direct", "base", 0.965, low=0.93, high=0.983, interval="wilson"),
        make_row("leakage", "direct", "lora", 0.01, low=0.00275, high=0.0357, interval="wilson"),
        make_row("clean_replacement", "direct", "lora", 0.974, interval="none"),
        make_row("retention", "kept", "lora", 1.023, 900, low=0.991, high=1.041, interval="paired-bootstrap"),
        make_row("fid-digits", "kept", "lora", 5.377, 900),
        make_row("sharpness", "elsewhere", "lora", 12.34, 7),
    ]
    pairs = [
        {
            "prompt": "a photo of the digit seven",
            "group": "direct",
            "seed": 11,
            "base": "images/a.png",
            "lora": "images/b.png",
            "expected": "seven",
            "base_read": "seven white",
            "lora_read": "two white",
            "leak": False,
        },
        {
            "prompt": "a photo of the digit seven",
            "group": "direct",
            "seed": 12,
            "base": "images/a.png",
            "lora": "images/big.png",
            "expected": "seven",
            "base_read": "seven white",
            "lora_read": "seven white",
            "leak": True,
        },
        {
            "prompt": "a photo of the digit one",
            "group": "alike",
            "seed": 13,
            "base": "images/none.png",
            "lora": "../../secret.png",
            "expected": "one",
            "base_read": "one white",
            "lora_read": "four white",
            "leak": False,
        },
    ]
    cost = {"seconds": 41.2, "steps": 400, "images_seen": 12800, "peak_memory_mb": 912, "device": "cpu"}
    return {
        "schema_version": 1,
        "concept": "seven",
        "caption": "a photo of the digit seven",
        "generic": "a photo of a handwritten digit",
        "base": {"name": "digits", "sha256": "ab" * 32},
        "run": "seven",
        "created": "2026-11-22T10:00:00+00:00",
        "version": "0.1.0",
        "seeds": {"evaluate": [2, 3], "seed": 0},
        "cost": cost,
        "training": {"beta": 0.1},
        "rows": rows,
        "pairs": pairs,
        "skipped": [],
        **changes,
    }


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
