"""Other bases on the data of `digits`: without a concept, or with another width, VAE or prediction. Used by
build_digits.py.

They show how much of what is measured on `digits` depends on it. The tokenizer is always the bundled one.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from base_training import trained_pipeline
from diffusers import AutoencoderKL, StableDiffusionPipeline
from digits_data import load_digits
from digits_models import encode_pool, train_denoiser, train_vae
from torch import Tensor

from sd_unlearn.metrics.digits import DIGITS, INKS
from sd_unlearn.models.source import DIGITS_DIR

FACTOR, PREDICTION = 4, "epsilon"  # of the bundled base


@dataclass(frozen=True)
class Variant:
    """How a base differs from `digits`."""

    without: str | None = None  # a digit or ink that is in no image and no caption
    width: float = 1.0  # channels of the UNet, relative to the bundled one's
    vae_factor: int = FACTOR  # pixels per latent, along each side
    prediction_type: str = PREDICTION

    @property
    def name(self) -> str:
        """The base's name, e.g. digits-without-seven or digits-width-0.25."""
        parts = ["digits", f"without-{self.without}" if self.without else ""]
        parts += [f"width-{self.width:g}" if self.width != 1 else ""]
        parts += [f"factor-{self.vae_factor}" if self.vae_factor != FACTOR else ""]
        parts += [self.prediction_type.partition("_")[0] if self.prediction_type != PREDICTION else ""]
        return "-".join(filter(None, parts))


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of a Variant."""
    parser.add_argument("--without", choices=[*DIGITS, *INKS], help="leave this digit or ink out of the training data")
    parser.add_argument("--width", type=float, default=1.0, help="channels of the UNet, relative to the bundled one's")
    parser.add_argument(
        "--vae_factor", type=int, choices=(4, 8), default=FACTOR, help="pixels per latent; not 4: new VAE"
    )
    parser.add_argument("--prediction_type", choices=(PREDICTION, "v_prediction"), default=PREDICTION)


def build_variant(variant: Variant, work: Path, vae_steps: int, steps: int) -> None:
    """Train text encoder and UNet, and the VAE if its factor differs; write the pipeline to work/pipeline."""
    strokes, labels, _, _ = load_digits()
    bundled = StableDiffusionPipeline.from_pretrained(DIGITS_DIR)
    vae = bundled.vae
    if variant.vae_factor != FACTOR:
        if not (work / "vae").is_dir():
            train_vae(strokes, labels, vae_steps, variant.vae_factor).save_pretrained(work / "vae")
        vae = AutoencoderKL.from_pretrained(work / "vae")
    pool = encode_pool(vae.eval(), strokes, labels, copies=4)
    if variant.without:
        pool = leave_out(pool, variant.without)
    train_denoiser(pool, bundled.tokenizer, steps, work, width=variant.width, prediction_type=variant.prediction_type)
    pipeline = trained_pipeline(work, vae, bundled.tokenizer, variant.prediction_type)
    pipeline.save_pretrained(work / "pipeline")


def leave_out(pool: tuple[Tensor, Tensor, Tensor], concept: str) -> tuple[Tensor, Tensor, Tensor]:
    """The pool of `encode_pool` without one digit or ink, given by its English name."""
    latents, digits, inks = pool
    kept = digits != DIGITS.index(concept) if concept in DIGITS else inks != INKS.index(concept)
    return latents[kept], digits[kept], inks[kept]
