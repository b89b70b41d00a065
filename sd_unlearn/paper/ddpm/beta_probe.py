"""Estimate beta repeatedly while a DDPM trains, from the network's own activations.

The paper treats beta as known (0.1). Here `prior.py` estimates it from the activations in the middle of the network
that is being trained: as it learns what the images show, positives and normal images become separable, and the
estimate that the risk continues with improves.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sd_unlearn.data.batches import EncodedImages
from sd_unlearn.data.prior import BetaEstimate, ImageEmbeddings, estimate_beta
from sd_unlearn.models.denoiser import Denoiser
from sd_unlearn.training.probe import ProbeResult

TIMESTEPS = (50, 150, 300)  # of 1,000: enough noise to engage the network, little enough to recognise the image
CHUNK = 256


class PriorProbe:
    """A probe that estimates the share of sensitive images among the unlabeled ones and scores nothing.

    images: those of the run, pixels [N, C, side, side] in [-1, 1]. seed: of the noise, the same at every call.
    """

    def __init__(self, denoiser: Denoiser, images: EncodedImages, seed: int) -> None:
        self.denoiser, self.seed = denoiser, seed
        rows = [i for i, example in enumerate(images.examples) if not example.is_negative]
        examples = [images.examples[i] for i in rows]
        self.positive = np.array([example.is_positive for example in examples])
        self.pixels = images.mean[rows]
        self.text = torch.stack([images.text[example.caption] for example in examples])

    def __call__(self) -> ProbeResult:
        estimate = self.estimate()
        metrics = {"beta": estimate.beta, "beta_low": estimate.low, "beta_high": estimate.high}
        return ProbeResult(metrics, -float("inf"), beta=estimate.beta)  # no step is better than another

    def estimate(self) -> BetaEstimate:
        """beta by BBE with its interval (`prior.estimate_beta`)."""
        rows = self.features()
        embedded = ImageEmbeddings("the network's own activations", "", rows[self.positive], rows[~self.positive])
        return estimate_beta(embedded)[0]

    @torch.no_grad()
    def features(self) -> NDArray[np.float32]:
        """[n, D]: the middle block's output, averaged over the image, at each of TIMESTEPS."""
        network = self.denoiser.model
        outputs: list[Tensor] = []
        hook = network.mid_block.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))  # type: ignore[union-attr]
        training = network.training
        try:
            network.eval()
            return np.concatenate([self._at(network, timestep, outputs) for timestep in TIMESTEPS], axis=1)
        finally:
            hook.remove()
            network.train(training)

    def _at(self, network: nn.Module, timestep: int, outputs: list[Tensor]) -> NDArray[np.float32]:
        device, process = self.denoiser.process.device, self.denoiser.process
        noise = torch.randn(self.pixels.shape, generator=torch.Generator().manual_seed(self.seed + timestep))
        parts = []
        for rows in torch.arange(len(self.pixels)).split(CHUNK):
            timesteps = torch.full((len(rows),), timestep, device=device)
            noisy = process.add_noise(self.pixels[rows].to(device), noise[rows].to(device), timesteps)
            self.denoiser.predict(noisy, timesteps, self.text[rows].to(device))
            parts.append(outputs.pop().mean((2, 3)).float().cpu())
            outputs.clear()
        return torch.cat(parts).numpy()
