"""Finished runs are read from run folders and from collected copies; damaged and unfinished ones are reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from paper_runs import make_record, make_results, make_row

from sd_unlearn.errors import UsageError
from sd_unlearn.io.files import write_json
from sd_unlearn.io.reading import read_json
from sd_unlearn.paper.tables.records import RATE, FinishedRun, collect, read_runs

RUNS = Path("runs/paper")


def test_runs_are_read_with_their_metrics() -> None:
    file = make_results(RUNS, "pu", 0.975, 12.5, variant="tiny-pu", seed=3, shares={"9": 0.02})
    (run,) = read_runs(RUNS)
    record = run.record
    assert (run.path, record.experiment, record.size, record.seed) == (file, "mnist5k-even", "tiny", 3)
    assert (record.settings.objective, run.variant, run.beta) == ("pu", "tiny-pu", 0.1)
    assert run.metrics["non_sensitive_rate"].value == 0.975
    assert run.metrics["fid-digits"].value == 12.5
    assert run.metrics["share_9"].value == 0.02


def test_the_first_of_two_equal_metrics_counts() -> None:
    record = make_record("pu", 0.9)
    write_json(RUNS / "mnist5k-even" / "a" / "results.json", record | {"rows": [*record["rows"], make_row(RATE, 0.1)]})
    (run,) = read_runs(RUNS)
    assert [(name, row.value) for name, row in run.metrics.items()] == [(RATE, 0.9), ("fid-digits", 12.0)]


def test_other_files_are_ignored(capsys: pytest.CaptureFixture[str]) -> None:
    make_results(RUNS)
    write_json(RUNS / "mnist5k-even" / "seen" / "results.json", {"schema_version": 2, "concepts": []})
    (RUNS / "notes.json").write_text("{not json")
    write_json(RUNS / "list.json", [1, 2])
    assert len(read_runs(RUNS)) == 1
    assert capsys.readouterr().err == ""


def test_the_last_estimate_is_the_beta_of_a_run() -> None:
    make_results(
        RUNS, beta_source="estimated", betas=[{"step": 1, "beta": 0.3}, {"step": 2, "beta": 0.12}], variant="a"
    )
    assert read_runs(RUNS)[0].beta == 0.12


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("schema_version",), 2, "schema_version must be 1, not 2"),
        (("experiment",), "../x", 'experiment "../x" must consist of lowercase letters, digits, - and _'),
        (("seed",), "one", "seed must be a valid integer, not 'one'"),
        (("settings", "objective"), "gan", "settings.objective must be 'unsupervised', 'supervised', 'pu' or 'pnu'"),
        (("settings", "beta"), "0.1", "settings.beta must be a valid number, not '0.1'"),
        (("settings", "missing"), "9", "settings.missing must be a list, not '9'"),
        (("settings", "betas"), [{"step": 1}], 'needs the key "beta" in settings.betas[0]'),
        (("rows", 0, "value"), 1.5, "rows[0] has 1.5 as non_sensitive_rate, which must lie in [0, 1]"),
        (("rows", 1, "value"), float("nan"), "rows[1].value must be a finite number"),
        (("rows", 1, "n"), None, "rows[1].n must be a valid integer, not None"),
        (("rows",), {}, "rows must be a list, not {}"),
        (("rows",), [["deep"]], "rows[0] must hold keys and values, not ['deep']"),
        (("settings",), [], "settings must hold keys and values, not []"),
        (("cost",), None, "cost must hold keys and values, not None"),
    ],
)
def test_a_damaged_record_is_reported_and_the_others_are_read(
    path: tuple[Any, ...], value: Any, message: str, capsys: pytest.CaptureFixture[str]
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
    errors = capsys.readouterr().err
    assert errors.startswith(f"Skipped: {bad}: ")
    assert message in errors
    assert len(errors.splitlines()) == 1


def test_a_truncated_file_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    good = make_results(RUNS, variant="good")
    for bad in (RUNS / "mnist5k-even" / "bad" / "results.json", RUNS / "mnist5k-even" / "copied.json"):
        bad.parent.mkdir(exist_ok=True)
        bad.write_text(good.read_text()[:100])
        assert len(read_runs(RUNS)) == 1
        assert str(bad) in capsys.readouterr().err
        bad.unlink()


def test_unfinished_runs_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    done = make_results(RUNS, variant="done")
    started = RUNS / "mnist5k-odd" / "started"
    started.mkdir(parents=True)
    for folder in (done.parent, started):
        (folder / "config.yaml").write_text("seed: 1\n")
    (done.parent.parent / "tables").mkdir()  # not a run
    read_runs(RUNS)
    assert capsys.readouterr().err == "Not finished, so not in the tables: 1 (mnist5k-odd/started).\n"


def test_a_missing_folder_is_an_error_with_the_command_to_run() -> None:
    with pytest.raises(UsageError, match="sd-unlearn paper run mnist5k-even --objective pu"):
        read_runs(Path("nowhere"))


def contents(runs: list[FinishedRun]) -> list[tuple[str, str, Any]]:
    return sorted((run.record.experiment, run.variant, run.raw) for run in runs)


def test_copies_hold_only_the_records_and_read_like_the_runs() -> None:
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
    assert contents(read_runs(target)) == contents(runs)


def test_copies_never_overwrite_runs_or_each_other() -> None:
    RUNS.mkdir(parents=True)
    with pytest.raises(UsageError, match="holds no finished run"):
        collect(RUNS, Path("docs"), read_runs(RUNS))
    make_results(RUNS, variant="a")
    with pytest.raises(UsageError, match="must not lie inside each other"):
        collect(RUNS, RUNS / "copies", read_runs(RUNS))
    make_results(RUNS / "old", "supervised", variant="a")
    with pytest.raises(UsageError, match=r"would both be copied to docs/mnist5k-even/a\.json"):
        collect(RUNS, Path("docs"), read_runs(RUNS))
    assert not Path("docs").exists()
