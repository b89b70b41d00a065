"""Pretend that memory is short: a network fails for more than a number of rows at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch


def limit_memory(monkeypatch: pytest.MonkeyPatch, owner: type, method: str, most: int) -> list[int]:
    """Let a method of a class run out of memory if its first argument has more than `most` rows.

    Returns the list to which the number of rows of each later call is added.
    """
    original, seen = getattr(owner, method), []

    def limited(self: Any, rows: Any, *arguments: Any, **options: Any) -> Any:
        seen.append(len(rows))
        if len(rows) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return original(self, rows, *arguments, **options)

    monkeypatch.setattr(owner, method, limited)
    return seen
