"""What a training step costs, and how soon a concept is forgotten. Prints Markdown; --json PATH writes the figures.

    python scripts/bench.py step                      # digits
    python scripts/bench.py step --base sd15-random   # the real size of SD 1.5, random weights (made once in build/)
    python scripts/bench.py forget --minutes 30       # the defaults against the paper's setting, on digits

step: seconds of an optimizer step and peak memory, each variant in a process of its own, rounds interleaved:
    floor    bare UNet with a LoRA, forward, backward and AdamW on tensors that are there already
    noise    our trainer's real loop, --target noise: the same network passes as the floor
    teacher  our trainer's real loop as it is by default, which also asks the frozen base
    common   what common trainers do: VAE and text encoder on every batch, the full UNet trained
Memory is the most that the process ever held (on a GPU: of the GPU). Asked: noise / floor <= 1.05 in time and <= 1.10
in memory. Ratios of one run mean something, seconds of a busy machine little; CPU time, all threads together, is what
others on the machine disturb least (waiting threads count as busy, so compare it at the same number of them).

forget: seconds and images until two probes in a row (60 + 60 pictures of fixed seeds) find leakage <= 2 % with
retention >= 98 %, from the same start and folder; told is the first of the two.
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

import bench_forget

HERE = Path(__file__).parent
BUILD = HERE.parent / "build"  # git ignores it
VARIANTS = ("floor", "noise", "teacher", "common")
SD15 = "sd15-random"


def step(args: argparse.Namespace) -> dict[str, Any]:
    """{base, steps, rounds, variants: {name: figures}}, of --rounds interleaved runs of --steps steps each."""
    base = args.base if args.base != SD15 else str(built(BUILD / SD15))
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in args.variants}
    for number in range(args.rounds):
        for name in args.variants:
            runs[name].append(measure(name, base, args.steps))
            middle = statistics.median(runs[name][-1]["seconds"])
            print(f"round {number + 1}, {name}: {middle:.3f} s a step", file=sys.stderr, flush=True)
    return {
        "base": args.base,
        "steps": args.steps,
        "rounds": args.rounds,
        "variants": {name: summary(found) for name, found in runs.items()},
    }


def built(folder: Path) -> Path:
    """The random-weight base, made in a process of its own unless it is there."""
    if not (folder / "model_index.json").is_file():  # which diffusers writes last
        subprocess.run([sys.executable, str(HERE / "bench_base.py"), str(folder)], check=True)
    return folder


def measure(variant: str, base: str, steps: int) -> dict[str, Any]:
    """One variant's seconds of each step, peak memory and forward rows, from its own process."""
    command = [sys.executable, str(HERE / "bench_step.py"), variant, base, str(steps), str(BUILD / "bench")]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{variant} failed:\n{done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """A variant's rounds as one: the median step over all of them, the median of the peaks."""
    medians = {key: statistics.median(s for run in runs for s in run[key]) for key in ("seconds", "cpu_seconds")}
    return {
        "median_seconds": medians["seconds"],
        "median_cpu_seconds": medians["cpu_seconds"],
        "round_medians": [statistics.median(r["seconds"]) for r in runs],
        "peak_memory_mb": statistics.median(r["peak_memory_mb"] for r in runs),
        **{key: runs[0][key] for key in ("rows", "forward_rows", "device", "threads")},
    }


def step_table(result: dict[str, Any]) -> str:
    """Markdown: a row a variant, ratios to the floor where it was measured."""
    variants = result["variants"]
    first = variants.get("floor")
    lines = [
        "| variant | s / step | / floor | CPU s / step | / floor | peak memory | / floor | images | forward rows |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, v in variants.items():
        measures = {"median_seconds": ".3f", "median_cpu_seconds": ".3f", "peak_memory_mb": ".0f"}
        cells = [f"{v[k]:{form}} | " + (f"{v[k] / first[k]:.2f}" if first else "–") for k, form in measures.items()]
        more = v["forward_rows"] - v["rows"]
        rows = f"{v['forward_rows']:g}" + (f" ({more:g} more than it has images)" if more else "")
        lines.append(f"| {name} | {' | '.join(cells)} | {v['rows']} | {rows} |")
    some = next(iter(variants.values()))
    what = f"{result['base']}, {some['device']}, threads: {some['threads']}, memory in MB"
    return "\n".join(
        [*lines, "", f"{what}; {result['rounds']} rounds of {result['steps']} steps, interleaved; medians."]
    )


def forget(args: argparse.Namespace) -> dict[str, Any]:
    """{minutes, concept, settings: {name: Outcome as a dictionary}}."""
    found = bench_forget.run(
        args.minutes, args.concept, args.probe_steps, args.paper_probe_steps, BUILD / "bench-forget", args.settings
    )
    settings = {name: dataclasses.asdict(outcome) for name, outcome in found.items()}
    return {"minutes": args.minutes, "concept": args.concept, "settings": settings}


def forget_table(result: dict[str, Any]) -> str:
    """Markdown: a row a setting; times over ours where both got there."""
    ours = next(iter(result["settings"].values()))
    lines = [
        "| setting | there after | images | leakage | retention | / ours | ended |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, o in result["settings"].items():
        if o["leakage"] is None:
            lines.append(f"| {name} | no probe in {result['minutes']:g} min | – | – | – | – | {o['stopped']} |")
            continue
        there = f"{o['seconds']:.0f} s" if o["reached"] else f"not in {o['last_seconds']:.0f} s (best probe shown)"
        both = o["reached"] and ours["reached"]
        times = f"{o['seconds'] / ours['seconds']:.1f}" if both else "–"
        shares = f"{o['leakage']:.1%} | {o['retention']:.1%}"
        lines.append(f"| {name} | {there} | {o['images']} | {shares} | {times} | {o['stopped']} |")
    return "\n".join([*lines, "", f"{result['concept']} on digits, at most {result['minutes']:g} minutes a setting."])


VERBS = {"step": (step, step_table), "forget": (forget, forget_table)}


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("step", help="cost of an optimizer step")
    one.add_argument("--base", choices=("digits", SD15), default="digits")
    one.add_argument("--steps", type=int, default=20, help="counted steps a round")
    one.add_argument("--rounds", type=int, default=3)
    one.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    two = verbs.add_parser("forget", help="time until a concept is forgotten")
    two.add_argument("--minutes", type=float, default=30.0, help="limit for each setting")
    two.add_argument("--concept", default="seven")
    two.add_argument("--probe_steps", type=int, default=25, help="of our setting")
    two.add_argument("--paper_probe_steps", type=int, default=500, help="of the paper's, which takes more steps")
    names = list(bench_forget.SETTINGS)
    two.add_argument("--settings", nargs="+", choices=names, default=names)
    for verb in (one, two):
        verb.add_argument("--json", type=Path, help="also write the figures there")
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
