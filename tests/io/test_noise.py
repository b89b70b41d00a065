"""Messages of libraries stay off stderr unless --debug is given."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import sd_unlearn
from sd_unlearn.io.noise import SHOW, silence_warnings


def shown(warn: list[tuple[type[Warning], str]]) -> list[str]:
    """The modules whose warnings pass the filters."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        silence_warnings()
        for category, module in warn:
            warnings.warn_explicit(module, category, "file.py", 1, module=module)
    return [str(warning.message) for warning in caught]


WARNINGS: list[tuple[type[Warning], str]] = [
    (FutureWarning, "torch.cuda"),
    (DeprecationWarning, "anything"),
    (UserWarning, "diffusers.models"),
    (UserWarning, "transformers"),
    (UserWarning, "torch.cuda"),
    (UserWarning, "timmy"),
]


def test_only_what_users_can_act_on_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SHOW, raising=False)
    assert shown(WARNINGS) == ["torch.cuda", "timmy"]
    assert logging.getLogger("bitsandbytes").level == logging.ERROR


def test_debug_shows_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SHOW, "1")
    assert shown(WARNINGS) == [module for _, module in WARNINGS]


@pytest.mark.parametrize("module", ["sd_unlearn.api", "sd_unlearn.batch.preload"])
def test_bitsandbytes_does_not_ask_for_kernels(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From Python and in the tasks of a job list, where no command has set up messages."""
    pytest.importorskip("bitsandbytes")
    monkeypatch.setenv(SHOW, "")
    code = f"import {module}, bitsandbytes"
    environment = {**os.environ, "PYTHONPATH": str(Path(sd_unlearn.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert "kernels" not in done.stderr
