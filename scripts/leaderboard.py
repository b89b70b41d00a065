"""Compare methods of unlearning on a bundled base: train, evaluate and attack each, and write its page in docs/.

    python scripts/leaderboard.py --methods pu base --concepts seven --budget quick
    python scripts/leaderboard.py --budget standard        # everything: days on one core
    python scripts/leaderboard.py --base emoji --methods pu uce base --seeds 0 --skip attack
    python scripts/leaderboard.py --only table             # the page from the records that exist

A cell is a method on a concept with a seed of training. Its record in docs/leaderboard-runs has one part for each
stage. A stage is repeated only if its weights, options or attacks have changed; an interrupted stage
resumes. A cell that fails is reported, and the others continue. Cells without a record are shown as not run.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

from leaderboard_cells import NotAvailable, Stages, attack, evaluate, train
from leaderboard_methods import METHODS, cells
from leaderboard_page import write_page
from leaderboard_studies import QUICK, STUDIES

from sd_unlearn.errors import UnlearnError
from sd_unlearn.models.source import DIGITS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
STAGES: dict[str, Callable[[Stages], None]] = {"train": train, "evaluate": evaluate, "attack": attack}


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", choices=list(STUDIES), default=DIGITS)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD")
    parser.add_argument("--concepts", nargs="+", metavar="CONCEPT", help="default: all that the page has")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of training")
    parser.add_argument("--budget", choices=("quick", "standard"), default="quick", help="of images and attacks")
    parser.add_argument("--attacks", nargs="+", choices=list(QUICK), default=list(QUICK), metavar="ATTACK")
    parser.add_argument("--skip", nargs="+", choices=list(STAGES), default=[], metavar="STAGE", help="stages left out")
    parser.add_argument("--only", choices=[*STAGES, "table"], help="one stage")
    parser.add_argument("--work_dir", type=Path, default=ROOT / "runs" / "leaderboard", help="data, runs and caches")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder with build/, where the oracles are")
    args = parser.parse_args(arguments)
    known = STUDIES[args.base].concepts
    args.concepts = args.concepts or list(known)
    if unknown := [concept for concept in args.concepts if concept not in known]:
        parser.error(f"--concepts {', '.join(unknown)}: on {args.base} there are {', '.join(known)}.")
    return args


def records_of(args: argparse.Namespace) -> Path:
    """The folder of the records."""
    return DOCS / "leaderboard-runs" / args.base / args.budget


def run(args: argparse.Namespace) -> int:
    """Carry out the stages of every cell and return how many cells failed."""
    failed = 0
    budget = STUDIES[args.base].budgets[args.budget]
    budget = dataclasses.replace(budget, attacks={name: budget.attacks[name] for name in args.attacks})
    for cell in cells(args.base, args.methods, args.concepts, args.seeds):
        stages = Stages(cell, budget, args.root, args.work_dir, records_of(args))
        try:
            for name, stage in STAGES.items():
                if args.only in (None, name) and name not in args.skip:
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
    study = STUDIES[args.base]
    write_page(DOCS / study.page, study, records_of(args), args.budget)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
