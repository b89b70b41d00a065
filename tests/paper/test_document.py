"""docs/paper.md shows the tables that `paper table` builds from docs/paper-runs."""

from __future__ import annotations

import shutil
from pathlib import Path

from sd_unlearn.paper.experiments import NAMES
from sd_unlearn.paper.tables.build import build_tables

DOCS = Path(__file__).parents[2] / "docs"


def test_the_tables_of_the_page_are_up_to_date(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    copy = Path(shutil.copy(DOCS / "paper.md", tmp_path / "docs"))
    build_tables(DOCS / "paper-runs", None, copy)
    assert copy.read_text() == (DOCS / "paper.md").read_text()
    assert "| mnist5k-even |" in copy.read_text()


def test_the_page_names_every_experiment_and_its_images_exist() -> None:
    page = (DOCS / "paper.md").read_text()
    for name in NAMES:
        start, _, ending = name.partition("-animals")
        assert f"`{name}`" in page or f"`-animals{ending}`" in page and f"`{start}-vehicles{ending}`" in page
    for line in page.splitlines():
        if line.startswith("!["):
            assert (DOCS / line.partition("](")[2].rstrip(")")).is_file(), line
