"""Runs that differ in nothing but their seed, taken together: means and deviations. Imports no torch."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sd_unlearn.paper.experiments import EXPERIMENTS, NAMES
from sd_unlearn.paper.tables.finished import FID, OBJECTIVES, RATE, PaperRun

ESTIMATED, KNOWN = "estimated", "known"
# Where a beta is from, in a run's settings -> what stands for it here; any other source is a number that was given.
SOURCES = {"estimated": ESTIMATED, "estimate": ESTIMATED, "known": KNOWN, "manifest": KNOWN}
# What is varied, and the value that the main tables have, see plain_of. A plain contamination is the experiment's own.
PLAIN: dict[str, Any] = {
    "correction": "abs",
    "beta": 0.1,
    "eta": 0.0,
    "conditional": False,
    "missing": (),
    "contamination": None,
    "num_negative": 0,
    "max_ratio": 0.0,
}
# What has no meaning for an objective is not told apart, whatever the run's settings say.
MEANINGLESS = {
    "unsupervised": {"correction", "beta", "eta", "missing", "reduction", "temperature", "max_ratio"},
    "supervised": {"correction", "eta", "max_ratio"},
    "pu": set(),
    "pnu": set(),
}
NOT_A_SETTING = {"objective", "beta_source", "betas", "seed", *PLAIN}
SAME_CONTAMINATION = 0.002  # whole images make a share differ a little from what was asked


@dataclass(frozen=True)
class Figure:
    """One metric over the seeds of a group."""

    mean: float
    sd: float | None  # sample standard deviation over seeds; None for one seed
    low: float | None  # one seed: its 95 % interval; several: the least and the largest of them
    high: float | None
    seeds: int
    n: int  # pictures of one seed, or of the seed with the fewest


@dataclass(frozen=True)
class Group:
    """Runs of one experiment, size and settings; one a seed."""

    experiment: str
    size: str
    objective: str
    axes: dict[str, Any]  # by the names of PLAIN; only what has a meaning for the objective
    context: dict[str, Any]  # every other setting that is not null
    runs: tuple[PaperRun, ...]

    def off_plain(self) -> set[str]:
        """Names of the axes that differ from the main tables' settings."""
        plain = plain_of(self.experiment, self.size)
        known_normal = {"num_negative"} if self.objective == "pnu" else set()
        return {name for name, value in self.axes.items() if value != plain[name]} | known_normal

    def beta(self) -> float | None:
        """The beta that was assumed; the mean over seeds where each has its own."""
        betas = [run.beta for run in self.runs if run.beta is not None]
        return statistics.mean(betas) if betas else None

    def figure(self, metric: str, group: str = "all") -> Figure | None:
        """None where no run has the metric."""
        rows = [row for run in self.runs if (row := run.rows.get((metric, group))) and row.value is not None]
        values = [float(row.value) for row in rows if row.value is not None]
        if not values:
            return None
        one = len(values) == 1
        ends = (rows[0].low, rows[0].high) if one else (min(values), max(values))
        sd = None if one else statistics.stdev(values)
        return Figure(statistics.mean(values), sd, *ends, len(values), min(row.n for row in rows))

    def leakage(self) -> Figure | None:
        """One minus the non-sensitive rate: the share of pictures that show what they must not."""
        rate = self.figure(RATE)
        if rate is None:
            return None
        low, high = (None if end is None else 1 - end for end in (rate.high, rate.low))
        return Figure(1 - rate.mean, rate.sd, low, high, rate.seeds, rate.n)

    def mean_of(self, part: str, key: str) -> float | None:
        """Mean over the runs that have it of a number in a part of their record, e.g. "cost", "seconds"."""
        found = [run.record.get(part, {}).get(key) for run in self.runs]
        values = [float(v) for v in found if isinstance(v, int | float)]
        return statistics.mean(values) if values else None

    def fids(self) -> list[str]:
        """Names of the distances its runs have, e.g. fid-digits."""
        return sorted({metric for run in self.runs for metric, _ in run.rows if metric.startswith(FID)})


def grouped(runs: Iterable[PaperRun]) -> list[Group]:
    """The runs as groups, in the order of experiments, sizes, objectives and settings.

    Of two runs that differ in nothing the newest counts; that is said on stderr.
    """
    together: dict[str, dict[int, PaperRun]] = {}
    for run in sorted(runs, key=lambda run: str(run.record.get("created") or "")):
        what = [run.experiment, run.size, run.objective, _axes(run), _context(run)]
        seeds = together.setdefault(json.dumps(what, sort_keys=True, default=str), {})
        twin = seeds.get(run.seed)
        if twin and twin.record != run.record:
            print(f"{twin.path} and {run.path} have the same settings and seed: the newer one counts.", file=sys.stderr)
        seeds[run.seed] = run
    groups = []
    for seeds in together.values():
        members = tuple(seeds[seed] for seed in sorted(seeds))
        first = members[0]
        groups.append(Group(first.experiment, first.size, first.objective, _axes(first), _context(first), members))
    return sorted(groups, key=lambda group: (*_place(group), *order(group, tuple(PLAIN)), str(group.context)))


def plain_of(experiment: str, size: str) -> dict[str, Any]:
    """The values of the main tables. The bound on the push is the size's own. A text-to-image model is conditional by
    nature, and the paper gives it the true beta."""
    known = EXPERIMENTS.get(experiment)
    if known is None:
        return PLAIN | {"beta": KNOWN, "conditional": True}
    return PLAIN | {"max_ratio": known.recipe_of(size).max_ratio or 0.0}  # type: ignore[arg-type]


def order(group: Group, axes: Sequence[str]) -> list[tuple[int, float, str]]:
    """A sort key by axes, "objective" among them: what has none first, then numbers by size, then words."""
    key = []
    for name in axes:
        value = OBJECTIVES.index(group.objective) if name == "objective" else group.axes.get(name)
        if value is None:
            value = own_contamination(group.experiment) if name == "contamination" else 0
        is_number = isinstance(value, int | float)
        key.append((0, float(value), "") if is_number else (1, 0.0, "" if value in ("abs", ()) else str(value)))
    return key


def contexts(groups: Sequence[Group]) -> list[list[Group]]:
    """Groups of the same experiment and size whose other settings agree, so that they may be compared.

    A setting without meaning for an objective keeps nothing apart: an unsupervised group is in each list that agrees
    with it in the rest.
    """

    def key(group: Group, without: Iterable[str]) -> str:
        rest = {name: value for name, value in group.context.items() if name not in without}
        return json.dumps([group.experiment, group.size, rest], sort_keys=True, default=str)

    loose = MEANINGLESS["unsupervised"]
    found: dict[str, list[Group]] = {}
    for group in groups:
        if group.objective != "unsupervised":
            found.setdefault(key(group, ()), []).append(group)
    for group in groups:
        if group.objective == "unsupervised":
            fitting = [some for some in found.values() if key(some[0], loose) == key(group, loose)]
            for some in fitting or [found.setdefault(key(group, ()), [])]:
                some.append(group)
    lists = [sorted(some, key=lambda group: OBJECTIVES.index(group.objective)) for some in found.values()]
    return sorted(lists, key=lambda some: _place(some[0])[:2])


def varying(groups: Sequence[Group]) -> list[str]:
    """Names of the other settings in which groups differ; one that a group does not have is no difference."""
    names = dict.fromkeys(name for group in groups for name in group.context)
    return [name for name in names if len({str(group.context[name]) for group in groups if name in group.context}) > 1]


def own_contamination(experiment: str) -> float:
    """The share of sensitive images among the unlabeled ones that an experiment has unless told otherwise."""
    return EXPERIMENTS[experiment].counts.contamination if experiment in EXPERIMENTS else 0.0


def true_beta(groups: Iterable[Group]) -> float | None:
    """The true share of sensitive images among the unlabeled ones, where all the runs have the same."""
    known = {round(run.settings.get("contamination") or 0.0, 3) for group in groups for run in group.runs}
    return known.pop() or None if len(known) == 1 else None


def _axes(run: PaperRun) -> dict[str, Any]:
    settings = run.settings
    plain = plain_of(run.experiment, run.size)
    axes = {name: usual if settings.get(name) is None else settings[name] for name, usual in plain.items()}
    axes["missing"] = tuple(sorted(axes["missing"]))
    axes["beta"] = SOURCES.get(str(settings.get("beta_source")), axes["beta"])  # an estimate is the seed's own
    if not axes["num_negative"]:
        axes["eta"] = PLAIN["eta"]  # a weight of nothing
    share = axes["contamination"]
    if run.experiment not in EXPERIMENTS or abs((share or 0) - own_contamination(run.experiment)) < SAME_CONTAMINATION:
        axes["contamination"] = None
    axes["max_ratio"] = settings.get("max_ratio") or 0.0  # null is no bound, whatever the size's own is
    return {name: value for name, value in axes.items() if name not in MEANINGLESS[run.objective]}


def _context(run: PaperRun) -> dict[str, Any]:
    without = NOT_A_SETTING | MEANINGLESS[run.objective]
    if run.experiment not in EXPERIMENTS:
        without -= {"contamination"}  # none of its values is known to be the plain one
    return {name: value for name, value in run.settings.items() if name not in without and value is not None}


def _place(group: Group) -> tuple[int, str, int]:
    """Experiments as NAMES has them, unknown ones last; then sizes, then objectives."""
    known = NAMES.index(group.experiment) if group.experiment in NAMES else len(NAMES)
    return known, f"{group.experiment} {group.size}", OBJECTIVES.index(group.objective)
