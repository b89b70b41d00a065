"""The per-example losses of a training step, against the noise or, with less variance, against the frozen base."""

from __future__ import annotations

import torch
from torch import Tensor

from sd_unlearn.choices import Reduction
from sd_unlearn.data.batches import PLAIN, Batch
from sd_unlearn.models.denoiser import Denoiser
from sd_unlearn.models.diffusion import add_noise, min_snr_weight, per_example_loss, training_target
from sd_unlearn.objectives.teacher import Teacher


def example_losses(
    denoiser: Denoiser,
    batch: Batch,
    reduction: Reduction = "sum",
    teacher: Teacher | None = None,
    temperature: float = 1.0,
    snr_gamma: float | None = None,
) -> Tensor:
    """l [B] of a batch's examples over the temperature, with the gradient to follow.

    snr_gamma (> 0) weighs each by its timestep (`min_snr_weight`), the value and the gradient alike; None: all by 1.

    Without a teacher: the noise-prediction loss. With one the value stays that loss, which decides the sign of a
    bracket, but the gradient is that of another one. With f the prediction, f* the base's under the caption the image
    was drawn from, f0 the base's under the generic caption, and all of them at x_t:

    unlabeled: |f - f*|^2. Where the base is optimal for its own images, f* = E[eps | x_t], so |f - eps|^2 and
        |f - f*|^2 differ in expectation by a constant: the same mean gradient without the noise's variance.
    positive: push * 2 <f - f0, f0 - f*>, what |f - f*|^2 grows by to first order as f leaves f0. A bracket subtracts
        it, and minus a square has no minimum: what drives f from f* would drive it anywhere. Linearised, the bracket
        is convex (the convex-concave procedure), and least at f = f0 + push beta p_S / p_U (f0 - f*), to first order
        the prediction of p_N = (p_U - beta p_S) / (1 - beta): the concept is left in the one direction that is meant.
    keep images: |f - f*|^2, for a value, too, since zero is what one wants there; f* moved by `Teacher.offset`.
    """
    schedule = denoiser.alphas_cumprod
    noisy = add_noise(batch.latents, batch.noise, batch.timesteps, schedule)
    target = training_target(batch.latents, batch.noise, batch.timesteps, schedule, denoiser.prediction_type)  # type: ignore[arg-type]
    scale = torch.full_like(batch.weight, 1 / temperature)  # [B]
    if snr_gamma is not None:
        scale = scale * min_snr_weight(batch.timesteps, schedule, snr_gamma, denoiser.prediction_type)  # type: ignore[arg-type]
    if teacher is None:
        predicted = denoiser.predict(noisy, batch.timesteps, batch.text)
        return scale * per_example_loss(predicted, target, reduction)
    # Before the prediction: switching the adapter off and on between a forward and its backward pass upsets DDP.
    wanted, away = _teach(teacher, noisy, batch)
    predicted = denoiser.predict(noisy, batch.timesteps, batch.text)
    against_noise = per_example_loss(predicted, target, reduction)
    distance = per_example_loss(predicted, wanted, reduction)
    along = 2 * (predicted.float() * away).flatten(1).sum(1) / (1 if reduction == "sum" else away[0].numel())
    followed = torch.where(_pushed(batch), teacher.push * along, distance)
    value = torch.where(batch.bracket == PLAIN, followed, against_noise).detach()
    return scale * (value + followed - followed.detach())


def _teach(teacher: Teacher, noisy: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """(what to predict, f0 - f* of positives), each as noisy."""
    held, pushed = batch.rows_held(), batch.rows_pushed()
    rows = torch.cat([torch.arange(len(noisy), device=noisy.device), held, pushed])
    texts = [text.expand(len(who), *text.shape) for text, who in ((teacher.empty, held), (teacher.generic, pushed))]
    predicted = teacher.predict(noisy[rows], batch.timesteps[rows], torch.cat([batch.teacher_text, *texts]))
    wanted, unconditional, generic = predicted.split([len(noisy), len(held), len(pushed)])
    wanted, away = wanted.clone(), torch.zeros_like(wanted)
    if len(held):
        wanted[held] += teacher.offset(noisy[held], batch.timesteps[held], unconditional)
    away[pushed] = generic - wanted[pushed]
    return wanted, away


def _pushed(batch: Batch) -> Tensor:
    return batch.is_positive & (batch.bracket != PLAIN)
