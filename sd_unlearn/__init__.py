"""Make Stable Diffusion forget a concept (a person, a style, an object) and measure how well it worked."""

__version__ = "0.1.0"
