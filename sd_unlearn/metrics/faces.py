"""Faces in pictures and what each looks like as a unit vector, by one of three finders and networks.

All look at one picture, and embed one face, at a time: a reading cannot depend on what else is read. Finders overlook
small faces, so small pictures are enlarged before they are searched; how far is part of a model's name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sd_unlearn.errors import UnlearnError, UsageError, suggest

FACE_MODELS = {  # name -> (what it imports, the extra that installs it)
    "facenet": (("facenet_pytorch", "torchvision"), "faces"),
    "dlib": (("dlib", "face_recognition_models"), "dlib"),
    "arcface": (("onnxruntime", "facenet_pytorch", "torchvision"), "arcface"),
}
VGGFACE2 = "https://github.com/timesler/facenet-pytorch/releases/download/v2.2.9/20180402-114759-vggface2.pt"
MOST = 8  # a picture is enlarged at most so many times: there is nothing more in it to be found
# Where both eyes, the nose and both corners of the mouth lie in the 112x112 faces that ArcFace's networks learn from
# (Deng et al. 2019; the template of their reference implementation).
TEMPLATE = np.array(
    [38.2946 + 51.6963j, 73.5318 + 51.5014j, 56.0252 + 71.7366j, 41.5493 + 92.3655j, 70.7299 + 92.2041j]
)

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Face:
    """A face found in a picture."""

    box: Box  # x0, y0, x1, y1 in pixels of the picture, inside it
    probability: float  # in [0, 1], how sure the finder is that this is a face
    embedding: NDArray[np.float32]  # [D], of length 1


class FaceModel(Protocol):
    """A finder of faces together with a network that embeds them."""

    name: str  # with version, weights and every setting that changes what is found
    version: str  # of the package
    weights: str  # their name or SHA-256
    limits: str  # what it gets wrong

    def find(self, image: Image.Image) -> list[Face]:
        """Every face found in an RGB picture of any size, in no particular order."""


class DlibFaces:
    """dlib's frontal finder (HOG), 5 landmarks and its ResNet of 128 numbers (King 2017); nothing is downloaded.

    The package's 68-landmark model is left alone: the data it was trained on exclude commercial use.
    """

    SIDE = 1024  # the finder's window is 80 pixels wide: this finds faces from 8 % of the longer side up
    limits = "Finds frontal faces only; a face turned far aside or tilted counts as none."

    def __init__(self) -> None:
        import dlib

        # The package of the weights is not imported: doing so warns about a deprecated part of setuptools.
        spec = find_spec("face_recognition_models")
        folder = Path(next(iter(spec.submodule_search_locations or []))) / "models" if spec else Path()
        landmarks, network = (
            folder / "shape_predictor_5_face_landmarks.dat",
            folder / "dlib_face_recognition_resnet_model_v1.dat",
        )
        self._finder = dlib.get_frontal_face_detector()
        self._landmarks = dlib.shape_predictor(str(landmarks))
        self._network = dlib.face_recognition_model_v1(str(network))
        self.version, self.weights = dlib.__version__, f"sha256:{_sha256(landmarks, network)}"
        self.name = f"dlib {self.version} HOG + ResNet {self.weights}, enlarged to {self.SIDE}"

    def find(self, image: Image.Image) -> list[Face]:
        large, scale = _enlarge(image, self.SIDE)
        pixels = np.asarray(large)
        boxes, margins, _ = self._finder.run(pixels, 0, 0.0)
        faces = []
        for box, margin in zip(boxes, margins, strict=True):
            embedding = self._network.compute_face_descriptor(pixels, self._landmarks(pixels, box))
            corners = (box.left(), box.top(), box.right() + 1, box.bottom() + 1)
            # The finder has a margin for an answer, not a probability: its logistic puts the border at 1/2.
            faces.append(Face(_inside(corners, scale, image), float(1 / (1 + np.exp(-margin))), _unit(embedding)))
        return faces


class _Mtcnn:
    """MTCNN (Zhang et al. 2016) as facenet-pytorch carries it, with its weights."""

    SIDE, SMALLEST = 512, 20  # pixels: faces from 4 % of the longer side up

    def __init__(self, device: str) -> None:
        from facenet_pytorch import MTCNN

        self.network = MTCNN(keep_all=True, min_face_size=self.SMALLEST, device=device)
        self.version = version("facenet-pytorch")
        self.name = f"MTCNN of facenet-pytorch {self.version}, enlarged to {self.SIDE}"

    def find(self, image: Image.Image) -> tuple[Image.Image, float, list[tuple[NDArray, float, NDArray]]]:
        """The picture enlarged, by how much, and (box [4], probability, landmarks [5, 2]) of each face in it."""
        large, scale = _enlarge(image, self.SIDE)
        try:
            boxes, probabilities, points = self.network.detect(large, landmarks=True)
        except (RuntimeError, ValueError) as error:
            if "non-empty list" not in str(error):
                raise
            boxes = None  # how the package says that a narrow picture has no room for a face
        if boxes is None:
            return large, scale, []
        found = [
            (np.asarray(box, float), float(p), np.asarray(marks, float))
            for box, p, marks in zip(boxes, probabilities, points, strict=True)
        ]
        # One that lies outside the picture cannot be cut out.
        return large, scale, [f for f in found if np.ptp(np.reshape(_inside(f[0], 1, large), (2, 2)), 0).min() >= 1]


class FacenetFaces:
    """MTCNN and InceptionResnetV1 learned on VGGFace2 (facenet-pytorch; Schroff et al. 2015, Cao et al. 2018).

    The network's weights are those of a file, or are downloaded once to torch's hub folder.

    Raises:
        UnlearnError: the weights cannot be downloaded, or the file holds others.
    """

    limits = "Learned on photos of celebrities, mostly light-skinned adults: other faces are told apart less well."

    def __init__(self, weights: Path | None = None, device: str = "cpu") -> None:
        import torch
        from facenet_pytorch import InceptionResnetV1

        path = weights or _vggface2()
        self._torch, self._device, self._finder = torch, device, _Mtcnn(device)
        self._network = InceptionResnetV1(pretrained=None, device=device).eval()
        try:
            state = torch.load(path, map_location=device, weights_only=True)
            # The layer that names the people it was trained on has no use here.
            self._network.load_state_dict({k: v for k, v in state.items() if not k.startswith("logits.")})
        except Exception as error:  # unpickling and mismatches raise a dozen kinds
            raise UnlearnError(
                f"--face_weights {path} could not be loaded into InceptionResnetV1 ({_first_line(error)}). "
                f"Give the file of {VGGFACE2} or leave --face_weights out."
            ) from error
        self.version, self.weights = self._finder.version, f"{path.name} sha256:{_sha256(path)}"
        self.name = f"facenet InceptionResnetV1 {self.weights}, {self._finder.name}"

    def find(self, image: Image.Image) -> list[Face]:
        large, scale, found = self._finder.find(image)
        faces = []
        for box, probability, _ in found:
            crop = self._finder.network.extract(large, np.stack([box]), None)
            with self._torch.no_grad():
                embedding = self._network(crop.to(self._device)).cpu().numpy()[0]
            faces.append(Face(_inside(box, scale, image), probability, _unit(embedding)))
        return faces


class ArcFaces:
    """MTCNN and a network of one's own in ONNX: RGB faces [1, 3, 112, 112] in [-1, 1] -> [1, D] (Deng et al. 2019).

    Raises:
        UnlearnError: the file is no such network.
    """

    limits = "What the network behind --face_weights gets wrong is for its makers to say; MTCNN finds the faces."

    def __init__(self, weights: Path, device: str = "cpu") -> None:
        import onnxruntime

        offered = onnxruntime.get_available_providers()
        wanted = ["CUDAExecutionProvider"] if device.startswith("cuda") else []
        try:
            self._session = onnxruntime.InferenceSession(
                str(weights), providers=[p for p in [*wanted, "CPUExecutionProvider"] if p in offered]
            )
        except Exception as error:  # onnxruntime has an exception of its own for every status
            raise UnlearnError(f"--face_weights {weights} is no ONNX model ({_first_line(error)}).") from error
        shapes = [list(put.shape) for put in (*self._session.get_inputs(), *self._session.get_outputs())]
        if len(shapes) != 2 or shapes[0][1:] != [3, 112, 112] or len(shapes[1]) != 2:
            raise UnlearnError(
                f"--face_weights {weights} maps {' and '.join(map(str, shapes[:-1]))} to {shapes[-1]}; an ArcFace "
                "network maps [1, 3, 112, 112] to [1, D]. Give one exported so."
            )
        self._input, self._finder = self._session.get_inputs()[0].name, _Mtcnn(device)
        self.version, self.weights = onnxruntime.__version__, f"{weights.name} sha256:{_sha256(weights)}"
        self.name = f"arcface {self.weights}, {self._finder.name}"

    def find(self, image: Image.Image) -> list[Face]:
        large, scale, found = self._finder.find(image)
        faces = []
        for box, probability, points in found:
            pixels = np.asarray(align(large, points), np.float32).transpose(2, 0, 1)[None] / 127.5 - 1
            embedding = self._session.run(None, {self._input: pixels})[0][0]
            faces.append(Face(_inside(box, scale, image), probability, _unit(embedding)))
        return faces


def align(image: Image.Image, points: NDArray[np.float64]) -> Image.Image:
    """The face at five landmarks [5, 2], turned, scaled and shifted onto TEMPLATE: 112x112 pixels.

    The least-squares similarity (Umeyama 1991); in the plane a product of complex numbers, so that nothing is mirrored.
    """
    source = points[:, 0] + 1j * points[:, 1]
    centred = source - source.mean()
    turn = (centred.conj() @ (TEMPLATE - TEMPLATE.mean())) / (abs(centred) ** 2).sum()
    back = 1 / turn  # PIL asks where each pixel of the result is from
    half = 0.5 + 0.5j  # and counts from the corner of a pixel, landmarks from its centre
    shift = source.mean() + half - back * (TEMPLATE.mean() + half)
    rows = (back.real, -back.imag, shift.real, back.imag, back.real, shift.imag)
    return image.transform((112, 112), Image.Transform.AFFINE, rows, Image.Resampling.BILINEAR)


def check_face_model(name: str, weights: Path | None) -> None:
    """Refuse, loading nothing, what make_face_model could not make.

    Raises:
        UsageError: an unknown name, a package not installed, weights missing or of no use.
    """
    if name not in FACE_MODELS:
        raise UsageError(
            f'--face_model "{name}" is unknown.{suggest(name, FACE_MODELS)} Choose one of {", ".join(FACE_MODELS)}.'
        )
    if name == "dlib" and weights is not None:
        raise UsageError(f"--face_weights {weights} is for facenet and arcface; dlib's weights come with its package.")
    if name == "arcface" and weights is None:
        raise UsageError("--face_model arcface needs --face_weights: the path of an ONNX model of ArcFace's kind.")
    if weights is not None and not weights.is_file():
        raise UsageError(f"--face_weights {weights} does not exist. Give the path of a file.")
    packages, extra = FACE_MODELS[name]
    missing = [package for package in packages if not find_spec(package)]
    if missing:
        raise UsageError(f"--face_model {name} needs {', '.join(missing)}: pip install 'sd-unlearn[{extra}]'.")


def make_face_model(name: str, weights: Path | None = None, device: str = "cpu") -> FaceModel:
    """One of FACE_MODELS; dlib ignores the device.

    Raises:
        UsageError: see check_face_model.
        UnlearnError: the weights cannot be had, or are of something else.
    """
    check_face_model(name, weights)
    if name == "dlib":
        return DlibFaces()
    if name == "arcface" and weights is not None:
        return ArcFaces(weights, device)
    return FacenetFaces(weights, device)


def _vggface2() -> Path:
    """The weights facenet-pytorch publishes, in torch's hub folder."""
    from torch import hub

    path = Path(hub.get_dir()) / "checkpoints" / VGGFACE2.rsplit("/", 1)[1]
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            hub.download_url_to_file(VGGFACE2, str(path))  # through a temporary name
        except OSError as error:
            raise UnlearnError(
                f"--face_model facenet: its weights cannot be downloaded from {VGGFACE2} ({_first_line(error)}). Fetch "
                "the file elsewhere and give its path as --face_weights, or use --face_model dlib, which needs none."
            ) from error
    return path


def _enlarge(image: Image.Image, side: int) -> tuple[Image.Image, float]:
    """The picture with its longer side at least `side` pixels, if MOST allows, and how many times larger it is."""
    scale = min(max(1.0, side / max(image.size)), MOST)
    if scale == 1:
        return image.convert("RGB"), 1.0
    size = (round(image.width * scale), round(image.height * scale))
    return image.convert("RGB").resize(size, Image.Resampling.BICUBIC), scale


def _inside(box: Sequence[float] | NDArray, scale: float, image: Image.Image) -> Box:
    """A box of the enlarged picture in pixels of the picture itself."""
    x0, y0, x1, y1 = np.clip(np.reshape(box, (2, 2)) / scale, 0, image.size).ravel().tolist()
    return x0, y0, x1, y1


def _unit(embedding: Any) -> NDArray[np.float32]:
    vector = np.asarray(embedding, np.float64)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def _sha256(*paths: Path) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:12]


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
