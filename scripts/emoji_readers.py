"""How far can the classifier of `emoji` be trusted? Others, trained apart, classify the same images.

    python scripts/build_emoji.py --reader_seed 1 --reader_channels 24 48 96 160   # another seed and other widths
    python scripts/build_emoji.py --reader_seed 2 --reader_without noto            # one that never saw a style
    python scripts/emoji_readers.py                                                # needs both; trains, generates
    python scripts/emoji_readers.py --attacked "soft=build/attacked"               # also images of an attack on pistol
    python scripts/emoji_readers.py --only table                                   # the table from the record

The images are those of `leaderboard.py --base emoji`: of the base and of models that a thing was erased from. What
--work_dir does not have is trained and generated. The record is docs/leaderboard-runs/emoji/readers.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from build_emoji import held_apart
from emoji_data import compose, load_drawings, place
from emoji_table import read, share
from leaderboard_cells import Stages, train
from leaderboard_methods import METHODS, Cell
from leaderboard_page import replace_between
from leaderboard_studies import STUDIES
from leaderboard_table import percent
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from unseen import opened

from sd_unlearn.io.files import write_json
from sd_unlearn.io.reading import read_json
from sd_unlearn.metrics.base import KEEP_GROUPS
from sd_unlearn.metrics.emoji import SIZE, STYLES, THINGS, EmojiReader, load_reader
from sd_unlearn.models.source import EMOJI
from sd_unlearn.results import BASE

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "docs" / "leaderboard-runs" / "emoji" / "readers.json"
START, END = "<!-- readers:start -->", "<!-- readers:end -->"
CONCEPTS = ("pistol", "cat")  # both have look-alikes
ATTACKED = "pistol"  # what the images of --attacked should show
NEW_COLOURS = ((0.95, 0.60, 0.15), (0.45, 0.20, 0.60), (0.20, 0.70, 0.75), (0.45, 0.30, 0.15))  # RGB of backgrounds
BUNDLED = "bundled"
Readers = Mapping[str, EmojiReader]


def other_readers(work: Path) -> dict[str, EmojiReader]:
    """The classifiers that build_emoji.py --reader_seed left in `work`, by a name for the table."""
    found = {}
    for file in sorted(work.glob("reader-*.safetensors")):
        with safe_open(file, "pt") as opened_file:
            without = (opened_file.metadata() or {}).get("without")
        found[f"without {without}" if without else file.stem] = load_other(file)
    return found


def load_other(file: Path) -> EmojiReader:
    """A classifier of any width, saved by build_emoji.py --reader_seed."""
    weights = load_file(file)
    channels = [len(weights[f"body.{6 * level}.weight"]) for level in range(4)]  # of the first of two blocks each
    reader = EmojiReader(channels)
    reader.load_state_dict(weights)
    return reader.eval()


def compared(readers: Readers, images: Tensor, wanted: Tensor | int) -> dict[str, Any]:
    """How often each classifier sees the thing that is wanted, and how often it agrees with the bundled one.

    Args:
        images: [N, 3, 64, 64] in [-1, 1].
        wanted: A thing's number, or one for each image, [N].
    """
    predicted = {name: read(reader, images)["thing"].argmax(1) for name, reader in readers.items()}
    return {
        "n": len(images),
        "wanted": {name: round(share(p == wanted), 4) for name, p in predicted.items()},
        "agree": {name: round(share(p == predicted[BUNDLED]), 4) for name, p in predicted.items()},
    }


def on_drawings(readers: Readers, work: Path) -> dict[str, Any]:
    """Things in new placements of the drawings: of each style, and on colours that no classifier has seen."""
    images, labels = held_apart(argparse.Namespace(work_dir=work), copies=2)
    rows = {}
    for number, style in enumerate(STYLES):
        own = labels["style"] == number
        rows[f"drawings, {style}"] = compared(readers, images[own], labels["thing"][own])
    drawings = load_drawings(work)
    torch.manual_seed(70_000_001)
    colours = torch.tensor(NEW_COLOURS)[torch.arange(len(drawings.things)) % len(NEW_COLOURS)]
    placed = torch.cat([place(part) for part in drawings.pixels.split(200)])
    rows["drawings, new backgrounds"] = compared(readers, compose(placed, colours), drawings.things)
    return rows


def on_generated(readers: Readers, method: str, concepts: Sequence[str], work: Path) -> dict[str, Any]:
    """Images of models that a thing was erased from, or of the base: its own prompts, and those of all else."""
    own: list[tuple[Path, int]] = []
    rest: list[tuple[Path, int]] = []
    for concept in concepts:
        cell = Cell(method, concept, 0, EMOJI)
        stages = Stages(cell, STUDIES[EMOJI].budgets["quick"], ROOT, work, work / "records")
        train(stages)
        specs = stages.specs()
        stages.cache.generate(stages.load_base, stages.variant, specs, f"generate {cell.name}")
        number = THINGS.index(stages.concept.label or stages.concept.name)
        for spec, path in zip(specs, stages.cache.paths(stages.variant, specs), strict=True):
            expected = [THINGS.index(word) for word in spec.prompt.expect if word in THINGS]
            if spec.group in ("direct", "held_out"):
                own.append((path, number))
            elif spec.group in KEEP_GROUPS and expected:
                rest.append((path, expected[0]))
    title = METHODS[method].title
    return {
        f"{title}, {what}": compared(
            readers, opened([path for path, _ in images], SIZE), torch.tensor([number for _, number in images])
        )
        for what, images in (("its prompts", own), ("other things", rest))
    }


def table(record: Mapping[str, Any]) -> str:
    """Rates of all classifiers, with their agreement with the bundled one in parentheses."""
    names = list(next(iter(record.values()))["wanted"])
    lines = [f"| images | n | {' | '.join(names)} |", "|---|---|" + "---|" * len(names)]
    for title, row in record.items():
        cells = [percent(row["wanted"][BUNDLED])]
        cells += [f"{percent(row['wanted'][name])} ({percent(row['agree'][name])})" for name in names[1:]]
        lines.append(f"| {title} | {row['n']:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The rows of the table, in its order."""
    readers = {BUNDLED: load_reader(), **other_readers(args.reader_dir)}
    if len(readers) == 1:
        raise SystemExit(f"--reader_dir {args.reader_dir} has no other classifier: build_emoji.py --reader_seed 1")
    record = on_drawings(readers, args.reader_dir)
    for method in (BASE, "rece", "pu"):
        record |= on_generated(readers, method, CONCEPTS, args.work_dir)
    for pair in args.attacked:
        name, _, folder = pair.partition("=")
        files = sorted(Path(folder).rglob("[0-9][0-9]-[0-9][0-9][0-9][0-9].png"))
        if not files:
            raise SystemExit(f"--attacked {pair}: no images of an attack in {folder or 'NAME=FOLDER'}")
        title = f"{METHODS['pu'].title}, {ATTACKED}, attacked with {name}"
        record[title] = compared(readers, opened(files, SIZE), THINGS.index(ATTACKED))
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reader_dir", type=Path, default=Path("build/emoji"), help="--work_dir of build_emoji.py")
    parser.add_argument(
        "--work_dir", type=Path, default=ROOT / "runs" / "leaderboard", help="--work_dir of leaderboard.py"
    )
    parser.add_argument("--attacked", nargs="+", default=[], metavar="NAME=FOLDER", help=f"images of {ATTACKED}")
    parser.add_argument("--only", choices=["table"])
    args = parser.parse_args()
    if not args.only:
        write_json(RECORD, measure(args))
    replace_between(ROOT / "docs" / "emoji.md", START, END, table(read_json(RECORD)))


if __name__ == "__main__":
    main()
