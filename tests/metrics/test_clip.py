"""CLIP as a metric: what is counted of a reading, and readings end to end with random weights."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from metric_tools import build_clip, by_metric, make_prompted, pictures
from PIL import Image

from sd_unlearn.data.concept import Concept
from sd_unlearn.errors import UnlearnError, UsageError
from sd_unlearn.metrics.clip import ClipClassifier, ClipMetric, clip_scores, make_clip, zero_shot
from sd_unlearn.metrics.labels import leakage_and_accuracy
from sd_unlearn.metrics.statistics import bootstrap

pytestmark = pytest.mark.usefixtures("one_thread")
RNG = np.random.default_rng(0)
PERSON = Concept(
    "Brad Pitt", "a photo of Brad Pitt", "a photo of a man", kind="person", alternatives=["Tom Hanks", "a dog"]
)
LABELS = ("Brad Pitt", "Tom Hanks", "a dog")
CELLS: list[tuple[str, str, tuple[str, ...]]] = [
    ("direct", "up", ()),
    ("direct", "right", ()),
    ("held_out", "up", ()),
    ("generic", "down", ()),
    ("alike", "right", ("Tom Hanks",)),
    ("alike", "right", ("Tom Hanks",)),
    ("general", "up", ("a dog",)),
    ("general", "up", ()),
    ("general", "up", ("a cat",)),
]
READ = ["Brad Pitt", "a dog", "Brad Pitt", "Tom Hanks", "Tom Hanks", "a dog", "a dog", "Brad Pitt", "a dog"]


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    pytest.importorskip("open_clip")
    return build_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def metric(tiny_clip: str) -> ClipMetric:
    import torch

    torch.manual_seed(0)
    return make_clip(PERSON, tiny_clip, "")


def given(places: dict[str, list[float]], asked: list[str] | None = None) -> ClipMetric:
    """A metric with given text embeddings; it records the texts that were embedded."""

    def texts(words: list[str]) -> np.ndarray:
        if asked is not None:
            asked.extend(words)
        return np.array([places[word] for word in words])

    encoder = SimpleNamespace(detector="a CLIP", texts=texts, weights="none")
    return ClipMetric(cast(Any, SimpleNamespace(labels=LABELS, encoder=encoder, text=np.zeros((3, 2)))))


def output(words: list[str], features: np.ndarray) -> dict[str, np.ndarray]:
    return {"label": np.array([[0.8 if label == w else 0.1 for label in LABELS] for w in words]), "features": features}


def test_values_per_image() -> None:
    prompted = make_prompted(PERSON, CELLS)
    directions = {"up": [0, 2.0], "right": [3.0, 0], "down": [0, -1.0]}
    features = np.array([[0, 1.0], [0, 1], [1, 1], [0, 1], [1, 0], [1, 0], [-1, 1], [0, 9], [4, 3]])
    asked: list[str] = []
    counted = given(directions, asked).count(prompted, output(READ, features))
    values = by_metric(counted)
    assert values["leakage"] == [1, 0, 1, 0, None, None, None, None, None]
    assert values["accuracy"] == [None, None, None, None, 1, 0, 1, None, None]  # "a cat" is no label
    half = 100 * 0.5**0.5
    assert values["clip_score"] == pytest.approx([100, 0, half, 0, 100, 100, half, 100, 60])  # down against up: 0
    assert {c.metric: c.is_rate for c in counted} == {"leakage": True, "accuracy": True, "clip_score": False}
    assert {c.metric: c.groups for c in counted} == {
        "leakage": ("direct", "held_out", "generic"),
        "accuracy": ("alike", "general"),
        "clip_score": ("direct", "held_out", "generic", "alike", "general"),
    }
    assert sorted(asked) == ["down", "right", "up"]  # each text is embedded once


def test_an_unknown_prompt_has_no_clip_score() -> None:
    cells = [("direct", "up", ()), ("direct", "", ())]
    counted = given({"up": [0, 1.0]}).count(make_prompted(PERSON, cells), output(["a dog"] * 2, np.ones((2, 2))))
    assert by_metric(counted)["clip_score"] == [pytest.approx(100 * 0.5**0.5), None]
    nothing = given({}).count(make_prompted(PERSON, cells[1:]), output(["a dog"], np.ones((1, 2))))
    assert "clip_score" not in by_metric(nothing)


def test_metrics_without_images_are_left_out() -> None:
    counted = given({"up": [0, 1.0]}).count(
        make_prompted(PERSON, [("general", "up", ())]), output(["a dog"], np.ones((1, 2)))
    )
    assert set(by_metric(counted)) == {"clip_score"}
    assert leakage_and_accuracy(make_prompted(PERSON, []), "x", lambda _: True, lambda _: np.zeros(0, bool)) == []


def test_accuracy_needs_labels_for_all_expected_words() -> None:
    cells = [("general", "up", ("a dog", "a cat")), ("general", "up", ("a dog", "Tom Hanks"))]
    counted = leakage_and_accuracy(
        make_prompted(PERSON, cells), "x", LABELS.__contains__, lambda word: np.full(2, word == "a dog")
    )
    assert by_metric(counted) == {"accuracy": [None, 0]}


def test_clip_scores() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(50, 7)).astype(np.float32), rng.normal(size=(50, 7)).astype(np.float32)
    assert clip_scores(a, 3 * a) == pytest.approx(np.full(50, 100.0))
    assert clip_scores(a, -a).tolist() == [0] * 50
    assert clip_scores(a, b) == pytest.approx(clip_scores(b, a))
    assert clip_scores(a, b)[7:8] == pytest.approx(clip_scores(a[7:8], b[7:8]))


def test_images_end_to_end(metric: ClipMetric) -> None:
    prompted, images = make_prompted(PERSON, CELLS), pictures(len(CELLS))
    found = metric.read(images)
    assert found["label"].shape == (9, 3)
    assert found["label"].sum(1) == pytest.approx(np.ones(9), abs=1e-5)
    assert found["features"].shape == (9, 16)
    values = by_metric(metric.count(prompted, found))
    texts = metric.encoder.texts([prompt.text for prompt in prompted.prompts])
    assert values["clip_score"] == pytest.approx(clip_scores(found["features"], texts).tolist(), abs=1e-4)
    assert metric.words(found, 2) == LABELS[found["label"][2].argmax()]
    backwards = metric.read(images[::-1])
    for key, values_of in found.items():
        assert backwards[key][::-1] == pytest.approx(values_of, abs=1e-5)
        assert metric.read(images[3:4])[key] == pytest.approx(values_of[3:4], abs=1e-5)
        assert metric.read([])[key].shape == (0, *values_of.shape[1:])


def test_drift_on_keep_prompts(metric: ClipMetric) -> None:
    prompted = make_prompted(PERSON, CELLS)
    base, other = metric.read(pictures(9)), metric.read(pictures(9, seed=2))
    (row,) = metric.compare(prompted, base, base)
    assert (row.metric, row.group, row.subject, row.n, row.detector) == ("drift", "kept", "", 5, metric.name)
    assert row.value == pytest.approx(0, abs=1e-6)
    (moved,) = metric.compare(prompted, base, other)
    a, b = (c["features"][4:].astype(float) for c in (base, other))
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert moved.value == pytest.approx(np.mean(1 - cosine), rel=1e-4)
    assert (moved.low, moved.high) == pytest.approx(bootstrap(np.mean, 1 - cosine), rel=1e-3)


def test_name_contains_everything_that_changes_the_output(metric: ClipMetric, tiny_clip: str, tmp_path: Path) -> None:
    import torch

    torch.save(metric.encoder.model.state_dict(), tmp_path / "one.pt")
    shutil.copyfile(tmp_path / "one.pt", tmp_path / "two.pt")
    local = make_clip(PERSON, tiny_clip, str(tmp_path / "one.pt"))
    assert local.name == make_clip(PERSON, tiny_clip, str(tmp_path / "two.pt")).name
    assert "sha256:" in local.name
    assert str(tmp_path) not in local.name
    assert local.read(pictures(2))["label"] == pytest.approx(metric.read(pictures(2))["label"], abs=1e-6)
    state = metric.encoder.model.state_dict() | {"logit_scale": torch.tensor(0.5)}
    torch.save(state, tmp_path / "two.pt")
    assert local.name != make_clip(PERSON, tiny_clip, str(tmp_path / "two.pt")).name
    fewer = Concept("Brad Pitt", "a", "b", alternatives=["a dog"])
    assert make_clip(fewer, tiny_clip, "").name != metric.name
    card = metric.card()
    assert (card.detector, card.extra["labels"]) == (metric.name, "Brad Pitt, Tom Hanks, a dog")
    assert "tiny-clip" in metric.name


def test_missing_alternatives_are_refused() -> None:
    with pytest.raises(UsageError, match="alternatives"):
        make_clip(Concept("Brad Pitt", "a", "b"), "no-such-model", "")  # refused before a model is looked for


# -- the zero-shot classifier --


def test_zero_shot_closed_form() -> None:
    images, texts = np.array([[3.0, 0], [0, 0.1], [2, 2]]), np.array([[1.0, 0], [0, 5]])
    got = zero_shot(images, texts, math.log(4))  # cosines 1 and 0: 4 to 1
    assert got == pytest.approx(np.array([[0.8, 0.2], [0.2, 0.8], [0.5, 0.5]]))
    assert zero_shot(images, texts, 0.0) == pytest.approx(np.full((3, 2), 0.5))
    assert zero_shot(images, texts, 1e4)[0] == pytest.approx([1, 0])  # and no overflow
    assert zero_shot(RNG.normal(size=(9, 4)), RNG.normal(size=(5, 4)), 100.0).sum(1) == pytest.approx(np.ones(9))


@pytest.fixture
def classifier(tiny_clip: str) -> ClipClassifier:
    import torch

    torch.manual_seed(0)
    return ClipClassifier(["Brad Pitt", "a dog", "🙂"], tiny_clip, "")


def test_clip_classifies_images_end_to_end(classifier: ClipClassifier) -> None:
    reading = classifier.read([*pictures(4), Image.new("L", (9, 9)), Image.new("RGBA", (64, 64))])
    assert reading.axes == {"label": ("Brad Pitt", "a dog", "🙂")}
    assert reading.probabilities["label"].shape == (6, 3)
    assert reading.probabilities["label"].sum(1) == pytest.approx(np.ones(6))
    assert reading.features.shape == (6, 16)
    assert sum(reading.shows(label) for label in classifier.labels).tolist() == [1] * 6
    assert reading.words(2) in classifier.labels
    assert "tiny-clip" in classifier.name


def test_clip_output_does_not_depend_on_batching(classifier: ClipClassifier) -> None:
    many = pictures(40)  # more than one chunk
    together = classifier.read(many)
    for i in (0, 31, 32, 39):
        alone = classifier.read([many[i]])
        assert together.features[i] == pytest.approx(alone.features[0], rel=1e-4, abs=1e-5)
        assert together.probabilities["label"][i] == pytest.approx(alone.probabilities["label"][0], abs=1e-4)
    assert np.ptp(together.features, axis=0).max() > 1e-3  # or nothing was shown


def test_clip_loads_weights_from_a_file(classifier: ClipClassifier, tiny_clip: str, tmp_path: Path) -> None:
    import torch

    torch.save(classifier.encoder.model.state_dict(), tmp_path / "weights.pt")
    again = ClipClassifier(classifier.labels, tiny_clip, str(tmp_path / "weights.pt"))
    assert again.read(pictures(3)).features == pytest.approx(classifier.read(pictures(3)).features, abs=1e-6)
    assert "weights.pt" in again.name


def test_invalid_clip_options_are_refused(tiny_clip: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="alternatives"):
        ClipClassifier(["alone"], tiny_clip, "")
    with pytest.raises(UnlearnError, match="--clip_model no-such-model"):
        ClipClassifier(["a", "b"], "no-such-model", "")
    (tmp_path / "broken.pt").write_bytes(b"not weights")
    for weights in (str(tmp_path / "broken.pt"), "no-such-tag"):
        with pytest.raises(UnlearnError, match=f"--clip_pretrained {weights}") as caught:
            ClipClassifier(["a", "b"], tiny_clip, weights)
        assert "\n" not in str(caught.value)
