"""Plots of the tables: objectives side by side, and leakage and FID against beta."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot: it holds state and may open windows
from matplotlib.ticker import NullLocator
from pandas import DataFrame

from sd_unlearn.paper.tables.groups import ESTIMATED, LEAKAGE, SCOPE, Summary, comparable
from sd_unlearn.paper.tables.pages import LABELS, MAIN_OBJECTIVES, VARIANTS, label_of, main_rows

DPI = 150
PREFIXES = ("main-", "beta-")  # of the file names
# Colors of Okabe and Ito (2008), distinguishable by color-blind readers, and a marker each for print in grey.
STYLE = {"unsupervised": ("#7F7F7F", "o"), "supervised": ("#E69F00", "s"), "pu": ("#0072B2", "D")}
LOG_FROM = 10  # betas that span more than this factor get a logarithmic axis
GREY = "#555555"
MARGIN = 1.05  # axes reach beyond the largest value, so that no marker is cut


def draw(summary: Summary) -> dict[str, tuple[str, bytes]]:
    """File name -> (title, PNG): one plot for each main table, and one for each sweep of beta and FID."""
    plots, groups = {}, summary.groups
    for (size, fid), lines in main_rows(summary, groups).items():
        title = f"Leakage and FID of each objective (size {size})"
        plots["-".join(filter(None, ("main", size, fid))) + ".png"] = (title, main_plot(summary, lines, fid))
    order = set(VARIANTS["beta"][2])
    sweeps = comparable(groups[[changed <= order for changed in groups.changed]])
    for compared in sweeps:
        if _sweep(summary, compared).beta.nunique() < 2:
            continue
        experiment, size = compared.iloc[0][SCOPE]
        for fid in summary.fids(compared) or [""]:
            stem = "-".join(filter(None, ("beta", experiment, size, fid)))
            names = (f"{stem}{f'-{i}' if i > 1 else ''}.png" for i in range(1, len(sweeps) + 2))
            title = f"Leakage and FID against beta ({label_of(compared, sweeps)}, size {size})"
            plots[next(name for name in names if name not in plots)] = (
                title,
                sweep_plot(summary, compared, fid, title),
            )
    return plots


def main_plot(summary: Summary, lines: Sequence[DataFrame], fid: str) -> bytes:
    """A PNG with a line for each experiment and a marker for each objective: leakage, and the FID in a second panel.

    Error bars reach from the least to the largest value over seeds; with one seed, the 95 % interval of the leakage.
    """
    figure, panels = _panels(fid, 0.9 + 0.55 * len(lines) + 0.35)
    for panel, (title, metric) in zip(panels, _metrics(fid), strict=True):
        for position, compared in enumerate(lines):
            for index, objective in compared.objective.items():
                offset = 0.2 * (MAIN_OBJECTIVES.index(objective) - 1)
                color, shape = STYLE[objective]
                _mark(panel, _value(summary, index, metric), position + offset, horizontal=True, color=color, fmt=shape)
        panel.set_yticks(
            range(len(lines)), [label_of(compared, lines) for compared in lines] if panel is panels[0] else []
        )
        panel.set_ylim(len(lines) - 0.5, -0.5)
        panel.set_xlim(0, panel.get_xlim()[1] * MARGIN)
        panel.grid(axis="x", color="#DDDDDD", linewidth=0.6)
        panel.set_xlabel(title)
        panel.tick_params(axis="y", length=0)
    for objective in MAIN_OBJECTIVES:
        if any(objective in compared.objective.to_numpy() for compared in lines):
            color, shape = STYLE[objective]
            panels[0].plot([], [], shape, color=color, label=LABELS[objective])
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return _png(figure)


def sweep_plot(summary: Summary, compared: DataFrame, fid: str, title: str = "") -> bytes:
    """A PNG of PU's leakage and FID against the assumed beta, with the unsupervised level and the true beta.

    Filled markers: a given beta; open ones: an estimated one. Error bars as in `main_plot`.
    """
    figure, panels = _panels(fid, 3.4)
    points, color = _sweep(summary, compared), STYLE["pu"][0]
    baseline, true_beta = compared.index[compared.objective == "unsupervised"], summary.true_beta(compared)
    for panel, (label, metric) in zip(panels, _metrics(fid), strict=True):
        values = {index: value for index in points.index if (value := _value(summary, index, metric)) is not None}
        line = [index for index in values if not points.estimated[index]]
        panel.plot(points.beta[line], [values[index]["mean"] for index in line], color=color, linewidth=1.2)
        for index, value in sorted(values.items(), key=lambda item: bool(points.estimated[item[0]])):
            estimated = {"fmt": "D", "markerfacecolor": "white", "label": "PU, beta estimated"}
            style: dict[str, Any] = estimated if points.estimated[index] else {"fmt": "o", "label": "PU"}
            _mark(panel, value, points.beta[index], color=color, **style)
        if len(baseline) and (level := _value(summary, baseline[0], metric)) is not None:
            panel.axhline(level["mean"], color=GREY, linestyle="--", linewidth=1.2, label="Unsupervised")
        if true_beta:
            panel.axvline(true_beta, color=GREY, linestyle=":", linewidth=1.2, label=f"True beta ({true_beta:.3f})")
        _beta_axis(panel, list(points.beta), list(points.beta[line]))
        panel.set_ylim(0, panel.get_ylim()[1] * MARGIN)
        panel.set_ylabel(label)
    handles = dict(zip(*reversed(panels[0].get_legend_handles_labels()), strict=True))  # each label once
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(title, fontsize=10)
    return _png(figure)


def _sweep(summary: Summary, compared: DataFrame) -> DataFrame:
    """The pu groups with a known beta, sorted by it: columns beta (mean over seeds), estimated."""
    table = DataFrame({"beta": summary.mean("assumed_beta")[compared.index], "estimated": compared.beta == ESTIMATED})
    return table[compared.objective == "pu"].dropna(subset="beta").sort_values("beta", kind="stable")


def _metrics(fid: str) -> list[tuple[str, str]]:
    """(axis label, metric) of each panel."""
    return [("Leakage (%)", LEAKAGE), *([(f"{fid} (lower is better)", fid)] if fid else [])]


def _value(summary: Summary, group: int, metric: str) -> Any:
    """Mean, low and high in the unit of the axis (leakage in percent), or None."""
    value = summary.metric(group, metric)
    return 100 * value[["mean", "low", "high"]] if metric == LEAKAGE and value is not None else value


def _mark(panel: Axes, value: Any, position: float, horizontal: bool = False, **style: Any) -> None:
    """A marker at the mean, with an error bar from low to high. horizontal: the value runs along x."""
    if value is None:
        return
    bar = None
    if not math.isnan(value.low + value.high):  # clipped at 0: rounding may make a length negative
        bar = [[max(0.0, value["mean"] - value.low)], [max(0.0, value.high - value["mean"])]]
    x, y = (value["mean"], position) if horizontal else (position, value["mean"])
    bars: dict[str, Any] = {"xerr" if horizontal else "yerr": bar}
    panel.errorbar([x], [y], **bars, markersize=6, capsize=3, elinewidth=1.2, zorder=3, **style)


def _panels(fid: str, height: float) -> tuple[Figure, list[Axes]]:
    """A figure with a panel for the leakage, and one for the FID if there is one."""
    figure = Figure(figsize=(7.5 if fid else 4.5, height), dpi=DPI, layout="constrained")
    panels = list(figure.subplots(1, 2 if fid else 1, squeeze=False)[0])
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _beta_axis(panel: Axes, betas: Sequence[float], given: Sequence[float]) -> None:
    """Show all betas on x, with ticks at the given ones that are far enough apart for their labels."""
    is_log = min(betas) > 0 and max(betas) / min(betas) >= LOG_FROM
    panel.set_xscale("log" if is_log else "linear")
    ticks: list[float] = []
    for beta in given or betas:
        last = ticks[-1] if ticks else -math.inf
        far = beta / last >= (betas[-1] / betas[0]) ** 0.1 if is_log and ticks else beta - last >= 0.1 * betas[-1]
        ticks += [beta] if far else []
    panel.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_xlabel("beta")


def _png(figure: Figure) -> bytes:
    memory = io.BytesIO()
    figure.savefig(memory, format="png", dpi=DPI, metadata={"Software": None})
    return memory.getvalue()
