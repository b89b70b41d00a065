"""Speed and memory options of training: attention kernels, compilation, a quantized base.

Call `check` before the base is loaded, `prepare` before the LoRA is attached, and `compile_blocks` after.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

from sd_unlearn.config.loop import Performance
from sd_unlearn.errors import UsageError, install_command, reason
from sd_unlearn.models.quantized import check_nf4, quantize_linear_layers

# Dynamo keeps one graph of the transformer block for each width of the UNet (three in SD 1.x and 2.x), each with the
# LoRA, without it (teacher) and without gradients (previews), and each again for dynamic batch sizes. At its default
# limit of 8 it would run the rest uncompiled, with only a warning.
RECOMPILE_LIMIT = 64


def check(options: Performance, device: torch.device) -> None:
    """Try --attention xformers, --torch_compile and --quantize_base nf4 on a small tensor, before the base is loaded.

    Raises:
        UsageError: one of them does not work on this machine; the message says why.
    """
    if options.attention == "xformers":
        _check_xformers(device)
    if options.torch_compile:
        _check_compilation(device)
    if options.quantize_base == "nf4":
        check_nf4(device)


def prepare(network: Any, options: Performance) -> None:
    """Set the frozen network's attention kernels and, with --quantize_base, quantize its linear layers, in place."""
    if isinstance(network, UNet2DConditionModel):  # transformers have sdpa by themselves (check_flow)
        _set_attention(network, options)
    if options.quantize_base:
        quantize_linear_layers(network, options.quantize_base)


def _set_attention(unet: UNet2DConditionModel, options: Performance) -> None:
    if options.attention == "xformers":
        unet.enable_xformers_memory_efficient_attention()
    else:
        unet.set_attn_processor(AttnProcessor2_0() if options.attention == "sdpa" else AttnProcessor())


def compile_blocks(network: Any, options: Performance) -> None:
    """With --torch_compile: compile the network's repeated blocks in place. Weights and their names do not change.

    Call it after the LoRA is attached, so that the LoRA is part of the graph. Only the blocks are compiled, where
    nearly all of the time is spent: one graph serves all blocks of a width, which saves minutes of compilation.
    Switching the adapter off is a guard of the graph, so a teacher costs one more graph.
    """
    if not options.torch_compile:
        return
    torch._dynamo.config.recompile_limit = max(RECOMPILE_LIMIT, torch._dynamo.config.recompile_limit)
    if not network._repeated_blocks:  # SD 3's transformer does not name them
        network._repeated_blocks = network._no_split_modules
    network.compile_repeated_blocks()


def _check_xformers(device: torch.device) -> None:
    if not find_spec("xformers"):
        raise UsageError(
            f"--attention xformers: xformers is not installed. Run {install_command('xformers')}, or use "
            "--attention sdpa, which is part of torch."
        )
    try:
        import xformers.ops

        small = torch.randn(1, 8, 2, 64, device=device, requires_grad=True)  # [batch, tokens, heads, width]
        xformers.ops.memory_efficient_attention(small, small, small).sum().backward()
    except (ImportError, NotImplementedError, RuntimeError, OSError) as error:
        raise UsageError(f"--attention xformers: {_xformers_fault(error, device)}. Use --attention sdpa.") from error


def _xformers_fault(error: Exception, device: torch.device) -> str:
    """Why xformers does not work: it cannot be imported, was built for another torch, or lacks a kernel."""
    try:
        from xformers import __version__, _cpp_lib
    except (ImportError, OSError):
        return f"xformers cannot be imported ({reason(error)})"
    load_error = getattr(_cpp_lib, "_cpp_library_load_exception", None)  # xformers only warns about it
    if load_error is None:
        return f"xformers {__version__} has no kernel for {device.type} ({reason(error)})"
    return f"the kernels of xformers {__version__} do not load with torch {torch.__version__} ({reason(load_error)})"


def _check_compilation(device: torch.device) -> None:
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(4, device=device))
    except Exception as error:  # anything that the compiler may lack: a C++ compiler, Triton, Python headers
        fix = "Install a C++ compiler (g++), or leave the option out."
        if device.type != "cpu":
            fix = "Leave the option out."
        raise UsageError(
            f"--torch_compile: torch cannot compile for {device.type} on this machine ({reason(error)}). {fix}"
        ) from error
