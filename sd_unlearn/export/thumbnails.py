"""Images of a run for the exported files: a thumbnail for the header and a grid of pairs for the model card."""

from __future__ import annotations

import base64
import io

from PIL import Image

from sd_unlearn.export.trained_run import TrainedRun
from sd_unlearn.io.run_folder import PREVIEW_DIR
from sd_unlearn.report.images import open_inside

CELL, THUMBNAIL = 192, 256  # longest sides in pixels
PAIRS = 4  # the grid shows up to this many pairs of the concept, and as many of retained concepts
GAP = 4  # pixels between images
CONCEPT_GROUPS = ("direct", "held_out", "generic")  # prompt groups of the unlearned concept, in order of preference


def thumbnail(run: TrainedRun) -> str | None:
    """A small JPEG in base64: the first pair side by side, else the last preview. None if there is no image."""
    pairs = _pairs(run)[:1]
    image = _table([[side.resize((CELL, CELL)) for side in pairs[0]]]) if pairs else _preview(run)
    if image is None:
        return None
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    memory = io.BytesIO()
    image.save(memory, "JPEG", quality=85)
    return base64.b64encode(memory.getvalue()).decode()


def grid(run: TrainedRun) -> bytes | None:
    """A PNG of pairs, without the LoRA above and with it below. The concept is left, retained concepts are right."""
    pairs = [[side.resize((CELL, CELL)) for side in pair] for pair in _pairs(run)]
    if not pairs:
        return None
    memory = io.BytesIO()
    _table([[pair[side] for pair in pairs] for side in (0, 1)]).save(memory, "PNG", optimize=True)
    return memory.getvalue()


def _pairs(run: TrainedRun) -> list[tuple[Image.Image, Image.Image]]:
    """Pairs of the run's evaluation, first of the concept, then of retained concepts. Unreadable pairs are skipped."""
    if run.results is None or run.shows_nudity:  # nudity must not be published
        return []
    listed = run.results.pairs
    concept = [pair for group in CONCEPT_GROUPS for pair in listed if pair.group == group]
    retained = [pair for pair in listed if pair.group not in CONCEPT_GROUPS]
    images = []
    for pairs in (concept, retained):
        stride = max(1, len(pairs) // PAIRS)
        sides = ((pair.base, pair.image) for pair in pairs[::stride][:PAIRS])
        opened = (tuple(open_inside(run.folder, side) for side in pair) for pair in sides)
        images += [(base, lora) for base, lora in opened if base and lora]
    return images


def _preview(run: TrainedRun) -> Image.Image | None:
    if run.shows_nudity:
        return None
    files = sorted((run.folder / PREVIEW_DIR).glob("*.png"))
    return open_inside(run.folder, f"{PREVIEW_DIR}/{files[-1].name}") if files else None


def _table(rows: list[list[Image.Image]]) -> Image.Image:
    """Images of CELL x CELL pixels as a table on white."""
    step = CELL + GAP
    table = Image.new("RGB", (len(rows[0]) * step - GAP, len(rows) * step - GAP), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            table.paste(image, (x * step, y * step))
    return table
