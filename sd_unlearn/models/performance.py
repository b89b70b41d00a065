"""What is traded for speed or memory in training: attention kernels, gradient checkpointing, compilation.

In this order: `check` before the base is loaded, `prepare` before the LoRA is attached, `compile_blocks` after.
"""

from __future__ import annotations

from importlib.util import find_spec
from textwrap import shorten
from typing import Any

import torch

from sd_unlearn.config.train import TrainConfig
from sd_unlearn.errors import UsageError

# Dynamo keeps one graph of the transformer block for each width of the UNet (three in SD 1.x and 2.x), each with the
# LoRA, without it (the teacher) and without gradients (previews), and each again for batches of any size. At its
# usual limit of 8 it would give up and run the rest uncompiled, saying so only in a warning.
RECOMPILE_LIMIT = 64


def check(config: TrainConfig, device: torch.device) -> None:
    """Try what was asked for on a few numbers on the device, before anything heavy loads.

    Raises:
        UsageError: --attention xformers or --torch_compile cannot work here; says what was found.
    """
    if config.attention == "xformers":
        _try_xformers(device)
    if config.torch_compile:
        _try_compiling(device)


def prepare(unet: Any, config: TrainConfig) -> None:
    """Set the frozen UNet's attention kernels and gradient checkpointing, in place.

    Checkpoints are diffusers' non-reentrant ones: reentrant ones would need an input that requires a gradient, and a
    frozen network with a LoRA has none. What is computed again is computed with the adapter as it is during the
    backward pass, so the teacher must be done by then, as it is in `example_losses`.
    """
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    if config.attention == "xformers":
        unet.enable_xformers_memory_efficient_attention()
    else:
        unet.set_attn_processor(AttnProcessor2_0() if config.attention == "sdpa" else AttnProcessor())
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()


def compile_blocks(unet: Any, config: TrainConfig) -> None:
    """With --torch_compile: compile the UNet's repeated blocks in place, weights and their names as they were.

    After the LoRA is attached, which is then part of the graph. The blocks (where nearly all of the time goes) and
    not the whole UNet, because one graph serves all blocks of a width: minutes less of compiling. The adapter's switch
    is a guard of a graph, so a teacher costs one graph more, once.
    """
    if not config.torch_compile:
        return
    torch._dynamo.config.recompile_limit = max(RECOMPILE_LIMIT, torch._dynamo.config.recompile_limit)
    unet.compile_repeated_blocks()


def _try_xformers(device: torch.device) -> None:
    if not find_spec("xformers"):
        raise UsageError(
            "--attention xformers: xformers is not installed. pip install 'sd-unlearn[xformers]', or take --attention "
            "sdpa, which comes with torch."
        )
    try:
        import xformers.ops

        few = torch.randn(1, 8, 2, 64, device=device, requires_grad=True)  # [batch, tokens, heads, width]
        xformers.ops.memory_efficient_attention(few, few, few).sum().backward()
    except (ImportError, NotImplementedError, RuntimeError, OSError) as error:
        raise UsageError(f"--attention xformers: {_why(error, device)}. Take --attention sdpa.") from error


def _why(error: Exception, device: torch.device) -> str:
    """What keeps xformers from working: it was built for another torch, or has no kernel for the device."""
    try:
        from xformers import __version__, _cpp_lib
    except (ImportError, OSError):
        return f"xformers cannot be imported ({_one_line(error)})"
    unloaded = getattr(_cpp_lib, "_cpp_library_load_exception", None)  # xformers only warns of it
    if unloaded is None:
        return f"xformers {__version__} has no kernel for {device.type} ({_one_line(error)})"
    return f"the kernels of xformers {__version__} do not load with torch {torch.__version__} ({_one_line(unloaded)})"


def _try_compiling(device: torch.device) -> None:
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(4, device=device))
    except Exception as error:  # whatever the compiler stumbles over: no C++ compiler, no Triton, no Python headers
        raise UsageError(
            f"--torch_compile: torch cannot compile for {device.type} here ({_one_line(error)}). "
            + ("Install a C++ compiler (g++), or leave" if device.type == "cpu" else "Leave")
            + " the option out."
        ) from error


def _one_line(error: object) -> str:
    """The start of what an error says, without its line breaks and its final stop."""
    return shorten(str(error) or type(error).__name__, 160, placeholder=" ...").rstrip(". ")
