"""Several processes stop at the same step after a Ctrl-C; on a CPU they check at every step."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sd_unlearn.training.metrics_log import stop_requests


def two_processes(device: str) -> Any:
    """An accelerator with a second process that was not interrupted."""
    return SimpleNamespace(
        num_processes=2,
        device=SimpleNamespace(type=device),
        print=lambda *_, **__: None,
        reduce=lambda value, how: value,
    )


@pytest.mark.parametrize(("device", "sync", "stops"), [("cpu", False, True), ("cuda", False, False)])
def test_cpu_processes_agree_to_stop_at_every_step(
    monkeypatch: pytest.MonkeyPatch, device: str, sync: bool, stops: bool
) -> None:
    """Torch's launcher kills them 30 seconds after a Ctrl-C, and ten steps may take longer."""
    with stop_requests(two_processes(device)) as stop_requested:
        monkeypatch.setattr(torch, "tensor", lambda value, device: torch.full((), value))
        assert not stop_requested(sync)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop_requested(sync) is stops
        assert stop_requested(True)
