"""What `paper run` and `paper list` print. Imports no torch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sd_unlearn.paper.experiments import DIGITS_SEVEN, EXPERIMENTS, SD_BRAD_PITT, Experiment, Recipe


def summary_of(results: dict[str, Any], folder: Path) -> str:
    """A finished run in a few lines. results: the content of its record."""
    settings, lines = results["settings"], [str(folder)]
    beta = settings["beta"]
    objective = settings["objective"] + ("" if beta is None else f", beta {beta:g}")
    lines.append(f"{results['experiment']} ({results['size']}), {objective}, seed {results['seed']}:")
    for row in results["rows"]:
        if row["metric"] == "share" or row["value"] is None:
            continue
        if row["metric"] == "non_sensitive_rate":
            value = f"{row['value']:.3f} (95 % interval {row['low']:.3f} to {row['high']:.3f})"
        else:
            value = f"{row['value']:.4g}"
        lines.append(f"  {row['metric']:<19} {value}, n = {row['n']:,}, {row['detector']}")
    return "\n".join(lines)


@contextmanager
def kept_after_interruption(folder: Path) -> Iterator[None]:
    """Say on Ctrl-C that the run folder is kept, so that the user is not told to repeat a command with --overwrite."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if str(interrupt):
            raise
        raise KeyboardInterrupt(f"Finished stages are kept in {folder}.") from None


def list_experiments(as_json: bool) -> str:
    """Every experiment: classes, numbers of images, and the recipe of its default size."""
    if as_json:
        from sd_unlearn.paper.stable_diffusion import EXPERIMENTS as ON_TEXT

        of_text = [{"name": name, **dataclasses.asdict(experiment)} for name, experiment in ON_TEXT.items()]
        return json.dumps([*(dataclasses.asdict(e) for e in EXPERIMENTS.values()), *of_text], indent=2)
    blocks = [_block(e) for e in EXPERIMENTS.values()]
    blocks += [
        f"{SD_BRAD_PITT}\n  Stable Diffusion 1.4, Brad Pitt among middle-aged men: 64 + 16 unlabeled, 20 labeled\n"
        "  7,000 steps of 16, lr 1e-05; the whole UNet as in the paper, or --method lora",
        f"{DIGITS_SEVEN}  (not in the paper: the same on the bundled base, needs no network)\n"
        "  the digit seven among handwritten digits: 256 + 64 unlabeled, 80 labeled; 300 steps of 32",
    ]
    return "\n\n".join(blocks)


def _block(e: Experiment) -> str:
    counts, size = e.counts, e.default_size
    start = f"fine-tunes {e.base}" if e.base else "from scratch"
    images = f"{counts.normal:,} + {counts.mixed_in:,} unlabeled, {counts.positive:,} labeled"
    lines = [
        f"{e.name}" + ("" if e.of_paper else "  (not in the paper: needs no network, default --size tiny)"),
        f"  normal {', '.join(e.normal)}; sensitive {', '.join(e.sensitive)}",
        f"  {images}; {e.side_of(size)} pixels, {start}",
        f"  {_recipe(e.recipe_of(size))}",
    ]
    return "\n".join(lines)


def _recipe(r: Recipe) -> str:
    return (
        f"{r.epochs} epochs, batch {r.train_batch_size}, lr {r.learning_rate:g}, {r.lr_warmup_steps} warm-up steps; "
        f"{r.num_images:,} images with {r.sampler.upper()}, {r.num_inference_steps:,} steps"
    )
