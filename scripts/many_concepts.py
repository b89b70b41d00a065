"""Erase 1, 10, 50 and 100 things of the bundled base `emoji` with one LoRA, and write the table of docs/emoji.md.

    python scripts/many_concepts.py --methods pu uce speed --counts 1 10
    python scripts/many_concepts.py --methods sum least_squares --counts 10    # LoRAs trained apart, by leaderboard.py
    python scripts/many_concepts.py --methods one_by_one --counts 2 5 10       # each on what the former ones left
    python scripts/many_concepts.py --only table

The first ten things are those of leaderboard.py, the others follow in a fixed random order. What exists in
--work_dir is not repeated, and interrupted trainings continue. The records are in docs/leaderboard-runs/emoji/many.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from emoji_concepts import concept_file
from leaderboard_cells import Stages
from leaderboard_cells import train as train_cell
from leaderboard_methods import METHODS, Cell
from leaderboard_page import replace_between
from leaderboard_pictures import write_grid
from leaderboard_runs import UNWATCHED, digest, train_once, trained_files, weights_in
from leaderboard_studies import STUDIES
from leaderboard_table import percent
from many_curve import STYLE, Point, point_of, single
from many_curve import draw as draw_curve
from one_by_one import evaluate_merged, merge, serve

import sd_unlearn
from sd_unlearn.config.evaluate import EvaluateConfig
from sd_unlearn.config.fuse import FuseMethod
from sd_unlearn.data.several import read_concepts
from sd_unlearn.evaluation.generate import ImageCache
from sd_unlearn.evaluation.loras import ModelVariant, open_run
from sd_unlearn.evaluation.prompts import TIERS, override_counts, plan_images
from sd_unlearn.io.files import write_json, write_text
from sd_unlearn.io.paths import slugify
from sd_unlearn.io.reading import read_json
from sd_unlearn.io.run_folder import TRAINING, weights_sha256
from sd_unlearn.metrics.emoji import THINGS, EmojiClassifier
from sd_unlearn.metrics.statistics import wilson
from sd_unlearn.models.base import load_base
from sd_unlearn.models.find_base import find_base
from sd_unlearn.models.sampling import BASE_SAMPLERS
from sd_unlearn.models.source import BUNDLED, EMOJI
from sd_unlearn.results import BASE, Results

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
RECORDS = DOCS / "leaderboard-runs" / "emoji" / "many"
START, END = "<!-- many:start -->", "<!-- many:end -->"
COUNTS = (1, 10, 50, 100)
SEQUENTIAL = "one_by_one"
TITLES = {
    "pu": "ours",
    "uce": "UCE",
    "speed": "SPEED",
    "rece": METHODS["rece"].title,
    "rece-3": METHODS["rece-3"].title,
    "sum": "ours, trained apart and summed",
    "least_squares": "ours, trained apart and fused",
    SEQUENTIAL: "ours, one request after another",
}
FUSED = ("sum", "least_squares")
IMAGES, KEPT_IMAGES = 20, 2  # of each concept's own prompt, and of each keep prompt
SHOWN = ("pu", 10, None)  # on the picture: method, number of things, steps
FEWER_IMAGES = {"num_positive": 24}  # of each concept, from 50 concepts on


def chosen(count: int) -> list[str]:
    """The first `count` things."""
    first = list(STUDIES[EMOJI].groups["Things"])
    others = [name for name in THINGS if name not in first]
    random.Random(0).shuffle(others)
    return [*first, *others][:count]


def list_file(names: Sequence[str], folder: Path) -> Path:
    """A file with the concepts of these names, for --concept."""
    file = folder / f"{len(names) if len(names) > 1 else slugify(names[0])}.yaml"
    concepts = [yaml.safe_load(concept_file(name)[1]) for name in names]
    folder.mkdir(parents=True, exist_ok=True)
    write_text(file, yaml.safe_dump(concepts, sort_keys=False, allow_unicode=True))
    return file


def identity(names: Sequence[str]) -> str:
    """A hash of the base and of the concept files of these names: runs of an earlier version are not reused."""
    return digest([weights_in(BUNDLED[EMOJI]), [concept_file(name) for name in names]])


def train(method: str, count: int, steps: int | None, work: Path) -> Path:
    """The run folder of a method on the first `count` things, trained if there is none."""
    key = identity(chosen(count))
    run = work / "runs" / f"many-{method}-{count}{f'-{steps}' if steps else ''}-{key}"
    if method in FUSED:
        apart = [train_alone(name, work) for name in chosen(count)]
        return fuse(method, apart, run.with_name(f"{run.name}-{digest([weights_sha256(one) for one in apart])}"))
    options: dict[str, Any] = dict(METHODS[method].options)
    if method == "pu":
        options |= {"data_dir": work / "data" / f"many-{count}-{key}", **UNWATCHED}
        options |= {"max_train_steps": steps} if steps else {}
        options |= FEWER_IMAGES if count >= 50 else {}
    return train_once(str(list_file(chosen(count), work / "lists")), run, options, count)


def fuse(method: str, apart: Sequence[Path], run: Path) -> Path:
    """The run folder with LoRAs trained apart as one, fused if there is none."""
    if not (run / TRAINING).is_file():
        how: FuseMethod = "sum" if method == "sum" else "least_squares"
        sd_unlearn.fuse([str(one) for one in apart], method=how, output_dir=run)
    return run


def train_alone(name: str, work: Path) -> Path:
    """The run folder of one thing, trained with the defaults: that of `leaderboard.py --base emoji`."""
    stages = Stages(Cell("pu", name, 0, EMOJI), STUDIES[EMOJI].budgets["quick"], ROOT, work, RECORDS.parent / "quick")
    train_cell(stages)
    return stages.run


def record(method: str, count: int, steps: int | None, work: Path) -> None:
    """Train and evaluate, and write the record."""
    name, names = f"{method}-{count}{f'-{steps}' if steps else ''}", chosen(count)
    if method == SEQUENTIAL:
        runs = serve(train_alone(names[0], work), names, work)
        weights = weights_in(merge(runs[-1]))
    else:
        runs = [train(method, count, steps, work)]
        weights = weights_sha256(runs[0])
    file = RECORDS / f"{name}.json"
    key = digest([identity(names), weights_in(EmojiClassifier.reader.folder), weights])
    if file.is_file() and read_json(file).get("key") == key:
        return
    if (method, count, steps) == SHOWN:
        draw(runs[0], work, DOCS / "images" / "emoji-ten.png")
    options: dict[str, Any] = {"groups": ["direct", "alike", "general"], "cache_dir": work / "evaluation"}
    options |= {"num_images": IMAGES if count <= 10 else IMAGES // 2, "num_keep_images": KEPT_IMAGES}
    if method == SEQUENTIAL:
        concepts = list_file(names, work / "lists")
        results = evaluate_merged(merge(runs[-1]), concepts, work / "runs" / f"{name}-{key}", options)
    else:
        results = sd_unlearn.evaluate(run=runs[0], **options)
    apart = [train_alone(name, work) for name in names] if method in FUSED else []
    training = [read_json(run / TRAINING) for run in (*runs, *apart)]
    costs = [one.get("cost", {}) for one in training]
    write_json(
        file,
        {
            "key": key,
            "method": method,
            "count": count,
            "seconds": sum(cost.get("seconds") or 0 for cost in costs),
            "steps": sum(cost.get("steps") or 0 for cost in costs) or None,
            "rank": training[0].get("rank"),
            "bytes": sum(path.stat().st_size for run in runs for path in trained_files(run)),
            **measured(results),
        },
    )


def draw(run: Path, work: Path, file: Path) -> None:
    """Draw the first image of each erased thing, and of as many retained ones, without and with the LoRA."""
    base = load_base(find_base(EvaluateConfig(pretrained_model_name_or_path=EMOJI)))
    cache = ImageCache(work / "evaluation", base.describe(), BASE_SAMPLERS[EMOJI])
    parts = read_concepts(run / "concept.yaml").parts
    plans = [plan_images(part, override_counts(TIERS["emoji"], IMAGES, KEPT_IMAGES, []), [0]) for part in parts]
    erased = [next(spec for spec in plan if spec.group == "direct") for plan in plans]
    things = [spec for spec in plans[0] if spec.group == "general" and spec.prompt.text.endswith(" emoji")]
    stride = len(things) // len(parts)
    specs = [*erased, *things[::stride][: len(parts)]]
    rows = []
    for variant in (ModelVariant(), ModelVariant(open_run(run))):
        cache.generate(lambda: base, variant, specs, "generate the picture")
        rows.append(cache.paths(variant, specs))
    columns = len(parts)
    write_grid(file, [row[part : part + columns] for part in (0, columns) for row in rows])


def measured(results: Results) -> dict[str, Any]:
    """Leakage of each concept with and without the LoRA, [value, n], and the retention of what each retains."""
    [subject] = [subject.id for subject in results.compared]
    found: dict[str, Any] = {"leakage": {}, "base": {}, "retention": {}}
    for row in results.rows:
        name = {("leakage", subject): "leakage", ("leakage", BASE): "base", ("retention", subject): "retention"}.get(
            (row.metric, row.subject)
        )
        if name and row.group in ("direct", "kept") and row.value is not None:
            found[name][row.concept] = [round(row.value, 6), row.n]
    return found


def table() -> str:
    """One line for each record, sorted by the number of concepts."""
    records = [read_json(file) for file in RECORDS.glob("*.json")]
    columns = "| things | method | leakage, mean % | worst % | base % | retention % | steps | training | file |"
    lines = [columns, "|---|---|---|---|---|---|---|---|---|"]
    order = list(TITLES)
    for one in sorted(records, key=lambda one: (one["count"], order.index(one["method"]), one["steps"] or 0)):
        leaks = list(one["leakage"].values())
        hits, n = sum(value * n for value, n in leaks), sum(n for _, n in leaks)
        low, high = wilson(round(hits), n)
        cells = [
            str(one["count"]),
            TITLES[one["method"]],
            f"{percent(hits / n)} ({percent(low)}–{percent(high)})",
            percent(max(value for value, _ in leaks)),
            percent(mean(one["base"])),
            percent(mean(one["retention"])),
            str(one["steps"] or "–"),
            f"{one['seconds']:.{1 if one['seconds'] < 10 else 0}f} s",
            f"{one['bytes'] / 1e3:,.0f} kB",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def mean(of: Mapping[str, Sequence[float]]) -> float:
    return statistics.fmean(value for value, _ in of.values())


def write_curve(file: Path) -> None:
    """Draw the records, with those of things that leaderboard.py erased one at a time."""
    points: dict[str, list[Point]] = {method: [] for method in STYLE}
    for one in map(read_json, RECORDS.glob("*.json")):
        points.get(one["method"], []).append(point_of(one))
    for method in points:
        files = (RECORDS.parent / "quick" / f"{Cell(method, name, 0, EMOJI).name}.json" for name in chosen(10))
        if alone := single([read_json(file) for file in files if file.is_file()]):
            points[method].append(alone)
    draw_curve(points, TITLES, file)


def write_table(page: Path) -> None:
    """Replace the generated part of the page; see `replace_between`."""
    replace_between(page, START, END, table())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=list(TITLES), default=list(TITLES), metavar="METHOD")
    parser.add_argument("--counts", nargs="+", type=int, default=list(COUNTS), help="of things")
    parser.add_argument("--steps", type=int, help="--max_train_steps of ours")
    parser.add_argument("--only", choices=["table"], help="only write the table from the records")
    parser.add_argument("--work_dir", type=Path, default=ROOT / "runs" / "leaderboard", help="data, runs and caches")
    args = parser.parse_args(arguments)
    for count in args.counts if args.only is None else ():
        for method in args.methods:
            if method not in (*FUSED, SEQUENTIAL) or 1 < count <= len(STUDIES[EMOJI].groups["Things"]):
                print(f"{count} things: {method}", file=sys.stderr, flush=True)
                record(method, count, args.steps if method == "pu" else None, args.work_dir)
    write_table(DOCS / "emoji.md")
    write_curve(DOCS / "images" / "emoji-many.png")


if __name__ == "__main__":
    main()
