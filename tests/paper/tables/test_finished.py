"""Finished runs are read from run folders and from collected copies; what is damaged or unfinished is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from paper_runs import make_record, make_results

from sd_unlearn.errors import UsageError
from sd_unlearn.io.files import read_json, write_json
from sd_unlearn.paper.tables.finished import PaperRun, collect, read_runs

RUNS = Path("runs/paper")


def test_runs_are_read_with_their_figures() -> None:
    file = make_results(RUNS, "pu", 0.975, 12.5, variant="tiny-pu", seed=3, shares={"9": 0.02})
    (run,) = read_runs(RUNS)
    assert (run.path, run.experiment, run.size, run.seed) == (file, "mnist5k-even", "tiny", 3)
    assert (run.objective, run.variant, run.beta) == ("pu", "tiny-pu", 0.1)
    assert run.rows["non_sensitive_rate", "all"].value == 0.975
    assert run.rows["fid-digits", "all"].value == 12.5
    assert run.rows["share", "9"].value == 0.02


def test_other_files_are_passed_over(capsys: pytest.CaptureFixture[str]) -> None:
    make_results(RUNS)
    write_json(RUNS / "mnist5k-even" / "seen" / "results.json", {"schema_version": 2, "concepts": []})
    (RUNS / "notes.json").write_text("{not json")
    write_json(RUNS / "list.json", [1, 2])
    assert len(read_runs(RUNS)) == 1
    assert capsys.readouterr().err == ""


def test_the_last_of_several_estimates_is_the_beta_of_a_run() -> None:
    make_results(
        RUNS, beta_source="estimated", betas=[{"step": 1, "beta": 0.3}, {"step": 2, "beta": 0.12}], variant="a"
    )
    assert read_runs(RUNS)[0].beta == 0.12


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        (("schema_version",), 2, "schema_version is 2"),
        (("experiment",), "../x", "\"experiment\" is '../x'"),
        (("seed",), "one", '"seed"'),
        (("settings", "objective"), "gan", "settings.objective is 'gan'"),
        (("settings", "beta"), "0.1", "settings.beta is '0.1'"),
        (("settings", "missing"), "9", "settings.missing is '9'"),
        (("settings", "betas"), [{"step": 1}], "settings.betas"),
        (("rows", 0, "value"), 1.5, "rows[0] has 1.5 as a share"),
        (("rows", 1, "value"), float("nan"), "rows[1] needs a finite number"),
        (("rows", 1, "n"), None, "rows[1] needs a whole number as n"),
        (("rows",), {}, '"rows" is missing or not a list'),
        (("cost",), None, '"cost" is missing or not a dict'),
    ],
)
def test_a_damaged_run_is_named_and_hides_no_other(
    path: tuple[Any, ...], value: Any, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make_results(RUNS, variant="good")
    record: Any = make_record()
    part = record
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    bad = RUNS / "mnist5k-even" / "bad" / "results.json"
    write_json(bad, record)
    assert [run.variant for run in read_runs(RUNS)] == ["good"]
    said = capsys.readouterr().err
    assert str(bad) in said
    assert told in said


def test_a_file_cut_short_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    good = make_results(RUNS, variant="good")
    for bad in (RUNS / "mnist5k-even" / "bad" / "results.json", RUNS / "mnist5k-even" / "copied.json"):
        bad.parent.mkdir(exist_ok=True)
        bad.write_text(good.read_text()[:100])
        assert len(read_runs(RUNS)) == 1
        assert str(bad) in capsys.readouterr().err
        bad.unlink()


def test_runs_without_a_record_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    done = make_results(RUNS, variant="done")
    started = RUNS / "mnist5k-odd" / "started"
    started.mkdir(parents=True)
    for folder in (done.parent, started):
        (folder / "config.yaml").write_text("seed: 1\n")
    (done.parent.parent / "tables").mkdir()  # holds no run
    read_runs(RUNS)
    assert capsys.readouterr().err == "Not finished, so not in the tables: 1 (mnist5k-odd/started).\n"


def test_no_folder_says_which_command_makes_one() -> None:
    with pytest.raises(UsageError, match="sd-unlearn paper run mnist5k-even --objective pu"):
        read_runs(Path("nowhere"))


def figures(runs: list[PaperRun]) -> list[tuple[str, str, Any]]:
    return sorted((run.experiment, run.variant, run.record) for run in runs)


def test_copies_are_slim_and_read_as_the_runs_are() -> None:
    first = make_results(RUNS, "pu", variant="a")
    make_results(RUNS, "supervised", experiment="mnist5k-odd", variant="a")
    text = make_record("pu", 0.9, experiment="sd-brad-pitt", size="paper")
    write_json(RUNS / "sd-brad-pitt" / "full" / "paper.json", text)
    write_json(RUNS / "sd-brad-pitt" / "full" / "results.json", {"schema_version": 2})
    (first.parent / "samples.png").write_bytes(b"large")
    runs, target = read_runs(RUNS), Path("docs/runs")
    copies = collect(RUNS, target, runs)
    assert {str(copy.relative_to(target)) for copy in copies} == {
        "mnist5k-even/a.json",
        "mnist5k-odd/a.json",
        "sd-brad-pitt/full.json",
    }
    assert {p for p in target.rglob("*") if p.is_file()} == set(copies)
    assert read_json(target / "mnist5k-even" / "a.json") == read_json(first)
    assert figures(read_runs(target)) == figures(runs)


def test_copies_overwrite_neither_runs_nor_one_another() -> None:
    RUNS.mkdir(parents=True)
    with pytest.raises(UsageError, match="holds no finished run"):
        collect(RUNS, Path("docs"))
    make_results(RUNS, variant="a")
    with pytest.raises(UsageError, match="lie in one another"):
        collect(RUNS, RUNS / "copies")
    make_results(RUNS / "old", "supervised", variant="a")
    with pytest.raises(UsageError, match=r"would both be docs/mnist5k-even/a\.json"):
        collect(RUNS, Path("docs"))
    assert not Path("docs").exists()
