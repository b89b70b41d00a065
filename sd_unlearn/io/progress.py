"""Progress of long work on stderr: a bar on a terminal; in a log file or notebook, a line now and then."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

from sd_unlearn.errors import plural

LINE_SECONDS = 30.0  # between two lines in a log file
T = TypeVar("T")


class Progress:
    """Counts to `total`. Use it as a context manager, and call `advance` in it.

    title: what is done, e.g. "train seven". unit: what is counted, in the singular. done: what was done before, which
    does not count for the speed. shown: False counts in silence, e.g. in all processes but the first.
    """

    def __init__(self, total: int, title: str, unit: str, *, done: int = 0, shown: bool = True) -> None:
        self.total, self.title, self.unit, self.done, self.before = total, title, unit, done, done
        self.values = ""
        shown = shown and sys.stderr is not None and total > 0
        on_terminal = shown and sys.stderr.isatty()
        self.writes_lines = shown and not on_terminal
        self.bar = tqdm(total=total, initial=done, desc=title, unit=unit, file=sys.stderr, disable=not on_terminal)
        self.started = self.written = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.bar.close()
        if self.writes_lines and self.done > self.before:
            self._write(f"in {tqdm.format_interval(time.monotonic() - self.started)}")

    def advance(self, count: int = 1) -> None:
        self.done += count
        self.bar.update(count)
        now = time.monotonic()
        if self.writes_lines and now - self.written >= LINE_SECONDS and self.done < self.total:
            self.written = now
            left = (now - self.started) * (self.total - self.done) / max(1, self.done - self.before)
            self._write(f"{tqdm.format_interval(left)} left")

    def show(self, **values: str) -> None:
        """Values to show with the progress, e.g. the loss, from now on."""
        self.values = "".join(f", {name} {value}" for name, value in values.items())
        self.bar.set_postfix(values)

    def message(self, text: str) -> None:
        """Write a line of its own."""
        if self.writes_lines:
            _print(text)
        elif not self.bar.disable:
            self.bar.write(text, file=sys.stderr)

    def _write(self, end: str) -> None:
        _print(f"{self.title}: {self.done:,} of {self.total:,} {plural(self.unit)}{self.values}, {end}")


def track(items: Sequence[T], title: str, unit: str, *, shown: bool = True) -> Iterator[T]:
    """Iterate with a Progress."""
    with Progress(len(items), title, unit, shown=shown) as progress:
        for item in items:
            yield item
            progress.advance()


def say(line: str) -> None:
    """Write a line on stderr, above the bars that are shown."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # as in _print; AttributeError: there is no stderr
        tqdm.write(line, file=sys.stderr)


def _print(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # a full or closed stderr must not end hours of work
        print(line, file=sys.stderr, flush=True)
