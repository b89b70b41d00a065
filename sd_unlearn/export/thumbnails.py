"""Pictures of a run for its files: a thumbnail for the header, and a grid of pairs for the model card."""

from __future__ import annotations

import base64
import io
import os

from PIL import Image

from sd_unlearn.export.trained_run import Run, pairs_of
from sd_unlearn.io.run_folder import PREVIEW_DIR

CELL, THUMBNAIL = 192, 256  # longest sides in pixels
MANY = 4  # pairs of the concept in the grid, and as many of what had to stay
GAP = 4
FORGOTTEN = ("direct", "held_out", "generic")  # groups of what was to be forgotten, in order of preference


def thumbnail(run: Run) -> str | None:
    """One pair side by side (else the last preview) as a small JPEG data: URI; None where there is no picture."""
    found = _pairs(run)[:1]
    image = _beside([[one.resize((CELL, CELL)) for one in found[0]]]) if found else _preview(run)
    if image is None:
        return None
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    memory = io.BytesIO()
    image.save(memory, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(memory.getvalue()).decode()


def grid(run: Run) -> bytes | None:
    """PNG: without (above) and with (below) what was trained, the concept left, what had to stay right."""
    pairs = [[one.resize((CELL, CELL)) for one in pair] for pair in _pairs(run)]
    if not pairs:
        return None
    memory = io.BytesIO()
    _beside([[pair[side] for pair in pairs] for side in (0, 1)]).save(memory, "PNG", optimize=True)
    return memory.getvalue()


def _pairs(run: Run) -> list[tuple[Image.Image, Image.Image]]:
    """Pairs of the run's evaluation, first of the concept, then of what had to stay; unreadable ones passed over."""
    if run.results is None or run.concept.kind == "nudity":  # what was to be forgotten is not to be shown around
        return []
    listed = pairs_of(run.results)
    forgotten = [p for group in FORGOTTEN for p in listed if p["group"] == group]
    kept = [p for p in listed if p["group"] not in FORGOTTEN]
    found = []
    for pairs in (forgotten, kept):
        stride = max(1, len(pairs) // MANY)
        opened = ((_open(run, p["base"]), _open(run, p["lora"])) for p in pairs[::stride][:MANY])
        found += [(base, lora) for base, lora in opened if base and lora]
    return found


def _preview(run: Run) -> Image.Image | None:
    if run.concept.kind == "nudity":
        return None
    files = sorted((run.folder / PREVIEW_DIR).glob("*.png"))
    return _open(run, f"{PREVIEW_DIR}/{files[-1].name}") if files else None


def _open(run: Run, relative: str) -> Image.Image | None:
    """A picture of the run folder; None when it is missing, unreadable or lies outside."""
    plain = os.path.normpath(relative)
    if os.path.isabs(plain) or plain.startswith(".."):
        return None  # a results.json from elsewhere must not put other files of this machine into what is published
    try:
        with Image.open(run.folder / plain) as opened:
            return opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def _beside(rows: list[list[Image.Image]]) -> Image.Image:
    """Pictures of CELL pixels as a table on white."""
    step = CELL + GAP
    table = Image.new("RGB", (len(rows[0]) * step - GAP, len(rows) * step - GAP), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            table.paste(image, (x * step, y * step))
    return table
