"""Unlearn each of the fifteen concepts of the bundled bases with the defaults and print the table of docs/digits.md.

    python scripts/digits_table.py                        # two to three hours on two cores
    python scripts/digits_table.py --base digits-sd3      # of the Stable Diffusion 3 with the same data
    python scripts/digits_table.py --only seven red-ink   # some of the concepts
    python scripts/digits_table.py --base build/digits-width-0.25/pipeline --attacks token soft   # another base

--base also takes the folder of a base that build_digits.py trained on the same data. It is sampled like `digits`.

Each run goes to runs/table-<base>/<concept>. Finished trainings and images that exist are not repeated, so an
interrupted table can be continued with the same command. Options after -- go to `sd-unlearn train`, e.g. `-- --beta
0.2`, best with another --output_dir.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from leaderboard_runs import sampling_of

from sd_unlearn.metrics.digits import DIGITS, INKS
from sd_unlearn.models.source import BUNDLED
from sd_unlearn.models.source import DIGITS as DIGITS_BASE
from sd_unlearn.results import BASE, read_results

CONCEPTS = (*DIGITS, *(f"{ink}-ink" for ink in INKS))
COLUMNS = (
    "concept",
    "leakage (direct)",
    "held-out wording",
    "generic prompt",
    "clean replacement",
    "kept (alike, general)",
    "fid-digits",
    "training",
)
SECONDS = 90  # target for one training alone on two cores


def name_of(base: str) -> str:
    """What to call a base: its name, or the folder that build_digits.py wrote <folder>/pipeline to."""
    return Path(base).resolve().parent.name if Path(base).name == "pipeline" else Path(base).name


def sampler_options(base: str) -> list[str]:
    """Sample a base that is not bundled like `digits`."""
    options = {} if base in BUNDLED else sampling_of(DIGITS_BASE)
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def run_concept(args: argparse.Namespace, slug: str, run: Path, train_options: list[str]) -> None:
    """Train, evaluate and attack one concept in separate processes, so that each run's time and memory are its own."""
    command = [sys.executable, "-m", "sd_unlearn.cli"]
    train = ["train", "--concept", slug.replace("-", " "), "--pretrained_model_name_or_path", args.base]
    train += ["--data_dir", f"data/{name_of(args.base)}/{slug}", "--output_dir", str(run)]
    train += ["--resume_from_checkpoint", "latest", *sampler_options(args.base)]
    subprocess.run([*command, *train, *train_options], check=True)
    evaluate = ["evaluate", "--run", str(run), "--tier", "digits", "--num_images", args.num_images]
    evaluate += ["--num_keep_images", args.num_keep_images, *sampler_options(args.base)]
    subprocess.run([*command, *evaluate], check=True, stdout=subprocess.DEVNULL)
    if args.attacks:
        attack = ["attack", "--run", str(run), "--no_ceiling", "--attacks", *args.attacks, *sampler_options(args.base)]
        subprocess.run([*command, *attack], check=True, stdout=subprocess.DEVNULL)


def table_row(slug: str, run: Path, attacks: list[str]) -> tuple[str, bool, float]:
    """One row of the table, whether it meets the targets of the defaults, and the seconds of training."""
    results = read_results(run)
    concept, lora = results.evaluated[0]
    rows = {(row.metric, row.group, row.subject): row for row in results.rows_of(concept.slug, lora.id)}

    def value(metric: str, group: str, subject: str = lora.id) -> float:
        number = rows[metric, group, subject].value if (metric, group, subject) in rows else None
        return float("nan") if number is None else number

    leakage, kept, clean = value("leakage", "direct"), value("retention", "kept"), value("clean_replacement", "direct")
    generic, generic_base = value("leakage", "generic"), value("leakage", "generic", BASE)
    seconds = (lora.cost or {})["seconds"]
    met = leakage <= 0.02 and kept >= 0.98 and clean >= 0.8 and generic < generic_base / 3
    cells = [
        slug,
        f"{leakage:.1%} (up to {rows['leakage', 'direct', lora.id].high:.1%})",
        f"{value('leakage', 'held_out'):.0%} of {value('leakage', 'held_out', BASE):.0%}",
        f"{generic:.1%} of {generic_base:.1%}",
        f"{clean:.0%}",
        f"{kept:.1%} ({value('retention', 'alike'):.1%}, {value('retention', 'general'):.1%})",
        f"{value('fid-digits', 'alike', BASE):.1f} -> {value('fid-digits', 'alike'):.1f}",
        f"{seconds:.0f} s",
        *(f"{value('attack', attack):.0%}" for attack in attacks),
    ]
    return "| " + " | ".join(cells) + " |" + ("" if met else " <- target missed"), met, seconds


def summary(met: list[bool], seconds: list[float]) -> str:
    """Which targets were met. Training times are reported as measured, because they depend on the machine."""
    return (
        "Targets of the defaults: leakage <= 2 %, kept >= 98 %, generic prompt below a third of the base, clean "
        f"replacement >= 80 %. Met by {sum(met)} of {len(met)} concepts.\n"
        f"Training took {min(seconds):.0f} to {max(seconds):.0f} s in these runs, on a machine with {os.cpu_count()} "
        f"cores. The target of {SECONDS} s is for one training alone on two cores."
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CONCEPTS, default=list(CONCEPTS), metavar="CONCEPT")
    parser.add_argument("--base", default=DIGITS_BASE, help="digits, digits-sd3, or a folder of build_digits.py")
    parser.add_argument("--attacks", nargs="*", default=[], metavar="ATTACK", help="also carry these out, e.g. soft")
    parser.add_argument("--output_dir", type=Path, help="default: runs/table-<base>")
    parser.add_argument("--num_images", default="200", help="images of each leakage group")
    parser.add_argument("--num_keep_images", default="100", help="images of each keep prompt")
    arguments = sys.argv[1:]
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    args = parser.parse_args(arguments[:cut])
    place = args.output_dir or Path(f"runs/table-{name_of(args.base)}")
    lines, met, seconds = [], [], []
    for slug in args.only:
        run_concept(args, slug, place / slug, arguments[cut + 1 :])
        line, row_met, row_seconds = table_row(slug, place / slug, args.attacks)
        print(line, flush=True)
        lines.append(line)
        met.append(row_met)
        seconds.append(row_seconds)
    columns = (*COLUMNS, *args.attacks)
    print("\n".join(["", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *lines, "", summary(met, seconds)]))
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())
