"""Group runs that differ only in their seed, and take each metric's mean and deviation over the seeds (pandas)."""

from __future__ import annotations

import json
import math
import statistics
import sys
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pandas as pd
from pandas import DataFrame, Series

from sd_unlearn.paper.experiments import EXPERIMENTS, NAMES
from sd_unlearn.paper.tables.records import OBJECTIVES, RATE, FinishedRun

ESTIMATED, KNOWN, LEAKAGE = "estimated", "known", "leakage"
# `beta_source` of a record -> the value of the beta column; for any other source, the number itself.
SOURCES = {"estimated": ESTIMATED, "estimate": ESTIMATED, "known": KNOWN, "manifest": KNOWN}
AXES = {  # the settings that the paper varies, and their column titles
    "correction": "Correction",
    "beta": "Beta",
    "eta": "Eta",
    "conditional": "Conditional",
    "missing": "Labels missing of",
    "contamination": "Contamination",
    "num_negative": "Labeled normal",
    "max_ratio": "Bound",
}
# Settings that an objective does not use: runs that differ in them alone belong to the same group.
UNUSED: dict[str, set[str]] = {
    "unsupervised": {"correction", "beta", "eta", "missing", "reduction", "max_ratio"},
    "supervised": {"correction", "eta", "max_ratio"},
    "pu": set(),
    "pnu": set(),
}
NOT_OTHER = {"objective", "beta_source", "betas", "seed", *AXES}
SAME_CONTAMINATION = 0.002  # the share of whole images differs a little from the requested one
SCOPE = ["experiment", "size"]  # only groups that share these are compared


@dataclass(frozen=True)
class Summary:
    """Finished runs as three tables."""

    runs: DataFrame  # one row a run: group, seed, assumed_beta, true_beta, seconds, ... and run (FinishedRun)
    groups: DataFrame  # one row a group, in page order: SCOPE, objective, AXES, other (dict), changed (set of AXES)
    metrics: DataFrame  # index (group, metric): mean, sd, low, high, n, seeds

    def mean(self, column: str) -> Series:
        """The mean of a column of `runs` for each group; NaN where no run has a value."""
        known = self.runs.dropna(subset=column)
        return known.groupby("group")[column].agg(statistics.mean).astype(float).reindex(self.groups.index)

    def metric(self, group: int, name: str) -> Any:
        """A row of `metrics`, or None if no run has a value."""
        return self.metrics.loc[(group, name)] if (group, name) in self.metrics.index else None

    def fids(self, groups: DataFrame) -> list[str]:
        """The Fréchet distances that runs of these groups have, e.g. fid-digits."""
        return sorted({name for group, name in self.metrics.index if group in groups.index and name.startswith("fid-")})

    def true_beta(self, groups: DataFrame) -> float | None:
        """The share of sensitive images among the unlabeled ones if all runs have the same, else None."""
        shares = {round(share or 0.0, 3) for share in self.runs.true_beta[self.runs.group.isin(groups.index)]}
        return shares.pop() or None if len(shares) == 1 else None


def summarize(runs: list[FinishedRun]) -> Summary:
    """Group runs by all settings except the seed. Of two runs with equal settings and seed the newer one counts."""
    table = DataFrame([_row(run) for run in runs], dtype=object).sort_values("created", kind="stable")
    for _, equal in table.groupby(["key", "seed"], sort=False):
        for older, newer in pairwise(equal.run):
            if older.raw != newer.raw:
                both = f"{older.path} and {newer.path} have the same settings and seed"
                print(f"{both}: the newer one counts.", file=sys.stderr)
    table = table.drop_duplicates(["key", "seed"], keep="last").sort_values("seed", kind="stable")
    groups = in_order(table.drop_duplicates("key"), ["experiment", "size", "objective", *AXES, "other"])
    table["group"] = pd.Index(groups.key).get_indexer(table.key)
    groups = groups[[*SCOPE, "objective", *AXES, "other", "changed"]].reset_index(drop=True).rename_axis("group")
    return Summary(table.sort_values(["group", "seed"]), groups, _over_seeds(table))


def in_order(groups: DataFrame, columns: list[str]) -> DataFrame:
    """Sort by columns: experiments and objectives in their usual order, unset values and numbers before words."""

    def key(value: Any, column: str) -> str:
        known = {"experiment": NAMES, "objective": OBJECTIVES}.get(column, ())
        if value in known:
            return f"{known.index(value):03d}"
        if value is None or isinstance(value, int | float):
            return f"{value or 0:020.9f}"
        return f"~{'' if value in ('abs', ()) else value}"

    return groups.sort_values(
        columns, key=lambda column: column.map(lambda value: key(value, column.name)), kind="stable"
    )


def comparable(groups: DataFrame) -> list[DataFrame]:
    """Groups of the same experiment and size whose other settings agree, ordered by objective.

    An unsupervised group is part of each list that agrees with it in the settings that it uses.
    """

    def keys(unused: set[str]) -> list[str]:
        return [
            json.dumps({k: v for k, v in o.items() if k not in unused}, sort_keys=True, default=str)
            for o in groups.other
        ]

    keyed = groups.assign(all=keys(set()), used=keys(UNUSED["unsupervised"])).reset_index()
    is_baseline = keyed.objective == "unsupervised"
    others, baselines = keyed[~is_baseline], keyed[is_baseline].drop(columns="all")
    matched = baselines.merge(others[[*SCOPE, "used", "all"]].drop_duplicates(), "left", [*SCOPE, "used"])
    matched["all"] = matched["all"].fillna(matched.used)
    compared = in_order(pd.concat([others, matched]).set_index("group"), SCOPE)
    return [in_order(part, ["objective"]) for _, part in compared.groupby([*SCOPE, "all"], sort=False)]


def varying(groups: DataFrame) -> list[str]:
    """The other settings in which groups differ; groups without the setting do not count."""
    table = DataFrame(list(groups.other), dtype=object)
    return [name for name in table if table[name].dropna().astype(str).nunique() > 1]


def main_settings(experiment: str, size: str) -> dict[str, Any]:
    """The AXES of the main table. max_ratio is the size's own; a text-to-image model is conditional and is given the
    true beta, as in the paper."""
    known = EXPERIMENTS.get(experiment)
    return {
        "correction": "abs",
        "beta": 0.1 if known else KNOWN,
        "eta": 0.0,
        "conditional": known is None,
        "missing": (),
        "contamination": known.counts.contamination if known else 0.0,
        "num_negative": 0,
        "max_ratio": known and known.recipe_of(size).max_ratio or 0.0,  # type: ignore[arg-type]
    }


def _row(run: FinishedRun) -> dict[str, Any]:
    record, settings = run.record, run.record.settings
    unused, usual = UNUSED[settings.objective], main_settings(record.experiment, record.size)
    axes = _axes(run, usual) | dict.fromkeys(unused & set(AXES))
    changed = {name for name, value in axes.items() if value is not None and value != usual[name]}
    ignored = NOT_OTHER | unused
    if record.experiment not in EXPERIMENTS:
        ignored -= {"contamination"}  # it has no default that could be left out
    other = {k: v for k, v in run.raw["settings"].items() if k not in ignored and v is not None}
    about = {"experiment": record.experiment, "size": record.size, "objective": settings.objective}
    return {
        "key": json.dumps([about, axes, other], sort_keys=True, default=str),
        **about,
        **axes,
        "other": other,
        "changed": changed | ({"num_negative"} if settings.objective == "pnu" else set()),
        "seed": record.seed,
        "run": run,
        "assumed_beta": run.beta,
        "true_beta": settings.contamination,
        "seconds": record.cost.get("seconds"),
        "classifier": f"{record.classifier.get('name')} {record.classifier.get('sha256')}",
        "data": str(run.raw.get("data_sha256")),
        "created": str(run.raw.get("created") or ""),
    }


def _axes(run: FinishedRun, usual: dict[str, Any]) -> dict[str, Any]:
    settings = run.record.settings
    axes = {name: usual[name] if (value := getattr(settings, name)) is None else value for name in AXES}
    axes["missing"] = tuple(sorted(axes["missing"]))
    axes["beta"] = SOURCES.get(str(settings.beta_source), axes["beta"])  # an estimate differs by seed
    axes["max_ratio"] = settings.max_ratio or 0.0  # null means no cap, also where the default has one
    if not axes["num_negative"]:
        axes["eta"] = usual["eta"]  # the weight of no images
    near = abs(axes["contamination"] - usual["contamination"]) < SAME_CONTAMINATION
    if near or run.record.experiment not in EXPERIMENTS:
        axes["contamination"] = usual["contamination"]
    return axes


def _over_seeds(runs: DataFrame) -> DataFrame:
    """Mean and sample standard deviation of each metric of each group; unknown values are left out.

    low and high: with one seed its 95 % interval, with several the least and the largest value. n: images of a seed,
    the fewest of any.
    """

    def deviation(values: Series) -> float:
        return statistics.stdev(values) if len(values) > 1 else math.nan

    rows = [
        (row.group, name, m.value, m.low, m.high, m.n)
        for row in runs.sort_values(["group", "seed"]).itertuples()
        for name, m in row.run.metrics.items()
    ]
    columns = ["group", "metric", "value", "least", "largest", "images"]
    by = DataFrame(rows, columns=columns).dropna(subset="value").groupby(["group", "metric"], sort=False)
    table = DataFrame({"mean": by.value.agg(statistics.mean), "sd": by.value.agg(deviation)})
    table["low"] = by.least.min().where(by.size() == 1, by.value.min())
    table["high"] = by.largest.max().where(by.size() == 1, by.value.max())
    table["n"], table["seeds"] = by.images.min(), by.size()
    rate = table[table.index.get_level_values("metric") == RATE].droplevel("metric")
    leakage = rate.assign(mean=1 - rate["mean"], low=1 - rate.high, high=1 - rate.low, metric=LEAKAGE)
    return pd.concat([leakage.set_index("metric", append=True), table])
