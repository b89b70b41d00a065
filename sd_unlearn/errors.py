"""Errors that are the user's to mend: one line that says what, the value, the option and the way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UnlearnError(Exception):
    """Something failed and the message says what to do. Exit code 1."""

    exit_code = 1


class UsageError(UnlearnError):
    """What was asked for cannot be meant: a wrong value, name or file. Exit code 2, nothing was loaded."""

    exit_code = 2


def suggest(word: str, known: Iterable[str]) -> str:
    """' Did you mean "x"?' for a near miss among the known words, else an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f' Did you mean "{close[0]}"?' if close else ""


def reason(error: BaseException, limit: int = 200) -> str:
    """Why something failed, in one line without a full stop: the system's words for an OSError, else the message."""
    system = error.strerror if isinstance(error, OSError) else None
    line = " ".join(str(system or error).split())[:limit].rstrip(". ")
    return line or type(error).__name__
