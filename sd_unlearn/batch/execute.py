"""What a task does, in a process of its own. Every engine calls `start_task`, so results do not depend on the engine.

A process that dies is noticed by the process that started it; if that one dies, the task saves and ends.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from sd_unlearn.batch.options import LATER
from sd_unlearn.batch.record import (
    LOG,
    MERGED,
    OPTIONS,
    Order,
    begin,
    evidence_of,
    finish,
    is_done,
    read_order,
)
from sd_unlearn.choices import CLOSED_FORM
from sd_unlearn.config.base import ExportConfig, RenderConfig
from sd_unlearn.config.train import TrainConfig
from sd_unlearn.errors import ConditionError, UnlearnError
from sd_unlearn.io.files import remove
from sd_unlearn.io.lock import locked
from sd_unlearn.io.noise import silence_warnings
from sd_unlearn.io.reading import read_yaml
from sd_unlearn.io.run_folder import CONCEPT as TRAINED_CONCEPT
from sd_unlearn.io.schema import convert

CONFIGS: dict[str, type] = {"render": RenderConfig, "train": TrainConfig, **LATER}
INTERRUPTED = 130  # exit code
PATIENCE = 120.0  # seconds for a task to save and end before it is killed
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def start_task(folder: Path, threads: int, gpu: str | None = None) -> BaseProcess:
    """Start the process of a task.

    Args:
        threads: Of the CPU. The same for all tasks, because rounding depends on it.
        gpu: The value of CUDA_VISIBLE_DEVICES; None leaves it as it is.
    """
    for name in THREADS:
        os.environ[name] = str(threads)
    process: BaseProcess = _context().Process(target=_main, args=(str(folder), threads, gpu), name=folder.name)
    process.start()
    return process


def was_killed(process: BaseProcess) -> bool:
    """Whether a process that has ended was killed; 255: together with the process that it was forked from."""
    return process.exitcode is None or process.exitcode < 0 or process.exitcode == 255


def stop_tasks(processes: Iterable[BaseProcess]) -> None:
    """Let tasks save and end, and wait until they have."""
    processes = list(processes)
    for process in processes:
        if process.is_alive() and process.pid:
            os.kill(process.pid, signal.SIGTERM)
    for process in processes:
        process.join(PATIENCE)
        process.kill()


def _context() -> Any:
    """How processes start: with a GPU anew, because CUDA does not survive a fork.

    On a CPU they are forked from a process that has imported everything, which saves seconds per task.
    """
    import torch

    if torch.accelerator.is_available() or "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sd_unlearn.batch.preload"])
    return context


def _main(folder: str, threads: int, gpu: str | None) -> None:
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # before torch is imported
    os.setpgid(0, 0)  # Ctrl-C in the terminal goes to the driver alone, which then ends the tasks
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGINT, _interrupt)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    silence_warnings()
    with open(Path(folder) / LOG, "a", encoding="utf-8", errors="replace") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sys.exit(execute(Path(folder), threads))


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _end_with_parent() -> None:
    """Wait until the process that started this one has died, then save and end, as after Ctrl-C."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def execute(folder: Path, threads: int) -> int:
    """Carry out a task in this process, unless it is done. Returns the exit code; the state says why it failed."""
    import torch

    torch.set_num_threads(threads)
    try:
        with locked(folder, "task", wait=-1):
            return 0 if is_done(folder) else _execute(folder)
    except KeyboardInterrupt:  # while it waited for another process that carries out the task
        return INTERRUPTED


def _execute(folder: Path) -> int:
    order, state = read_order(folder), begin(folder)
    status, message, code = "failed", "", 1
    try:
        if not (order.stage in ("render", "train") and Path(order.product).is_file()):
            config = _config(folder, order)
            if order.stage == "export":
                _remove_own_checkpoint(folder, config)
            _command(order.stage)(config)
        status, code = "done", 0
    except ConditionError as error:  # the results are complete
        status, message, code = "done", str(error), 0
    except KeyboardInterrupt as error:
        status, message, code = "interrupted", str(error), INTERRUPTED
    except UnlearnError as error:
        message, code = str(error), error.exit_code
    except Exception as error:
        traceback.print_exc()
        message = f"{type(error).__name__}: {error}"
    print(f"{order.stage}: {status}. {message}".strip(), file=sys.stderr, flush=True)
    finish(folder, state, status, message, evidence_of(folder, order))  # type: ignore[arg-type]
    return code


def _config(folder: Path, order: Order) -> Any:
    """The options of a task. A training resumes from its last checkpoint if there is one."""
    config: Any = convert(CONFIGS[order.stage], read_yaml(folder / OPTIONS, "task"), str(folder / OPTIONS))
    begun = (Path(order.target) / TRAINED_CONCEPT).is_file()
    if order.stage == "train" and begun and config.objective not in CLOSED_FORM:  # which have no checkpoints
        config = dataclasses.replace(config, resume_from_checkpoint="latest")
    return config


def _remove_own_checkpoint(folder: Path, config: ExportConfig) -> None:
    """Remove a merged checkpoint that an earlier attempt wrote into the task's own folder: export overwrites none."""
    if config.merge and config.merge.parent.name == MERGED + folder.name.rpartition("-")[2]:
        remove(config.merge)


def _command(stage: str) -> Callable[[Any], Any]:
    """The function behind a command."""
    if stage == "render":
        from sd_unlearn.data import render

        return render.run
    if stage == "train":
        from sd_unlearn.training import trainer

        return trainer.run
    if stage == "evaluate":
        from sd_unlearn.evaluation import evaluate

        return _then_check(evaluate.run, evaluate.check_evaluated)
    if stage == "attack":
        from sd_unlearn.attacks import attack
        from sd_unlearn.evaluation.evaluate import check_attacked

        return _then_check(attack.run, check_attacked)
    if stage == "export":
        from sd_unlearn.export import export

        return export.run
    from sd_unlearn.report import report

    return report.run


def _then_check(
    run: Callable[[Any], dict[str, Any]], check_all: Callable[[dict[str, Any]], None]
) -> Callable[[Any], Any]:
    """A command that writes results.json, with the checks of `sd-unlearn`: its --fail_if conditions, and that nothing
    of what was asked for failed."""
    from sd_unlearn.evaluation.evaluate import check_conditions

    def command(config: Any) -> None:
        if results := run(config):  # empty in all processes but the first
            check_conditions(results, config.fail_if)
            check_all(results)

    return command
