"""The tables' figures as pictures: objectives side by side, and leakage and FID against beta. Imports no torch.

matplotlib is imported when something is drawn, and only there.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sd_unlearn.errors import UsageError
from sd_unlearn.paper.tables.cells import NAMES_OF, label_of
from sd_unlearn.paper.tables.finished import ARMS
from sd_unlearn.paper.tables.groups import ESTIMATED, Figure, Group, contexts, true_beta
from sd_unlearn.paper.tables.views import VIEWS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DPI = 150
PREFIXES = ("main-", "beta-")  # how the names of the files begin
# Colours of Okabe and Ito (2008), told apart by colour-blind readers, and a shape each for print in grey.
STYLE = {"unsupervised": ("#7F7F7F", "o"), "supervised": ("#E69F00", "s"), "pu": ("#0072B2", "D")}
LOG_FROM = 10  # betas that span more than this factor are drawn on a logarithmic axis
GREY = "#555555"
ROOM = 1.05  # beyond the largest value, so that no mark is cut


def check_available() -> None:
    """
    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError(
            "Plots are drawn with matplotlib, which is not installed: pip install 'sd-unlearn[paper]'. "
            "Without --output_dir the tables come without them."
        ) from None


def draw(groups: Sequence[Group]) -> dict[str, tuple[str, bytes]]:
    """File name -> (title, PNG): one plot of the main table a size and FID, one a sweep of beta and FID."""
    check_available()
    found = {}
    mains: dict[tuple[str, str], list[list[Group]]] = {}
    for arms in contexts([group for group in groups if not group.off_plain()]):
        for fid in _fids(arms):
            mains.setdefault((arms[0].size, fid), []).append(arms)
    for (size, fid), lines in mains.items():
        title = f"Leakage and FID of each objective (size {size})"
        found["-".join(filter(None, ("main", size, fid))) + ".png"] = (title, main_plot(lines, fid))
    view = next(view for view in VIEWS if view.name == "beta")
    apart = contexts([group for group in groups if not group.off_plain() - set(view.rows)])
    for arms in apart:
        if len({group.beta() for group in _swept(arms)} - {None}) < 2:
            continue
        for fid in _fids(arms):
            stem = "-".join(filter(None, ("beta", arms[0].experiment, arms[0].size, fid)))
            name = next(n for i in range(1, len(apart) + 2) if (n := f"{stem}{f'-{i}' * (i > 1)}.png") not in found)
            title = f"Leakage and FID against beta ({label_of(arms, apart)}, size {arms[0].size})"
            found[name] = (title, sweep_plot(arms, fid, title))
    return found


def main_plot(lines: Sequence[Sequence[Group]], fid: str) -> bytes:
    """A line an experiment, a mark an objective: leakage, and beside it the FID where there is one. A PNG.

    Whiskers are the least and the largest over seeds; with one seed the leakage's 95 % interval.
    """
    figure, panels = _panels(fid, 0.9 + 0.55 * len(lines) + 0.35)
    for panel, (title, metric) in zip(panels, _metrics(fid), strict=True):
        for at, arms in enumerate(lines):
            for group in arms:
                colour, shape = STYLE[group.objective]
                lift = 0.2 * (ARMS.index(group.objective) - 1)
                if found := _figure(group, metric):
                    _mark(panel, found, at + lift, colour, shape, across=True)
        panel.set_yticks(range(len(lines)), [label_of(arms, lines) for arms in lines] if panel is panels[0] else [])
        panel.set_ylim(len(lines) - 0.5, -0.5)
        panel.set_xlim(0, panel.get_xlim()[1] * ROOM)
        panel.grid(axis="x", color="#DDDDDD", linewidth=0.6)
        panel.set_xlabel(title)
        panel.tick_params(axis="y", length=0)
    for objective in ARMS:
        if any(group.objective == objective for arms in lines for group in arms):
            colour, shape = STYLE[objective]
            panels[0].plot([], [], shape, color=colour, label=NAMES_OF[objective])
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return _png(figure)


def sweep_plot(arms: Sequence[Group], fid: str, title: str = "") -> bytes:
    """PU's leakage and FID against the beta it assumed, with the unsupervised level and the true beta. A PNG.

    Filled marks: beta as given; open ones: estimated. Whiskers as in `main_plot`.
    """
    figure, panels = _panels(fid, 3.4)
    points = sorted(((beta, group) for group in _swept(arms) if (beta := group.beta()) is not None), key=lambda p: p[0])
    unsupervised = next((group for group in arms if group.objective == "unsupervised"), None)
    share, colour = true_beta(arms), STYLE["pu"][0]
    for panel, (label, metric) in zip(panels, _metrics(fid), strict=True):
        given = [(b, f) for b, g in points if g.axes["beta"] != ESTIMATED and (f := _figure(g, metric))]
        estimated = [(b, f) for b, g in points if g.axes["beta"] == ESTIMATED and (f := _figure(g, metric))]
        panel.plot([b for b, _ in given], [f.mean for _, f in given], color=colour, linewidth=1.2)
        for beta, found in given:
            _mark(panel, found, beta, colour, "o", label="PU")
        for beta, found in estimated:
            _mark(panel, found, beta, colour, "D", hollow=True, label="PU, beta estimated")
        if level := unsupervised and _figure(unsupervised, metric):
            panel.axhline(level.mean, color=GREY, linestyle="--", linewidth=1.2, label="Unsupervised")
        if share:
            panel.axvline(share, color=GREY, linestyle=":", linewidth=1.2, label=f"True beta ({share:.3f})")
        _beta_axis(panel, [beta for beta, _ in points], [beta for beta, _ in given])
        panel.set_ylim(0, panel.get_ylim()[1] * ROOM)
        panel.set_ylabel(label)
    handles = dict(zip(*reversed(panels[0].get_legend_handles_labels()), strict=True))  # each label once
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(title, fontsize=10)
    return _png(figure)


def _swept(arms: Sequence[Group]) -> list[Group]:
    return [group for group in arms if group.objective == "pu"]


def _fids(arms: Sequence[Group]) -> list[str]:
    return sorted({fid for group in arms for fid in group.fids()}) or [""]


def _metrics(fid: str) -> list[tuple[str, str]]:
    """(what the axis says, metric) of each panel."""
    return [("Leakage (%)", "leakage"), *([(f"{fid} (lower is better)", fid)] if fid else [])]


def _figure(group: Group, metric: str) -> Figure | None:
    """In the axis' unit: leakage in percent."""
    if metric != "leakage":
        return group.figure(metric)
    leak = group.leakage()
    if leak is None:
        return None
    low, high = (None if end is None else 100 * end for end in (leak.low, leak.high))
    return Figure(100 * leak.mean, leak.sd, low, high, leak.seeds, leak.n)


def _mark(
    panel: Axes,
    found: Figure,
    at: float,
    colour: str,
    shape: str,
    across: bool = False,
    hollow: bool = False,
    label: str | None = None,
) -> None:
    """A mark at the mean with whiskers to the ends; across: the value runs along x."""
    ends = None
    if found.low is not None and found.high is not None:  # rounding must not make a whisker shorter than nothing
        ends = [[max(0.0, found.mean - found.low)], [max(0.0, found.high - found.mean)]]
    x, y = (found.mean, at) if across else (at, found.mean)
    whiskers: dict[str, Any] = {"xerr" if across else "yerr": ends}
    face = "white" if hollow else colour
    panel.errorbar(
        [x],
        [y],
        **whiskers,
        fmt=shape,
        color=colour,
        markerfacecolor=face,
        markersize=6,
        capsize=3,
        elinewidth=1.2,
        label=label,
        zorder=3,
    )


def _panels(fid: str, height: float) -> tuple[Any, list[Axes]]:
    """A figure with a panel for leakage and, where there is a FID, one for it; no frame above and to the right."""
    from matplotlib.figure import Figure as Canvas  # not pyplot: it holds state and may open windows

    figure = Canvas(figsize=(7.5 if fid else 4.5, height), dpi=DPI, layout="constrained")
    panels = list(figure.subplots(1, 2 if fid else 1, squeeze=False)[0])
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _beta_axis(panel: Axes, betas: Sequence[float], given: Sequence[float]) -> None:
    """Beta on x, all of them in sight; marked are the given ones, as far as their numbers leave each other room."""
    from matplotlib.ticker import NullLocator

    is_log = min(betas) > 0 and max(betas) / min(betas) >= LOG_FROM
    panel.set_xscale("log" if is_log else "linear")
    ticks: list[float] = []
    for beta in given or betas:
        near = ticks and (
            beta / ticks[-1] < (betas[-1] / betas[0]) ** 0.1 if is_log else beta - ticks[-1] < 0.1 * betas[-1]
        )
        ticks += [] if near else [beta]
    panel.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_xlabel("beta")


def _png(figure: Any) -> bytes:
    memory = io.BytesIO()
    figure.savefig(memory, format="png", dpi=DPI, metadata={"Software": None})
    return memory.getvalue()
