"""The commit of a training record is the package's own, never that of a repository around an installed package."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from sd_unlearn.training import provenance


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository that holds a copy of the package's layout in site-packages, which it does not track yet."""
    (tmp_path / "README.md").write_text("some other project\n")
    package = tmp_path / ".venv" / "site-packages" / "sd_unlearn"
    (package / "training").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    for command in (["init", "-q"], ["add", "README.md"], ["commit", "-qm", "first"]):
        git(tmp_path, *command)
    monkeypatch.setattr(provenance, "__file__", str(package / "training" / "provenance.py"))
    return tmp_path


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_of_a_surrounding_repository_is_not_reported(repository: Path) -> None:
    assert git(repository, "rev-parse", "HEAD")
    assert provenance.commit() is None


def test_the_commit_of_the_packages_own_repository_is_reported(repository: Path) -> None:
    git(repository, "add", "-f", ".venv")
    git(repository, "commit", "-qm", "track the package")
    assert provenance.commit() == git(repository, "rev-parse", "HEAD")


def test_there_is_no_commit_without_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "sd_unlearn" / "training" / "provenance.py"))
    assert provenance.commit() is None
