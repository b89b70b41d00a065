"""Optimizer, learning rate schedule, skipping of steps with a non-finite gradient, moving average of the weights."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from sd_unlearn.config.loop import Optimizing


def make_optimizer(parameters: list[nn.Parameter], options: Optimizing) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019), in full precision or with its moments in 8 bits (Dettmers et al. 2022)."""
    settings: dict[str, Any] = {"lr": options.learning_rate, "weight_decay": options.weight_decay}
    if options.optimizer == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, **settings)
    return torch.optim.AdamW(parameters, fused=True, **settings)


def make_schedule(optimizer: Any, options: Optimizing) -> Any:
    """The learning rate schedule; step it once per optimizer step."""
    return get_scheduler(
        options.lr_scheduler,
        optimizer,
        num_warmup_steps=options.lr_warmup_steps,
        num_training_steps=options.steps,
    )


def set_rates(optimizer: Any, schedule: Any, options: Optimizing) -> None:
    """Set learning rate and weight decay of an optimizer and its schedule to the options', at their current step.

    load_state_dict() sets them to the checkpoint's. If those equal the options', nothing changes.
    """
    rates = [options.learning_rate * rule(schedule.last_epoch) for rule in schedule.lr_lambdas]
    schedule.base_lrs = [options.learning_rate] * len(rates)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group.update(lr=rate, initial_lr=options.learning_rate, weight_decay=options.weight_decay)
    schedule._last_lr = rates


def set_first_scale(scaler: torch.amp.GradScaler | None, reduction: str, latents: Tensor) -> None:
    """Start the gradient scaler of fp16, if there is one, at 65536 / elements for losses that sum over a latent.

    Its own 65536 is for losses that are means. The gradient of a sum overflows at that scale, and as each step that
    overflows is skipped and halves the scale, about log2(elements) steps would be lost (14 at the size of SD 1.5).

    reduction: of an example's loss, sum or mean. latents: [N, C, h, w].
    """
    if scaler and reduction == "sum":
        state = scaler.state_dict()
        scaler.load_state_dict(state | {"scale": state["scale"] / latents[0].numel()})


class GuardedSteps:
    """Optimizer steps that skip and count gradients that are not finite.

    The fused AdamW takes that flag as a tensor, so nothing waits for the device; under fp16 the gradient scaler does
    the same. The 8-bit AdamW cannot: it costs one wait per step.
    """

    def __init__(self, optimizer: Any, scaler: Any, device: torch.device) -> None:
        self.optimizer, self.scaler = optimizer, scaler
        self.skipped = torch.zeros(2, device=device)  # total, and in a row

    def reserve(self) -> None:
        """Take the memory of AdamW's moments and give it back to torch, which keeps it for the first step.

        So memory that runs out is noticed before the step, when all processes can still agree to repeat it.
        """
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        of_eight_bit = getattr(inner, "args", None)  # of bitsandbytes
        moments = []
        for parameter in (p for group in inner.param_groups for p in group["params"]):
            eight_bit = of_eight_bit is not None and parameter.numel() >= of_eight_bit.min_8bit_size
            dtype = torch.uint8 if eight_bit else torch.float32
            moments += [torch.empty_like(parameter, dtype=dtype) for _ in range(2)]
        del moments

    def step(self, norm: Tensor) -> None:
        """Step, unless the gradient's norm (before clipping, a scalar) is not finite."""
        not_finite = (~torch.isfinite(norm)).float().to(self.skipped.device)
        self.skipped = torch.stack([self.skipped[0] + not_finite, (self.skipped[1] + 1) * not_finite])
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        if self.scaler is not None:
            self.optimizer.step()
        elif getattr(inner, "_step_supports_amp_scaling", False):
            inner.grad_scale, inner.found_inf = None, not_finite
            self.optimizer.step()
        elif not bool(not_finite):
            self.optimizer.step()
        self.optimizer.zero_grad()


class MovingAverage:
    """Exponential moving average of the trainable weights; the decay after step t is min(decay, (1 + t) / (10 + t)).

    diffusers' EMAModel(update_after_step=-1) has the same rule but rounds differently (it computes s - w (s - p) where
    lerp computes p - (p - s) (1 - w) for w >= 0.5), so it would change the weights of existing seeds.
    """

    def __init__(self, parameters: list[nn.Parameter], decay: float) -> None:
        self.parameters, self.decay, self.steps = parameters, decay, 0
        self.averages = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self) -> None:
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.averages, [p.detach() for p in self.parameters], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the weights and their average. A second call restores them."""
        for parameter, average in zip(self.parameters, self.averages, strict=True):
            weights = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(weights)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "averages": [a.cpu() for a in self.averages]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        for average, saved in zip(self.averages, state["averages"], strict=True):
            average.copy_(saved)
