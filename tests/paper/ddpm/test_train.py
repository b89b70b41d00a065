"""Training a DDPM of the paper: batches, network, resuming after a kill, beta estimated while training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, UNet2DModel
from PIL import Image

from sd_unlearn.errors import UnlearnError, UsageError
from sd_unlearn.io.reading import read_jsonl
from sd_unlearn.io.run_folder import METRICS
from sd_unlearn.paper.ddpm import train as train_module
from sd_unlearn.paper.ddpm import unet
from sd_unlearn.paper.ddpm.datasets import ImageData
from sd_unlearn.paper.ddpm.split import split
from sd_unlearn.paper.ddpm.train import TrainingJob, encoded_images, layout_of, train
from sd_unlearn.paper.ddpm.unet import load_network, make_network, make_schedule, save_pipeline
from sd_unlearn.paper.experiments import CLASSES, EXPERIMENTS, TINY_SIDE, Counts
from sd_unlearn.paper.options import RunOptions
from sd_unlearn.paper.settings import resolve
from sd_unlearn.training.state import TrainingState

SIDE = TINY_SIDE
COUNTS = Counts(22, 6, 12)
Make = Callable[..., TrainingJob]


def digits(count: int = 100) -> ImageData:
    """Ten classes of noise images."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 28, 28), dtype=np.uint8)
    labels = np.arange(count) % 10
    return ImageData("mnist5k", CLASSES["mnist5k"], labels, 1, lambda i: Image.fromarray(pixels[i]), "0" * 64)


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """A run of a few steps with a network of a few thousand weights."""
    small = {
        "block_out_channels": (8, 16, 16),
        "layers_per_block": 1,
        "attention": 2,
        "norm_num_groups": 4,
        "attention_head_dim": 8,
    }
    monkeypatch.setitem(unet._SHAPES, "tiny", small)

    def build(folder: str = "run", checkpointing_steps: int = 0, **options: Any) -> TrainingJob:
        experiment = EXPERIMENTS["mnist5k-even"]
        asked = RunOptions(**({"max_train_steps": 4, "train_batch_size": 6} | options))
        settings, _, size = resolve(experiment, asked)
        data = digits()
        images = split(
            data.labels,
            [0, 2, 4, 6, 8],
            [1, 3, 5, 7, 9],
            COUNTS,
            asked.seed,
            [int(m) for m in settings.missing],
            min(settings.num_negative, 10),
        )
        return TrainingJob(experiment, settings, size, asked.seed, data, images, tmp_path / folder, checkpointing_steps)

    return build


def weights(run: TrainingJob) -> dict[str, torch.Tensor]:
    return load_network(str(run.folder / "pipeline"), SIDE, 1)[0].state_dict()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def train_until_saved(run: TrainingJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train until the first checkpoint is written, then die."""

    class Killed(Exception):
        pass

    saved = TrainingState.save

    def save_and_die(state: TrainingState, *rest: Any) -> None:
        saved(state, *rest)
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(TrainingState, "save", save_and_die)
        with pytest.raises(Killed):
            train(run)


@pytest.mark.parametrize(
    "options",
    [
        {"objective": "pu"},
        {"objective": "unsupervised"},
        {"objective": "supervised"},
        {"objective": "pnu"},
        {"conditional": True},
        {"correction": "nn"},
        {"correction": "none"},
        {"beta": "known"},
        {"missing": "9"},
        {"reduction": "mean"},
    ],
    ids=str,
)
def test_every_configuration_trains_and_saves_a_loadable_pipeline(make: Make, options: dict[str, Any]) -> None:
    run = make(**options)
    cost = train(run)
    assert cost["steps"] == 4
    lines = read_jsonl(run.folder / METRICS)
    assert np.isfinite([line["loss"] for line in lines]).all()
    pipeline = DDPMPipeline.from_pretrained(str(run.folder / "pipeline"))
    assert isinstance(pipeline.unet, UNet2DModel)
    torch.manual_seed(train_module.TRAIN_SEEDS[0] + run.seed)
    assert not same(make_network("tiny", SIDE, 1, run.settings.conditions).state_dict(), weights(run))


def test_weights_depend_only_on_the_seed(make: Make) -> None:
    found = []
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        run = make(folder, seed=seed)
        train(run)
        found.append(weights(run))
    assert same(found[0], found[1])
    assert not same(found[0], found[2])


def test_a_killed_training_resumes_to_the_same_weights(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make("whole")
    train(whole)

    broken = make("broken", checkpointing_steps=2)
    train_until_saved(broken, monkeypatch)
    assert not (broken.folder / "pipeline").exists()
    train(broken)
    assert same(weights(whole), weights(broken))


def test_a_checkpoint_of_other_settings_is_refused(make: Make) -> None:
    train(make("run", checkpointing_steps=2))
    with pytest.raises(UsageError, match=r"--beta was 0\.1 and is 0\.2"):
        train(make("run", checkpointing_steps=2, beta=0.2))


def test_every_objective_has_the_same_number_of_unlabeled_images(make: Make) -> None:
    seen = {name: layout_of(make(objective=name).settings) for name in ("pu", "supervised", "unsupervised", "pnu")}
    assert {layout.unlabeled for layout in seen.values()} == {6}
    assert {name: layout.positive for name, layout in seen.items()} == {
        "pu": 2,
        "supervised": 2,
        "unsupervised": 0,
        "pnu": 2,
    }
    assert seen["pnu"].negative == 2
    groups = [
        [e.group for e in encoded_images(make(objective=name)).examples] for name in ("unsupervised", "pu", "pnu")
    ]
    assert [set(g) for g in groups] == [
        {"generic", "mixed_in"},
        {"generic", "mixed_in", "positive"},
        {"generic", "mixed_in", "positive", "negative"},
    ]


def test_labels_do_not_affect_the_unsupervised_objective(make: Make) -> None:
    run = make("a", objective="unsupervised")
    others = dataclasses.replace(make("b", objective="unsupervised"))
    others = dataclasses.replace(others, split=dataclasses.replace(others.split, positive=others.split.positive[::-1]))
    train(run)
    train(others)
    assert same(weights(run), weights(others))


def test_the_condition_is_a_digit_pair_that_does_not_reveal_the_sensitive_digit(make: Make) -> None:
    run = make(conditional=True)
    images = encoded_images(run)
    classes = {int(run.data.labels[int(e.path.name)]): int(images.text[e.caption]) for e in images.examples}
    assert classes == {digit: digit // 2 for digit in range(10)}
    assert set(encoded_images(make()).text) == {"0"}


def test_a_beta_estimated_while_training_is_used_and_reported(make: Make) -> None:
    run = make(beta="estimate", max_train_steps=20)
    cost = train(run)
    assert [found["step"] for found in cost["betas"]] == list(range(2, 21, 2))
    for found in cost["betas"]:
        assert 0 < found["beta_low"] <= found["beta"] <= found["beta_high"] < 1
    fixed = make("fixed", max_train_steps=20)
    train(fixed)
    assert not same(weights(run), weights(fixed))


def test_an_estimated_beta_survives_a_kill(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make("whole", beta="estimate", max_train_steps=20)
    expected = train(whole)["betas"]
    taken: list[float] = []
    use_beta = TrainingState.use_beta

    def remember(state: TrainingState, beta: float) -> None:
        taken.append(beta)
        use_beta(state, beta)

    broken = make("broken", checkpointing_steps=11, beta="estimate", max_train_steps=20)
    train_until_saved(broken, monkeypatch)
    monkeypatch.setattr(TrainingState, "use_beta", remember)
    found = train(broken)["betas"]
    assert taken[0] == expected[4]["beta"]  # of step 10, the last before the checkpoint
    assert found == expected
    assert same(weights(whole), weights(broken))


def test_the_paper_network_has_the_published_architecture() -> None:
    with torch.device("meta"):
        unet = make_network("paper", 32, 1)
    assert unet.config.block_out_channels == (128, 128, 256, 512)
    assert unet.config.down_block_types == ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D")
    assert unet.config.up_block_types == ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D")
    with torch.device("meta"):
        tiny = make_network("tiny", SIDE, 1)
    assert 0.8e6 < sum(p.numel() for p in tiny.parameters()) < 1.2e6


def test_fine_tuning_starts_from_the_given_model(make: Make, tmp_path: Path) -> None:
    torch.manual_seed(0)
    unet = make_network("tiny", SIDE, 1)
    save_pipeline(unet, make_schedule(), tmp_path / "theirs")
    base = str(tmp_path / "theirs" / "pipeline")
    run = make(pretrained_model_name_or_path=base, max_train_steps=1, learning_rate=1e-9)
    train(run)
    for name, value in weights(run).items():
        assert torch.allclose(value, unet.state_dict()[name], atol=1e-6), name


def test_models_of_other_shapes_are_refused_with_the_reason(tmp_path: Path) -> None:
    save_pipeline(make_network("tiny", SIDE, 3), make_schedule(), tmp_path)
    place = str(tmp_path / "pipeline")
    with pytest.raises(UsageError, match="3 channels; this experiment needs 1"):
        load_network(place, SIDE, 1)
    with pytest.raises(UsageError, match="images of 12 pixels; this experiment needs 32"):
        load_network(place, 32, 3)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"no model_index\.json"):
        load_network(str(tmp_path / "empty"), SIDE, 3)
    with pytest.raises(UnlearnError, match="google/ddpm-cifar10-32 cannot be loaded"):
        load_network("google/ddpm-cifar10-32", 32, 3)
