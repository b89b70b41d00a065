"""Several processes stop at the same step after a Ctrl-C; they check at every step."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sd_unlearn.training import metrics_log
from sd_unlearn.training.metrics_log import Throughput, stop_requests


def two_processes(device: str) -> Any:
    """An accelerator with a second process that was not interrupted."""
    return SimpleNamespace(
        num_processes=2,
        device=SimpleNamespace(type=device),
        print=lambda *_, **__: None,
        reduce=lambda value, how: value,
    )


def test_a_closed_terminal_stops_as_ctrl_c_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing to the closed terminal would raise, so what is written there is discarded."""
    lone = SimpleNamespace(num_processes=1, print=lambda *_, **__: None)
    terminal, pipe = os.dup(2), os.pipe()
    os.dup2(pipe[1], 2)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    try:
        monkeypatch.setattr(os, "isatty", lambda descriptor: descriptor == 2)
        with stop_requests(lone) as stop_requested:  # type: ignore[arg-type]
            assert not stop_requested()
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop_requested()
            os.close(pipe[0])
            os.write(2, b"x")  # into a pipe without a reader it would raise
    finally:
        os.dup2(terminal, 2)
        after = signal.signal(signal.SIGHUP, before)
    assert after is signal.SIG_DFL


def test_nohup_is_respected() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_requests(SimpleNamespace(num_processes=1)) as stop_requested:  # type: ignore[arg-type]
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop_requested()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_windows_has_no_hangup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_log, "HANGUP", None)
    before = signal.getsignal(signal.SIGHUP)
    with stop_requests(SimpleNamespace(num_processes=1, print=lambda *_, **__: None)) as stop_requested:  # type: ignore[arg-type]
        assert signal.getsignal(signal.SIGHUP) is before
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop_requested()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_processes_agree_to_stop_at_every_step(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Torch's launcher kills them 30 seconds after a Ctrl-C, and ten steps may take longer."""
    with stop_requests(two_processes(device)) as stop_requested:
        monkeypatch.setattr(torch, "tensor", lambda value, device: torch.full((), value))
        assert not stop_requested()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop_requested()


def test_images_a_second_are_those_of_the_steps_since_the_last_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without previews and checkpoints, and without the steps before a run was resumed."""
    now = [100.0]
    monkeypatch.setattr(metrics_log.time, "monotonic", lambda: now[0])
    speed = Throughput(images_per_step=40, step=250)
    now[0] += 20
    assert speed.read(260)["images_per_second"] == 20
    with speed.paused():
        now[0] += 1000
    now[0] += 10
    assert speed.read(270)["images_per_second"] == 40
