"""FID, KID and CMMD as metrics: what is compared with what, and Inception's path with random weights."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from urllib.error import URLError

import numpy as np
import pytest
from metric_tools import build_clip, make_prompted, pictures
from PIL import Image

from sd_unlearn.data.concept import Concept
from sd_unlearn.errors import UnlearnError, UsageError
from sd_unlearn.metrics import fidelity
from sd_unlearn.metrics.base import DetectorOutput
from sd_unlearn.metrics.fidelity import Cmmd, InceptionFidelity, fid, make_cmmd, make_fidelity
from sd_unlearn.metrics.frechet import frechet_distance
from sd_unlearn.metrics.mmd import cmmd, kid
from sd_unlearn.results import Row

pytestmark = pytest.mark.usefixtures("one_thread")
RNG = np.random.default_rng(0)
CHURCH = Concept("church", "a church", "a building")
PROMPTED = make_prompted(CHURCH, [("direct", "", ())] * 5 + [("alike", "", ())] * 12 + [("general", "", ())] * 11)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network of torch-fidelity with random weights, as a file."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    import torch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        torch.manual_seed(0)
        network = module.FeatureExtractorInceptionV3("random", ["2048"])
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def inception(weights: Path) -> InceptionFidelity:
    return make_fidelity(weights)


def given(width: int = 6, real: Path | None = None) -> Cmmd:
    """CMMD on an encoder that returns an image's mean color, repeated `width / 3` times."""

    def images(shown: list[Image.Image]) -> np.ndarray:
        return np.stack([np.tile(np.asarray(image, float).mean((0, 1)), width // 3) for image in shown])

    encoder = SimpleNamespace(architecture="mean", detector="a mean", weights="none", images=images)
    return Cmmd(cast(Any, encoder), real)


def features(seed: int, width: int = 6, count: int = len(PROMPTED)) -> DetectorOutput:
    return {"features": np.random.default_rng(seed).normal(size=(count, width)) + 1}


def numbers(row: Row) -> tuple[float | None, float | None, float | None]:
    return row.value, row.low, row.high


# -- FID --


def test_fid_needs_2048_images() -> None:
    few, many = np.zeros((2047, 2)), RNG.normal(size=(2048, 2))
    with pytest.raises(UsageError, match=r"FID needs 2,048 images .* one has 2,047.*kid-inception"):
        fid(few, many)
    assert fid(many, many) == pytest.approx(0, abs=1e-9)
    assert fid(many.astype(np.float32), (many + [3, 4]).astype(np.float32)) == pytest.approx(25, rel=1e-5)


def test_fid_of_float32_features_is_computed_in_float64() -> None:
    a, b = RNG.normal(100, 1, size=(2048, 3)), RNG.normal(100, 1, size=(2048, 3))
    assert fid(a.astype(np.float32), b.astype(np.float32)) == pytest.approx(frechet_distance(a, b), rel=1e-3)


# -- sets against the base and against real images --


def test_keep_groups_are_compared_with_the_base() -> None:
    base, other = features(0), features(1)
    rows = given().compare(PROMPTED, base, other)
    assert [(r.metric, r.group, r.subject, r.n) for r in rows] == [
        ("cmmd-mean", "alike", "", 12),
        ("cmmd-mean", "general", "", 11),
        ("cmmd-mean", "kept", "", 23),
    ]
    for row, here in zip(rows, (slice(5, 17), slice(17, 28), slice(5, 28)), strict=True):
        want = cmmd(other["features"][here], base["features"][here], paired=True)
        assert numbers(row) == (want.value, want.low, want.high)
        assert (row.detector, row.interval) == ("a mean", "half-sampling")
        assert "the base's pictures of the same prompts" in row.note
    assert [numbers(r) for r in given().compare(PROMPTED, base, base)] == [(0, 0, 0)] * 3
    assert given().count(PROMPTED, base) == []
    assert given().words(base, 0) == ""


def test_too_few_images_have_no_value() -> None:
    prompted = make_prompted(CHURCH, [("alike", "", ())] * 9)
    rows = given().compare(prompted, features(0, count=9), features(1, count=9))
    assert [(r.metric, r.group, r.value, r.n) for r in rows] == [
        ("cmmd-mean", "alike", None, 9),
        ("cmmd-mean", "kept", None, 9),
    ]
    assert "9 pictures are fewer than 10" in rows[0].note


def test_against_real_images(tmp_path: Path) -> None:
    real = pictures(40, seed=5)
    for i, image in enumerate(real):
        image.save(tmp_path / f"{i:02}.png")
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    (tmp_path / "notes.txt").write_text("not an image by its name")
    metric = given(real=tmp_path)
    drawn = {"features": np.asarray(metric.read(pictures(len(PROMPTED), seed=6))["features"])}
    base = {"features": np.asarray(metric.read(pictures(len(PROMPTED), seed=7))["features"]) * [1, 1, 0, 1, 1, 0]}
    rows = {(r.metric, r.group, r.subject): r for r in metric.compare(PROMPTED, base, drawn)}
    assert len(rows) == 9
    want = cmmd(drawn["features"][5:17], metric.read(real)["features"])
    row = rows["cmmd-mean-real", "alike", ""]
    assert numbers(row) == pytest.approx((want.value, want.low, want.high))
    assert "against 40 real images" in row.note
    assert "1 could not be read: broken.jpg" in row.note
    worse, better = rows["cmmd-mean-real", "kept", "base"], rows["cmmd-mean-real", "kept", ""]
    assert worse.low is not None
    assert better.value is not None
    assert worse.low > better.value
    assert metric.card().metrics == ("cmmd-mean", "cmmd-mean-real")


def test_real_images_are_rotated_by_exif(tmp_path: Path) -> None:
    class Tall(Cmmd):
        sizes: list[tuple[int, int]] = []

        def read(self, images: Any) -> DetectorOutput:
            self.sizes += [image.size for image in images]
            return super().read(images)

    for i, image in enumerate(pictures(10, size=(40, 24))):
        exif = image.getexif()
        exif[0x0112] = 6  # rotate by 90 degrees
        image.save(tmp_path / f"{i}.png", exif=exif)
    metric = Tall(given().encoder, tmp_path)
    metric.compare(PROMPTED, features(0), features(1))
    assert metric.sizes == [(24, 40)] * 10


def test_invalid_real_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--real_images .*nowhere is not a folder"):
        given(real=tmp_path / "nowhere")
    with pytest.raises(UsageError, match="holds 0 images"):
        given(real=tmp_path)
    for i in range(12):
        (tmp_path / f"{i}.png").write_bytes(b"")
    with pytest.raises(UsageError, match="0 images can be read"):
        given(real=tmp_path).compare(PROMPTED, features(0), features(1))


# -- Inception --


def test_inception_output_does_not_depend_on_batching(inception: InceptionFidelity) -> None:
    images = [*pictures(2, size=(64, 48)), *pictures(1, seed=3, size=(32, 32))]
    found = inception.read(images)["features"]
    assert found.shape == (3, 2048)
    assert np.ptp(found, axis=0).max() > 0.01 * found.max() > 0
    assert inception.read(images[::-1])["features"][::-1] == pytest.approx(found, abs=1e-5)
    assert inception.read(images[1:2])["features"] == pytest.approx(found[1:2], abs=1e-5)


def test_note_explains_missing_fid(inception: InceptionFidelity) -> None:
    base, other = features(0, 2048), features(1, 2048)
    rows = inception.compare(PROMPTED, base, other)
    assert [r.metric for r in rows] == ["kid-inception"] * 3
    want = kid(other["features"][5:], base["features"][5:], paired=True)
    assert numbers(rows[2]) == (want.value, want.low, want.high)
    assert "FID needs 2,048 images in each set and one has 23" in rows[2].note
    assert (rows[2].detector, inception.card().detector) == (inception.name, inception.name)


def test_fid_is_reported_with_enough_images(inception: InceptionFidelity, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity, "FID_FEWEST", 20)
    base, other = features(0, 4), features(1, 4)
    rows = {(r.metric, r.group): r for r in inception.compare(PROMPTED, base, other)}
    assert set(rows) == {("kid-inception", g) for g in ("alike", "general", "kept")} | {("fid-inception", "kept")}
    found = rows["fid-inception", "kept"]
    assert numbers(found) == (pytest.approx(frechet_distance(other["features"][5:], base["features"][5:])), None, None)
    assert found.interval == "none"
    assert "no FID" not in rows["kid-inception", "kept"].note


def test_inception_name_contains_hash_of_weights(inception: InceptionFidelity, weights: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copyfile(weights, tmp_path / "elsewhere.pth")
    assert make_fidelity(tmp_path / "elsewhere.pth").name == inception.name
    (tmp_path / "elsewhere.pth").write_bytes(b"other weights")
    broken = make_fidelity(tmp_path / "elsewhere.pth")
    assert broken.name != inception.name
    with pytest.raises(UnlearnError, match="--inception_weights .*elsewhere.pth does not hold") as caught:
        broken.read(pictures(1))
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="--inception_weights nowhere.pth is not a file"):
        make_fidelity(Path("nowhere.pth"))


def test_code_in_a_weights_file_is_not_executed(tmp_path: Path) -> None:
    """A pickle can contain any call; this one would create a file."""
    import torch

    class Call:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "was here",))

    torch.save({"fc.bias": Call()}, tmp_path / "weights.pth")
    with pytest.raises(UnlearnError, match="does not hold"):
        make_fidelity(tmp_path / "weights.pth").read(pictures(1))
    assert not (tmp_path / "was here").exists()


def test_failed_download(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch

    def no_network(*_: Any, **__: Any) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(UnlearnError, match=r"https://.*inception.*no route to host.*--inception_weights FILE"):
        make_fidelity()
    place = tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    place.write_bytes(b"fetched before")
    assert make_fidelity().file == place


# -- CLIP --


def test_cmmd_end_to_end(tmp_path: Path) -> None:
    pytest.importorskip("open_clip")
    from sd_unlearn.models.clip import ClipEncoder

    metric = make_cmmd(ClipEncoder(build_clip(tmp_path), ""))
    base, other = metric.read(pictures(len(PROMPTED))), metric.read(pictures(len(PROMPTED), seed=2))
    assert base["features"].shape == (len(PROMPTED), 16)
    assert metric.read([])["features"].shape == (0, 16)
    rows = metric.compare(PROMPTED, base, other)
    assert {r.metric for r in rows} == {"cmmd-tiny-clip"}
    assert all(r.value != 0 and "tiny-clip" in r.detector for r in rows)
    assert all(r.value == 0 for r in metric.compare(PROMPTED, other, other))
