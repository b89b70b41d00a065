"""Make Stable Diffusion forget a concept (a person, a style, an object) and measure how well it worked."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Public name -> the module that defines it, imported on first use. `__init__.pyi` declares the names for type checkers.
_NAMES = {
    **dict.fromkeys(("attack", "calibrate", "evaluate", "fuse", "render", "train"), "sd_unlearn.api"),
    **dict.fromkeys(("Concept", "Evaluation", "Images"), "sd_unlearn.data.concept"),
    "load_concept": "sd_unlearn.data.find_concept",
    **dict.fromkeys(("ConditionError", "UnlearnError", "UsageError"), "sd_unlearn.errors"),
    **dict.fromkeys(("Results", "read_results"), "sd_unlearn.results"),
}
_CALLABLE = ("export", "report")  # packages that are called as functions (callable_module.py)
__all__ = ["__version__", *_CALLABLE, *_NAMES]


def __getattr__(name: str) -> Any:
    if name in _CALLABLE:
        return import_module(f"sd_unlearn.{name}")
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_NAMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
