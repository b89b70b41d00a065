"""The training loop: skipped steps, probes, the best weights, early stopping, the moving average."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from train_runs import ADAPTER, Config, make, rendered

from sd_unlearn.config.train import TrainConfig
from sd_unlearn.data.batch import Batch
from sd_unlearn.data.batches import EncodedImages
from sd_unlearn.data.concept import Concept
from sd_unlearn.data.dataset import Example
from sd_unlearn.errors import UnlearnError, UsageError
from sd_unlearn.io.files import write_json
from sd_unlearn.io.reading import read_json, read_jsonl
from sd_unlearn.objectives import registry
from sd_unlearn.training import checkpoint, loop, setup, trainer
from sd_unlearn.training.probe import ProbeResult, RatioProbe, hold_out
from sd_unlearn.training.probe_checks import check_probe
from sd_unlearn.training.state import TrainingState

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def place(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rendered(tmp_path_factory.mktemp("place"), tiny_base)


@pytest.fixture(scope="module")
def make_config(place: Path, tiny_base: Path) -> Config:
    def plain(output: Path | str, **changes: object) -> object:
        usual = {
            "checkpointing_steps": 0,
            "lora_dropout": 0.0,
            "ema_decay": None,
            "max_train_steps": 12,
            "effective_batch_size": 8,
            "train_batch_size": None,
        }
        return make(place, tiny_base, output, **(usual | changes))

    return plain  # type: ignore[return-value]


def make_nan(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Make the losses of these steps NaN."""
    losses, taken = registry.example_losses, []

    def with_nan(*arguments: object, **options: object) -> torch.Tensor:
        taken.append(1)
        found = losses(*arguments, **options)  # type: ignore[arg-type]
        return found * float("nan") if len(taken) in steps else found

    monkeypatch.setattr(registry, "example_losses", with_nan)


def test_a_step_that_is_not_finite_is_skipped_and_counted(make_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    make_nan(monkeypatch, {3, 4, 10})
    run = trainer.run(make_config("run"))
    at_ten, at_end = read_jsonl(run / "metrics.jsonl")
    assert (at_ten["skipped_steps"], at_end["skipped_steps"]) == (3, 3)
    assert at_ten["loss"] is None  # step 10 was one of them
    assert at_end["loss"] > 0
    assert all(value.isfinite().all() for value in load_file(run / ADAPTER).values())


def test_too_many_skipped_steps_end_the_run_and_keep_the_last_good_state(
    make_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"max_train_steps": 40, "checkpointing_steps": 2}
    with monkeypatch.context() as patch:
        make_nan(patch, set(range(8, 100)))
        patch.setattr(loop, "MAX_SKIPPED_STEPS", 5)
        with pytest.raises(UnlearnError, match=r"step 20.*13 steps in a row.*step-000006.*--learning_rate"):
            trainer.run(make_config("run", **options))
    assert not Path("run/training.json").exists()
    assert [p.name for p in checkpoint.list_checkpoints(Path("run"))] == ["step-000004", "step-000006"]
    run = trainer.run(make_config("run", **options, resume_from_checkpoint="latest"))
    assert read_jsonl(run / "metrics.jsonl")[-1]["skipped_steps"] == 0


@pytest.mark.parametrize("shown", ["scores", "nothing better"])
def test_the_best_weights_are_kept_and_a_run_without_progress_stops(
    make_config: Config, monkeypatch: pytest.MonkeyPatch, shown: str
) -> None:
    scores = iter([0.1, 0.7, 0.3, 0.2, 0.9] if shown == "scores" else [0.5, 0.1, 0.1])
    weights: list[dict[str, torch.Tensor]] = []

    def probe(self: object) -> ProbeResult:
        weights.append(self.student.state())  # type: ignore[attr-defined]
        score = next(scores)
        return ProbeResult({"probe_ratio": score}, score)

    monkeypatch.setattr("sd_unlearn.training.probe.RatioProbe.__call__", probe)
    run = trainer.run(make_config("run", probe_steps=2, early_stopping_patience=2))
    best, end = (2, 4) if shown == "scores" else (1, 3)
    record, of_best = read_json(run / "training.json"), read_json(run / "best" / "training.json")
    assert (record["cost"]["steps"], of_best["cost"]["steps"]) == (2 * end, 2 * best)
    assert (record["cost"]["images_seen"], of_best["cost"]["images_seen"]) == (16 * end, 16 * best)
    assert record["cost"]["stopped"] == "no better probe in 2"
    names = {name.replace(".default", ""): value for name, value in weights[best - 1].items()}
    for name, value in load_file(run / "best" / ADAPTER).items():
        assert torch.equal(value, names[name.removeprefix("")])
    assert (run / "best" / ADAPTER).read_bytes() != (run / ADAPTER).read_bytes()
    probes = [line for line in read_jsonl(run / "metrics.jsonl") if "probe_ratio" in line]
    assert [line["images"] for line in probes] == [16 * n for n in range(1, end + 1)]
    assert all({"step", "seconds"} <= set(line) for line in probes)


def test_the_ratio_probe_rises_while_a_concept_is_forgotten(make_config: Config) -> None:
    """With the noise target, a beta near 1 and no correction, the loss of positives rises above that of the others."""
    options = {"probe_steps": 20, "max_train_steps": 60, "learning_rate": 0.03, "lora_targets": "all_linear+conv"}
    run = trainer.run(make_config("run", **options, target="noise", beta=0.9, correction="none"))
    ratios = [line["probe_ratio"] for line in read_jsonl(run / "metrics.jsonl") if "probe_ratio" in line]
    assert len(ratios) == 3
    assert ratios[-1] > 1.001


def test_the_ratio_probe_disables_dropout(make_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    real, alike, mode = RatioProbe.__call__, [], []

    def twice(self: RatioProbe) -> ProbeResult:
        alike.append(real(self) == real(self))
        mode.append(self.student.model.training)
        return real(self)

    monkeypatch.setattr(RatioProbe, "__call__", twice)
    options = {"probe_steps": 4, "learning_rate": 0.03, "lora_dropout": 0.5}
    run = trainer.run(make_config("run", **options))
    assert (alike, mode) == ([True] * 3, [True] * 3)
    ratios = [line["probe_ratio"] for line in read_jsonl(run / "metrics.jsonl") if "probe_ratio" in line]
    assert ratios[-1] != ratios[0]


def test_images_of_every_set_are_held_out() -> None:
    sets = [Example(Path(f"{n}"), "", "positive", n >= 4) for n in range(44)]
    others = [Example(Path(f"u{n}"), "", "generic") for n in range(40)]
    for seed in range(20):
        kept, held = hold_out([*sets, *others], seed)
        assert sorted(kept + held) == list(range(84))
        assert [sum(low <= i < high for i in held) for low, high in ((0, 4), (4, 44), (44, 84))] == [2, 4, 4]
    with pytest.raises(UsageError, match="one has only 3"):
        hold_out([*sets[1:], *others], 0)


def test_every_set_of_positives_needs_images_to_hold_out(concept: Concept) -> None:
    config = TrainConfig(concept="x", probe_steps=1)
    groups = ["positive"] * 6 + ["generic"] * 8
    check_probe(config, concept, groups, [6])
    with pytest.raises(UsageError, match="one has only 3"):
        check_probe(config, concept, groups, [3, 3])


def test_best_weights_of_steps_that_are_trained_again_are_replaced(
    make_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 6 was the best, but the run continues from step 5 with another learning rate."""
    scores = iter([0.1, 0.2, 0.9])

    def probe(self: object) -> ProbeResult:
        return ProbeResult({}, next(scores))

    options = {"probe_steps": 2, "checkpointing_steps": 5, "max_train_steps": 8}
    monkeypatch.setattr(RatioProbe, "__call__", probe)
    with pytest.raises(StopIteration):
        trainer.run(make_config("run", **options))
    assert read_json(Path("run/best/probe.json"))["step"] == 6
    scores = iter([0.1, 0.15])
    again = {"resume_from_checkpoint": "latest", "force_resume": True, "learning_rate": 1e-5}
    trainer.run(make_config("run", **options, **again))
    assert read_json(Path("run/best/probe.json"))["step"] == read_json(Path("run/best/training.json"))["cost"]["steps"]


@pytest.mark.parametrize(("name", "best"), [("leakage", 3), ("ratio", 2), (None, 2)])
def test_another_probe_starts_its_scores_anew(
    make_config: Config, monkeypatch: pytest.MonkeyPatch, name: str | None, best: int
) -> None:
    """After --force_resume. Of a checkpoint without the name, as of earlier versions, the scores are kept."""
    monkeypatch.setattr(RatioProbe, "__call__", lambda _: ProbeResult({}, 0.9))
    options = {"probe_steps": 1, "checkpointing_steps": 1}
    trainer.run(make_config("run", **options, max_train_steps=2))
    path = checkpoint.list_checkpoints(Path("run"))[-1] / "state.pt"
    state = torch.load(path, weights_only=True)
    assert (state["progress"]["best_step"], state["progress"]["probe"]) == (1, "ratio")
    state["progress"] |= {"best_step": 2, "forgotten_in_a_row": 2, "probe": name}
    if name is None:
        del state["progress"]["probe"]
    torch.save(state, path)
    write_json(Path("run/best/probe.json"), {"step": 2})
    monkeypatch.setattr(RatioProbe, "__call__", lambda _: ProbeResult({}, 0.1))
    again = {"resume_from_checkpoint": "latest", "force_resume": True, "max_train_steps": 3}
    trainer.run(make_config("run", **options, **again))
    after = torch.load(checkpoint.list_checkpoints(Path("run"))[-1] / "state.pt", weights_only=True)["progress"]
    assert (after["best_step"], after["probe"]) == (best, "ratio")
    assert after["best_score"] == (0.1 if best == 3 else 0.9)


def test_more_good_probes_than_needed_end_the_run() -> None:
    """--stop_when_forgotten was added when the run was resumed."""
    state = TrainingState(*[None] * 10)  # type: ignore[arg-type]
    state.forgotten_in_a_row = 2
    state.record_probe(ProbeResult({}, 1.0, forgotten=True), TrainConfig(stop_when_forgotten=True))
    assert state.stopped == "forgotten"


def test_too_few_images_to_hold_out_are_refused_before_a_base_is_loaded(
    make_config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(trainer, "load_base", lambda *_: pytest.fail("a base was loaded"))
    with pytest.raises(UsageError, match="one has only 3"):
        trainer.run(make_config("run", probe_steps=1, num_positive=3, data_dir=tmp_path / "data"))
    assert not (tmp_path / "data").exists()


def test_a_run_interrupted_at_an_early_stop_is_not_trained_further(
    make_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def probe(self: object) -> ProbeResult:
        os.kill(os.getpid(), signal.SIGINT)
        return ProbeResult({"probe_ratio": 0.0}, -math.inf)

    monkeypatch.setattr("sd_unlearn.training.probe.RatioProbe.__call__", probe)
    options = {"probe_steps": 4, "early_stopping_patience": 1}
    with pytest.raises(KeyboardInterrupt):
        trainer.run(make_config("run", **options))
    run = trainer.run(make_config("run", **options, resume_from_checkpoint="latest"))
    assert read_json(run / "training.json")["cost"]["steps"] == 4


def test_previews_use_the_weights_that_will_be_saved(make_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    used: dict[int, dict[str, torch.Tensor]] = {}
    write = "sd_unlearn.training.previews.PreviewWriter.__call__"
    monkeypatch.setattr(write, lambda self, step: used.update({step: weights_of(self.generator.network)}))
    run = trainer.run(make_config("run", validation_steps=12, ema_decay=0.9))
    assert list(used) == [0, 12]
    for name, value in load_file(run / ADAPTER).items():
        assert torch.equal(used[12][name], value)
        assert "lora_B" not in name or not used[0][name].any()  # the first one shows the base


def weights_of(network: Any) -> dict[str, torch.Tensor]:
    return {n.replace(".default", ""): p.detach().clone() for n, p in network.named_parameters() if p.requires_grad}


def test_gradient_shares_are_logged_at_their_interval(make_config: Config) -> None:
    lines = read_jsonl(trainer.run(make_config("run", gradient_share_steps=4)) / "metrics.jsonl")
    assert [line["step"] for line in lines] == [4, 8, 10, 12]
    assert ["share_u" in line for line in lines] == [True, True, False, True]


def test_held_out_images_are_never_trained_on(make_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    real = setup.StratifiedBatches

    def watched(images: EncodedImages, *arguments: object, **options: object) -> object:
        made.append(images.examples)
        return real(images, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(setup, "StratifiedBatches", watched)
    trainer.run(make_config("plain", max_train_steps=1))
    trainer.run(make_config("probed", max_train_steps=1, probe_steps=1))
    everything, kept = made
    assert len(everything) - len(kept) == 4  # two positives and two generic images
    assert len({e.path for e in everything} - {e.path for e in kept}) == 4


def test_the_leakage_probe_stops_at_the_second_good_probe_in_a_row(
    make_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images of the tiny base show nothing, so the classifier's readings are given; the generation is real."""
    from sd_unlearn.metrics.labels import LabelPredictions

    class GivenReadings:
        name, labels, rejects_invalid = "given", ("Brad Pitt", "a dog", "a cat"), False
        rounds = 0

        def read(self, images: list) -> LabelPredictions:
            GivenReadings.rounds += 1
            assert len(images) == 120
            assert len({image.size for image in images}) == 1
            seen = torch.zeros(120, 3)
            for i in range(60):  # half show the concept in the first and third round, none in the others
                seen[i, 0 if GivenReadings.rounds in (1, 3) and i < 30 else 1] = 1
                seen[60 + i, 1 + i % 2] = 1
            return LabelPredictions({"label": self.labels}, {"label": seen.numpy()}, seen.numpy())

    monkeypatch.setattr(setup, "make_label_classifier", lambda concept: GivenReadings())
    monkeypatch.setattr("sd_unlearn.training.probe_checks.labels_of", lambda concept: GivenReadings.labels)
    monkeypatch.setattr("sd_unlearn.training.probe_checks.check_clip", lambda *_: None)
    options = {"probe": "leakage", "probe_steps": 2, "stop_when_forgotten": True}
    run = trainer.run(make_config("run", **options))
    probes = [line for line in read_jsonl(run / "metrics.jsonl") if "probe_leakage" in line]
    assert [line["probe_leakage"] for line in probes] == [0.5, 0.0, 0.5, 0.0, 0.0]
    assert all(line["probe_retention"] == 1 for line in probes)
    assert (read_json(run / "training.json")["cost"]["steps"], len(list((run / "best").iterdir()))) == (10, 5)
    monkeypatch.setattr(trainer, "load_base", lambda *_: pytest.fail("a base was loaded"))
    for GivenReadings.labels in (("Brad Pitt", "a bird"), ("a dog", "a cat")):
        with pytest.raises(
            UsageError, match="--probe leakage: the classifier for 'Brad Pitt' knows the labels of none .*a "
        ):
            trainer.run(make_config("other", **options))


def test_the_leakage_probe_asks_for_every_concept() -> None:
    """Of 70, the last five leak, and every image of a keep prompt shows what it asks for."""
    from types import SimpleNamespace

    from sd_unlearn.data.concept import Concept
    from sd_unlearn.data.several import together
    from sd_unlearn.metrics.labels import LabelPredictions
    from sd_unlearn.training.probe import LeakageProbe

    names = [f"thing {number}" for number in range(70)]
    labels = (*names, "plum")
    concept = together([Concept(name, f"a {name}", "it", keep=["a {plum}"]) for name in names])

    def read(prompts: list[str]) -> LabelPredictions:
        shown = [labels.index(prompt.removeprefix("a ")) for prompt in prompts]
        seen = torch.eye(71)[[70 if n < 65 else n for n in shown]].numpy()
        return LabelPredictions({"thing": labels}, {"thing": seen}, seen)

    generator = SimpleNamespace(generate=lambda prompts, seeds: prompts)
    classifier = SimpleNamespace(name="thing", labels=labels, rejects_invalid=True, read=read)
    result = LeakageProbe(generator, classifier, concept, 0)()  # type: ignore[arg-type]
    assert result.metrics == {"probe_leakage": 5 / 70, "probe_retention": 1, "probe_clean": pytest.approx(65 / 70)}


@pytest.mark.parametrize(("sure", "clean", "forgotten"), [(60, 1.0, True), (24, 0.8, True), (23, 23 / 30, False)])
def test_broken_images_do_not_count_as_forgotten(sure: int, clean: float, forgotten: bool) -> None:
    """Half of the keep prompts' images are clean, and `sure` of the concept's 60, none of which shows the concept."""
    from types import SimpleNamespace

    from sd_unlearn.data.concept import Concept
    from sd_unlearn.metrics.labels import LabelPredictions
    from sd_unlearn.training.probe import LeakageProbe

    labels = ("pear", "plum")
    seen = torch.tensor([[0.05, 0.95]] * sure + [[0.45, 0.55]] * (60 - sure) + [[0.2, 0.8], [0.1, 0.9]] * 30)
    reading = LabelPredictions({"fruit": labels}, {"fruit": seen.numpy()}, seen.numpy())
    generator = SimpleNamespace(generate=lambda prompts, seeds: [None] * len(prompts))
    classifier = SimpleNamespace(name="fruit", labels=labels, rejects_invalid=True, read=lambda images: reading)
    concept = Concept("pear", "a pear", "a fruit", keep=["a {plum}"])
    result = LeakageProbe(generator, classifier, concept, 0)()  # type: ignore[arg-type]
    assert result.metrics == {"probe_leakage": 0, "probe_retention": 1, "probe_clean": pytest.approx(clean)}
    assert (result.forgotten, result.score) == (forgotten, pytest.approx(1 + clean))


def test_the_saved_weights_are_the_moving_average(make_config: Config) -> None:
    """A decay of 0 gives the last weights; a large one does not."""
    plain = load_file(trainer.run(make_config("plain")) / ADAPTER)
    ups = [name for name in plain if "lora_B" in name]
    distances = {}
    for decay in (0.0, 0.9):
        found = load_file(trainer.run(make_config(f"decay-{decay}", ema_decay=decay)) / ADAPTER)
        distances[decay] = sum(float((found[name] - plain[name]).norm()) for name in ups)
    assert distances[0.0] == 0
    assert distances[0.9] > 1e-4


def test_a_negative_bracket_is_counted(make_config: Config) -> None:
    (line, _) = read_jsonl(trainer.run(make_config("run", beta=0.999, learning_rate=1e-9)) / "metrics.jsonl")
    assert line["bracket"] < 0
    assert line["negative_brackets"] > 0


class NoWaiting(TorchDispatchMode):
    """Raises where the host would wait for a GPU: reading a value, or a result of unknown size."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masks = [i for i in (args[1] if func in INDEXING else []) if i is not None and i.dtype == torch.bool]
        if func in WAITS or masks:
            raise AssertionError(f"waits for the device: {func}")
        return func(*args, **(kwargs or {}))


ATEN = torch.ops.aten
WAITS = {ATEN._local_scalar_dense.default, ATEN.nonzero.default, ATEN.masked_select.default, ATEN.equal.default}
INDEXING = {ATEN.index.Tensor, ATEN.index_put.default, ATEN.index_put_.default, ATEN._index_put_impl_.default}


@pytest.mark.parametrize("target", ["teacher", "noise"])
def test_no_step_waits_for_the_device(make_config: Config, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    step, steps = TrainingState.take_step, []

    def watched(self: TrainingState, *arguments: Any) -> Any:
        with NoWaiting():
            steps.append(1)
            return step(self, *arguments)

    def to_device(self: Batch, device: torch.device) -> Batch:
        with _disable_current_modes():  # it looks at tensors that are still on the CPU
            return to(self, device)

    to = Batch.to
    monkeypatch.setattr(Batch, "to", to_device)
    monkeypatch.setattr(TrainingState, "take_step", watched)
    trainer.run(make_config("run", target=target, max_train_steps=3, ema_decay=0.9))
    assert len(steps) == 3
    with pytest.raises(AssertionError, match="waits"), NoWaiting():
        torch.ones(3)[torch.tensor([True, False, True])]
    with pytest.raises(AssertionError, match="waits"), NoWaiting():
        torch.ones(1).item()


def test_networks_that_are_not_needed_are_dropped(make_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    held = {}
    losses = registry.example_losses

    def watched(denoiser: object, batch: Batch, *arguments: object) -> torch.Tensor:
        held.update(vae=bases[0].pipeline.vae, text_encoder=bases[0].pipeline.text_encoder)
        return losses(denoiser, batch, *arguments)  # type: ignore[arg-type]

    bases: list = []
    load = trainer.load_base
    monkeypatch.setattr(trainer, "load_base", lambda *a: bases.append(load(*a)) or bases[0])
    monkeypatch.setattr(registry, "example_losses", watched)
    trainer.run(make_config("run", max_train_steps=1))
    assert held == {"vae": None, "text_encoder": None}
