"""Errors that users can fix: one line with what is wrong, the value, the option and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UnlearnError(Exception):
    """A command failed; the message says what to do. Exit code 1."""

    exit_code = 1


class UsageError(UnlearnError):
    """Invalid user input: a wrong value, name or file. Exit code 2."""

    exit_code = 2


class OutOfMemory(UnlearnError):
    """Memory ran out, and nothing can be made smaller automatically. Exit code 1."""


class ConditionError(UnlearnError):
    """A --fail_if condition holds. Exit code 3."""

    exit_code = 3


def suggest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """' Did you mean "x"?' with the most similar known word, or an empty string if none is similar.

    cutoff: the least similarity, in [0, 1].
    """
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f' Did you mean "{close[0]}"?' if close else ""


def install_command(extra: str) -> str:
    """How to install an extra, in the folder of a clone of the repository: nothing has been released on PyPI."""
    return f"pip install -e '.[{extra}]' -c constraints.txt"


def counted(number: int, noun: str) -> str:
    """'1 task', '2 tasks'."""
    return f"{number:,} {noun if number == 1 else plural(noun)}"


def plural(noun: str) -> str:
    """'tasks' of 'task', 'batches' of 'batch'."""
    return noun + ("es" if noun.endswith("ch") else "s")


def reason(error: BaseException, limit: int = 200) -> str:
    """The reason of an error in one line of at most `limit` characters, without a full stop."""
    system = error.strerror if isinstance(error, OSError) else None
    line = " ".join(str(system or error).split())[:limit].rstrip(". ")
    return line or type(error).__name__
