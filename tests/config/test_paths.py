"""Paths among the options: `~` is expanded everywhere, and what a record names is found from another folder."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import yaml

from sd_unlearn.cli import main
from sd_unlearn.commands import COMMANDS
from sd_unlearn.config.base import RenderConfig
from sd_unlearn.config.evaluate import EvaluateConfig
from sd_unlearn.config.paths import NAMES, PLACES, PathOptions, expanded, local_path, recorded
from sd_unlearn.config.train import TrainConfig
from sd_unlearn.data import render
from sd_unlearn.errors import UsageError
from sd_unlearn.models.base import load_base
from sd_unlearn.models.recorded_base import load_recorded_base
from sd_unlearn.models.source import Source
from sd_unlearn.paper import commands as paper


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    return home


@pytest.mark.parametrize("config", [*COMMANDS.values(), *paper.COMMANDS.values()], ids=lambda config: config.__name__)
def test_home_is_expanded_in_every_path_of_every_command(config: type, home: Path) -> None:
    assert issubclass(config, PathOptions)
    hints = get_type_hints(config)
    names = [field.name for field in dataclasses.fields(config)]
    paths = [name for name in names if Path in (hints[name], *get_args(hints[name]))]
    texts = [name for name in names if name in (*PLACES, *NAMES)]
    lists = [name for name in texts if hints[name] == list[str]]
    assert paths
    given = {name: Path("~/x") for name in paths} | dict.fromkeys(texts, "~/x") | dict.fromkeys(lists, ["a=~/x", "~"])
    made = config(**given)
    assert all(getattr(made, name) == home / "x" for name in paths)
    assert all(getattr(made, name) == str(home / "x") for name in texts if name not in lists)
    assert all(getattr(made, name) == [f"a={home}/x", str(home)] for name in lists)


def test_only_a_leading_tilde_is_expanded() -> None:
    for text in ("a ~/b", "x/~/y", "owner/name", "~5 cats", ""):
        assert expanded(text) == text


def test_home_in_yaml_and_on_the_command_line(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "people").mkdir()
    (home / "options.yaml").write_text("run: ~/from-yaml\nothers: ~/people\n")
    assert main(["evaluate", "--config", "~/options.yaml"]) == 2
    assert f"--run {home}/from-yaml is not a folder" in capsys.readouterr().err
    for tokens in (["--run", "~/given"], ["--run=~/given"]):
        assert main(["evaluate", "--config=~/options.yaml", *tokens]) == 2
        assert f"--run {home}/given is not a folder" in capsys.readouterr().err
    assert main(["train", "seven", "--vae", "~/vae.safetensors"]) == 2
    assert f"--vae {home}/vae.safetensors" in capsys.readouterr().err


def test_local_path_leaves_names_alone(tmp_path: Path) -> None:
    for name in ("digits", "owner", "mine"):
        (tmp_path / name).mkdir()
    assert local_path("mine") == str(tmp_path / "mine")
    assert local_path("a=mine") == f"a={tmp_path}/mine"
    for name in ("digits", "owner/name", "nowhere", "a=nowhere", None):
        assert local_path(name) == name


def test_recorded_options_name_what_was_read_absolutely(tmp_path: Path) -> None:
    for name in ("seven", "i2p", "photos", "vae", "lora"):
        (tmp_path / name).mkdir()
    (tmp_path / "mine.yaml").touch()
    train = TrainConfig(concept="seven", vae="vae", data_dir=Path("photos"), output_dir=Path("runs/seven"))
    assert {key: recorded(train)[key] for key in ("concept", "vae", "data_dir", "output_dir")} == {
        "concept": "seven",  # a name, although there is such a folder
        "vae": str(tmp_path / "vae"),
        "data_dir": str(tmp_path / "photos"),
        "output_dir": "runs/seven",
    }
    evaluate = EvaluateConfig(concept=["mine.yaml"], lora=["lora", "a/b"], prompt_set="i2p", reference=["me=photos"])
    assert {key: recorded(evaluate)[key] for key in ("concept", "lora", "prompt_set", "reference")} == {
        "concept": [str(tmp_path / "mine.yaml")],
        "lora": [str(tmp_path / "lora"), "a/b"],
        "prompt_set": "i2p",
        "reference": [f"me={tmp_path}/photos"],
    }
    assert yaml.safe_load(yaml.safe_dump(recorded(evaluate))) == recorded(evaluate)


def test_records_of_relative_paths_are_found_from_another_folder(
    tiny_base: Path, concept_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_base, tmp_path / "mine")
    shutil.copytree(tiny_base / "vae", tmp_path / "vae")
    record = load_base(Source("mine", vae="vae"), device="cpu").describe()
    few = {"num_positive": 1, "num_unlabeled": 1, "num_mixed_in": 0, "num_keep": 0, "num_inference_steps": 1}
    given = {"concept": str(concept_file), "data_dir": tmp_path / "data", **few}
    render.run(RenderConfig(**given, pretrained_model_name_or_path="mine", vae="vae"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_recorded_base(record, device="cpu").hashes == {key: record[key] for key in record if "sha256" in key}
    (tmp_path / "mine").rename(tmp_path / "moved")
    with pytest.raises(UsageError, match=f"not at {tmp_path}/mine any more.* --pretrained_model_name_or_path"):
        load_recorded_base(record, device="cpu")
    assert load_recorded_base(record, device="cpu", name="../moved").sha256 == record["sha256"]
    (tmp_path / "moved").rename(tmp_path / "mine")
    (tmp_path / "vae").rename(tmp_path / "moved vae")
    with pytest.raises(UsageError, match=f"The --vae of the training is not at {tmp_path}/vae any more"):
        load_recorded_base(record, device="cpu")
    (tmp_path / "moved vae").rename(tmp_path / "vae")
    again = {"pretrained_model_name_or_path": "../mine", "vae": "../vae"}
    assert render.run(RenderConfig(**given, **again)) == tmp_path / "data"
    with pytest.raises(UsageError, match="--vae .*/vae then, default now"):
        render.run(RenderConfig(**given, pretrained_model_name_or_path="../mine"))
