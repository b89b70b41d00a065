"""Safe latent diffusion: guidance away from a concept while sampling, without changing any weight.

Schramowski et al. 2023, "Safe Latent Diffusion: Mitigating Inappropriate Degeneration in Diffusion Models" (arXiv
2211.05105), equations 3 to 8. The paper guides away from a list of unsafe content; here it is the name of a concept. It
is not the concept's caption, because the guidance is zero for a prompt that equals the text it guides away from.
A model that predicts v is guided in v: the formulas are applied to its predictions as they are.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sd_unlearn.choices import SafetyPreset
from sd_unlearn.errors import UsageError
from sd_unlearn.models.kinds import KINDS

if TYPE_CHECKING:
    from torch import Tensor

    from sd_unlearn.models.base import Base


@dataclass(frozen=True)
class SafetySettings:
    """How strongly sampling avoids the concept."""

    warmup_steps: int  # delta: sampling steps without guidance, in which momentum builds up
    scale: float  # s_S
    threshold: float  # lambda
    momentum_scale: float  # s_m
    momentum_decay: float  # beta_m


# The paper's configurations Hyp-Weak, Hyp-Medium, Hyp-Strong and Hyp-Max. diffusers has 20 for the first scale.
PRESETS: dict[SafetyPreset, SafetySettings] = {
    "weak": SafetySettings(15, 200, 0.0, 0.0, 0.0),
    "medium": SafetySettings(10, 1000, 0.01, 0.3, 0.4),
    "strong": SafetySettings(7, 2000, 0.025, 0.5, 0.7),
    "max": SafetySettings(0, 5000, 1.0, 0.5, 0.7),
}


@dataclass(frozen=True)
class Safety:
    """Sampling that avoids what a text describes."""

    name: str  # of the preset
    text: str
    settings: SafetySettings

    def describe(self) -> dict[str, Any]:
        """As recorded in results.json."""
        return dataclasses.asdict(self)

    @property
    def digest(self) -> str:
        """Identifies what determines the images."""
        return hashlib.sha256(repr((self.text, self.settings)).encode()).hexdigest()[:12]


class SafeGuidance:
    """The safety term of one batch, from sampling step to sampling step."""

    def __init__(self, settings: SafetySettings) -> None:
        self.settings = settings
        self.step = 0
        self.momentum: Tensor | None = None  # nu; zero before the first step

    def next(self, empty: Tensor, prompt: Tensor, concept: Tensor) -> Tensor:
        """The term gamma to subtract from the prompt's prediction in the next step, shaped as the predictions.

        Guidance then is e(x,'') + s_g (e(x,p) - gamma - e(x,'')), equation 3. empty, prompt, concept: the predictions
        for the empty caption, the prompt and the concept.
        """
        import torch

        s = self.settings
        difference = prompt - concept
        scale = (s.scale * difference).abs().clamp(max=1)  # equation 6, elementwise
        scale = torch.where(difference < s.threshold, scale, torch.zeros_like(scale))  # equation 5
        gamma = scale * (concept - empty)  # equation 4
        if self.momentum is not None:
            gamma = gamma + s.momentum_scale * self.momentum  # equation 7
        before = torch.zeros_like(gamma) if self.momentum is None else self.momentum
        self.momentum = s.momentum_decay * before + (1 - s.momentum_decay) * gamma  # equation 8
        self.step += 1
        return torch.zeros_like(gamma) if self.step <= s.warmup_steps else gamma


def check_safe_guidance(kind: str, name: str) -> None:
    """Refuse a base that safety guidance is not made for.

    Raises:
        UsageError
    """
    if KINDS[kind].is_flow:
        raise UsageError(f"--sld is for SD 1.x, 2.x and XL; {name} is of kind {kind}. Leave it out.")


@contextmanager
def safe_guidance(base: Base, safety: Safety) -> Iterator[None]:
    """Within the block the base's pipeline samples with safety guidance.

    The UNet's prediction for the prompt is changed, so that the pipeline's own guidance gives equation 3. That needs
    a guidance scale above 1, and half as many passes through the UNet again. A batch ends where the timestep no longer
    falls, also if it was interrupted because memory ran out.
    """
    import torch

    check_safe_guidance(base.kind, base.name)
    embedding, _, *more = base.pipeline.encode_prompt(
        prompt=safety.text, device=base.device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    guidance, last = SafeGuidance(safety.settings), math.inf

    def guide(unet: Any, args: Any, kwargs: dict[str, Any], output: Any) -> tuple[Tensor]:
        """Forward hook of the UNet, which the pipeline calls with the empty captions before the prompts."""
        nonlocal guidance, last
        noisy, timestep = args
        if timestep >= last:
            guidance = SafeGuidance(safety.settings)
        last, count = float(timestep), len(noisy) // 2
        empty, prompt = output[0].chunk(2)
        changed = {"encoder_hidden_states": embedding.expand(count, -1, -1)}
        if added := kwargs.get("added_cond_kwargs"):  # SDXL
            changed["added_cond_kwargs"] = added | {
                "text_embeds": more[0].expand(count, -1),
                "time_ids": added["time_ids"][count:],
            }
        concept = unet.forward(noisy[count:], timestep, **kwargs | changed)[0]  # without this hook
        return (torch.cat([empty, prompt - guidance.next(empty, prompt, concept)]),)

    handle = base.pipeline.unet.register_forward_hook(guide, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
