"""Where the images of an evaluation are cached."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sd_unlearn.evaluation.generate import ImageCache
from sd_unlearn.models.sampling import Sampler


def folder(name: str, **record: Any) -> str:
    base = {"name": name, "sha256": "ab", "vae_sha256": "cd", "text_encoder_sha256": "ef", **record}
    return str(ImageCache(Path("cache"), base, Sampler(25, 3.0, 4)).base_folder)


@pytest.mark.parametrize("name", ["models/theirs.safetensors", "models/theirs.CKPT"])
def test_images_of_another_prediction_type_are_not_reused(name: str) -> None:
    """--prediction_type says what a single file predicts; its weights, and so their hash, stay the same."""
    wrong, right = (folder(name, prediction_type=predicted) for predicted in ("epsilon", "v_prediction"))
    assert wrong != right
    assert folder(name) == wrong  # as folders were called before


def test_the_configuration_of_other_bases_says_what_they_predict() -> None:
    assert len({folder("owner/sd2", prediction_type=predicted) for predicted in ("epsilon", "v_prediction")}) == 1
