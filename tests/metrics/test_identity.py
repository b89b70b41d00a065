"""Identity on real faces (one person against a hundred others), and invariances."""

from __future__ import annotations

import hashlib
import json
import math
import urllib.error
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures_of_people import astronaut, prompted, save, strangers, versions
from PIL import Image, ImageOps

from sd_unlearn.errors import UnlearnError, UsageError
from sd_unlearn.metrics import faces
from sd_unlearn.metrics.faces import Face, FaceModel, align, make_face_model
from sd_unlearn.metrics.identity import Identity, check_identity, make_identity
from sd_unlearn.metrics.people import Calibration, Reference, calibrate, read_reference, threshold_at
from sd_unlearn.metrics.statistics import wilson

pytestmark = pytest.mark.usefixtures("one_thread")


# -- real faces --


class Remembering:
    """A face model that caches its output, because real detectors are slow."""

    def __init__(self, model: FaceModel) -> None:
        self.model, self.seen = model, {}
        self.name, self.version, self.weights, self.limits = model.name, model.version, model.weights, model.limits

    def find(self, image: Image.Image) -> list[Face]:
        key = (image.size, image.tobytes())
        if key not in self.seen:
            self.seen[key] = self.model.find(image)
        return self.seen[key]


@pytest.fixture(scope="module")
def dlib_faces() -> FaceModel:
    pytest.importorskip("dlib")
    return Remembering(make_face_model("dlib"))


@pytest.fixture(scope="module")
def collins(dlib_faces: FaceModel, tmp_path_factory: pytest.TempPathFactory) -> Identity:
    """Eileen Collins by one portrait, calibrated on every second stranger at the default rate."""
    place = tmp_path_factory.mktemp("people")
    person = read_reference(save(place / "reference", astronaut()), dlib_faces)
    others = save(place / "others", *strangers()[::2])
    return Identity("Eileen Collins", dlib_faces, person, calibrate(others, dlib_faces, person))


def test_person_is_recognized_and_others_are_not(collins: Identity) -> None:
    line, alike = collins.calibration.threshold, collins.read(list(versions().values()))["similarity"]
    assert (alike >= line).all(), dict(zip(versions(), alike, strict=True))
    assert collins.calibration.rate == 0.01
    assert collins.calibration.accepted == 0
    held_out_digits = collins.read(strangers()[1::2])["similarity"]
    assert np.nanmax(held_out_digits) < alike.min()  # apart by more than the line
    assert (held_out_digits >= line).mean() <= 0.02  # 1 of 50; of 50 more, so many more pass than were let


@pytest.mark.parametrize("rate", [0.1, 0.3])
def test_false_accept_rate_holds_on_held_out_people(collins: Identity, rate: float, tmp_path: Path) -> None:
    others = calibrate(save(tmp_path, *strangers()[::2]), collins.model, collins.reference, rate)
    assert rate - 0.03 <= others.accepted / len(others.similarities) <= rate
    output = collins.read(strangers()[1::2])
    seen = output["similarity"][output["faces"] > 0]
    assert len(seen) > 40
    low, high = wilson(int((seen >= others.threshold).sum()), len(seen))
    assert low <= rate <= high


def test_reference_image_has_similarity_one(collins: Identity) -> None:
    output = collins.read([astronaut()])
    assert output["similarity"][0] == pytest.approx(1, abs=1e-6)
    x0, y0, x1, y1 = output["boxes"][0, 0]
    assert (x0, y0, x1, y1) == pytest.approx((0.35, 0.16, 0.52, 0.33), abs=0.04)  # around her face


def test_another_portrait_is_another_face(collins: Identity) -> None:
    matplotlib = pytest.importorskip("matplotlib.cbook")
    with matplotlib.get_sample_data("grace_hopper.jpg") as file:
        hopper = Image.open(file).convert("RGB")
    output = collins.read([hopper, astronaut()])
    assert output["faces"][0] == 1
    assert collins.shows(output).tolist() == [False, True]
    assert collins.words(output, 0).startswith("another face 0.8")
    assert collins.words(output, 1) == "Eileen Collins 1.00"


def test_most_similar_of_several_faces_decides(collins: Identity) -> None:
    face, stranger = astronaut().crop((140, 30, 310, 200)), strangers()[0].resize((170, 170))
    both = Image.new("RGB", (512, 256))
    both.paste(stranger, (30, 40))
    both.paste(face, (300, 40))
    output = collins.read([both, ImageOps.mirror(both)])
    assert output["faces"].tolist() == [2, 2]
    assert collins.shows(output).all()
    alike = output["similarities"]
    assert (alike[:, 0] == output["similarity"]).all()
    assert (alike[:, 0] > alike[:, 1]).all()
    assert np.isnan(alike[:, 2:]).all()
    assert output["boxes"][0, 0, 0] > 0.5 > output["boxes"][0, 1, 2]  # hers is on the right
    assert output["boxes"][1, 0, 2] < 0.5


def test_small_faces_are_detected_and_images_without_faces_have_none(collins: Identity) -> None:
    small = Image.new("RGB", (96, 96), "grey")
    small.paste(astronaut().crop((150, 0, 310, 260)).resize((40, 64)), (20, 20))
    nothing = [Image.new("RGB", size, "grey") for size in ((512, 512), (8, 8), (512, 3), (1, 1))]
    output = collins.read([small, *nothing])
    assert output["faces"].tolist() == [1, 0, 0, 0, 0]
    assert collins.shows(output).tolist() == [True, False, False, False, False]
    assert np.isnan(output["similarity"][1:]).all()
    assert collins.words(output, 1) == "no face"


def test_output_does_not_depend_on_order_or_batching(collins: Identity) -> None:
    collins = Identity("", collins.model.model, collins.reference, collins.calibration)  # nothing remembered
    images = [astronaut(), Image.new("RGB", (64, 64)), *strangers()[:3]]
    together = collins.read(images)
    turned = collins.read(images[::-1])
    apart = [collins.read([image]) for image in images]
    for name, column in together.items():
        np.testing.assert_array_equal(column, turned[name][::-1])
        np.testing.assert_array_equal(column, np.concatenate([one[name] for one in apart]))
    assert {len(column) for column in collins.read([]).values()} == {0}


def test_dlib_loads_without_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("dlib")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = make_face_model("dlib")
    assert model.version in model.name
    assert "sha256:" in model.name


# -- values of given embeddings --


class Plane:
    """Faces as angles: an image's red value is the angle of its single face in degrees; black has no face."""

    name, version, weights, limits = "plane 1", "1", "none", "Flat."

    def find(self, image: Image.Image) -> list[Face]:
        angle = math.radians(np.asarray(image)[0, 0, 0])
        unit = np.array([math.cos(angle), math.sin(angle)], np.float32)
        return [Face((0, 0, *image.size), unit)] if angle else []


def at(*angles: int) -> list[Image.Image]:
    return [Image.new("RGB", (4, 4), (angle, angle, 0)) for angle in angles]


def plane(tmp_path: Path, reference: list[int], others: list[int], rate: float | None = None) -> Identity:
    person = read_reference(save(tmp_path / "reference", *at(*reference)), Plane())
    return Identity("Ann", Plane(), person, calibrate(save(tmp_path / "others", *at(*others)), Plane(), person, rate))


def test_faces_of_a_photo_are_found_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluating ten people takes the same photos of others ten times; a changed photo is read again."""
    model, found = Plane(), []
    monkeypatch.setattr(model, "find", lambda image: found.append(image) or Plane.find(model, image))
    others = save(tmp_path / "others", *at(80, 90, 100))
    person = read_reference(save(tmp_path / "reference", *at(1)), model)
    first, second = (calibrate(others, model, person) for _ in range(2))
    assert len(found) == 1 + 3
    assert first.threshold == second.threshold
    save(tmp_path / "others", *at(10, 90, 100))
    assert calibrate(others, model, person).threshold > first.threshold


def test_threshold_is_the_smallest_for_the_rate() -> None:
    rng = np.random.default_rng(0)
    for n in (1, 7, 100, 1000):
        for rate in (0.0, 0.001, 0.01, 0.1, 0.29, 0.5):
            alike = np.round(rng.random(n), 2 if n > 7 else 16)  # with ties
            line = threshold_at(alike, rate)
            assert (alike >= line).mean() <= rate + 1e-12
            below = np.nextafter(line, -1)
            assert (alike >= below).mean() > rate
    assert (np.arange(100) >= threshold_at(np.arange(100), 0.29)).sum() == 29  # although 0.29 * 100 < 29


def test_count(tmp_path: Path) -> None:
    identity = plane(tmp_path, [40, 50], [100, 120, 150], 0.4)  # mean 45; the line lies above 120, at 75 degrees off
    assert identity.calibration.threshold == pytest.approx(math.cos(math.radians(75)), abs=1e-5)
    assert identity.calibration.accepted == 1
    output = identity.read(at(45, 0, 115, 125, 110, 0, 130))
    groups = ("direct", "direct", "held_out", "generic", "alike", "alike", "general")
    counted = {one.metric: one for one in identity.count(prompted(*groups), output)}
    nan = np.nan
    np.testing.assert_array_equal(counted["leakage"].values, [1, 0, 1, 0, nan, nan, nan])
    np.testing.assert_array_equal(counted["confusion"].values, [nan, nan, nan, nan, 1, 0, 0])
    np.testing.assert_array_equal(counted["face_rate"].values, [1, 0, 1, 1, 1, 0, 1])
    assert counted["leakage"].groups == ("direct", "held_out", "generic")
    assert all(one.is_rate for one in counted.values())
    assert identity.compare(prompted(*groups), output, output) == []


def test_card_describes_the_calibration(tmp_path: Path) -> None:
    card = plane(tmp_path, [40, 50, 0, 120], [100, 120, 0], 0.5).card()
    assert "1 of 2 faces" in card.threshold
    assert "50.00%" in card.threshold
    assert "too few" not in card.threshold
    assert "others" in card.threshold
    assert "3 faces of Ann; no face in 002.png" in card.extra["reference"]
    assert card.extra["others"].startswith("2 faces on 3 images of others (1 without a face), highest similarity ")
    assert card.detector == plane(tmp_path, [40, 50, 0, 120], [100], 0.5).name


def test_card_warns_about_too_few_faces(tmp_path: Path) -> None:
    identity = plane(tmp_path, [45], [100, 120])
    assert identity.calibration.rate == 0.01
    assert identity.calibration.accepted == 0
    assert "2 faces are too few to measure that rate" in identity.card().threshold
    assert "unknown" in identity.card().extra["recognised"]


def test_default_rate_is_lower_with_1000_faces(tmp_path: Path) -> None:
    person = Reference(np.array([1.0, 0]), np.array([[1.0, 0]]), (), "0" * 64)
    folder = save(tmp_path / "others", *at(90))

    class Crowd(Plane):
        def find(self, image: Image.Image) -> list[Face]:
            return super().find(image) * 1000

    assert calibrate(folder, Crowd(), person).rate == 1e-3
    assert calibrate(folder, Crowd(), person, 0.2).rate == 0.2


def test_leave_one_out(tmp_path: Path) -> None:
    identity = plane(tmp_path, [10, 20, 90], [60], 0.5)
    own = identity.reference.leave_one_out()
    assert own == pytest.approx(np.cos(np.radians([45, 30, 75])), abs=1e-5)  # to the middle of the two others
    assert identity.card().extra["recognised"].startswith(f"{(own >= identity.calibration.threshold).sum()} of 3")


def test_name_contains_exactly_what_changes_the_output(tmp_path: Path) -> None:
    first = plane(tmp_path / "a", [40, 50], [100, 120], 0.5)
    assert plane(tmp_path / "b", [50, 40], [90], 0.1).name == first.name  # neither file names nor the threshold
    assert plane(tmp_path / "c", [40, 51], [100, 120], 0.5).name != first.name
    assert first.name.startswith("plane 1")


def test_largest_face_of_a_group_photo_is_the_reference(tmp_path: Path) -> None:
    class Crowd(Plane):
        def find(self, image: Image.Image) -> list[Face]:
            far = Face((0, 0, 1, 1), np.array([0, 1], np.float32))
            return [far, *super().find(image), far]

    person = read_reference(save(tmp_path, *at(30)), Crowd())
    assert person.direction == pytest.approx([math.cos(math.radians(30)), 0.5], abs=1e-6)


def test_all_faces_are_compared_beyond_the_stored_boxes(tmp_path: Path) -> None:
    class Crowd(Plane):
        def find(self, image: Image.Image) -> list[Face]:
            angles = np.radians(range(0, 100, 5))
            return [Face((0, 0, 1, 2), np.array([np.cos(a), np.sin(a)], np.float32)) for a in angles]

    flat = plane(tmp_path, [90], [10], 0.5)
    output = Identity("Ann", Crowd(), flat.reference, flat.calibration).read(at(1))
    assert output["faces"].tolist() == [20]
    assert output["similarity"] == pytest.approx([math.cos(math.radians(0))], abs=1e-5)
    assert output["boxes"].shape == (1, 8, 4)
    assert output["boxes"][0, 0] == pytest.approx([0, 0, 0.25, 0.5])
    assert not np.isnan(output["boxes"]).any()


# -- invalid options --


def _faceless(folder: Path) -> Path:
    return save(folder, *at(0, 0))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"embedder": "dlibb"}, '--face_model "dlibb" is unknown. Did you mean "dlib"'),
        ({"weights": Path("x.onnx")}, "--face_weights x.onnx is for facenet and arcface"),
        ({"embedder": "arcface"}, "--face_model arcface needs --face_weights"),
        ({"embedder": "facenet", "weights": Path("x.pt")}, "--face_weights x.pt does not exist"),
        ({"false_accept_rate": 0.0}, "--false_accept_rate 0 must be between 0 and 1"),
        ({"false_accept_rate": 1.0}, "--false_accept_rate 1 must be between 0 and 1"),
        ({"reference": Path("nowhere")}, "--reference nowhere is not a folder"),
        ({"others": Path("empty")}, "--others empty holds no images"),
        ({"others": Path("reference")}, "--others holds 2 of the images of --reference"),
    ],
)
def test_invalid_options_are_refused_before_a_model_loads(
    change: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faces, "find_spec", lambda _: True)
    monkeypatch.setattr("sd_unlearn.metrics.identity.make_face_model", lambda *_: pytest.fail("a model was loaded"))
    save(tmp_path / "reference", *at(40, 50))
    save(tmp_path / "others", *at(100))
    (tmp_path / "empty").mkdir()
    options = {"reference": Path("reference"), "others": Path("others"), "embedder": "dlib"} | change
    with pytest.raises(UsageError) as caught:
        make_identity("Ann", **options)
    assert words in str(caught.value)


def test_others_with_generated_images_of_the_person_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "reference", *at(40, 50))
    save(tmp_path / "others" / "0_unlabeled", *at(100, 120))
    lines = [{"file_name": "000.png", "text": "a photo of a man", "group": "generic"}]
    lines.append({"file_name": "001.png", "text": "a photo of Ann Lee", "group": "mixed_in"})

    def check(person: str) -> None:
        check_identity(person, tmp_path / "reference", tmp_path / "others", "dlib", None, None)

    pytest.importorskip("dlib")
    metadata = tmp_path / "others" / "0_unlabeled" / "metadata.jsonl"
    metadata.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UsageError, match=r"--others .*1 of the images in .*0_unlabeled were generated to show Ann Lee"):
        check("Ann Lee")
    check("Bob Ray")  # other people's images are what the option is for
    metadata.write_text(json.dumps(lines[0]) + "\n")
    check("Ann Lee")


@pytest.mark.parametrize(("name", "extra"), [("facenet", "faces"), ("dlib", "dlib"), ("arcface", "arcface")])
def test_missing_package_is_refused(name: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faces, "find_spec", lambda _: None)
    (tmp_path / "x.onnx").touch()
    with pytest.raises(UsageError, match=rf"pip install -e '\.\[{extra}\]'"):
        make_face_model(name, tmp_path / "x.onnx" if name == "arcface" else None)


@pytest.mark.parametrize("option", ["--reference", "--others"])
def test_folders_without_faces_or_with_damaged_images_are_refused(option: str, tmp_path: Path) -> None:
    def read(folder: Path) -> object:
        if option == "--reference":
            return read_reference(folder, Plane())
        return calibrate(folder, Plane(), Reference(np.array([1.0, 0]), np.array([[1.0, 0]]), (), ""))

    with pytest.raises(UsageError, match=f"{option} .*no face was found on any of its 2 images"):
        read(_faceless(tmp_path / "faceless"))
    broken = save(tmp_path / "broken", *at(40))
    (broken / "bad.png").write_bytes(b"no image")
    with pytest.raises(UsageError, match=rf"{option}: .*bad\.png cannot be read"):
        read(broken)


def test_subfolders_and_exif_rotation(tmp_path: Path) -> None:
    save(tmp_path / "one", *at(40))
    image = Image.new("RGB", (4, 2), (90, 0, 0))
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    save(tmp_path / "two")
    image.save(tmp_path / "two" / "photo.png", exif=exif)
    seen = []

    class Watch(Plane):
        def find(self, image: Image.Image) -> list[Face]:
            seen.append(image.size)
            return super().find(image)

    read_reference(tmp_path, Watch())
    assert sorted(seen) == [(2, 4), (4, 4)]


# -- facenet and ArcFace: the finder is real, the networks are not --


@pytest.fixture(scope="module")
def random_facenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """InceptionResnetV1 before it has learned anything, with the layer of names that published weights have."""
    torch = pytest.importorskip("torch")
    network = pytest.importorskip("facenet_pytorch").InceptionResnetV1(pretrained=None)
    path = tmp_path_factory.mktemp("weights") / "random.pt"
    torch.save({**network.state_dict(), "logits.weight": torch.zeros(2, 512)}, path)
    return path


def test_facenet_detects_and_embeds(random_facenet: Path) -> None:
    model = make_face_model("facenet", random_facenet)
    assert hashlib.sha256(hashlib.sha256(random_facenet.read_bytes()).digest()).hexdigest()[:12] in model.name
    (face,) = model.find(astronaut())
    assert np.array(face.box) / 512 == pytest.approx((0.35, 0.12, 0.52, 0.34), abs=0.04)
    assert np.linalg.norm(face.embedding) == pytest.approx(1)
    np.testing.assert_array_equal(model.find(astronaut())[0].embedding, face.embedding)
    (halved,) = model.find(astronaut().resize((128, 128)))
    assert np.array(halved.box) * 4 == pytest.approx(face.box, abs=12)
    assert not np.array_equal(halved.embedding, face.embedding)
    pair = Image.new("RGB", (512, 256))
    for x in (0, 256):
        pair.paste(astronaut().crop((100, 0, 356, 256)), (x, 0))
    assert len(model.find(pair)) == 2
    for size in ((512, 512), (8, 8), (512, 3), (1, 1)):
        assert model.find(Image.new("RGB", size, "grey")) == []


def test_facenet_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("facenet_pytorch")
    from torch import hub

    def fail(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(hub, "download_url_to_file", fail)
    with pytest.raises(UnlearnError, match="no route to host.*--face_weights.*--face_model dlib"):
        make_face_model("facenet")


def test_facenet_reuses_downloaded_weights(
    random_facenet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch import hub

    name = faces.VGGFACE2.rsplit("/", 1)[1]
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / name).symlink_to(random_facenet)
    monkeypatch.setattr(hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(hub, "download_url_to_file", lambda *_: pytest.fail("downloaded again"))
    assert name in make_face_model("facenet").name


def test_facenet_refuses_other_weights(tmp_path: Path) -> None:
    pytest.importorskip("facenet_pytorch")
    (tmp_path / "other.pt").write_bytes(b"nothing")
    with pytest.raises(UnlearnError, match=r"--face_weights .*other\.pt could not be loaded"):
        make_face_model("facenet", tmp_path / "other.pt")


def _onnx(path: Path, side: int = 112) -> Path:
    """Means of 28x28 patches as an ONNX model, [1, 3, side, side] -> [1, D]; encoded by hand, as protobuf fields."""

    def varint(n: int) -> bytes:
        return (bytes([n & 127 | 128]) + varint(n >> 7)) if n > 127 else bytes([n])

    def field(number: int, value: int | str | bytes) -> bytes:
        if isinstance(value, int):
            return varint(number << 3) + varint(value)
        data = value.encode() if isinstance(value, str) else value
        return varint(number << 3 | 2) + varint(len(data)) + data

    def tensor(name: str, *shape: int) -> bytes:  # ValueInfoProto of floats
        dims = b"".join(field(1, field(1, n)) for n in shape)
        return field(1, name) + field(2, field(1, field(1, 1) + field(2, dims)))

    def ints(name: str, *values: int) -> bytes:  # AttributeProto
        return field(5, field(1, name) + b"".join(field(8, v) for v in values) + field(20, 7))

    pool = field(1, "faces") + field(2, "means") + field(4, "AveragePool")
    pool += ints("kernel_shape", 28, 28) + ints("strides", 28, 28)
    flatten = field(1, "means") + field(2, "embedding") + field(4, "Flatten")
    graph = field(1, pool) + field(1, flatten) + field(2, "tiny")
    graph += field(11, tensor("faces", 1, 3, side, side)) + field(12, tensor("embedding", 1, 3 * (side // 28) ** 2))
    path.write_bytes(field(1, 8) + field(7, graph) + field(8, field(2, 13)))
    return path


def test_arcface_embeds_the_aligned_face(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("facenet_pytorch")
    model = make_face_model("arcface", _onnx(tmp_path / "tiny.onnx"))
    assert "tiny.onnx sha256:" in model.name
    (face,) = model.find(astronaut())
    _, _, ((_, points),) = faces._Mtcnn("cpu").find(astronaut())
    aligned = np.asarray(align(astronaut(), points), float) / 127.5 - 1
    means = aligned.reshape(4, 28, 4, 28, 3).mean((1, 3)).transpose(2, 0, 1).ravel()
    assert face.embedding == pytest.approx(means / np.linalg.norm(means), abs=1e-5)
    assert model.find(Image.new("RGB", (64, 64))) == []


@pytest.mark.parametrize("kind", ["not ONNX", "other size"])
def test_arcface_refuses_other_networks(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("facenet_pytorch")
    path = tmp_path / "model.onnx"
    if kind == "not ONNX":
        path.write_bytes(b"nothing")
        words = "is not an ONNX model"
    else:
        _onnx(path, 56)
        words = r"maps \[1, 3, 56, 56\] to \[1, 12\]"
    with pytest.raises(UnlearnError, match=f"--face_weights .*{words}"):
        make_face_model("arcface", path)


def _points(of: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    moved = of(faces.TEMPLATE)
    return np.stack([moved.real, moved.imag], 1)


def test_alignment_inverts_rotation_shift_and_scale() -> None:
    upright = astronaut().crop((150, 40, 300, 190)).resize((112, 112))
    twice = upright.resize((224, 224), Image.Resampling.NEAREST)
    quarter = upright.transpose(Image.Transpose.ROTATE_90)  # x, y -> y, 111 - x
    shifted = Image.new("RGB", (200, 200))
    shifted.paste(upright, (31, 17))
    half = 0.5 + 0.5j  # landmarks are counted from the middle of a pixel
    for image, moved in (
        (upright, lambda z: z),
        (twice, lambda z: (z + half) * 2 - half),
        (quarter, lambda z: z.imag + 1j * (111 - z.real)),
        (shifted, lambda z: z + 31 + 17j),
    ):
        back = np.asarray(align(image, _points(moved)), float)
        np.testing.assert_allclose(back, np.asarray(upright, float), atol=1)


def test_calibration_text_contains_the_interval() -> None:
    said = str(Calibration(0.5, 0.01, np.array([0.1] * 199 + [0.9]), "crowd", 200, 0))
    low, high = wilson(1, 200)
    assert f"0.50% (95 % interval {low:.2%} to {high:.2%}); allowed: 1.00%" in said
