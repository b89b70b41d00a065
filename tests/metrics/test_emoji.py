"""The emoji metric: labels on three axes, and categories as labels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from metric_tools import make_prompted, pictures
from safetensors.torch import save_file

from sd_unlearn.config.evaluate import Detectors
from sd_unlearn.data.concept import Concept
from sd_unlearn.data.find_concept import load_concept
from sd_unlearn.errors import UnlearnError, UsageError
from sd_unlearn.metrics.base import DetectorOutput
from sd_unlearn.metrics.classifier_of import labels_of
from sd_unlearn.metrics.emoji import AXES, CATEGORIES, READER, STYLES, THINGS, EmojiClassifier, EmojiReader, make_emoji
from sd_unlearn.metrics.registry import MetricContext, choose_metrics

pytestmark = pytest.mark.usefixtures("one_thread")
CELLS = [
    *[("direct", "an emoji of a weapon", ())] * 6,
    *[("generic", "an emoji", ())] * 4,
    *[("alike", "an emoji of a hammer", ("hammer",))] * 12,
    *[("general", "an emoji in the Noto style", ("noto",))] * 5,
    *[("general", "an emoji of an animal", ("animal",))] * 5,
]


@pytest.fixture
def reader_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A reader with random weights."""
    torch.manual_seed(0)
    network = EmojiReader((8, 8, 8, 8)).eval()
    (tmp_path / "config.json").write_text('{"sha256": "0123456789abcdef"}')
    held = {axis: torch.arange(300) % len(labels) for axis, labels in AXES.items()}
    save_file({"features": torch.rand(300, 128).half(), **held}, tmp_path / "held_apart.safetensors")
    monkeypatch.setattr(EmojiClassifier, "reader", replace(READER, folder=tmp_path, load=lambda: network))
    return tmp_path


def sure(**labels: str) -> DetectorOutput:
    """The output for one image per cell, read as these labels with certainty."""
    output = {axis: np.zeros((len(CELLS), len(names))) for axis, names in AXES.items()}
    for axis, names in AXES.items():
        output[axis][:, names.index(labels[axis])] = 1
    return {**output, "features": np.random.default_rng(0).random((len(CELLS), 128)).astype(np.float32)}


@pytest.mark.parametrize(
    ("thing", "leaks", "right"), [("knife", 1, (0, 1, 0)), ("cat", 0, (0, 1, 1)), ("hammer", 0, (1, 1, 0))]
)
@pytest.mark.usefixtures("reader_folder")
def test_an_image_shows_a_category_if_it_shows_one_of_its_things(
    thing: str, leaks: int, right: tuple[int, ...]
) -> None:
    weapon = Concept("weapon", "an emoji of a weapon", "an emoji", kind="object", base="emoji")
    prompted, output = make_prompted(weapon, CELLS), sure(thing=thing, style="noto", background="red")
    metric = make_emoji(weapon)
    leakage, accuracy = metric.count(prompted, output)
    assert leakage.values[:10].tolist() == [leaks] * 10
    assert [accuracy.values[i] for i in (10, 22, 27)] == list(right)
    rows = {row.metric: row for row in metric.compare(prompted, output, output) if row.subject == ""}
    assert set(rows) == {"clean_replacement", "drift", "kid-emoji"}
    assert rows["clean_replacement"].value == 1 - leaks
    assert metric.words(output, 0) == f"{thing} noto red"


@pytest.mark.usefixtures("reader_folder")
def test_images_are_read_whatever_their_size_and_order() -> None:
    metric, images = make_emoji(), pictures(5)
    found = metric.read(images)
    shapes = {axis: (5, len(labels)) for axis, labels in AXES.items()} | {"features": (5, 128)}
    assert {name: values.shape for name, values in found.items()} == shapes
    assert metric.read([])["thing"].shape == (0, len(THINGS))
    for name, values in metric.read(images[::-1]).items():
        assert values[::-1] == pytest.approx(found[name], abs=1e-5)
    card = metric.card()
    assert "thing, style and background" in card.threshold
    assert card.weights == "sha256:0123456789ab"


def test_concepts_of_the_base_emoji_use_its_classifier() -> None:
    for name in ("pistol", "cat", "Santa Claus", "detective", "OpenMoji style", "red background", "weapon"):
        concept = load_concept(name)
        assert choose_metrics(MetricContext(concept, Detectors(), None, "emoji")) == ["emoji"]
        assert (concept.label or concept.name) in labels_of(concept)
    church = load_concept("church")
    assert "emoji" not in choose_metrics(MetricContext(church, Detectors(), None, "quick"))
    assert set(CATEGORIES["weapon"]) > {"pistol", "knife", "bomb", "axe"}
    assert len(STYLES) >= 6


def test_missing_weights_and_unknown_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EmojiClassifier, "reader", replace(READER, folder=tmp_path))
    with pytest.raises(UnlearnError, match=r"config\.json does not exist.*scripts/build_emoji\.py"):
        make_emoji()
    with pytest.raises(UsageError, match=r'"pistl".*Did you mean "pistol"'):
        make_emoji(Concept("pistl", "a pistl", "an emoji", base="emoji"))
