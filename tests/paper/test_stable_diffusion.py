"""The paper's setting on text-to-image models: its options, and a whole run on a base of a few thousand weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from evaluation_runs import DIGIT_FILE

from sd_unlearn.config.checks import check_train
from sd_unlearn.errors import UsageError
from sd_unlearn.io.files import read_json
from sd_unlearn.paper import stable_diffusion
from sd_unlearn.paper.experiments import DIGITS_SEVEN, NAMES, SD_BRAD_PITT
from sd_unlearn.paper.stable_diffusion import EXPERIMENTS, PAPER, run, settings
from sd_unlearn.results import Row, read_results
from sd_unlearn.training import trainer

pytestmark = pytest.mark.usefixtures("one_thread")
TINY: dict[str, Any] = {
    "num_unlabeled": 6,
    "num_mixed_in": 2,
    "num_positive": 3,
    "num_inference_steps": 2,
    "train_batch_size": 4,
    "max_train_steps": 3,
    "lr_warmup_steps": 0,
    "validation_steps": 0,
    "report_to": "none",
    "checkpointing_steps": 3,
}
FEW = {"num_images": 8, "num_keep_images": 6, "num_inference_steps": 2}


def test_the_papers_setting() -> None:
    config = settings("pu")
    assert (config.num_unlabeled, config.num_mixed_in, config.num_positive, config.num_keep) == (64, 16, 20, 0)
    assert (config.method, config.learning_rate, config.max_train_steps, config.train_batch_size) == (
        "full",
        1e-5,
        7000,
        16,
    )
    assert (config.lr_scheduler, config.lr_warmup_steps, config.optimizer) == ("cosine", 500, "adamw")
    assert (config.target, config.snr_gamma, config.beta) == ("noise", None, None)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize("objective", ["unsupervised", "supervised", "pu"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_every_variant_can_be_trained_and_has_a_folder_of_its_own(experiment: str, objective: Any, method: Any) -> None:
    config = settings(objective, method, 0.1, 7, experiment=experiment)
    check_train(config)
    assert config.output_dir is not None
    assert config.output_dir.parent == Path("runs/paper") / experiment
    assert {"seed7", objective, method} <= set(config.output_dir.name.split("-"))
    assert (config.objective, config.method, config.beta, config.seed) == (objective, method, 0.1, 7)


def test_only_what_beta_changes_is_named_by_it() -> None:
    def place(*asked: Any) -> Path | None:
        return settings(*asked).output_dir

    assert place("pu", "full", 0.1) != place("pu", "full", 0.3) != place("pu")
    assert place("unsupervised", "full", 0.1) == place("unsupervised")
    assert settings("pu", seed=1).data_dir != settings("pu", seed=2).data_dir  # images are drawn by seed
    assert settings("pu", "full", 0.1).data_dir == settings("supervised", "lora").data_dir


def test_names_are_those_of_the_table() -> None:
    assert set(EXPERIMENTS) == {SD_BRAD_PITT, DIGITS_SEVEN} <= set(NAMES)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"experiment": "sd-brad-pit"}, 'Did you mean "sd-brad-pitt"'),
        ({"learning_rat": 1.0}, "learning_rat"),
        ({"evaluation": {"num_imgs": 3}}, "num_imgs"),
        ({"evaluation": {"groups": ["direct"]}}, "lacks generic"),
        ({"evaluation": {"num_images": 0}}, "--num_images 0"),
        ({"target": "teacher"}, "needs --target noise"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_drawn(
    changes: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sd_unlearn.models.sampling.generate_images", pytest.fail)
    with pytest.raises(UsageError, match=expected):
        run("supervised", **changes)
    assert list(Path().iterdir()) == []


@pytest.fixture(scope="module")
def finished(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """finished(objective): its run, made once, on images that all share."""
    here = tmp_path_factory.mktemp("paper")
    (here / "seven.yaml").write_text(DIGIT_FILE.format(name="seven"))

    def make(objective: Any, beta: float | None = None, method: Any = "full", **changes: Any) -> Path:
        options = {**TINY, "concept": str(here / "seven.yaml"), "data_dir": here / "data", **changes}
        return run(
            objective,
            method,
            beta,
            1,
            here / f"{objective}-{method}",
            str(tiny_base),
            evaluation=FEW | {"cache_dir": here / "cache"},
            **options,
        )

    return make


@pytest.mark.parametrize(
    ("objective", "method"), [("pu", "full"), ("unsupervised", "full"), ("supervised", "full"), ("pu", "lora")]
)
def test_a_run_leaves_the_record_of_the_paper(finished: Callable[..., Path], objective: str, method: str) -> None:
    place = finished(objective, method=method)
    record, results = read_json(place / PAPER), read_results(place)
    assert (record["schema_version"], record["kind"], record["experiment"]) == (1, "paper", SD_BRAD_PITT)
    assert (record["seed"], record["size"]) == (1, "paper")
    told = record["settings"]
    assert (told["objective"], told["method"], told["target"]) == (objective, method, "noise")
    assert told["conditional"]
    assert told["beta"] == (None if objective == "unsupervised" else 0.25)  # 2 of 8, known from the manifest
    assert told["contamination"] == 0.25
    assert record["counts"] == {"normal": 6, "mixed_in": 2, "positive": 3, "negative": 0}
    assert record["cost"]["steps"] == 3
    assert (place / ("unet" if method == "full" else "adapter")).is_dir()
    (leak,) = (
        row for row in results.rows if (row.metric, row.group) == ("leakage", "generic") and row.subject != "base"
    )
    rate = record["rows"][0]
    assert (rate["metric"], rate["group"], rate["n"], rate["detector"]) == (
        "non_sensitive_rate",
        "all",
        8,
        leak.detector,
    )
    assert (rate["value"], rate["low"], rate["high"]) == (1 - leak.value, 1 - leak.high, 1 - leak.low)
    assert rate["low"] <= rate["value"] <= rate["high"]
    assert {row["group"] for row in record["rows"]} == {"all"}
    assert record["classifier"]["sha256"] in leak.detector


def test_objectives_share_their_images_and_not_their_weights(finished: Callable[..., Path]) -> None:
    records = [read_json(finished(objective) / PAPER) for objective in ("pu", "supervised", "unsupervised")]
    assert len({record["data_sha256"] for record in records}) == 1
    assert len({record["weights_sha256"] for record in records}) == 3


def test_a_finished_run_is_left_alone_and_another_one_refused(
    finished: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = finished("pu")
    before = (place / PAPER).read_bytes()
    monkeypatch.setattr(trainer, "run", pytest.fail)
    assert finished("pu") == place
    assert (place / PAPER).read_bytes() == before
    with pytest.raises(UsageError, match="with other options"):
        finished("pu", beta=0.5)


def test_a_run_killed_while_it_was_judged_goes_on_there(
    finished: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = finished("supervised")
    before = read_json(place / PAPER)
    (place / PAPER).unlink()
    monkeypatch.setattr("sd_unlearn.training.state.accumulate_gradients", pytest.fail)
    again = read_json(finished("supervised") / PAPER)
    for record in (before, again):
        record.pop("created")
        record["cost"].pop("sampling_seconds")
    assert again == before


def test_without_a_judge_of_the_generic_prompt_there_is_no_rate() -> None:
    with pytest.raises(UsageError, match="--metrics"):
        stable_diffusion._rows([Row("leakage", "direct", "lora", 0.5, 2)])
