"""Per-example losses: the value that decides a bracket's sign, the gradient that is followed, the frozen teacher."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from sd_unlearn.config.train import Weights
from sd_unlearn.data.batch import NO_GROUP, Batch
from sd_unlearn.models.base import Base
from sd_unlearn.models.denoiser import Denoiser
from sd_unlearn.models.diffusion import add_noise, min_snr_weight, per_example_loss, training_target
from sd_unlearn.models.student import make_student
from sd_unlearn.objectives.losses import example_losses
from sd_unlearn.objectives.teacher import Teacher
from sd_unlearn.risk import NORMAL, UNLABELED

pytestmark = pytest.mark.usefixtures("one_thread")
MIXED = [NO_GROUP, 0, 0, NO_GROUP, 1, 1, NO_GROUP]
GUIDANCE, PUSH = 3.0, 2.5


@pytest.fixture(params=["epsilon", "v_prediction"])
def base(request: pytest.FixtureRequest, loaded_base: Base) -> Base:
    """The tiny base as either kind of model: random weights predict one as well as the other."""
    loaded_base.pipeline.scheduler.register_to_config(prediction_type=request.param)
    return loaded_base


class Step:
    """A step's tensors on the tiny base, its keep rows between those of two brackets, and what the base predicts."""

    def __init__(self, base: Base, learned: bool) -> None:
        count, generator = len(MIXED), torch.Generator().manual_seed(1)
        latents, noise = (torch.randn(count, 4, 8, 8, generator=generator) for _ in range(2))
        text, drawn_from = (torch.randn(count, 24, 16, generator=generator) for _ in range(2))
        timesteps = torch.linspace(50, 950, count).long()
        positive = torch.tensor([i % 2 == 0 for i in range(count)])  # keep rows may show a positive, too
        generic, empty = torch.randn(2, 24, 16, generator=generator)
        unconditional = torch.tensor([i == count - 1 for i in range(count)])
        text[-1] = drawn_from[-1] = empty
        self.batch = Batch(
            latents,
            text,
            drawn_from,
            positive.long() - 1,
            torch.tensor(MIXED),
            2,
            timesteps,
            noise,
            unconditional,
            torch.ones(count),
        )
        self.unet = base.pipeline.unet
        self.keep, self.pushed = self.batch.caption_group == NO_GROUP, positive & (self.batch.caption_group != NO_GROUP)
        self.noisy = add_noise(latents, noise, timesteps, base.pipeline.scheduler.alphas_cumprod)
        self.base_says, self.base_generic, self.base_empty = (
            self.ask(text) for text in (drawn_from, generic.expand(count, -1, -1), empty.expand(count, -1, -1))
        )
        self.empty = empty
        self.student = make_student(base, Weights(rank=2), 0, needs_teacher=True)
        self.model = self.student.model
        if learned:
            with torch.no_grad():
                for name, parameter in self.model.named_parameters():
                    if "lora_B" in name:
                        parameter.normal_(generator=torch.Generator().manual_seed(2))
        self.denoiser = Denoiser.of(base, self.model)
        schedule = base.pipeline.scheduler.alphas_cumprod
        self.target = training_target(latents, noise, timesteps, schedule, base.prediction_type)  # type: ignore[arg-type]
        self.teacher = Teacher(self.denoiser, self.student.frozen, generic, empty, GUIDANCE, PUSH)

    @torch.no_grad()
    def ask(self, text: Tensor) -> Tensor:
        """What the UNet says as it is now."""
        return self.unet(self.noisy, self.batch.timesteps, encoder_hidden_states=text).sample

    def predict(self) -> Tensor:
        return self.denoiser.predict(self.noisy, self.batch.timesteps, self.batch.text)

    def wanted(self) -> Tensor:
        """What unlabeled and keep rows are drawn to: guided by it, a keep row's picture is the base's own."""
        moved = self.ask(self.empty.expand(len(MIXED), -1, -1)) - self.base_empty
        guided_rows = (self.keep & ~self.batch.unconditional).view(-1, 1, 1, 1)
        return self.base_says + guided_rows * (1 - 1 / GUIDANCE) * moved

    def gradients(self, nll: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(nll.sum(), self.student.trainable(), retain_graph=True))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_without_a_teacher_it_is_the_noise_prediction_loss(base: Base, reduction: str) -> None:
    step = Step(base, learned=True)
    got = example_losses(step.denoiser, step.batch, reduction)  # type: ignore[arg-type]
    assert torch.equal(got, per_example_loss(step.predict(), step.target, reduction))  # type: ignore[arg-type]
    assert torch.equal(step.target, step.batch.noise) == (base.prediction_type == "epsilon")


@pytest.mark.parametrize("taught", [True, False])
def test_min_snr_weighs_the_value_and_the_gradient_of_each_example(base: Base, taught: bool) -> None:
    step = Step(base, learned=True)
    teacher = step.teacher if taught else None
    plain = example_losses(step.denoiser, step.batch, "sum", teacher)
    got = example_losses(step.denoiser, step.batch, "sum", teacher, temperature=2.0, snr_gamma=0.7)
    schedule = base.pipeline.scheduler.alphas_cumprod
    weight = min_snr_weight(step.batch.timesteps, schedule, 0.7, base.prediction_type)  # type: ignore[arg-type]
    assert weight.unique().numel() > 3
    assert torch.allclose(got, weight * plain / 2)
    for i in range(len(MIXED)):
        close(step.gradients(got[i]), [g * weight[i] / 2 for g in step.gradients(plain[i])])


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_with_a_teacher_value_and_gradient_are_two_things(base: Base, learned: bool, reduction: str) -> None:
    step = Step(base, learned)
    got = example_losses(step.denoiser, step.batch, reduction, step.teacher)  # type: ignore[arg-type]
    noise = per_example_loss(step.predict(), step.target, reduction)  # type: ignore[arg-type]
    distance = per_example_loss(step.predict(), step.wanted(), reduction)  # type: ignore[arg-type]
    assert torch.allclose(got[~step.keep], noise[~step.keep])
    assert torch.allclose(got[step.keep], distance[step.keep], atol=1e-6)
    elements = 1 if reduction == "sum" else step.noisy[0].numel()
    along = 2 * ((step.predict() - step.base_generic) * (step.base_generic - step.base_says)).sum((1, 2, 3)) / elements
    for mask, followed in ((step.pushed, PUSH * along), (~step.pushed, distance)):
        close(step.gradients(got[mask]), step.gradients(followed[mask]))
        assert any(
            (a - b).abs().max() > 1e-6
            for a, b in zip(step.gradients(got[mask]), step.gradients(noise[mask]), strict=True)
        )


def close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    scale = max(g.abs().max().item() for g in theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * scale)


def test_the_push_is_the_first_order_of_what_a_bracket_subtracts(loaded_base: Base) -> None:
    """Where the prediction is the base's under the generic caption, both have the same gradient, push aside."""
    step = Step(loaded_base, learned=False)  # predicts as the base does
    generic = step.teacher.generic.expand(len(MIXED), -1, -1)
    batch = dataclasses.replace(step.batch, text=generic)
    got = example_losses(step.denoiser, batch, "sum", step.teacher)
    square = per_example_loss(step.denoiser.predict(step.noisy, batch.timesteps, generic), step.base_says)
    close(step.gradients(got[step.pushed]), step.gradients(PUSH * square[step.pushed]))


def test_what_is_held_is_the_guided_prediction(loaded_base: Base) -> None:
    """A LoRA that predicts what keep rows are drawn to draws, with guidance, what the base draws."""
    step = Step(loaded_base, learned=True)
    empty = step.empty.expand(len(MIXED), -1, -1)
    offset = step.teacher.offset(step.noisy, step.batch.timesteps, step.base_empty)
    assert offset.abs().max() > 1e-3
    moved = step.ask(empty)
    guided = moved + GUIDANCE * (step.base_says + offset - moved)
    assert torch.allclose(guided, step.base_empty + GUIDANCE * (step.base_says - step.base_empty), atol=1e-5)


def test_the_teacher_is_the_base_whatever_the_lora_has_learned(loaded_base: Base) -> None:
    step = Step(loaded_base, learned=True)
    trained = {name for name, p in step.model.named_parameters() if p.requires_grad}
    before = step.predict()
    taught = step.teacher.predict(step.noisy, step.batch.timesteps, step.batch.teacher_text)
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
    def frozen(self) -> Iterator[nn.Module]:
        self.on = False
        yield self
        self.on = True


def test_a_teacher_leaves_the_mean_gradient_and_takes_its_variance() -> None:
    """d/dw E|(sigma + w) x_t - eps|^2 = 2 w E[x_t^2] = 2 w per element, at any timestep."""
    schedule, generator = torch.linspace(0.99, 0.01, 100), torch.Generator().manual_seed(0)
    model = Gaussian(schedule)
    denoiser = Denoiser(model, schedule, "epsilon", 100)  # type: ignore[arg-type]
    teacher = Teacher(denoiser, model.frozen, torch.zeros(1, 1), torch.zeros(1, 1), 1.0)
    found: dict[bool, list[float]] = {True: [], False: []}
    text = torch.zeros(4, 1, 1)
    for _ in range(2000):
        latents, noise = (torch.randn(4, 1, 2, 2, generator=generator) for _ in range(2))
        timesteps, nothing = torch.randint(0, 100, (4,), generator=generator), torch.zeros(4)
        batch = Batch(
            latents,
            text,
            text,
            nothing.long() - 1,
            nothing.long(),
            1,
            timesteps,
            noise,
            nothing.bool(),
            nothing + 1,
        )
        for taught, gradients in found.items():
            loss = example_losses(denoiser, batch, "mean", teacher if taught else None).mean()
            gradients.append(torch.autograd.grad(loss, model.weight)[0].item())
    taught, plain = (torch.tensor(found[k], dtype=torch.float64) for k in (True, False))
    for gradients in (taught, plain):
        assert (gradients.mean() - 0.2).abs() < 4 * gradients.std() / 2000**0.5
    assert taught.std() < plain.std() / 5


def test_images_known_to_be_normal_are_followed_like_unlabeled_ones(loaded_base: Base) -> None:
    step = Step(loaded_base, learned=True)
    unlabeled = dataclasses.replace(step.batch, label=torch.full_like(step.batch.label, UNLABELED))
    normal = dataclasses.replace(step.batch, label=torch.full_like(step.batch.label, NORMAL))
    ours, theirs = (example_losses(step.denoiser, batch, "sum", step.teacher) for batch in (normal, unlabeled))
    assert torch.equal(ours, theirs)
    close(step.gradients(ours), step.gradients(theirs))
    distance = per_example_loss(step.predict(), step.wanted())
    close(step.gradients(ours[~step.keep]), step.gradients(distance[~step.keep]))


def test_every_set_of_positives_is_pushed(loaded_base: Base) -> None:
    step = Step(loaded_base, learned=True)
    other = dataclasses.replace(step.batch, label=torch.where(step.batch.is_positive, 3, UNLABELED))
    ours, theirs = (example_losses(step.denoiser, batch, "sum", step.teacher) for batch in (other, step.batch))
    close(step.gradients(ours), step.gradients(theirs))
