"""The computer: Python, memory, GPUs, disk, and whether the Hugging Face hub is reachable."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sd_unlearn.config.base import DEFAULT_BASE
from sd_unlearn.doctor.check import Check
from sd_unlearn.errors import reason

HUB_TIMEOUT = 5  # seconds
MIN_FREE = 5  # GB of disk, below which rendering and checkpoints may fail


def system() -> Iterator[Check]:
    yield Check("System", "Python", "ok", f"{platform.python_version()} ({platform.python_implementation()})", True)
    yield Check("System", "platform", "info", f"{platform.system()} {platform.release()} {platform.machine()}")
    yield Check("System", "CPU cores", "info", str(os.cpu_count()))
    with contextlib.suppress(Exception):  # comes with accelerate, which may be missing
        import psutil

        memory = psutil.virtual_memory()
        yield Check("System", "memory", "info", f"{_gb(memory.total)}, {_gb(memory.available)} available")


def devices() -> Iterator[Check]:
    """GPUs with their memory. A computer without one is fine."""
    try:
        import torch

        found = list(gpus(torch))
    except Exception as error:
        yield Check("Devices", "GPU", "broken", f"{type(error).__name__}: {reason(error)}")
        return
    yield from found
    if found:
        return
    if shutil.which("nvidia-smi"):
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        detail = f"there is an NVIDIA driver, but torch ({built}) finds no GPU: reinstall torch, or update the driver"
        yield Check("Devices", "GPU", "broken", detail)
    else:
        yield Check("Devices", "GPU", "info", "none: everything runs on the CPU, slowly except on the bundled bases")


def gpus(torch: Any) -> Iterator[Check]:
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        software = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
        half = ", bf16" if torch.cuda.is_bf16_supported() else ""
        detail = f"{properties.name}, {_gb(total)}, {_gb(free)} free, {software}, fp16{half}"
        yield Check("Devices", f"GPU {number}", "ok", detail)
    if torch.backends.mps.is_available():
        yield Check("Devices", "GPU", "ok", "Apple (mps)")


def hub() -> Iterator[Check]:
    """Whether models can be downloaded. Offline mode is respected."""
    try:
        from huggingface_hub import constants, get_token, try_to_load_from_cache
    except Exception:  # reported among the packages
        return
    if constants.HF_HUB_OFFLINE:
        yield Check("Hugging Face", "hub", "info", "offline mode (HF_HUB_OFFLINE): nothing is downloaded")
    else:
        yield _reach(f"{constants.ENDPOINT}/api/models/{DEFAULT_BASE}")
    yield Check("Hugging Face", "token", "info", "set" if get_token() else "not set: only public models")
    cached = isinstance(try_to_load_from_cache(DEFAULT_BASE, "model_index.json"), str)
    state = "downloaded" if cached else "not downloaded; the first use downloads it"
    yield Check("Hugging Face", "default base", "info", f"{DEFAULT_BASE}: {state}")


def _reach(url: str) -> Check:
    from urllib.error import HTTPError
    from urllib.request import urlopen

    start = time.monotonic()
    try:
        with urlopen(url, timeout=HUB_TIMEOUT):
            pass
    except HTTPError as error:
        return Check("Hugging Face", "hub", "broken", f"answers with HTTP status {error.code}")
    except Exception as error:
        detail = f"not reachable ({type(error).__name__}): only bundled, local and cached models can be used"
        return Check("Hugging Face", "hub", "broken", detail)
    return Check("Hugging Face", "hub", "ok", f"reachable in {time.monotonic() - start:.1f} s")


def disk() -> Iterator[Check]:
    places = {
        "working folder": Path(),
        "model cache": _nearest(_hub_cache()),
    }
    for name, place in places.items():
        try:
            free = shutil.disk_usage(place).free
            with tempfile.TemporaryFile(dir=place):
                pass
        except OSError as error:
            yield Check("Disk", name, "broken", f"not writable ({reason(error)})", needed=place == Path())
            continue
        little = free < MIN_FREE * 1e9
        yield Check("Disk", name, "broken" if little else "ok", f"{_gb(free)} free{', which is little' * little}")


def _hub_cache() -> Path:
    """Where huggingface_hub puts downloads; it may be missing here."""
    try:
        from huggingface_hub import constants
    except Exception:
        return Path("~/.cache").expanduser()
    return Path(constants.HF_HUB_CACHE)


def _nearest(folder: Path) -> Path:
    """The folder, or the nearest of its parents that exists."""
    return next(place for place in (folder, *folder.absolute().parents) if place.is_dir())


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
