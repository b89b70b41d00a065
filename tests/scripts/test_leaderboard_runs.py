"""scripts/leaderboard_runs.py: a finished training is kept as long as its options are those of today."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import sd_unlearn
from sd_unlearn.io.run_folder import CONFIG, TRAINING

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A finished training of 250 steps with the defaults."""
    (tmp_path / TRAINING).write_text("{}")
    write_config(tmp_path, max_train_steps=250, beta=0.12)
    return tmp_path


def write_config(run: Path, **changes: Any) -> None:
    from leaderboard_runs import TrainConfig, recorded

    config = recorded(TrainConfig(concept=["seven"])) | changes
    (run / CONFIG).write_text(yaml.safe_dump(config))


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options of every training that was started."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(sd_unlearn, "train", lambda concept, **options: calls.append(options))
    return calls


def test_a_finished_training_is_not_repeated(finished: Path, trained: list[dict[str, Any]]) -> None:
    from leaderboard_runs import train_once

    train_once("seven", finished, {})
    train_once("seven", finished, {"max_train_steps": 250})
    assert not trained


@pytest.mark.parametrize("former", [{"learning_rate": 4e-4}, {"max_train_steps": 500}])
def test_one_of_former_defaults_is_repeated(
    finished: Path, trained: list[dict[str, Any]], former: dict[str, Any]
) -> None:
    from leaderboard_runs import train_once

    write_config(finished, **{"max_train_steps": 250, **former})
    train_once("seven", finished, {})
    assert [one["overwrite"] for one in trained] == [True]
    train_once("seven", finished, former)
    assert len(trained) == 1


def test_several_concepts_have_more_steps(finished: Path, trained: list[dict[str, Any]]) -> None:
    from leaderboard_runs import train_once

    write_config(finished, max_train_steps=1250)
    train_once("list.yaml", finished, {}, concepts=50)
    assert not trained
    train_once("list.yaml", finished, {}, concepts=100)
    assert trained


def test_what_a_closed_form_does_not_use_cannot_differ(finished: Path, trained: list[dict[str, Any]]) -> None:
    from leaderboard_runs import train_once

    write_config(finished, objective="uce", learning_rate=None, max_train_steps=None)
    train_once("seven", finished, {"objective": "uce"})
    assert not trained


def test_an_interrupted_training_continues(tmp_path: Path, trained: list[dict[str, Any]]) -> None:
    from leaderboard_runs import train_once

    (tmp_path / "checkpoints" / "step-0010").mkdir(parents=True)
    train_once("seven", tmp_path, {})
    assert [one["resume_from_checkpoint"] for one in trained] == ["latest"]
