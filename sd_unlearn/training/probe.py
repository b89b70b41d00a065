"""A run judged while it trains: is the concept gone by now, and is the rest still there?

Two rules, by --probe. `ratio` needs no judge: the mean loss of held-out positives over that of held-out unlabeled
images (mean_S / mean_U), over the same in the base; the more, the further the concept is from what the network knows.
`leakage` draws 60 pictures of the concept and 60 of what must stay from fixed seeds and lets the judge of `evaluate`
read them; the best is where retention - leakage is largest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor, nn

from sd_unlearn.config.train import TrainConfig
from sd_unlearn.data.concept import Concept, Prompt
from sd_unlearn.data.dataset import Example, members_of_sets
from sd_unlearn.errors import UsageError
from sd_unlearn.metrics.labels import Judge
from sd_unlearn.metrics.registry import labels_of
from sd_unlearn.models.denoiser import Denoiser
from sd_unlearn.models.diffusion import add_noise, per_example_loss, sample_timesteps, training_target
from sd_unlearn.models.student import Student
from sd_unlearn.seeds import TRAIN_SEEDS, image_seed
from sd_unlearn.training.previews import Painter

NUM_IMAGES = 60
LEAKAGE_LIMIT, RETENTION_LIMIT = 0.02, 0.98


@dataclass(frozen=True)
class Verdict:
    """Figures to log, a score of which more is better, and whether the concept counts as forgotten."""

    figures: dict[str, float]
    score: float
    forgotten: bool = False
    beta: float | None = None  # to go on with, where the probe estimates it


class Probe(Protocol):
    def __call__(self) -> Verdict: ...


class RatioProbe:
    """mean_S / mean_U of held-out images under both captions, noise and timesteps fixed, over the base's own."""

    def __init__(
        self, denoiser: Denoiser, student: Student, latents: Tensor, text: Tensor, is_positive: Tensor, seed: int
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        device = denoiser.alphas_cumprod.device
        timesteps = sample_timesteps(len(latents), denoiser.num_train_timesteps, generator)
        noise = torch.randn(latents.shape, generator=generator)
        self.latents, self.text, self.noise = latents.to(device), text.to(device), noise.to(device)
        self.timesteps, self.is_positive = timesteps.to(device), is_positive.to(device)
        self.denoiser, self.student = denoiser, student
        with student.frozen() as frozen:
            self.at_start = self._ratio(frozen)

    @torch.no_grad()
    def _ratio(self, model: nn.Module) -> float:
        denoiser = replace(self.denoiser, model=model)
        losses, network = [], self.student.model
        training = network.training
        network.eval()  # no dropout
        for rows in torch.arange(len(self.latents), device=self.latents.device).split(8):
            x0, noise, t = self.latents[rows], self.noise[rows], self.timesteps[rows]
            target = training_target(x0, noise, t, denoiser.alphas_cumprod, denoiser.prediction_type)  # type: ignore[arg-type]
            predicted = denoiser.predict(add_noise(x0, noise, t, denoiser.alphas_cumprod), t, self.text[rows])
            losses.append(per_example_loss(predicted, target))
        network.train(training)
        found = torch.cat(losses)
        return float(found[self.is_positive].mean() / found[~self.is_positive].mean())

    def __call__(self) -> Verdict:
        ratio = self._ratio(self.student.model) / self.at_start
        return Verdict({"probe_ratio": ratio}, ratio)


class LeakageProbe:
    """What a judge reads in pictures of fixed seeds, of the concept and of what must stay.

    Raises:
        UsageError: the judge cannot read the concept, or none of the keep prompts.
    """

    def __init__(self, painter: Painter, judge: Judge, concept: Concept, seed: int) -> None:
        self.painter, self.judge, self.label = painter, judge, concept.label or concept.name
        readable = readable_prompts(concept, judge.labels)
        self.kept = [readable[i % len(readable)] for i in range(NUM_IMAGES)]
        self.cells = [*_cells([Prompt(concept.caption)] * NUM_IMAGES, seed), *_cells(self.kept, seed)]

    def __call__(self) -> Verdict:
        texts, seeds = zip(*self.cells, strict=True)
        reading = self.judge.read(self.painter.draw(texts, seeds))
        leakage = float(reading.shows(self.label)[:NUM_IMAGES].mean())
        right = [
            all(bool(reading.shows(word)[NUM_IMAGES + i]) for word in prompt.expect)
            for i, prompt in enumerate(self.kept)
        ]
        retention = sum(right) / len(right)
        forgotten = leakage <= LEAKAGE_LIMIT and retention >= RETENTION_LIMIT
        return Verdict({"probe_leakage": leakage, "probe_retention": retention}, retention - leakage, forgotten)


def check_probe(config: TrainConfig, concept: Concept, groups: Sequence[str]) -> None:
    """Refuse probes that could not be taken, before anything is rendered or loaded. groups: of each image.

    Raises:
        UsageError: too few images to hold some out; keep prompts that the judge cannot read; no judge.
    """
    if not config.probe_steps:
        return
    if config.probe == "ratio":
        _check_spare(groups.count("positive"), groups.count("generic") + groups.count("mixed_in"))
        return
    readable_prompts(concept, labels_of(concept))
    if concept.kind not in ("digit", "ink") and not find_spec("open_clip"):
        raise UsageError("--probe leakage needs open_clip: pip install 'sd-unlearn[clip]', or take --probe ratio.")


def readable_prompts(concept: Concept, labels: Sequence[str]) -> list[Prompt]:
    """The keep prompts that a judge of these labels can read.

    Raises:
        UsageError: there is none.
    """
    label = concept.label or concept.name
    readable = [p for p in concept.keep_prompts if p.expect and {*p.expect, label} <= set(labels)]
    if not readable:
        raise UsageError(
            f"--probe leakage: the judge of {concept.name!r} can read none of its keep prompts. Use --probe ratio, or "
            f"name in the keep prompts' braces what the judge knows: {', '.join(labels)}."
        )
    return readable


def probe_prompts(concept: Concept) -> list[str]:
    """The captions a LeakageProbe may draw."""
    return [concept.caption, *(p.text for p in concept.keep_prompts)]


def _cells(prompts: Sequence[Prompt], seed: int) -> list[tuple[str, int]]:
    """(prompt, seed) of each picture; apart from those of the previews, which take the first of each prompt."""
    return [(p.text, image_seed(TRAIN_SEEDS, seed, p.text, 1000 + i)) for i, p in enumerate(prompts)]


def hold_out(examples: Sequence[Example], seed: int) -> tuple[list[int], list[int]]:
    """Indices (to train on, held out): a tenth of each set of positives and of the generic images, 2 to 64 of each.

    Raises:
        UsageError: too few images to spare any.
    """
    generator = torch.Generator().manual_seed(seed)
    held: list[int] = []
    for members in (
        *members_of_sets(examples).values(),
        [i for i, e in enumerate(examples) if e.group in ("generic", "mixed_in")],
    ):
        _check_spare(len(members))
        count = min(64, max(2, len(members) // 10))
        held += [members[i] for i in torch.randperm(len(members), generator=generator)[:count].tolist()]
    chosen = set(held)
    return [i for i in range(len(examples)) if i not in chosen], sorted(held)


def _check_spare(*counts: int) -> None:
    if min(counts) < 4:
        raise UsageError(f"--probe ratio holds out images of every folder, and one has {min(counts)}; give 4.")
