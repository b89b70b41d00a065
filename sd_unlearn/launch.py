"""`accelerate launch --cpu --num_processes N` made to start N processes. Imports nothing heavy until it has to.

Without MPI, accelerate's launcher for CPUs starts one process whatever number was asked for, and leaves the number on
its own command line (or in its --config_file). It is read from there, and torch's launcher takes this process's place.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

STARTED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
THREADS = "OMP_NUM_THREADS"
GRACE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"  # seconds until torch's launcher kills what was told to stop; usually 30


@dataclass(frozen=True)
class Asked:
    """What `accelerate launch` was asked for. threads: of each process, None if it was not said."""

    processes: int
    threads: int | None = None


class Unclear(Exception):
    """The number of processes cannot be told; the message says why."""


def start_several() -> None:
    """Become torch's launcher of N processes with this process's own arguments, if N > 1 were asked for in vain.

    Does nothing on a GPU, in a process that is one of several, and when accelerate did not start this one. What cannot
    be read means one process, with a line on stderr that says how to start several.
    """
    if not asked_in_vain(os.environ):
        return
    try:
        import psutil  # accelerate needs it too

        parent = psutil.Process().parent()
        command = parent.cmdline() if parent else []
        around = parent.environ() if parent else {}
        asked = read_command(command)
    except Exception as error:  # a launcher may be hidden, gone or of another version: never a reason not to train
        reason = str(error) if isinstance(error, Unclear) else f"{type(error).__name__}: {error}"
        print(f"Going on as one process: {' '.join(reason.split())}. {_by_hand()}", file=sys.stderr)
        return
    if asked.processes < 2:
        return
    threads = threads_of_each(asked, around, _cores())
    print(f"Starting {asked.processes} processes on the CPU, {threads} thread(s) each.", file=sys.stderr, flush=True)
    os.environ[THREADS] = str(threads)
    os.environ.setdefault(GRACE, "3600")  # after a Ctrl-C a step is finished and saved, and steps may take minutes
    # Replaced, not started: signals, the exit code and the terminal stay those of the process accelerate waits for.
    os.execv(sys.executable, [sys.executable, *torch_launcher(asked.processes)])


def asked_in_vain(environment: Mapping[str, str]) -> bool:
    """Whether accelerate's CPU launcher was told of several processes (it then sets a port) and nobody started them."""
    on_cpu = environment.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1", "yes", "y", "t", "on")
    return on_cpu and "MASTER_PORT" in environment and not any(name in environment for name in STARTED)


def read_command(command: Sequence[str]) -> Asked:
    """What the command line of `accelerate launch` asks for, its configuration file read as accelerate reads it.

    Raises:
        Unclear: it is no command of accelerate, cannot be parsed, or is for several machines.
    """
    tokens = launch_tokens(command)
    if tokens is None:
        raise Unclear("this process was not started by accelerate launch itself")
    from accelerate.commands.config import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    try:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            known = launch_command_parser().parse_args(tokens)
    except SystemExit:
        fault = said.getvalue().strip().rpartition("error: ")[2]  # after the usage of 90 options
        raise Unclear(f"accelerate's options cannot be read ({fault})") from None
    processes, machines = known.num_processes, known.num_machines
    if known.config_file is not None or (Path(default_config_file).is_file() and not known.cpu):
        written = load_config_from_file(known.config_file)
        processes = written.num_processes if processes is None else processes
        machines = written.num_machines if machines is None else machines
    if (machines or 1) > 1:
        raise Unclear(f"--num_machines {machines}: several machines are not started from here")
    if processes is None:
        raise Unclear("accelerate was given no --num_processes")
    return Asked(processes, known.num_cpu_threads_per_process)


def launch_tokens(command: Sequence[str]) -> list[str] | None:
    """The arguments after `accelerate launch` in any of the ways to write it; None when it is none of them."""
    for i, word in enumerate(command[:6]):  # the program, after python and its own options if it has them
        name = Path(word).stem
        if name in ("accelerate", "accelerate_cli") or word == "accelerate.commands.accelerate_cli":
            return list(command[i + 2 :]) if list(command[i + 1 : i + 2]) == ["launch"] else None
        launcher = word.replace("\\", "/").endswith("accelerate/commands/launch.py")
        if name == "accelerate-launch" or word == "accelerate.commands.launch" or launcher:
            return list(command[i + 1 :])
    return None


def threads_of_each(asked: Asked, environment: Mapping[str, str], cores: int) -> int:
    """Threads of each process: as said to accelerate, else as set before it, else the cores shared out, at least 1."""
    if asked.threads:
        return asked.threads
    outer = environment.get(THREADS, "")
    return int(outer) if outer.isdigit() and int(outer) > 0 else max(1, cores // asked.processes)


def torch_launcher(processes: int) -> list[str]:
    """Python's arguments for this same program under torch's launcher, on a free port of this machine."""
    spec = sys.modules["__main__"].__spec__  # there when it was started as python -m
    program = ["-m", spec.name] if spec else [sys.argv[0]]
    return ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), *program, *sys.argv[1:]]


def process_rank() -> int:
    """Number of this process among those of an `accelerate launch`, from 0."""
    return int(os.environ.get("RANK", 0))


def process_count() -> int:
    """How many processes an `accelerate launch` started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", 1))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _by_hand() -> str:
    return "Several on the CPU: ACCELERATE_USE_CPU=true torchrun --standalone --nproc_per_node N train.py ..."
