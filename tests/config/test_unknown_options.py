"""Suggestions for options that a command does not have."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from sd_unlearn.cli import main
from sd_unlearn.commands import COMMANDS
from sd_unlearn.config.unknown_options import ELSEWHERE, explain_unknown


@pytest.mark.parametrize(
    ("command", "typed", "meant"),
    [
        ("train", "--lr", "--learning_rate"),
        ("train", "--lr=3", "--learning_rate"),
        ("train", "--learningrate", "--learning_rate"),
        ("train", "--stesp", "--max_train_steps"),
        ("evaluate", "--steps", "--num_inference_steps"),
        ("train", "--guidance", "--guidance_scale"),
        ("train", "--prompt", "--concept"),
        ("evaluate", "--num_image", "--num_images"),
        ("evaluate", "--strength", "--strengths"),  # which export has
    ],
)
def test_a_likely_option_is_suggested(command: str, typed: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "seven", typed, "3"]) == 2
    assert f"unknown option: {typed.partition('=')[0]}. Did you mean {meant}?" in capsys.readouterr().err


@pytest.mark.parametrize("typed", ["--banana", "-x"])
def test_without_a_likely_one_the_message_says_where_all_are(typed: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "seven", typed, "3"]) == 2
    assert f"unknown option: {typed}. All options: sd-unlearn train --help_all" in capsys.readouterr().err


def test_an_option_of_other_commands_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "seven", "--others", "people"]) == 2
    message = "unknown option: --others. It is an option of evaluate, attack, calibrate. All options: sd-unlearn train"
    assert message in capsys.readouterr().err


def test_a_run_folder_without_its_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "my run"
    run.mkdir()
    (run / "training.json").write_text("{}")
    assert main(["evaluate", str(run)]) == 2
    assert f"unexpected argument: {run}. Did you mean --run '{run}'?" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path)]) == 2
    assert "Did you mean" not in capsys.readouterr().err


def test_two_words_that_are_as_likely_suggest_none() -> None:
    assert "All options" in explain_unknown("--colour", ["--colour_of_line", "--colour_of_box"], "draw")


def test_names_of_other_programs_stand_for_options_that_exist() -> None:
    existing = {field.name for options in COMMANDS.values() for field in fields(options)}
    assert {ours for usual in ELSEWHERE.values() for ours in usual} - existing <= {"sample_batch_size"}  # of paper run
