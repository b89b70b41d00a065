"""The LoRA on the UNet and, optionally, on the text encoder: attach, save, load."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from sd_unlearn.config.train import LoraTargets, Weights
from sd_unlearn.errors import UsageError, reason
from sd_unlearn.io.files import atomic_path
from sd_unlearn.io.run_folder import ADAPTER_DIR, TEXT_ADAPTER_DIR

ADAPTER_NAME = "default"
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
_ATTENTION = f"({'|'.join(re.escape(name) for name in ATTENTION)})"
# Regular expressions that match whole module names of a UNet.
TARGETS: dict[LoraTargets, str] = {
    "attention": rf".*\.{_ATTENTION}",
    "cross_attention": rf".*\.attn2\.{_ATTENTION}",
    "attention+mlp": rf".*\.({_ATTENTION}|ff\.net\.0\.proj|ff\.net\.2)",
}
TEXT_TARGETS = r".*\.(q_proj|k_proj|v_proj|out_proj)"


def attach(network: nn.Module, options: Weights, target_modules: list[str], seed: int) -> PeftModel:
    """Wrap a network with a new LoRA on the named modules. The up matrix starts at zero, so the output is unchanged."""
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.lora_alpha or options.rank,
        lora_dropout=options.lora_dropout,
        use_dora=options.use_dora,
        target_modules=target_modules,
        init_lora_weights="gaussian",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return PeftModel(network, config, adapter_name=ADAPTER_NAME)


def unet_targets(unet: nn.Module, group: LoraTargets) -> list[str]:
    """Names of the UNet's modules that a choice of --lora_targets selects."""
    if group == "all_linear+conv":
        return [name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    return _matching(unet, TARGETS[group])


def text_encoder_targets(text_encoder: nn.Module) -> list[str]:
    """Names of the attention projections of a text encoder."""
    return _matching(text_encoder, TEXT_TARGETS)


def _matching(network: nn.Module, pattern: str) -> list[str]:
    return [name for name, _ in network.named_modules() if re.fullmatch(pattern, name)]


def save(model: PeftModel, folder: Path) -> None:
    """Write an adapter folder in PEFT's format, atomically."""
    with atomic_path(folder) as temporary:
        model.save_pretrained(str(temporary))
        (temporary / "README.md").unlink(missing_ok=True)  # PEFT's empty card; export writes a real one


def load(pipeline: Any, run: Path) -> list[PeftModel]:
    """Attach the adapters of a run folder to a pipeline's networks, frozen and in eval mode, and return them.

    Raises:
        UsageError: the run folder holds no adapter, or one that PEFT cannot load.
    """
    folder = run / ADAPTER_DIR
    if not (folder / "adapter_model.safetensors").is_file():
        raise UsageError(
            f"--run {run} holds no trained LoRA ({folder}/adapter_model.safetensors). Run sd-unlearn train first."
        )
    adapters = [_load(pipeline.unet, folder)]
    if (run / TEXT_ADAPTER_DIR).is_dir():
        adapters.append(_load(pipeline.text_encoder, run / TEXT_ADAPTER_DIR))
    return adapters


def _load(network: nn.Module, folder: Path) -> PeftModel:
    try:
        return PeftModel.from_pretrained(network, str(folder), adapter_name=ADAPTER_NAME).eval()
    except Exception as error:  # for a damaged adapter_config.json PEFT raises TypeError, KeyError, re.error and others
        raise UsageError(f"--run: {folder} is not a LoRA for this base ({reason(error)}). Train it again.") from error


@torch.no_grad()
def set_strength(adapters: Sequence[nn.Module], strength: float) -> None:
    """Scale newly loaded adapters: 0 is the base, 1 as trained. DoRA's magnitudes are interpolated the same way."""
    layers = [m for adapter in adapters for m in adapter.modules() if isinstance(m, LoraLayer)]
    for layer in layers if strength != 1 else []:
        layer.scale_layer(strength)
        for dora in getattr(layer, "lora_magnitude_vector", {}).values():
            weight = layer.get_base_layer().weight
            norms = weight.flatten(1).norm(dim=1).view_as(dora.weight)
            dora.weight.copy_(norms.lerp(dora.weight, strength))
