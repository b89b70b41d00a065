"""Run sd-unlearn commands on the stand-in accelerator (stand_in.cpp): python stand_in.py BUILD_FOLDER < commands.json

commands.json: a list of commands, each a list of words. Ends with the first exit code that is not 0. The device is
called npu, a name for which accelerate trains in fp16.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils import cpp_extension

NAME = "npu"


class Module:
    """torch.npu: what torch and accelerate ask of the module of a device."""

    is_available = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    set_device = staticmethod(lambda device: None)
    synchronize = staticmethod(lambda *device: None)
    empty_cache = staticmethod(lambda: None)
    manual_seed_all = staticmethod(lambda seed: None)
    get_amp_supported_dtype = staticmethod(lambda: [torch.float16, torch.bfloat16])
    _is_in_bad_fork = staticmethod(lambda: False)


def register(build_folder: Path) -> None:
    """Compile the device (half a minute, once per build folder) and give it its name."""
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, Module)
    torch.utils.generate_methods_for_privateuse1_backend()
    build_folder.mkdir(parents=True, exist_ok=True)
    source = Path(__file__).with_name("stand_in.cpp")
    cpp_extension.load(
        "stand_in", [str(source)], build_directory=str(build_folder), extra_cflags=["-O0"], is_python_module=False
    )


def use() -> None:
    """Have sd-unlearn and accelerate compute on it, in the precision that is asked for."""
    import accelerate.accelerator

    from sd_unlearn.models import device

    def make_scaler(*_: Any, **options: Any) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(NAME, **options)

    os.environ["ACCELERATE_TORCH_DEVICE"] = NAME
    accelerate.accelerator.get_grad_scaler = make_scaler
    accelerate.accelerator.is_bf16_available = lambda *_: True
    device.default_device = lambda: NAME
    device.choose_precision = device.wanted_precision


if __name__ == "__main__":
    register(Path(sys.argv[1]))
    use()
    from sd_unlearn.cli import main

    for command in json.load(sys.stdin):
        if code := main(command):
            sys.exit(code)
