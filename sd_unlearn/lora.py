"""The LoRA on the UNet: attach, what to train, the teacher (adapter off), save, load."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, PeftModel
from torch import nn

from sd_unlearn.errors import UsageError
from sd_unlearn.records import ADAPTER_DIR

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
ADAPTER_NAME = "default"


def attach(unet: UNet2DConditionModel, rank: int, alpha: float, seed: int) -> PeftModel:
    """Wrap the UNet with a fresh LoRA on its attention projections; up starts at zero, so nothing changes yet."""
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=ATTENTION, init_lora_weights="gaussian")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return PeftModel(unet, config, adapter_name=ADAPTER_NAME)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters to train, as a list: an iterator would be spent by the optimizer and then nothing be clipped."""
    return [p for p in model.parameters() if p.requires_grad]


@contextmanager
def teacher(model: PeftModel) -> Iterator[PeftModel]:
    """The frozen base: the same network with its adapter off."""
    with model.disable_adapter():
        yield model


def save(model: PeftModel, run: Path) -> None:
    """Write the adapter under run/adapter as PEFT does, through a temporary folder."""
    target, temporary = run / ADAPTER_DIR, run / f".{ADAPTER_DIR}.tmp"
    model.save_pretrained(str(temporary))
    (temporary / "README.md").unlink(missing_ok=True)  # PEFT's empty card; export writes a real one
    target.mkdir(exist_ok=True)
    for file in sorted(temporary.iterdir()):
        file.replace(target / file.name)
    temporary.rmdir()


def load(unet: UNet2DConditionModel, run: Path) -> PeftModel:
    """Wrap the UNet with the adapter of a run folder, frozen and in eval mode.

    Raises:
        UsageError: when the run folder holds no adapter.
    """
    folder = run / ADAPTER_DIR
    if not (folder / "adapter_model.safetensors").is_file():
        raise UsageError(
            f"--run {run} holds no trained LoRA ({folder}/adapter_model.safetensors). Run sd-unlearn train first."
        )
    return PeftModel.from_pretrained(unet, str(folder), adapter_name=ADAPTER_NAME).eval()
