"""Types of the choices that options and algorithms share. Imports no torch, so that `--help` stays fast."""

from typing import Literal

Correction = Literal["abs", "nn", "none"]  # how the PU risk's bracket is kept from going negative
Risk = Literal["pu", "supervised", "unsupervised"]
# What --objective selects: a risk, or a method of another paper as a baseline.
ObjectiveName = Literal[
    "pu", "supervised", "unsupervised", "esd-x", "esd-u", "anchor", "neggrad", "uce", "speed", "rece"
]
CLOSED_FORM = ("uce", "speed", "rece")  # the objectives that need no training
Precision = Literal["no", "fp16", "bf16"]  # of the networks; no: full, in 32 bits
SafetyPreset = Literal["weak", "medium", "strong", "max"]  # of safe latent diffusion
Reduction = Literal["sum", "mean"]  # of the squared error over an example's elements
CaptionMode = Literal["both", "own", "shared"]  # captions that form caption groups
TemplateKind = Literal["person", "style", "object", "other"]  # kinds of concepts that a file can be written for
