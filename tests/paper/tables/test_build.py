"""`paper table`: Markdown, CSV, plots and documents come from results.json files alone."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest
from paper_runs import make_many, make_results

from sd_unlearn.errors import UsageError
from sd_unlearn.paper.tables.build import build_tables
from sd_unlearn.paper.tables.document import update_document

RUNS = Path("runs/paper")
PNG = b"\x89PNG\r\n\x1a\n"
DOCUMENT = """# Results

Before.

<!-- table: main -->
old values
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
    text = build_tables(RUNS, out)
    assert (out / "table.md").read_text().startswith(text.rstrip("\n"))
    images = {p.name for p in out.glob("*.png")}
    assert images == {
        "main-tiny-fid-digits.png",
        "main-paper-fid-inception.png",
        "beta-mnist5k-even-tiny-fid-digits.png",
    }
    for name in images:
        assert f"]({name})" in (out / "table.md").read_text()
        assert (out / name).read_bytes().startswith(PNG)
        assert 5_000 < (out / name).stat().st_size < 100_000
    headings = [line[3:] for line in text.splitlines() if line.startswith("## ")]
    assert headings[0] == "Main table"
    assert len(headings) == 8  # every table has runs


def test_by_default_tables_go_into_the_runs_folder_and_are_not_read_as_runs() -> None:
    pytest.importorskip("matplotlib")
    make_sweep()
    first = build_tables(RUNS)
    assert {p.suffix for p in (RUNS / "tables").iterdir()} == {".md", ".csv", ".png"}
    assert build_tables(RUNS) == first


def test_files_of_the_user_with_the_names_of_tables_stay() -> None:
    pytest.importorskip("matplotlib")
    make_sweep()
    for name in ("table.md", "runs.csv", "groups.csv"):
        build_tables(RUNS, Path("out"))  # its own files are replaced
        written = Path("out", name).read_text()
        Path("out", name).write_text("experiment, my own notes\n")
        with pytest.raises(UsageError, match=f"--output_dir out holds {name}, which sd-unlearn did not write"):
            build_tables(RUNS, Path("out"))
        assert Path("out", name).read_text() == "experiment, my own notes\n"
        Path("out", name).write_text(written)


def test_csv_files_have_a_line_for_each_run_and_each_group() -> None:
    pytest.importorskip("matplotlib")
    make_sweep()
    make_results(RUNS, "pu", 0.97, 12.0, missing=["7", "9"], shares={"9": 0.05}, variant="missing")
    build_tables(RUNS, Path("out"))
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
    main_group = next(group for group in groups if (group["beta"], group["missing"]) == ("0.1", ""))
    assert main_group["objective"] == "pu"
    assert main_group["seeds"] == "1;2"
    assert float(main_group["non_sensitive_rate_mean"]) == pytest.approx(0.9515)
    assert float(main_group["non_sensitive_rate_sd"]) == pytest.approx(0.001 / 2**0.5)
    assert float(main_group["leakage_mean"]) == pytest.approx(0.0485)
    unsupervised = next(group for group in groups if group["objective"] == "unsupervised")
    assert (unsupervised["beta"], unsupervised["fid-digits_sd"], float(unsupervised["fid-digits_mean"])) == ("", "", 10)


def test_collected_results_give_the_same_tables() -> None:
    pytest.importorskip("matplotlib")
    make_many(RUNS)
    before = build_tables(RUNS, target=Path("docs/runs"))
    assert build_tables(Path("docs/runs"), Path("out")) == before
    assert not (RUNS / "tables").exists()


def test_without_runs_the_error_names_the_command_to_run() -> None:
    RUNS.mkdir(parents=True)
    with pytest.raises(UsageError, match="holds no finished run.*sd-unlearn paper run mnist5k-even --objective pu"):
        build_tables(RUNS, Path("out"))
    assert not Path("out").exists()


def test_missing_matplotlib_is_an_error_with_output_dir_and_skips_plots_without(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_sweep()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"pip install -e '\.\[paper\]'"):
        build_tables(RUNS, Path("out"))
    assert not Path("out").exists()
    build_tables(RUNS)
    assert {p.suffix for p in (RUNS / "tables").iterdir()} == {".md", ".csv"}
    assert "No plots" in capsys.readouterr().err


def test_importing_the_module_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'matplotlib', 'pandas', 'numpy'}"
    code = f"import sys, sd_unlearn.paper.tables.build; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_missing_pandas_is_an_error_with_the_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    make_sweep()
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UsageError, match=r"need pandas: pip install -e '\.\[paper\]'"):
        build_tables(RUNS)
    assert not (RUNS / "tables").exists()


def test_a_run_without_metrics_has_tables_of_dashes() -> None:
    make_results(RUNS, "pu", None, None)
    make_results(RUNS, "pu", None, None, correction="nn")
    text = build_tables(RUNS)
    assert "| PU (proposed) | 4 | nn | – | – | 1 | – | 180 |" in text
    assert "nothing to compare, Unsupervised is missing." in text


# -- documents --


def test_a_document_gets_its_tables_and_is_otherwise_unchanged(document: Path) -> None:
    make_sweep()
    text = build_tables(RUNS, update=document)
    content = document.read_text()
    assert content.startswith("# Results\n\nBefore.\n\n<!-- table: main -->\n\n**Size tiny")
    assert content.endswith("<!-- end: beta:mnist5k-even -->\n\nAfter.\n")
    assert "old values" not in content
    for row in (line for line in text.splitlines() if line.startswith("|")):
        assert row in content
    build_tables(RUNS, update=document)
    assert document.read_text() == content  # updating again changes nothing
    assert not (RUNS / "tables").exists()


def test_a_table_without_runs_is_reported_and_left_unchanged(
    document: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_results(RUNS, "pu")
    make_results(RUNS, "pu", correction="nn")
    build_tables(RUNS, update=document)
    errors = capsys.readouterr().err
    assert "no finished run for <!-- table: beta:mnist5k-even -->; it is left unchanged" in errors
    assert "has no markers for: correction." in errors


def test_a_plot_that_a_document_shows_is_updated(document: Path) -> None:
    pytest.importorskip("matplotlib")
    make_sweep()
    Path("images").mkdir()
    shown, other = Path("images/main-tiny-fid-digits.png"), Path("images/cat.png")
    for image in (shown, other):
        image.write_bytes(b"old")
    document.write_text(f"{DOCUMENT}\n![Plot]({shown})\n\n![A cat]({other})\n")
    build_tables(RUNS, update=document)
    assert shown.read_bytes().startswith(PNG)
    assert other.read_bytes() == b"old"
    assert not Path("images/beta-mnist5k-even-tiny-fid-digits.png").exists()


def test_tables_are_inserted_literally_and_idempotently(document: Path) -> None:
    block = "| a\\1 | \\g<0> |\n| --- | --- |"
    update_document(document, {"main": block})
    once = document.read_text()
    assert f"<!-- table: main -->\n\n{block}\n\n<!-- end: main -->" in once
    update_document(document, {"main": block})
    assert document.read_text() == once


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing", "<!-- table: main --> 0 times"),
        ("<!-- table: main -->", "<!-- end: main --> 0 times"),
        ("<!-- table: main --><!-- table: main --><!-- end: main -->", "<!-- table: main --> 2 times"),
        ("<!-- end: main --><!-- table: main -->", "must follow"),
        ("<!-- table: main --><!-- table: beta --><!-- end: main --><!-- end: beta -->", "before any other"),
    ],
)
def test_a_document_with_wrong_markers_is_rejected_and_unchanged(text: str, message: str) -> None:
    path = Path("paper.md")
    path.write_text(text)
    with pytest.raises(UsageError) as error:
        update_document(path, {"main": "values"})
    assert message in str(error.value)
    assert path.read_text() == text


def test_a_document_is_checked_before_anything_is_written(document: Path) -> None:
    make_sweep()
    for text, message in (("no markers", "has no place for a table"), ("<!-- table: bata -->", 'Did you mean "beta"')):
        document.write_text(text)
        with pytest.raises(UsageError, match=message):
            build_tables(RUNS, Path("out"), document)
        assert not Path("out").exists()
    with pytest.raises(UsageError, match="--update nowhere.md cannot be read"):
        build_tables(RUNS, update=Path("nowhere.md"))
