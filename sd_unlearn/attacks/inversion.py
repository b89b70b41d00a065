"""Inversion: does an image of the concept survive a round trip through the model?

Access: the network, and images of the concept. DDIM run backwards (Song et al. 2021, equation 14 solved for the noisier
latent) turns an image into the noise that generates it without guidance under the concept's caption; sampling then
starts from that noise with the usual guidance. Used on erased models by Pham et al. 2024 and Lu et al. 2025.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter

import torch
from torch import Tensor

from sd_unlearn.attacks.base import Attack, Outcome, Target
from sd_unlearn.attacks.completion import BUDGETS, ImageSettings
from sd_unlearn.data.encoding import encode_captions


def run(target: Target, settings: ImageSettings, restart: int) -> Iterator[Outcome]:
    """Invert the attacker's images and generate from the noise found."""
    latents = target.positives.first(settings.images).mean
    text = encode_captions(target.base, [target.concept.caption])
    images = []
    for known in latents.split(target.sampler.batch_size):
        images += target.generate(text, [0] * len(known), latents=ddim_invert(target, known, text))
    yield Outcome(images, len(images))


@torch.no_grad()
def ddim_invert(target: Target, latents: Tensor, text: Tensor) -> Tensor:
    """latents [B, 4, h, w] of images -> the noise from which DDIM without guidance returns to them, as latents.

    text: [1, tokens, width]. Uses the sampler's number of steps.
    """
    from diffusers import DDIMInverseScheduler

    base, denoiser = target.base, target.denoiser
    scheduler = DDIMInverseScheduler.from_config(base.pipeline.scheduler.config)
    scheduler.set_timesteps(target.sampler.steps, device=base.device)
    dtype = base.pipeline.unet.dtype
    current, text = latents.to(base.device), text.expand(len(latents), -1, -1).to(base.device, dtype)
    for timestep in scheduler.timesteps:
        predicted = denoiser.predict(current.to(dtype), timestep.expand(len(current)), text)
        current = scheduler.step(predicted.float(), int(timestep), current).prev_sample
    return current.cpu()


INVERSION = Attack(
    "inversion",
    "Inverted image",
    "Pham et al. 2024",
    "weights, images of the concept",
    BUDGETS,
    run,
    positives=attrgetter("images"),
)
