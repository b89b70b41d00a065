"""Rows of results.json as a CSV table."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sd_unlearn.results import Row


def rows_csv(rows: Iterable[tuple[Mapping[str, Any], Row]], columns: Sequence[str] = ()) -> str:
    """One line per row with every field of Row and unrounded values; a missing value is an empty cell.

    rows: the values of `columns`, which come first, and the row.
    """
    memory = io.StringIO()
    names = [*columns, *(field.name for field in dataclasses.fields(Row))]
    writer = csv.DictWriter(memory, names, lineterminator="\n")
    writer.writeheader()
    for leading, row in rows:
        seeds = " ".join("nan" if value is None else str(value) for value in row.seeds or ())
        writer.writerow({**leading, **dataclasses.asdict(row), "seeds": seeds})
    return memory.getvalue()
