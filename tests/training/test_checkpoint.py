"""A run that is killed, interrupted or out of disk space resumes to identical results, or says what to do."""

from __future__ import annotations

import io
import json
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from multiprocessing.process import BaseProcess
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from PIL import Image
from train_runs import ADAPTER, Config, flags, logged, make, rendered, settings

from sd_unlearn import cli
from sd_unlearn.config.train import TrainConfig
from sd_unlearn.errors import UnlearnError, UsageError
from sd_unlearn.io.files import write_json
from sd_unlearn.io.reading import read_json, read_jsonl
from sd_unlearn.io.run_folder import weights_sha256
from sd_unlearn.models import sampling
from sd_unlearn.models.sampling import Sampler
from sd_unlearn.objectives.teacher import PredictionBank
from sd_unlearn.training import checkpoint, learned_captions, provenance, setup, trainer
from sd_unlearn.training.state import TrainingState

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def place(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rendered(tmp_path_factory.mktemp("place"), tiny_base)


@pytest.fixture(scope="module")
def make_config(place: Path, tiny_base: Path) -> Config:
    return lambda output, **changes: make(place, tiny_base, output, **changes)


@pytest.fixture(scope="module")
def whole(make_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run. Do not change it."""
    return trainer.run(make_config(tmp_path_factory.mktemp("runs") / "whole", checkpointing_steps=0))


@pytest.fixture(scope="module")
def once_stopped(make_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        return interrupted(tmp_path_factory.mktemp("stopped"), 7, patch, make_config("run", checkpointing_steps=3))


@pytest.fixture
def stopped(once_stopped: Path) -> Path:
    """A run ended by Ctrl-C after step 7."""
    return shutil.copytree(once_stopped, Path("run"))


def interrupted(folder: Path, steps: int, monkeypatch: pytest.MonkeyPatch, config: TrainConfig) -> Path:
    """Train in a folder until Ctrl-C during step `steps`; returns the absolute path of the run, which tests copy."""
    monkeypatch.chdir(folder)
    with interrupt_after(steps, monkeypatch), pytest.raises(KeyboardInterrupt):
        trainer.run(config)
    return Path(str(config.output_dir)).absolute()


@contextmanager
def interrupt_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Send a real SIGINT to this process during step `steps`."""
    step, taken = TrainingState.take_step, []

    def counted(self: TrainingState, *arguments: object) -> object:
        taken.append(1)
        if len(taken) == steps:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(TrainingState, "take_step", counted)
        yield


@contextmanager
def full_disk() -> Iterator[Callable[[int], None]]:
    """Yields fill(bytes), which limits the size of files until the block ends.

    stderr is discarded: a progress bar that cannot be written would hold tqdm's lock forever.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with redirect_stderr(io.StringIO()):
            yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def same(run: Path, whole: Path) -> bool:
    """Whether two runs have bit-identical LoRAs and metrics."""
    return (run / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes() and logged(run) == logged(whole)


def test_a_run_killed_at_five_random_moments_gives_identical_results(place: Path, tiny_base: Path, whole: Path) -> None:
    """With a checkpoint at every step, so that many of the kills hit a save."""
    command = ["train", *flags(settings(place, tiny_base)), "--output_dir", "run", "--resume_from_checkpoint", "latest"]
    moments, output, log = random.Random(5), Path("run"), Path("log.txt")
    for number in range(5):
        log.write_text("")
        process = forked.start(cli.main, command, log=log)
        reach = 4 * number + moments.randrange(4)
        wait_for(lambda reach=reach: "Forgetting" in log.read_text() and newest(output) >= reach, process)
        time.sleep(moments.uniform(0, 0.08))  # about a step and its save
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, log.read_text()
        assert not (output / "training.json").exists()
    assert checkpoint.list_checkpoints(output), "no kill came after a checkpoint"
    last = forked.start(cli.main, command, log=log)
    last.join(forked.PATIENCE)
    assert last.exitcode == 0, log.read_text()
    assert same(output, whole)
    assert {p.name for p in (output / "checkpoints").iterdir()} == {"step-000023", "step-000024"}
    assert not [p for p in output.rglob("*") if p.name.endswith((".tmp", ".old"))]


def newest(output: Path) -> int:
    """The step of the newest checkpoint, 0 before the first."""
    return max((int(p.name.removeprefix("step-")) for p in checkpoint.list_checkpoints(output)), default=0)


def wait_for(condition: Callable[[], bool], process: BaseProcess) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert process.exitcode is None, "it ended by itself"
        assert time.monotonic() < end, "it never started"
        time.sleep(0.005)


def test_ctrl_c_saves_a_checkpoint_that_resumes(
    stopped: Path, make_config: Config, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [p.name for p in checkpoint.list_checkpoints(stopped)] == ["step-000006", "step-000007"]
    assert not (stopped / "training.json").exists()
    trainer.run(make_config("run", resume_from_checkpoint="latest"))
    assert "Resuming from run/checkpoints/step-000007" in capsys.readouterr().err
    assert same(stopped, whole)
    record = read_json(stopped / "training.json")
    assert yaml.safe_load((stopped / "config.yaml").read_text())["resume_from_checkpoint"] is None
    assert record["cost"]["steps"] == 24
    assert record["cost"]["images_seen"] == read_json(whole / "training.json")["cost"]["images_seen"]


def test_the_command_says_how_to_resume(
    place: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGINT)
    with interrupt_after(2, monkeypatch):
        assert cli.main(["train", *flags(settings(place, tiny_base)), "--output_dir", "run"]) == 130
    said = capsys.readouterr().err
    assert "Saved step 2 of 24 in run. Add --resume_from_checkpoint latest to continue." in said
    assert signal.getsignal(signal.SIGINT) is before

    step = TrainingState.take_step

    def second(self: TrainingState, *arguments: object) -> object:
        if self.step == 3:
            raise KeyboardInterrupt  # as a second Ctrl-C, which saves nothing
        return step(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(TrainingState, "take_step", second)
    command = ["train", *flags(settings(place, tiny_base)), "--output_dir", "run", "--overwrite"]
    assert cli.main(command) == 130
    said = capsys.readouterr().err
    resume = "Replace --overwrite with --resume_from_checkpoint latest to continue."
    assert f"The last checkpoint is run/checkpoints/step-000003. {resume}" in said


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "adamw8bit"},
        {"method": "full", "lora_dropout": 0.0, "target": "noise"},
        {"method": "full", "lora_dropout": 0.0},
        {"train_text_encoder": True},
        {"use_dora": True, "lora_targets": "all_linear+conv"},
        pytest.param(
            {"quantize_base": "nf4", "probe_steps": 3, "validation_steps": 5, "gradient_checkpointing": True},
            marks=pytest.mark.slow,  # nf4 on a CPU
        ),
        {"probe_steps": 3, "gradient_share_steps": 2, "validation_steps": 5},
        {"teacher_reuse": 2},
        {"robust": True, "teacher_reuse": 2},
    ],
)
def test_every_kind_of_run_resumes_exactly(
    make_config: Config, monkeypatch: pytest.MonkeyPatch, options: dict[str, object]
) -> None:
    monkeypatch.setattr(sampling, "DEFAULT_SAMPLER", Sampler(2, 7.5, 16))  # of the previews
    monkeypatch.setattr(setup, "REPEATED_STEPS", 3)
    for name, value in {"START": 2, "EVERY": 2, "POOL": 2, "SEARCH_STEPS": 2, "ROWS": 4}.items():
        monkeypatch.setattr(learned_captions, name, value)
    usual = {"max_train_steps": 10, "checkpointing_steps": 4, **options}
    whole = trainer.run(make_config("whole", **usual))
    with interrupt_after(6, monkeypatch), pytest.raises(KeyboardInterrupt):
        trainer.run(make_config("run", **usual))
    for resume in ("run/checkpoints/step-000004", "latest"):
        trainer.run(make_config("run", **usual, resume_from_checkpoint=resume))
        assert weights_sha256(Path("run")) == weights_sha256(whole)
        assert logged(Path("run")) == logged(whole)
        Path("run/training.json").unlink()


REUSED = {"max_train_steps": 10, "checkpointing_steps": 4, "teacher_reuse": 3}


@pytest.fixture(scope="module")
def once_in_block(make_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "REPEATED_STEPS", 3)
        return interrupted(tmp_path_factory.mktemp("in-block"), 5, patch, make_config("run", **REUSED))


@pytest.fixture
def in_block(once_in_block: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run ended in the second visit of a block of 3 steps, before its end."""
    monkeypatch.setattr(setup, "REPEATED_STEPS", 3)
    return shutil.copytree(once_in_block, Path("run"))


@pytest.mark.parametrize(
    "changes",
    [
        {"teacher_reuse": 1},
        {"teacher_reuse": 2},
        {"robust": True},
        {"effective_batch_size": 24},
        {"effective_batch_size": 10},
        {"unconditional": 0.5},
    ],
)
def test_forced_changes_start_a_new_block(
    in_block: Path, make_config: Config, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object]
) -> None:
    """The offsets that the teacher has stored for the rows of the old block are not used for others."""
    read: list[bool] = []
    original = PredictionBank.read

    def watched(self: PredictionBank, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        read.append(True)
        return original(self, rows)

    monkeypatch.setattr(PredictionBank, "read", watched)
    options = REUSED | {"max_train_steps": 8, "force_resume": True, "resume_from_checkpoint": "latest"} | changes
    trainer.run(make_config("run", **options))
    assert not read  # the three steps left are the first visit of a block
    assert read_json(in_block / "training.json")["cost"]["steps"] == 8


def test_reuse_and_robust_can_be_turned_on_and_off(make_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "REPEATED_STEPS", 3)
    trainer.run(make_config("run", teacher_reuse=1, robust=True, max_train_steps=2))
    for steps, changes in enumerate([{"robust": False}, {"teacher_reuse": 3}, {"teacher_reuse": 3, "robust": True}], 3):
        options = {"teacher_reuse": 1} | changes | {"max_train_steps": steps}
        trainer.run(make_config("run", force_resume=True, resume_from_checkpoint="latest", **options))
    assert read_json(Path("run/training.json"))["cost"]["steps"] == 5


def test_a_checkpoint_without_offsets_starts_a_new_block(in_block: Path, make_config: Config) -> None:
    """Earlier versions did not save them."""
    path = checkpoint.list_checkpoints(in_block)[-1] / "state.pt"
    state = torch.load(path, weights_only=True)
    del state["offsets"], state["sampler"]["block"]
    torch.save(state, path)
    trainer.run(make_config("run", **REUSED, resume_from_checkpoint="latest"))
    assert read_json(in_block / "training.json")["cost"]["steps"] == 10


def test_repeating_the_command_does_not_delete_an_unfinished_run(stopped: Path, make_config: Config) -> None:
    before = {p: p.stat().st_mtime_ns for p in stopped.rglob("*")}
    with pytest.raises(UsageError, match=r"step-000007.*--resume_from_checkpoint latest.*--overwrite"):
        trainer.run(make_config("run"))
    assert {p: p.stat().st_mtime_ns for p in stopped.rglob("*")} == before
    trainer.run(make_config("run", overwrite=True, max_train_steps=2))
    assert [p.name for p in checkpoint.list_checkpoints(stopped)] == ["step-000001", "step-000002"]


def test_latest_starts_from_the_beginning_without_checkpoints(
    make_config: Config, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert same(trainer.run(make_config("run", resume_from_checkpoint="latest")), whole)
    assert "run has no checkpoints yet" in capsys.readouterr().err


def test_resuming_an_earlier_checkpoint_by_its_path(stopped: Path, make_config: Config, whole: Path) -> None:
    path = stopped / "checkpoints" / "step-000006"
    trainer.run(make_config("run", resume_from_checkpoint=str(path)))
    assert same(stopped, whole)
    with pytest.raises(UsageError, match=r"nowhere is not a checkpoint.*step-0000"):
        trainer.run(make_config("run", resume_from_checkpoint="nowhere"))


def test_resuming_a_finished_run_does_nothing(
    whole: Path, make_config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer.run(make_config("run", max_train_steps=4))
    before = {p: p.stat().st_mtime_ns for p in Path("run").rglob("*")}
    trainer.run(make_config("run", max_train_steps=4, resume_from_checkpoint="latest"))
    assert "run is finished" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in Path("run").rglob("*")} == before


def test_a_finished_run_without_checkpoints_is_not_trained_again(
    whole: Path, make_config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    """Saved without them, or they were deleted since: repeating the command must not delete the run."""
    run = shutil.copytree(whole, Path("run"))
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    for forced in (False, True):
        assert trainer.run(make_config("run", resume_from_checkpoint="latest", force_resume=forced)) == run
        assert "run is finished" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "--seed was 0 and is 1"),
        ({"rank": 4}, "--rank was 2 and is 4"),
        ({"lora_dropout": 0.0}, "--lora_dropout was 0.2 and is 0.0"),  # the default
        ({"pretrained_model_name_or_path": "digits"}, "--pretrained_model_name_or_path was .* and is digits"),
        ({"concept": "seven"}, "the concept was Brad Pitt and is seven"),
    ],
)
def test_a_finished_run_without_checkpoints_is_not_taken_for_another(
    whole: Path, make_config: Config, change: dict[str, object], message: str
) -> None:
    shutil.copytree(whole, Path("run"))
    for dry_run in (False, True):
        options = {"resume_from_checkpoint": "latest", "data_dir": Path("other"), "dry_run": dry_run} | change
        with pytest.raises(UsageError, match=f"run is a finished run without checkpoints.*{message}.*--overwrite"):
            trainer.run(make_config("run", **options))


@pytest.mark.parametrize("part", ["write_concepts", "write_text"])
def test_a_run_killed_while_its_folder_is_created_can_be_started_again(
    make_config: Config, whole: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(provenance, part, killed)
        with pytest.raises(KeyboardInterrupt):
            trainer.run(make_config("run", resume_from_checkpoint="latest"))
    assert same(trainer.run(make_config("run", resume_from_checkpoint="latest")), whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": 0.3}, r"--beta was 0\.\d+ and is 0\.3"),
        ({"push": 1.0}, "--push was 2.5 and is 1.0"),
        ({"caption_mode": "own"}, "--caption_mode was both and is own"),
        ({"seed": 1}, "--seed"),
        ({"max_train_steps": 30}, "--max_train_steps was 24 and is 30"),
        ({"learning_rate": 1e-3}, "--learning_rate"),
    ],
)
def test_a_changed_option_is_refused_by_name(
    stopped: Path, make_config: Config, place: Path, change: dict[str, object], message: str
) -> None:
    data = shutil.copytree(place / "data", Path("photos"))  # as own images: the same whatever the seed
    for name in ("manifest.json", "settings.json"):
        (data / name).unlink()
    before = read_json(checkpoint.list_checkpoints(stopped)[-1] / "checkpoint.json")
    config = make_config("run", resume_from_checkpoint="latest", data_dir=data, **({"beta": before["--beta"]} | change))
    with pytest.raises(UsageError, match=rf"{message}.*--force_resume"):
        trainer.run(config)
    assert not (stopped / "training.json").exists()


def test_options_that_do_not_affect_the_weights_may_change(
    stopped: Path, make_config: Config, whole: Path, place: Path
) -> None:
    elsewhere = shutil.copytree(place / "data", Path("elsewhere"))
    options = {"data_dir": elsewhere, "checkpoints_total_limit": 1, "checkpointing_steps": 5}
    trainer.run(make_config("run", resume_from_checkpoint="latest", **options))
    assert same(stopped, whole)
    assert [p.name for p in checkpoint.list_checkpoints(stopped)] == ["step-000020"]


def test_force_resume_accepts_a_changed_option(stopped: Path, make_config: Config, whole: Path) -> None:
    trainer.run(make_config("run", resume_from_checkpoint="latest", force_resume=True, push=1.0))
    assert read_json(stopped / "training.json")["push"] == 1.0
    assert not same(stopped, whole)


def test_force_resume_uses_the_given_learning_rate(stopped: Path, make_config: Config) -> None:
    """A run that diverged is advised to lower it."""
    trainer.run(make_config("run", resume_from_checkpoint="latest", force_resume=True, learning_rate=1e-4))
    rates = [line["lr"] for line in read_jsonl(stopped / "metrics.jsonl")]
    assert len(rates) == 3
    assert 0 < max(rates) < 1e-4


def test_force_resume_accepts_fewer_images_and_other_captions(stopped: Path, make_config: Config, place: Path) -> None:
    data = shutil.copytree(place / "data", Path("photos"))
    for path in (*data.glob("*.json"), *data.glob("*/*.jsonl"), *data.glob("*/keep*"), *data.glob("*/*-0000[2-9].png")):
        path.unlink(missing_ok=True)
    options = {"data_dir": data, "caption_mode": "own", "effective_batch_size": 4, "train_batch_size": None}
    trainer.run(make_config("run", resume_from_checkpoint="latest", force_resume=True, **options))
    assert read_json(stopped / "training.json")["caption_mode"] == "own"


@pytest.mark.parametrize(
    "change",
    [
        {"rank": 3},
        {"lora_targets": "attention+mlp"},
        {"use_dora": True},
        {"train_text_encoder": True},
        {"method": "full", "lora_dropout": 0.0},
        {"optimizer": "adamw8bit"},
    ],
)
def test_force_resume_refuses_weights_that_do_not_fit(
    stopped: Path, make_config: Config, change: dict[str, object]
) -> None:
    name = next(iter(change))
    with pytest.raises(UsageError, match=rf"--{name} was .*cannot load weights"):
        trainer.run(make_config("run", resume_from_checkpoint="latest", force_resume=True, **change))
    assert checkpoint.list_checkpoints(stopped)


def test_another_text_encoder_is_refused_but_checkpoints_without_its_hash_are_accepted() -> None:
    folder, now = Path("step-000001"), {"base": "a", "text encoder": "b"}
    for before in ({"base": "a"}, now):
        write_json(folder / "checkpoint.json", before)
        checkpoint.check_same(folder, now, forced=False)
    write_json(folder / "checkpoint.json", {"base": "a", "text encoder": "c"})
    with pytest.raises(UsageError, match="text encoder was c and is b"):
        checkpoint.check_same(folder, now, forced=False)


def test_what_a_kill_left_of_a_deleted_checkpoint_is_deleted() -> None:
    """Deletion begins with checkpoint.json. Files of others stay."""
    accelerator, weights = Accelerator(cpu=True), {"w": torch.zeros(1)}
    for name in ("step-000001", "step-000002", "notes"):
        folder = Path("run", "checkpoints", name)
        folder.mkdir(parents=True)
        (folder / "state.pt").write_bytes(b"")
    Path("run/checkpoints/step-000002/mine.txt").write_text("mine")
    checkpoint.save(Path("run"), 3, weights, {}, {}, accelerator, 2)
    left = {path.relative_to("run/checkpoints").as_posix() for path in Path("run/checkpoints").rglob("*")}
    assert {"step-000002/mine.txt", "notes/state.pt", "step-000003/checkpoint.json"} <= left
    assert not left & {"step-000001", "step-000002/state.pt"}


def test_checkpoints_of_an_abandoned_continuation_are_deleted_first() -> None:
    accelerator, weights = Accelerator(), {"w": torch.zeros(1)}
    for step, limit in ((3, 3), (6, 3), (9, 3), (4, 1)):  # the last one after resuming from step 3
        checkpoint.save(Path("run"), step, weights, {}, {}, accelerator, limit)
    assert [p.name for p in checkpoint.list_checkpoints(Path("run"))] == ["step-000004"]


def test_other_images_are_refused(stopped: Path, make_config: Config, place: Path) -> None:
    data = shutil.copytree(place / "data", Path("data"))
    Image.new("RGB", (32, 32), (1, 2, 3)).save(data / "1_positive" / "positive-00001.png")
    with pytest.raises(UsageError, match=r"belongs to another run: data was \w+ and is \w+"):
        trainer.run(make_config("run", resume_from_checkpoint="latest", data_dir=data))


def test_a_full_disk_costs_only_the_new_checkpoint(stopped: Path, make_config: Config, whole: Path) -> None:
    before = {p: p.read_bytes() for p in (stopped / "checkpoints").rglob("*") if p.is_file()}
    with full_disk() as fill:
        fill(8000)  # metrics.jsonl fits, a checkpoint does not
        with pytest.raises(UnlearnError, match=r"Cannot write the checkpoint.*step-000008.*step-000007.*latest"):
            trainer.run(make_config("run", resume_from_checkpoint="latest"))
    assert {p: p.read_bytes() for p in (stopped / "checkpoints").rglob("*") if p.is_file()} == before
    trainer.run(make_config("run", resume_from_checkpoint="latest"))
    assert same(stopped, whole)


@pytest.mark.parametrize("at", [10, 25])
def test_a_disk_that_fills_up_while_logging_or_finishing(
    stopped: Path, make_config: Config, whole: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    name = (TrainingState, "take_step") if at == 10 else (trainer, "_close_run")
    real, taken = getattr(*name), list(range(8, 30))

    with monkeypatch.context() as patch, full_disk() as fill:

        def filled(*arguments: object) -> object:
            if at == 25 or taken.pop(0) == at:
                fill(100)
            return real(*arguments)

        patch.setattr(*name, filled)
        with pytest.raises(UnlearnError, match=r"Cannot write to run: .*step-0000.*--resume_from_checkpoint latest"):
            trainer.run(make_config("run", resume_from_checkpoint="latest", checkpointing_steps=24))
    trainer.run(make_config("run", resume_from_checkpoint="latest"))
    assert same(stopped, whole)


def test_a_truncated_metrics_line_does_not_prevent_resuming(stopped: Path, make_config: Config, whole: Path) -> None:
    (stopped / "metrics.jsonl").write_text('{"step": 5, "lo')
    trainer.run(make_config("run", resume_from_checkpoint="latest"))
    assert same(stopped, whole)


@pytest.mark.parametrize("name", ["state.pt", "weights.safetensors"])
def test_a_damaged_checkpoint_is_refused_by_name(stopped: Path, make_config: Config, name: str) -> None:
    path = checkpoint.list_checkpoints(stopped)[-1] / name
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UsageError, match=r"step-000007 cannot be read"):
        trainer.run(make_config("run", resume_from_checkpoint="latest"))


def test_another_number_of_processes_is_refused(stopped: Path, make_config: Config) -> None:
    path = checkpoint.list_checkpoints(stopped)[-1] / "checkpoint.json"
    path.write_text(json.dumps(read_json(path) | {"processes": 2}))
    with pytest.raises(UsageError, match="processes was 2 and is 1"):
        trainer.run(make_config("run", resume_from_checkpoint="latest"))


def test_random_states_of_more_gpus_than_available_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[torch.Tensor]] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", given.append)
    checkpoint.restore_random_state(checkpoint.random_state() | {"cuda": [torch.zeros(16), torch.ones(16)]})
    assert [len(states) for states in given] == [1]


def test_random_states_are_restored() -> None:
    state = checkpoint.random_state()
    first = (random.random(), np.random.rand(), torch.rand(1).item(), random.gauss(0, 1))
    checkpoint.restore_random_state(state)
    assert (random.random(), np.random.rand(), torch.rand(1).item(), random.gauss(0, 1)) == first


def test_two_processes_resume_as_two(place: Path, tiny_base: Path) -> None:
    """Each process restores its own random state. A single process cannot resume a run of two."""
    options = settings(place, tiny_base) | {"max_train_steps": 4, "checkpointing_steps": 2}
    command = ["train", *flags(options), "--output_dir", "run"]
    forked.run_pair(cli.main, command)
    whole = shutil.copytree("run", Path("whole"))
    for name in ("training.json", "adapter", "checkpoints/step-000004"):  # as if killed after step 2
        path = Path("run", name)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UsageError, match="processes was 2 and is 1"):
        trainer.run(
            make(place, tiny_base, "run", max_train_steps=4, checkpointing_steps=2, resume_from_checkpoint="latest")
        )
    forked.run_pair(cli.main, [*command, "--resume_from_checkpoint", "latest"])
    assert same(Path("run"), whole)
