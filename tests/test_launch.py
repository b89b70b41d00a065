"""How many processes `accelerate launch --cpu` was asked for, and that so many train the LoRA of one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from sd_unlearn import cli, launch
from sd_unlearn.io.files import read_json
from sd_unlearn.launch import Asked, Unclear, asked_in_vain, launch_tokens, read_command, threads_of_each

ROOT = Path(__file__).parent.parent
VAIN = {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
ACCELERATE = ["/venv/bin/python", "/venv/bin/accelerate", "launch"]
TWO = [*ACCELERATE, "--num_processes", "2", "--cpu", "train.py", "--concept", "seven"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"ACCELERATE_USE_CPU": "False"}, False),  # on a GPU accelerate starts them itself
        ({"ACCELERATE_USE_CPU": None}, False),
        ({"MASTER_PORT": None}, False),  # one process was asked for
        *(({name: "0"}, False) for name in launch.STARTED),
    ],
)
def test_only_a_lone_process_on_the_cpu_was_asked_in_vain(changes: dict[str, str | None], expected: bool) -> None:
    assert asked_in_vain({k: v for k, v in (VAIN | changes).items() if v is not None}) is expected


@pytest.mark.parametrize(
    "command",
    [
        ["/venv/bin/python", "/venv/bin/accelerate", "launch"],
        ["accelerate", "launch"],
        ["C:/venv/Scripts/accelerate.exe", "launch"],
        ["/venv/bin/python", "/venv/bin/accelerate-launch"],
        ["python", "-m", "accelerate.commands.launch"],
        ["python", "-W", "ignore", "-m", "accelerate.commands.accelerate_cli", "launch"],
        ["python", "/venv/lib/accelerate/commands/launch.py"],
    ],
    ids=lambda command: " ".join(command),
)
def test_every_way_to_write_accelerate_launch(command: list[str]) -> None:
    assert launch_tokens([*command, "--cpu", "train.py"]) == ["--cpu", "train.py"]


@pytest.mark.parametrize("command", [[], ["bash"], ["python", "train.py"], ["accelerate", "test"], ["accelerate"]])
def test_what_is_no_accelerate_launch(command: list[str]) -> None:
    assert launch_tokens(command) is None
    with pytest.raises(Unclear, match="not started by accelerate"):
        read_command(command)


def test_the_number_is_accelerates_own_not_the_scripts() -> None:
    assert read_command([*TWO, "--num_processes", "9"]) == Asked(2)
    assert read_command([*ACCELERATE, "--num-processes=3", "--cpu", "-m", "sd_unlearn.cli", "train"]) == Asked(3)
    threads = ["--num_cpu_threads_per_process", "4"]
    assert read_command([*ACCELERATE, "--cpu", "--num_processes", "2", *threads, "train.py"]) == Asked(2, 4)


def test_the_number_of_a_configuration_file() -> None:
    settings = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "'NO'",
        "mixed_precision": "'no'",
        "num_processes": 3,
        "num_machines": 1,
        "use_cpu": "true",
        "debug": "false",
    }
    Path("here.yaml").write_text("".join(f"{key}: {value}\n" for key, value in settings.items()))
    command = [*ACCELERATE, "--config_file", "here.yaml"]
    assert read_command([*command, "train.py"]) == Asked(3)
    assert read_command([*command, "--num_processes", "2", "train.py"]) == Asked(2)
    with pytest.raises(FileNotFoundError):
        read_command([*ACCELERATE, "--config_file", "gone.yaml", "train.py"])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--cpu"], "no --num_processes"),
        (["--cpu", "--num_processes", "many"], r"cannot be read \(argument --num_processes.*many"),
        (["--cpu", "--num_processes", "4", "--num_machines", "2"], "--num_machines 2"),
    ],
)
def test_what_is_unclear_says_why(options: list[str], reason: str) -> None:
    with pytest.raises(Unclear, match=reason):
        read_command([*ACCELERATE, *options, "train.py"])


def test_threads_are_as_said_else_as_set_else_the_cores_shared_out() -> None:
    assert threads_of_each(Asked(2, 5), {"OMP_NUM_THREADS": "3"}, 16) == 5
    assert threads_of_each(Asked(2), {"OMP_NUM_THREADS": "3"}, 16) == 3
    assert threads_of_each(Asked(3), {}, 16) == 5
    assert threads_of_each(Asked(4), {"OMP_NUM_THREADS": "all"}, 2) == 1


@pytest.fixture
def become(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What this process was replaced by; accelerate's environment, and a parent that asked for two."""
    calls: list[list[str]] = []
    for name in launch.STARTED:
        monkeypatch.delenv(name, raising=False)
    for name, value in (VAIN | {"OMP_NUM_THREADS": "1", launch.GRACE: ""}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(launch.GRACE)
    monkeypatch.setattr(os, "execv", lambda program, arguments: calls.append([program, *arguments]))
    monkeypatch.setattr(sys, "argv", ["train.py", "--concept", "Brad Pitt"])
    monkeypatch.setattr(launch, "_cores", lambda: 6)
    parent_is(monkeypatch, TWO)
    return calls


def parent_is(monkeypatch: pytest.MonkeyPatch, command: list[str] | None, **environment: str) -> None:
    parent = SimpleNamespace(cmdline=lambda: command, environ=lambda: environment) if command else None
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(parent=lambda: parent))


def test_the_process_is_replaced_with_its_own_arguments(
    become: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    several = [sys.executable, sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    launch.start_several()
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", SimpleNamespace(name="sd_unlearn.cli"))
    launch.start_several()
    assert become == [
        [*several, "train.py", "--concept", "Brad Pitt"],
        [*several, "-m", "sd_unlearn.cli", "--concept", "Brad Pitt"],
    ]
    assert os.environ["OMP_NUM_THREADS"] == "3"
    assert int(os.environ[launch.GRACE]) > 600  # the steps of a real Stable Diffusion take minutes here
    out, err = capsys.readouterr()
    assert (out, set(err.splitlines())) == ("", {"Starting 2 processes on the CPU, 3 thread(s) each."})


@pytest.mark.parametrize("command", [None, ["bash"], [*ACCELERATE, "--cpu", "--num_machines", "2", "train.py"]])
def test_in_doubt_one_process_goes_on_and_says_how_to_start_several(
    become: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: Any
) -> None:
    parent_is(monkeypatch, command)
    launch.start_several()
    assert become == []
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "torchrun --standalone --nproc_per_node N" in err


def test_a_parent_that_cannot_be_asked_is_no_failure(
    become: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def gone() -> None:
        raise psutil.AccessDenied(1)

    monkeypatch.setattr(psutil, "Process", gone)
    launch.start_several()
    assert become == []
    assert "torchrun" in capsys.readouterr().err


def test_no_process_is_replaced_without_need(become: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    parent_is(monkeypatch, [*ACCELERATE, "--num_processes", "1", "--cpu", "train.py"])
    launch.start_several()
    parent_is(monkeypatch, TWO)
    monkeypatch.setenv("RANK", "0")
    launch.start_several()
    assert become == []


def test_accelerate_launch_on_two_cpu_processes_trains_the_lora_of_one(tiny_base: Path, concept_file: Path) -> None:
    train = [
        "--concept",
        str(concept_file),
        "--pretrained_model_name_or_path",
        str(tiny_base),
        "--num_inference_steps",
        "1",
        "--max_train_steps",
        "3",
        "--validation_steps",
        "0",
        "--report_to",
        "none",
        "--data_dir",
        "data",
        "--learning_rate",
        "0.01",
        "--render_batch_size",
        "4",
    ]
    start = ["-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "2"]
    done = subprocess.run(
        [sys.executable, *start, str(ROOT / "train.py"), *train, "--output_dir", "two", "--train_batch_size", "8"],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Starting 2 processes on the CPU, 1 thread(s) each.") == 1
    assert read_json(Path("two/training.json"))["cost"]["processes"] == 2
    assert cli.main(["train", *train, "--output_dir", "one", "--train_batch_size", "16"]) == 0
    one, two = (load_file(Path(name, "adapter/adapter_model.safetensors")) for name in ("one", "two"))
    assert one.keys() == two.keys()
    ours, theirs = (torch.cat([lora[name].flatten() for name in sorted(lora)]) for lora in (one, two))
    assert (ours - theirs).abs().max() <= 1e-5
    assert ours.abs().max() > 1e-2
