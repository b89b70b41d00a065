"""scripts/install with a stand-in for Python: nothing is downloaded."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

INSTALL = Path(__file__).parents[2] / "scripts" / "install"
FAKE = """#!/usr/bin/env bash
echo "$@" >> "{log}"
if [ "$1 $2" = "-m venv" ]; then mkdir -p .venv/bin; cp "$0" .venv/bin/python; fi
"""


@pytest.mark.parametrize("venv", ["none", "without pip", "working"])
def test_a_half_made_environment_is_completed_and_a_working_one_kept(tmp_path: Path, venv: str) -> None:
    (tmp_path / "scripts").mkdir()
    script = shutil.copy(INSTALL, tmp_path / "scripts")
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    log, python = tmp_path / "log", tmp_path / "python"
    python.write_text(FAKE.format(log=log))
    python.chmod(0o755)
    if venv != "none":
        (tmp_path / ".venv" / "bin").mkdir(parents=True)
        (tmp_path / ".venv" / "mine").touch()
        own = Path(shutil.copy(python, tmp_path / ".venv" / "bin" / "python"))
        if venv == "without pip":
            own.write_text("#!/usr/bin/env bash\nexit 1\n")
    for _ in range(2):
        subprocess.run([script, "dev"], env=os.environ | {"PYTHON": str(python)}, check=True, capture_output=True)
    calls = log.read_text().splitlines()
    assert ("-m venv .venv" in calls) == (venv != "working")
    assert sum("install" in call for call in calls) == 1  # the second time there is nothing to do
    assert (tmp_path / ".venv" / "mine").exists() == (venv != "none")
