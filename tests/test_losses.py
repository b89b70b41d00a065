"""Per-example losses: the value that decides a bracket's sign, the gradient that is followed, the frozen teacher."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from sd_unlearn import lora
from sd_unlearn.base import Base
from sd_unlearn.batches import PLAIN, Batch
from sd_unlearn.denoiser import Denoiser
from sd_unlearn.diffusion import add_noise, per_example_loss
from sd_unlearn.objectives.losses import base_prediction, example_losses

pytestmark = pytest.mark.usefixtures("one_thread")
MIXED = [PLAIN, 0, 0, PLAIN, 1, 1, PLAIN]


class Step:
    """A step's tensors on the tiny base, its keep rows between those of two brackets, and what the base predicts."""

    def __init__(self, base: Base, learned: bool) -> None:
        count, generator = len(MIXED), torch.Generator().manual_seed(1)
        latents, noise = (torch.randn(count, 4, 8, 8, generator=generator) for _ in range(2))
        text, drawn_from = (torch.randn(count, 24, 16, generator=generator) for _ in range(2))
        timesteps = torch.linspace(50, 950, count).long()
        positive = torch.tensor([i % 2 == 0 for i in range(count)])  # keep rows may show a positive, too
        self.batch = Batch(
            latents, text, drawn_from, positive, torch.tensor(MIXED), 2, timesteps, noise, torch.ones(count)
        )
        self.keep = self.batch.bracket == PLAIN
        self.noisy = add_noise(latents, noise, timesteps, base.pipeline.scheduler.alphas_cumprod)
        with torch.no_grad():
            self.base_says = base.pipeline.unet(self.noisy, timesteps, encoder_hidden_states=drawn_from).sample
        self.model = lora.attach(base.pipeline.unet, 2, 2.0, 0)
        if learned:
            with torch.no_grad():
                for name, parameter in self.model.named_parameters():
                    if "lora_B" in name:
                        parameter.normal_(generator=torch.Generator().manual_seed(2))
        self.denoiser = Denoiser.of(base, self.model)

    def predict(self) -> Tensor:
        return self.denoiser.predict(self.noisy, self.batch.timesteps, self.batch.text)

    def gradients(self, nll: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(nll.sum(), lora.trainable(self.model), retain_graph=True))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_without_a_teacher_it_is_the_noise_prediction_loss(loaded_base: Base, reduction: str) -> None:
    step = Step(loaded_base, learned=True)
    got = example_losses(step.denoiser, step.batch, reduction)  # type: ignore[arg-type]
    assert torch.equal(got, per_example_loss(step.predict(), step.batch.noise, reduction))  # type: ignore[arg-type]


@pytest.mark.parametrize("learned", [True, False])
def test_with_a_teacher_value_and_gradient_are_two_things(loaded_base: Base, learned: bool) -> None:
    step = Step(loaded_base, learned)
    got = example_losses(step.denoiser, step.batch, "sum", step.denoiser)
    noise = per_example_loss(step.predict(), step.batch.noise)
    distance = per_example_loss(step.predict(), step.base_says)
    assert torch.allclose(got[~step.keep], noise[~step.keep])
    assert torch.allclose(got[step.keep], distance[step.keep])
    for ours, theirs in zip(step.gradients(got), step.gradients(distance), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(step.gradients(got), step.gradients(noise), strict=True))


def test_the_teacher_is_the_base_whatever_the_lora_has_learned(loaded_base: Base) -> None:
    step = Step(loaded_base, learned=True)
    trained = {name for name, p in step.model.named_parameters() if p.requires_grad}
    before = step.predict()
    taught = base_prediction(step.denoiser, step.noisy, step.batch)
    assert torch.allclose(taught, step.base_says, atol=1e-5)
    assert not taught.requires_grad
    assert taught.dtype == torch.float32
    assert {name for name, p in step.model.named_parameters() if p.requires_grad} == trained != set()
    assert torch.equal(step.predict(), before)  # the adapter is on again
    with torch.no_grad():
        off = (step.predict() - step.base_says).abs().amax((1, 2, 3))
    assert (off > 1e-3).all()  # and makes a difference


class Gaussian(nn.Module):
    """Predicts (sigma_t + w) x_t; with w off, the exact E[eps | x_t] of data from a standard normal distribution."""

    def __init__(self, alphas_cumprod: Tensor) -> None:
        super().__init__()
        self.weight, self.sigma, self.on = nn.Parameter(torch.tensor(0.1)), (1 - alphas_cumprod).sqrt(), True

    def forward(self, noisy: Tensor, timesteps: Tensor, encoder_hidden_states: Tensor) -> SimpleNamespace:
        factor = self.sigma[timesteps] + self.weight * self.on
        return SimpleNamespace(sample=factor.view(-1, 1, 1, 1) * noisy)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        self.on = False
        yield
        self.on = True


def test_a_teacher_leaves_the_mean_gradient_and_takes_its_variance() -> None:
    """d/dw E|(sigma + w) x_t - eps|^2 = 2 w E[x_t^2] = 2 w per element, at any timestep."""
    schedule, generator = torch.linspace(0.99, 0.01, 100), torch.Generator().manual_seed(0)
    model = Gaussian(schedule)
    denoiser = Denoiser(model, schedule, "epsilon", 100)  # type: ignore[arg-type]
    found: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(2000):
        latents, noise = (torch.randn(4, 1, 2, 2, generator=generator) for _ in range(2))
        timesteps, nothing = torch.randint(0, 100, (4,), generator=generator), torch.zeros(4)
        batch = Batch(latents, nothing, nothing, nothing.bool(), nothing.long(), 1, timesteps, noise, nothing + 1)
        for taught, gradients in found.items():
            loss = example_losses(denoiser, batch, "mean", denoiser if taught else None).mean()
            gradients.append(torch.autograd.grad(loss, model.weight)[0].item())
    taught, plain = (torch.tensor(found[k], dtype=torch.float64) for k in (True, False))
    for gradients in (taught, plain):
        assert (gradients.mean() - 0.2).abs() < 4 * gradients.std() / 2000**0.5
    assert taught.std() < plain.std() / 5
