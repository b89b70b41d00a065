"""Where networks run, and in which precision."""

from __future__ import annotations

import os
from typing import cast

from sd_unlearn.choices import Precision
from sd_unlearn.launch import print_once


def wanted_precision(option: Precision | None) -> Precision:
    """--mixed_precision, else accelerate's setting, else no."""
    return option or cast(Precision, os.environ.get("ACCELERATE_MIXED_PRECISION", "no"))


def choose_precision(option: Precision | None) -> Precision:
    """The precision that is wanted. Without CUDA always no, with a message."""
    import torch

    wanted = wanted_precision(option)
    if wanted != "no" and not torch.cuda.is_available():
        print_once(f"No CUDA device: computing in full precision on the CPU instead of {wanted}.")
        return "no"
    return wanted


def default_device() -> str:
    """CUDA if there is a GPU, else the CPU."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
