"""The main table, the tables of variants, and PU compared with Unsupervised; every group is shown somewhere."""

from __future__ import annotations

from typing import Any

import pytest
from pandas import DataFrame
from paper_runs import make_run

from sd_unlearn.paper.tables.groups import summarize
from sd_unlearn.paper.tables.pages import TITLES, comparison, markdown, table_of

UNSUPERVISED, SUPERVISED, PU = ("unsupervised", 0.9, 10.0), ("supervised", 0.95, 13.0), ("pu", 0.98, 10.5)


def runs_of(*values: tuple[str, float, float], seeds: tuple[int, ...] = (1,), **changes: Any) -> list[Any]:
    return [make_run(*value, seed=seed, **changes) for value in values for seed in seeds]


def lines(table: str) -> list[list[str]]:
    """The cells of a Markdown table's lines, its head first."""
    rows = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows if "---" not in row]


def column(table: str, name: str) -> list[str]:
    head, *rest = lines(table)
    return [row[head.index(name)] for row in rest]


def test_main_table_has_a_column_for_each_objective() -> None:
    runs = runs_of(UNSUPERVISED, SUPERVISED, PU) + runs_of(("pu", 0.96, 11.5), seeds=(2,))
    table = table_of("main", summarize(runs))
    assert "**Size tiny, fid-digits**" in table
    head, row = lines(table)
    assert dict(zip(head, row, strict=True)) == {
        "Experiment": "mnist5k-even",
        "Rate, Unsupervised": "0.900 [0.880, 0.917]",
        "Rate, Supervised": "0.950 [0.935, 0.962]",
        "Rate, PU (proposed)": "0.970 (0.014)",
        "fid-digits, Unsupervised": "10.00",
        "fid-digits, Supervised": "13.00",
        "fid-digits, PU (proposed)": "11.00 (0.71)",
        "Seeds": "1 / 1 / 2",
        "Images": "1,000",
        "Training (s)": "180",
    }


def test_a_missing_objective_is_a_dash() -> None:
    table = table_of("main", summarize(runs_of(PU)))
    assert column(table, "Rate, Unsupervised") == ["–"]
    assert column(table, "fid-digits, Supervised") == ["–"]
    assert "nothing to compare, Unsupervised is missing" in table


def test_sizes_and_fids_have_separate_main_tables() -> None:
    runs = (
        runs_of(UNSUPERVISED, PU)
        + runs_of(PU, experiment="cifar10-animals", size="paper", fid_name="fid-inception")
        + runs_of(PU, experiment="mnist5k-odd", size="paper")
        + runs_of(("pu", 0.9, None), experiment="mnist-odd")  # type: ignore[arg-type]
    )
    parts = table_of("main", summarize(runs)).split("**Size ")[1:]
    assert [part.split("**")[0] for part in parts] == [
        "paper, fid-digits",
        "paper, fid-inception",
        "tiny",
        "tiny, fid-digits",
    ]
    assert "fid-inception" not in parts[0]
    assert "fid-digits" not in parts[1]
    assert [column(part, "Experiment") for part in parts] == [
        ["mnist5k-odd"],
        ["cifar10-animals"],
        ["mnist-odd"],
        ["mnist5k-even"],
    ]


def test_other_settings_that_differ_are_part_of_the_row_label() -> None:
    runs = runs_of(UNSUPERVISED, PU) + runs_of(("pu", 0.5, 50.0), max_train_steps=10)
    table = table_of("main", summarize(runs))
    labels, rates = column(table, "Experiment"), column(table, "Rate, PU (proposed)")
    assert dict(zip(labels, (rate[:5] for rate in rates), strict=True)) == {
        "mnist5k-even, max_train_steps 1050": "0.980",
        "mnist5k-even, max_train_steps 10": "0.500",
    }


def test_ratios_of_pu_to_unsupervised_are_checked_against_the_paper() -> None:
    table = table_of("main", summarize(runs_of(UNSUPERVISED, PU)))
    assert "PU leaks 2.0 % against 10.0 %, ratio 0.20 (at most 0.5 is expected: yes)" in table
    assert "fid-digits 10.50 against 10.00, ratio 1.05 (at most 1.1 is expected: yes)" in table
    table = table_of("main", summarize(runs_of(UNSUPERVISED, ("pu", 0.94, 11.5))))
    assert "ratio 0.60 (at most 0.5 is expected: no)" in table
    assert "ratio 1.15 (at most 1.1 is expected: no)" in table


def test_there_is_no_ratio_to_zero() -> None:
    summary = summarize(runs_of(("unsupervised", 1.0, 0.0), PU))
    text = comparison(summary, summary.groups, "fid-digits")
    assert text.startswith("PU leaks 2.0 % against 0.0 %, no ratio;")
    assert text.endswith("no ratio.")


def test_the_beta_table_includes_the_baselines() -> None:
    runs = runs_of(UNSUPERVISED, SUPERVISED, PU)
    assert table_of("beta", summarize(runs)) == ""
    for beta in (0.2, 0.05):
        runs += runs_of(("pu", 0.9 + beta / 10, 12.0), beta=beta)
    runs += runs_of(("pu", 0.97, 10.4), beta=0.093, beta_source="estimated")
    table = table_of("beta", summarize(runs))
    assert "**mnist5k-even, size tiny, true beta 0.091**" in table
    assert column(table, "Objective") == ["Unsupervised", "Supervised", *["PU (proposed)"] * 4]
    assert column(table, "Beta") == ["–", "0.1", "0.05", "0.1", "0.2", "0.093 (estimated)"]
    assert column(table, "Leakage") == ["10.0 %", "5.0 %", "9.5 %", "2.0 %", "8.0 %", "3.0 %"]


def test_the_missing_table_has_the_share_of_each_class_without_labels() -> None:
    runs = runs_of(UNSUPERVISED, PU, shares={"9": 0.01})
    runs += runs_of(("pu", 0.96, 11.0), missing=["9"], shares={"9": 0.034})
    table = table_of("missing", summarize(runs))
    assert column(table, "Labels missing of") == ["–", "none", "9"]
    assert column(table, "Drawn “9”") == ["1.0 %", "1.0 %", "3.4 %"]
    assert "Drawn “7”" not in table


@pytest.mark.parametrize(
    ("view", "change", "name", "cells"),
    [
        ("correction", {"correction": "nn"}, "Correction", ["–", "abs", "nn"]),
        ("bound", {"max_ratio": None}, "Bound", ["–", "none", "4"]),
        ("conditional", {"conditional": True}, "Conditional", ["no", "no", "yes"]),
        ("pnu", {"num_negative": 200, "eta": 0.5}, "Labeled normal", ["0", "0", "200"]),
    ],
)
def test_each_variant_has_a_table_that_includes_the_main_groups(
    view: str, change: dict[str, Any], name: str, cells: list[str]
) -> None:
    table = table_of(view, summarize(runs_of(UNSUPERVISED, PU) + runs_of(PU, **change)))
    assert column(table, name) == cells
    assert not table_of("other", summarize(runs_of(UNSUPERVISED, PU) + runs_of(PU, **change)))


def test_pnu_has_its_own_table_and_is_not_in_the_main_table() -> None:
    groups = summarize(runs_of(PU, ("pnu", 0.99, 10.0), num_negative=0) + runs_of(("pnu", 0.98, 9.0), num_negative=200))
    assert column(table_of("main", groups), "Rate, PU (proposed)") == ["0.980 [0.969, 0.987]"]
    assert column(table_of("pnu", groups), "Objective") == ["PU (proposed)", "PNU", "PNU"]


def test_the_contamination_table_has_given_and_estimated_betas() -> None:
    runs = runs_of(UNSUPERVISED, PU) + runs_of(PU, beta=0.3)
    for share in (0.05, 0.2):
        runs += runs_of(UNSUPERVISED, PU, contamination=share, max_train_steps=int(1000 * (1 + share)))
        runs += runs_of(
            PU, contamination=share, max_train_steps=int(1000 * (1 + share)), beta=share + 0.01, beta_source="estimated"
        )
    table = table_of("contamination", summarize(runs))
    assert column(table, "Contamination") == [*["0.050"] * 3, *["0.091"] * 2, *["0.200"] * 3]
    assert column(table, "Beta") == ["–", "0.1", "0.060 (estimated)", "–", "0.1", "–", "0.1", "0.210 (estimated)"]
    assert column(table, "max_train_steps")[0] == "1050"


def test_every_group_is_in_some_table() -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"beta": 0.2},
        {"correction": "nn"},
        {"correction": "nn", "beta": 0.2},
        {"missing": ["9"]},
        {"num_negative": 9, "eta": 0.2},
        {"conditional": True, "missing": ["7"]},
        {"contamination": 0.3, "beta": 0.3},
        {"max_train_steps": 5},
    ]
    runs = [make_run("pu", 0.9, 10 + i, **change) for i, change in enumerate(changes)]
    text = "\n".join(table_of(name, summarize(runs)) for name in TITLES)
    assert [i for i in range(len(changes)) if f"| {10 + i}.00 |" not in text] == []


def test_different_classifiers_and_data_are_reported() -> None:
    runs = runs_of(UNSUPERVISED, PU)
    assert "Not all" not in table_of("main", summarize(runs))
    runs[0].record.classifier["sha256"] = "other"
    assert "Not all of these were measured with the same classifier." in table_of("main", summarize(runs))
    runs[0].raw["data_sha256"] = "other"
    assert "Not all of these were trained on the same data." in table_of("main", summarize(runs))


def test_cells_cannot_break_the_table() -> None:
    assert markdown(DataFrame({"a|b": ["c\n| d"]})).splitlines() == ["| a\\|b |", "| --- |", "| c \\| d |"]
