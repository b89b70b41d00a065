"""Methods of other papers, as baselines on the same images, captions, LoRA and training loop as ours.

Each is a target that the prediction e(x_t, caption) of a row learns. e0 is the frozen base, x_t a noised image:

esd-x, esd-u   x of the concept under its caption c: e0(x,c) - eta (e0(x,c) - e0(x,''))
anchor         generic images x under c: the model's own e(x,a), a the generic caption; under a: the noise
neggrad        x of the concept under c: the noise, but the loss is maximized

Keep images learn the base's prediction in all of them, as with `losses.example_losses`: the papers have no such images
(--no_retain), except for neggrad, whose retained images learn the noise in print (--target noise).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sd_unlearn.choices import Reduction
from sd_unlearn.data.batch import NO_GROUP, Batch
from sd_unlearn.models.denoiser import Denoiser
from sd_unlearn.models.diffusion import per_example_loss
from sd_unlearn.objectives.base import Objective, StepTerms
from sd_unlearn.objectives.losses import noised, timestep_weight
from sd_unlearn.objectives.pu import bounded
from sd_unlearn.objectives.teacher import Teacher
from sd_unlearn.risk import PUTerms

PRIOR_GROUP = 0  # the caption group of anchor's generic images under the generic caption


@dataclass(frozen=True)
class Rows:
    """The rows of a batch, noised."""

    batch: Batch
    noisy: Tensor  # [B, C, h, w]
    noise: Tensor  # as noisy: what the prediction of noise (or v) learns in ordinary training

    def where(self, chosen: Tensor) -> Tensor:
        """[K] long: the numbers of the chosen rows, [B] bool. Waits for the device."""
        return torch.nonzero(chosen)[:, 0]

    def under(self, predict: Callable[[Tensor, Tensor, Tensor], Tensor], rows: Tensor, text: Tensor) -> Tensor:
        """[K, C, h, w]: predictions of rows under one caption [tokens, width], or under one each [K, tokens, width]."""
        own = text.ndim == self.batch.text.ndim
        texts = text if own else text.expand(len(rows), *text.shape)
        return predict(self.noisy[rows], self.batch.timesteps[rows], texts)


Targets = Callable[[Rows, Teacher], Tensor]  # the target of every row, as Rows.noisy, without gradient


def baseline_losses(
    denoiser: Denoiser,
    batch: Batch,
    teacher: Teacher | None,
    targets: Targets,
    reduction: Reduction = "sum",
    snr_gamma: float | None = None,
    maximized: bool = False,
) -> Tensor:
    """l [B] of a batch's examples, differentiable: the squared distance of each prediction to its target.

    teacher: None: keep images learn the noise; only for targets that do not need it. maximized: the loss of positives
    will be maximized, so it is constant from |target|^2 on, the loss of a model that predicts zero and so knows nothing
    of them: without a limit it would grow forever.
    """
    rows = Rows(batch, *noised(denoiser, batch))
    with torch.no_grad():  # before the prediction, see example_losses
        target = targets(rows, teacher) if teacher else rows.noise
    predicted = denoiser.predict(rows.noisy, batch.timesteps, batch.text)
    distance = per_example_loss(predicted, target, reduction)
    if maximized:
        most = per_example_loss(torch.zeros_like(target), target, reduction)
        distance = bounded(distance, torch.where(batch.caption_group == NO_GROUP, torch.inf, most))
    return timestep_weight(denoiser, batch, snr_gamma) * distance


def retained(rows: Rows, teacher: Teacher) -> Tensor:
    """The target of keep images: the base's prediction, moved by `Teacher.offset`. Of other rows: the noise."""
    target, batch = rows.noise.clone().float(), rows.batch
    keep, captioned = rows.where(batch.caption_group == NO_GROUP), batch.captioned_keep_rows()
    target[keep] = rows.under(teacher.predict, keep, batch.text[keep])
    if teacher.has_guidance:
        empty = rows.under(teacher.predict, captioned, teacher.empty)
        target[captioned] += teacher.offset(rows.noisy[captioned], batch.timesteps[captioned], empty)
    return target


def esd(rows: Rows, teacher: Teacher, eta: float) -> Tensor:
    """After Gandikota et al. 2023, "Erasing Concepts from Diffusion Models" (arXiv 2303.07345), equation 7.

    The target under the concept's caption c is e0(x,c) - eta (e0(x,c) - e0(x,'')), guidance away from c; eta > 0. The
    equation starts from e0(x,'') instead, the later code of its authors from e0(x,c): the same target for an eta that
    is larger by 1.
    --objective esd-x trains cross-attention, esd-u the other layers.

    Differences: in print x_t are partly denoised samples of the model in training, at one timestep each, here they are
    noised images that the base generated under c; a LoRA is trained instead of the weights themselves; there are keep
    images; and esd-u is all linear and convolutional layers outside cross-attention, while the paper's code leaves out
    the output layer and the embedding of the timestep.
    """
    target, batch, positive = retained(rows, teacher), rows.batch, rows.batch.positive_rows()
    concept = rows.under(teacher.predict, positive, batch.text[positive])
    empty = rows.under(teacher.predict, positive, teacher.empty)
    target[positive] = concept - eta * (concept - empty)
    return target


def anchor(rows: Rows, teacher: Teacher) -> Tensor:
    """After Kumari et al. 2023, "Ablating Concepts in Text-to-Image Diffusion Models" (arXiv 2303.13516), equation 5
    (model-based), with the paper's regularization.

    On generic images x, the model under the concept's caption c learns what itself predicts under the generic caption
    a, without gradient: |e(x,c) - sg e(x,a)|^2. The same images under a have the ordinary loss |e(x,a) - noise|^2.

    Differences: the paper writes c and a into many different prompts, here there are the concept's captions and one
    generic caption; both terms have the same weight at every timestep; no image is augmented; a LoRA is trained
    instead of the weights themselves; there are keep images.
    """
    target, group = retained(rows, teacher), rows.batch.caption_group
    concept = rows.where((group != NO_GROUP) & (group != PRIOR_GROUP))
    target[concept] = rows.under(teacher.predict_student, concept, teacher.generic)
    return target


@dataclass(frozen=True)
class MeanObjective(Objective):
    """weight * (mean loss of the rows that erase) + mean loss of anchor's generic images + mean loss of keep images.

    The rows that erase are those under the concept's captions. With a negative weight this is neggrad, -lam |e(x,c) -
    noise|^2 + |e(x_r) - noise|^2, after NegGrad+ of Kurmanji et al. 2023 ("Towards Unbounded Machine Unlearning", arXiv
    2302.09880), which unlearns from classifiers with a difference of two losses. Differences: it is applied to noise
    prediction, and `baseline_losses` limits the loss that is maximized.
    """

    kinds: int  # that the rows which erase are averaged over: caption groups times sets of positives
    weight: float = 1.0  # of the rows that erase; negative to maximize their loss
    has_prior: bool = False  # whether PRIOR_GROUP holds anchor's generic images

    @property
    def num_brackets(self) -> int:
        """One, which is always zero."""
        return 1

    def terms(self, nll: Tensor, batch: Batch) -> StepTerms:
        """The means as mean_s (rows that erase), mean_u (anchor's generic images) and keep."""
        weighted, group = batch.weight * nll, batch.caption_group
        keep = group == NO_GROUP
        prior = (group == PRIOR_GROUP) & self.has_prior
        zero = torch.zeros_like(weighted).sum()
        mean_keep, mean_u = (torch.where(chosen, weighted, 0).sum() for chosen in (keep, prior))
        mean_s = torch.where(keep | prior, 0, weighted).sum() / self.kinds
        return StepTerms((PUTerms(zero, zero, mean_u, mean_s, zero, zero),), mean_keep)

    def loss(self, parts: StepTerms, brackets: Tensor | None = None) -> Tensor:
        """weight * mean_s + mean_u + keep."""
        (means,) = parts.terms
        return self.weight * means.mean_s + means.mean_u + parts.keep
