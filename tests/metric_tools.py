"""Helpers of the metrics' tests: noise images, their prompts, a CLIP model of random weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from sd_unlearn.data.concept import Concept, Prompt
from sd_unlearn.metrics.base import ImageValues, PromptedImages


def pictures(count: int, seed: int = 1, size: tuple[int, int] = (40, 24)) -> list[Image.Image]:
    """Noise, coarse enough not to average to grey when scaled. size: width, height."""
    rng = np.random.default_rng(seed)
    coarse = [rng.integers(0, 256, (4, 4, 3), dtype=np.uint8) for _ in range(count)]
    return [Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST) for pixels in coarse]


def make_prompted(concept: Concept, cells: list[tuple[str, str, tuple[str, ...]]]) -> PromptedImages:
    """One image per (group, prompt, expected words)."""
    groups = np.array([group for group, _, _ in cells], dtype=str)
    prompts = tuple(Prompt(text, words) for _, text, words in cells)
    return PromptedImages(concept, groups, prompts, np.arange(len(cells)))


def by_metric(counted: list[ImageValues]) -> dict[str, list[float | None]]:
    """Metric -> its values, None for images it is not defined on."""
    assert len({c.metric for c in counted}) == len(counted)
    return {c.metric: [None if np.isnan(v) else float(v) for v in c.values] for c in counted}


def build_clip(folder: Path) -> str:
    """Register a tiny architecture with open_clip; returns its name."""
    import open_clip

    settings = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    (folder / "tiny-clip.json").write_text(json.dumps(settings))
    open_clip.add_model_config(folder)
    return "tiny-clip"
