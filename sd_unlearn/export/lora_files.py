"""The two LoRA files of a run: one for Diffusers, one for ComfyUI, A1111 and Forge, both with the trained scale."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sd_unlearn.export import safetensors_writer
from sd_unlearn.export.kohya import kohya_tensors, module_key
from sd_unlearn.export.merge import changes
from sd_unlearn.export.metadata import lora_header, own_header
from sd_unlearn.export.trained_run import Run

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
# What Diffusers needs to rebuild the adapter. PEFT's whole config would make an older PEFT refuse the file over
# settings it does not know, and can name folders of this machine.
_ADAPTER_KEYS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "bias")


def diffusers_bytes(run: Run, dtype: str = "fp32") -> bytes:
    """The file for Diffusers: PEFT's names under `unet.` and `text_encoder.`, the adapters' scale in the header.

    Without `lora_adapter_metadata` load_lora_weights takes alpha = rank, whatever was trained.
    """
    tensors: dict[str, Tensor] = {}
    packed: dict[str, Any] = {}
    for adapter in run.adapters:
        network = adapter.network
        for pair in adapter.pairs:
            tensors[f"{network}.{pair.module}.lora_A.weight"] = pair.down
            tensors[f"{network}.{pair.module}.lora_B.weight"] = pair.up
            if pair.magnitude is not None:
                tensors[f"{network}.{pair.module}.lora_magnitude_vector"] = pair.magnitude
        settings = {key: adapter.config[key] for key in _ADAPTER_KEYS if key in adapter.config}
        settings |= {"use_dora": True} if adapter.is_dora else {}
        targets = adapter.config.get("target_modules")
        modules = targets if isinstance(targets, list) else [pair.module for pair in adapter.pairs]
        settings["target_modules"] = sorted(modules)
        packed |= {f"{network}.{key}": value for key, value in settings.items()}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(packed, indent=2, sort_keys=True)}
    return safetensors_writer.pack(safetensors_writer.converted(tensors, DTYPES[dtype]), metadata | own_header(run))


def concept_of(file: Path) -> str | None:
    """What an exported file makes forget, by its header; None of any other file."""
    try:
        with safe_open(file, framework="pt") as opened:
            return (opened.metadata() or {}).get("sd_unlearn.concept")
    except (SafetensorError, OSError):
        return None


def kohya_bytes(run: Run, dtype: str = "fp32", pipeline: Any = None, licence: str | None = None) -> bytes:
    """The file for ComfyUI, A1111 and Forge: kohya's names, the true alpha, ModelSpec and kohya header keys.

    Of a DoRA it holds the whole change of every weight (`.diff`) and needs the base's `pipeline`. The format knows
    `.dora_scale`, but its readers divide by other norms than PEFT does: ComfyUI and Forge by that of the base's
    weights or along the other axis, by release.
    """
    tensors: dict[str, Tensor] = {}
    if run.is_dora:
        for network, module, _, change in changes(run, pipeline):
            tensors[f"{module_key(module, network, run.kind, run.layout)}.diff"] = change.float()
    else:
        for adapter in run.adapters:
            tensors |= kohya_tensors(adapter, run.kind, run.layout)
    tensors = safetensors_writer.converted(tensors, DTYPES[dtype])
    return safetensors_writer.pack(tensors, lora_header(run, safetensors_writer.digest(tensors), licence))
