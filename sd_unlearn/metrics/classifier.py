"""Image classifiers of timm and transformers: is the concept the predicted class of each image?

The classes are those of the model. A class can be given by any of its names ("tench, Tinca tinca" has two).
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

from sd_unlearn.errors import UnlearnError, UsageError, install_command, reason, suggest
from sd_unlearn.io.noise import silence_libraries
from sd_unlearn.io.reading import read_json
from sd_unlearn.metrics.base import CONCEPT_GROUPS, DetectorOutput, ImageValues, PromptedImages
from sd_unlearn.metrics.labels import leakage_and_accuracy
from sd_unlearn.models.halving import FOR_METRIC, HalvingBatches
from sd_unlearn.results import Card, Row

TOP = 5
_BATCH = 32


class Classes:
    """The classes of a model, found by any of their names; case, underscores and a leading article are ignored."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)  # "tench, Tinca tinca"
        self.indices: dict[str, list[int]] = {}
        for index, synonyms in enumerate(names):
            for name in {_normalize(synonyms), *map(_normalize, synonyms.split(","))}:
                self.indices.setdefault(name, []).append(index)

    def __len__(self) -> int:
        return len(self.names)

    def has(self, name: str) -> bool:
        return _normalize(name) in self.indices

    def indices_of(self, name: str) -> list[int]:
        """The classes of this name: usually one, but ImageNet has two classes named crane."""
        return self.indices[_normalize(name)]

    def check(self, label: str, name: str) -> None:
        """Raises UsageError if `label` is not a class of the model `name`."""
        if not self.has(label):
            examples = "; ".join(self.names[:5]) + ("; ..." if len(self) > 5 else "")
            raise UsageError(
                f'--label "{label}" is not one of the {len(self)} classes of --classifier {name}.'
                f"{suggest(_normalize(label), self.indices)} Choose one of its classes: {examples}"
            )


@dataclass(frozen=True)
class Network:
    """A classifier of either library."""

    title: str  # library and architecture
    package: str  # and its version
    sha256: str  # of the weights and the preprocessing
    classes: Classes
    probabilities: Callable[[Sequence[Image.Image]], NDArray[np.float32]]  # B > 0 RGB images -> [B, C]


class ClassifierMetric:
    """Leakage: the concept is the most probable of all classes. Output: "probabilities" [N, C].

    Args:
        label: One of the model's classes by any of its names, e.g. "church" for "church, church building".

    Raises:
        UsageError: the model has no such class.
    """

    def __init__(self, network: Network, label: str) -> None:
        network.classes.check(label, network.title)
        self.network, self.label = network, label
        self.batches = HalvingBatches("classifying images", FOR_METRIC)
        self.name = f"{network.title} sha256:{network.sha256[:12]}"

    def card(self) -> Card:
        classes = self.network.classes
        top = self._top_metrics()
        return Card(
            self.name,
            ("leakage", *top, "accuracy"),
            f"An image classifier of {len(classes):,} classes; an image shows the most probable one.",
            self.network.package,
            f"sha256:{self.network.sha256} (weights and preprocessing)",
            "; ".join(("the most probable class", *(f"{metric}: one of the {TOP} most probable" for metric in top))),
            "It always predicts one of its classes, whatever the image shows, and was trained on photos.",
            {"label": self.label, "classes meant": "; ".join(classes.names[i] for i in classes.indices_of(self.label))},
        )

    def read(self, images: Sequence[Image.Image]) -> DetectorOutput:
        def read(batch: Sequence[Image.Image]) -> NDArray[np.float32]:
            return self.network.probabilities([image.convert("RGB") for image in batch])

        none = np.zeros((0, len(self.network.classes)), np.float32)
        return {"probabilities": np.concatenate([none, *self.batches.map(read, images, _BATCH)])}

    def count(self, prompted: PromptedImages, output: DetectorOutput) -> list[ImageValues]:
        probabilities, label = output["probabilities"], self.label

        def most_probable(word: str) -> NDArray[np.bool_]:
            return self._among_top(word, probabilities, 1)

        values_of = leakage_and_accuracy(prompted, label, self.network.classes.has, most_probable)
        in_concept_groups = prompted.in_groups(*CONCEPT_GROUPS)
        for metric in self._top_metrics() if in_concept_groups.any() else ():
            leaks = np.where(in_concept_groups, self._among_top(label, probabilities, TOP), np.nan)
            note = f"{label} is among the {TOP} most probable classes"
            values_of.append(ImageValues(metric, CONCEPT_GROUPS, leaks, note=note))
        return values_of

    def compare(self, prompted: PromptedImages, base: DetectorOutput, output: DetectorOutput) -> list[Row]:
        return []

    def words(self, output: DetectorOutput, index: int) -> str:
        probabilities = output["probabilities"][index]
        return f"{self.network.classes.names[int(probabilities.argmax())].split(',')[0]} ({probabilities.max():.2f})"

    def _top_metrics(self) -> tuple[str, ...]:
        """leakage_top5, unless the model has so few classes that most are among the top 5."""
        return (f"leakage_top{TOP}",) if len(self.network.classes) >= 4 * TOP else ()

    def _among_top(self, name: str, probabilities: NDArray, top: int) -> NDArray[np.bool_]:
        """[N] whether a class of this name is among the most probable; ties in the order of the classes."""
        best = np.argsort(-probabilities, axis=1, kind="stable")[:, :top]
        return np.isin(best, self.network.classes.indices_of(name)).sum(1) > 0


def make_classifier(name: str, label: str, device: Any = "cpu") -> ClassifierMetric:
    """For the registry: the metric classifier (options --classifier, --label).

    Args:
        name: A timm model ("resnet50.a1_in1k"), a Hub model ("microsoft/resnet-50", "timm/resnet50.a1_in1k"), a folder
            that either library saved, or a timm architecture with a weights file ("resnet50=weights.safetensors").

    Raises:
        UsageError: timm is not installed, the model or file does not exist, or the model has no such class.
        UnlearnError: the weights cannot be downloaded or read.
    """
    if not label.strip():
        raise UsageError(f'--label "{label}" is empty. Give the concept\'s class of --classifier {name}.')
    architecture, _, weights = name.partition("=")
    on_timm_hub, folder = architecture.startswith(("timm/", "hf-hub:")), Path(name)
    if folder.is_dir():
        network = _of_folder(folder, label, device)
    elif weights and not Path(weights).is_file():
        raise UsageError(f"--classifier {name}: {weights} is not a file. Give ARCHITECTURE=FILE, or a model's name.")
    elif folder.is_file():
        raise UsageError(f"--classifier {name} is a file. Add its architecture, as in resnet50={name}.")
    elif name.startswith((".", "/", "~")):
        raise UsageError(f"--classifier {name} does not exist.")
    elif "/" in architecture and not on_timm_hub:
        network = _of_transformers(name, label, device)
    else:
        if not on_timm_hub:
            _check_timm(architecture, name)
        source = f"hf-hub:{architecture}" if architecture.startswith("timm/") else architecture
        network = _of_timm(source, name, label, device, weights)
    return ClassifierMetric(network, label)


def _of_folder(folder: Path, label: str, device: Any) -> Network:
    """A saved model; its config.json has an "architecture" (timm) or a "model_type" (transformers)."""
    config = folder / "config.json"
    if not config.is_file():
        raise UsageError(f"--classifier {folder} holds no config.json. Save the model with timm or transformers.")
    keys = read_json(config)
    if not isinstance(keys, dict):
        raise UsageError(f"--classifier {folder}: config.json must hold keys and values, not {type(keys).__name__}.")
    if "architecture" in keys:
        return _of_timm(f"local-dir:{folder}", str(folder), label, device)
    if "model_type" not in keys:
        raise UsageError(f"--classifier {folder}: config.json is neither timm's nor transformers'.")
    return _of_transformers(str(folder), label, device)


def _timm(name: str) -> Any:
    try:
        import timm
    except ImportError as error:
        raise UsageError(
            f"--classifier {name} needs timm: {install_command('classifier')} ({reason(error)})."
        ) from None
    return timm


def _check_timm(architecture: str, name: str) -> None:
    timm = _timm(name)
    model = architecture.partition(".")[0]
    if not timm.is_model(model):
        raise UsageError(
            f"--classifier {name}: timm has no model {model}.{suggest(model, timm.list_models())} "
            "Give models of the Hub as OWNER/NAME and local models by their folder."
        )


def _of_timm(source: str, name: str, label: str, device: Any, weights: str = "") -> Network:
    timm = _timm(name)
    import torch

    try:
        model = timm.create_model(source)
        classes = _timm_classes(model, name)
        classes.check(label, name)  # before the weights are downloaded
        if weights and not weights.endswith(".safetensors"):
            torch.load(weights, map_location="cpu", weights_only=True)  # old releases of timm run code in the file
        model = timm.create_model(source, pretrained=not weights, checkpoint_path=weights or None)
    except UsageError:
        raise
    except Exception as error:  # RuntimeError, OSError, pickle and Hub errors
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
    """The class names in the model's config, else ImageNet's if the number of classes matches."""
    from timm.data import CustomDatasetInfo, ImageNetInfo, infer_imagenet_subset

    config, count = model.pretrained_cfg, model.num_classes
    subset = infer_imagenet_subset(model)
    if names := config.get("label_names"):
        info: Any = CustomDatasetInfo(names, config.get("label_descriptions"))
    elif subset:
        info = ImageNetInfo(subset)
    else:
        raise UsageError(f"--classifier {name} has no names for its {count} classes (label_names).")
    return Classes([info.index_to_description(i) if info.has_label(i) else f"class {i}" for i in range(count)])


def _of_transformers(name: str, label: str, device: Any) -> Network:
    import torch

    silence_libraries()
    from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

    try:
        config = AutoConfig.from_pretrained(name)
        classes = Classes([str(config.id2label[i]) for i in range(config.num_labels)])
        if all(re.fullmatch(r"LABEL_\d+", given) for given in classes.names):
            raise UsageError(f"--classifier {name} has no names for its {len(classes)} classes (id2label).")
        classes.check(label, name)  # before the weights are downloaded
        processor = AutoImageProcessor.from_pretrained(name)
        model = AutoModelForImageClassification.from_pretrained(name)
    except UsageError:
        raise
    except Exception as error:  # OSError, ValueError, KeyError and Hub errors
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
    return UnlearnError(
        f"--classifier {name} could not be loaded: {reason(error)}. Without a network, give a saved model's folder."
    )


def _sha256(model: Any, settings: dict[str, Any]) -> str:
    """Of the weights and the preprocessing."""
    digest = hashlib.sha256(repr(sorted(settings.items())).encode())
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.cpu().contiguous().view(-1).numpy().tobytes())
    return digest.hexdigest()


def _normalize(name: str) -> str:
    """Lower case, without underscores, hyphens and a leading article."""
    words = " ".join(re.sub(r"[_-]", " ", name.casefold()).split())
    return re.sub(r"^(a|an|the) ", "", words)
