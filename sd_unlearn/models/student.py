"""The trained network (student) and the frozen base behind it (teacher).

The student is a LoRA on the UNet or transformer, optionally with one on the text encoder, or the whole UNet.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin, UNet2DConditionModel
from peft import PeftModel
from torch import Tensor, nn

from sd_unlearn.config.objective import Weights
from sd_unlearn.io.files import atomic_path
from sd_unlearn.io.run_folder import ADAPTER_DIR, TEXT_ADAPTER_DIR, UNET_DIR
from sd_unlearn.models import lora
from sd_unlearn.models.base import Base
from sd_unlearn.models.lora_change import apply_changes, find_modules


class WithTextEncoder(nn.Module):
    """A UNet that takes token ids [B, tokens] instead of embeddings, so that gradients reach the text encoder, too."""

    def __init__(self, unet: nn.Module, text_encoder: nn.Module) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, noisy: Tensor, timesteps: Tensor, encoder_hidden_states: Tensor) -> Any:
        text = self.text_encoder(encoder_hidden_states)[0]
        return self.unet(noisy, timesteps, encoder_hidden_states=text)


@dataclass
class Student:
    """The trained network. `model` is called like a UNet; wrap `model` for DDP and keep this object for the rest."""

    model: nn.Module
    base_copy: nn.Module | None = None  # the teacher of a fully trained UNet

    @property
    def adapters(self) -> list[PeftModel]:
        return [module for module in self.model.modules() if isinstance(module, PeftModel)]

    def trainable(self) -> list[nn.Parameter]:
        """The trainable parameters, as a list: the optimizer would consume an iterator and clipping then clip none."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def set_checkpointing(self, on: bool) -> None:
        """Switch gradient checkpointing of the UNet on or off; the gradient stays the same.

        It is diffusers' non-reentrant kind: the reentrant kind needs an input that requires a gradient, which a frozen
        network with a LoRA does not have. Activations are recomputed with the adapter as it is during the backward
        pass, so the teacher (adapter off) must have run before, as it has in `example_losses`.
        """
        for module in self.model.modules():
            if isinstance(module, ModelMixin) and module._supports_gradient_checkpointing:
                (module.enable_gradient_checkpointing if on else module.disable_gradient_checkpointing)()

    @contextmanager
    def frozen(self) -> Iterator[nn.Module]:
        """The base: the student's own network with its adapters off, or the frozen copy of a fully trained UNet.

        Not to be nested. PeftModel.disable_adapter could be, but it inspects every layer each time, which takes longer
        than a small network's forward pass.
        """
        if self.base_copy is not None:
            yield self.base_copy
            return
        tuners: list[Any] = [adapter.base_model for adapter in self.adapters]
        for tuner in tuners:
            tuner.disable_adapter_layers()
        try:
            yield self.model
        finally:
            for tuner in tuners:
                tuner.enable_adapter_layers()

    def state(self) -> dict[str, Tensor]:
        """Copies of the trainable parameters on the CPU, by name."""
        return {n: p.detach().to("cpu", copy=True) for n, p in self.model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore what state() returned."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(state[name])

    def save(self, folder: Path) -> None:
        """Write the trained weights into a run folder: adapter/ (and text_encoder_adapter/), or unet/."""
        if not self.adapters:
            with atomic_path(folder / UNET_DIR) as temporary:
                self.model.save_pretrained(str(temporary), max_shard_size="100GB")  # type: ignore[operator]
        for adapter, name in zip(self.adapters, (ADAPTER_DIR, TEXT_ADAPTER_DIR), strict=False):
            lora.save(adapter, folder / name)


def make_student(base: Base, options: Weights, seed: int, needs_teacher: bool) -> Student:
    """Make the student of a loaded base, in training mode. With method full and a teacher it holds the UNet twice."""
    network = base.network
    if options.method == "full":
        base_copy = copy.deepcopy(network).requires_grad_(False).eval() if needs_teacher else None
        return Student(network.requires_grad_(True).train(), base_copy)
    model: nn.Module = lora.attach(network, options, lora.network_targets(network, options.lora_targets), seed)
    if options.train_text_encoder:
        encoder = base.pipeline.text_encoder
        model = WithTextEncoder(model, lora.attach(encoder, options, lora.text_encoder_targets(encoder), seed + 1))
    return Student(model.train())


@contextmanager
def apply_run(base: Base, run: Path, strength: float = 1.0) -> Iterator[None]:
    """Apply the trained weights of a run folder to a loaded base, and restore the base at the end of the block.

    strength: 1 as trained, 0 the base; a fully trained UNet is interpolated between the base's weights and its own.

    Raises:
        UsageError: the run folder holds neither a LoRA nor a UNet.
        UnlearnError: the LoRA is not finite or does not fit the base.
    """
    if not (run / UNET_DIR).is_dir():
        with ExitStack() as stack:
            for file in lora.read_run(run):
                where = f"--run {file.path}"
                targets = find_modules(base.pipeline, file.changes, where, base.name)
                stack.enter_context(apply_changes(targets, strength, where))
            yield
        return
    unet = base.pipeline.unet
    trained = UNet2DConditionModel.from_pretrained(str(run / UNET_DIR)).state_dict()
    original = {name: value.to("cpu", copy=True) for name, value in unet.state_dict().items()}
    applied = {n: v.lerp(trained[n].to(v), strength) if strength != 1 else trained[n] for n, v in original.items()}
    try:
        unet.load_state_dict(applied)
        yield
    finally:
        unet.load_state_dict(original)
