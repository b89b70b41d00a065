"""Every examples/*.yaml is read by the command in its header, and its options are valid."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from sd_unlearn import cli
from sd_unlearn.config.checks import check_evaluate, check_train
from sd_unlearn.config.evaluate import EvaluateConfig
from sd_unlearn.config.train import TrainConfig
from sd_unlearn.data.find_concept import load_concept
from sd_unlearn.evaluation import evaluate
from sd_unlearn.evaluation.fail_if import parse_condition
from sd_unlearn.io.reading import read_yaml
from sd_unlearn.training import trainer

ROOT = Path(__file__).parents[2]
EXAMPLES = [file for file in sorted((ROOT / "examples").glob("*.yaml")) if file.stem != "jobs"]


def command_in(file: Path) -> list[str]:
    """The arguments of the first command in the header."""
    line = re.search(r"^#   (.*)$", file.read_text(), re.MULTILINE)
    assert line
    words = shlex.split(line[1])
    return ["train", *words[words.index("train.py") + 1 :]] if "train.py" in words else words[1:]


@pytest.mark.parametrize("file", EXAMPLES, ids=[file.stem for file in EXAMPLES])
def test_an_example_is_valid(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []
    monkeypatch.setattr(trainer, "run", lambda config: found.append(config) or Path("run"))
    monkeypatch.setattr(evaluate, "run", lambda config: found.append(config) or {})
    monkeypatch.chdir(ROOT)
    assert cli.main(command_in(file)) == 0
    (config,) = found
    assert config.config == file.relative_to(ROOT)
    for key, value in read_yaml(file, "--config").items():
        assert getattr(config, key) == (Path(value) if isinstance(getattr(config, key), Path) else value)
    if isinstance(config, TrainConfig):
        check_train(config)
        assert load_concept(config.concept, config.anchor, config.kind)
    else:
        assert isinstance(config, EvaluateConfig)
        check_evaluate(config)
        assert [parse_condition(text) for text in config.fail_if]


def test_there_are_examples() -> None:
    assert {"sd15-8gb", "sdxl", "own-photos", "ci-gate"} <= {file.stem for file in EXAMPLES}


def test_the_example_of_a_job_list_becomes_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = ROOT / "examples" / "jobs.yaml"
    monkeypatch.chdir(tmp_path)
    assert re.search(r"^# sd-unlearn batch examples/jobs\.yaml", file.read_text())
    assert cli.main(["batch", str(file), "--dry_run"]) == 0
    assert "14 tasks of 4 jobs: 14 missing." in capsys.readouterr().out


@pytest.mark.parametrize("name", ["skypilot", "kuberay"])
def test_an_example_of_a_cluster_is_yaml_with_a_valid_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "examples" / "cluster" / f"{name}.yaml").read_text()
    assert yaml.safe_load(text)
    command = re.search(r"sd-unlearn (batch jobs\.yaml [-\w ]+)", text)
    assert command
    (Path.cwd() / "jobs.yaml").write_text((ROOT / "examples" / "jobs.yaml").read_text())
    assert cli.main([*shlex.split(command[1]), "--dry_run"]) == 0
    assert "14 missing" in capsys.readouterr().out
