"""Processes of a test as forks of it, because starting Python and importing torch costs more than a tiny training.

A fork has its own copy of the test's memory, also of what the test has patched. Its output goes to a log file.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from tqdm import tqdm

from sd_unlearn.launch import leave_process_group

PATIENCE = 240  # seconds


def start(target: Callable[..., int | None], *arguments: Any, log: Path, **environment: str) -> BaseProcess:
    """Call target(*arguments) in a process of its own, whose exit code is what it returns.

    Args:
        target: From a module that can be imported, which the test files cannot: see `_context`.
        log: The file for stdout and stderr.
        environment: Variables added to those of this process.
    """
    options = (target, arguments, log, environment)
    process: BaseProcess = _context().Process(target=_child, args=options, daemon=True)
    process.start()
    return process


def run_pair(target: Callable[..., int | None], *arguments: Any, name: str = "pair") -> list[str]:
    """Call target(*arguments) in two processes that find each other as those of torchrun, and check that both succeed.

    Returns:
        The output of each.
    """
    logs = [Path(f"{name}-{rank}.log").absolute() for rank in range(2)]
    group = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "ACCELERATE_USE_CPU": "true",
    }
    both = [
        start(target, *arguments, log=log, RANK=str(rank), LOCAL_RANK=str(rank), **group)
        for rank, log in enumerate(logs)
    ]
    try:
        for process in both:
            process.join(PATIENCE)
    finally:
        for process in both:
            process.kill()
            process.join()
    outputs = [log.read_text() for log in logs]
    assert [process.exitcode for process in both] == [0, 0], "\n".join(outputs)
    return outputs


def _context() -> Any:
    """How processes start: with a GPU anew, because CUDA does not survive a fork."""
    forks = "fork" in multiprocessing.get_all_start_methods() and not torch.accelerator.is_available()
    return multiprocessing.get_context("fork" if forks else "spawn")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _child(
    target: Callable[..., int | None], arguments: tuple[Any, ...], log: Path, environment: Mapping[str, str]
) -> None:
    """Run the target and end the process, without a way back into pytest."""
    code = 1
    try:
        os.environ.update(environment)
        _write_to(log)
        _forget_parent()
        code = target(*arguments) or 0
        leave_process_group()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _write_to(log: Path) -> None:
    """Send stdout and stderr to a file; pytest has replaced the streams, so their descriptors are not enough."""
    sink = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_APPEND, 0o644)
    for descriptor in (1, 2):
        os.dup2(sink, descriptor)
    sys.stdout, sys.stderr = (open(descriptor, "w", buffering=1, closefd=False) for descriptor in (1, 2))


def _forget_parent() -> None:
    """Drop what is of the parent's process alone.

    OpenMP's threads do not survive a fork. accelerate knows the parent as the only process. tqdm's lock is shared by
    all forks: one that is killed while it holds the lock would stop the parent at its next progress bar.
    """
    torch.set_num_threads(1)
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    tqdm.set_lock(threading.RLock())
