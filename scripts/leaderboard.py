"""Compare methods of unlearning on the bundled base: train, evaluate and attack each, and write docs/leaderboard.md.

    python scripts/leaderboard.py --methods pu base --concepts seven --budget quick
    python scripts/leaderboard.py --budget standard        # everything: days on one core
    python scripts/leaderboard.py --only table             # the page from the records that exist

A cell is a method on a concept with a seed of training. Its record, docs/leaderboard-runs/<budget>/<cell>.json, has one
part for each stage. A stage is repeated only if its weights, options or attacks have changed; an interrupted stage
resumes. A cell that fails is reported, and the others continue. Cells without a record are shown as not run.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

from leaderboard_cells import NotAvailable, Stages, attack, evaluate, train
from leaderboard_methods import BUDGETS, CONCEPTS, METHODS, cells
from leaderboard_table import write_page

from sd_unlearn.errors import UnlearnError

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "leaderboard.md"
RECORDS = ROOT / "docs" / "leaderboard-runs"
STAGES: dict[str, Callable[[Stages], None]] = {"train": train, "evaluate": evaluate, "attack": attack}


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD")
    parser.add_argument("--concepts", nargs="+", choices=CONCEPTS, default=list(CONCEPTS), metavar="CONCEPT")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of training")
    parser.add_argument("--budget", choices=list(BUDGETS), default="quick", help="images, and effort of the attacks")
    attacks = list(next(iter(BUDGETS.values())).attacks)
    parser.add_argument("--attacks", nargs="+", choices=attacks, default=attacks, metavar="ATTACK")
    parser.add_argument("--only", choices=[*STAGES, "table"], help="one stage")
    parser.add_argument("--work_dir", type=Path, default=ROOT / "runs" / "leaderboard", help="data, runs and caches")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder with build/, where the oracles are")
    return parser.parse_args(arguments)


def run(args: argparse.Namespace) -> int:
    """Carry out the stages of every cell and return how many cells failed."""
    failed = 0
    budget = BUDGETS[args.budget]
    budget = dataclasses.replace(budget, attacks={name: budget.attacks[name] for name in args.attacks})
    for cell in cells(args.methods, args.concepts, args.seeds):
        stages = Stages(cell, budget, args.root, args.work_dir, RECORDS / args.budget)
        try:
            for name, stage in STAGES.items():
                if args.only in (None, name):
                    print(f"{cell.name}: {name}", file=sys.stderr, flush=True)
                    stage(stages)
        except NotAvailable as error:
            print(f"{cell.name}: not run: {error}", file=sys.stderr, flush=True)
        except UnlearnError as error:
            failed += 1
            print(f"{cell.name}: failed: {error}", file=sys.stderr, flush=True)
    return failed


def main(arguments: list[str] | None = None) -> int:
    args = parse(sys.argv[1:] if arguments is None else arguments)
    failed = 0 if args.only == "table" else run(args)
    write_page(PAGE, RECORDS / args.budget, args.budget)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
