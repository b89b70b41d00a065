"""Every figure against a value known otherwise, and against what it must not depend on."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from metric_tools import build_clip
from PIL import Image

from sd_unlearn.data.concept import Concept, Prompt
from sd_unlearn.errors import UnlearnError, UsageError
from sd_unlearn.metrics.base import Shots
from sd_unlearn.metrics.clip import ClipJudge, zero_shot
from sd_unlearn.metrics.drift import feature_drift
from sd_unlearn.metrics.fidelity import frechet_distance
from sd_unlearn.metrics.labels import Reading, count_read
from sd_unlearn.metrics.statistics import bootstrap, ratio_of_means, wilson

pytestmark = pytest.mark.usefixtures("one_thread")
RNG = np.random.default_rng(0)


# -- intervals --


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [
        (0, 10, 0.0, 0.27753),  # z^2 / (n + z^2)
        (10, 10, 0.72247, 1.0),
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_against_known_values(hits: int, n: int, low: float, high: float) -> None:
    assert wilson(hits, n) == pytest.approx((low, high), abs=6e-5)


def test_wilson_in_general() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    for n in (1, 7, 200):
        for hits in range(n + 1):
            low, high = wilson(hits, n)
            assert 0 <= low <= hits / n + 1e-12
            assert hits / n - 1e-12 <= high <= 1
            assert wilson(n - hits, n) == pytest.approx((1 - high, 1 - low))
    assert np.ptp(wilson(100, 200)) > np.ptp(wilson(1000, 2000))


def test_bootstrap_of_a_mean_is_the_normal_interval() -> None:
    sample = RNG.normal(3, 2, 400)
    half = 1.96 * sample.std() / 20
    assert bootstrap(np.mean, sample) == pytest.approx((sample.mean() - half, sample.mean() + half), abs=0.03)
    assert bootstrap(np.mean, sample) == bootstrap(np.mean, sample)
    assert bootstrap(np.mean, np.full(9, 0.5)) == (0.5, 0.5)


def test_pairing_matters() -> None:
    a = RNG.random(300) + 1
    paired = bootstrap(ratio_of_means, 2 * a, a)
    assert paired == pytest.approx((2, 2))
    low, high = bootstrap(ratio_of_means, 2 * a, a, paired=False)
    assert low < 1.95 < 2.05 < high


def test_ratio_over_nothing_is_no_number() -> None:
    assert math.isnan(ratio_of_means(np.ones(3), np.zeros(3)))
    assert ratio_of_means(np.array([1, 2]), np.array([3, 3])) == 0.5


# -- distances --


def test_frechet_identity_symmetry_and_order() -> None:
    a, b = RNG.normal(size=(200, 8)), RNG.normal(1, 2, size=(150, 8))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(a, RNG.permutation(a)) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert frechet_distance(a, a + 0.1) < frechet_distance(a, a + 0.2)


def test_frechet_of_two_gaussians() -> None:
    """Axis by axis (mu_a - mu_b)^2 + (sigma_a - sigma_b)^2; the sample moments are made exact."""
    unit = RNG.normal(size=(500, 2))
    unit -= unit.mean(0)
    unit = unit @ np.linalg.inv(np.linalg.cholesky(np.cov(unit, rowvar=False))).T
    a, b = unit * [1.0, 3.0], unit * [2.0, 0.5] + [4.0, -1.0]
    assert frechet_distance(a, b) == pytest.approx(16 + 1 + 1 + 2.5**2)
    turn = np.array([[0.6, -0.8], [0.8, 0.6]])
    assert frechet_distance(a @ turn, b @ turn) == pytest.approx(16 + 1 + 1 + 2.5**2)
    flat_a, flat_b = unit * [1.0, 0.0], unit * [3.0, 0.0] + [2.0, 0.0]  # a feature that is never active
    assert frechet_distance(flat_a, flat_b) == pytest.approx(4 + 4)


def test_frechet_against_torch_fidelitys_formula() -> None:
    linalg = pytest.importorskip("scipy.linalg")
    a, b = RNG.normal(size=(300, 6)) @ RNG.normal(size=(6, 6)), RNG.normal(1, 1, size=(200, 6))
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = linalg.sqrtm(cov_a @ cov_b).real
    want = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(want, rel=1e-8)


def test_drift() -> None:
    a, b = RNG.normal(size=(20, 5)), RNG.normal(size=(20, 5))
    assert feature_drift(a, a) == pytest.approx(np.zeros(20), abs=1e-12)
    assert (feature_drift(a, a) >= 0).all()
    assert feature_drift(a, b) == pytest.approx(feature_drift(b, a))
    assert feature_drift(a, 7 * a) == pytest.approx(np.zeros(20), abs=1e-12)
    corners = np.array([[1.0, 0], [1, 0], [1, 0], [0, 0], [0, 0]])
    others = np.array([[0.0, 1], [-1, 0], [1, 1], [0, 0], [1, 0]])
    assert feature_drift(corners, others) == pytest.approx([1, 2, 1 - 0.5**0.5, 0, 1])
    assert feature_drift(a, b)[3:4] == pytest.approx(feature_drift(a[3:4], b[3:4]))


# -- zero-shot CLIP --


def test_zero_shot_closed_form() -> None:
    images, texts = np.array([[3.0, 0], [0, 0.1], [2, 2]]), np.array([[1.0, 0], [0, 5]])
    got = zero_shot(images, texts, math.log(4))  # cosines 1 and 0: 4 to 1
    assert got == pytest.approx(np.array([[0.8, 0.2], [0.2, 0.8], [0.5, 0.5]]))
    assert zero_shot(images, texts, 0.0) == pytest.approx(np.full((3, 2), 0.5))
    assert zero_shot(images, texts, 1e4)[0] == pytest.approx([1, 0])  # and no overflow
    assert zero_shot(RNG.normal(size=(9, 4)), RNG.normal(size=(5, 4)), 100.0).sum(1) == pytest.approx(np.ones(9))


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A CLIP of random weights that open_clip builds from a file."""
    pytest.importorskip("open_clip")
    return build_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def judge(tiny_clip: str) -> ClipJudge:
    import torch

    torch.manual_seed(0)
    return ClipJudge(["Brad Pitt", "a dog", "🙂"], tiny_clip, "")


def pictures(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(1)
    return [Image.fromarray(rng.integers(0, 256, (24, 40, 3), dtype=np.uint8)) for _ in range(count)]


def test_clip_reads_pictures_end_to_end(judge: ClipJudge) -> None:
    reading = judge.read([*pictures(4), Image.new("L", (9, 9)), Image.new("RGBA", (64, 64))])
    assert reading.axes == {"label": ("Brad Pitt", "a dog", "🙂")}
    assert reading.probabilities["label"].shape == (6, 3)
    assert reading.probabilities["label"].sum(1) == pytest.approx(np.ones(6))
    assert reading.features.shape == (6, 16)
    assert sum(reading.shows(label) for label in judge.labels).tolist() == [1] * 6
    assert reading.words(2) in judge.labels
    assert "tiny-clip" in judge.name


def test_clip_reads_a_picture_the_same_in_any_company(judge: ClipJudge) -> None:
    many = pictures(40)  # more than one chunk
    together = judge.read(many)
    for i in (0, 31, 32, 39):
        alone = judge.read([many[i]])
        assert together.features[i] == pytest.approx(alone.features[0], rel=1e-4, abs=1e-5)
        assert together.probabilities["label"][i] == pytest.approx(alone.probabilities["label"][0], abs=1e-4)
    assert np.ptp(together.features, axis=0).max() > 1e-3  # or nothing was shown


def test_clip_loads_weights_from_a_file(judge: ClipJudge, tiny_clip: str, tmp_path: Path) -> None:
    import torch

    torch.save(judge.encoder.model.state_dict(), tmp_path / "weights.pt")
    again = ClipJudge(judge.labels, tiny_clip, str(tmp_path / "weights.pt"))
    assert again.read(pictures(3)).features == pytest.approx(judge.read(pictures(3)).features, abs=1e-6)
    assert "weights.pt" in again.name


def test_clip_refusals(tiny_clip: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="alternatives"):
        ClipJudge(["alone"], tiny_clip, "")
    with pytest.raises(UnlearnError, match="--clip_model no-such-model"):
        ClipJudge(["a", "b"], "no-such-model", "")
    (tmp_path / "broken.pt").write_bytes(b"not weights")
    for weights in (str(tmp_path / "broken.pt"), "no-such-tag"):
        with pytest.raises(UnlearnError, match=f"--clip_pretrained {weights}") as caught:
            ClipJudge(["a", "b"], tiny_clip, weights)
        assert "\n" not in str(caught.value)


# -- what a reader of labels counts --

LABELS = ("Brad Pitt", "Tom Hanks", "a dog")
CELLS = [
    *[("direct", ())] * 4,
    *[("generic", ())] * 2,
    *[("alike", ("Tom Hanks",))] * 2,
    ("general", ("a dog",)),
    ("general", ()),
    ("general", ("a cat",)),
]
WORDS = ["Brad Pitt"] + ["a dog"] * 5 + ["Tom Hanks", "a dog", "a dog", "Brad Pitt", "a dog"]


def test_labels_are_counted_where_they_are_asked_about() -> None:
    person = Concept("Brad Pitt", "a photo of Brad Pitt", "a photo of a man", kind="person")
    prompts = tuple(Prompt(group, words) for group, words in CELLS)
    shots = Shots(person, np.array([group for group, _ in CELLS]), prompts, np.zeros(len(CELLS), dtype=int))
    probabilities = np.array([[0.8 if label == word else 0.1 for label in LABELS] for word in WORDS])
    reading = Reading({"label": LABELS}, {"label": probabilities}, np.eye(len(WORDS)))
    leakage, accuracy = count_read(shots, "Brad Pitt", reading.knows, reading.shows)
    unasked = [np.nan] * 5
    assert leakage.metric == "leakage"
    np.testing.assert_array_equal(leakage.values, [1, 0, 0, 0, 0, 0, *unasked])
    # What expects nothing, or a word that is no label, is in no denominator.
    np.testing.assert_array_equal(accuracy.values, [*[np.nan] * 6, 1, 0, 1, np.nan, np.nan])
