"""`sd-unlearn paper run` and `sweep` from the command line: every configuration, end to end in a few steps."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from dataset_files import make_celeba, make_cifar10, make_mnist, make_stl10
from PIL import Image
from torch import Tensor, nn

from sd_unlearn import cli
from sd_unlearn.data import prior
from sd_unlearn.io.reading import read_json
from sd_unlearn.paper import experiments
from sd_unlearn.paper import run as run_module
from sd_unlearn.paper.ddpm import unet
from sd_unlearn.paper.ddpm.sample import load_samples
from sd_unlearn.paper.ddpm.unet import make_network, make_schedule, save_pipeline
from sd_unlearn.paper.experiments import EXPERIMENTS, Counts
from sd_unlearn.paper.judge import classifier, score
from sd_unlearn.paper.judge.classifier import Classifier
from sd_unlearn.paper.options import SweepOptions
from sd_unlearn.paper.settings import resolve
from sd_unlearn.paper.sweep import combinations
from sd_unlearn.training.state import TrainingState

Call = Callable[..., tuple[int, str, str]]
FEW = ("--max_train_steps", "3", "--train_batch_size", "6", "--num_images", "12", "--num_inference_steps", "2")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks with a few thousand weights, a classifier trained for a few steps, and a rough estimate of beta."""
    small = {
        "block_out_channels": (8, 16, 16),
        "layers_per_block": 1,
        "attention": 2,
        "norm_num_groups": 4,
        "attention_head_dim": 8,
    }
    monkeypatch.setitem(unet._SHAPES, "tiny", small)
    original = classifier.settings_for

    def quick(*arguments: Any) -> Any:
        settings = original(*arguments)
        return dataclasses.replace(settings, epochs=1, widths=(8, 8, 8), num_train=min(200, settings.num_train))

    monkeypatch.setattr(classifier, "settings_for", quick)
    monkeypatch.setattr(score, "real_normal", functools.partial(score.real_normal, limit=300))
    monkeypatch.setattr(prior, "REPEATS", 1)  # of --beta estimate
    monkeypatch.setattr(prior, "RESAMPLES", 50)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """call("run", "mnist5k-even", ...) -> code, stdout, stderr"""

    def run(*words: str) -> tuple[int, str, str]:
        code = cli.main(["paper", *words])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def results(experiment: str, variant: str) -> dict[str, Any]:
    record: dict[str, Any] = read_json(Path("runs/paper") / experiment / variant / "results.json")
    return record


def test_a_run_writes_a_pipeline_images_and_metrics(call: Call) -> None:
    code, out, err = call("run", "mnist5k-even", *FEW)
    assert code == 0, err
    (folder,) = Path("runs/paper/mnist5k-even").iterdir()
    assert {p.name for p in folder.iterdir()} == {
        ".sd-unlearn-run",
        "config.yaml",
        "metrics.jsonl",
        "training.json",
        "pipeline",
        "samples.npz",
        "samples.png",
        "sampling.json",
        "results.json",
    }
    record = read_json(folder / "results.json")
    rows = {(row["metric"], row["group"]): row for row in record["rows"]}
    assert rows["non_sensitive_rate", "all"]["n"] == 12
    shares = [rows["share", digit]["value"] for digit in "0123456789"]
    assert sum(shares) == pytest.approx(1)
    assert record["counts"] == {"normal": 2000, "mixed_in": 200, "positive": 200, "negative": 0}
    assert load_samples(folder).shape == (12, 12, 12, 1)
    assert Image.open(folder / "samples.png").size[0] > 12 * 12
    assert "non_sensitive_rate" in out
    assert str(folder) in out


def test_a_finished_run_is_not_repeated_and_an_unfinished_one_resumes(call: Call) -> None:
    call("run", "mnist5k-even", *FEW)
    (folder,) = Path("runs/paper/mnist5k-even").iterdir()
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    code, _, err = call("run", "mnist5k-even", *FEW)
    assert code == 0
    assert "is finished" in err
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == before
    first = read_json(folder / "results.json")
    (folder / "results.json").unlink()
    (folder / "sampling.json").unlink()
    shutil.rmtree(folder / "samples.png", ignore_errors=True)
    call("run", "mnist5k-even", *FEW)
    again = read_json(folder / "results.json")
    assert again["rows"] == first["rows"]
    assert (folder / "training.json").stat().st_mtime_ns == before["training.json"]
    _, _, err = call("run", "mnist5k-even", "--overwrite", *FEW)
    assert (folder / "training.json").stat().st_mtime_ns > before["training.json"]
    assert read_json(folder / "results.json")["weights_sha256"] == first["weights_sha256"]


def test_only_the_first_process_reads_and_prints_the_record(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others may get there before it is written."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(run_module, "run_experiment", lambda *a: Path("runs/paper/digits-seven/x/paper.json"))
    assert call("run", "digits-seven") == (0, "", "")


def test_other_images_are_another_run(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    call("run", "mnist5k-even", *FEW)
    (folder,) = Path("runs/paper/mnist5k-even").iterdir()
    for digit in "0123456789":
        (Path("own/mnist5k") / digit).mkdir(parents=True)
        Image.new("L", (28, 28)).save(Path("own/mnist5k") / digit / "a.png")
    code, out, err = call("run", "mnist5k-even", *FEW, "--data_root", "own")
    assert (code, out) == (2, "")
    assert "holds a run on other images" in err
    (folder / "results.json").unlink()  # interrupted after the training
    load = run_module.load_dataset
    monkeypatch.setattr(run_module, "load_dataset", lambda *a: dataclasses.replace(load(*a), sha256="of others"))
    code, _, err = call("run", "mnist5k-even", *FEW)
    assert code == 2
    assert "holds a run on other images" in err
    monkeypatch.setattr(run_module, "load_dataset", load)
    assert call("run", "mnist5k-even", *FEW)[0] == 0
    assert "data_sha256" not in read_json(folder / "results.json")["cost"]


def test_an_interrupted_run_resumes_from_its_checkpoint(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:

    steps = TrainingState.take_step
    monkeypatch.setattr(TrainingState, "take_step", lambda *a: (os.kill(os.getpid(), signal.SIGINT), steps(*a))[1])
    code, _, err = call("run", "mnist5k-even", *FEW)
    assert code == 130
    assert "Run the same command again to continue." in err
    (folder,) = Path("runs/paper/mnist5k-even").iterdir()
    assert not (folder / "training.json").exists()
    monkeypatch.setattr(TrainingState, "take_step", steps)
    code, _, err = call("run", "mnist5k-even", *FEW)
    assert code == 0
    assert "Resuming from" in err
    assert not (folder / "checkpoints").exists()


@pytest.mark.parametrize("stage", ["_train", "_measure"])
def test_an_interrupted_run_that_overwrites_is_continued_without_overwriting(
    call: Call, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    call("run", "mnist5k-even", *FEW)
    with monkeypatch.context() as patch:
        patch.setattr(run_module, stage, interrupt)
        code, _, err = call("run", "mnist5k-even", "--overwrite", *FEW)
        assert code == 130
        assert "kept in runs/paper/mnist5k-even/" in err
        assert "Run the same command again without --overwrite to continue." in err
    (folder,) = Path("runs/paper/mnist5k-even").iterdir()
    assert not (folder / "results.json").exists()
    assert call("run", "mnist5k-even", *FEW)[0] == 0
    assert (folder / "results.json").is_file()


def test_a_folder_with_other_files_is_rejected_and_unchanged(call: Call) -> None:
    place = Path("runs/paper/mnist5k-even/tiny-pu-beta0.1-seed42")
    place.mkdir(parents=True)
    (place / "thesis.tex").write_text("years of work")
    code, _, err = call("run", "mnist5k-even")
    assert code == 2
    assert "is not a `paper` run" in err
    assert [p.name for p in place.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    "options",
    [
        ("--objective", "unsupervised"),
        ("--objective", "supervised"),
        ("--objective", "pnu", "--num_negative", "30"),
        ("--conditional",),
        ("--missing", "9"),
        ("--correction", "nn"),
        ("--beta", "known"),
        ("--beta", "0.25"),
        ("--contamination", "0.2"),
        ("--contamination", "0", "--objective", "unsupervised"),
        ("--beta", "estimate"),
        ("--sampler", "ddpm"),
        ("--reduction", "mean"),
    ],
    ids=" ".join,
)
def test_every_configuration_on_real_digits(call: Call, options: tuple[str, ...]) -> None:
    code, out, err = call("run", "mnist5k-even", "--json", *FEW, *options)
    assert code == 0, err
    record = json.loads(out)
    used = record["settings"]
    for option, value in zip(options, options[1:], strict=False):
        if option == "--objective":
            assert used["objective"] == value
        if option == "--contamination":
            assert used["contamination"] == pytest.approx(float(value))
        if option == "--missing":
            assert used["missing"] == [value]
    if "estimate" in options:
        assert used["beta_source"] == "estimated"
        assert used["betas"][-1]["step"] == 3


class Guess(nn.Module):
    """A classifier that returns pixels as logits."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, images: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=images.flatten(1)[:, : self.classes])


def few(monkeypatch: pytest.MonkeyPatch, name: str, counts: Counts, **changes: Any) -> None:
    """An experiment on the few images of a test, too few for a classifier or a distance."""
    monkeypatch.setitem(EXPERIMENTS, name, dataclasses.replace(EXPERIMENTS[name], counts=counts, **changes))

    def guess(data: Any, side: int, *_: Any) -> Classifier:
        classes = len(data.classes)
        return Classifier(Guess(classes), "guess", data.classes, side, "0" * 64, np.eye(classes, dtype=np.int64))

    monkeypatch.setattr(run_module, "get_classifier", guess)
    monkeypatch.setattr(score, "FEWEST", 1)
    monkeypatch.setattr(run_module, "check_fid_weights", lambda *_: None)  # no weights of Inception here
    for distances in ("_distances_to_real_digits", "_distances_to_real_images"):
        monkeypatch.setattr(score, distances, lambda *_: [])


DATASETS = {
    "mnist-even": (make_mnist, Counts(4, 2, 2)),
    "cifar10-vehicles": (make_cifar10, Counts(4, 2, 2)),
    "stl10-animals": (make_stl10, Counts(4, 1, 2)),
    "cifar10-animals-ft": (make_cifar10, Counts(4, 1, 2)),
    "celeba-male-ft": (make_celeba, Counts(2, 1, 1)),
}


@pytest.mark.parametrize("name", DATASETS)
def test_every_dataset_from_its_files(call: Call, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    make, counts = DATASETS[name]
    make(Path("data/paper"), monkeypatch)
    tuned = name.endswith("-ft")
    few(monkeypatch, name, counts, **({"side": 12} if tuned else {}))
    options = ["--size", "tiny"]
    if tuned:
        save_pipeline(make_network("tiny", 12, 3), make_schedule(), Path("published"))
        options = ["--pretrained_model_name_or_path", "published/pipeline"]
    code, out, err = call("run", name, "--json", *options, *FEW)
    assert code == 0, err
    record = json.loads(out)
    assert record["counts"] == {**dataclasses.asdict(counts), "negative": 0}
    assert record["size"] == ("paper" if tuned else "tiny")
    assert record["settings"]["base"] == ("published/pipeline" if tuned else None)
    (folder,) = Path("runs/paper", name).iterdir()
    assert load_samples(folder).shape == (12, 12, 12, EXPERIMENTS[name].channels)


def test_a_sweep_omits_the_options_that_the_baselines_do_not_have() -> None:
    options = SweepOptions(objective="unsupervised,supervised,pu", correction="nn", max_ratio=2.0, epochs=3)
    runs = combinations(options)
    assert [(r.objective, r.correction, r.max_ratio) for r in runs] == [
        ("unsupervised", "abs", None),
        ("supervised", "abs", None),
        ("pu", "nn", 2.0),
    ]
    assert {r.epochs for r in runs} == {3}
    for each in runs:
        resolve(EXPERIMENTS["mnist5k-even"], each)


def test_a_sweep_runs_what_is_not_finished_and_shows_all_runs(call: Call) -> None:
    code, out, err = call(
        "sweep", "mnist5k-even", "--beta", "0.05,0.2", "--objective", "unsupervised,pu", "--seed", "1,2", *FEW
    )
    assert code == 0, err
    names = sorted(p.name.partition("-lr")[0] for p in Path("runs/paper/mnist5k-even").glob("tiny-*"))
    assert len(names) == 6  # unsupervised has no beta
    assert "0.05" in out
    _, _, err = call(
        "sweep", "mnist5k-even", "--beta", "0.05,0.2", "--objective", "unsupervised,pu", "--seed", "1,2", *FEW
    )
    assert err.count("is finished") == 6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("run", "mnist5k-evne"), 'Did you mean "mnist5k-even"'),
        (("run", "mnist5k-even", "--beta", "2"), "--beta 2"),
        (("run", "mnist5k-even", "--objectiv", "pu"), "objectiv"),
        (("sweep", "mnist5k-even", "--beta", "0.1,,0.2"), "empty entry"),
        (("sweep", "mnist5k-even", "--beta", "0.1,two"), '--beta "two"'),
        (("sweep", "mnist5k-even", "--seed", "one"), '--seed "one"'),
        (("sweep", "mnist5k-even", "--objective", "pu,nnpu"), '--objective "nnpu"'),
        (("run", "sd-brad-pitt", "--missing", "9"), "--missing is for the DDPMs"),
        (("run", "sd-brad-pitt", "--objective", "pnu"), "--objective pnu"),
        (("table",), "sd-unlearn paper run"),
    ],
)
def test_invalid_options_give_one_line(call: Call, words: tuple[str, ...], message: str) -> None:
    code, out, err = call(*words)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not Path("runs").exists()


def test_a_missing_dataset_is_reported_with_its_files(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    import urllib.request

    def no_network(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    code, _, err = call("run", "mnist-even", "--size", "tiny")
    assert code == 1
    assert "train-images-idx3-ubyte" in err
    assert "data/paper" in err


def test_missing_inception_weights_are_reported_before_training(call: Call) -> None:
    code, _, err = call("run", "cifar10-animals", "--inception_weights", "nowhere.pth")
    assert code == 2
    assert "--inception_weights nowhere.pth" in err
    assert not Path("data").exists()


def test_options_can_come_from_a_file(call: Call) -> None:
    Path("row.yaml").write_text("objective: unsupervised\nseed: 7\nmax_train_steps: 3\ntrain_batch_size: 6\n")
    code, _, err = call("run", "mnist5k-even", "--config", "row.yaml", *FEW[4:])
    assert code == 0, err
    assert "tiny-unsupervised" in next(Path("runs/paper/mnist5k-even").iterdir()).name
    Path("row.yaml").write_text("objectiv: pu\n")
    code, _, err = call("run", "mnist5k-even", "--config", "row.yaml")
    assert code == 2
    assert 'Did you mean "objective"' in err


def test_the_list_names_every_experiment(call: Call) -> None:
    _, out, _ = call("list")
    for name in experiments.NAMES:
        assert name in out
    _, out, _ = call("list", "--json")
    assert [e["name"] for e in json.loads(out)] == list(experiments.NAMES)


def test_images_depend_on_the_seed(call: Call) -> None:
    for seed in ("1", "2"):
        call("run", "mnist5k-even", "--seed", seed, *FEW)
    one, two = (load_samples(p) for p in sorted(Path("runs/paper/mnist5k-even").iterdir()))
    assert not np.array_equal(one, two)
