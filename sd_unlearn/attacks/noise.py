"""Noise probe: is the concept found by sampling with more noise than usual?

Access: the sampler, no weights and no other prompt. Lu et al. 2025, "When Are Concepts Erased From Diffusion Models?"
(arXiv 2505.17013), add noise along the sampling path. Our reading: DDIM with eta 1 whose noise is multiplied by `eta`,
from an initial noise multiplied by the square root of `variance`; an attack on a seed succeeds if any of the
combinations shows the concept.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sd_unlearn.attacks.base import Attack, Outcome, Target, needs_ddim
from sd_unlearn.data.encoding import encode_captions


@dataclass(frozen=True)
class NoiseSettings:
    """Budget of the attack: every eta with every variance for each seed."""

    images: int  # seeds
    etas: tuple[float, ...] = (1.0, 1.17, 1.34, 1.51, 1.68, 1.85)
    variances: tuple[float, ...] = (1.0, 1.02, 1.03, 1.04)
    restarts: int = 1


def run(target: Target, settings: NoiseSettings, restart: int) -> Iterator[Outcome]:
    """Images of the caption for each seed, eta and variance."""
    text = encode_captions(target.base, [target.concept.caption])
    seeds, images, trials = target.seeds(settings.images), list[Image.Image](), list[int]()
    for eta in settings.etas:
        for variance in settings.variances:
            with noisier(target.base.pipeline, eta, variance):
                images += target.generate(text, seeds)
            trials += range(len(seeds))
    yield Outcome(images, len(settings.etas) * len(settings.variances), trials)


@contextmanager
def noisier(pipeline: Any, scale: float, variance: float) -> Iterator[None]:
    """Sample with DDIM at eta 1, its noise multiplied by `scale` and the initial noise by sqrt(variance)."""
    from diffusers import DDIMScheduler
    from diffusers.utils.torch_utils import randn_tensor

    class NoisyDDIM(DDIMScheduler):
        """DDIM with scaled noise, whatever eta the pipeline asks for."""

        def step(
            self,
            model_output: Tensor,
            timestep: int,
            sample: Tensor,
            eta: float = 0.0,
            generator: Any = None,
            return_dict: bool = True,
        ) -> Any:
            """The pipeline passes what is named here."""
            noise = scale * randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
            return super().step(model_output, timestep, sample, eta=1.0, variance_noise=noise, return_dict=return_dict)

    original = pipeline.scheduler
    pipeline.scheduler = NoisyDDIM.from_config(original.config)
    pipeline.scheduler.init_noise_sigma = original.init_noise_sigma * variance**0.5
    try:
        with torch.no_grad():
            yield
    finally:
        pipeline.scheduler = original


NOISE = Attack(
    "noise",
    "More sampling noise",
    "Lu et al. 2025",
    "sampler",
    {"quick": NoiseSettings(10), "standard": NoiseSettings(30), "full": NoiseSettings(100)},
    run,
    unsupported=needs_ddim,
)
