"""The page of the paper's experiments is what `paper table` makes of the records beside it."""

from __future__ import annotations

import shutil
from pathlib import Path

from sd_unlearn.paper.experiments import NAMES
from sd_unlearn.paper.tables import table

DOCS = Path(__file__).parents[2] / "docs"


def test_the_pages_tables_are_those_of_its_records(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    copy = Path(shutil.copy(DOCS / "paper.md", tmp_path / "docs"))
    table.run(DOCS / "paper-runs", None, copy)
    assert copy.read_text() == (DOCS / "paper.md").read_text()
    assert "| mnist5k-even |" in copy.read_text()


def test_the_page_names_every_experiment_and_only_pictures_that_are_there() -> None:
    page = (DOCS / "paper.md").read_text()
    for name in NAMES:
        start, _, ending = name.partition("-animals")
        assert f"`{name}`" in page or f"`-animals{ending}`" in page and f"`{start}-vehicles{ending}`" in page
    for line in page.splitlines():
        if line.startswith("!["):
            assert (DOCS / line.partition("](")[2].rstrip(")")).is_file(), line
