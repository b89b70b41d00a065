"""Export a finished run for other software: Diffusers, ComfyUI, A1111, Forge and the Hugging Face hub."""

import sys

from sd_unlearn.callable_module import CallableModule

sys.modules[__name__].__class__ = CallableModule
