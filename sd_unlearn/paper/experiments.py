"""The experiments of the paper (Takahashi et al. 2025, section 5 and appendix): data, network, training.

Imports no torch, so that `paper list` and `--help` stay fast.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from sd_unlearn.choices import Reduction
from sd_unlearn.errors import UsageError, suggest

Size = Literal["paper", "tiny"]
Sampler = Literal["ddpm", "ddim"]
Classes = tuple[str, ...]
Dataset = Literal["mnist5k", "mnist", "cifar10", "stl10", "celeba"]

EVEN, ODD = ("0", "2", "4", "6", "8"), ("1", "3", "5", "7", "9")
DIGITS = tuple("0123456789")
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
STL10 = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
CELEBA = ("female", "male")
CLASSES: dict[Dataset, Classes] = {
    "mnist5k": DIGITS,
    "mnist": DIGITS,
    "cifar10": CIFAR10,
    "stl10": STL10,
    "celeba": CELEBA,
}


@dataclass(frozen=True)
class Counts:
    """Numbers of training images."""

    normal: int  # unlabeled and normal
    mixed_in: int  # unlabeled and sensitive
    positive: int  # labeled sensitive

    @property
    def contamination(self) -> float:
        """The true beta: share of sensitive images among the unlabeled ones, in [0, 1)."""
        return self.mixed_in / (self.normal + self.mixed_in)


@dataclass(frozen=True)
class Recipe:
    """How a network is trained and sampled from."""

    train_batch_size: int  # unlabeled images per step; a third as many labeled ones are added
    epochs: int  # passes over the unlabeled images
    learning_rate: float
    sampler: Sampler
    num_inference_steps: int
    num_images: int  # generated for the metrics
    lr_warmup_steps: int = 500
    ema_decay: float | None = None
    reduction: Reduction = "sum"
    snr_gamma: float | None = None  # Min-SNR weights of the timesteps; None: equal weights
    max_ratio: float | None = None  # cap on a labeled image's loss, relative to an unlabeled one's; None: no cap


@dataclass(frozen=True)
class Experiment:
    """Which classes are normal and which sensitive, numbers of images, and the recipe."""

    name: str
    dataset: Dataset
    normal: Classes
    sensitive: Classes
    counts: Counts
    side: int  # of the images, in pixels
    channels: int
    recipe: Recipe
    base: str | None = None  # hub id of the DDPM to fine-tune; None: from scratch
    of_paper: bool = True

    def side_of(self, size: Size) -> int:
        """Width and height of the training images, in pixels."""
        return TINY_SIDE if size == "tiny" else self.side

    def recipe_of(self, size: Size) -> Recipe:
        """The recipe of a size."""
        return TINY if size == "tiny" else self.recipe

    @property
    def sizes(self) -> tuple[Size, ...]:
        """The sizes it can run at; a fine-tuned model has the size of its base."""
        return ("paper",) if self.base else ("paper", "tiny")

    @property
    def default_size(self) -> Size:
        return "paper" if self.of_paper else "tiny"


TINY_SIDE = 12  # pixels: the middle 24 of MNIST's 28, halved
# T = 1,000. In the paper, models trained from scratch are sampled with DDPM in 1,000 steps, fine-tuned ones with DDIM
# in 50.
_SCRATCH = Recipe(128, 100, 1e-4, "ddpm", 1000, 10_000)
_STL10 = Recipe(32, 100, 1e-4, "ddpm", 1000, 10_000)
_CIFAR10_FT = Recipe(128, 100, 1e-4, "ddim", 50, 10_000)
_CELEBA_FT = Recipe(16, 20, 1e-4, "ddim", 50, 2_048)
# A network with a million weights that two CPU cores train in minutes; docs/paper.md explains the choices.
TINY = Recipe(32, 32, 1e-3, "ddim", 50, 1_000, lr_warmup_steps=100, ema_decay=0.995, snr_gamma=5.0, max_ratio=4.0)

_MNIST = Counts(25_000, 2_500, 2_500)
_MNIST5K = Counts(2_000, 200, 200)  # 10 : 1 : 1, as MNIST's
_CIFAR10 = Counts(20_000, 2_000, 2_000)
_FEW = Counts(2_000, 200, 200)  # STL10's and CelebA's


def _both_ways(
    dataset: Dataset,
    groups: Mapping[str, Classes],
    counts: Counts,
    side: int,
    channels: int,
    recipe: Recipe,
    base: str | None = None,
) -> list[Experiment]:
    """Two experiments, each named after the group of classes that is normal in it; the other group is sensitive."""
    ending, (one, other) = "-ft" if base else "", groups
    return [
        Experiment(
            f"{dataset}-{normal}{ending}",
            dataset,
            groups[normal],
            groups[sensitive],
            counts,
            side,
            channels,
            recipe,
            base,
            of_paper=dataset != "mnist5k",
        )
        for normal, sensitive in ((one, other), (other, one))
    ]


def _vehicles_and_animals(dataset: Dataset, vehicles: Classes) -> Mapping[str, Classes]:
    return {"vehicles": vehicles, "animals": tuple(name for name in CLASSES[dataset] if name not in vehicles)}


_PARITY = {"even": EVEN, "odd": ODD}
_OF_CIFAR10 = _vehicles_and_animals("cifar10", ("airplane", "automobile", "ship", "truck"))
_OF_STL10 = _vehicles_and_animals("stl10", ("airplane", "car", "ship", "truck"))
_SEXES = {"male": ("male",), "female": ("female",)}
_ALL = [
    *_both_ways("mnist5k", _PARITY, _MNIST5K, 32, 1, _SCRATCH),
    *_both_ways("mnist", _PARITY, _MNIST, 32, 1, _SCRATCH),
    *_both_ways("cifar10", _OF_CIFAR10, _CIFAR10, 32, 3, _SCRATCH),
    *_both_ways("stl10", _OF_STL10, _FEW, 96, 3, _STL10),
    *_both_ways("cifar10", _OF_CIFAR10, _CIFAR10, 32, 3, _CIFAR10_FT, "google/ddpm-cifar10-32"),
    *_both_ways("celeba", _SEXES, _FEW, 256, 3, _CELEBA_FT, "google/ddpm-celebahq-256"),
]
EXPERIMENTS = {e.name: e for e in _ALL}
# Experiments on text-to-image models: paper/stable_diffusion.py
SD_BRAD_PITT, DIGITS_SEVEN = "sd-brad-pitt", "digits-seven"
TEXT_EXPERIMENTS = (SD_BRAD_PITT, DIGITS_SEVEN)
NAMES = (*EXPERIMENTS, *TEXT_EXPERIMENTS)


def find_experiment(name: str) -> Experiment:
    """A DDPM experiment by name.

    Raises:
        UsageError: the name is unknown.
    """
    if name not in EXPERIMENTS:
        raise UsageError(f'Experiment "{name}" is unknown.{suggest(name, NAMES)} Known: {", ".join(NAMES)}.')
    return EXPERIMENTS[name]
