"""Probes: measure every N steps whether the concept is forgotten and the rest retained.

--probe ratio needs no classifier: the mean loss of held-out positives over that of held-out unlabeled images
(mean_S / mean_U), divided by the same ratio of the base. Higher means that the network knows less of the concept.

--probe leakage generates 60 images of the concept (at least one of each of several) and as many of keep prompts from
fixed seeds, and classifies them as `evaluate` does. If the classifier rejects invalid images, it also measures what is
generated instead of the concept: the share of clean images of something else, over the share of clean images of the
keep prompts (at most 1). The best probe is the one with the largest sum of retention, clean replacement and -leakage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from sd_unlearn.data.concept import Concept, Prompt
from sd_unlearn.data.dataset import Example, members_of_sets
from sd_unlearn.metrics.labels import CLEAN, LabelClassifier, LabelPredictions
from sd_unlearn.models.denoiser import Denoiser
from sd_unlearn.models.diffusion import per_example_loss, sample_positions
from sd_unlearn.models.halving import HalvingBatches
from sd_unlearn.models.student import Student
from sd_unlearn.seeds import TRAIN_SEEDS, image_seed
from sd_unlearn.training.previews import ImageGenerator
from sd_unlearn.training.probe_checks import check_enough, classifiable_prompts

NUM_IMAGES = 60
LEAKAGE_LIMIT, RETENTION_LIMIT, CLEAN_LIMIT = 0.02, 0.98, 0.8
FIRST_SEED_INDEX = 1000  # previews use the first seeds of each prompt
ROWS_AT_ONCE = 8  # of --probe ratio


@dataclass(frozen=True)
class ProbeResult:
    """Metrics to log, a score (higher is better), and whether the concept counts as forgotten."""

    metrics: dict[str, float]
    score: float
    forgotten: bool = False
    beta: float | None = None  # the beta to continue with, if the probe estimates it


class Probe(Protocol):
    def __call__(self) -> ProbeResult: ...


class RatioProbe:
    """mean_S / mean_U of held-out images under both captions, with fixed noise and timesteps, over the base's."""

    def __init__(
        self, denoiser: Denoiser, student: Student, latents: Tensor, text: Tensor, is_positive: Tensor, seed: int
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        device = denoiser.process.device
        timesteps = denoiser.process.at(sample_positions(len(latents), generator))
        noise = torch.randn(latents.shape, generator=generator)
        self.latents, self.text, self.noise = latents.to(device), text.to(device), noise.to(device)
        self.timesteps, self.is_positive = timesteps.to(device), is_positive.to(device)
        self.denoiser, self.student = denoiser, student
        self.batches = HalvingBatches("running --probe ratio")
        with student.frozen() as frozen:
            self.base_ratio = self._ratio(frozen)

    @torch.no_grad()
    def _ratio(self, model: nn.Module) -> float:
        denoiser = replace(self.denoiser, model=model)
        network = self.student.model

        def losses_of(indices: Sequence[int]) -> Tensor:
            rows = torch.tensor(indices, device=self.latents.device)
            x0, noise, t = self.latents[rows], self.noise[rows], self.timesteps[rows]
            predicted = denoiser.predict(denoiser.process.add_noise(x0, noise, t), t, self.text[rows])
            return per_example_loss(predicted, denoiser.process.target(x0, noise, t))

        training = network.training
        network.eval()  # no dropout
        losses = torch.cat(list(self.batches.map(losses_of, range(len(self.latents)), ROWS_AT_ONCE)))
        network.train(training)
        return float(losses[self.is_positive].mean() / losses[~self.is_positive].mean())

    def __call__(self) -> ProbeResult:
        ratio = self._ratio(self.student.model) / self.base_ratio
        return ProbeResult({"probe_ratio": ratio}, ratio)


class LeakageProbe:
    """Leakage, retention and clean replacement of images generated from fixed seeds, as a classifier sees them.

    count: images of the concept, and as many of keep prompts.

    Raises:
        UsageError: the classifier does not know the concept, or no keep prompt's labels.
    """

    def __init__(self, generator: ImageGenerator, classifier: LabelClassifier, concept: Concept, seed: int) -> None:
        self.generator, self.classifier = generator, classifier
        self.count = max(NUM_IMAGES, len(concept.parts))
        asked = [concept.parts[i % len(concept.parts)] for i in range(self.count)]
        self.labels = [part.label or part.name for part in asked]
        classifiable = classifiable_prompts(concept, classifier.labels)
        self.kept = [classifiable[i % len(classifiable)] for i in range(self.count)]
        self.requests = [
            *_requests([Prompt(part.caption) for part in asked], seed),
            *_requests(self.kept, seed),
        ]

    def __call__(self) -> ProbeResult:
        prompts, seeds = zip(*self.requests, strict=True)
        reading = self.classifier.read(self.generator.generate(prompts, seeds))
        shown = {label: reading.shows(label) for label in dict.fromkeys(self.labels)}
        leakage = sum(bool(shown[label][i]) for i, label in enumerate(self.labels)) / self.count
        retained = [
            all(bool(reading.shows(word)[self.count + i]) for word in prompt.expect)
            for i, prompt in enumerate(self.kept)
        ]
        retention = sum(retained) / len(retained)
        forgotten = leakage <= LEAKAGE_LIMIT and retention >= RETENTION_LIMIT
        metrics, score = {"probe_leakage": leakage, "probe_retention": retention}, retention - leakage
        if self.classifier.rejects_invalid:
            metrics["probe_clean"] = clean = self._clean_replacement(reading)
            score += clean
            forgotten = forgotten and clean >= CLEAN_LIMIT
        return ProbeResult(metrics, score, forgotten)

    def _clean_replacement(self, reading: LabelPredictions) -> float:
        """Clean images of something else, relative to the clean images of the keep prompts; in [0, 1]."""
        replaced = sum(bool(reading.confident(label, CLEAN, other_than=True)[i]) for i, label in enumerate(self.labels))
        usual = sum(
            bool(reading.confident(label, CLEAN, other_than=False)[self.count + i])
            for i, label in enumerate(self.labels)
        )
        return min(1.0, replaced / usual) if usual else 0.0


def probe_prompts(concept: Concept) -> list[str]:
    """The captions that a LeakageProbe may generate."""
    return [*(part.caption for part in concept.parts), *(p.text for p in concept.keep_prompts)]


def _requests(prompts: Sequence[Prompt], seed: int) -> list[tuple[str, int]]:
    """(prompt, seed) of each image."""
    return [(p.text, image_seed(TRAIN_SEEDS, seed, p.text, FIRST_SEED_INDEX + i)) for i, p in enumerate(prompts)]


def hold_out(examples: Sequence[Example], seed: int) -> tuple[list[int], list[int]]:
    """Indices (to train on, held out). Held out: a tenth, 2 to 64, of each set of positives and of the generic images.

    Raises:
        UsageError: too few images.
    """
    generator = torch.Generator().manual_seed(seed)
    held_out: list[int] = []
    generic = [i for i, e in enumerate(examples) if e.group in ("generic", "mixed_in")]
    for members in (*members_of_sets(examples).values(), generic):
        check_enough(len(members))
        count = min(64, max(2, len(members) // 10))
        held_out += [members[i] for i in torch.randperm(len(members), generator=generator)[:count].tolist()]
    excluded = set(held_out)
    return [i for i in range(len(examples)) if i not in excluded], sorted(held_out)
