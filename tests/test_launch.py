"""Several processes on the CPU: which launcher works, and that two processes train the same LoRA as one."""

from __future__ import annotations

import itertools
import os
import shlex
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
import torch
from safetensors.torch import load_file
from train_runs import train_twice

from sd_unlearn import cli, launch
from sd_unlearn.errors import UnlearnError, UsageError
from sd_unlearn.io.reading import read_json

ROOT = Path(__file__).parent.parent
LONE = {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
PYTHON_M = [sys.executable, "-m"]
TRAIN = (
    "--num_inference_steps 1 --max_train_steps 3 --validation_steps 0 --report_to none --data_dir data "
    "--learning_rate 0.01 --render_batch_size 4"
).split()


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*launch.STARTED, *LONE):
        monkeypatch.delenv(name, raising=False)


def test_rank_and_count_without_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (launch.process_rank(), launch.process_count()) == (0, 1)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert (launch.process_rank(), launch.process_count()) == (2, 4)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"ACCELERATE_USE_CPU": "False"}, False),  # on a GPU accelerate starts all processes itself
        ({"ACCELERATE_USE_CPU": None}, False),
        ({"MASTER_PORT": None}, False),  # accelerate was asked for one process
        *(({name: "0"}, False) for name in launch.STARTED),
    ],
)
def test_only_a_single_process_on_the_cpu_is_lone(changes: dict[str, str | None], expected: bool) -> None:
    assert launch.is_lone_process({k: v for k, v in (LONE | changes).items() if v is not None}) is expected


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    launch.prepare_processes()
    assert chosen == []
    for name, value in {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    launch.prepare_processes()
    assert chosen == [1]


@pytest.mark.parametrize(
    ("spec", "program"),
    [
        (None, "train.py"),
        (SimpleNamespace(name="sd_unlearn.cli"), "-m sd_unlearn.cli"),
        (SimpleNamespace(name="sd_unlearn.__main__"), "-m sd_unlearn"),
    ],
)
def test_the_error_contains_the_torchrun_command(
    monkeypatch: pytest.MonkeyPatch, spec: SimpleNamespace | None, program: str
) -> None:
    for name, value in LONE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["train.py", "--concept", "Brad Pitt"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    with pytest.raises(UsageError) as caught:
        launch.prepare_processes()
    command = (
        f"TORCH_ELASTIC_SHUTDOWN_TIMEOUT=3600 torchrun --standalone --nproc_per_node N {program} --concept 'Brad Pitt'."
    )
    assert command in str(caught.value)


@pytest.mark.parametrize("command", ["train", "evaluate", "paper run mnist5k-even"])
def test_every_command_for_several_processes_refuses_a_lone_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    for name, value in LONE.items():
        monkeypatch.setenv(name, value)
    assert cli.main(command.split()) == 2
    assert "torchrun --standalone" in capsys.readouterr().err


def test_processes_without_a_gpu_are_joined_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for available, expected in ((True, None), (False, "true")):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setattr(torch.accelerator, "is_available", lambda value=available: value)
        launch.prepare_processes()
        assert os.environ.get("ACCELERATE_USE_CPU") == expected
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    launch.prepare_processes()
    assert os.environ["ACCELERATE_USE_CPU"] == "false"


def test_the_cpu_launcher_of_accelerate_starts_one_process_and_is_refused() -> None:
    """If accelerate ever starts the other process, this test fails and the refusal can go."""
    start = ["accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*PYTHON_M, *start, str(ROOT / "train.py"), "--concept", "seven"],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
    )
    errors = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert done.returncode != 0
    assert len(errors) == 1
    assert f"--nproc_per_node N {shlex.quote(str(ROOT / 'train.py'))} --concept seven." in errors[0]


def test_torchrun_with_two_processes_trains_the_lora_of_one(tiny_base: Path, concept_file: Path) -> None:
    """Without ACCELERATE_USE_CPU; test_trainer's two processes have it."""
    train = ["--concept", str(concept_file), "--pretrained_model_name_or_path", str(tiny_base), *TRAIN]
    train += ["--lora_targets", "attention"]  # with all layers, AdamW amplifies rounding
    start = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(ROOT / "train.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*PYTHON_M, *start, *train, "--output_dir", "two", "--effective_batch_size", "16"],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert read_json(Path("two/training.json"))["cost"]["processes"] == 2
    assert cli.main(["train", *train, "--output_dir", "one", "--effective_batch_size", "16"]) == 0
    one, two = (load_file(Path(name, "adapter/adapter_model.safetensors")) for name in ("one", "two"))
    assert one.keys() == two.keys()
    ours, theirs = (torch.cat([lora[name].flatten() for name in sorted(lora)]) for lora in (one, two))
    assert (ours - theirs).abs().max() <= 1e-5
    assert ours.abs().max() > 1e-2


def test_two_processes_train_twice_in_one_program(tiny_base: Path, concept_file: Path) -> None:
    """The second training has the process group of the first; a new one would find the addresses of the old."""
    train = ["--concept", str(concept_file), "--pretrained_model_name_or_path", str(tiny_base), *TRAIN]
    forked.run_pair(train_twice, train)
    assert read_json(Path("second/training.json"))["cost"]["processes"] == 2


def test_waiting_for_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    left = [3, 3, 2, 1, 0]
    launch.wait_for_others(lambda: 1 / 0, "images", 0)  # a single process waits for nobody and looks at nothing
    monkeypatch.setattr(launch, "process_count", lambda: 2)
    launch.wait_for_others(lambda: left.pop(0), "images", 5, poll=0)
    assert left == []
    with pytest.raises(UnlearnError, match="2 images are still missing: another process must have stopped"):
        launch.wait_for_others(lambda: 2, "images", 0, poll=0)


def test_waiting_while_there_are_signs_of_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "process_count", lambda: 2)
    left, beats = [1] * 9 + [0], itertools.count()
    launch.wait_for_others(lambda: left.pop(0), "attacks", 0.15, poll=0.05, signs=lambda: next(beats))  # 0.4 seconds
    left = [1] * 9 + [0]
    with pytest.raises(UnlearnError, match="1 attacks are still missing"):
        launch.wait_for_others(lambda: left.pop(0), "attacks", 0.15, poll=0.05, signs=lambda: 0)


def test_a_heartbeat_ends_with_its_block(tmp_path: Path) -> None:
    file, threads = tmp_path / "new" / "process-1.alive", threading.active_count()
    assert launch.last_beat(file) == 0
    with launch.heartbeat(file, every=0.01):
        first, end = launch.last_beat(file), time.monotonic() + 60
        while launch.last_beat(file) == first and time.monotonic() < end:
            time.sleep(0.01)
        assert launch.last_beat(file) > first > 0
    assert launch.last_beat(file) == 0
    assert threading.active_count() == threads


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
)
def test_waiting_threads_sleep_early_unless_the_environment_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], expected: str | None
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    launch.share_cores()
    assert os.environ.get("GOMP_SPINCOUNT") == expected
