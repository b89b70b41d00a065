"""Save and resume everything that changes while training, atomically: a checkpoint is there whole or not at all.

A checkpoint is written into a folder with a temporary name, which is then renamed. So a process killed in the middle
of a save leaves the earlier ones, and a full disk costs only the new one.
"""

from __future__ import annotations

import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sd_unlearn.errors import UnlearnError, UsageError
from sd_unlearn.io.files import read_json, write_json
from sd_unlearn.io.run_folder import CHECKPOINT_DIR

IDENTITY, STATE, WEIGHTS = "checkpoint.json", "state.pt", "weights.safetensors"
_NAME = re.compile(r"step-(\d+)")
# Options that decide which tensors a checkpoint holds: into others they cannot be put.
_SHAPING = {"--method", "--rank", "--lora_targets", "--use_dora", "--train_text_encoder", "--optimizer", "processes"}

_UNWRITTEN = (OSError, RuntimeError, SafetensorError, UnlearnError)  # each writer has its own for a full disk


def save(
    run: Path,
    step: int,
    weights: dict[str, torch.Tensor],
    state: dict[str, Any],
    identity: dict[str, Any],
    accelerator: Accelerator,
    limit: int,
) -> Path:
    """Write run/checkpoints/step-<step>, then delete all but the newest `limit`. Every process calls it.

    weights: what is trained; state: what else going on needs (tensors, numbers, strings, lists, dicts); the random
    state of every process is added. identity: what a resumed run must have in common with this one.

    Raises:
        UnlearnError: it cannot be written; what was there before still is.
    """
    random_states = gather_object([random_state()])
    target = run / CHECKPOINT_DIR / f"step-{step:06d}"
    error = [""]
    if accelerator.is_main_process:
        try:
            _write(target, weights, state | {"random": random_states, "step": step}, identity)
        except _UNWRITTEN as failure:
            error = [str(getattr(failure, "strerror", None) or str(failure).splitlines()[0])]
        else:
            places = found(run)
            here = places.index(target) + 1  # later ones are of a way that was left for an earlier checkpoint
            for old in [*places[:here][:-limit], *places[here:]]:
                shutil.rmtree(old, ignore_errors=True)
    reason = gather_object(error)[0]
    if reason:
        kept = found(run)
        rest = f"The last good one is {kept[-1]}: go on from it with --resume_from_checkpoint latest." if kept else ""
        raise UnlearnError(f"Cannot write the checkpoint {target}: {reason}. Make room, or change --output_dir. {rest}")
    return target


def _write(target: Path, weights: dict[str, torch.Tensor], state: dict[str, Any], identity: dict[str, Any]) -> None:
    for left_by_a_killed_run in target.parent.glob(".step-*"):
        shutil.rmtree(left_by_a_killed_run, ignore_errors=True)
    temporary, replaced = (target.with_name(f".{target.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    try:
        temporary.mkdir(parents=True)
        save_file(weights, temporary / WEIGHTS)
        torch.save(state, temporary / STATE)
        write_json(temporary / IDENTITY, {"step": state["step"], **identity})
        if target.is_dir():
            target.replace(replaced)
        temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def found(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    folder = run / CHECKPOINT_DIR
    places = [p for p in folder.iterdir() if _NAME.fullmatch(p.name)] if folder.is_dir() else []
    return sorted(places, key=lambda p: int(p.name.removeprefix("step-")))


def resolve(asked: str | None, run: Path) -> Path | None:
    """The checkpoint that --resume_from_checkpoint means; None: from the start, because nothing was saved yet.

    Raises:
        UsageError: a path that is no checkpoint.
    """
    if asked is None:
        return None
    if asked == "latest":
        return next(reversed(found(run)), None)
    path = Path(asked)
    if not all((path / name).is_file() for name in (IDENTITY, STATE, WEIGHTS)):
        names = ", ".join(str(p) for p in found(run)) or "none"
        raise UsageError(f"--resume_from_checkpoint {asked} is no checkpoint. In --output_dir {run}: {names}.")
    return path


def load(checkpoint: Path, accelerator: Accelerator) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(weights, state) of a checkpoint, on the CPU; this process's random state is put back.

    Raises:
        UsageError: damaged, or of another number of processes.
    """
    try:
        weights = load_file(checkpoint / WEIGHTS)
        state = torch.load(checkpoint / STATE, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors, pickle, zip and OS errors alike
        reason = str(error).splitlines()[0][:200]
        raise UsageError(
            f"--resume_from_checkpoint {checkpoint} cannot be read ({reason}). Name an earlier one, or start over "
            "with --overwrite."
        ) from error
    count = len(state["random"])
    if count != accelerator.num_processes:
        raise UsageError(
            f"--resume_from_checkpoint {checkpoint} is of {count} processes, and this run has "
            f"{accelerator.num_processes}. Start as many as before."
        )
    restore_random_state(state["random"][accelerator.process_index])
    return weights, state


def check_same(checkpoint: Path, identity: dict[str, Any], forced: bool) -> None:
    """Refuse another objective, base or data than the checkpoint's; if forced, only what its weights do not fit.

    Raises:
        UsageError: naming what changed, and both values.
    """
    before = read_json(checkpoint / IDENTITY)
    changed = {key for key, value in identity.items() if before.get(key) != value}
    refused = changed & _SHAPING if forced else changed
    if not refused:
        return
    told = [f"{key} was {before.get(key)} and is {identity[key]}" for key in sorted(refused)]
    way_out = "Give what it was, or start over with --overwrite; --force_resume cannot put its weights into others."
    if not changed & _SHAPING:
        way_out = "Give what it was, start over with --overwrite, or add --force_resume."
    raise UsageError(f"--resume_from_checkpoint {checkpoint} is of another run: {'; '.join(told)}. {way_out}")


def random_state() -> dict[str, Any]:
    """The state of every random generator of this process, as plain values and tensors."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [name, np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Put back what random_state() gave."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])  # there may have been more GPUs
