"""The experiments on text-to-image models: their options, and whole runs on a base of a few thousand weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from evaluation_runs import DIGIT_FILE

from sd_unlearn.config.checks import check_train
from sd_unlearn.errors import UsageError
from sd_unlearn.io.reading import read_json
from sd_unlearn.paper.experiments import DIGITS_SEVEN, NAMES, SD_BRAD_PITT
from sd_unlearn.paper.stable_diffusion import EXPERIMENTS, PAPER, run, train_config
from sd_unlearn.paper.stable_diffusion_record import rows_of
from sd_unlearn.results import Row, read_results
from sd_unlearn.training import trainer

pytestmark = pytest.mark.usefixtures("one_thread")
TINY: dict[str, Any] = {
    "num_unlabeled": 6,
    "num_mixed_in": 2,
    "num_positive": 3,
    "num_inference_steps": 2,
    "effective_batch_size": 4,
    "max_train_steps": 3,
    "lr_warmup_steps": 0,
    "validation_steps": 0,
    "report_to": "none",
    "checkpointing_steps": 3,
}
FEW = {"num_images": 8, "num_keep_images": 6, "num_inference_steps": 2}


def test_the_options_are_those_of_the_paper() -> None:
    config = train_config(SD_BRAD_PITT, "pu")
    assert (config.num_unlabeled, config.num_mixed_in, config.num_positive, config.num_keep) == (64, 16, 20, 0)
    assert (config.method, config.learning_rate, config.max_train_steps, config.effective_batch_size) == (
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
def test_every_variant_has_valid_options_and_its_own_folder(experiment: str, objective: Any, method: Any) -> None:
    config = train_config(experiment, objective, method, 0.1, 7)
    check_train(config)
    assert config.output_dir is not None
    assert config.output_dir.parent == Path("runs/paper") / experiment
    assert {"seed7", objective, method} <= set(config.output_dir.name.split("-"))
    assert (config.objective, config.method, config.beta, config.seed) == (objective, method, 0.1, 7)


def test_beta_is_part_of_the_folder_name_only_if_the_objective_uses_it() -> None:
    def place(*options: Any) -> Path | None:
        return train_config(SD_BRAD_PITT, *options).output_dir

    assert place("pu", "full", 0.1) != place("pu", "full", 0.3) != place("pu")
    assert place("unsupervised", "full", 0.1) == place("unsupervised")
    assert train_config(SD_BRAD_PITT, "pu", seed=1).data_dir != train_config(SD_BRAD_PITT, "pu", seed=2).data_dir
    assert (
        train_config(SD_BRAD_PITT, "pu", "full", 0.1).data_dir
        == train_config(SD_BRAD_PITT, "supervised", "lora").data_dir
    )


def test_each_base_has_a_folder_for_its_images() -> None:
    bases = (None, "stable-diffusion-v1-5/stable-diffusion-v1-5", "models/mine.safetensors")
    places = [train_config(SD_BRAD_PITT, "pu", pretrained_model_name_or_path=base).data_dir for base in bases]
    names = ("", "-stable-diffusion-v1-5-stable-diffusion-v1-5", "-mine-safetensors")
    assert places == [Path(f"data/paper/sd-brad-pitt-42{name}") for name in names]


def test_the_experiments_are_listed_by_paper_list() -> None:
    assert set(EXPERIMENTS) == {SD_BRAD_PITT, DIGITS_SEVEN} <= set(NAMES)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"experiment": "sd-brad-pit"}, 'Did you mean "sd-brad-pitt"'),
        ({"learning_rat": 1.0}, "learning_rat"),
        ({"evaluation": {"num_imgs": 3}}, "num_imgs"),
        ({"evaluation": {"groups": ["direct"]}}, "must include generic"),
        ({"evaluation": {"num_images": 0}}, "--num_images 0"),
        ({"target": "teacher"}, "needs --target noise"),
    ],
)
def test_invalid_options_are_rejected_before_anything_is_generated(
    changes: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sd_unlearn.models.sampling.generate_images", pytest.fail)

    def start(experiment: str = SD_BRAD_PITT, evaluation: Any = None, **options: Any) -> None:
        run(experiment, train_config(experiment, "supervised", **options), evaluation)

    with pytest.raises(UsageError, match=expected):
        start(**changes)
    assert list(Path().iterdir()) == []


@pytest.fixture(scope="module")
def finished(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """finished(objective): the folder of its run. It is trained once, on images that all runs share."""
    here = tmp_path_factory.mktemp("paper")
    (here / "seven.yaml").write_text(DIGIT_FILE.format(name="seven"))

    def make(objective: Any, beta: float | None = None, method: Any = "full", **changes: Any) -> Path:
        options = {**TINY, "concept": str(here / "seven.yaml"), "data_dir": here / "data", **changes}
        options |= {"pretrained_model_name_or_path": str(tiny_base), "output_dir": here / f"{objective}-{method}"}
        config = train_config(SD_BRAD_PITT, objective, method, beta, 1, **options)
        return run(SD_BRAD_PITT, config, FEW | {"cache_dir": here / "cache"})

    return make


@pytest.mark.parametrize(
    ("objective", "method"), [("pu", "full"), ("unsupervised", "full"), ("supervised", "full"), ("pu", "lora")]
)
def test_a_run_writes_its_record(finished: Callable[..., Path], objective: str, method: str) -> None:
    place = finished(objective, method=method)
    record, results = read_json(place / PAPER), read_results(place)
    assert (record["schema_version"], record["kind"], record["experiment"]) == (1, "paper", SD_BRAD_PITT)
    assert (record["seed"], record["size"]) == (1, "paper")
    used = record["settings"]
    assert (used["objective"], used["method"], used["target"]) == (objective, method, "noise")
    assert used["conditional"]
    assert used["beta"] == (None if objective == "unsupervised" else 0.25)  # 2 of 8, known of generated images
    assert used["contamination"] == 0.25
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


def test_objectives_share_images_but_not_weights(finished: Callable[..., Path]) -> None:
    records = [read_json(finished(objective) / PAPER) for objective in ("pu", "supervised", "unsupervised")]
    assert len({record["data_sha256"] for record in records}) == 1
    assert len({record["weights_sha256"] for record in records}) == 3


def test_a_finished_run_is_kept_and_other_options_are_rejected(
    finished: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = finished("pu")
    before = (place / PAPER).read_bytes()
    monkeypatch.setattr(trainer, "run", pytest.fail)
    assert finished("pu") == place
    assert (place / PAPER).read_bytes() == before
    with pytest.raises(UsageError, match="with other options"):
        finished("pu", beta=0.5)


def test_a_run_interrupted_during_evaluation_resumes_there(
    finished: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = finished("supervised")
    before = read_json(place / PAPER)
    (place / PAPER).unlink()
    monkeypatch.setattr("sd_unlearn.training.state.accumulate_gradients", pytest.fail)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("sd_unlearn.evaluation.evaluate.run", interrupt)
        with pytest.raises(KeyboardInterrupt, match=f"kept in {place}"):
            finished("supervised")
    again = read_json(finished("supervised") / PAPER)
    for record in (before, again):
        record.pop("created")
        record["cost"].pop("sampling_seconds")
    assert again == before


def test_a_rate_needs_leakage_on_the_generic_prompt() -> None:
    with pytest.raises(UsageError, match="--metrics"):
        rows_of([Row("leakage", "direct", "lora", 0.5, 2)])
