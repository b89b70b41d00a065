"""The network that learns, and the frozen one behind it: a LoRA or the whole UNet, a text encoder's LoRA beside it."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft import PeftModel
from torch import Tensor, nn

from sd_unlearn.config.train import Weights
from sd_unlearn.io.run_folder import ADAPTER_DIR, TEXT_ADAPTER_DIR, UNET_DIR
from sd_unlearn.models import lora
from sd_unlearn.models.base import Base


class WithTextEncoder(nn.Module):
    """A UNet called with token ids [B, tokens] in place of embeddings, so that gradients reach both."""

    def __init__(self, unet: nn.Module, text_encoder: nn.Module) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, noisy: Tensor, timesteps: Tensor, encoder_hidden_states: Tensor) -> Any:
        text = self.text_encoder(encoder_hidden_states)[0]
        return self.unet(noisy, timesteps, encoder_hidden_states=text)


@dataclass
class Student:
    """What is trained. `model` is called as a UNet is; wrap it for many processes, and keep this one for the rest."""

    model: nn.Module
    base_copy: nn.Module | None = None  # of a fully trained UNet that needs a teacher

    @property
    def adapters(self) -> list[PeftModel]:
        return [module for module in self.model.modules() if isinstance(module, PeftModel)]

    def trainable(self) -> list[nn.Parameter]:
        """The parameters to train, as a list: an iterator would be spent by the optimizer and nothing be clipped."""
        return [p for p in self.model.parameters() if p.requires_grad]

    @contextmanager
    def frozen(self) -> Iterator[nn.Module]:
        """The base behind the student: the same network with its adapters off, or the copy kept of it."""
        if self.base_copy is not None:
            yield self.base_copy
            return
        with ExitStack() as off:
            for adapter in self.adapters:
                off.enter_context(adapter.disable_adapter())
            yield self.model

    def state(self) -> dict[str, Tensor]:
        """Copies of what is trained, by name, on the CPU."""
        return {n: p.detach().to("cpu", copy=True) for n, p in self.model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Put back what state() gave."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(state[name])

    def save(self, folder: Path) -> None:
        """Write what was learned into a run folder: adapter/ (and text_encoder_adapter/), or unet/."""
        if not self.adapters:
            _save_unet(self.model, folder / UNET_DIR)
        for adapter, name in zip(self.adapters, (ADAPTER_DIR, TEXT_ADAPTER_DIR), strict=False):
            lora.save(adapter, folder / name)


def make_student(base: Base, options: Weights, seed: int, needs_teacher: bool) -> Student:
    """The student of a loaded base, in training mode; with method full and a teacher it holds the UNet twice."""
    unet = base.pipeline.unet
    if options.method == "full":
        base_copy = copy.deepcopy(unet).requires_grad_(False).eval() if needs_teacher else None
        return Student(unet.requires_grad_(True).train(), base_copy)
    model: nn.Module = lora.attach(unet, options, lora.targets_of(unet, options.lora_targets), seed)
    if options.train_text_encoder:
        encoder = base.pipeline.text_encoder
        model = WithTextEncoder(model, lora.attach(encoder, options, lora.targets_of(encoder, None), seed + 1))
    return Student(model.train())


@contextmanager
def run_applied(base: Base, run: Path, strength: float = 1.0) -> Iterator[None]:
    """A loaded base with what a run has learned, and as it was afterwards.

    strength: 1 as trained, 0 the base. Of a fully trained UNet it is how far the weights go from the base's to its own.

    Raises:
        UsageError: the run folder holds neither a LoRA nor a UNet.
    """
    if not (run / UNET_DIR).is_dir():
        adapters = lora.load(base.pipeline, run)
        try:
            lora.set_strength(adapters, strength)
            yield
        finally:
            for adapter in adapters:
                adapter.unload()
        return
    unet = base.pipeline.unet
    learned = UNet2DConditionModel.from_pretrained(str(run / UNET_DIR)).state_dict()
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    moved = {n: v.lerp(learned[n].to(v), strength) if strength != 1 else learned[n] for n, v in before.items()}
    try:
        unet.load_state_dict(moved)
        yield
    finally:
        unet.load_state_dict(before)


def _save_unet(unet: nn.Module, target: Path) -> None:
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        unet.save_pretrained(str(temporary), max_shard_size="100GB")  # type: ignore[operator]
        shutil.rmtree(target, ignore_errors=True)
        temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
