"""`paper table`: Markdown, CSV, plots and documents come from results.json files alone."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest
from paper_runs import make_many, make_results

from sd_unlearn.errors import UsageError
from sd_unlearn.paper.tables import table

RUNS = Path("runs/paper")
PNG = b"\x89PNG\r\n\x1a\n"
DOCUMENT = """# Results

Before.

<!-- table: main -->
old figures
<!-- end: main -->

Between.

<!-- table: beta:mnist5k-even -->
<!-- end: beta:mnist5k-even -->

After.
"""


@pytest.fixture
def document() -> Path:
    path = Path("paper.md")
    path.write_text(DOCUMENT)
    return path


def make_sweep() -> None:
    make_results(RUNS, "unsupervised", 0.9, 10.0, seed=1)
    for beta in (0.05, 0.1):
        for seed in (1, 2):
            make_results(RUNS, "pu", 0.9 + beta / 2 + seed / 1000, 11.0, beta=beta, seed=seed)


def test_files_are_written_and_the_markdown_returned() -> None:
    pytest.importorskip("matplotlib")
    make_many(RUNS)
    out = Path("out")
    text = table.run(RUNS, out)
    assert (out / "table.md").read_text().startswith(text.rstrip("\n"))
    pictures = {p.name for p in out.glob("*.png")}
    assert pictures == {
        "main-tiny-fid-digits.png",
        "main-paper-fid-inception.png",
        "beta-mnist5k-even-tiny-fid-digits.png",
    }
    for name in pictures:
        assert f"]({name})" in (out / "table.md").read_text()
        assert (out / name).read_bytes().startswith(PNG)
        assert 5_000 < (out / name).stat().st_size < 100_000
    headings = [line[3:] for line in text.splitlines() if line.startswith("## ")]
    assert headings[0] == "The main table"
    assert len(headings) == 8  # every view has runs


def test_without_a_place_they_lie_beside_the_runs_and_are_not_read_as_such() -> None:
    pytest.importorskip("matplotlib")
    make_sweep()
    first = table.run(RUNS)
    assert {p.suffix for p in (RUNS / "tables").iterdir()} == {".md", ".csv", ".png"}
    assert table.run(RUNS) == first


def test_csv_has_a_line_a_run_and_a_line_a_group() -> None:
    pytest.importorskip("matplotlib")
    make_sweep()
    make_results(RUNS, "pu", 0.97, 12.0, missing=["7", "9"], shares={"9": 0.05}, variant="missing")
    table.run(RUNS, Path("out"))
    with Path("out/runs.csv").open(newline="") as file:
        runs = list(csv.DictReader(file))
    with Path("out/groups.csv").open(newline="") as file:
        groups = list(csv.DictReader(file))
    assert len(runs) == 6
    missing = next(run for run in runs if run["missing"])
    assert (missing["missing"], float(missing["share_9"]), missing["file"]) == (
        "7;9",
        0.05,
        "mnist5k-even/missing/results.json",
    )
    assert (float(missing["non_sensitive_rate"]), int(missing["non_sensitive_rate_n"])) == (0.97, 1000)
    assert float(missing["cost_seconds"]) == 180
    plain = next(group for group in groups if (group["beta"], group["missing"]) == ("0.1", ""))
    assert plain["objective"] == "pu"
    assert plain["seeds"] == "1;2"
    assert float(plain["non_sensitive_rate_mean"]) == pytest.approx(0.9515)
    assert float(plain["non_sensitive_rate_sd"]) == pytest.approx(0.001 / 2**0.5)
    assert float(plain["leakage_mean"]) == pytest.approx(0.0485)
    unsupervised = next(group for group in groups if group["objective"] == "unsupervised")
    assert (unsupervised["beta"], unsupervised["fid-digits_sd"], float(unsupervised["fid-digits_mean"])) == ("", "", 10)


def test_collected_results_give_the_same_tables() -> None:
    pytest.importorskip("matplotlib")
    make_many(RUNS)
    before = table.run(RUNS, target=Path("docs/runs"))
    assert table.run(Path("docs/runs"), Path("out")) == before
    assert not (RUNS / "tables").exists()


def test_no_runs_say_which_command_makes_one() -> None:
    RUNS.mkdir(parents=True)
    with pytest.raises(UsageError, match="holds no finished run.*sd-unlearn paper run mnist5k-even --objective pu"):
        table.run(RUNS, Path("out"))
    assert not Path("out").exists()


def test_no_matplotlib_is_said_before_anything_and_tables_come_without(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_sweep()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"pip install 'sd-unlearn\[paper\]'"):
        table.run(RUNS, Path("out"))
    assert not Path("out").exists()
    table.run(RUNS)
    assert {p.suffix for p in (RUNS / "tables").iterdir()} == {".md", ".csv"}
    assert "No plots" in capsys.readouterr().err


def test_neither_torch_nor_matplotlib_is_imported_with_the_module() -> None:
    code = "import sys, sd_unlearn.paper.table; print({'torch', 'matplotlib', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# -- documents --


def test_a_document_gets_its_tables_and_keeps_the_rest(document: Path) -> None:
    make_sweep()
    text = table.run(RUNS, update=document)
    found = document.read_text()
    assert found.startswith("# Results\n\nBefore.\n\n<!-- table: main -->\n\n**Size tiny")
    assert found.endswith("<!-- end: beta:mnist5k-even -->\n\nAfter.\n")
    assert "old figures" not in found
    for row in (line for line in text.splitlines() if line.startswith("|")):
        assert row in found
    table.run(RUNS, update=document)
    assert document.read_text() == found  # once more changes nothing
    assert not (RUNS / "tables").exists()


def test_a_table_without_runs_is_left_and_that_is_said(document: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_results(RUNS, "pu")
    make_results(RUNS, "pu", correction="nn")
    table.run(RUNS, update=document)
    said = capsys.readouterr().err
    assert "no run has anything for <!-- table: beta:mnist5k-even -->; left as it is" in said
    assert "has no place for: correction." in said


def test_a_plot_that_a_document_shows_is_drawn_again(document: Path) -> None:
    pytest.importorskip("matplotlib")
    make_sweep()
    Path("pictures").mkdir()
    shown, other = Path("pictures/main-tiny-fid-digits.png"), Path("pictures/cat.png")
    for picture in (shown, other):
        picture.write_bytes(b"old")
    document.write_text(f"{DOCUMENT}\n![Figures]({shown})\n\n![A cat]({other})\n")
    table.run(RUNS, update=document)
    assert shown.read_bytes().startswith(PNG)
    assert other.read_bytes() == b"old"
    assert not Path("pictures/beta-mnist5k-even-tiny-fid-digits.png").exists()


def test_blocks_are_replaced_word_for_word_and_idempotently(document: Path) -> None:
    block = "| a\\1 | \\g<0> |\n| --- | --- |"
    table.update_document(document, {"main": block})
    once = document.read_text()
    assert f"<!-- table: main -->\n\n{block}\n\n<!-- end: main -->" in once
    table.update_document(document, {"main": block})
    assert document.read_text() == once


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("nothing", "<!-- table: main --> 0 times"),
        ("<!-- table: main -->", "<!-- end: main --> 0 times"),
        ("<!-- table: main --><!-- table: main --><!-- end: main -->", "<!-- table: main --> 2 times"),
        ("<!-- end: main --><!-- table: main -->", "must follow"),
        ("<!-- table: main --><!-- table: beta --><!-- end: main --><!-- end: beta -->", "before any other"),
    ],
)
def test_a_document_whose_markers_are_wrong_is_refused_and_kept(text: str, told: str) -> None:
    path = Path("paper.md")
    path.write_text(text)
    with pytest.raises(UsageError) as error:
        table.update_document(path, {"main": "figures"})
    assert told in str(error.value)
    assert path.read_text() == text


def test_a_document_is_checked_before_anything_is_written(document: Path) -> None:
    make_sweep()
    for text, told in (("no markers", "has no place for a table"), ("<!-- table: bata -->", 'Did you mean "beta"')):
        document.write_text(text)
        with pytest.raises(UsageError, match=told):
            table.run(RUNS, Path("out"), document)
        assert not Path("out").exists()
    with pytest.raises(UsageError, match="--update nowhere.md cannot be read"):
        table.run(RUNS, update=Path("nowhere.md"))
