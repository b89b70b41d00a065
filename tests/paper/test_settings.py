"""Options of `paper run` -> settings and folder name of a run, and invalid options."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from sd_unlearn.errors import UsageError
from sd_unlearn.paper.experiments import CLASSES, EXPERIMENTS, find_experiment
from sd_unlearn.paper.options import RunOptions
from sd_unlearn.paper.settings import ExperimentSettings, default_settings, resolve, variant_of

EVEN = EXPERIMENTS["mnist5k-even"]


def settings(name: str = "mnist5k-even", **options: Any) -> ExperimentSettings:
    return resolve(find_experiment(name), RunOptions(**options))[0]


def variant(**options: Any) -> str:
    resolved, _, size = resolve(EVEN, RunOptions(**options))
    return variant_of(resolved, default_settings(EVEN, resolved, size), size, RunOptions(**options).seed)


def test_the_default_settings_are_those_of_the_paper() -> None:
    resolved, counts, size = resolve(find_experiment("mnist-even"), RunOptions())
    assert size == "paper"
    assert (counts.normal, counts.mixed_in, counts.positive) == (25_000, 2_500, 2_500)
    assert (resolved.learning_rate, resolved.train_batch_size, resolved.lr_warmup_steps, resolved.beta) == (
        1e-4,
        128,
        500,
        0.1,
    )
    assert resolved.max_train_steps == 100 * 215  # 27,500 unlabeled images in batches of 128
    assert (resolved.sampler, resolved.num_inference_steps) == ("ddpm", 1000)
    assert (resolved.reduction, resolved.correction, resolved.ema_decay) == ("sum", "abs", None)


@pytest.mark.parametrize(
    ("name", "batch", "epochs", "steps", "base"),
    [
        ("stl10-animals", 32, 100, 1000, None),
        ("cifar10-vehicles", 128, 100, 1000, None),
        ("cifar10-animals-ft", 128, 100, 50, "google/ddpm-cifar10-32"),
        ("celeba-male-ft", 16, 20, 50, "google/ddpm-celebahq-256"),
    ],
)
def test_batches_epochs_samplers_and_bases_are_those_of_the_paper(
    name: str, batch: int, epochs: int, steps: int, base: str | None
) -> None:
    experiment = find_experiment(name)
    recipe = experiment.recipe
    assert (recipe.train_batch_size, recipe.epochs, recipe.num_inference_steps, experiment.base) == (
        batch,
        epochs,
        steps,
        base,
    )


def test_every_class_is_either_normal_or_sensitive() -> None:
    for experiment in EXPERIMENTS.values():
        assert sorted(experiment.normal + experiment.sensitive) == sorted(CLASSES[experiment.dataset])
        assert experiment.counts.contamination == pytest.approx(1 / 11)


def test_mnist5k_is_tiny_by_default() -> None:
    assert resolve(EVEN, RunOptions())[2] == "tiny"
    resolved, _, size = resolve(EVEN, RunOptions(size="paper"))
    assert size == "paper"
    assert resolved.max_train_steps == 100 * 18  # 2,200 in batches of 128


def test_the_folder_name_lists_the_settings_that_differ() -> None:
    assert variant() == "tiny-pu-beta0.1-seed42"
    assert variant(objective="unsupervised", seed=1) == "tiny-unsupervised-seed1"
    assert variant(beta="estimate") == "tiny-pu-beta-estimated-seed42"
    assert variant(missing="9", correction="nn") == "tiny-pu-beta0.1-correction-nn-missing-9-seed42"
    assert variant(conditional=True) == "tiny-pu-beta0.1-conditional-seed42"
    assert variant(contamination=0.2) == "tiny-pu-beta0.1-contamination-0.2-seed42"
    assert variant(objective="pnu", eta=0.25) == "tiny-pnu-beta0.1-eta-0.25-seed42"
    assert "/" not in variant(missing="9,7", learning_rate=1e-5)


def test_every_option_changes_the_folder_name() -> None:
    all_options: list[dict[str, Any]] = [
        {},
        {"beta": 0.2},
        {"beta": "known"},
        {"beta": "estimate"},
        {"seed": 7},
        {"size": "paper"},
        {"correction": "none"},
        {"conditional": True},
        {"contamination": 0.05},
        {"missing": "9"},
        {"missing": "7"},
        {"epochs": 3},
        {"train_batch_size": 8},
        {"learning_rate": 1e-5},
        {"reduction": "mean"},
        {"num_images": 7},
        {"sampler": "ddpm"},
        {"num_inference_steps": 9},
        {"mixed_precision": "fp16"},
        {"pretrained_model_name_or_path": "some/model"},
        {"objective": "pnu"},
        {"objective": "pnu", "num_negative": 9},
        {"max_ratio": 0},
        {"max_ratio": 2.5},
        {"objective": "pnu", "eta": 1.0},
        {"objective": "supervised"},
        {"objective": "unsupervised"},
    ]
    names = [variant(**options) for options in all_options]
    assert len(set(names)) == len(names)


def test_a_known_beta_is_the_true_share_and_unsupervised_has_none() -> None:
    assert settings(beta="known", contamination=0.2).beta == pytest.approx(0.2)
    assert settings(objective="unsupervised").beta is None
    assert settings(beta="estimate").beta_source == "estimated"


def test_the_paper_size_and_the_baselines_have_no_cap() -> None:
    assert settings("mnist-even").max_ratio is None
    assert settings("mnist-even", max_ratio=3.0).max_ratio == 3
    assert settings().max_ratio == settings(objective="pnu").max_ratio == 4
    assert settings(max_ratio=0.0).max_ratio is None
    assert settings(objective="supervised").max_ratio is settings(objective="unsupervised").max_ratio is None


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5])
def test_contamination_does_not_change_the_number_of_steps(share: float) -> None:
    assert settings(contamination=share).max_train_steps == settings().max_train_steps


def test_only_pnu_has_labeled_normal_images() -> None:
    assert settings(objective="pnu").num_negative == 200
    assert settings(objective="pnu", num_negative=50).eta == 0.5
    assert settings().eta == 0
    assert settings().num_negative == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 1.0}, "--beta 1 "),
        ({"beta": -0.1}, "--beta -0.1"),
        ({"beta": "estimate", "objective": "unsupervised"}, "--beta estimate"),
        ({"beta": 0.3, "objective": "unsupervised"}, "--beta 0.3"),
        ({"eta": 0.9}, "--eta 0.9 is for --objective pnu"),
        ({"contamination": 1.2}, "--contamination 1.2"),
        ({"contamination": 0}, "--contamination 0 .*unsupervised"),
        ({"missing": "4"}, '--missing "4" is not a sensitive class'),
        ({"missing": "1,3,5,7,9"}, "leaves no labeled images"),
        ({"eta": 0.0}, "--eta 0"),
        ({"num_negative": 5}, "--num_negative is for --objective pnu"),
        ({"correction": "nn", "objective": "supervised"}, "--correction is for pu"),
        ({"max_ratio": 4.0, "objective": "supervised"}, "--max_ratio is for --objective pu"),
        ({"max_ratio": 0.5}, "--max_ratio 0.5"),
        ({"max_ratio": float("inf")}, "--max_ratio inf"),
        ({"epochs": 0}, "--epochs 0"),
        ({"learning_rate": float("nan")}, "--learning_rate nan"),
        ({"num_inference_steps": 1001}, "--num_inference_steps 1001"),
        ({"seed": -1}, "--seed -1"),
    ],
)
def test_invalid_options_are_rejected_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        settings(**options)


def test_conditions_and_sizes_that_an_experiment_does_not_have() -> None:
    with pytest.raises(UsageError, match="--conditional"):
        settings("cifar10-animals", conditional=True)
    with pytest.raises(UsageError, match="--size tiny"):
        settings("celeba-male-ft", size="tiny")
    with pytest.raises(UsageError, match='"mnist-evne" is unknown. Did you mean "mnist-even"'):
        settings("mnist-evne")


def test_settings_are_a_plain_dataclass() -> None:
    assert set(dataclasses.asdict(settings())) >= {"objective", "beta", "beta_source", "contamination", "reduction"}
