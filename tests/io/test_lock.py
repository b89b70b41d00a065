"""One process at a time works in a folder, and the lock names it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import tree

from sd_unlearn.errors import UnlearnError
from sd_unlearn.io.lock import HOLDER, LOCK, locked

ROOT = str(Path(__file__).parent.parent.parent)
HOLD = """
import sys, time
from pathlib import Path
from sd_unlearn.io.lock import locked
with locked(Path(sys.argv[1]), "--output_dir"):
    print("locked", flush=True)
    time.sleep(60)
"""


@contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock."""
    command = [sys.executable, "-c", HOLD, str(folder), "--concept", "seven"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": ROOT})
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_folder_in_use_is_refused_by_name_and_free_after_a_kill(tmp_path: Path) -> None:
    with holder(tmp_path / "run") as process:
        expected = rf"--output_dir .*run is in use by process {process.pid} on .*--concept seven.*, since 2\d{{3}}-"
        with pytest.raises(UnlearnError, match=expected), locked(tmp_path / "run", "--output_dir"):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert json.loads((tmp_path / "run" / HOLDER).read_text())["pid"] == process.pid
        with locked(tmp_path / "run", "--output_dir"):
            assert json.loads((tmp_path / "run" / HOLDER).read_text())["pid"] == os.getpid()
        assert tree(tmp_path) == {"run"}  # the killed process made it


def test_a_lock_leaves_nothing_but_what_was_written(tmp_path: Path) -> None:
    with locked(tmp_path / "a" / "b", "--output_dir"):
        assert tree(tmp_path / "a" / "b") == {LOCK, HOLDER}
    assert tree(tmp_path) == set()

    def fail() -> None:
        with locked(tmp_path / "a" / "b", "--output_dir"):
            (tmp_path / "a" / "b" / "file").touch()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert tree(tmp_path) == {"a", "a/b", "a/b/file"}


def test_waiting_for_another_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with holder(tmp_path / "run") as process:
        threading.Timer(0.5, process.kill).start()
        started = time.monotonic()
        with locked(tmp_path / "run", "--cache_dir", wait=-1):
            assert time.monotonic() - started > 0.3
    assert f"in use by process {process.pid}" in capsys.readouterr().err


def test_processes_of_one_launch_share_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with locked(tmp_path, "--output_dir"):
        monkeypatch.setenv("RANK", "1")
        with locked(tmp_path, "--output_dir"):
            pass
        assert (tmp_path / LOCK).is_file()


def test_the_link_to_a_folder_is_the_same_folder(tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()
    (tmp_path / "link").symlink_to("big")
    with locked(tmp_path / "link", "--output_dir"):
        with pytest.raises(UnlearnError, match="in use by process"), locked(tmp_path / "big", "--output_dir"):
            pass
