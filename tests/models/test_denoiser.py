"""One predict over every kind of network: of classes and of nothing here, of captions in test_kinds.py."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor

from sd_unlearn.data.batch import Batch
from sd_unlearn.models.conditioning import ClassConditioning, NoConditioning
from sd_unlearn.models.denoiser import Denoiser
from sd_unlearn.models.diffusion import Diffusion
from sd_unlearn.objectives.losses import example_losses
from sd_unlearn.risk import UNLABELED

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE = (3, 1, 16, 16)  # pixels, one channel
TIMESTEPS = torch.tensor([5, 50, 900])


def network(classes: int | None) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=16,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(4, 8),
        norm_num_groups=2,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        num_class_embeds=classes,
    )


def denoiser(classes: int | None) -> Denoiser:
    conditioning = ClassConditioning() if classes else NoConditioning()
    return Denoiser(network(classes), Diffusion(DDPMScheduler().alphas_cumprod), conditioning)


def seen(text: Tensor) -> Batch:
    generator = torch.Generator().manual_seed(1)
    images, noise = (torch.randn(SHAPE, generator=generator) for _ in range(2))
    label, bracket = torch.tensor([UNLABELED, 0, 0]), torch.zeros(3).long()
    return Batch(
        images, text, text, label, bracket, 1, TIMESTEPS, noise, torch.zeros(3).bool(), torch.tensor([1, 0.5, 0.5])
    )


def test_an_unconditional_model_gets_no_caption() -> None:
    one, noisy = denoiser(None), torch.randn(SHAPE)
    found = one.predict(noisy, TIMESTEPS, torch.tensor([[1.0], [2.0], [3.0]]))
    assert found.shape == noisy.shape
    assert torch.equal(found, one.predict(noisy, TIMESTEPS, torch.zeros(3, 7)))
    assert torch.equal(found, one.model(noisy, TIMESTEPS).sample)


def test_a_class_conditional_model_gets_the_class() -> None:
    one, noisy = denoiser(10), torch.randn(SHAPE)
    found = one.predict(noisy, TIMESTEPS, torch.tensor([[7.0], [0.0], [9.0]]))
    assert torch.equal(found, one.model(noisy, TIMESTEPS, class_labels=torch.tensor([7, 0, 9])).sample)
    assert not torch.equal(found, one.predict(noisy, TIMESTEPS, torch.tensor([[6.0], [0.0], [9.0]])))


@pytest.mark.parametrize("classes", [None, 10])
def test_its_losses_have_gradients(classes: int | None) -> None:
    one = denoiser(classes)
    losses = example_losses(one, seen(torch.tensor([[0.0], [1.0], [1.0]])), "mean")
    assert losses.shape == (3,)
    losses.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in one.model.parameters())
