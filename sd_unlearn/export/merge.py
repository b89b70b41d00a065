"""A whole checkpoint without the concept: what was trained baked into the base, where no LoRA can be left out."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sd_unlearn.errors import UnlearnError, UsageError
from sd_unlearn.export import ldm_keys, safetensors_writer
from sd_unlearn.export.metadata import checkpoint_header
from sd_unlearn.export.trained_run import Run
from sd_unlearn.io.files import check_writable, read_json, write_json
from sd_unlearn.io.run_folder import UNET_DIR
from sd_unlearn.models.base import load_recorded_base, use_zero_terminal_snr
from sd_unlearn.models.checkpoint_header import PICKLES

SINGLE_FILE = ".safetensors"


def check_place(path: Path) -> None:
    """Refuse a place for the checkpoint before anything heavy loads.

    Raises:
        UsageError: there is something already, a pickle is asked for, or the place cannot be written.
    """
    if path.suffix.lower() in PICKLES:
        raise UsageError(f"--merge {path}: a pickle can run code when loaded. Name a .safetensors file or a folder.")
    if path.is_file() or (path.is_dir() and (path.suffix == SINGLE_FILE or any(path.iterdir()))):
        raise UsageError(f"--merge {path} exists, and no checkpoint is replaced. Choose another name or delete it.")
    if not path.name:
        raise UsageError(f"--merge {path} is the folder you are in. Name a new one.")
    check_writable(path.parent, "--merge")


def trained_base(run: Run, allow_pickle: bool = False) -> Any:
    """The pipeline of the base that the run was trained on, in float32 on the CPU.

    Raises:
        UnlearnError: it cannot be loaded.
        UsageError: its weights are others than those trained on.
    """
    base = load_recorded_base(run.base, device="cpu", allow_pickle=allow_pickle)
    if run.training.get("zero_terminal_snr"):
        use_zero_terminal_snr(base)
    return base.pipeline


def changes(run: Run, pipeline: Any) -> Iterator[tuple[str, str, nn.Parameter, Tensor]]:
    """(network, module, its weight in the pipeline, what training adds to it in float64) of every module trained.

    Raises:
        UnlearnError: the base has no such module, or one of another shape.
    """
    for adapter in run.adapters:
        modules = dict(getattr(pipeline, adapter.network).named_modules())
        for pair in adapter.pairs:
            # transformers names an encoder's modules with or without text_model. in front, by version
            found = modules.get(pair.module) or modules.get(pair.module.removeprefix("text_model."))
            weight = getattr(found, "weight", None)
            if weight is None or (pair.up.shape[0], pair.down.shape[1]) != tuple(weight.shape[:2]):
                raise UnlearnError(f'The base {run.base_name} has no "{pair.module}" of the trained shape.')
            yield adapter.network, pair.module, weight, pair.change(weight)


@torch.no_grad()
def bake(run: Run, pipeline: Any, strength: float = 1.0) -> None:
    """Change the pipeline's weights W to W + strength * (trained - W).

    Raises:
        UnlearnError: the base does not fit what was trained.
    """
    if run.is_full:
        from diffusers import UNet2DConditionModel

        trained = UNet2DConditionModel.from_pretrained(str(run.folder / UNET_DIR)).state_dict()
        for name, value in pipeline.unet.state_dict().items():
            value.copy_(value.double().lerp(trained[name].double(), strength))
    for _, _, weight, change in changes(run, pipeline):
        weight.copy_(weight.double() + strength * change)


def write(
    run: Run, pipeline: Any, path: Path, *, strength: float = 1.0, dtype: str = "fp32", licence: str | None = None
) -> None:
    """Bake a run into its base and write that, as one file where the path ends in .safetensors, else as a folder.

    Raises:
        UnlearnError: it cannot be expressed in the layout or in fp16, or the place cannot be written; nothing is
            left half-written.
    """
    number = {"fp32": torch.float32, "fp16": torch.float16}[dtype]
    bake(run, pipeline, strength)
    try:
        if path.suffix == SINGLE_FILE:
            tensors = safetensors_writer.converted(ldm_keys.checkpoint(pipeline, run.kind), number)
            header = checkpoint_header(run, safetensors_writer.digest(tensors), strength, licence)
            safetensors_writer.save(path, tensors, header)
        else:
            safetensors_writer.converted(pipeline.unet.state_dict(), number)  # refuses what would overflow
            _save_folder(pipeline.to(number), path)
    except OSError as error:
        raise UnlearnError(f"Cannot write --merge {path}: {error.strerror or error}. Choose another place.") from error


def _save_folder(pipeline: Any, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        pipeline.save_pretrained(str(temporary))
        for config in temporary.rglob("*.json"):
            _forget_origin(config)
        if path.is_dir():
            path.rmdir()  # an empty one
        temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _forget_origin(config: Path) -> None:
    """Take out where on this machine the base lay: in what is published it is nobody's business."""
    found = read_json(config)
    if isinstance(found, dict) and found.pop("_name_or_path", None) is not None:
        write_json(config, found)
