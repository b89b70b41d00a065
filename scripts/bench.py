"""Measure the cost of a training step and of an image, the time to unlearn, and what workers save. Prints a table.

    python scripts/bench.py step                      # digits
    python scripts/bench.py step --base sd15-random   # the size of SD 1.5, random weights (created once in build/)
    python scripts/bench.py forget --minutes 30       # the defaults compared with the paper's setting, on digits
    python scripts/bench.py batch --engine ray        # a list of 12 jobs with one worker and with two, on digits
    python scripts/bench.py sample                    # generating images, compared with the bare pipeline

step: seconds per optimizer step and peak memory. Each variant runs in a separate process, and rounds are interleaved:
    floor    forward, backward and AdamW of a bare UNet with a LoRA, on tensors in memory
    noise    the trainer's loop with --target noise: the same network passes as floor
    teacher  the trainer's loop with its defaults, which also runs the frozen base. --teacher_reuse computes its
             predictions in 20 of 100 steps, so give a multiple of 100
    common   like common trainers: VAE and text encoder run on every batch, all weights of the UNet are trained
Memory is the peak of the process (on a GPU: of the GPU). Targets: noise / floor <= 1.05 in time and <= 1.10 in memory.
Compare ratios within one run; seconds depend on what else the machine does. CPU time, summed over all threads, is
disturbed least, but waiting threads count as busy, so compare it at the same number of threads.

forget: seconds and images until two consecutive probes (60 + 60 images of fixed seeds) measure leakage <= 2 %,
retention >= 98 % and clean replacement >= 80 %. The time of the first of the two is reported. All settings start from
the same data folder.

batch: seconds from the start of the first task to the end of the last, with 1 and with 2 workers of one core each.
efficiency = seconds with 1 worker / (2 x seconds with 2). Needs a machine with two cores that does nothing else.

sample: seconds of generating images as `render` and `evaluate` do, and with the bare pipeline at the same batch size.
Rounds are interleaved in one process. Target: ratio <= 1.05.

--json PATH also writes all values as JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import bench_batch
import bench_forget
import bench_sample

HERE = Path(__file__).parent
BUILD = HERE.parent / "build"  # git ignores it
VARIANTS = ("floor", "noise", "teacher", "common")
SD15 = "sd15-random"


def step(args: argparse.Namespace) -> dict[str, Any]:
    """Run each variant --rounds times with --steps steps: {base, steps, rounds, variants: {name: summary}}."""
    base = args.base if args.base != SD15 else str(random_base(BUILD / SD15))
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in args.variants}
    for number in range(args.rounds):
        for name in args.variants:
            runs[name].append(measure(name, base, args.steps))
            mean = statistics.fmean(runs[name][-1]["seconds"])
            print(f"round {number + 1}, {name}: {mean:.3f} s per step", file=sys.stderr, flush=True)
    return {
        "base": args.base,
        "steps": args.steps,
        "rounds": args.rounds,
        "variants": {name: summary(rounds) for name, rounds in runs.items()},
    }


def random_base(folder: Path) -> Path:
    """Create the random-weight base in a separate process, unless it exists."""
    if not (folder / "model_index.json").is_file():  # diffusers writes this file last
        subprocess.run([sys.executable, str(HERE / "bench_base.py"), str(folder)], check=True)
    return folder


def measure(variant: str, base: str, steps: int) -> dict[str, Any]:
    """Seconds of each step, peak memory and forward rows of one variant, measured in a separate process."""
    command = [sys.executable, str(HERE / "bench_step.py"), variant, base, str(steps), str(BUILD / "bench")]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{variant} failed:\n{done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Combine the rounds of a variant: the mean over all steps, as they differ in cost, and the median of the peaks."""
    means = {key: statistics.fmean(s for run in runs for s in run[key]) for key in ("seconds", "cpu_seconds")}
    return {
        "seconds": means["seconds"],
        "cpu_seconds": means["cpu_seconds"],
        "round_seconds": [statistics.fmean(r["seconds"]) for r in runs],
        "peak_memory_mb": statistics.median(r["peak_memory_mb"] for r in runs),
        **{key: runs[0][key] for key in ("rows", "forward_rows", "device", "threads")},
    }


def step_table(result: dict[str, Any]) -> str:
    """Markdown with one row per variant; with ratios to the floor if the floor was measured."""
    variants = result["variants"]
    first = variants.get("floor")
    lines = [
        "| variant | s / step | / floor | CPU s / step | / floor | peak memory | / floor | images | forward rows |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, v in variants.items():
        measures = {"seconds": ".3f", "cpu_seconds": ".3f", "peak_memory_mb": ".0f"}
        cells = [f"{v[k]:{form}} | " + (f"{v[k] / first[k]:.2f}" if first else "–") for k, form in measures.items()]
        more = round(v["forward_rows"] - v["rows"], 1)
        rows = f"{v['forward_rows']:.3g}" + (f" ({more:g} more than images)" if more else "")
        lines.append(f"| {name} | {' | '.join(cells)} | {v['rows']} | {rows} |")
    machine = next(iter(variants.values()))
    footnote = (
        f"{result['base']}, {machine['device']}, threads: {machine['threads']}, memory in MB; "
        f"{result['rounds']} rounds of {result['steps']} steps, interleaved; means."
    )
    return "\n".join([*lines, "", footnote])


def forget(args: argparse.Namespace) -> dict[str, Any]:
    """Train by each setting: {minutes, concept, settings: {name: Outcome as a dictionary}}."""
    outcomes = bench_forget.run(
        args.minutes, args.concept, args.probe_steps, args.paper_probe_steps, BUILD / "bench-forget", args.settings
    )
    settings = {name: dataclasses.asdict(outcome) for name, outcome in outcomes.items()}
    return {"minutes": args.minutes, "concept": args.concept, "settings": settings}


def forget_table(result: dict[str, Any]) -> str:
    """Markdown with one row per setting; with the ratio of times to ours if both reached the goal."""
    ours = next(iter(result["settings"].values()))
    lines = [
        "| setting | goal reached after | images | leakage | retention | clean | / ours | ended |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, o in result["settings"].items():
        if o["leakage"] is None:
            lines.append(f"| {name} | no probe in {result['minutes']:g} min | – | – | – | – | – | {o['stopped']} |")
            continue
        time = f"{o['seconds']:.0f} s" if o["reached"] else f"not in {o['last_seconds']:.0f} s (best probe shown)"
        both = o["reached"] and ours["reached"]
        ratio = f"{o['seconds'] / ours['seconds']:.1f}" if both else "–"
        shares = f"{o['leakage']:.1%} | {o['retention']:.1%} | {o['clean']:.0%}"
        lines.append(f"| {name} | {time} | {o['images']} | {shares} | {ratio} | {o['stopped']} |")
    return "\n".join([*lines, "", f"{result['concept']} on digits, at most {result['minutes']:g} minutes per setting."])


VERBS = {
    "step": (step, step_table),
    "forget": (forget, forget_table),
    "batch": (bench_batch.batch, bench_batch.batch_table),
    "sample": (bench_sample.sample, bench_sample.sample_table),
}


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("step", help="cost of an optimizer step")
    one.add_argument("--base", choices=("digits", SD15), default="digits")
    one.add_argument("--steps", type=int, default=200, help="measured steps per round")
    one.add_argument("--rounds", type=int, default=3)
    one.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    two = verbs.add_parser("forget", help="time until a concept is unlearned")
    two.add_argument("--minutes", type=float, default=30.0, help="limit for each setting")
    two.add_argument("--concept", default="seven")
    two.add_argument("--probe_steps", type=int, default=25, help="steps between probes, for the defaults")
    two.add_argument(
        "--paper_probe_steps",
        type=int,
        default=500,
        help="steps between probes, for the paper's setting, which takes more steps",
    )
    names = list(bench_forget.SETTINGS)
    two.add_argument("--settings", nargs="+", choices=names, default=names)
    three = verbs.add_parser("batch", help="efficiency of two workers")
    three.add_argument("--engine", choices=("local", "ray"), default="local")
    three.add_argument("--steps", type=int, default=40, help="steps of each training")
    four = verbs.add_parser("sample", help="generating images, compared with the bare pipeline")
    four.add_argument("--base", default="digits", help="name or folder")
    four.add_argument("--images", type=int, default=200, help="of each variant in a round")
    four.add_argument("--inference_steps", type=int, help="default: those of evaluate")
    four.add_argument("--rounds", type=int, default=5)
    for verb in (one, two, three, four):
        verb.add_argument("--json", type=Path, help="also write all values to this file")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(sys.argv[1:] if arguments is None else arguments)
    run, table = VERBS[args.verb]
    result = run(args) | {"cores": os.cpu_count()}
    print(table(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
