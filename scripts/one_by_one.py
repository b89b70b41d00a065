"""One request after another on the base `emoji`: each thing is erased from the model that the former requests left.

Used by many_concepts.py. Every LoRA is trained with the defaults on images that its model drew itself, and then merged
into the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from leaderboard_runs import UNWATCHED, digest, sampling_of, train_once, weights_in

import sd_unlearn
from sd_unlearn.config.evaluate import EvaluateConfig
from sd_unlearn.data.find_concept import load_concept
from sd_unlearn.data.several import read_concepts
from sd_unlearn.evaluation.generate import ImageCache
from sd_unlearn.evaluation.loras import ModelVariant
from sd_unlearn.evaluation.prompts import TIERS, override_counts, plan_images
from sd_unlearn.models.base import load_base
from sd_unlearn.models.find_base import find_base
from sd_unlearn.models.sampling import BASE_SAMPLERS
from sd_unlearn.models.source import EMOJI
from sd_unlearn.results import Results


def serve(first: Path, names: Sequence[str], work: Path) -> list[Path]:
    """The run folders of requests for these names, in this order.

    first: a finished training of names[0] on the bundled base.
    """
    runs = [first]
    for number, name in enumerate(names[1:], start=1):
        model = merge(runs[-1])
        run = work / "runs" / f"one-by-one-{number + 1}-{load_concept(name).slug}-{digest(weights_in(model))}"
        options: dict[str, Any] = {"pretrained_model_name_or_path": str(model), **sampling_of(EMOJI), **UNWATCHED}
        runs.append(train_once(name, run, {**options, "data_dir": run.with_name(f"{run.name}-data")}))
    return runs


def merge(run: Path) -> Path:
    """The Diffusers folder of a run's model with its LoRA merged into it."""
    folder = run / "merged"
    if not folder.is_dir():
        sd_unlearn.export(run=run, output_dir=run / "export", merge=folder)
    return folder


def evaluate_merged(model: Path, concepts: Path, output: Path, options: Mapping[str, Any]) -> Results:
    """Evaluate a merged model on a file with a list of concepts, compared with the bundled base.

    options: of `evaluate`: num_images, num_keep_images, groups and cache_dir.
    """
    base = load_base(find_base(EvaluateConfig(pretrained_model_name_or_path=str(model))))
    cache = ImageCache(options["cache_dir"], base.describe(), BASE_SAMPLERS[EMOJI])
    counts = override_counts(TIERS["emoji"], options["num_images"], options["num_keep_images"], options["groups"])
    specs = [spec for part in read_concepts(concepts).parts for spec in plan_images(part, counts, [0])]
    cache.generate(lambda: base, ModelVariant(), specs, f"generate {output.name}")
    return sd_unlearn.evaluate(
        images=[f"model={cache.folder(ModelVariant())}"],
        concept=[str(concepts)],
        output_dir=output,
        pretrained_model_name_or_path=EMOJI,
        **options,
    )
