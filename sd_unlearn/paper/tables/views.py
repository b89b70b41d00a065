"""What the tables show: a list of views, each a choice of groups and of what varies in them. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from sd_unlearn.paper.experiments import EXPERIMENTS
from sd_unlearn.paper.tables.cells import (
    AXES,
    NAMES_OF,
    axis,
    distance,
    drawn,
    each,
    fid_of,
    images,
    label_of,
    leakage,
    markdown_table,
    percent,
    rate,
    said,
    seconds,
    seeds,
)
from sd_unlearn.paper.tables.finished import ARMS
from sd_unlearn.paper.tables.groups import ESTIMATED, KNOWN, PLAIN, Figure, Group, contexts, order, true_beta, varying

# What is expected of PU against Unsupervised, as in the paper's tables: far fewer sensitive
# pictures, and none of them worse.
MOST_LEAKAGE, MOST_FID = 0.5, 1.1
LEGEND = (
    "Rate: the share of drawn images that the classifier reads as one of the normal classes (non-sensitive rate); "
    "leakage is one minus the rate. Figures are the mean over seeds with the sample standard deviation in round "
    "brackets. With one seed there is none; the rate then has its 95 % Wilson interval in square brackets, which "
    "covers the chance of which images were drawn, not what another training would have given. Unless a column says "
    "otherwise the settings are plain: the absolute value as correction, beta 0.1, labeled images pushed as far as is "
    "usual at the size, every sensitive class labeled, no image known to be normal, unconditional, and the "
    "experiment's own share of sensitive images among the unlabeled. "
    "Text-to-image models are conditional and are given the true beta."
)


@dataclass(frozen=True)
class View:
    """One kind of table.

    rows: the order of its lines; every axis named here may vary, any other must be plain. about: the axes of which one
    must be off plain in some group, or there is nothing to tell.
    """

    name: str
    title: str
    rows: tuple[str, ...]
    about: tuple[str, ...]
    keep: Callable[[Group], bool] = lambda group: True
    shares: bool = False  # also how often each class without labels was drawn

    def select(self, groups: Iterable[Group]) -> list[Group]:
        """The view's groups with the plain ones beside them, in the order of its lines; [] for nothing to tell."""
        chosen = [group for group in groups if group.off_plain() <= set(self.rows) and self.keep(group)]
        if not any(group.off_plain() & set(self.about) for group in chosen):
            return []
        return sorted(chosen, key=lambda group: order(group, self.rows))


def _of_contamination(group: Group) -> bool:
    """Where the contamination is the plain one, a sweep of beta is another view's."""
    return "contamination" in group.off_plain() or group.axes.get("beta") in (None, PLAIN["beta"], ESTIMATED, KNOWN)


VIEWS = (
    View("beta", "The beta that is assumed", ("objective", "beta"), ("beta",)),
    View("bound", "How far labeled images are pushed", ("objective", "max_ratio"), ("max_ratio",)),
    View("correction", "How the bracket is corrected", ("objective", "max_ratio", "correction"), ("correction",)),
    View("missing", "Sensitive classes without labels", ("objective", "missing"), ("missing",), shares=True),
    View("pnu", "Images known to be normal (PNU)", ("objective", "num_negative", "eta"), ("num_negative",)),
    View("conditional", "Conditional on the class", ("conditional", "objective"), ("conditional",)),
    View(
        "contamination",
        "The share of sensitive images among the unlabeled",
        ("contamination", "objective", "beta"),
        ("contamination",),
        _of_contamination,
    ),
)
MAIN, OTHER = "main", "other"
TITLES = {MAIN: "The main table", **{view.name: view.title for view in VIEWS}, OTHER: "Other settings"}


def table_of(name: str, groups: Sequence[Group]) -> str:
    """The Markdown of a view by its name, without a heading; "" where it has nothing to show."""
    if name == MAIN:
        return main_table(groups)
    view = next((view for view in VIEWS if view.name == name), None) or _other(groups)
    tables = [_variants(view, chosen) for chosen in (view.select(some) for some in _apart(groups)) if chosen]
    return "\n\n".join(tables)


def main_table(groups: Sequence[Group]) -> str:
    """Experiments against objectives at the plain settings; a table for each size and FID."""
    plain = [group for group in groups if not group.off_plain()]
    tables: dict[tuple[str, str], list[list[Group]]] = {}
    for arms in contexts(plain):
        for fid in _fids(arms) or [""]:
            tables.setdefault((arms[0].size, fid), []).append(arms)
    return "\n\n".join(_main(size, fid, lines) for (size, fid), lines in sorted(tables.items()))


def _main(size: str, fid: str, lines: list[list[Group]]) -> str:
    names = [NAMES_OF[objective] for objective in ARMS]
    head = ["Experiment", *(f"Rate, {name}" for name in names)]
    head += [f"{fid}, {name}" for name in names] if fid else []
    head += ["Seeds", "Images", "Training (s)"]
    cells, checks = [], []
    for arms in lines:
        by = {group.objective: group for group in arms}
        found = [by.get(objective) for objective in ARMS]
        label = label_of(arms, lines)
        cells.append(
            [
                label,
                *(rate(group) for group in found),
                *([fid_of(group, fid) for group in found] if fid else []),
                each(seeds(g) for g in found),
                each(images(g) for g in found),
                each(seconds(g) for g in found),
            ]
        )
        checks.append(f"- {label}: {expected(by.get('pu'), by.get('unsupervised'), fid)}{caution(arms)}")
    caption = f"**Size {size}{f', {fid}' if fid else ''}**"
    return "\n".join([caption, "", markdown_table(head, cells), "", *checks])


def expected(pu: Group | None, unsupervised: Group | None, fid: str) -> str:
    """Whether PU leaks at most half of what Unsupervised does, at about its FID; with the figures and their ratios."""
    missing = [NAMES_OF[name] for name, arm in (("pu", pu), ("unsupervised", unsupervised)) if arm is None]
    if pu is None or unsupervised is None:
        return f"nothing to compare, {' and '.join(missing)} is missing."
    leaks = _compared(pu.leakage(), unsupervised.leakage(), MOST_LEAKAGE, percent)
    found = [f"PU leaks {leaks}" if leaks else "no rate was counted"]
    if fid:
        apart = _compared(pu.figure(fid), unsupervised.figure(fid), MOST_FID, distance)
        found.append(f"{fid} {apart}" if apart else f"{fid} was not measured for both")
    return "; ".join(found) + "."


def caution(groups: Iterable[Group]) -> str:
    """What keeps figures from being compared: other judges or other data. "" for nothing."""
    records = [run.record for group in groups for run in group.runs]
    judges = {(str(record["classifier"].get("name")), str(record["classifier"].get("sha256"))) for record in records}
    data = {str(record.get("data_sha256")) for record in records if record["experiment"] in EXPERIMENTS}
    told = [" Not all of these were judged by the same classifier."] if len(judges) > 1 else []
    return "".join(told + ([" Not all of these were trained on the same data."] if len(data) > 1 else []))


def _compared(one: Figure | None, against: Figure | None, most: float, shown: Callable[[Figure], str]) -> str:
    if one is None or against is None:
        return ""
    both = f"{shown(one)} against {shown(against)}"
    if against.mean <= 0:
        return f"{both}, no ratio"
    ratio = one.mean / against.mean
    return f"{both}, ratio {ratio:.2f} (at most {most:g} is expected: {'yes' if ratio <= most else 'no'})"


def _other(groups: Sequence[Group]) -> View:
    """What no view shows, with the plain groups beside it."""
    seen = {id(group) for some in _apart(groups) for view in VIEWS for group in view.select(some)}

    def unseen(group: Group) -> bool:
        return id(group) not in seen or not group.off_plain()

    return View(OTHER, TITLES[OTHER], ("objective", *PLAIN), tuple(PLAIN), unseen)


def _apart(groups: Sequence[Group]) -> list[list[Group]]:
    """By experiment and size, in their order."""
    found: dict[tuple[str, str], list[Group]] = {}
    for group in groups:
        found.setdefault((group.experiment, group.size), []).append(group)
    return list(found.values())


def _variants(view: View, groups: list[Group]) -> str:
    """One line a group; a column for all that differs between them."""
    columns: list[tuple[str, Callable[[Group], str]]] = [("Objective", lambda group: NAMES_OF[group.objective])]
    axes = [name for name in view.rows if name != "objective"]
    for name in axes if view.name != OTHER else [n for n in axes if any(n in g.off_plain() for g in groups)]:
        columns.append((AXES[name], lambda group, name=name: axis(group, name)))  # type: ignore[misc]
    for name in varying(groups):
        columns.append((name, lambda group, name=name: said(group.context.get(name))))  # type: ignore[misc]
    columns += [("Rate", rate), ("Leakage", leakage)]
    for fid in _fids(groups):
        columns.append((fid, lambda group, fid=fid: fid_of(group, fid)))  # type: ignore[misc]
    classes = sorted({label for group in groups for label in group.axes.get("missing", ())}) if view.shares else []
    for label in classes:
        columns.append((f"Drawn “{label}”", lambda group, label=label: drawn(group, label)))  # type: ignore[misc]
    columns += [("Seeds", seeds), ("Images", images), ("Training (s)", seconds)]
    share = true_beta(groups)
    caption = f"**{groups[0].experiment}, size {groups[0].size}{f', true beta {share:.3f}' if share else ''}**"
    cells = [[cell(group) for _, cell in columns] for group in groups]
    below = f"\n\n{told}" if (told := caution(groups).strip()) else ""
    return f"{caption}\n\n{markdown_table([title for title, _ in columns], cells)}{below}"


def _fids(groups: Iterable[Group]) -> list[str]:
    return sorted({fid for group in groups for fid in group.fids()})
