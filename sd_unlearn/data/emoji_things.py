"""The things of the bundled base `emoji` and their categories, from assets/emoji_things.csv."""

from __future__ import annotations

import csv
from pathlib import Path

FILE = Path(__file__).parent.parent / "assets" / "emoji_things.csv"
with FILE.open(encoding="utf-8", newline="") as _file:
    _ROWS = list(csv.DictReader(_file))
THINGS = tuple(row["name"] for row in _ROWS)
CATEGORIES = {
    category: tuple(row["name"] for row in _ROWS if row["category"] == category)
    for category in dict.fromkeys(row["category"] for row in _ROWS)
}
