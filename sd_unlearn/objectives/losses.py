"""The per-example losses of a training step, measured against the noise or, with less variance, the frozen base."""

from __future__ import annotations

import torch
from torch import Tensor

from sd_unlearn.choices import Reduction
from sd_unlearn.data.batch import NO_GROUP, Batch
from sd_unlearn.models.denoiser import Denoiser
from sd_unlearn.models.diffusion import per_example_loss
from sd_unlearn.objectives.teacher import Teacher


def example_losses(
    denoiser: Denoiser,
    batch: Batch,
    reduction: Reduction = "sum",
    teacher: Teacher | None = None,
    snr_gamma: float | None = None,
) -> Tensor:
    """l [B] of a batch's examples, differentiable. Each depends on its own image only, so a batch can be cut.

    snr_gamma (> 0) weighs each example by its timestep (`Process.snr_weight`), value and gradient. None: no weighting.

    Without a teacher, l is the noise-prediction loss. With a teacher the value of l is still that loss, which
    determines the sign of a bracket, but the gradient is that of another loss. Let f be the prediction, f* the base's
    under the caption the image was generated from, and f0 the base's under the generic caption, all at x_t:

    unlabeled: |f - f*|^2. Where the base is optimal for its own images, f* = E[eps | x_t], so |f - eps|^2 and
        |f - f*|^2 differ in expectation by a constant: the same mean gradient without the variance of the noise.
    positive: g 2 <f - f0, f0 - f*>, g times the first-order growth of |f - f*|^2 as f leaves f0. A bracket subtracts
        this loss, and a negated square has no minimum: it would drive f away from f* in any direction. Linearised, the
        bracket is convex (the convex-concave procedure), with its minimum at f = f0 + g beta p_S / p_U (f0 - f*), to
        first order the prediction of p_N = (p_U - beta p_S) / (1 - beta). So f moves in the intended direction only.
        g follows from how far positives have moved and how far they should (`Movement.pull`), and contains 1 / beta.
    keep images: |f - f*|^2, also as the value, since its optimum is zero. f* is shifted by `Teacher.offset`.
    """
    noisy, target = noised(denoiser, batch)
    scale = timestep_weight(denoiser, batch, snr_gamma)
    if teacher is None:
        predicted = denoiser.predict(noisy, batch.timesteps, batch.text)
        return scale * per_example_loss(predicted, target, reduction)
    # Before the prediction: DDP fails if the adapter is switched between a forward and its backward pass.
    teacher_target, reference = _teach(teacher, noisy, batch)
    predicted = denoiser.predict(noisy, batch.timesteps, batch.text)
    teacher.movement.add(predicted - teacher_target, reference, batch, teacher.generic)
    against_noise = per_example_loss(predicted, target, reduction)
    distance = per_example_loss(predicted, teacher_target, reduction)
    along = 2 * (predicted.float() * reference).flatten(1).sum(1) / (1 if reduction == "sum" else reference[0].numel())
    is_keep = batch.caption_group == NO_GROUP
    pull = teacher.weight * teacher.movement.pull(teacher.push)
    followed = torch.where(batch.is_positive & ~is_keep, pull * along, distance)
    value = torch.where(is_keep, followed, against_noise).detach()
    return scale * (value + followed - followed.detach())


def noised(denoiser: Denoiser, batch: Batch) -> tuple[Tensor, Tensor]:
    """(x_t, what ordinary training predicts from it: the noise, v, or the velocity), each shaped as the latents."""
    given, process = (batch.latents, batch.noise, batch.timesteps), denoiser.process
    return process.add_noise(*given), process.target(*given)


def timestep_weight(denoiser: Denoiser, batch: Batch, snr_gamma: float | None) -> Tensor:
    """[B]: the weight of each example by its timestep (`Process.snr_weight`); 1 without snr_gamma."""
    if snr_gamma is None:
        return torch.ones_like(batch.weight)
    return denoiser.process.snr_weight(batch.timesteps, snr_gamma)


def _teach(teacher: Teacher, noisy: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """(the target of each row, and what `Movement` compares with: f0 - f* of positives, f* less the prediction under
    the empty caption of keep images with a caption, 0 elsewhere), each shaped as noisy."""
    keep, positive = batch.captioned_keep_rows(), batch.positive_rows()
    target, other = _base_predictions(teacher, noisy, batch, keep, positive)
    reference = torch.zeros_like(target)
    reference[positive] = other[positive] - target[positive]
    if len(keep):
        reference[keep] = target[keep] - other[keep]
        if teacher.has_guidance:
            target[keep] += _offset(teacher, noisy, batch, keep, other[keep])
    return target, reference


def _offset(teacher: Teacher, noisy: Tensor, batch: Batch, keep: Tensor, unconditional: Tensor) -> Tensor:
    """`Teacher.offset` of the rows `keep`. Of rows seen before it is that of the first time: the student's prediction
    under the empty caption hardly changes until the last, and does not have to be computed again.
    """
    rows = None if batch.bank_rows is None else batch.bank_rows[keep]
    if teacher.offsets and rows is not None and (batch.is_repeated or batch.visit):
        return teacher.offsets.read(rows)[0]
    offset = teacher.offset(noisy[keep], batch.timesteps[keep], unconditional)
    if teacher.offsets and rows is not None:
        teacher.offsets.write(rows, batch.bank_size, offset)
    return offset


def _base_predictions(
    teacher: Teacher, noisy: Tensor, batch: Batch, keep: Tensor, positive: Tensor
) -> tuple[Tensor, Tensor]:
    """The base's predictions, each shaped as noisy: under the caption each image was generated from; and of positives
    under the generic caption, of keep images with a caption under the empty one, of others zero."""
    if teacher.bank and batch.is_repeated and batch.bank_rows is not None:
        target, other = teacher.bank.read(batch.bank_rows)
        return target, other
    rows = torch.cat([torch.arange(len(noisy), device=noisy.device), keep, positive])
    texts = [text.expand(len(who), *text.shape) for text, who in ((teacher.empty, keep), (teacher.generic, positive))]
    predicted = teacher.predict(noisy[rows], batch.timesteps[rows], torch.cat([batch.teacher_text, *texts]))
    target, more = predicted.split([len(noisy), len(keep) + len(positive)])
    other = torch.zeros_like(target)
    other[rows[len(noisy) :]] = more
    if teacher.bank and batch.bank_rows is not None:
        teacher.bank.write(batch.bank_rows, batch.bank_size, target, other)
    return target.clone(), other
