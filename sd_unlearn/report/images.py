"""Images of the report, embedded as data: URIs and small enough that the page can be sent by mail."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from sd_unlearn.io.images import UnreadableImage, open_image
from sd_unlearn.io.paths import path_inside

# Longest side in pixels: images up to SMALL are shown magnified, larger ones are shrunk to THUMBNAIL.
SMALL, THUMBNAIL = 128, 384
SMALL_GRID, GRID = 512, 1024  # the same for the preview, a grid of images
# Longest side and WebP quality, best first: a page takes the first level at which all its images fit.
LEVELS = ((THUMBNAIL, 82), (320, 78), (256, 74), (224, 68), (192, 60), (160, 50), (128, 40), (96, 30))
BUDGET = 13_000_000  # characters of data: URIs, so that a page with its tables stays under 15 MB
SAMPLE = 16  # images on which a level is tried before all are encoded
CELLS, MARGIN = 5, 0.15  # a blurred face keeps this many averages per side, and its box grows by this share

Boxes = Sequence[Sequence[float]]  # [x0, y0, x1, y1] each, as shares of width and height


class Embedded(NamedTuple):
    """An image as the page holds it."""

    uri: str
    width: int
    height: int
    tiny: bool  # not shrunk; shown magnified


def embed_all(
    folder: Path, uses: Mapping[str, int], faces: Mapping[str, Boxes] | None = None
) -> dict[str, Embedded | None]:
    """Embed images of a folder, together within BUDGET.

    Args:
        uses: path -> how often the page shows the image.
        faces: path -> boxes to blur.

    Returns:
        path -> image; None if it is missing, unreadable or outside the folder.
    """
    places, total = list(uses), max(1, sum(uses.values()))
    level = 0

    def encode(place: str) -> Embedded | None:
        return embed(folder, place, *LEVELS[level], boxes=(faces or {}).get(place, ()), max_length=BUDGET // total)

    for level in range(len(LEVELS)):
        is_last = level == len(LEVELS) - 1
        sample = [image for place in places[:: max(1, len(places) // SAMPLE)] if (image := encode(place))]
        mean = sum(len(image.uri) for image in sample) / max(1, len(sample))
        if mean * total > BUDGET and not is_last:
            continue
        with ThreadPoolExecutor() as pool:
            images = dict(zip(places, pool.map(encode, places), strict=True))
        if is_last or sum(len(image.uri) * uses[place] for place, image in images.items() if image) <= BUDGET:
            return images
    raise AssertionError("the last level is always taken")


def embed(
    folder: Path,
    relative: str,
    limit: int = THUMBNAIL,
    quality: int = 82,
    boxes: Boxes = (),
    max_length: int = BUDGET,
) -> Embedded | None:
    """Embed one image of a folder, its boxes blurred; None where `open_inside` finds no image."""
    image = open_inside(folder, relative)
    if image is None:
        return None
    blur(image, boxes)
    return embed_image(image, limit, quality, max_length=max_length)


def open_inside(folder: Path, relative: str) -> Image.Image | None:
    """An image of a folder; None if it is missing, unreadable or, after its links are followed, outside the folder."""
    # a run folder from elsewhere must not pull other files of this machine into the report
    path = path_inside(folder, relative)
    try:
        return open_image(path) if path else None
    except UnreadableImage:
        return None


def embed_image(
    image: Image.Image, limit: int = THUMBNAIL, quality: int = 82, small: int = SMALL, max_length: int = BUDGET
) -> Embedded:
    """Embed an image. One of at most `small` pixels keeps its size unless its URI would be longer than `max_length`;
    larger ones are shrunk, in place, to `limit` pixels.
    """
    tiny = max(image.size) <= small
    kind, data = "png", _encode(image, "PNG", optimize=True) if tiny else b""
    if not tiny or 4 * len(data) / 3 > max_length:
        image.thumbnail((limit, limit))
        kind, data = "webp", _encode(image, "WEBP", quality=quality)
    uri = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return Embedded(uri, image.width, image.height, tiny)


def _encode(image: Image.Image, kind: str, **settings: Any) -> bytes:
    memory = io.BytesIO()
    image.save(memory, kind, **settings)
    return memory.getvalue()


def blur(image: Image.Image, boxes: Boxes) -> None:
    """Replace each box by a few averages of it, in place. Unlike a soft focus, no filter can bring the face back."""
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
            averages = face.resize((min(CELLS, face.width), min(CELLS, face.height)), Image.Resampling.BOX)
            image.paste(averages.resize(face.size, Image.Resampling.BICUBIC), box)
