"""What the paper runs (Takahashi et al. 2025, section 5 and appendix), a line each, and how: data, network, training.

Imports no torch: `paper list` and `--help` answer at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sd_unlearn.errors import UsageError, suggest

Size = Literal["paper", "tiny"]
Sampler = Literal["ddpm", "ddim"]
Dataset = Literal["mnist5k", "mnist", "cifar10", "stl10", "celeba"]

EVEN, ODD = ("0", "2", "4", "6", "8"), ("1", "3", "5", "7", "9")
DIGITS = tuple("0123456789")
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
STL10 = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
CELEBA = ("female", "male")
VEHICLES = {"cifar10": ("airplane", "automobile", "ship", "truck"), "stl10": ("airplane", "car", "ship", "truck")}
CLASSES: dict[Dataset, tuple[str, ...]] = {
    "mnist5k": DIGITS, "mnist": DIGITS, "cifar10": CIFAR10, "stl10": STL10, "celeba": CELEBA,
}  # fmt: skip


@dataclass(frozen=True)
class Counts:
    """How many images there are of each kind."""

    normal: int  # unlabeled and normal
    mixed_in: int  # unlabeled and sensitive
    positive: int  # labeled sensitive

    @property
    def contamination(self) -> float:
        """The true beta: share of sensitive images among the unlabeled ones, in (0, 1)."""
        return self.mixed_in / (self.normal + self.mixed_in)


@dataclass(frozen=True)
class Recipe:
    """How a network is trained and drawn from. Of a batch, the labeled images come on top: a third as many."""

    train_batch_size: int  # unlabeled images of a step
    epochs: int  # passes over the unlabeled images
    learning_rate: float
    sampler: Sampler
    num_inference_steps: int
    num_images: int  # drawn, for the rate and the distance
    lr_warmup_steps: int = 500
    ema_decay: float | None = None


@dataclass(frozen=True)
class Experiment:
    """One of the paper's settings: which classes are normal, which sensitive, how many of each, and the recipe."""

    name: str
    dataset: Dataset
    normal: tuple[str, ...]
    sensitive: tuple[str, ...]
    counts: Counts
    side: int  # of the images, in pixels
    channels: int
    recipe: Recipe
    base: str | None = None  # the hub id of a DDPM to fine-tune; None: from scratch
    of_paper: bool = True

    @property
    def sizes(self) -> tuple[Size, ...]:
        """The presets it can run at; what is fine-tuned has the size of its base."""
        return ("paper",) if self.base else ("paper", "tiny")

    @property
    def default_size(self) -> Size:
        return "paper" if self.of_paper else "tiny"


# T = 1,000 everywhere. From scratch the paper samples by DDPM in all 1,000 steps, fine-tuned by DDIM in 50.
_SCRATCH = Recipe(128, 100, 1e-4, "ddpm", 1000, 10_000)
_STL10 = Recipe(32, 100, 1e-4, "ddpm", 1000, 10_000)
_CIFAR10_FT = Recipe(128, 100, 1e-4, "ddim", 50, 10_000)
_CELEBA_FT = Recipe(16, 20, 1e-4, "ddim", 50, 2_048)
# A network of a million weights that two CPU cores train in minutes: docs/paper.md says how it was found.
TINY = Recipe(64, 30, 2e-3, "ddim", 50, 1_000, lr_warmup_steps=100, ema_decay=0.995)

_MNIST = Counts(25_000, 2_500, 2_500)
_MNIST5K = Counts(2_000, 200, 200)  # 10 : 1 : 1, as MNIST's
_CIFAR10 = Counts(20_000, 2_000, 2_000)
_STL10_COUNTS = _CELEBA = Counts(2_000, 200, 200)


def _experiments() -> list[Experiment]:
    found = []
    for dataset, counts in (("mnist5k", _MNIST5K), ("mnist", _MNIST)):
        for name, normal, sensitive in (("even", EVEN, ODD), ("odd", ODD, EVEN)):
            found.append(
                Experiment(
                    f"{dataset}-{name}", dataset, normal, sensitive, counts, 32, 1, _SCRATCH,  # type: ignore[arg-type]
                    of_paper=dataset == "mnist",
                )
            )  # fmt: skip
    for dataset, counts, side, recipe in (("cifar10", _CIFAR10, 32, _SCRATCH), ("stl10", _STL10_COUNTS, 96, _STL10)):
        vehicles = VEHICLES[dataset]
        animals = tuple(name for name in CLASSES[dataset] if name not in vehicles)  # type: ignore[index]
        for name, normal, sensitive in (("vehicles", vehicles, animals), ("animals", animals, vehicles)):
            full = f"{dataset}-{name}"
            found.append(Experiment(full, dataset, normal, sensitive, counts, side, 3, recipe))  # type: ignore[arg-type]
            if dataset == "cifar10":
                base = "google/ddpm-cifar10-32"
                found.append(
                    Experiment(f"{full}-ft", dataset, normal, sensitive, counts, side, 3, _CIFAR10_FT, base)
                )  # fmt: skip
    for normal, sensitive in (("male", "female"), ("female", "male")):
        base = "google/ddpm-celebahq-256"
        name = f"celeba-{normal}-ft"
        found.append(Experiment(name, "celeba", (normal,), (sensitive,), _CELEBA, 256, 3, _CELEBA_FT, base))
    return found


EXPERIMENTS = {e.name: e for e in _experiments()}
# Text-to-image models go the way of `train`: paper/stable_diffusion.py
SD_BRAD_PITT, DIGITS_SEVEN = "sd-brad-pitt", "digits-seven"
NAMES = (*EXPERIMENTS, SD_BRAD_PITT, DIGITS_SEVEN)


def find_experiment(name: str) -> Experiment:
    """An experiment of a DDPM by name.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in EXPERIMENTS:
        raise UsageError(f'Experiment "{name}" is unknown.{suggest(name, NAMES)} Known: {", ".join(NAMES)}.')
    return EXPERIMENTS[name]
