"""Options that print a plan instead of running a command. Imports no torch."""

import re
from dataclasses import dataclass
from typing import Annotated, Any

from sd_unlearn.config.options import GENERAL, START, option

UNITS = {"": 2**30, "g": 2**30, "gb": 2**30, "gib": 2**30, "m": 2**20, "mb": 2**20, "mib": 2**20}
SMALLEST, LARGEST = 2**30, 1024 * 2**30


def parse_vram(text: str) -> int:
    """The bytes of a memory size such as 8GB, 8, 7.5 GiB or 8192MB. GB are binary, as on graphics cards.

    Raises:
        ValueError: not such a size, or not between 1 and 1024 GB.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if not match or match[2] not in UNITS:
        raise ValueError(f"{text} must be a memory size, e.g. 8GB or 8192MB.")
    size = int(float(match[1]) * UNITS[match[2]])
    if not SMALLEST <= size <= LARGEST:
        raise ValueError(f"{text} must be at least 1 GB and at most 1024 GB: it is the memory of a graphics card.")
    return size


def _check_vram(type_: Any, value: Any) -> None:
    if isinstance(value, str):
        parse_vram(value)


@dataclass(kw_only=True)
class PlanOptions:
    """Whether only the plan is printed, and for which memory."""

    dry_run: Annotated[
        bool,
        option(
            "Print the plan (memory and images; of a training also batches, disk space and time) and exit. Loads no "
            "weights and writes nothing.",
            START,
        ),
    ] = False
    vram: Annotated[
        str | None,
        option(
            "Plan for a GPU with this much memory, e.g. 8GB. Default: the free memory of the device.",
            GENERAL,
            _check_vram,
        ),
    ] = None
