"""sd-unlearn: make Stable Diffusion forget a concept, and prove that it did."""

__version__ = "0.1.0"
