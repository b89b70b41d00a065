"""Real portraits from installed packages, and small helpers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from sd_unlearn.data.concept import Concept, Prompt
from sd_unlearn.metrics.base import PromptedImages

CONCEPT = Concept(name="Eileen Collins", caption="a photo of Eileen Collins", generic="a photo of a woman")


def astronaut() -> Image.Image:
    """Eileen Collins, 512x512."""
    return Image.fromarray(pytest.importorskip("skimage.data").astronaut())


def versions() -> dict[str, Image.Image]:
    """Transformed versions of the same portrait."""
    image = astronaut()
    return {
        "mirrored": ImageOps.mirror(image),
        "cropped": image.crop((120, 0, 380, 260)),
        "dimmed": ImageEnhance.Brightness(image).enhance(0.4),
        "brightened": ImageEnhance.Brightness(image).enhance(1.4),
        "grey": ImageOps.grayscale(image).convert("RGB"),
        "halved": image.resize((256, 256)),
        "quartered": image.resize((128, 128)),
        "doubled": image.resize((1024, 1024)),
        "stretched": image.resize((512, 600)),
        "tilted": image.rotate(10, Image.Resampling.BICUBIC),
    }


def strangers() -> list[Image.Image]:
    """A hundred other people, 25x25 pixels, grey: the first half of scikit-image's subset of LFW."""
    faces = pytest.importorskip("skimage.data").lfw_subset()[:100]
    return [Image.fromarray((face * 255).astype(np.uint8)).convert("RGB") for face in faces]


def save(folder: Path, *images: Image.Image, start: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for n, image in enumerate(images, start):
        image.save(folder / f"{n:03}.png")
    return folder


def prompted(*groups: str) -> PromptedImages:
    n = len(groups)
    return PromptedImages(CONCEPT, np.array(groups), (Prompt("a prompt"),) * n, np.zeros(n, np.int64))
