"""Search settings for the baselines of the leaderboard, on seven with seed 0.

    python scripts/leaderboard_search.py --work_dir build/leaderboard

Each method is trained with the settings in SEARCH. The best has the highest harmonic mean of what is forgotten,
retained and cleanly replaced, over the prompts and images of budget `quick`; no attack counts, as none did when the
defaults of ours were chosen. Results within TIE of the first setting, that of leaderboard_methods.py, do not replace
it. The records, docs/leaderboard-runs/search/<method>.json, say what was tried; `leaderboard.py` uses the chosen
setting.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from leaderboard_cells import Stages, measured, train
from leaderboard_methods import METHODS, SEARCH, SEARCH_RECORDS, Cell
from leaderboard_studies import STUDIES

import sd_unlearn
from sd_unlearn.io.files import write_json
from sd_unlearn.io.reading import read_json
from sd_unlearn.models.source import DIGITS

TIE = 0.01
COUNTED = ("leakage direct", "retention kept", "clean_replacement direct")


def score(rows: Mapping[str, Mapping[str, Any]]) -> float:
    """The harmonic mean of three rates in [0, 1]; 0 if one is 0."""
    leakage, kept, clean = (rows[name]["value"] or 0.0 for name in COUNTED)
    return statistics.harmonic_mean([1 - leakage, min(1.0, max(0.0, kept)), min(1.0, clean)])


def tried(method: str, options: Mapping[str, Any], work: Path) -> dict[str, Any]:
    """Train and evaluate one setting."""
    plain = dataclasses.replace(METHODS[method], options={**METHODS[method].options, **options})
    budget = STUDIES[DIGITS].budgets["quick"]
    stages = Stages(Cell(method, "seven", 0), budget, Path(), work, work / "search", plain)
    print(f"search {method} {dict(options)}", file=sys.stderr, flush=True)
    train(stages)
    rows = measured(sd_unlearn.evaluate(run=stages.run, cache_dir=work / "evaluation", **budget.evaluation))
    return {"options": dict(options), "score": round(score(rows), 4), **{name: rows[name] for name in COUNTED}}


def search(method: str, work: Path, file: Path) -> None:
    """Try every setting that the record lacks, and choose."""
    record: dict[str, Any] = read_json(file) if file.is_file() else {"tried": []}
    done = [one["options"] for one in record["tried"]]
    for options in SEARCH[method]:
        if dict(options) not in done:
            record["tried"].append(tried(method, options, work))
            write_json(file, record)
    best = max(record["tried"], key=lambda one: one["score"])
    [first] = [one for one in record["tried"] if not one["options"]]
    record["chosen"] = (best if best["score"] > first["score"] + TIE else first)["options"]
    write_json(file, record)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=list(SEARCH), default=list(SEARCH), metavar="METHOD")
    parser.add_argument("--work_dir", type=Path, default=Path("runs") / "leaderboard", help="data, runs and caches")
    args = parser.parse_args(arguments)
    for method in args.methods:
        search(method, args.work_dir, SEARCH_RECORDS / f"{method}.json")


if __name__ == "__main__":
    main()
