"""What `leaderboard.py` compares: methods, and the cells of the table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from bench_forget import PAPER

from sd_unlearn.io.reading import read_json
from sd_unlearn.models.source import DIGITS

SEARCH_RECORDS = Path(__file__).parents[1] / "docs" / "leaderboard-runs" / "search"


@dataclass(frozen=True)
class Method:
    """A row of the table.

    train: a run of `sd-unlearn train` with these options. sampler: the base, sampled in another way; these are options
    of `evaluate`. model: a whole model, the base or the oracle.
    """

    title: str
    source: str  # of the method, and what differs from it
    how: Literal["train", "sampler", "model"] = "train"
    options: Mapping[str, Any] = field(default_factory=dict)
    trained: bool = True  # by random steps, so that seeds differ


# Found for LoRAs on fewer layers than our defaults have.
RATE: Mapping[str, Any] = {"learning_rate": 7e-4, "max_train_steps": 500}
ATTENTION: Mapping[str, Any] = {**RATE, "lora_targets": "attention"}

METHODS: dict[str, Method] = {
    "pu": Method("ours", "the defaults of sd-unlearn train"),
    "pu-attention": Method(
        "ours, attention only", "a LoRA on attention projections only", options={**ATTENTION, "teacher_reuse": 1}
    ),
    "pu-noise": Method(
        "ours, noise as target",
        "--target noise with a LoRA on attention projections only",
        options={**ATTENTION, "target": "noise"},
    ),
    "paper": Method(
        "the paper's setting",
        "Takahashi et al. 2025: all weights, noise as target, own captions; 2,000 steps as in docs/benchmarks.md",
        options=PAPER | {"beta": 0.2, "max_train_steps": 2000},
    ),
    "esd-x": Method("ESD-x", "after Gandikota et al. 2023, eq. 7", options={"objective": "esd-x", **RATE}),
    "esd-u": Method("ESD-u", "after Gandikota et al. 2023, eq. 7", options={"objective": "esd-u", **RATE}),
    "anchor": Method("anchor", "after Kumari et al. 2023, eq. 5", options={"objective": "anchor", **ATTENTION}),
    "neggrad": Method(
        "negative gradient", "gradient ascent on the concept", options={"objective": "neggrad", **ATTENTION}
    ),
    "uce": Method("UCE", "after Gandikota et al. 2024, eq. 7", options={"objective": "uce"}, trained=False),
    "speed": Method("SPEED", "null-space projection of the edit", options={"objective": "speed"}, trained=False),
    "rece": Method(
        "RECE", "UCE, repeated once on what it left (Gong et al. 2024)", options={"objective": "rece"}, trained=False
    ),
    "rece-3": Method(
        "RECE, 3 epochs",
        "the authors' setting for nudity",
        options={"objective": "rece", "rece_epochs": 3},
        trained=False,
    ),
    "sld": Method("SLD", "after Schramowski et al. 2023", "sampler", {"sld": "max"}, trained=False),
    "oracle": Method("never saw it", "trained without the concept", "model", trained=False),
    "base": Method("base", "nothing unlearned", "model", trained=False),
}


# What `leaderboard_search.py` changes in a baseline's options above; first nothing.
SEARCH: dict[str, tuple[dict[str, Any], ...]] = {
    "anchor": ({}, {"learning_rate": 2e-3}, {"lora_targets": "all_linear+conv"}),
    "neggrad": ({}, {"forget_weight": 0.3}, {"forget_weight": 0.1}),
    "uce": ({}, {"erase_weight": 10.0}, {"erase_weight": 100.0}),
    "speed": ({}, {"null_space_threshold": 1.0}, {"null_space_threshold": 10.0}),
    "rece": ({}, {"erase_weight": 10.0}, {"erase_weight": 100.0}),
    "rece-3": ({}, {"erase_weight": 10.0}, {"erase_weight": 100.0}),
}


def chosen(method: str) -> dict[str, Any]:
    """The setting that the search chose; nothing if there was none."""
    file = SEARCH_RECORDS / f"{method}.json"
    return dict(read_json(file)["chosen"]) if file.is_file() else {}


@dataclass(frozen=True)
class Cell:
    """One method on one concept of a base, with one seed of training."""

    method: str
    concept: str
    seed: int
    base: str = DIGITS

    @property
    def slug(self) -> str:
        """The concept's name in file names."""
        return self.concept.replace(" ", "-")

    @property
    def name(self) -> str:
        """The cell's name in file names."""
        return f"{self.slug}-{self.method}-{self.seed}"

    @property
    def of(self) -> Method:
        """Its method."""
        return METHODS[self.method]


def cells(base: str, methods: list[str], concepts: list[str], seeds: list[int]) -> list[Cell]:
    """Every cell, those of the first concept and seed first; of what is not trained only the first seed."""
    return [
        Cell(method, concept, seed, base)
        for seed in seeds
        for concept in concepts
        for method in methods
        if METHODS[method].trained or seed == seeds[0]
    ]
