"""The tables of a page as Markdown: the main table, and one for each setting that the paper varies."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pandas as pd
from pandas import DataFrame, Series

from sd_unlearn.paper.experiments import EXPERIMENTS
from sd_unlearn.paper.tables.groups import (
    AXES,
    ESTIMATED,
    KNOWN,
    LEAKAGE,
    SCOPE,
    Summary,
    comparable,
    in_order,
    varying,
)
from sd_unlearn.paper.tables.records import CLASS_SHARE, OBJECTIVES, RATE
from sd_unlearn.report.formatting import number
from sd_unlearn.results import Row

MAX_LEAKAGE_RATIO, MAX_FID_RATIO = 0.5, 1.1  # PU against Unsupervised in the paper: far less leakage, similar FID
MAIN_OBJECTIVES = OBJECTIVES[:3]  # columns of the main table
LABELS = {"unsupervised": "Unsupervised", "supervised": "Supervised", "pu": "PU (proposed)", "pnu": "PNU"}
NONE = "–"
COUNTS = ["Seeds", "Images", "Training (s)"]
LEGEND = (
    "Rate: the share of generated images that the classifier assigns to a normal class (non-sensitive rate); leakage "
    "is one minus the rate. Values are means over seeds, with the sample standard deviation in round brackets. With "
    "one seed, the rate has its 95 % Wilson interval in square brackets instead: it covers the sampling of images, not "
    "the variation between trainings. Unless a column says otherwise, the settings are those of the main table: "
    "correction abs, beta 0.1, the default cap (Bound) of the size, labels for every sensitive class, no labeled "
    "normal images, an unconditional model, and the experiment's own share of sensitive images among the unlabeled "
    "ones. Text-to-image models are conditional and are given the true beta."
)


MAIN, OTHER = "main", "other"
# Tables of groups that differ from the main table: title, the setting of which some group must differ, and the order of
# the rows, which names all settings that may differ.
VARIANTS: dict[str, tuple[str, str, list[str]]] = {
    "beta": ("The assumed beta", "beta", ["objective", "beta"]),
    "bound": ("The cap on the loss of labeled images", "max_ratio", ["objective", "max_ratio"]),
    "correction": ("The correction of the bracket", "correction", ["objective", "max_ratio", "correction"]),
    "missing": ("Sensitive classes without labels", "missing", ["objective", "missing"]),
    "pnu": ("Labeled normal images (PNU)", "num_negative", ["objective", "num_negative", "eta"]),
    "conditional": ("Conditional on the class", "conditional", ["conditional", "objective"]),
    "contamination": (
        "The share of sensitive images among the unlabeled ones",
        "contamination",
        ["contamination", "objective", "beta"],
    ),
}
TITLES = {MAIN: "Main table", **{name: title for name, (title, _, _) in VARIANTS.items()}, OTHER: "Other settings"}


def page(summary: Summary) -> str:
    """All tables that have rows, each under its heading."""
    tables = [(title, table_of(name, summary)) for name, title in TITLES.items()]
    parts = [f"## {title}\n\n{table}" for title, table in tables if table]
    return "\n\n".join(["# Results of the paper's experiments", LEGEND, *parts]) + "\n"


def table_of(name: str, summary: Summary, experiment: str = "") -> str:
    """The Markdown of a table by its name (a key of TITLES), without heading; "" if it has no rows.

    experiment: only the groups of this one.
    """
    groups = summary.groups
    groups = groups[groups.experiment == experiment] if experiment else groups
    if name == MAIN:
        return _main_tables(summary, groups)
    compared = [select(name, part) for _, part in groups.groupby(SCOPE, sort=False)]
    return "\n\n".join(_variants_table(summary, name, rows) for rows in compared if len(rows))


def select(name: str, groups: DataFrame) -> DataFrame:
    """The rows of a table of one experiment and size, those of the main table included; empty without others."""
    if name == OTHER:
        shown = {index for variant in VARIANTS for index in select(variant, groups).index}
        rows = groups[[index not in shown or not changed for index, changed in groups.changed.items()]]
        return in_order(rows, ["objective", *AXES]) if rows.changed.any() else rows[:0]
    _, axis, order = VARIANTS[name]
    rows = groups[[changed <= set(order) for changed in groups.changed]]
    if name == "contamination":  # beta is swept in a table of its own
        not_swept = rows.beta.isin([None, 0.1, ESTIMATED, KNOWN])
        rows = rows[not_swept | rows.changed.map(lambda changed: "contamination" in changed).astype(bool)]
    return in_order(rows, order) if any(axis in changed for changed in rows.changed) else rows[:0]


def cells(summary: Summary) -> DataFrame:
    """One row a group, as text: a column for each metric, LEAKAGE, and COUNTS."""
    texts = [metric_text(name, value) for (_, name), value in summary.metrics.iterrows()]
    table = Series(texts, summary.metrics.index, dtype=object).unstack("metric").reindex(summary.groups.index)
    table = table.reindex(columns=table.columns.union([RATE, LEAKAGE]))
    table["Seeds"] = summary.runs.groupby("group").size().map(str)
    table["Images"] = summary.metrics.n.unstack("metric").get(RATE, Series()).dropna().map("{:,.0f}".format)
    table["Training (s)"] = summary.mean("seconds").dropna().map("{:,.0f}".format)
    return table.fillna(NONE)


def metric_text(name: str, value: Any) -> str:
    """A metric's mean with its deviation or interval. value: a row of Summary.metrics."""
    if name == LEAKAGE or name.startswith(f"{CLASS_SHARE}_"):
        return percent(value)
    if name != RATE:
        return distance(value) + (f" ({value.sd:.{_digits(value)}f})" if value.seeds > 1 else "")
    if value.seeds > 1:
        return f"{value['mean']:.3f} ({value.sd:.3f})"
    interval = "" if pd.isna(value.low) or pd.isna(value.high) else f" [{value.low:.3f}, {value.high:.3f}]"
    return f"{value['mean']:.3f}{interval}"


def percent(value: Any) -> str:
    return number(value["mean"], Row(RATE, "all", "", value["mean"], int(value.n), interval="wilson"))


def distance(value: Any) -> str:
    return f"{value['mean']:.{_digits(value)}f}"


def _digits(value: Any) -> int:
    return 1 if value["mean"] >= 100 else 2 if value["mean"] >= 1 else 3


def setting_text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(setting_text, value)) or "none"
    return NONE if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def markdown(table: DataFrame) -> str:
    """A DataFrame of texts, without its index."""
    lines = [
        [" ".join(str(cell).replace("|", "\\|").split()) for cell in row] for row in (table.columns, *table.to_numpy())
    ]
    head, *rows = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([head, "|" + " --- |" * table.shape[1], *rows])


def label_of(compared: DataFrame, among: Iterable[DataFrame]) -> str:
    """An experiment's name, followed by the other settings in which groups of that experiment differ."""
    first = compared.iloc[0]
    alike = pd.concat([other for other in among if (other.iloc[0][SCOPE] == first[SCOPE]).all()])
    other = {name: value for settings in compared.other for name, value in settings.items()}
    return ", ".join([first.experiment, *(f"{name} {setting_text(other.get(name))}" for name in varying(alike))])


def _main_tables(summary: Summary, groups: DataFrame) -> str:
    """Experiments against objectives at the main settings: one table for each size and FID."""
    tables = sorted(main_rows(summary, groups).items())
    return "\n\n".join(_main_table(summary, size, fid, compared) for (size, fid), compared in tables)


def main_rows(summary: Summary, groups: DataFrame) -> dict[tuple[str, str], list[DataFrame]]:
    """(size, FID) -> the comparable groups at the main settings, one list for each row of a main table."""
    rows: dict[tuple[str, str], list[DataFrame]] = {}
    for compared in comparable(groups[~groups.changed.map(bool)]):
        for fid in summary.fids(compared) or [""]:
            rows.setdefault((compared.iloc[0]["size"], fid), []).append(compared)
    return rows


def _main_table(summary: Summary, size: str, fid: str, lines: list[DataFrame]) -> str:
    texts, rows, checks = cells(summary), [], []
    metrics = {"Rate": RATE} | ({fid: fid} if fid else {})
    for compared in lines:
        label = label_of(compared, lines)
        by = texts.loc[compared.index].set_axis(compared.objective).reindex(MAIN_OBJECTIVES).fillna(NONE)
        row = {"Experiment": label}
        row |= {f"{title}, {LABELS[name]}": by.loc[name, key] for title, key in metrics.items() for name in by.index}
        rows.append(row | {name: _agreed(by[name]) for name in COUNTS})
        checks.append(f"- {label}: {comparison(summary, compared, fid)}{caution(summary, compared)}")
    return "\n".join([f"**Size {size}{f', {fid}' if fid else ''}**", "", markdown(DataFrame(rows)), "", *checks])


def _agreed(texts: Series) -> str:
    """The text that the objectives share, else each objective's text."""
    known = set(texts) - {NONE} or {NONE}
    return known.pop() if len(known) == 1 else " / ".join(texts)


def comparison(summary: Summary, compared: DataFrame, fid: str) -> str:
    """Leakage and FID of PU against Unsupervised, and whether their ratios are as expected from the paper."""
    group_of = dict(zip(compared.objective, compared.index, strict=True))
    if missing := [LABELS[name] for name in ("pu", "unsupervised") if name not in group_of]:
        return f"nothing to compare, {' and '.join(missing)} is missing."

    def ratio_text(metric: str, most: float, text: Callable[[Any], str]) -> str:
        pu, baseline = (summary.metric(group_of[name], metric) for name in ("pu", "unsupervised"))
        if pu is None or baseline is None:
            return ""
        both = f"{text(pu)} against {text(baseline)}"
        if baseline["mean"] <= 0:
            return f"{both}, no ratio"
        ratio = pu["mean"] / baseline["mean"]
        return f"{both}, ratio {ratio:.2f} (at most {most:g} is expected: {'yes' if ratio <= most else 'no'})"

    leakage = ratio_text(LEAKAGE, MAX_LEAKAGE_RATIO, percent)
    parts = [f"PU leaks {leakage}" if leakage else "no rate was measured"]
    if fid:
        distances = ratio_text(fid, MAX_FID_RATIO, distance)
        parts.append(f"{fid} {distances}" if distances else f"{fid} was not measured for both")
    return "; ".join(parts) + "."


def caution(summary: Summary, groups: DataFrame) -> str:
    """A warning if groups were measured with different classifiers or trained on different data; else ""."""
    runs = summary.runs[summary.runs.group.isin(groups.index)]
    text = " Not all of these were measured with the same classifier." if runs.classifier.nunique() > 1 else ""
    data = runs.data[runs.experiment.isin(EXPERIMENTS)]
    return text + (" Not all of these were trained on the same data." if data.nunique() > 1 else "")


def _variants_table(summary: Summary, name: str, groups: DataFrame) -> str:
    """One row a group; columns for the settings of the table, other settings that differ, and the metrics."""
    texts = cells(summary).loc[groups.index]
    axes = [axis for axis in VARIANTS[name][2] if axis != "objective"] if name != OTHER else []
    axes = axes or [axis for axis in AXES if any(axis in changed for changed in groups.changed)]
    columns = {"Objective": groups.objective.map(LABELS)}
    columns |= {AXES[axis]: groups.apply(_axis_text, axis=1, args=(axis, summary)) for axis in axes}
    for setting in varying(groups):
        columns[setting] = [setting_text(other.get(setting)) for other in groups.other]
    columns |= {"Rate": texts[RATE], "Leakage": texts[LEAKAGE]} | {fid: texts[fid] for fid in summary.fids(groups)}
    for label in sorted({label for missing in groups.missing for label in missing or ()}) if name == "missing" else []:
        columns[f"Drawn “{label}”"] = texts.get(f"{CLASS_SHARE}_{label}", Series(NONE, texts.index))
    columns |= {count: texts[count] for count in COUNTS}
    beta, warning = summary.true_beta(groups), caution(summary, groups).strip()
    first = groups.iloc[0]
    caption = f"**{first.experiment}, size {first['size']}{f', true beta {beta:.3f}' if beta else ''}**"
    return "\n\n".join([caption, markdown(DataFrame(columns)), *([warning] if warning else [])])


def _axis_text(group: Any, name: str, summary: Summary) -> str:
    """A setting of a group; a dash if the objective does not use it."""
    value = group[name]
    if name == "contamination":
        share = summary.mean("true_beta")[group.name]
        return NONE if pd.isna(share) else f"{share:.3f}"
    if value is None or (name == "eta" and not group.num_negative):
        return NONE
    if name == "beta" and isinstance(value, str):
        assumed = summary.mean("assumed_beta")[group.name]
        return value if pd.isna(assumed) else f"{assumed:.3f} ({value})"
    if name == "max_ratio" and not value:
        return "none"
    return setting_text(value)
