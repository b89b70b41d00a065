"""Work in batches that become smaller when memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from sd_unlearn.errors import OutOfMemory, reason
from sd_unlearn.io.progress import say
from sd_unlearn.models.memory_errors import SMALLER, free_memory, is_out_of_memory

# What to try where one item at a time is too much: with a base, and with the network of a metric.
FOR_BASE = f"Close other programs that use this memory, or use {SMALLER}."
FOR_METRIC = "Close other programs that use this memory, or choose other metrics with --metrics."

Item = TypeVar("Item")
Result = TypeVar("Result")


class HalvingBatches:
    """One kind of work in batches. Once memory has run out, later batches are small enough from the start.

    A smaller size divides the larger one (40, 20, 10, 5, 1), so that the batches are those that the smaller size gives
    from the start, and so are the results.

    doing: what the work is, for messages, e.g. "generating images". hint: what to try if one item at a time is too
    much, as a sentence.
    """

    def __init__(self, doing: str, hint: str = FOR_BASE) -> None:
        self.doing, self.hint = doing, hint
        self.limit: int | None = None  # the largest size that may fit; None: memory has not run out yet

    def map(
        self,
        work: Callable[[Sequence[Item]], Result],
        items: Sequence[Item],
        batch_size: int,
        last_resort: Callable[[], bool] = lambda: False,
    ) -> Iterator[Result]:
        """The results of `work` on consecutive batches of at most `batch_size` items, in order.

        `work` is repeated with fewer items if memory runs out, so it must set the seeds of random numbers itself.

        last_resort: called when one item is too much. Makes the work need less memory and returns True, or returns
        False if it cannot.

        Raises:
            OutOfMemory: memory is too small for one item.
        """
        start, size = 0, self._allowed(batch_size)
        while start < len(items):
            batch = items[start : start + size]
            why = None
            try:
                result = work(batch)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                why = reason(error)
            if why is None:
                start += len(batch)
                yield result
                continue
            free_memory()  # only here, after the except block has released the traceback and the tensors in its frames
            if len(batch) > 1:
                while size >= len(batch):
                    size = smaller(size)
                self.limit = size
                say(f"Out of memory while {self.doing}, {len(batch)} at once: continuing with {size} at once.")
            elif not last_resort():
                raise OutOfMemory(f"Out of memory while {self.doing}, even one at a time ({why}). {self.hint}")

    def _allowed(self, size: int) -> int:
        while self.limit is not None and size > self.limit:
            size = smaller(size)
        return size


def smaller(size: int) -> int:
    """The largest divisor of a size above 1 that is smaller than it: half if it is even."""
    return size // next(factor for factor in range(2, size + 1) if size % factor == 0)
