"""What the user says while a run trains: several processes stop at the same step, on a CPU soon."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sd_unlearn.training.metrics_log import stop_requests


def several(device: str) -> Any:
    """Two processes of which the other one was not interrupted."""
    return SimpleNamespace(
        num_processes=2,
        device=SimpleNamespace(type=device),
        print=lambda *_, **__: None,
        reduce=lambda value, how: value,
    )


@pytest.mark.parametrize(("device", "together", "stops"), [("cpu", False, True), ("cuda", False, False)])
def test_on_a_cpu_processes_agree_at_every_step(
    monkeypatch: pytest.MonkeyPatch, device: str, together: bool, stops: bool
) -> None:
    """Torch's launcher gives them 30 seconds after a Ctrl-C, and ten steps may take longer."""
    with stop_requests(several(device)) as asked:
        monkeypatch.setattr(torch, "tensor", lambda value, device: torch.full((), value))
        assert not asked(together)
        os.kill(os.getpid(), signal.SIGINT)
        assert asked(together) is stops
        assert asked(True)
