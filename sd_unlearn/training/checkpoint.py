"""Checkpoints: everything that changes during training, saved atomically and restored to the same bits.

A checkpoint is written to a folder with a temporary name, which is then renamed. A process killed while saving
therefore leaves the earlier checkpoints intact, and a full disk costs only the new one.
"""

from __future__ import annotations

import contextlib
import random
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError

from sd_unlearn.config.batching import Batching
from sd_unlearn.errors import UnlearnError, UsageError, reason
from sd_unlearn.io.files import atomic_path, write_json
from sd_unlearn.io.own_files import CHECKPOINT, delete_own
from sd_unlearn.io.reading import read_json
from sd_unlearn.io.run_folder import CHECKPOINT_DIR

if TYPE_CHECKING:  # torch takes seconds to import, and preflight lists checkpoints without it
    import torch
    from accelerate import Accelerator

IDENTITY, STATE, WEIGHTS = "checkpoint.json", "state.pt", "weights.safetensors"
BATCHING, ESTIMATED = "batching", "estimated_betas"  # keys in checkpoint.json; not part of the identity
_NAME = re.compile(r"step-(\d+)")
# Options that decide which tensors a checkpoint holds. Changing one makes its weights unusable.
_SHAPING = {"--method", "--rank", "--lora_targets", "--use_dora", "--train_text_encoder", "--optimizer", "processes"}
_ADDED = {"text encoder"}  # not in checkpoints of older versions, which can still be resumed

_WRITE_ERRORS = (OSError, RuntimeError, SafetensorError, UnlearnError)  # what the writers raise when the disk is full


def save(
    run: Path,
    step: int,
    weights: dict[str, torch.Tensor],
    state: dict[str, Any],
    identity: dict[str, Any],
    accelerator: Accelerator,
    limit: int,
) -> Path:
    """Write run/checkpoints/step-<step>, then delete all but the newest `limit`. Call it in every process.

    weights: the trained tensors. state: everything else that resuming needs (tensors, numbers, strings, lists, dicts);
    the random state of each process is added. identity: what a resumed run must have in common with this one,
    BATCHING, and ESTIMATED if beta is estimated.

    Raises:
        UnlearnError: it cannot be written. Earlier checkpoints are kept.
    """
    from accelerate.utils import gather_object

    random_states = gather_object([random_state()])
    target = run / CHECKPOINT_DIR / f"step-{step:06d}"
    failure = ""
    if accelerator.is_main_process:
        try:
            _write(target, weights, state | {"random": random_states, "step": step}, identity)
            _delete_old(run, target, limit)
        except _WRITE_ERRORS as error:
            failure = reason(error)
    failure = gather_object([failure])[0]
    if failure:
        kept = list_checkpoints(run)
        hint = f" The last good one is {kept[-1]}: resume with --resume_from_checkpoint latest." if kept else ""
        raise UnlearnError(
            f"Cannot write the checkpoint {target}: {failure}. Free some disk space or change --output_dir.{hint}"
        )
    return target


def _write(target: Path, weights: dict[str, torch.Tensor], state: dict[str, Any], identity: dict[str, Any]) -> None:
    import torch
    from safetensors.torch import save_file

    with atomic_path(target) as folder:
        folder.mkdir()
        save_file(weights, folder / WEIGHTS)
        torch.save(state, folder / STATE)
        write_json(folder / IDENTITY, {"step": state["step"], **identity})


def _delete_old(run: Path, newest: Path, limit: int) -> None:
    """Keep the newest `limit`; later steps belong to a run that was abandoned by resuming an earlier checkpoint.

    Also deletes what is left of a checkpoint if the process was killed while it deleted that.
    """
    checkpoints = list_checkpoints(run)
    end = checkpoints.index(newest) + 1
    partial = [p for p in newest.parent.iterdir() if _NAME.fullmatch(p.name) and not _is_checkpoint(p)]
    for old in [*checkpoints[:end][:-limit], *checkpoints[end:], *partial]:
        _delete(old)


def delete_all(run: Path) -> None:
    """Delete the checkpoints of a run."""
    for path in list_checkpoints(run):
        _delete(path)
    with contextlib.suppress(OSError):  # missing, or not empty
        (run / CHECKPOINT_DIR).rmdir()


def _delete(path: Path) -> None:
    delete_own(path, CHECKPOINT)
    with contextlib.suppress(OSError):  # it holds files of others
        path.rmdir()


def list_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    folder = run / CHECKPOINT_DIR
    checkpoints = [p for p in folder.iterdir() if _is_checkpoint(p)] if folder.is_dir() else []
    return sorted(checkpoints, key=lambda p: int(p.name.removeprefix("step-")))


def _is_checkpoint(path: Path) -> bool:
    """Whether it is complete: deleting a checkpoint begins with its checkpoint.json."""
    return _NAME.fullmatch(path.name) is not None and (path / IDENTITY).is_file()


def resolve(option: str | None, run: Path) -> Path | None:
    """The checkpoint that --resume_from_checkpoint names. None: start from the beginning, nothing was saved yet.

    Raises:
        UsageError: the path is not a checkpoint.
    """
    if option is None:
        return None
    if option == "latest":
        return next(reversed(list_checkpoints(run)), None)
    path = Path(option)
    if not all((path / name).is_file() for name in (IDENTITY, STATE, WEIGHTS)):
        names = ", ".join(str(p) for p in list_checkpoints(run)) or "none"
        raise UsageError(
            f"--resume_from_checkpoint {option} is not a checkpoint. Checkpoints in --output_dir {run}: {names}."
        )
    return path


def load(checkpoint: Path, accelerator: Accelerator) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(weights, state) of a checkpoint, on the CPU. Restores the random state of this process.

    Raises:
        UsageError: the checkpoint is damaged, or was saved by another number of processes.
    """
    import torch
    from safetensors.torch import load_file

    try:
        weights = load_file(checkpoint / WEIGHTS)
        state = torch.load(checkpoint / STATE, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors, pickle, zip and OS errors alike
        raise UsageError(
            f"--resume_from_checkpoint {checkpoint} cannot be read ({reason(error)}). Name an earlier one, or start "
            "over with --overwrite."
        ) from error
    count = len(state["random"])
    if count != accelerator.num_processes:
        raise UsageError(
            f"--resume_from_checkpoint {checkpoint} was saved by {count} processes, but this run has "
            f"{accelerator.num_processes}. Start {count} processes."
        )
    restore_random_state(state["random"][accelerator.process_index])
    return weights, state


def check_same(checkpoint: Path, identity: dict[str, Any], forced: bool) -> None:
    """Refuse to resume with another objective, base or data than the checkpoint's.

    forced (--force_resume): refuse only options under which the saved weights do not fit.

    Raises:
        UsageError: names what changed, with both values.
    """
    before = read_json(checkpoint / IDENTITY)
    if not isinstance(before, dict):
        raise UsageError(f"--resume_from_checkpoint {checkpoint}: {IDENTITY} is damaged. Name an earlier one.")
    compared = {key: value for key, value in identity.items() if key in before or key not in _ADDED}
    changed = {key for key, value in compared.items() if before.get(key) != value}
    refused = changed & _SHAPING if forced else changed
    if not refused:
        return
    differences = "; ".join(f"{key} was {before.get(key)} and is {identity[key]}" for key in sorted(refused))
    hint = "Restore the old value, start over with --overwrite, or add --force_resume."
    if changed & _SHAPING:
        hint = "Restore the old value, or start over with --overwrite: --force_resume cannot load weights that differ."
    raise UsageError(f"--resume_from_checkpoint {checkpoint} belongs to another run: {differences}. {hint}")


def saved_batching(checkpoint: Path) -> Batching | None:
    """How the run cut its steps when it was saved, so that it resumes to the same bits. None: not recorded."""
    record = read_json(checkpoint / IDENTITY)
    try:
        return Batching(**record[BATCHING])
    except (KeyError, TypeError):  # of an earlier version, or damaged: check_same says so
        return None


def saved_betas(checkpoint: Path, betas: dict[str, float]) -> dict[str, float]:
    """The estimated betas of a checkpoint, because those of another device differ by rounding.

    betas: estimated now; they are returned if the checkpoint has no estimate, or of others.
    """
    record = read_json(checkpoint / IDENTITY)
    saved = record.get(ESTIMATED) if isinstance(record, dict) else None
    return saved if isinstance(saved, dict) and saved.keys() == betas.keys() else betas


def random_state() -> dict[str, Any]:
    """The state of every random generator of this process, as plain values and tensors."""
    import torch

    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [name, np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Restore what random_state() returned."""
    import torch

    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])  # there may have been more GPUs
