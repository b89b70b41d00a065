"""Per-example losses: their value, their gradient, and the frozen teacher."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from sd_unlearn.config.objective import Weights
from sd_unlearn.data.batch import NO_GROUP, Batch, join
from sd_unlearn.models.base import Base
from sd_unlearn.models.denoiser import Denoiser
from sd_unlearn.models.diffusion import Diffusion, add_noise, min_snr_weight, per_example_loss, training_target
from sd_unlearn.models.student import make_student
from sd_unlearn.objectives.losses import example_losses
from sd_unlearn.objectives.movement import MAX_PULL
from sd_unlearn.objectives.teacher import PredictionBank, Teacher
from sd_unlearn.risk import NORMAL, UNLABELED

pytestmark = pytest.mark.usefixtures("one_thread")
MIXED = [NO_GROUP, 0, 0, NO_GROUP, 1, 1, NO_GROUP]
GUIDANCE, PUSH, WEIGHT = 3.0, 1.7, 2.5


@pytest.fixture(params=["epsilon", "v_prediction"])
def base(request: pytest.FixtureRequest, loaded_base: Base) -> Base:
    """The tiny base as either kind of model."""
    loaded_base.pipeline.scheduler.register_to_config(prediction_type=request.param)
    return loaded_base


class Step:
    """A step on the tiny base, with keep rows among the rows of two caption groups, and the base's predictions."""

    def __init__(self, base: Base, learned: bool) -> None:
        count, generator = len(MIXED), torch.Generator().manual_seed(1)
        latents, noise = (torch.randn(count, 4, 8, 8, generator=generator) for _ in range(2))
        text, teacher_text = (torch.randn(count, 24, 16, generator=generator) for _ in range(2))
        timesteps = torch.linspace(50, 950, count).long()
        positive = torch.tensor([i % 2 == 0 for i in range(count)])  # keep rows may show a positive
        generic, empty = torch.randn(2, 24, 16, generator=generator)
        unconditional = torch.tensor([i == count - 1 for i in range(count)])
        text[-1] = teacher_text[-1] = empty
        self.batch = Batch(
            latents,
            text,
            teacher_text,
            positive.long() - 1,
            torch.tensor(MIXED),
            2,
            timesteps,
            noise,
            unconditional,
            torch.ones(count),
        )
        self.unet = base.pipeline.unet
        self.keep = self.batch.caption_group == NO_GROUP
        self.positive = positive & ~self.keep
        self.noisy = add_noise(latents, noise, timesteps, base.pipeline.scheduler.alphas_cumprod)
        self.base_prediction, self.base_generic, self.base_empty = (
            self.ask(text) for text in (teacher_text, generic.expand(count, -1, -1), empty.expand(count, -1, -1))
        )
        self.empty = empty
        self.student = make_student(base, Weights(rank=2), 0, needs_teacher=True)
        self.model = self.student.model
        if learned:
            with torch.no_grad():
                for name, parameter in self.model.named_parameters():
                    if "lora_B" in name:  # small: a large update multiplies the rounding that differs between CPUs
                        parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(2))
        self.denoiser = Denoiser.of(base, self.model)
        schedule = base.pipeline.scheduler.alphas_cumprod
        self.target = training_target(latents, noise, timesteps, schedule, base.prediction_type)  # type: ignore[arg-type]
        self.teacher = Teacher(self.denoiser, self.student.frozen, generic, empty, GUIDANCE, PUSH, WEIGHT)

    @torch.no_grad()
    def ask(self, text: Tensor) -> Tensor:
        """The prediction of the UNet in its current state."""
        return self.unet(self.noisy, self.batch.timesteps, encoder_hidden_states=text).sample

    def predict(self) -> Tensor:
        return self.denoiser.predict(self.noisy, self.batch.timesteps, self.batch.text)

    def teacher_target(self) -> Tensor:
        """The target of unlabeled and keep rows; with it, guided sampling of keep rows is unchanged."""
        moved = self.ask(self.empty.expand(len(MIXED), -1, -1)) - self.base_empty
        captioned_keep = (self.keep & ~self.batch.unconditional).view(-1, 1, 1, 1)
        return self.base_prediction + captioned_keep * (1 - 1 / GUIDANCE) * moved

    def gradients(self, nll: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(nll.sum(), self.student.trainable(), retain_graph=True))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_without_a_teacher_the_loss_is_the_noise_prediction_loss(base: Base, reduction: str) -> None:
    step = Step(base, learned=True)
    got = example_losses(step.denoiser, step.batch, reduction)  # type: ignore[arg-type]
    assert torch.equal(got, per_example_loss(step.predict(), step.target, reduction))  # type: ignore[arg-type]
    assert torch.equal(step.target, step.batch.noise) == (base.prediction_type == "epsilon")


@pytest.mark.parametrize("has_teacher", [True, False])
def test_min_snr_weighs_the_value_and_the_gradient_of_each_example(base: Base, has_teacher: bool) -> None:
    step = Step(base, learned=True)
    teacher = step.teacher if has_teacher else None
    plain = example_losses(step.denoiser, step.batch, "sum", teacher)
    got = example_losses(step.denoiser, step.batch, "sum", teacher, snr_gamma=0.7)
    schedule = base.pipeline.scheduler.alphas_cumprod
    weight = min_snr_weight(step.batch.timesteps, schedule, 0.7, base.prediction_type)  # type: ignore[arg-type]
    assert weight.unique().numel() > 3
    assert torch.allclose(got, weight * plain)
    for i in range(len(MIXED)):
        close(step.gradients(got[i]), [g * weight[i] for g in step.gradients(plain[i])])


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_with_a_teacher_value_and_gradient_belong_to_different_losses(
    base: Base, learned: bool, reduction: str
) -> None:
    step = Step(base, learned)
    got = example_losses(step.denoiser, step.batch, reduction, step.teacher)  # type: ignore[arg-type]
    noise = per_example_loss(step.predict(), step.target, reduction)  # type: ignore[arg-type]
    distance = per_example_loss(step.predict(), step.teacher_target(), reduction)  # type: ignore[arg-type]
    assert torch.allclose(got[~step.keep], noise[~step.keep])
    assert torch.allclose(got[step.keep], distance[step.keep], atol=1e-6)
    elements = 1 if reduction == "sum" else step.noisy[0].numel()
    away = step.base_generic - step.base_prediction
    along = 2 * ((step.predict() - step.base_generic) * away).sum((1, 2, 3)) / elements
    for mask, followed in ((step.positive, WEIGHT * PUSH * MAX_PULL * along), (~step.positive, distance)):
        close(step.gradients(got[mask]), step.gradients(followed[mask]))
        assert any(
            (a - b).abs().max() > 1e-6
            for a, b in zip(step.gradients(got[mask]), step.gradients(noise[mask]), strict=True)
        )


def close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    scale = max(g.abs().max().item() for g in theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * scale)


def test_the_push_is_the_first_order_of_the_subtracted_loss(loaded_base: Base) -> None:
    """Where the prediction is the base's under the generic caption, both gradients are the same up to the weight."""
    step = Step(loaded_base, learned=False)  # predicts the same as the base
    generic = step.teacher.generic.expand(len(MIXED), -1, -1)
    batch = dataclasses.replace(step.batch, text=generic)
    got = example_losses(step.denoiser, batch, "sum", step.teacher)
    square = per_example_loss(step.denoiser.predict(step.noisy, batch.timesteps, generic), step.base_prediction)
    close(step.gradients(got[step.positive]), step.gradients(WEIGHT * PUSH * MAX_PULL * square[step.positive]))


def test_the_offset_preserves_the_guided_prediction(loaded_base: Base) -> None:
    """If a LoRA predicts the target of keep rows, guided sampling gives the base's images."""
    step = Step(loaded_base, learned=True)
    empty = step.empty.expand(len(MIXED), -1, -1)
    offset = step.teacher.offset(step.noisy, step.batch.timesteps, step.base_empty)
    assert offset.abs().max() > 1e-3
    moved = step.ask(empty)
    guided = moved + GUIDANCE * (step.base_prediction + offset - moved)
    assert torch.allclose(guided, step.base_empty + GUIDANCE * (step.base_prediction - step.base_empty), atol=1e-5)


def test_the_teacher_predicts_the_base_whatever_the_lora_has_learned(loaded_base: Base) -> None:
    step = Step(loaded_base, learned=True)
    trained = {name for name, p in step.model.named_parameters() if p.requires_grad}
    before = step.predict()
    predicted = step.teacher.predict(step.noisy, step.batch.timesteps, step.batch.teacher_text)
    assert torch.allclose(predicted, step.base_prediction, atol=1e-5)
    assert not predicted.requires_grad
    assert predicted.dtype == torch.float32
    assert {name for name, p in step.model.named_parameters() if p.requires_grad} == trained != set()
    assert torch.equal(step.predict(), before)  # the adapter is enabled again
    with torch.no_grad():
        off = (step.predict() - step.base_prediction).abs().amax((1, 2, 3))
    assert (off > 1e-3).all()  # and changes the prediction


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


def test_a_teacher_keeps_the_mean_gradient_and_reduces_its_variance() -> None:
    """d/dw E|(sigma + w) x_t - eps|^2 = 2 w E[x_t^2] = 2 w per element, at any timestep."""
    schedule, generator = torch.linspace(0.99, 0.01, 100), torch.Generator().manual_seed(0)
    model = Gaussian(schedule)
    denoiser = Denoiser(model, Diffusion(schedule))  # type: ignore[arg-type]
    teacher = Teacher(denoiser, model.frozen, torch.zeros(1, 1), torch.zeros(1, 1), 1.0)
    found: dict[bool, list[float]] = {True: [], False: []}
    text = torch.zeros(4, 1, 1)
    for _ in range(2000):
        latents, noise = (torch.randn(4, 1, 2, 2, generator=generator) for _ in range(2))
        timesteps, zeros = torch.randint(0, 100, (4,), generator=generator), torch.zeros(4)
        batch = Batch(
            latents,
            text,
            text,
            zeros.long() - 1,
            zeros.long(),
            1,
            timesteps,
            noise,
            zeros.bool(),
            zeros + 1,
        )
        for has_teacher, gradients in found.items():
            loss = example_losses(denoiser, batch, "mean", teacher if has_teacher else None).mean()
            gradients.append(torch.autograd.grad(loss, model.weight)[0].item())
    with_teacher, plain = (torch.tensor(found[k], dtype=torch.float64) for k in (True, False))
    for gradients in (with_teacher, plain):
        assert (gradients.mean() - 0.2).abs() < 4 * gradients.std() / 2000**0.5
    assert with_teacher.std() < plain.std() / 5


def test_normal_images_have_the_loss_of_unlabeled_ones(loaded_base: Base) -> None:
    step = Step(loaded_base, learned=True)
    unlabeled = dataclasses.replace(step.batch, label=torch.full_like(step.batch.label, UNLABELED))
    normal = dataclasses.replace(step.batch, label=torch.full_like(step.batch.label, NORMAL))
    ours, theirs = (example_losses(step.denoiser, batch, "sum", step.teacher) for batch in (normal, unlabeled))
    assert torch.equal(ours, theirs)
    close(step.gradients(ours), step.gradients(theirs))
    distance = per_example_loss(step.predict(), step.teacher_target())
    close(step.gradients(ours[~step.keep]), step.gradients(distance[~step.keep]))


def test_every_set_of_positives_is_pushed(loaded_base: Base) -> None:
    step = Step(loaded_base, learned=True)
    other = dataclasses.replace(step.batch, label=torch.where(step.batch.is_positive, 3, UNLABELED))
    ours, theirs = (example_losses(step.denoiser, batch, "sum", step.teacher) for batch in (other, step.batch))
    close(step.gradients(ours), step.gradients(theirs))


def test_stored_predictions_give_the_same_loss_and_gradient_without_asking_the_base(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Step(base, learned=True)
    count, stored = len(MIXED), torch.arange(len(MIXED)) + 3
    banked = dataclasses.replace(step.teacher, bank=PredictionBank(), offsets=PredictionBank())
    expected = example_losses(step.denoiser, step.batch, "sum", step.teacher)
    first = example_losses(
        step.denoiser, dataclasses.replace(step.batch, bank_rows=stored, bank_size=count + 5), "sum", banked
    )
    monkeypatch.setattr(Teacher, "predict_student", lambda *_: pytest.fail("the student predicts again"))
    resumed = dataclasses.replace(step.batch, bank_rows=stored, bank_size=count + 5, visit=1)
    assert torch.equal(example_losses(step.denoiser, resumed, "sum", banked), expected)
    monkeypatch.setattr(Teacher, "predict", lambda *_: pytest.fail("the base predicts again"))
    again = dataclasses.replace(step.batch, bank_rows=stored, bank_size=count + 5, is_repeated=True)
    parts = [example_losses(step.denoiser, part, "sum", banked) for part in again.cut(3)]
    assert torch.equal(first, expected)
    assert torch.allclose(join(parts), expected)
    close(step.gradients(join(parts)), step.gradients(expected))
