"""Which embeddings an estimate of beta goes by, and of which images."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sd_unlearn.data import embeddings
from sd_unlearn.data.dataset import Example
from sd_unlearn.data.embeddings import Embedder
from sd_unlearn.models import clip
from sd_unlearn.models.base import Base

GROUPS = ("generic", "positive", "keep", "mixed_in", "positive", "keep")


@pytest.fixture
def examples(photos: Callable[..., Path]) -> list[Example]:
    images = sorted(photos(4, 2).rglob("*.png"))
    return [Example(path, "a caption", group) for path, group in zip(images, GROUPS, strict=True)]


LATENTS = torch.arange(6.0)[:, None, None, None].expand(6, 4, 8, 8)


def test_small_bases_use_latents_without_keep_images(
    loaded_base: Base, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embeddings, "ClipEncoder", lambda *_: pytest.fail("no CLIP for 32 pixels"))
    found = Embedder(loaded_base, LATENTS).embed(examples)
    assert found.positive.shape == found.unlabeled.shape == (2, 4 * 8 * 8)
    assert found.positive[:, 0].tolist() == [1, 4]
    assert found.unlabeled[:, 0].tolist() == [0, 3]
    assert "VAE latents" in found.why
    assert "32 pixels" in found.why


def test_large_latents_are_averaged_down(loaded_base: Base, examples: list[Example]) -> None:
    latents = torch.randn(6, 4, 64, 32)
    rows = Embedder(loaded_base, latents).embed(examples).positive
    assert rows.shape == (2, 4 * 16 * 16)
    assert rows[0, 0] == pytest.approx(latents[1, 0, :4, :2].mean().item(), abs=1e-6)


@pytest.mark.parametrize("why", ["not installed", "no weights"])
def test_reason_is_given_without_clip(
    loaded_base: Base, examples: list[Example], monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    monkeypatch.setattr(embeddings, "MIN_CLIP_PIXELS", 16)
    if why == "not installed":
        monkeypatch.setattr(embeddings, "find_spec", lambda _: None)
        expected = "pip install -e '.[clip]'"
    else:
        pytest.importorskip("open_clip")
        monkeypatch.setattr(embeddings, "CLIP_MODEL", "no-such-model")
        expected = "could not be loaded"
    found = Embedder(loaded_base, LATENTS).embed(examples)
    assert expected in found.why
    assert "VAE latents" in found.name


def test_by_clip(loaded_base: Base, examples: list[Example], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    open_clip = pytest.importorskip("open_clip")
    settings = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    (tmp_path / "tiny-clip-for-beta.json").write_text(json.dumps(settings))
    open_clip.add_model_config(tmp_path / "tiny-clip-for-beta.json")
    monkeypatch.setattr(embeddings, "MIN_CLIP_PIXELS", 16)
    monkeypatch.setattr(clip, "BATCH_SIZE", 3)  # so that four images are two batches
    monkeypatch.setattr(embeddings, "CLIP_MODEL", "tiny-clip-for-beta")
    monkeypatch.setattr(embeddings, "CLIP_PRETRAINED", "")
    found = Embedder(loaded_base, LATENTS).embed(examples)
    assert "open_clip tiny-clip-for-beta" in found.why
    assert found.positive.shape == found.unlabeled.shape == (2, 16)
    assert len(np.unique(np.concatenate([found.positive, found.unlabeled]), axis=0)) == 4  # the pictures were seen


def test_several_concepts_share_clip_and_what_it_encoded(
    loaded_base: Base, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, encoded = list[object](), list[Path]()

    class Clip:
        name = "CLIP"

        def __init__(self, *arguments: object) -> None:
            made.append(arguments)

        def images(self, images: Iterable[Path]) -> np.ndarray:
            paths = list(images)
            encoded.extend(paths)
            return np.array([[float(path.stem), float("positive" in str(path))] for path in paths])

    monkeypatch.setattr(embeddings, "MIN_CLIP_PIXELS", 16)
    monkeypatch.setattr(embeddings, "find_spec", lambda _: True)
    monkeypatch.setattr(embeddings, "ClipEncoder", Clip)
    monkeypatch.setattr(embeddings, "open_image", lambda path: path)
    embedder = Embedder(loaded_base, LATENTS)
    first = embedder.embed(examples)
    other = embedder.embed([replace(e, group="positive" if e.group == "keep" else e.group) for e in examples])
    assert len(made) == 1
    assert len(encoded) == len(set(encoded)) == len(examples)
    for found, groups in ((first, ["positive"]), (other, ["positive", "keep"])):
        chosen = [e.path for e in examples if e.group in groups]
        assert found.positive.tolist() == [[float(p.stem), float("positive" in str(p))] for p in chosen]
    assert first.unlabeled.tolist() == other.unlabeled.tolist()
