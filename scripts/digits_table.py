"""Unlearn each of the fifteen concepts of the bundled base with default settings and print the table of docs/digits.md.

    python scripts/digits_table.py                        # about an hour on two cores
    python scripts/digits_table.py --only seven red-ink   # some of them

Runs go to runs/table/<concept>; a finished one is not run again, so an interrupted table goes on. Options after
-- go to `sd-unlearn train`, e.g. `-- --beta 0.2`, best with another --output_dir.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from sd_unlearn.io.run_folder import RESULTS, TRAINING
from sd_unlearn.metrics.digits import DIGITS, INKS
from sd_unlearn.results import BASE, Results, read_results

CONCEPTS = (*DIGITS, *(f"{ink}-ink" for ink in INKS))
COLUMNS = (
    "concept",
    "leakage (direct)",
    "held-out wording",
    "generic prompt",
    "clean replacement",
    "kept",
    "fid-digits",
    "training",
)


def street(slug: str, run: Path, train_options: list[str]) -> None:
    """Train and evaluate one concept in processes of their own, so that time and memory are each run's."""
    command = [sys.executable, "-m", "sd_unlearn.cli"]
    if not (run / TRAINING).is_file():
        train = ["train", "--concept", slug.replace("-", " "), "--output_dir", str(run), *train_options]
        subprocess.run([*command, *train], check=True)
    if not (run / RESULTS).is_file():
        subprocess.run([*command, "evaluate", "--run", str(run)], check=True, stdout=subprocess.DEVNULL)


def line(slug: str, results: Results) -> tuple[str, bool]:
    """One row of the table, and whether it meets the requirements for the defaults."""
    concept, lora = results.evaluated[0]
    rows = {(r.metric, r.group, r.subject): r for r in results.rows_of(concept.slug, lora.id)}

    def value(metric: str, group: str, subject: str = lora.id) -> float:
        found = rows[metric, group, subject].value
        assert found is not None
        return found

    leak, kept, clean = value("leakage", "direct"), value("retention", "kept"), value("clean_replacement", "direct")
    generic, generic_base = value("leakage", "generic"), value("leakage", "generic", BASE)
    seconds = (lora.cost or {})["seconds"]
    met = leak <= 0.02 and kept >= 0.98 and clean >= 0.8 and generic < generic_base / 3 and seconds <= 90
    high = rows["leakage", "direct", lora.id].high
    cells = [
        slug,
        f"{leak:.1%} (up to {high:.1%})",
        f"{value('leakage', 'held_out'):.0%} of {value('leakage', 'held_out', BASE):.0%}",
        f"{generic:.1%} of {generic_base:.1%}",
        f"{clean:.0%}",
        f"{kept:.1%} (alike {value('retention', 'alike'):.1%}, general {value('retention', 'general'):.1%})",
        f"{value('fid-digits', 'alike', BASE):.1f} -> {value('fid-digits', 'alike'):.1f}",
        f"{seconds:.0f} s",
    ]
    return "| " + " | ".join(cells) + " |" + ("" if met else " <- not met"), met


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CONCEPTS, default=list(CONCEPTS), metavar="CONCEPT")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/table"))
    arguments = sys.argv[1:]
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    args = parser.parse_args(arguments[:cut])
    lines, all_met = [], True
    for slug in args.only:
        run = args.output_dir / slug
        street(slug, run, arguments[cut + 1 :])
        text, met = line(slug, read_results(run))
        all_met &= met
        lines.append(text)
        print(text, flush=True)
    print("\n".join(["", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|", *lines]))
    print(
        "\nAsked: leakage <= 2 %, kept >= 98 %, generic under a third of the base's, clean >= 80 %, <= 90 s:", end=" "
    )
    print("met." if all_met else "NOT met by every concept.")
    return 0 if all_met else 1


if __name__ == "__main__":
    sys.exit(main())
