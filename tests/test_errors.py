"""The reason of an error in one line, and suggestions for misspelled words."""

from __future__ import annotations

import pytest

from sd_unlearn.errors import reason, suggest


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(28, "No space left on device", "/a/b"), "No space left on device"),
        (OSError("only text."), "only text"),
        (ValueError("two\n  lines.\n"), "two lines"),
        (ValueError(), "ValueError"),
        (KeyError("name"), "'name'"),
        (ValueError("x" * 300), "x" * 200),
    ],
)
def test_reason(error: BaseException, expected: str) -> None:
    assert reason(error) == expected


def test_reason_has_a_limit() -> None:
    assert reason(ValueError("a long reason"), limit=6) == "a long"


def test_suggest() -> None:
    assert suggest("rnak", ["rank", "seed"]) == ' Did you mean "rank"?'
    assert suggest("xyz", ["rank", "seed"]) == ""
    assert suggest("rank", []) == ""
