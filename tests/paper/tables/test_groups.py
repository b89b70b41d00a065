"""Runs that differ only in their seed form a group with the mean and sample deviation of each metric."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from paper_runs import make_record, make_run, wilson

from sd_unlearn.paper.tables.groups import LEAKAGE, Summary, comparable, summarize, varying
from sd_unlearn.paper.tables.records import RATE, FinishedRun


def test_mean_and_deviation_over_seeds() -> None:
    summary = summarize([make_run("pu", rate, fid, seed=i) for i, (rate, fid) in enumerate([(0.9, 10), (0.94, 14)])])
    rate, fid, leakage = (summary.metric(0, name) for name in (RATE, "fid-digits", LEAKAGE))
    assert (rate["mean"], rate.sd) == pytest.approx((0.92, 0.04 / 2**0.5))
    assert (rate.low, rate.high, rate.seeds, rate.n) == (0.9, 0.94, 2, 1000)
    assert (fid["mean"], fid.sd) == pytest.approx((12, 8**0.5))
    assert (leakage["mean"], leakage.low, leakage.high) == pytest.approx((0.08, 0.06, 0.1))


def test_one_seed_has_its_interval_and_no_deviation() -> None:
    summary = summarize([make_run("pu", 0.98)])
    rate, fid = summary.metric(0, RATE), summary.metric(0, "fid-digits")
    assert np.isnan(rate.sd)
    assert (rate.low, rate.high) == pytest.approx(wilson(0.98, 1000))
    assert np.isnan([fid.sd, fid.low]).all()
    assert summary.metric(0, "fid-inception") is None


def test_an_unknown_value_is_left_out_of_the_mean() -> None:
    summary = summarize([make_run("pu", 0.9, seed=1), make_run("pu", None, seed=2)])
    rate = summary.metric(0, RATE)
    assert (rate["mean"], rate.seeds) == (0.9, 1)


def test_a_run_without_metrics_is_a_group_without_metrics() -> None:
    run = make_run("pu", None, None)
    summary = summarize([dataclasses.replace(run, record=dataclasses.replace(run.record, rows=[]))])
    assert len(summary.groups) == 1
    assert summary.metrics.empty


def count_groups(*runs: FinishedRun) -> int:
    return len(summarize(list(runs)).groups)


@pytest.mark.parametrize(
    "change",
    [
        {"beta": 0.2},
        {"correction": "nn"},
        {"missing": ["9"]},
        {"num_negative": 200},
        {"conditional": True},
        {"contamination": 0.2},
        {"max_train_steps": 10},
        {"size": "paper"},
        {"experiment": "mnist5k-odd"},
        {"mixed_precision": "fp16"},
    ],
)
def test_runs_with_different_settings_are_different_groups(change: dict[str, Any]) -> None:
    assert count_groups(make_run(seed=1), make_run(seed=2)) == 1
    assert count_groups(make_run(seed=1), make_run(seed=2, **change)) == 2


def test_settings_without_meaning_do_not_separate_groups() -> None:
    assert count_groups(make_run("unsupervised", seed=1), make_run("unsupervised", seed=2, correction="nn")) == 1
    assert count_groups(make_run("pu", seed=1), make_run("pu", seed=2, eta=0.5)) == 1  # the weight of no images
    share = make_record()["settings"]["contamination"]
    assert count_groups(make_run(seed=1), make_run(seed=2, contamination=round(share, 4))) == 1
    assert count_groups(make_run(seed=1, ema_decay=None), make_run(seed=2, ema_decay=None, warm=None)) == 1


def test_estimates_of_beta_differ_by_seed_and_form_one_group() -> None:
    runs = [make_run(seed=i, beta=beta, beta_source="estimated") for i, beta in enumerate((0.08, 0.12))]
    assert summarize(runs).mean("assumed_beta").tolist() == [pytest.approx(0.1)]
    assert count_groups(*runs, make_run(seed=9)) == 2


def test_of_two_runs_with_one_seed_the_newer_counts(capsys: pytest.CaptureFixture[str]) -> None:
    old, new = make_run("pu", 0.9, path="old"), make_run("pu", 0.95, path="new")
    new.raw["created"] = "2026-12-01T00:00:00+00:00"
    assert summarize([new, old]).runs.run.tolist() == [new]
    assert "old and new have the same settings and seed" in capsys.readouterr().err
    assert len(summarize([old, make_run("pu", 0.9, path="copy")]).runs) == 1
    assert capsys.readouterr().err == ""  # an equal copy is not reported


def test_groups_are_ordered_by_experiment_and_objective() -> None:
    runs = [
        make_run(objective, experiment=experiment)
        for experiment in ("unheard-of", "celeba-male-ft", "mnist5k-odd", "mnist5k-even")
        for objective in ("pu", "unsupervised", "supervised")
    ]
    groups = summarize(runs).groups
    names = ("mnist5k-even", "mnist5k-odd", "celeba-male-ft", "unheard-of")
    assert list(zip(groups.experiment, groups.objective, strict=True)) == [
        (name, arm) for name in names for arm in ("unsupervised", "supervised", "pu")
    ]


def compared(*runs: FinishedRun) -> list[list[str]]:
    """The objectives of each list of comparable groups."""
    return [list(arms.objective) for arms in comparable(summarize(list(runs)).groups)]


def test_groups_are_compared_if_their_other_settings_agree() -> None:
    runs = [make_run("unsupervised", reduction=None), make_run("supervised"), make_run("pu", max_train_steps=10)]
    assert compared(*runs) == [["unsupervised", "supervised"], ["pu"]]
    runs += [make_run("pu", reduction="sum"), make_run("unsupervised", experiment="mnist5k-odd")]
    lists = [["pu"], ["unsupervised"], ["unsupervised", "pu"], ["unsupervised", "supervised"]]
    assert sorted(compared(*runs)) == lists
    assert comparable(summarize(runs).groups)[-1].experiment.tolist() == ["mnist5k-odd"]


def changed(**settings: Any) -> set[str]:
    """The settings in which one run differs from the main table."""
    (names,) = summarize([make_run(**settings)]).groups.changed
    return names


def test_the_main_bound_is_the_one_of_the_size() -> None:
    assert changed(max_ratio=4.0) == changed(size="paper", max_ratio=None) == set()
    for change in ({"max_ratio": None}, {"max_ratio": 2.0}, {"size": "paper", "max_ratio": 4.0}):
        assert changed(**change) == {"max_ratio"}
    runs = [make_run("supervised"), make_run("unsupervised"), make_run(max_ratio=None), make_run()]
    assert compared(*runs) == [["unsupervised", "supervised", "pu", "pu"]]


def test_varying_names_the_other_settings_that_differ() -> None:
    runs = [make_run(), make_run(learning_rate=1e-3), make_run("unsupervised", reduction=None)]
    assert varying(summarize(runs).groups) == ["learning_rate"]


def true_beta(summary: Summary) -> float | None:
    return summary.true_beta(summary.groups)


def test_true_beta_is_known_if_all_runs_have_the_same() -> None:
    assert true_beta(summarize([make_run()])) == pytest.approx(0.091)
    assert true_beta(summarize([make_run(), make_run(contamination=0.2)])) is None
    assert true_beta(summarize([make_run(contamination=0.0)])) is None


def test_text_to_image_models_have_main_settings_of_their_own() -> None:
    text = {"experiment": "sd-brad-pitt", "conditional": True, "beta": 0.2, "contamination": 0.2}
    assert changed(**text, beta_source="manifest") == set()
    assert changed(**text, beta_source="option") == {"beta"}
