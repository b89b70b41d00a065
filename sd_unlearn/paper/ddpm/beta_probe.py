"""beta found again and again while a DDPM trains, from what its own network sees in the images.

The paper takes beta as known (0.1). Here `prior.py` estimates it from the activations in the middle of the network
that is being trained: as it learns what the images show, positives and normal images come apart, and the estimate that
the risk goes on with gets better.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sd_unlearn.data.dataset import Example
from sd_unlearn.data.prior import Embedded, Estimate, estimate_beta
from sd_unlearn.models.denoiser import Denoiser
from sd_unlearn.models.diffusion import add_noise
from sd_unlearn.training.probe import Verdict

TIMESTEPS = (50, 150, 300)  # of 1,000: enough noise that the network works, little enough that it sees the image
CHUNK = 256


class PriorProbe:
    """A probe that judges nothing and tells the share of sensitive images among the unlabeled ones.

    examples: of the run; pixels: theirs, [N, C, side, side] in [-1, 1]; seed: of the noise, the same at every call.
    """

    def __init__(
        self, denoiser: Denoiser, examples: Sequence[Example], pixels: Tensor, text: Tensor, seed: int
    ) -> None:
        self.denoiser, self.seed = denoiser, seed
        self.rows = [i for i, example in enumerate(examples) if not example.is_negative]
        self.positive = np.array([examples[i].is_positive for i in self.rows])
        self.pixels, self.text = pixels[self.rows], text[self.rows]

    def __call__(self) -> Verdict:
        found = self.estimate()
        figures = {"beta": found.beta, "beta_low": found.low, "beta_high": found.high}
        return Verdict(figures, -float("inf"), beta=found.beta)  # nothing here says that one step is better

    def estimate(self) -> Estimate:
        """By BBE, with its interval (`prior.estimate_beta`)."""
        rows = self.features()
        seen = Embedded("the network's own activations", "", rows[self.positive], rows[~self.positive])
        return estimate_beta(seen)[0]

    @torch.no_grad()
    def features(self) -> NDArray[np.float32]:
        """[n, D]: the middle block's output, averaged over the picture, at each of TIMESTEPS."""
        network = self.denoiser.model
        seen: list[Tensor] = []
        hook = network.mid_block.register_forward_hook(lambda _module, _inputs, output: seen.append(output))  # type: ignore[union-attr]
        training = network.training
        try:
            network.eval()
            return np.concatenate([self._at(network, timestep, seen) for timestep in TIMESTEPS], axis=1)
        finally:
            hook.remove()
            network.train(training)

    def _at(self, network: nn.Module, timestep: int, seen: list[Tensor]) -> NDArray[np.float32]:
        device = self.denoiser.alphas_cumprod.device
        noise = torch.randn(self.pixels.shape, generator=torch.Generator().manual_seed(self.seed + timestep))
        parts = []
        for rows in torch.arange(len(self.pixels)).split(CHUNK):
            timesteps = torch.full((len(rows),), timestep, device=device)
            noisy = add_noise(
                self.pixels[rows].to(device), noise[rows].to(device), timesteps, self.denoiser.alphas_cumprod
            )
            self.denoiser.predict(noisy, timesteps, self.text[rows].to(device))
            parts.append(seen.pop().mean((2, 3)).float().cpu())
            seen.clear()
        return torch.cat(parts).numpy()
