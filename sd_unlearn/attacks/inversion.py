"""Inversion: does an image of the concept survive a round trip through the model?

Access: the network, and images of the concept. DDIM run backwards (Song et al. 2021, equation 14 solved for the noisier
latent; for flow matching its differential equation) turns an image into the noise that generates it without guidance
under the concept's caption; sampling then starts from that noise with the usual guidance. Used on erased models by Pham
et al. 2024 and Lu et al. 2025.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from operator import attrgetter

import torch
from PIL import Image
from torch import Tensor

from sd_unlearn.attacks.base import Attack, Outcome, Target
from sd_unlearn.attacks.completion import BUDGETS, ImageSettings
from sd_unlearn.data.encoding import encode_captions


def run(target: Target, settings: ImageSettings, restart: int) -> Iterator[Outcome]:
    """Invert the attacker's images and generate from the noise found."""
    latents = target.positives.first(settings.images).mean
    text = encode_captions(target.base, [target.concept.caption])

    def invert_and_generate(numbers: Sequence[int]) -> list[Image.Image]:
        known = latents[numbers[0] : numbers[-1] + 1]
        noise = invert(target, known, text).to(target.base.network.dtype)  # pipelines may not cast it
        return target.generate(text, [0] * len(known), latents=target.base.conditioning.as_argument(noise))

    batches = target.base.generating.map(invert_and_generate, range(len(latents)), target.sampler.batch_size)
    images = [image for batch in batches for image in batch]
    yield Outcome(images, len(images))


@torch.no_grad()
def invert(target: Target, latents: Tensor, text: Tensor) -> Tensor:
    """latents [B, C, h, w] of images -> the noise from which sampling without guidance returns to them, as latents.

    text: [1, rows, width]. Uses the sampler's number of steps.
    """
    base, denoiser = target.base, target.denoiser
    dtype = base.network.dtype
    current, text = latents.to(base.device), text.expand(len(latents), -1, -1).to(base.device, dtype)

    def predict(noisy: Tensor, timestep: Tensor) -> Tensor:
        return denoiser.predict(noisy.to(dtype), timestep.expand(len(noisy)), text).float()

    steps = _euler if base.properties.is_flow else _ddim
    return steps(target, current, predict).cpu()


Predict = Callable[[Tensor, Tensor], Tensor]  # noisy latents, a timestep -> the network's prediction


def _ddim(target: Target, current: Tensor, predict: Predict) -> Tensor:
    from diffusers import DDIMInverseScheduler

    scheduler = DDIMInverseScheduler.from_config(target.base.pipeline.scheduler.config)
    scheduler.set_timesteps(target.sampler.steps, device=current.device)
    for timestep in scheduler.timesteps:
        current = scheduler.step(predict(current, timestep), int(timestep), current).prev_sample
    return current


def _euler(target: Target, current: Tensor, predict: Predict) -> Tensor:
    """Euler steps along the velocity, from the image to noise, spaced as the model's scheduler spaces them."""
    positions = torch.linspace(0, 1, target.sampler.steps + 1)
    timesteps = target.denoiser.process.at(positions).to(current.device)
    for timestep, after in pairwise(timesteps):
        current = current + (after - timestep) / 1000 * predict(current, timestep)
    return current


INVERSION = Attack(
    "inversion",
    "Inverted image",
    "Pham et al. 2024",
    "weights, images of the concept",
    BUDGETS,
    run,
    positives=attrgetter("images"),
)
