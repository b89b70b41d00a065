"""CLIP as a question: what is counted of a reading, and readings end to end with random weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from metric_tools import build_clip, by_metric, make_shots, pictures

from sd_unlearn.data.concept import Concept
from sd_unlearn.errors import UsageError
from sd_unlearn.metrics.clip import ClipQuestion, clip_scores, make_clip
from sd_unlearn.metrics.labels import count_read
from sd_unlearn.metrics.statistics import bootstrap

pytestmark = pytest.mark.usefixtures("one_thread")
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
def question(tiny_clip: str) -> ClipQuestion:
    import torch

    torch.manual_seed(0)
    return make_clip(PERSON, tiny_clip, "")


def given(places: dict[str, list[float]], asked: list[str] | None = None) -> ClipQuestion:
    """A question whose texts lie where the test says; it keeps what it was asked for."""

    def texts(words: list[str]) -> np.ndarray:
        if asked is not None:
            asked.extend(words)
        return np.array([places[word] for word in words])

    encoder = SimpleNamespace(detector="a CLIP", texts=texts, weights="none")
    return ClipQuestion(cast(Any, SimpleNamespace(labels=LABELS, encoder=encoder, text=np.zeros((3, 2)))))


def columns(words: list[str], features: np.ndarray) -> dict[str, np.ndarray]:
    return {"label": np.array([[0.8 if label == w else 0.1 for label in LABELS] for w in words]), "features": features}


def test_what_is_counted() -> None:
    shots = make_shots(PERSON, CELLS)
    directions = {"up": [0, 2.0], "right": [3.0, 0], "down": [0, -1.0]}
    features = np.array([[0, 1.0], [0, 1], [1, 1], [0, 1], [1, 0], [1, 0], [-1, 1], [0, 9], [4, 3]])
    asked: list[str] = []
    counted = given(directions, asked).count(shots, columns(READ, features))
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


def test_nothing_is_counted_that_was_not_asked() -> None:
    counted = given({"up": [0, 1.0]}).count(
        make_shots(PERSON, [("general", "up", ())]), columns(["a dog"], np.ones((1, 2)))
    )
    assert set(by_metric(counted)) == {"clip_score"}
    assert count_read(make_shots(PERSON, []), "x", lambda _: True, lambda _: np.zeros(0, bool)) == []


def test_a_prompt_is_judged_only_if_all_its_words_are_labels() -> None:
    cells = [("general", "up", ("a dog", "a cat")), ("general", "up", ("a dog", "Tom Hanks"))]
    counted = count_read(make_shots(PERSON, cells), "x", LABELS.__contains__, lambda word: np.full(2, word == "a dog"))
    assert by_metric(counted) == {"accuracy": [None, 0]}


def test_clip_scores() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(50, 7)).astype(np.float32), rng.normal(size=(50, 7)).astype(np.float32)
    assert clip_scores(a, 3 * a) == pytest.approx(np.full(50, 100.0))
    assert clip_scores(a, -a).tolist() == [0] * 50
    assert clip_scores(a, b) == pytest.approx(clip_scores(b, a))
    assert clip_scores(a, b)[7:8] == pytest.approx(clip_scores(a[7:8], b[7:8]))


def test_pictures_end_to_end(question: ClipQuestion) -> None:
    shots, images = make_shots(PERSON, CELLS), pictures(len(CELLS))
    found = question.read(images)
    assert found["label"].shape == (9, 3)
    assert found["label"].sum(1) == pytest.approx(np.ones(9), abs=1e-5)
    assert found["features"].shape == (9, 16)
    values = by_metric(question.count(shots, found))
    texts = question.encoder.texts([prompt.text for prompt in shots.prompts])
    assert values["clip_score"] == pytest.approx(clip_scores(found["features"], texts).tolist(), abs=1e-4)
    assert question.words(found, 2) == LABELS[found["label"][2].argmax()]
    backwards = question.read(images[::-1])
    for key, values_of in found.items():
        assert backwards[key][::-1] == pytest.approx(values_of, abs=1e-5)
        assert question.read(images[3:4])[key] == pytest.approx(values_of[3:4], abs=1e-5)
        assert question.read([])[key].shape == (0, *values_of.shape[1:])


def test_drift_of_what_must_stay(question: ClipQuestion) -> None:
    shots = make_shots(PERSON, CELLS)
    base, other = question.read(pictures(9)), question.read(pictures(9, seed=2))
    (row,) = question.compare(shots, base, base)
    assert (row.metric, row.group, row.subject, row.n, row.detector) == ("drift", "kept", "", 5, question.name)
    assert row.value == pytest.approx(0, abs=1e-6)
    (moved,) = question.compare(shots, base, other)
    a, b = (c["features"][4:].astype(float) for c in (base, other))
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert moved.value == pytest.approx(np.mean(1 - cosine), rel=1e-4)
    assert (moved.low, moved.high) == pytest.approx(bootstrap(np.mean, 1 - cosine), rel=1e-3)


def test_the_name_says_all_that_changes_a_reading(question: ClipQuestion, tiny_clip: str, tmp_path: Path) -> None:
    import torch

    torch.save(question.encoder.model.state_dict(), tmp_path / "one.pt")
    shutil.copyfile(tmp_path / "one.pt", tmp_path / "two.pt")
    local = make_clip(PERSON, tiny_clip, str(tmp_path / "one.pt"))
    assert local.name == make_clip(PERSON, tiny_clip, str(tmp_path / "two.pt")).name
    assert "sha256:" in local.name
    assert str(tmp_path) not in local.name
    assert local.read(pictures(2))["label"] == pytest.approx(question.read(pictures(2))["label"], abs=1e-6)
    state = question.encoder.model.state_dict() | {"logit_scale": torch.tensor(0.5)}
    torch.save(state, tmp_path / "two.pt")
    assert local.name != make_clip(PERSON, tiny_clip, str(tmp_path / "two.pt")).name
    fewer = Concept("Brad Pitt", "a", "b", alternatives=["a dog"])
    assert make_clip(fewer, tiny_clip, "").name != question.name
    card = question.card()
    assert (card.detector, card.extra["labels"]) == (question.name, "Brad Pitt, Tom Hanks, a dog")
    assert "tiny-clip" in question.name


def test_alternatives_are_needed() -> None:
    with pytest.raises(UsageError, match="alternatives"):
        make_clip(Concept("Brad Pitt", "a", "b"), "no-such-model", "")  # refused before a model is looked for
