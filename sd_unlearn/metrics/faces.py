"""Face detection and face embeddings (unit vectors) by one of three models.

Every model processes one image and embeds one face at a time, so its output does not depend on batching. Detectors miss
small faces, so small images are enlarged first; the size is part of a model's name.
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

from sd_unlearn.errors import UnlearnError, UsageError, install_command, reason, suggest
from sd_unlearn.metrics.weights import downloaded

FACE_MODELS = {  # name -> (packages it imports, the extra that installs them)
    "facenet": (("facenet_pytorch", "torchvision"), "faces"),
    "dlib": (("dlib", "face_recognition_models"), "dlib"),
    "arcface": (("onnxruntime", "facenet_pytorch", "torchvision"), "arcface"),
}
VGGFACE2 = "https://github.com/timesler/facenet-pytorch/releases/download/v2.2.9/20180402-114759-vggface2.pt"
MAX_SCALE = 8  # images are enlarged at most by this factor: more adds no detail
# Eyes, nose and corners of the mouth in the 112x112 faces that ArcFace networks are trained on (Deng et al. 2019; the
# template of their reference implementation).
TEMPLATE = np.array(
    [38.2946 + 51.6963j, 73.5318 + 51.5014j, 56.0252 + 71.7366j, 41.5493 + 92.3655j, 70.7299 + 92.2041j]
)

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Face:
    """A detected face."""

    box: Box  # x0, y0, x1, y1 in pixels, inside the image
    embedding: NDArray[np.float32]  # [D], of length 1


class FaceModel(Protocol):
    """A face detector with a network that embeds the faces."""

    name: str  # with version, weights and every setting that changes the output
    version: str  # of the package
    weights: str  # their name or SHA-256
    limits: str  # known errors

    def find(self, image: Image.Image) -> list[Face]:
        """All faces of an RGB image of any size, in no particular order."""


class DlibFaces:
    """dlib's frontal face detector (HOG), 5 landmarks and its 128-dimensional ResNet (King 2017); no download.

    The package's 68-landmark model is not used: the licence of its training data excludes commercial use.
    """

    SIDE = 1024  # the detector's window is 80 pixels wide: finds faces from 8 % of the longer side
    limits = "Detects frontal faces only; faces turned far aside or tilted are missed."

    def __init__(self) -> None:
        import dlib

        # Importing face_recognition_models would warn about a deprecated part of setuptools.
        spec = find_spec("face_recognition_models")
        folder = Path(next(iter(spec.submodule_search_locations or []))) / "models" if spec else Path()
        landmarks = folder / "shape_predictor_5_face_landmarks.dat"
        network = folder / "dlib_face_recognition_resnet_model_v1.dat"
        self._detector = dlib.get_frontal_face_detector()
        self._landmarks = dlib.shape_predictor(str(landmarks))
        self._network = dlib.face_recognition_model_v1(str(network))
        self.version, self.weights = dlib.__version__, f"sha256:{_sha256(landmarks, network)}"
        self.name = f"dlib {self.version} HOG + ResNet {self.weights}, enlarged to {self.SIDE}"

    def find(self, image: Image.Image) -> list[Face]:
        large, scale = _enlarge(image, self.SIDE)
        pixels = np.asarray(large)
        boxes, _, _ = self._detector.run(pixels, 0, 0.0)
        faces = []
        for box in boxes:
            embedding = self._network.compute_face_descriptor(pixels, self._landmarks(pixels, box))
            corners = (box.left(), box.top(), box.right() + 1, box.bottom() + 1)
            faces.append(Face(_inside(corners, scale, image), _unit(embedding)))
        return faces


class _Mtcnn:
    """MTCNN (Zhang et al. 2016) with the weights in facenet-pytorch."""

    SIDE, MIN_FACE = 512, 20  # pixels: finds faces from 4 % of the longer side

    def __init__(self, device: str) -> None:
        from facenet_pytorch import MTCNN

        self.network = MTCNN(keep_all=True, min_face_size=self.MIN_FACE, device=device)
        self.version = version("facenet-pytorch")
        self.name = f"MTCNN of facenet-pytorch {self.version}, enlarged to {self.SIDE}"

    def find(self, image: Image.Image) -> tuple[Image.Image, float, list[tuple[NDArray, NDArray]]]:
        """The enlarged image, its scale, and (box [4], landmarks [5, 2]) of each face in it."""
        large, scale = _enlarge(image, self.SIDE)
        try:
            boxes, _, points = self.network.detect(large, landmarks=True)
        except (RuntimeError, ValueError) as error:
            if "non-empty list" not in str(error):
                raise
            boxes = None  # the package fails so on images too narrow for a face
        if boxes is None:
            return large, scale, []
        found = [(np.asarray(box, float), np.asarray(marks, float)) for box, marks in zip(boxes, points, strict=True)]
        # A face outside the image cannot be cropped.
        return large, scale, [f for f in found if np.ptp(np.reshape(_inside(f[0], 1, large), (2, 2)), 0).min() >= 1]


class FacenetFaces:
    """MTCNN and InceptionResnetV1 trained on VGGFace2 (facenet-pytorch; Schroff et al. 2015, Cao et al. 2018).

    The weights are read from a file, or downloaded once to torch's hub folder.

    Raises:
        UnlearnError: the weights cannot be downloaded, or the file does not fit the network.
    """

    limits = "Trained on photos of celebrities, mostly light-skinned adults; less accurate for other faces."

    def __init__(self, weights: Path | None = None, device: str = "cpu") -> None:
        import torch
        from facenet_pytorch import InceptionResnetV1

        path = weights or downloaded(
            VGGFACE2,
            "--face_model facenet: its weights",
            "Download the file elsewhere and give it as --face_weights, or use --face_model dlib (no download).",
        )
        self._torch, self._device, self._detector = torch, device, _Mtcnn(device)
        self._network = InceptionResnetV1(pretrained=None, device=device).eval()
        try:
            state = torch.load(path, map_location=device, weights_only=True)
            # The classification layer of the training set is not needed.
            self._network.load_state_dict({k: v for k, v in state.items() if not k.startswith("logits.")})
        except Exception as error:  # unpickling and mismatches raise many types
            advice = f"Give the file from {VGGFACE2} or leave --face_weights out." if weights else "Delete it to retry."
            raise UnlearnError(
                f"{'--face_weights ' if weights else ''}{path} could not be loaded into InceptionResnetV1 "
                f"({reason(error)}). {advice}"
            ) from error
        self.version, self.weights = self._detector.version, f"{path.name} sha256:{_sha256(path)}"
        self.name = f"facenet InceptionResnetV1 {self.weights}, {self._detector.name}"

    def find(self, image: Image.Image) -> list[Face]:
        large, scale, found = self._detector.find(image)
        faces = []
        for box, _ in found:
            crop = self._detector.network.extract(large, np.stack([box]), None)
            with self._torch.no_grad():
                embedding = self._network(crop.to(self._device)).cpu().numpy()[0]
            faces.append(Face(_inside(box, scale, image), _unit(embedding)))
        return faces


class ArcFaces:
    """MTCNN and your own ONNX network: RGB faces [1, 3, 112, 112] in [-1, 1] -> [1, D] (Deng et al. 2019).

    Raises:
        UnlearnError: the file is not such a network.
    """

    limits = "Faces are detected by MTCNN; for the errors of the network in --face_weights see its authors."

    def __init__(self, weights: Path, device: str = "cpu") -> None:
        import onnxruntime

        offered = onnxruntime.get_available_providers()
        wanted = ["CUDAExecutionProvider"] if device.startswith("cuda") else []
        try:
            self._session = onnxruntime.InferenceSession(
                str(weights), providers=[p for p in [*wanted, "CPUExecutionProvider"] if p in offered]
            )
        except Exception as error:  # onnxruntime has an exception type for each status
            raise UnlearnError(f"--face_weights {weights} is not an ONNX model ({reason(error)}).") from error
        shapes = [list(put.shape) for put in (*self._session.get_inputs(), *self._session.get_outputs())]
        if len(shapes) != 2 or shapes[0][1:] != [3, 112, 112] or len(shapes[1]) != 2:
            raise UnlearnError(
                f"--face_weights {weights} maps {' and '.join(map(str, shapes[:-1]))} to {shapes[-1]}; an ArcFace "
                "network maps [1, 3, 112, 112] to [1, D]. Export it with these shapes."
            )
        self._input, self._detector = self._session.get_inputs()[0].name, _Mtcnn(device)
        self.version, self.weights = onnxruntime.__version__, f"{weights.name} sha256:{_sha256(weights)}"
        self.name = f"arcface {self.weights}, {self._detector.name}"

    def find(self, image: Image.Image) -> list[Face]:
        large, scale, found = self._detector.find(image)
        faces = []
        for box, points in found:
            pixels = np.asarray(align(large, points), np.float32).transpose(2, 0, 1)[None] / 127.5 - 1
            embedding = self._session.run(None, {self._input: pixels})[0][0]
            faces.append(Face(_inside(box, scale, image), _unit(embedding)))
        return faces


def align(image: Image.Image, points: NDArray[np.float64]) -> Image.Image:
    """The face at five landmarks [5, 2], rotated, scaled and shifted onto TEMPLATE: 112x112 pixels.

    The least-squares similarity transform (Umeyama 1991), written with complex numbers, so it cannot mirror.
    """
    source = points[:, 0] + 1j * points[:, 1]
    centred = source - source.mean()
    forward = (centred.conj() @ (TEMPLATE - TEMPLATE.mean())) / (abs(centred) ** 2).sum()
    inverse = 1 / forward  # Pillow maps pixels of the result to the source
    half = 0.5 + 0.5j  # Pillow counts from the corner of a pixel, landmarks from its centre
    shift = source.mean() + half - inverse * (TEMPLATE.mean() + half)
    matrix = (inverse.real, -inverse.imag, shift.real, inverse.imag, inverse.real, shift.imag)
    return image.transform((112, 112), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)


def check_face_model(name: str, weights: Path | None) -> None:
    """Check the arguments of make_face_model; loads no model.

    Raises:
        UsageError: unknown name, missing package, or weights that are missing or not used by the model.
    """
    if name not in FACE_MODELS:
        raise UsageError(
            f'--face_model "{name}" is unknown.{suggest(name, FACE_MODELS)} Choose one of {", ".join(FACE_MODELS)}.'
        )
    if name == "dlib" and weights is not None:
        raise UsageError(f"--face_weights {weights} is for facenet and arcface; dlib's weights come with its package.")
    if name == "arcface" and weights is None:
        raise UsageError("--face_model arcface needs --face_weights: the path of an ArcFace model in ONNX format.")
    if weights is not None and not weights.is_file():
        raise UsageError(f"--face_weights {weights} does not exist. Give the path of a file.")
    packages, extra = FACE_MODELS[name]
    missing = [package for package in packages if not find_spec(package)]
    if missing:
        raise UsageError(f"--face_model {name} needs {', '.join(missing)}: {install_command(extra)}.")


def make_face_model(name: str, weights: Path | None = None, device: str = "cpu") -> FaceModel:
    """One of FACE_MODELS; dlib ignores the device.

    Raises:
        UsageError: see check_face_model.
        UnlearnError: the weights cannot be downloaded, or do not fit the network.
    """
    check_face_model(name, weights)
    if name == "dlib":
        return DlibFaces()
    if name == "arcface" and weights is not None:
        return ArcFaces(weights, device)
    return FacenetFaces(weights, device)


def _enlarge(image: Image.Image, side: int) -> tuple[Image.Image, float]:
    """The image enlarged to a longer side of `side` pixels, at most by MAX_SCALE, and the scale used."""
    scale = min(max(1.0, side / max(image.size)), MAX_SCALE)
    if scale == 1:
        return image.convert("RGB"), 1.0
    size = (round(image.width * scale), round(image.height * scale))
    return image.convert("RGB").resize(size, Image.Resampling.BICUBIC), scale


def _inside(box: Sequence[float] | NDArray, scale: float, image: Image.Image) -> Box:
    """A box of the enlarged image in pixels of the original, clipped to it."""
    x0, y0, x1, y1 = np.clip(np.reshape(box, (2, 2)) / scale, 0, image.size).ravel().tolist()
    return x0, y0, x1, y1


def _unit(embedding: Any) -> NDArray[np.float32]:
    vector = np.asarray(embedding, np.float64)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def _sha256(*paths: Path) -> str:
    """12 digits of the hash of the files' hashes."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:12]
