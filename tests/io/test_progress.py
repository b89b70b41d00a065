"""Progress: a bar on a terminal, a few lines in a log file."""

from __future__ import annotations

import io
import sys

import pytest

from sd_unlearn.io import progress
from sd_unlearn.io.progress import LINE_SECONDS, Progress, track


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, as the only element."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_file_gets_a_line_now_and_then(capsys: pytest.CaptureFixture[str], clock: list[float]) -> None:
    with Progress(500, "train seven", "step") as bar:
        for step in range(500):
            clock[0] += 1
            if step % 10 == 0:
                bar.show(loss="0.5")
            bar.advance()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "train seven: 30 of 500 steps, loss 0.5, 07:50 left"
    assert lines[-1] == "train seven: 500 of 500 steps, loss 0.5, in 08:20"
    assert len(lines) == 500 // LINE_SECONDS + 1


def test_the_speed_of_a_resumed_run_is_that_of_its_new_steps(
    capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    with Progress(100, "train", "step", done=90) as bar:
        clock[0] += LINE_SECONDS
        bar.advance()
    assert capsys.readouterr().err.splitlines()[0] == "train: 91 of 100 steps, 04:30 left"


def test_short_work_is_one_line_and_no_work_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track([1, 2, 3], "read", "image")) == [1, 2, 3]
    assert list(track([], "read", "image")) == []
    assert list(track([1, 2], "read", "image", shown=False)) == [1, 2]
    assert list(track([1, 2], "read", "batch")) == [1, 2]
    assert capsys.readouterr().err == "read: 3 of 3 images, in 00:00\nread: 2 of 2 batches, in 00:00\n"


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with Progress(3, "train", "step") as bar:
        bar.show(loss="0.5")
        bar.message("a line")
        for _ in range(3):
            bar.advance()
    written = terminal.getvalue()
    assert "\r" in written
    assert "3/3" in written
    assert "loss=0.5" in written
    assert "a line\n" in written
    assert "of 3 steps" not in written


class Full(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("stderr", [Full(), None])
def test_a_stderr_that_cannot_be_written_does_not_end_the_work(
    monkeypatch: pytest.MonkeyPatch, stderr: Full | None
) -> None:
    monkeypatch.setattr(sys, "stderr", stderr)
    assert list(track([1, 2], "read", "image")) == [1, 2]
