"""Any image classifier of timm or transformers: is the concept the class of each picture?

Its classes are the model's own; a class is named by any of the names its model gives it ("tench, Tinca tinca").
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sd_unlearn.errors import UnlearnError, UsageError, suggest
from sd_unlearn.io.files import read_json
from sd_unlearn.metrics.base import ASKED, Columns, Counted, Shots
from sd_unlearn.metrics.labels import count_read
from sd_unlearn.results import Card, Row

DEFAULT = "resnet50.a1_in1k"
TOP = 5
_BATCH = 32


class Classes:
    """The classes of a model [C], each with all its names; any of them names it, whatever its capitals or article."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)  # "tench, Tinca tinca"
        self.places: dict[str, list[int]] = {}
        for place, several in enumerate(names):
            for name in {_plain(several), *map(_plain, several.split(","))}:
                self.places.setdefault(name, []).append(place)

    def __len__(self) -> int:
        return len(self.names)

    def knows(self, word: str) -> bool:
        return _plain(word) in self.places

    def of(self, word: str) -> list[int]:
        """The classes of that name: mostly one, but ImageNet knows two cranes."""
        return self.places[_plain(word)]

    def check(self, label: str, name: str) -> None:
        """Raises UsageError when `label` names no class of the model `name`."""
        if not self.knows(label):
            some = "; ".join(self.names[:5]) + ("; ..." if len(self) > 5 else "")
            raise UsageError(
                f'--label "{label}" is none of the {len(self)} classes of --classifier {name}.'
                f"{suggest(_plain(label), self.places)} Name one of its classes: {some}"
            )


@dataclass(frozen=True)
class Network:
    """A classifier as this file uses it, whichever library it is from."""

    title: str  # library and architecture
    package: str  # and its version
    sha256: str  # of the weights and of how pictures are prepared
    classes: Classes
    probabilities: Callable[[Sequence[Image.Image]], NDArray[np.float32]]  # B > 0 RGB pictures -> [B, C]


class ClassifierQuestion:
    """Leakage: the concept is the most probable of all classes. Columns: "probabilities" [N, C].

    label: a class of the model by any of its names, as "church" of "church, church building".

    Raises:
        UsageError: the model has no such class.
    """

    def __init__(self, network: Network, label: str) -> None:
        network.classes.check(label, network.title)
        self.network, self.label = network, label
        self.name = f"{network.title} sha256:{network.sha256[:12]}"

    def card(self) -> Card:
        many = len(self.network.classes)
        asked = "; ".join(self.network.classes.names[i] for i in self.network.classes.of(self.label))
        return Card(
            self.name,
            ("leakage", *self._deeper(), "accuracy"),
            f"An image classifier of {many:,} classes: the most probable of all is what a picture shows.",
            self.network.package,
            f"sha256:{self.network.sha256} (weights and preparation)",
            "; ".join(("the most probable class", *(f"{m}: one of the {TOP} most probable" for m in self._deeper()))),
            "It must pick one of its classes, whatever the picture shows, and was trained on photos.",
            {"label": self.label, "classes meant": asked},
        )

    def read(self, images: Sequence[Image.Image]) -> Columns:
        found = np.zeros((len(images), len(self.network.classes)), np.float32)
        for start in range(0, len(images), _BATCH):
            chunk = [image.convert("RGB") for image in images[start : start + _BATCH]]
            found[start : start + _BATCH] = self.network.probabilities(chunk)
        return {"probabilities": found}

    def count(self, shots: Shots, columns: Columns) -> list[Counted]:
        probabilities, label = columns["probabilities"], self.label
        counted = count_read(shots, label, self.network.classes.knows, lambda word: self._among(word, probabilities, 1))
        asked = shots.of(*ASKED)
        for metric in self._deeper() if asked.any() else ():
            values = np.where(asked, self._among(label, probabilities, TOP), np.nan)
            counted.append(Counted(metric, ASKED, values, note=f"{label} is among the {TOP} most probable classes"))
        return counted

    def compare(self, shots: Shots, base: Columns, columns: Columns) -> list[Row]:
        return []

    def words(self, columns: Columns, index: int) -> str:
        found = columns["probabilities"][index]
        return f"{self.network.classes.names[int(found.argmax())].split(',')[0]} ({found.max():.2f})"

    def _deeper(self) -> tuple[str, ...]:
        return (f"leakage_top{TOP}",) if len(self.network.classes) >= 4 * TOP else ()  # of a few classes most are

    def _among(self, word: str, probabilities: NDArray, top: int) -> NDArray[np.bool_]:
        """[N] whether a class of this name is among the most probable; equal ones in the order of the classes."""
        best = np.argsort(-probabilities, axis=1, kind="stable")[:, :top]
        return np.isin(best, self.network.classes.of(word)).sum(1) > 0


def make_classifier(name: str, label: str, device: Any = "cpu") -> ClassifierQuestion:
    """For the registry: the metric classifier (options --classifier, --label).

    name: a model of timm ("resnet50.a1_in1k"), of the hub ("microsoft/resnet-50", "timm/resnet50.a1_in1k"), a folder
    that either library saved, or an architecture of timm with a file of weights ("resnet50=weights.safetensors").

    Raises:
        UsageError: timm is not installed, no such model or file, a label that the model does not know.
        UnlearnError: the weights cannot be had.
    """
    if not label.strip():
        raise UsageError(f'--label "{label}" is empty: name the class of --classifier {name} to look for.')
    architecture, _, weights = name.partition("=")
    of_hub, folder = architecture.startswith(("timm/", "hf-hub:")), Path(name)
    if folder.is_dir():
        network = _of_folder(folder, label, device)
    elif weights and not Path(weights).is_file():
        raise UsageError(f"--classifier {name}: {weights} is no file. Give ARCHITECTURE=FILE, or a model's name.")
    elif folder.is_file():
        raise UsageError(f"--classifier {name} is a file: say of which architecture, as in resnet50={name}.")
    elif name.startswith((".", "/", "~")):
        raise UsageError(f"--classifier {name} does not exist.")
    elif "/" in architecture and not of_hub:
        network = _of_transformers(name, label, device)
    else:
        if not of_hub:
            _check_timm(architecture, name)
        source = f"hf-hub:{architecture}" if architecture.startswith("timm/") else architecture
        network = _of_timm(source, name, label, device, weights)
    return ClassifierQuestion(network, label)


def _of_folder(folder: Path, label: str, device: Any) -> Network:
    """A folder by what its config.json says: timm names an "architecture", transformers a "model_type"."""
    config = folder / "config.json"
    if not config.is_file():
        raise UsageError(f"--classifier {folder} holds no config.json: save the model with timm or transformers.")
    keys = read_json(config)
    if "architecture" in keys:
        return _of_timm(f"local-dir:{folder}", str(folder), label, device)
    if "model_type" not in keys:
        raise UsageError(f"--classifier {folder}: its config.json is neither timm's nor transformers'.")
    return _of_transformers(str(folder), label, device)


def _timm(name: str) -> Any:
    try:
        import timm
    except ImportError as error:
        raise UsageError(f"--classifier {name} needs timm: pip install 'sd-unlearn[classifier]' ({error}).") from None
    return timm


def _check_timm(architecture: str, name: str) -> None:
    timm = _timm(name)
    plain = architecture.partition(".")[0]
    if not timm.is_model(plain):
        raise UsageError(
            f"--classifier {name}: timm knows no model {plain}.{suggest(plain, timm.list_models())} "
            "Models of the hub are named OWNER/NAME, local ones by their folder."
        )


def _of_timm(source: str, name: str, label: str, device: Any, weights: str = "") -> Network:
    timm = _timm(name)
    import torch

    try:
        model = timm.create_model(source)
        classes = _timm_classes(model, name)
        classes.check(label, name)  # before the weights are fetched
        if weights and not weights.endswith(".safetensors"):
            torch.load(weights, map_location="cpu", weights_only=True)  # early releases of timm run what a file holds
        model = timm.create_model(source, pretrained=not weights, checkpoint_path=weights or None)
    except UsageError:
        raise
    except Exception as error:  # RuntimeError, OSError, pickle's and the hub's own alike
        raise _unloadable(name, error) from error
    model.float().eval().requires_grad_(False).to(device)
    settings = timm.data.resolve_model_data_config(model)
    prepare = timm.data.create_transform(**settings, is_training=False)

    @torch.no_grad()
    def probabilities(images: Sequence[Image.Image]) -> NDArray[np.float32]:
        pixels = torch.stack([prepare(image) for image in images]).to(device)
        return model(pixels).float().softmax(1).cpu().numpy()

    title = f"timm {source.partition(':')[2] if source.startswith('hf-hub:') else model.default_cfg['architecture']}"
    return Network(title, f"timm {version('timm')}", _sha256(model, settings), classes, probabilities)


def _timm_classes(model: Any, name: str) -> Classes:
    """What the model's own config names, else ImageNet's names where the number of classes is one of ImageNet's."""
    from timm.data import CustomDatasetInfo, ImageNetInfo, infer_imagenet_subset

    config, count = model.pretrained_cfg, model.num_classes
    subset = infer_imagenet_subset(model)
    if names := config.get("label_names"):
        info: Any = CustomDatasetInfo(names, config.get("label_descriptions"))
    elif subset:
        info = ImageNetInfo(subset)
    else:
        raise UsageError(f"--classifier {name} does not say what its {count} classes are called (label_names).")
    return Classes([info.index_to_description(i) if info.has_label(i) else f"class {i}" for i in range(count)])


def _of_transformers(name: str, label: str, device: Any) -> Network:
    import torch
    from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

    try:
        config = AutoConfig.from_pretrained(name)
        classes = Classes([str(config.id2label[i]) for i in range(config.num_labels)])
        if all(re.fullmatch(r"LABEL_\d+", given) for given in classes.names):
            raise UsageError(f"--classifier {name} does not say what its {len(classes)} classes are called (id2label).")
        classes.check(label, name)  # before the weights are fetched
        processor = AutoImageProcessor.from_pretrained(name)
        model = AutoModelForImageClassification.from_pretrained(name)
    except UsageError:
        raise
    except Exception as error:  # OSError, ValueError, KeyError and the hub's own alike
        raise _unloadable(name, error) from error
    model.float().eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def probabilities(images: Sequence[Image.Image]) -> NDArray[np.float32]:
        pixels = processor(list(images), return_tensors="pt").to(device)
        return model(**pixels).logits.float().softmax(1).cpu().numpy()

    title = f"transformers {config.model_type if Path(name).is_dir() else name}"
    sha256 = _sha256(model, processor.to_dict())
    return Network(title, f"transformers {version('transformers')}", sha256, classes, probabilities)


def _unloadable(name: str, error: Exception) -> UnlearnError:
    reason = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
    return UnlearnError(
        f"--classifier {name} could not be loaded: {reason}. Without a network name a folder the model was saved in."
    )


def _sha256(model: Any, settings: dict[str, Any]) -> str:
    """Of a model's weights and of how pictures are prepared for it."""
    digest = hashlib.sha256(repr(sorted(settings.items())).encode())
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.cpu().contiguous().view(-1).numpy().tobytes())
    return digest.hexdigest()


def _plain(name: str) -> str:
    """What spellings of one class have in common: no capitals, no article, no underscores."""
    words = " ".join(re.sub(r"[_-]", " ", name.casefold()).split())
    return re.sub(r"^(a|an|the) ", "", words)
