"""`paper sweep`: every combination of objectives, betas and seeds, one run after the other, then their table."""

from __future__ import annotations

import sys
from dataclasses import fields
from itertools import product
from typing import get_args

from sd_unlearn.errors import UsageError
from sd_unlearn.paper.experiments import TEXT_EXPERIMENTS, find_experiment
from sd_unlearn.paper.one import run_any
from sd_unlearn.paper.options import ObjectiveName, RunOptions, Shared, SweepOptions
from sd_unlearn.paper.run import folder_of
from sd_unlearn.paper.settings import WITH_BRACKET
from sd_unlearn.paper.tables.build import build_tables, check_packages

OBJECTIVES = get_args(ObjectiveName)
OF_BRACKET = ("correction", "max_ratio")  # options that the baselines refuse: in a sweep they are for the others


def run(name: str, options: SweepOptions) -> str:
    """Do the runs that are missing; returns the experiment's tables as Markdown, whose files lie in its folder.

    Raises:
        UsageError, UnlearnError: as `paper run`; what is finished by then stays.
    """
    check_packages("pandas", "matplotlib")
    runs = combinations(options)
    if name not in TEXT_EXPERIMENTS:
        experiment = find_experiment(name)
        for each in runs:  # all of them are checked before the first is trained
            folder_of(experiment, each)
    for number, each in enumerate(runs, 1):
        beta = "" if each.beta is None else f", beta {each.beta}"
        about = f"{each.objective}{beta}, seed {each.seed}"
        print(f"Sweep, run {number} of {len(runs)}: {about}.", file=sys.stderr)
        run_any(name, each)
    folder = options.output_dir / name
    return build_tables(folder, folder / "tables")


def combinations(options: SweepOptions) -> list[RunOptions]:
    """The runs of a sweep, seeds last to change, so that an early look has every arm; none twice.

    What only pu and pnu can be told is for those among the objectives.

    Raises:
        UsageError: a word that is no objective, beta or seed.
    """
    shared = {field.name: getattr(options, field.name) for field in fields(Shared)}
    seeds = [_seed(word) for word in _words(options.seed, "--seed")]
    objectives = [_objective(word) for word in _words(options.objective, "--objective")]
    betas = [_beta(word) for word in _words(options.beta, "--beta")] if options.beta else [None]
    runs: list[RunOptions] = []
    for seed, objective, beta in product(seeds, objectives, betas):
        if objective == "unsupervised":  # it has no beta: once is enough
            beta = None
        told = {k: v for k, v in shared.items() if objective in WITH_BRACKET or k not in OF_BRACKET}
        each = RunOptions(**told, seed=seed, objective=objective, beta=beta)  # type: ignore[arg-type]
        if each not in runs:
            runs.append(each)
    return runs


def _words(text: str, option: str) -> list[str]:
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise UsageError(f'{option} "{text}": one between the commas is empty. E.g. {option} a,b,c.')
    return words


def _objective(word: str) -> str:
    if word not in OBJECTIVES:
        raise UsageError(f'--objective "{word}" is unknown; choose among {", ".join(OBJECTIVES)}.')
    return word


def _beta(word: str) -> float | str:
    try:
        return word if word in ("known", "estimate") else float(word)
    except ValueError:
        raise UsageError(f'--beta "{word}" is no number, nor known or estimate. E.g. 0.05,0.1,0.2.') from None


def _seed(word: str) -> int:
    if not word.isdigit():
        raise UsageError(f'--seed "{word}" is no whole number. E.g. 42,43,44.')
    return int(word)
