"""The two LoRA files of a run: one for Diffusers, one for ComfyUI, A1111 and Forge. Both have the trained scale."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sd_unlearn.export import safetensors_writer
from sd_unlearn.export.kohya import kohya_tensors, module_key, transformer_tensors
from sd_unlearn.export.merge import trained_weights
from sd_unlearn.export.metadata import lora_header, own_header
from sd_unlearn.export.trained_run import TrainedRun

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
# The settings that Diffusers needs to rebuild the adapter. PEFT's whole config could contain local paths, and an older
# PEFT would refuse the file because of settings that it does not know.
_ADAPTER_KEYS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "bias")


def diffusers_bytes(run: TrainedRun, dtype: str = "fp32") -> bytes:
    """The LoRA file for Diffusers: PEFT's names with the prefix `unet.` or `text_encoder.`.

    The header key `lora_adapter_metadata` holds the scale. Without it, load_lora_weights assumes alpha = rank, which is
    true for a transformer's file (`transformer_tensors`).

    Args:
        dtype: "fp32" or "fp16".

    Raises:
        UnlearnError: a weight is too large for fp16, or the header is too long.
    """
    tensors: dict[str, Tensor] = {}
    adapter_settings: dict[str, Any] = {}
    if run.network == "transformer":
        weights = safetensors_writer.converted(transformer_tensors(run.adapters[0]), DTYPES[dtype])
        return safetensors_writer.pack(weights, {"format": "pt"} | own_header(run))
    for adapter in run.adapters:
        network = adapter.network
        for pair in adapter.pairs:
            tensors[f"{network}.{pair.module}.lora_A.weight"] = pair.down
            tensors[f"{network}.{pair.module}.lora_B.weight"] = pair.up
            if pair.magnitude is not None:
                tensors[f"{network}.{pair.module}.lora_magnitude_vector"] = pair.magnitude
        values = {key: getattr(adapter.settings, key) for key in _ADAPTER_KEYS}
        settings = {key: value for key, value in values.items() if value is not None}
        settings |= {"use_dora": True} if adapter.is_dora else {}
        targets = adapter.settings.target_modules
        modules = targets if isinstance(targets, list) else [pair.module for pair in adapter.pairs]
        settings["target_modules"] = sorted(modules)
        adapter_settings |= {f"{network}.{key}": value for key, value in settings.items()}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(adapter_settings, indent=2, sort_keys=True)}
    return safetensors_writer.pack(safetensors_writer.converted(tensors, DTYPES[dtype]), metadata | own_header(run))


def concept_of(file: Path) -> str | None:
    """The concept in the header of an exported LoRA; None for any other file."""
    try:
        with safe_open(file, framework="pt") as opened:
            return (opened.metadata() or {}).get("sd_unlearn.concept")
    except (SafetensorError, OSError):
        return None


def kohya_bytes(run: TrainedRun, dtype: str = "fp32", pipeline: Any = None, licence: str | None = None) -> bytes:
    """The LoRA file for ComfyUI, A1111 and Forge: kohya's names and the trained alpha.

    For transformers the weights are those of `diffusers_bytes`, with another header.

    A DoRA is written as the whole change of each weight (`.diff`), which needs the `pipeline` of the base. The format
    also defines `.dora_scale`, but its readers divide by other norms than PEFT: ComfyUI and Forge by the norm of the
    base's weights or, depending on the release, along the other axis.

    Args:
        dtype: "fp32" or "fp16".
        pipeline: The pipeline of the base, needed for a DoRA.
        licence: In the hub's spelling; None if unknown.

    Raises:
        UnlearnError: a weight is too large for fp16, the header is too long, or the base has other modules.
    """
    tensors: dict[str, Tensor] = {}
    if run.is_dora:
        for network, pair, weight in trained_weights(run, pipeline):
            key = module_key(pair.module, network, run.kind, run.blocks)
            tensors[f"{key}.diff"] = (pair.applied_to(weight) - weight.double()).float()
    else:
        for adapter in run.adapters:
            tensors |= kohya_tensors(adapter, run.kind, run.blocks)
    tensors = safetensors_writer.converted(tensors, DTYPES[dtype])
    return safetensors_writer.pack(tensors, lora_header(run, safetensors_writer.digest(tensors), licence))
