"""Pictures and curves of the report: files of the run folder as data: URIs, and the geometry of the training curve."""

from __future__ import annotations

import base64
import io
import itertools
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from sd_unlearn.templates.figures import GROUPS, rank

# Longest side in pixels up to which a picture is shown magnified, and to which a larger one is shrunk.
SMALL, THUMBNAIL = 128, 384
SMALL_GRID, GRID = 512, 1024  # the same for the preview, a grid of pictures


def picture(run: Path, relative: str, limit: int = THUMBNAIL, small: int = SMALL) -> dict[str, Any] | None:
    """A picture of the run folder as a data: URI with its size; None when it is missing, unreadable or outside."""
    plain = os.path.normpath(relative)
    if os.path.isabs(plain) or plain.startswith(".."):
        return None  # a results.json from elsewhere must not pull other files of this machine into the report
    memory = io.BytesIO()
    try:
        with Image.open(run / plain) as opened:
            image = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    tiny = max(image.size) <= small
    if tiny:
        image.save(memory, "PNG", optimize=True)
    else:
        image.thumbnail((limit, limit))
        image.save(memory, "WEBP", quality=82)
    data = base64.b64encode(memory.getvalue()).decode()
    kind = "png" if tiny else "webp"
    return {"uri": f"data:image/{kind};base64,{data}", "width": image.width, "height": image.height, "tiny": tiny}


def pair_groups(results: dict[str, Any], run: Path) -> list[dict[str, Any]]:
    """The before/after pairs by group, leaks first, with their pictures and whether what had to stay is lost."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for raw in results["pairs"]:
        pair = {"expected": "", "base_read": "", "lora_read": "", "leak": False, "seed": None, **raw}
        asked, before, after = (_words(pair[k]) for k in ("expected", "base_read", "lora_read"))
        # Only what the base drew can be lost: a word the judge never reads must not count against the LoRA.
        kept = pair["group"] not in ("direct", "held_out", "generic")
        pair["lost"] = bool(asked) and kept and asked <= before and not asked <= after
        pair["pictures"] = [
            ("without", picture(run, pair["base"]), pair["base_read"]),
            ("with", picture(run, pair["lora"]), pair["lora_read"]),
        ]
        groups.setdefault(pair["group"], []).append(pair)
    made = []
    for name in sorted(groups, key=lambda g: rank(GROUPS, g)):
        pairs = sorted(groups[name], key=lambda p: (not p["leak"], not p["lost"]))
        made.append(
            {
                "name": name,
                "pairs": pairs,
                "leaks": sum(bool(p["leak"]) for p in pairs),
                "lost": sum(p["lost"] for p in pairs),
                "tiny": all(image["tiny"] for p in pairs for _, image, _ in p["pictures"] if image),
                "one_prompt": len({p["prompt"] for p in pairs}) == 1,
            }
        )
    return made


def _words(text: Any) -> set[str]:
    return set(re.findall(r"\w+", str(text).lower()))


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) inside [low, high], about `count` of them."""
    if high <= low:
        return [low]
    step = 10.0 ** math.floor(math.log10((high - low) / count))
    step *= next(m for m in (1, 2, 5, 10, 20) if (high - low) / (step * m) <= count)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def chart(log: list[dict[str, Any]], keys: Sequence[str], target: float | None = None) -> dict[str, Any] | None:
    """Geometry of one line chart in a 480 x 260 box: polylines, ticks and end labels; None without two points.

    Values that are missing or not finite are left out of their line.
    """
    left, right, top, bottom = 52, 378, 16, 216
    by_step = {r["step"]: r for r in log if isinstance(r.get("step"), int | float)}  # a resumed step counts once
    series = {k: [(s, by_step[s][k]) for s in sorted(by_step) if _finite(by_step[s].get(k))] for k in keys}
    points = [p for line in series.values() for p in line]
    if len({x for x, _ in points}) < 2:
        return None
    x0, x1 = min(x for x, _ in points), max(x for x, _ in points)
    y0, y1 = min(0.0, *(y for _, y in points)), max(0.0, *(y for _, y in points), target or 0.0) * 1.05 or 1.0

    def across(x: float) -> float:
        return round(left + (x - x0) / (x1 - x0) * (right - left), 1)

    def down(y: float) -> float:
        return round(bottom - (y - y0) / (y1 - y0) * (bottom - top), 1)

    drawn = []
    for key, line in series.items():
        kept = line[:: max(1, len(line) // 400)] + line[-1:]
        if kept:
            drawn.append(
                {
                    "name": key,
                    "points": " ".join(f"{across(x)},{down(y)}" for x, y in kept),
                    "y": down(kept[-1][1]),
                    "last": kept[-1][1],
                }
            )
    order = sorted(drawn, key=lambda s: s["y"])
    for above, below in itertools.pairwise(order):
        below["y"] = max(below["y"], above["y"] + 16)  # end labels never overlap
    return {
        "series": drawn,
        "x": [(across(t), f"{t:,.0f}") for t in ticks(x0, x1)],
        "y": [(down(t), f"{t:,.4g}") for t in ticks(y0, y1)],
        "box": (left, right, top, bottom),
        "target": None if target is None else (down(target), f"{target:,.3g}"),
    }


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
