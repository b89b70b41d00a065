"""What holds for every metric: missing weights are found before images are generated; one card per detector."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
from evaluation_runs import make_run
from pictures_of_people import save
from PIL import Image

from sd_unlearn import sweep
from sd_unlearn.config.evaluate import EvaluateConfig
from sd_unlearn.config.train import TrainConfig
from sd_unlearn.data.concept import Concept
from sd_unlearn.errors import UnlearnError, UsageError
from sd_unlearn.evaluation import evaluate, generate
from sd_unlearn.metrics import digits
from sd_unlearn.metrics.registry import NAMES, MetricContext, find_detectors, find_metrics, merge_cards
from sd_unlearn.training import trainer


@pytest.fixture
def no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No weights of any metric: neither bundled nor in a cache, and no network."""

    def no_network(*_: Any, **__: Any) -> None:
        raise URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    monkeypatch.setattr("torch.hub.urlopen", no_network)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(digits.DigitsClassifier, "reader", replace(digits.READER, folder=tmp_path))
    with contextlib.suppress(ImportError):
        import nudenet

        monkeypatch.setattr(nudenet, "__file__", str(tmp_path / "__init__.py"))


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("name", [name for name in NAMES if name != "emoji"])  # has no label seven
def test_missing_weights_are_found_before_images_are_generated(
    name: str, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "load_base", lambda *_: pytest.fail("the base was loaded"))
    run = make_run(tmp_path / "run", tiny_base)
    options: dict[str, dict[str, Any]] = {
        "classifier": {"classifier": "resnet18.a1_in1k", "label": "tench"},
        "identity": {"others": tmp_path / "others", "reference": [str(tmp_path / "reference")]},
    }
    for number, folder in enumerate(("others", "reference")):
        save(tmp_path / folder, Image.new("RGB", (32, 32), (number, 0, 0)))
    config = EvaluateConfig(run=run, metrics=[name], **options.get(name, {}))
    with pytest.raises(UnlearnError, match="could not (be|load)|pip install|does not exist"):
        evaluate.run(config)


class Red:
    """A face model that finds one face on images that are red."""

    def find(self, image: Image.Image) -> list[str]:
        return ["a face"] * (image.convert("RGB").getpixel((0, 0)) == (255, 0, 0))


@pytest.mark.parametrize("faceless", ["reference", "others"])
def test_a_folder_without_any_face_is_found_before_images_are_generated(
    faceless: str, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "load_base", lambda *_: pytest.fail("the base was loaded"))
    monkeypatch.setattr("sd_unlearn.metrics.faces.make_face_model", lambda *_: Red())
    monkeypatch.setattr("sd_unlearn.metrics.faces.check_face_model", lambda *_: None)
    monkeypatch.setattr("sd_unlearn.metrics.identity.check_face_model", lambda *_: None)
    for number, folder in enumerate(("reference", "others")):
        blue = Image.new("RGB", (32, 32), (0, number, 255))
        save(tmp_path / folder, blue, *[Image.new("RGB", (32 + number, 32), "red")] * (folder != faceless))
    run = make_run(tmp_path / "run", tiny_base)
    folders = {"reference": [str(tmp_path / "reference")], "others": tmp_path / "others"}
    with pytest.raises(UsageError, match=f"--{faceless} .*no face was found on any of its 1 images"):
        evaluate.run(EvaluateConfig(run=run, metrics=["identity"], **folders))


@pytest.mark.usefixtures("no_weights")
def test_missing_weights_of_optional_metrics_are_one_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    concept = Concept("x", "a photo of x", "a photo", kind="nudity", alternatives=["y"])
    options = EvaluateConfig(clip_model="ViT-B-32", clip_pretrained="")
    with pytest.raises(UnlearnError, match="NudeNet"):
        find_metrics(MetricContext(concept, options, None, "quick"))
    style = replace(concept, kind="style")
    names = find_metrics(MetricContext(style, options, None, "quick"))
    lines = capsys.readouterr().err.splitlines()
    assert "clip" in names
    assert "lpips" not in names
    assert [line for line in lines if line.startswith("Skipped metric lpips: ") and "AlexNet" in line]


@pytest.mark.usefixtures("no_weights")
def test_commands_that_only_detect_do_not_look_for_weights_of_other_metrics() -> None:
    options = EvaluateConfig(metrics=["lpips", "clip"], clip_model="ViT-B-32", clip_pretrained="")
    context = MetricContext(Concept("x", "a photo of x", "a photo", alternatives=["y"]), options, None, "quick")
    assert find_detectors(context) == ["clip"]
    with pytest.raises(UnlearnError, match="AlexNet"):
        find_metrics(context)


def test_cards_of_a_detector_are_merged() -> None:
    shared = {"detector": "resnet50", "about": "a classifier"}
    cards = [{**shared, "extra": {"label": label, "side": "224"}} for label in ("church", "tench", "church")]
    other = {"detector": "clip", "about": "", "extra": {}}
    assert merge_cards([*cards, other]) == [{**shared, "extra": {"label": "church; tench", "side": "224"}}, other]
    assert cards[0]["extra"]["label"] == "church"


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("options", [{"probe": "leakage", "probe_steps": 5}, {"beta_sweep": "0.5,1"}])
def test_missing_weights_are_found_before_a_training(
    options: dict[str, Any], tiny_base: Path, concept_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("open_clip")
    monkeypatch.setattr(trainer, "load_base", lambda *_: pytest.fail("the base was loaded"))
    monkeypatch.setattr("sd_unlearn.training.probe_checks.labels_of", lambda _: ("Brad Pitt", "a dog", "a cat"))
    config = TrainConfig(concept=str(concept_file), pretrained_model_name_or_path=str(tiny_base), **options)
    with pytest.raises(UnlearnError, match="--clip_pretrained .* could not be loaded"):
        (sweep if config.beta_sweep else trainer).run(config)
    assert not Path("data").exists()
