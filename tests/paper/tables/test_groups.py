"""Runs that differ in their seed alone are one group, with the mean and the sample deviation of each figure."""

from __future__ import annotations

from typing import Any

import pytest
from paper_runs import make_record, make_run, wilson

from sd_unlearn.paper.tables.groups import Group, contexts, grouped, true_beta, varying

RATE = "non_sensitive_rate"


def test_mean_and_deviation_over_seeds() -> None:
    (group,) = grouped(make_run("pu", rate, fid, seed=i) for i, (rate, fid) in enumerate([(0.9, 10), (0.94, 14)]))
    rate, fid, leak = group.figure(RATE), group.figure("fid-digits"), group.leakage()
    assert rate
    assert fid
    assert leak
    assert (rate.mean, rate.sd) == pytest.approx((0.92, 0.04 / 2**0.5))
    assert (rate.low, rate.high, rate.seeds, rate.n) == (0.9, 0.94, 2, 1000)
    assert (fid.mean, fid.sd) == pytest.approx((12, 8**0.5))
    assert (leak.mean, leak.low, leak.high) == pytest.approx((0.08, 0.06, 0.1))


def test_one_seed_has_its_interval_and_no_deviation() -> None:
    (group,) = grouped([make_run("pu", 0.98)])
    rate, fid = group.figure(RATE), group.figure("fid-digits")
    assert rate
    assert fid
    assert rate.sd is None
    assert (rate.low, rate.high) == pytest.approx(wilson(0.98, 1000))
    assert (fid.sd, fid.low) == (None, None)
    assert group.figure("fid-inception") is None


def test_a_value_that_is_not_known_is_no_zero() -> None:
    (group,) = grouped([make_run("pu", 0.9, seed=1), make_run("pu", None, seed=2)])
    rate = group.figure(RATE)
    assert rate
    assert (rate.mean, rate.seeds) == (0.9, 1)


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
def test_runs_of_other_settings_are_apart(change: dict[str, Any]) -> None:
    assert len(grouped([make_run(seed=1), make_run(seed=2)])) == 1
    assert len(grouped([make_run(seed=1), make_run(seed=2, **change)])) == 2


def test_what_has_no_meaning_keeps_nothing_apart() -> None:
    assert len(grouped([make_run("unsupervised", seed=1), make_run("unsupervised", seed=2, correction="nn")])) == 1
    assert len(grouped([make_run("pu", seed=1), make_run("pu", seed=2, eta=0.5)])) == 1  # a weight of no images
    share = make_record()["settings"]["contamination"]
    assert len(grouped([make_run(seed=1), make_run(seed=2, contamination=round(share, 4))])) == 1
    assert len(grouped([make_run(seed=1, ema_decay=None), make_run(seed=2, ema_decay=None, warm=None)])) == 1


def test_estimates_of_beta_differ_by_seed_and_belong_together() -> None:
    found = [make_run(seed=i, beta=beta, beta_source="estimated") for i, beta in enumerate((0.08, 0.12))]
    (group,) = grouped(found)
    assert group.beta() == pytest.approx(0.1)
    assert len(grouped([*found, make_run(seed=9)])) == 2


def test_of_two_runs_of_one_seed_the_newest_counts(capsys: pytest.CaptureFixture[str]) -> None:
    old, new = make_run("pu", 0.9, path="old"), make_run("pu", 0.95, path="new")
    new.record["created"] = "2026-12-01T00:00:00+00:00"
    (group,) = grouped([new, old])
    assert group.runs == (new,)
    assert "old and new have the same settings and seed" in capsys.readouterr().err
    assert len(grouped([old, make_run("pu", 0.9, path="copy")])[0].runs) == 1
    assert capsys.readouterr().err == ""  # a copy


def test_order_is_that_of_the_experiments_and_objectives() -> None:
    made = [
        make_run(objective, experiment=experiment)
        for experiment in ("unheard-of", "celeba-male-ft", "mnist5k-odd", "mnist5k-even")
        for objective in ("pu", "unsupervised", "supervised")
    ]
    found = [(group.experiment, group.objective) for group in grouped(made)]
    names = ("mnist5k-even", "mnist5k-odd", "celeba-male-ft", "unheard-of")
    assert found == [(name, arm) for name in names for arm in ("unsupervised", "supervised", "pu")]


def arms_of(found: list[list[Group]]) -> list[list[str]]:
    return [[group.objective for group in arms] for arms in found]


def test_arms_are_compared_where_their_other_settings_agree() -> None:
    made = [make_run("unsupervised", reduction=None), make_run("supervised"), make_run("pu", max_train_steps=10)]
    assert arms_of(contexts(grouped(made))) == [["unsupervised", "supervised"], ["pu"]]
    made += [make_run("pu", reduction="sum"), make_run("unsupervised", experiment="mnist5k-odd")]
    found = contexts(grouped(made))
    assert sorted(arms_of(found)) == [["pu"], ["unsupervised"], ["unsupervised", "pu"], ["unsupervised", "supervised"]]
    assert found[-1][0].experiment == "mnist5k-odd"


def test_a_bound_is_plain_where_it_is_the_sizes_own() -> None:
    def off_plain(**changes: Any) -> set[str]:
        (group,) = grouped([make_run(**changes)])
        return group.off_plain()

    assert off_plain(max_ratio=4.0) == off_plain(size="paper", max_ratio=None) == set()
    for change in ({"max_ratio": None}, {"max_ratio": 2.0}, {"size": "paper", "max_ratio": 4.0}):
        assert off_plain(**change) == {"max_ratio"}
    made = [make_run("supervised"), make_run("unsupervised"), make_run(max_ratio=None), make_run()]
    assert arms_of(contexts(grouped(made))) == [["unsupervised", "supervised", "pu", "pu"]]


def test_what_varies_is_named() -> None:
    groups = grouped([make_run(), make_run(learning_rate=1e-3), make_run("unsupervised", reduction=None)])
    assert varying(groups) == ["learning_rate"]


def test_true_beta_is_told_where_there_is_one() -> None:
    assert true_beta(grouped([make_run()])) == pytest.approx(0.091)
    assert true_beta(grouped([make_run(), make_run(contamination=0.2)])) is None


def test_plain_settings_of_text_models_are_their_own() -> None:
    text = {"experiment": "sd-brad-pitt", "conditional": True, "beta": 0.2, "contamination": 0.2}
    (group,) = grouped([make_run(**text, beta_source="manifest")])
    assert group.off_plain() == set()
    (group,) = grouped([make_run(**text, beta_source="option")])
    assert group.off_plain() == {"beta"}
