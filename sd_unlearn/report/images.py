"""Pictures of the report: files of the folder as data: URIs, small enough that the page can be sent by mail."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image

# Longest side in pixels up to which a picture is shown magnified, and to which a larger one is shrunk.
SMALL, THUMBNAIL = 128, 384
SMALL_GRID, GRID = 512, 1024  # the same for the preview, a grid of pictures
# Longest side and WebP quality, the best first: a page takes the first at which all its pictures fit.
LEVELS = ((THUMBNAIL, 82), (320, 78), (256, 74), (224, 68), (192, 60), (160, 50), (128, 40), (96, 30))
BUDGET = 13_000_000  # characters of data: URIs, so that a page with its tables stays under 15 MB
SAMPLE = 16  # pictures on which a level is tried before all are encoded
CELLS, MARGIN = 5, 0.15  # a blurred face keeps this many averages a side, and its box grows by this share

Boxes = Sequence[Sequence[float]]  # [x0, y0, x1, y1] each, as shares of width and height
Picture = dict[str, Any]  # uri, width, height, tiny


def embed(folder: Path, asked: dict[str, int], faces: dict[str, Boxes] | None = None) -> dict[str, Picture | None]:
    """Each picture of a folder as the page shows it, together within BUDGET.

    asked: path -> how often the page holds it. faces: path -> boxes to blur before anything is kept.
    A picture that is missing, unreadable or outside the folder is None.
    """
    places = list(asked)
    uses = sum(asked.values())
    level = 0

    def one(place: str) -> Picture | None:
        return picture(folder, place, *LEVELS[level], boxes=(faces or {}).get(place, ()), most=BUDGET // max(1, uses))

    for level in range(len(LEVELS)):
        last = level == len(LEVELS) - 1
        tried = [made for place in places[:: max(1, len(places) // SAMPLE)] if (made := one(place))]
        mean = sum(len(made["uri"]) for made in tried) / max(1, len(tried))
        if mean * uses > BUDGET and not last:
            continue
        with ThreadPoolExecutor() as pool:
            made = dict(zip(places, pool.map(one, places), strict=True))
        if last or sum(len(p["uri"]) * asked[place] for place, p in made.items() if p) <= BUDGET:
            return made
    raise AssertionError("the last level is always taken")


def picture(
    folder: Path,
    relative: str,
    limit: int = THUMBNAIL,
    quality: int = 82,
    small: int = SMALL,
    boxes: Boxes = (),
    most: int = BUDGET,
) -> Picture | None:
    """A picture of the folder as a data: URI with its size; None when it is missing, unreadable or outside.

    One of at most `small` pixels stays as it is unless its URI would be longer than `most`.
    """
    plain = os.path.normpath(relative)
    if not relative or os.path.isabs(plain) or plain.startswith(".."):
        return None  # a results.json from elsewhere must not pull other files of this machine into the report
    try:
        with Image.open(folder / plain) as opened:
            image = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    blur(image, boxes)
    tiny = max(image.size) <= small
    kind, data = "png", _encoded(image, "PNG", optimize=True) if tiny else b""
    if not tiny or 4 * len(data) / 3 > most:
        image.thumbnail((limit, limit))
        kind, data = "webp", _encoded(image, "WEBP", quality=quality)
    uri = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return {"uri": uri, "width": image.width, "height": image.height, "tiny": tiny}


def _encoded(image: Image.Image, kind: str, **settings: Any) -> bytes:
    memory = io.BytesIO()
    image.save(memory, kind, **settings)
    return memory.getvalue()


def blur(image: Image.Image, boxes: Boxes) -> None:
    """Replace each box by a few averages of it, in place: unlike a soft focus, no filter brings the face back."""
    for x0, y0, x1, y1 in boxes:
        wide, high = MARGIN * (x1 - x0), MARGIN * (y1 - y0)
        box = (
            max(0, int((x0 - wide) * image.width)),
            max(0, int((y0 - high) * image.height)),
            min(image.width, round((x1 + wide) * image.width) + 1),
            min(image.height, round((y1 + high) * image.height) + 1),
        )
        if box[0] < box[2] and box[1] < box[3]:
            face = image.crop(box)
            few = face.resize((min(CELLS, face.width), min(CELLS, face.height)), Image.Resampling.BOX)
            image.paste(few.resize(face.size, Image.Resampling.BICUBIC), box)
