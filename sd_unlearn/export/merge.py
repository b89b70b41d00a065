"""Merge the trained change into the base and write a whole checkpoint, so that no LoRA can be left out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sd_unlearn.errors import UnlearnError, reason
from sd_unlearn.export import safetensors_writer
from sd_unlearn.export.kohya import LoraPair
from sd_unlearn.export.metadata import checkpoint_header
from sd_unlearn.export.trained_run import TrainedRun
from sd_unlearn.io.files import atomic_path, write_json
from sd_unlearn.io.lock import remove_leftovers
from sd_unlearn.io.reading import read_json
from sd_unlearn.io.run_folder import UNET_DIR
from sd_unlearn.models import ldm_keys
from sd_unlearn.models.recorded_base import load_recorded_base
from sd_unlearn.models.zero_terminal_snr import use_zero_terminal_snr

SINGLE_FILE = ".safetensors"


def trained_base(run: TrainedRun, allow_pickle: bool = False, name: str | None = None) -> Any:
    """Load the pipeline of the base that the run was trained on, in float32 on the CPU. name: where it is now.

    Raises:
        UnlearnError: the base cannot be loaded.
        UsageError: it is not where it was, or its weights differ from those at training time.
    """
    base = load_recorded_base(run.base, device="cpu", allow_pickle=allow_pickle, name=name)
    if run.zero_terminal_snr:
        use_zero_terminal_snr(base)
    return base.pipeline


def trained_weights(run: TrainedRun, pipeline: Any) -> Iterator[tuple[str, LoraPair, nn.Parameter]]:
    """For each trained module: (network, its pair, its weight in the pipeline).

    Raises:
        UnlearnError: the base lacks a trained module, or the module has another shape.
    """
    for adapter in run.adapters:
        modules = dict(getattr(pipeline, adapter.network).named_modules())
        for pair in adapter.pairs:
            # the names of a text encoder's modules start with text_model. in some versions of transformers only
            layer = modules.get(pair.module) or modules.get(pair.module.removeprefix("text_model."))
            weight = getattr(layer, "weight", None)
            if weight is None or (pair.up.shape[0], pair.down.shape[1]) != tuple(weight.shape[:2]):
                raise UnlearnError(
                    f'The base {run.base_name} has no "{pair.module}" of the trained shape. Train the run again.'
                )
            yield adapter.network, pair, weight


@torch.no_grad()
def merge_into(run: TrainedRun, pipeline: Any, strength: float = 1.0) -> None:
    """Change the pipeline's weights in place: W becomes W + strength * (trained - W).

    Raises:
        UnlearnError: the modules of the base differ from the trained ones.
    """
    if run.is_full:
        network = getattr(pipeline, run.network)
        trained = type(network).from_pretrained(str(run.folder / UNET_DIR)).state_dict()
        for name, value in network.state_dict().items():
            value.copy_(value.double().lerp(trained[name].double(), strength))
    for _, pair, weight in trained_weights(run, pipeline):
        weight.copy_(pair.applied_to(weight, strength))


def write(
    run: TrainedRun,
    pipeline: Any,
    path: Path,
    *,
    strength: float = 1.0,
    dtype: str = "fp32",
    licence: str | None = None,
) -> None:
    """Merge a run into its base and write a checkpoint: one file if the path ends in .safetensors, else a folder.

    The pipeline's weights are changed in place.

    Raises:
        UnlearnError: the weights do not fit the single-file layout or fp16, or the path cannot be written. Nothing is
            left half-written.
    """
    torch_dtype = {"fp32": torch.float32, "fp16": torch.float16}[dtype]
    merge_into(run, pipeline, strength)
    try:
        remove_leftovers(path.parent, (path.name, f"*{SINGLE_FILE}"))
        if path.suffix.lower() == SINGLE_FILE:
            tensors = safetensors_writer.converted(ldm_keys.checkpoint(pipeline, run.kind), torch_dtype)
            header = checkpoint_header(run, safetensors_writer.digest(tensors), strength, licence)
            safetensors_writer.save(path, tensors, header)
        else:
            network = getattr(pipeline, run.network)
            safetensors_writer.converted(network.state_dict(), torch_dtype)  # raises if a weight overflows fp16
            _save_folder(pipeline.to(torch_dtype), path)
    except OSError as error:
        raise UnlearnError(f"Cannot write --merge {path}: {reason(error)}. Choose another path.") from error


def _save_folder(pipeline: Any, path: Path) -> None:
    with atomic_path(path) as temporary:
        pipeline.save_pretrained(str(temporary))
        for config in temporary.rglob("*.json"):
            _remove_origin(config)


def _remove_origin(config: Path) -> None:
    """Remove the local path of the base from a model's config, because the checkpoint may be published."""
    content = read_json(config)
    if isinstance(content, dict) and content.pop("_name_or_path", None) is not None:
        write_json(config, content)
