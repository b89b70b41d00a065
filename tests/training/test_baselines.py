"""Trainings with the objectives of other papers: micro-batches, resuming, and what they see."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from train_runs import ADAPTER, Config, logged, make, rendered

from sd_unlearn.data.batch import NO_GROUP, Batch
from sd_unlearn.errors import UsageError
from sd_unlearn.io.reading import read_json, read_yaml
from sd_unlearn.training import loop, trainer
from sd_unlearn.training.state import TrainingState

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def place(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rendered(tmp_path_factory.mktemp("place"), tiny_base)


@pytest.fixture(scope="module")
def make_config(place: Path, tiny_base: Path) -> Config:
    usual = {"lora_dropout": 0.0, "max_train_steps": 3, "effective_batch_size": 10, "train_batch_size": None}
    return lambda output, **changes: make(place, tiny_base, output, **(usual | changes))


def weights(run: Path) -> Tensor:
    return torch.cat([value.flatten() for _, value in sorted(load_file(run / ADAPTER).items())])


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("esd-u", "neggrad")]


@pytest.mark.parametrize("name", ["esd-x", "anchor", *SLOW])
def test_a_baseline_is_cut_and_resumed_as_pu_is(
    make_config: Config, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    # The tiny base is worse than predicting 0, so positives of neggrad have no gradient. With a teacher, keep images
    # have none in the first step either, and Adam would amplify rounding errors.
    chosen = {"objective": name, "target": "noise" if name == "neggrad" else "teacher"}
    whole = trainer.run(make_config("whole", **chosen, checkpointing_steps=2))
    assert weights(whole).isfinite().all()
    lines = logged(whole)
    assert [line["bracket"] for line in lines] == [0.0] * len(lines)
    cut = trainer.run(make_config("cut", **chosen, train_batch_size=4))
    assert (weights(cut) - weights(whole)).abs().max() <= 1e-4 * weights(whole).abs().max()

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        take_step = TrainingState.take_step
        patch.setattr(
            TrainingState,
            "take_step",
            lambda state, *rest: stop() if state.step == 2 else take_step(state, *rest),
        )
        with pytest.raises(KeyboardInterrupt):
            trainer.run(make_config("run", **chosen, checkpointing_steps=2))
    run = trainer.run(make_config("run", **chosen, checkpointing_steps=2, resume_from_checkpoint="latest"))
    assert (run / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()


def rows(config: object, monkeypatch: pytest.MonkeyPatch) -> Batch:
    """The images of a run's first step."""
    seen: list[Batch] = []

    def first(options: object, training: loop.Training, resume: object = None) -> None:
        seen.append(next(iter(training.batches)))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("sd_unlearn.training.loop.fit", first)
        with pytest.raises(KeyboardInterrupt):
            trainer.run(config)  # type: ignore[arg-type]
    return seen[0]


@pytest.mark.parametrize(
    ("name", "positive", "groups"),
    [("esd-x", 6, [6]), ("esd-u", 6, [6]), ("neggrad", 6, [6]), ("anchor", 0, [3, 3])],
)
def test_the_images_of_a_step(
    make_config: Config, monkeypatch: pytest.MonkeyPatch, name: str, positive: int, groups: list[int]
) -> None:
    """60 % of 10 images under the concept's caption (anchor: also under the generic one), 40 % keep images."""
    batch = rows(make_config("run", objective=name, overwrite=True), monkeypatch)
    assert (batch.is_positive & (batch.caption_group != NO_GROUP)).sum() == positive
    assert [(batch.caption_group == g).sum() for g in range(batch.num_groups)] == groups
    assert (batch.caption_group == NO_GROUP).sum() == 4
    if name != "neggrad":
        alone = rows(make_config("run", objective=name, retain=False, overwrite=True), monkeypatch)
        assert len(alone.label) == 10
        assert (alone.caption_group != NO_GROUP).all()


def test_anchor_leaves_out_images_known_to_show_the_concept(
    make_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 of the 6 unlabeled images were generated from the concept's caption; the others are seen."""
    batch = rows(make_config("run", objective="anchor", effective_batch_size=40, overwrite=True), monkeypatch)
    generic = batch.teacher_text[batch.caption_group == 0]
    assert len(generic) == 12
    assert (generic == generic[0]).all()


@pytest.mark.parametrize(("name", "chosen"), [("esd-x", True), ("esd-u", False)])
def test_esd_trains_its_own_layers(make_config: Config, name: str, chosen: bool) -> None:
    run = trainer.run(make_config("run", objective=name, max_train_steps=1))
    layers = {key.removesuffix(".weight") for key in load_file(run / ADAPTER)}
    assert {".attn2." in layer for layer in layers} == {chosen}
    if not chosen:
        assert any("resnets" in layer for layer in layers)
        assert any("attn1" in layer for layer in layers)
    assert read_yaml(run / "config.yaml", "")["lora_targets"] == (
        "cross_attention" if chosen else "not_cross_attention"
    )
    record = read_json(run / "training.json")
    assert (record["objective"], record["erase_guidance"], record["retain"]) == (name, 2.0, True)
    assert not record.keys() & {"push", "correction", "caption_mode", "beta", "forget_weight"}  # of other objectives


def test_neggrad_with_the_noise_target_needs_keep_images(make_config: Config, place: Path) -> None:
    folder = Path("own")
    for kind in ("0_unlabeled", "1_positive"):
        (folder / kind).mkdir(parents=True)
        for image in sorted((place / "data" / kind).glob("*.png"))[:3]:
            (folder / kind / image.name).write_bytes(image.read_bytes())
    with pytest.raises(UsageError, match="none of the group keep"):
        trainer.run(make_config("run", objective="neggrad", target="noise", data_dir=folder))
