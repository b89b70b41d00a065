"""One line of the result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "missing", "broken", "info"]


@dataclass(frozen=True)
class Check:
    """One line of the result. `needed`: without it sd-unlearn does not work."""

    section: str
    name: str
    status: Status
    detail: str
    needed: bool = False
