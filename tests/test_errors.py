"""The reason of an error in one line, and suggestions for misspelled words."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from sd_unlearn.errors import install_command, reason, suggest

ROOT = Path(__file__).parent.parent


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


def test_install_command_installs_an_extra_in_a_clone() -> None:
    assert install_command("clip") == "pip install -e '.[clip]' -c constraints.txt"
    assert (ROOT / "constraints.txt").is_file()


def test_every_extra_that_an_error_names_exists() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = [
        extra
        for path in (ROOT / "sd_unlearn").rglob("*.py")
        for extra in re.findall(r"install_command\('(\w+)'\)", path.read_text())
    ]
    assert len(named) > 10
    assert set(named) <= set(extras)
