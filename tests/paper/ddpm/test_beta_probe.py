"""beta is estimated from the activations of the network in training."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sd_unlearn.data.batches import EncodedImages
from sd_unlearn.data.dataset import Example
from sd_unlearn.models.conditioning import NoConditioning
from sd_unlearn.models.denoiser import Denoiser
from sd_unlearn.models.diffusion import Diffusion
from sd_unlearn.paper.ddpm import beta_probe
from sd_unlearn.paper.ddpm.beta_probe import PriorProbe
from sd_unlearn.paper.ddpm.unet import make_network, make_schedule


def examples(unlabeled: int, positive: int, negative: int = 0) -> list[Example]:
    groups = ["generic"] * unlabeled + ["positive"] * positive + ["negative"] * negative
    return [Example(Path(str(i)), "0", group) for i, group in enumerate(groups)]


def probe(model: nn.Module, pixels: Tensor, which: list[Example], seed: int = 0) -> PriorProbe:
    denoiser = Denoiser(model, Diffusion(make_schedule().alphas_cumprod), NoConditioning())
    images = EncodedImages(which, pixels, torch.zeros_like(pixels), {"0": torch.zeros(1, dtype=torch.long)})
    return PriorProbe(denoiser, images, seed)


class Identity(nn.Module):
    """A network whose middle block outputs the image itself."""

    def __init__(self) -> None:
        super().__init__()
        self.mid_block = nn.Identity()

    def forward(self, noisy: Tensor, timesteps: Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(sample=self.mid_block(noisy))


@pytest.mark.parametrize("share", [0.05, 0.2])
def test_separable_images_give_the_true_share(share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = round(400 * share)
    means = torch.tensor([0.0] * (400 - hidden) + [2.0] * hidden + [2.0] * 100)
    pixels = means[:, None, None, None] + 0.1 * torch.randn((500, 3, 4, 4), generator=generator)
    estimate = probe(Identity(), pixels, examples(400, 100)).estimate()
    assert estimate.beta == pytest.approx(share, abs=0.03)
    assert estimate.low <= estimate.beta <= estimate.high
    result = probe(Identity(), pixels, examples(400, 100))()
    assert result.beta == estimate.beta
    assert result.metrics["beta_low"] == estimate.low
    assert not result.score > -float("inf")  # no step becomes the best one


def test_images_known_to_be_normal_are_not_counted() -> None:
    pixels = torch.rand(30, 1, 12, 12)
    torch.manual_seed(0)
    model = make_network("tiny", 12, 1)
    assert probe(model, pixels, examples(15, 10, 5)).features().shape == (25, 3 * 80)


def test_features_do_not_depend_on_the_chunk_size(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = make_network("tiny", 12, 1)
    pixels = torch.rand(20, 1, 12, 12)
    whole = probe(model, pixels, examples(10, 10)).features()
    monkeypatch.setattr(beta_probe, "CHUNK", 7)
    assert np.allclose(probe(model, pixels, examples(10, 10)).features(), whole, atol=1e-4)
    assert not np.allclose(probe(model, pixels, examples(10, 10), seed=1).features(), whole, atol=1e-4)


def test_a_probe_leaves_the_network_unchanged() -> None:
    model = make_network("tiny", 12, 1).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pixels, state = torch.rand(20, 1, 12, 12), torch.get_rng_state()
    probe(model, pixels, examples(10, 10)).features()
    assert model.training
    assert not model.mid_block._forward_hooks
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
