"""`paper sweep`: run every combination of objectives, betas and seeds, then build the tables."""

from __future__ import annotations

import sys
from dataclasses import fields
from itertools import product
from typing import get_args

from sd_unlearn.errors import UsageError
from sd_unlearn.paper.experiments import TEXT_EXPERIMENTS, find_experiment
from sd_unlearn.paper.options import ObjectiveName, RunOptions, SharedOptions, SweepOptions
from sd_unlearn.paper.run import folder_of, run_experiment
from sd_unlearn.paper.settings import WITH_BRACKET
from sd_unlearn.paper.tables.build import build_tables, check_packages

OBJECTIVES = get_args(ObjectiveName)
# A sweep applies these only to the objectives that have them.
BRACKET_OPTIONS = ("correction", "max_ratio")
PNU_OPTIONS = ("eta", "num_negative")


def run_sweep(name: str, options: SweepOptions) -> str:
    """Run what is not finished. Returns the experiment's tables as Markdown; their files are in its folder.

    Raises:
        UsageError, UnlearnError: as `paper run`; finished runs are kept.
    """
    check_packages("pandas", "matplotlib")
    runs = combinations(options)
    if name not in TEXT_EXPERIMENTS:
        experiment = find_experiment(name)
        for each in runs:  # check all of them before the first is trained
            folder_of(experiment, each)
    for number, each in enumerate(runs, 1):
        beta = "" if each.beta is None else f", beta {each.beta}"
        print(f"Run {number} of {len(runs)}: {each.objective}{beta}, seed {each.seed}.", file=sys.stderr)
        run_experiment(name, each)
    folder = options.output_dir / name
    return build_tables(folder, folder / "tables")


def combinations(options: SweepOptions) -> list[RunOptions]:
    """The distinct runs of a sweep. The seed changes last, so that early results cover every objective and beta.

    Raises:
        UsageError: an unknown objective, or an invalid beta or seed.
    """
    shared = {field.name: getattr(options, field.name) for field in fields(SharedOptions)}
    seeds = [_seed(word) for word in _words(options.seed, "--seed")]
    objectives = [_objective(word) for word in _words(options.objective, "--objective")]
    betas = [_beta(word) for word in _words(options.beta, "--beta")] if options.beta else [None]
    runs: list[RunOptions] = []
    for seed, objective, beta in product(seeds, objectives, betas):
        if objective == "unsupervised":  # it has no beta, so it runs once
            beta = None
        unused = (*(() if objective in WITH_BRACKET else BRACKET_OPTIONS), *(() if objective == "pnu" else PNU_OPTIONS))
        kept = {k: v for k, v in shared.items() if k not in unused}
        each = RunOptions(**kept, seed=seed, objective=objective, beta=beta)  # type: ignore[arg-type]
        if each not in runs:
            runs.append(each)
    return runs


def _words(text: str, option: str) -> list[str]:
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise UsageError(f'{option} "{text}" has an empty entry between commas. Use e.g. {option} a,b,c.')
    return words


def _objective(word: str) -> str:
    if word not in OBJECTIVES:
        raise UsageError(f'--objective "{word}" is unknown; choose from {", ".join(OBJECTIVES)}.')
    return word


def _beta(word: str) -> float | str:
    try:
        return word if word in ("known", "estimate") else float(word)
    except ValueError:
        raise UsageError(f'--beta "{word}" must be a number, known or estimate, e.g. 0.05,0.1,0.2.') from None


def _seed(word: str) -> int:
    if not word.isdigit():
        raise UsageError(f'--seed "{word}" must be a whole number, e.g. 42,43,44.')
    return int(word)
