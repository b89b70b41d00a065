"""The last preview of a training, row by row beside that of the base."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from sd_unlearn.data.concept import Concept
from sd_unlearn.io.run_folder import PREVIEW_DIR
from sd_unlearn.report.images import GRID, SMALL_GRID, Embedded, embed_image, open_inside


@dataclass(frozen=True)
class PreviewRow:
    """Images of one prompt from fixed seeds."""

    prompt: str
    base: Embedded | None  # before training; None if the run has no preview of step 0
    trained: Embedded


@dataclass(frozen=True)
class Preview:
    step: int  # of the trained images
    rows: list[PreviewRow]


def preview(folder: Path, concept: Concept | None) -> Preview | None:
    """The preview with the highest step, and the one before training (step 0). None without a readable one.

    concept: that of the run, which names the rows; without it the grid is one row without a prompt.
    """
    by_step = {
        int(match[1]): path.relative_to(folder).as_posix()
        for path in (folder / PREVIEW_DIR).glob("step-*.png")
        if (match := re.fullmatch(r"step-(\d+)", path.stem))
    }
    step = max(by_step, default=0)
    trained = open_inside(folder, by_step[step]) if step else None
    if trained is None:
        return None
    base = open_inside(folder, by_step[0]) if 0 in by_step else None
    prompts = concept.preview_prompts if concept and trained.height % len(concept.preview_prompts) == 0 else [""]
    before = _rows(base, len(prompts)) if base and base.size == trained.size else [None] * len(prompts)
    after = _rows(trained, len(prompts))
    return Preview(step, [PreviewRow(*row) for row in zip(prompts, before, after, strict=True)])


def _rows(grid: Image.Image, count: int) -> list[Embedded]:
    height = grid.height // count
    rows = (grid.crop((0, i * height, grid.width, (i + 1) * height)) for i in range(count))
    return [embed_image(row, GRID, small=SMALL_GRID) for row in rows]
