"""sd-unlearn: make Stable Diffusion forget a concept, and measure the result."""

__version__ = "0.1.0"
