"""Completion: does the model complete half an image of the concept?

Access: sampling that starts from an image, as inpainting does. The left half of an image of the concept is given: after
every step, that half of the latent is replaced by the image's own latent at the same noise level (Lugmayr et al. 2022,
RePaint, algorithm 1 without resampling). Lu et al. 2025 (arXiv 2505.17013) probe erased models this way. The given half
may be enough for a detector, so compare with a model that never saw the concept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sd_unlearn.attacks.base import Attack, Outcome, Target
from sd_unlearn.data.encoding import encode_captions
from sd_unlearn.models.base import Base


@dataclass(frozen=True)
class ImageSettings:
    """Budget of an attack that starts from images of the concept."""

    images: int  # of the concept, one attempt each
    restarts: int = 1


BUDGETS = {"quick": ImageSettings(20), "standard": ImageSettings(100), "full": ImageSettings(500)}


def run(target: Target, settings: ImageSettings, restart: int) -> Iterator[Outcome]:
    """Complete half of each of the attacker's images, under the concept's caption."""
    samples = target.positives.first(settings.images)
    generator = target.generator("completion", restart)
    noise = torch.randn(samples.mean.shape, generator=generator)
    text = encode_captions(target.base, [target.concept.caption])
    every_seed = target.seeds(len(samples.mean))

    def complete(numbers: Sequence[int]) -> list[Image.Image]:
        of = slice(numbers[0], numbers[-1] + 1)
        keep_left = _keep_left_half(samples.mean[of], noise[of], target.base)
        return target.generate(text, every_seed[of], callback_on_step_end=keep_left)

    batches = target.base.generating.map(complete, range(len(samples.mean)), target.sampler.batch_size)
    images = [image for batch in batches for image in batch]
    yield Outcome(images, len(images))


def _keep_left_half(known: Tensor, noise: Tensor, base: Base) -> Any:
    """A callback of the pipeline that puts the noised left half of known [B, C, h, w] into the latents."""
    (height, width), process, conditioning = known.shape[2:], base.process(), base.conditioning

    def callback(_pipeline: Any, step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        latents = conditioning.from_pipeline(values["latents"], height, width).clone()
        left, later = known, base.pipeline.scheduler.timesteps[step + 1 :]
        if len(later):  # the latents are now at the level of the next step
            left = process.add_noise(known, noise, later[0].cpu().expand(len(known)))
        latents[..., : width // 2] = left[..., : width // 2].to(latents)
        return {"latents": conditioning.to_pipeline(latents)}

    return callback


COMPLETION = Attack(
    "completion",
    "Half an image given",
    "Lu et al. 2025",
    "sampler, images of the concept",
    BUDGETS,
    run,
    positives=attrgetter("images"),
)
