"""Tiny random classifiers of both libraries from every supported source, and their values per image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from metric_tools import by_metric, make_prompted, pictures

from sd_unlearn.data.concept import Concept
from sd_unlearn.errors import UnlearnError, UsageError
from sd_unlearn.metrics.classifier import Classes, ClassifierMetric, Network, make_classifier

pytestmark = pytest.mark.usefixtures("one_thread")
CHURCH = Concept("church", "a photo of a church", "a photo of a building", kind="object")
NAMES = ["tench, Tinca tinca", "church, church building", "gas_pump", "golf ball"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model saved by either library, and a file of weights of each kind."""
    timm = pytest.importorskip("timm")
    import torch
    from safetensors.torch import save_file
    from transformers import ConvNextImageProcessor, ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("classifiers")
    model = timm.create_model("test_resnet", num_classes=4)
    timm.models.save_for_hf(model, folder / "timm", model_config={"label_names": NAMES}, safe_serialization=True)
    timm.models.save_for_hf(model, folder / "nameless", safe_serialization=True)
    names = dict(enumerate(NAMES))
    config = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        id2label=names,
        label2id={name: i for i, name in names.items()},
    )
    ResNetForImageClassification(config).save_pretrained(folder / "transformers")
    ConvNextImageProcessor(size={"shortest_edge": 32}).save_pretrained(folder / "transformers")
    ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], num_labels=3)
    ).save_pretrained(folder / "labels")
    imagenet = timm.create_model("test_resnet")
    torch.save(imagenet.state_dict(), folder / "weights.pth")
    save_file(imagenet.state_dict(), folder / "weights.safetensors")
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize("kind", ["timm", "transformers"])
def test_saved_model_folder(folders: dict[str, Path], kind: str) -> None:
    metric = make_classifier(str(folders[kind]), "Church Building")
    images = pictures(35)  # more than one batch
    found = metric.read(images)["probabilities"]
    assert found.shape == (35, 4)
    assert found.sum(1) == pytest.approx(np.ones(35), abs=1e-5)
    assert np.ptp(found, axis=0).max() > 1e-5  # or nothing was shown
    assert metric.read(images[::-1])["probabilities"][::-1] == pytest.approx(found, abs=1e-5)
    assert metric.read(images[33:34])["probabilities"] == pytest.approx(found[33:34], abs=1e-5)
    assert metric.read([])["probabilities"].shape == (0, 4)
    assert kind in metric.name
    assert str(folders[kind]) not in metric.name
    assert metric.name == make_classifier(str(folders[kind]), "tench").name  # the same reading, another metric
    card = metric.card()
    assert (card.detector, card.extra["classes meant"]) == (metric.name, "church, church building")


def test_timm_preprocessing_matches_timm(folders: dict[str, Path]) -> None:
    """Compare with timm used directly: the folder's weights and preprocessing."""
    import timm
    import torch

    model = timm.create_model(f"local-dir:{folders['timm']}", pretrained=True).eval()
    prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    image = pictures(1, size=(200, 160))[0]
    with torch.no_grad():
        want = model(prepare(image)[None]).softmax(1).numpy()
    got = make_classifier(str(folders["timm"]), "church").read([image])["probabilities"]
    assert got == pytest.approx(want, abs=1e-6)


def test_architecture_with_weights_file(folders: dict[str, Path]) -> None:
    pickled = make_classifier(f"test_resnet={folders['weights.pth']}", "church building")
    safe = make_classifier(f"test_resnet={folders['weights.safetensors']}", "church")
    assert pickled.name == safe.name  # the weights' content is the name, not their file
    found = [q.read(pictures(2))["probabilities"] for q in (pickled, safe)]
    assert found[0] == pytest.approx(found[1])
    assert pickled.network.classes.names[497] == "church, church building"  # ImageNet's names
    assert "leakage_top5" in pickled.card().metrics


def test_classes_are_found_by_any_name() -> None:
    classes = Classes([*NAMES, "crane", "crane, a bird"])
    for name in ("Tinca  Tinca", "a tench", "tench, Tinca tinca"):
        assert classes.indices_of(name) == [0]
    assert classes.indices_of("gas pump") == classes.indices_of("The Gas-Pump") == [2]
    assert classes.indices_of("crane") == [4, 5]
    assert not classes.has("pump")
    classes.check("church", "some-model")
    with pytest.raises(UsageError, match=r'"curch".*6 classes.*some-model.*Did you mean "church"'):
        classes.check("curch", "some-model")


def metric_of(names: list[str], label: str) -> ClassifierMetric:
    return ClassifierMetric(Network("a net", "a net 1", "0" * 64, Classes(names), lambda _: np.zeros((0, 0))), label)


def test_values_per_image() -> None:
    cells: list[tuple[str, str, tuple[str, ...]]] = [
        ("direct", "", ()),
        ("held_out", "", ()),
        ("generic", "", ()),
        ("alike", "", ("tench",)),
        ("alike", "", ("golf ball",)),
        ("general", "", ("a unicorn",)),
        ("general", "", ()),
    ]
    top = [1, 0, 1, 0, 1, 1, 1]
    counted = metric_of(NAMES, "church").count(make_prompted(CHURCH, cells), {"probabilities": np.eye(4)[top]})
    assert by_metric(counted) == {
        "leakage": [1, 0, 1, None, None, None, None],
        "accuracy": [None, None, None, 1, 0, None, None],
    }
    assert metric_of(NAMES, "church").words({"probabilities": np.eye(4)[top] * 0.75}, 0) == "church (0.75)"


def test_leakage_top5() -> None:
    names = [*(f"thing {i}" for i in range(20)), "church", "church"]  # two classes of one name
    first, fifth, sixth = np.zeros((3, 22))
    first[21], fifth[20], sixth[[20, 21]] = 0.9, 0.1, 0.05
    fifth[:4], sixth[:5] = 0.2, 0.1
    prompted = make_prompted(CHURCH, [("direct", "", ())] * 3)
    counted = metric_of(names, "church").count(prompted, {"probabilities": np.stack([first, fifth, sixth])})
    assert by_metric(counted) == {"leakage": [1, 0, 0], "leakage_top5": [1, 1, 0]}


def test_unknown_label_is_refused_before_weights_are_read(folders: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    for kind in ("timm", "transformers"):
        shutil.copytree(folders[kind], tmp_path / kind)
        (tmp_path / kind / "model.safetensors").write_bytes(b"no weights")
        with pytest.raises(UsageError, match=r'--label "golf bal".*Did you mean "golf ball"'):
            make_classifier(str(tmp_path / kind), "golf bal")
        with pytest.raises(UnlearnError, match=f"--classifier .*{kind} could not be loaded") as caught:
            make_classifier(str(tmp_path / kind), "golf ball")
        assert caught.value.exit_code == 1
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("resnet5O", 'timm has no model resnet5O. Did you mean "resnet50"'),
        ("./nowhere", "./nowhere does not exist"),
        ("resnet50=nowhere.pth", "nowhere.pth is not a file"),
        ("{folder}", "holds no config.json"),
        ("{weights.pth}", "Add its architecture"),
        ("{nameless}", "no names for its 4 classes"),
        ("{labels}", "no names for its 3 classes"),
    ],
)
def test_invalid_classifier_is_refused(folders: dict[str, Path], tmp_path: Path, name: str, match: str) -> None:
    for key, path in {"folder": tmp_path, **folders}.items():
        name = name.replace(f"{{{key}}}", str(path))
    with pytest.raises(UsageError, match=match):
        make_classifier(name, "church")


def test_empty_label_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="--label"):
        make_classifier(str(folders["timm"]), " ")


@pytest.mark.parametrize("name", ["microsoft/resnet-50", "timm/resnet50.a1_in1k", "resnet18.a1_in1k"])
def test_failed_download(name: str) -> None:
    pytest.importorskip("timm")
    with pytest.raises(UnlearnError, match=f"--classifier {name} could not be loaded") as caught:
        make_classifier(name, "church")
    assert caught.value.exit_code == 1
