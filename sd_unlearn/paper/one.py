"""Any experiment by name: a DDPM's, or a text-to-image model's by way of `train` and `evaluate`."""

from __future__ import annotations

from pathlib import Path

from sd_unlearn.io.run_folder import RESULTS
from sd_unlearn.paper import run, stable_diffusion
from sd_unlearn.paper.experiments import TEXT_EXPERIMENTS
from sd_unlearn.paper.options import RunOptions


def run_any(name: str, options: RunOptions) -> Path:
    """The record of a run, which is done first as far as it is not. Raises as either."""
    if name in TEXT_EXPERIMENTS:
        return stable_diffusion.run_options(name, options) / stable_diffusion.PAPER
    return run.run(name, options) / RESULTS
