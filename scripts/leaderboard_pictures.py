"""The pictures of `leaderboard.py`: a strip of images for each cell, and all strips of a concept in one file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from sd_unlearn.io.files import atomic_path
from sd_unlearn.io.images import open_image

GAP = 8  # pixels between the groups of images of a strip
SCALE = 2  # of the page's pictures
LABEL = 150  # pixels for the name of a row


def write_strip(path: Path, groups: Sequence[Sequence[Path]]) -> None:
    """Write images side by side, with a gap between groups. Groups without a file are left out."""
    images = [[open_image(file) for file in group if file.is_file()] for group in groups]
    images = [group for group in images if group]
    if not images:
        return
    side = images[0][0].height
    width = sum(image.width for group in images for image in group) + GAP * (len(images) - 1)
    strip, x = Image.new("RGB", (width, side), "white"), 0
    for group in images:
        for image in group:
            strip.paste(image, (x, 0))
            x += image.width
        x += GAP
    _save(strip, path)


def write_grid(path: Path, rows: Sequence[Sequence[Path]]) -> None:
    """Write images of one size in rows, with a gap after every second row."""
    images = [[open_image(file) for file in row] for row in rows]
    side = SCALE * images[0][0].height
    size = (side * max(map(len, images)), side * len(images) + GAP * ((len(images) - 1) // 2))
    page = Image.new("RGB", size, "white")
    for y, row in enumerate(images):
        for x, image in enumerate(row):
            page.paste(image.resize((side, side), Image.Resampling.NEAREST), (x * side, y * side + y // 2 * GAP))
    _save(page, path)


def write_rows(path: Path, strips: Mapping[str, Path]) -> bool:
    """Write one labelled row for each strip; False if there is none."""
    rows = {name: open_image(file) for name, file in strips.items() if file.is_file()}
    if not rows:
        return False
    rows = {
        name: row.resize((row.width * SCALE, row.height * SCALE), Image.Resampling.NEAREST)
        for name, row in rows.items()
    }
    height = sum(row.height + GAP for row in rows.values())
    page = Image.new("RGB", (LABEL + max(row.width for row in rows.values()), height), "white")
    draw, font, y = ImageDraw.Draw(page), ImageFont.load_default(14), 0
    for name, row in rows.items():
        draw.text((4, y + row.height // 2), name, fill="black", font=font, anchor="lm")
        page.paste(row, (LABEL, y))
        y += row.height + GAP
    _save(page, path)
    return True


def _save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG", optimize=True)
