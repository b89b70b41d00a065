"""Rank and number of the processes of a distributed run, read from the environment. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from sd_unlearn.errors import UnlearnError, UsageError

# Set by a launcher that has really started several processes: torchrun, Intel MPI, Open MPI, MVAPICH.
STARTED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
TRUE = ("true", "1", "yes", "y", "t", "on")  # as accelerate reads its environment variables


# How often a waiting OpenMP thread checks before it sleeps. libgomp's default keeps it busy for milliseconds, which
# makes two trainings on one machine ten times slower (docs/benchmarks.md).
SPINS = 10_000


def share_cores() -> None:
    """Let waiting threads of this process sleep early. Has an effect only before torch is imported.

    OMP_WAIT_POLICY and GOMP_SPINCOUNT in the environment take precedence.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))


def process_rank() -> int:
    """Rank of this process in a distributed run, from 0; 0 if it is the only one."""
    return int(os.environ.get("RANK", 0))


def process_count() -> int:
    """Number of processes of a distributed run; 1 outside of one."""
    return int(os.environ.get("WORLD_SIZE", 1))


def print_once(line: str) -> None:
    """Print a line on stderr, in the first process only."""
    if process_rank() == 0:
        print(line, file=sys.stderr)


def check_one_process(command: str) -> None:
    """Refuse to run a command in several processes, which would write the same files.

    Raises:
        UsageError
    """
    if process_count() > 1:
        raise UsageError(f"{command} runs in one process: start it without accelerate launch.")


def wait_for_others(
    missing: Callable[[], int],
    what: str,
    timeout: float,
    poll: float = 0.5,
    signs: Callable[[], object] = lambda: None,
) -> None:
    """Wait until the other processes have done their part; returns at once in a single process.

    Args:
        missing: How many of the things are not done.
        what: The things, for the error, e.g. "images".
        timeout: In seconds, since the number or `signs` last changed; `poll`: between two looks.
        signs: Something that changes as long as the others work, e.g. their heartbeats.

    Raises:
        UnlearnError: nothing was finished, and there was no sign of work, for `timeout` seconds.
    """
    if process_count() < 2:
        return
    last, since = (missing(), signs()), time.monotonic()
    while (count := missing()) > 0:
        if (now := (count, signs())) != last:
            last, since = now, time.monotonic()
        if time.monotonic() - since > timeout:
            raise UnlearnError(
                f"{count} {what} are still missing: another process must have stopped. Run the command again."
            )
        time.sleep(poll)


@contextmanager
def heartbeat(file: Path, every: float = 30.0) -> Iterator[None]:
    """Touch a file from a thread, every `every` seconds within the block: `last_beat` tells other processes.

    The file is removed at the end. Of a process that was killed it stays, but is not touched any more.
    """
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(every):
            with contextlib.suppress(OSError):
                file.touch()

    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(OSError):
            file.unlink()


def last_beat(file: Path) -> int:
    """When the file of a heartbeat was last touched, by the clock of its disk; 0 if it does not exist."""
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return 0


def prepare_processes() -> None:
    """Make the processes of a distributed run work together: each on a GPU of its own, or all on the CPU.

    accelerate joins processes on the CPU only if ACCELERATE_USE_CPU is set; without it each would train by itself and
    write into the same folder.

    Raises:
        UsageError: `accelerate launch --cpu` should have started several processes but started one. Contains the
            torchrun command that starts them.
    """
    if is_lone_process(os.environ):
        spec = sys.modules["__main__"].__spec__  # set if Python was started with -m
        program = ["-m", spec.name.removesuffix(".__main__")] if spec else [sys.argv[0]]
        raise UsageError(
            "accelerate launch --cpu started 1 process although you asked for several: it needs MPI for that. "
            f"Start N processes with: {torchrun_command([*program, *sys.argv[1:]])}. "
            "For a single process, leave out accelerate launch and --num_processes."
        )
    if process_count() == 1:
        return
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    elif "ACCELERATE_USE_CPU" not in os.environ and not torch.accelerator.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"


def leave_process_group() -> None:
    """End the group of processes that work together, if there is one.

    Only when the program ends: a new group in the same program would find the addresses of the old one.
    """
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def is_lone_process(environment: Mapping[str, str]) -> bool:
    """Whether accelerate's CPU launcher was asked for several processes (it then sets a port) but started only one."""
    on_cpu = environment.get("ACCELERATE_USE_CPU", "").lower() in TRUE
    return on_cpu and "MASTER_PORT" in environment and not any(name in environment for name in STARTED)


def torchrun_command(arguments: Sequence[str]) -> str:
    """The shell command that runs a Python program with these arguments in N processes on the CPU.

    By default torchrun kills the processes 30 seconds after Ctrl-C, which can be too early to save a checkpoint.
    """
    environment = "ACCELERATE_USE_CPU=true TORCH_ELASTIC_SHUTDOWN_TIMEOUT=3600"
    return f"{environment} torchrun --standalone --nproc_per_node N {shlex.join(arguments)}"
