"""`train --beta_sweep`: several trainings that differ in how strongly they erase, each evaluated, and one report.

The sensitivity analysis of Takahashi et al. (ICLR 2025), figure 4, for any concept: <output_dir>/factor-1 etc. are
ordinary run folders, <output_dir>/sweep.html shows leakage against retention.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from sd_unlearn.config.batching import CUT, effective_batch_size
from sd_unlearn.config.evaluate import EvaluateConfig
from sd_unlearn.config.paths import as_dict
from sd_unlearn.config.train import TrainConfig
from sd_unlearn.data.concept import Concept, concept_sha256
from sd_unlearn.data.dataset import fingerprint
from sd_unlearn.data.metadata import read_metadata
from sd_unlearn.data.prior import resolve_beta
from sd_unlearn.data.render_job import images_by_group, known_beta, plan_images
from sd_unlearn.data.render_settings import seed_in
from sd_unlearn.errors import UsageError
from sd_unlearn.evaluation import evaluate
from sd_unlearn.io.files import check_writable, write_json, write_text
from sd_unlearn.io.lock import locked, remove_leftovers
from sd_unlearn.io.own_files import SWEEP as SWEEP_FILES
from sd_unlearn.io.own_files import SWEEP_REPORT, check_own_reports, delete_own, is_free, kind_of, mark
from sd_unlearn.io.reading import read_yaml
from sd_unlearn.io.run_folder import CONCEPT, DATA_MANIFEST, RESULTS, UNLABELED, weights_sha256
from sd_unlearn.launch import process_count
from sd_unlearn.metrics.registry import MetricContext, find_metrics, missing_evidence
from sd_unlearn.models.device import choose_precision
from sd_unlearn.report import sweep
from sd_unlearn.report.sweep import SWEEP
from sd_unlearn.report.sweep_record import Point, at_full_strength, make_record, measured
from sd_unlearn.results import BASE, Results, read_results
from sd_unlearn.training import trainer
from sd_unlearn.training.preflight import Inputs, check_apart, check_inputs, has_own_images, is_finished

SETTINGS = "sweep.yaml"  # what all runs share; a sweep that is continued must have the same
CONTENTS = {  # keys of SETTINGS that are no options -> how a sweep with another value is described
    "concept_sha256": "of another concept, or its file has changed",
    "own_images_sha256": "on other images of your own",
    "images_seed": "on images that were generated with another --seed",
}
NOT_COMPARED = (
    *("beta_sweep", "output_dir", "overwrite", "resume_from_checkpoint", "force_resume", "config", "debug"),
    *("dry_run", "vram"),
    *CUT,
)


def run(config: TrainConfig, concept: Concept | None = None) -> Path:
    """Train and evaluate one run per factor of --beta_sweep, then write the report.

    Returns the path of sweep.html; with --dry_run, which only prints the plan, the folder that there would be.

    Finished runs are skipped, so an interrupted sweep resumes, and factors can be added later.

    concept: instead of the one that --concept names.

    Raises:
        UsageError, UnlearnError: wherever possible before a model is loaded.
    """
    factors = parse_factors(config.beta_sweep or "")
    check_options(config)
    inputs = check_inputs(config, concept)
    concept, output = inputs.concept, config.output_dir or Path("runs") / f"{inputs.concept.slug}-sweep"
    beta, source = beta_of(config, concept, inputs.data_dir)
    points = scale(factors, beta, config.push, config.target, source)
    images = effective_batch_size(config, process_count())
    shared = as_dict(dataclasses.replace(config, beta=beta, data_dir=inputs.data_dir, effective_batch_size=images))
    settings = {k: v for k, v in shared.items() if k not in NOT_COMPARED} | contents_of(config, inputs)
    check_apart(inputs.data_dir, output)
    check_output(output, settings, config.overwrite)
    if config.dry_run:
        _show_plan(config, inputs, points, output)
        return output
    context = MetricContext(concept, EvaluateConfig(), None, "quick")
    if gap := missing_evidence(context, find_metrics(context)):  # not after hours of training
        print(
            f"Note: the sweep itself will not tell which factor to use. {gap} Evaluate each factor's run, then repeat "
            "this command.",
            file=sys.stderr,
        )
    with locked(output, "--output_dir"):
        check_output(output, settings, config.overwrite)  # again: another process may have started one since
        remove_leftovers(output)
        mark(output, "sweep")
        if config.overwrite:
            delete_own(output, SWEEP_FILES)
        try:
            return _run(config, inputs, points, settings, (beta, source), output)
        except KeyboardInterrupt as interrupt:
            raise KeyboardInterrupt(f"{interrupt} Finished factors are kept.".strip()) from None


def _run(
    config: TrainConfig,
    inputs: Inputs,
    points: list[Point],
    settings: dict[str, Any],
    beta: tuple[float, str],
    output: Path,
) -> Path:
    """`run` once the options are checked, while no other process uses the sweep's folder. beta: as beta_of."""
    write_text(output / SETTINGS, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
    for number, point in enumerate(points, 1):
        print(f"Sweep, run {number} of {len(points)}: {_describe(config, point)}.", file=sys.stderr)
        _train(config, inputs.concept, point, inputs.data_dir, output / point.name)
    results = [_evaluate(output / point.name, inputs.concept.slug, config) for point in points]
    _check_alike(points, results, output)
    record = make_record(config, inputs.concept, *beta, points, results)
    page = sweep.write(output, record)
    write_json(output / SWEEP, record)
    return page


def _show_plan(config: TrainConfig, inputs: Inputs, points: list[Point], output: Path) -> None:
    """Print the factors and the plan of one training, which is that of all."""
    from sd_unlearn.training.plan import show_plan

    print(f"Sweep: {len(points)} trainings into {output}, each evaluated.")
    for point in points:
        print(f"  {_describe(config, point)}{' (finished)' if is_finished(output / point.name) else ''}")
    print("Each of them:\n")
    show_plan(config, inputs, output / points[0].name)


def _describe(config: TrainConfig, point: Point) -> str:
    push = f", push {point.push:g}" if config.target == "teacher" else ""
    return f"factor {point.factor:g}, beta {point.beta:g}{push}"


def contents_of(config: TrainConfig, inputs: Inputs) -> dict[str, Any]:
    """What the runs of a sweep share besides options: the keys of CONTENTS."""
    seed = None if inputs.own_images else seed_in(inputs.data_dir)
    return {
        "concept_sha256": concept_sha256(inputs.concept),
        "own_images_sha256": fingerprint(inputs.own) if inputs.own else None,
        "images_seed": config.seed if seed is None else seed,
    }


def parse_factors(text: str) -> list[float]:
    """The numbers of --beta_sweep, in the given order.

    Raises:
        UsageError: a factor is not a finite number above 0, or is given twice.
    """
    factors: list[float] = []
    for word in text.split(","):
        try:
            factor = float(word)
        except ValueError:
            raise UsageError(f'--beta_sweep "{text}": "{word.strip()}" is not a number. Example: 0.5,1,2.') from None
        if not 0 < factor < math.inf:
            raise UsageError(f"--beta_sweep {text}: {factor:g} must be a number above 0; 1 leaves beta as it is.")
        if f"{factor:g}" in {f"{known:g}" for known in factors}:  # as in the folders' names
            raise UsageError(f"--beta_sweep {text}: {factor:g} is given twice.")
        factors.append(factor)
    return factors


def check_options(config: TrainConfig) -> None:
    """Refuse options that a sweep does not support.

    Raises:
        UsageError
    """
    if process_count() > 1:
        raise UsageError(
            f"--beta_sweep runs as one process, not {process_count()}. Start single runs with --beta and --push "
            "instead."
        )
    if config.beta == "estimate":
        raise UsageError(
            "--beta_sweep cannot scale --beta estimate: train once with --beta estimate, then give its result as "
            "--beta."
        )
    if config.resume_from_checkpoint not in (None, "latest"):
        raise UsageError(
            f"--resume_from_checkpoint {config.resume_from_checkpoint} belongs to a single run; a sweep resumes its "
            "runs by itself."
        )


def beta_of(config: TrainConfig, concept: Concept, data_dir: Path) -> tuple[float, str]:
    """(beta, its source), as `train` will determine it once the folders are rendered."""
    assert config.beta != "estimate"  # check_options
    if concept.betas and config.beta is None:
        return sum(concept.betas.values()), "concept"
    counts: Mapping[str, int] = images_by_group(plan_images(concept, config))
    if (data_dir / DATA_MANIFEST).is_file():
        counts = Counter(line.group or "generic" for line in read_metadata(data_dir / UNLABELED).values())
    known = None if has_own_images(data_dir) else known_beta(concept.generic_share, counts)
    prior = resolve_beta(config.beta, known)
    return prior.beta, prior.source


def scale(factors: list[float], beta: float, push: float, target: str, source: str) -> list[Point]:
    """Scale beta by each factor, and with a teacher also the push, which then sets how strongly to erase.

    Raises:
        UsageError: a scaled beta is 1 or more.
    """
    for factor in factors:
        if factor * beta >= 1:
            raise UsageError(
                f"--beta_sweep: {factor:g} times beta {beta:g} ({source}) is {factor * beta:g}, and beta must be below "
                f"1. Use factors below {1 / beta:.3g}, or another --beta."
            )
    pushes = [factor * push if target == "teacher" else push for factor in factors]
    return [Point(f, float(f"{f * beta:.10g}"), float(f"{p:.10g}")) for f, p in zip(factors, pushes, strict=True)]


def check_output(output: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """Refuse a folder of something else, or a sweep with other settings. Changes nothing.

    Raises:
        UsageError
    """
    check_writable(output, "--output_dir")
    if is_free(output):
        return
    older = (output / SETTINGS).is_file() and any(output.glob(f"factor-*/{CONCEPT}"))
    if kind_of(output) != "sweep" and not older:
        raise UsageError(f"--output_dir {output} is not an sd-unlearn sweep folder. Choose an empty folder.")
    check_own_reports(output, SWEEP_REPORT, "--output_dir")
    if not (output / SETTINGS).is_file():
        return
    before = read_yaml(output / SETTINGS, "--output_dir")
    known = before.keys() | (settings.keys() - CONTENTS.keys())  # older sweeps have no CONTENTS
    changed = [key for key in settings if key in known and before.get(key) != settings[key]]
    if changed and not overwrite and any(output.glob("factor-*")):
        key = changed[0]
        held = f"with --{key} {before.get(key)}, but this one has {settings[key]}"
        raise UsageError(
            f"--output_dir {output} holds a sweep {CONTENTS.get(key, held)}. Choose another --output_dir, or add "
            "--overwrite to start over."
        )


def _train(config: TrainConfig, concept: Concept, point: Point, data_dir: Path, run_dir: Path) -> None:
    """Train one run unless it is finished; an interrupted run resumes from its last checkpoint."""
    begun = (run_dir / CONCEPT).is_file()
    if is_finished(run_dir):
        print(f"{run_dir} is already trained.", file=sys.stderr)
        return
    trainer.run(
        dataclasses.replace(
            config,
            beta=point.beta,
            push=point.push,
            beta_sweep=None,
            data_dir=data_dir,
            output_dir=run_dir,
            overwrite=False,
            resume_from_checkpoint="latest" if begun else None,
            force_resume=config.force_resume and begun,
        ),
        concept,
    )


def _evaluate(run_dir: Path, slug: str, config: TrainConfig) -> Results:
    """The results of a run, evaluated unless there are results for exactly these weights and this concept."""
    if (run_dir / RESULTS).is_file():
        found = at_full_strength(read_results(run_dir))
        if found and (found[0].slug, found[1].sha256) == (slug, weights_sha256(run_dir)):
            print(f"{run_dir} is already evaluated.", file=sys.stderr)
            return read_results(run_dir)
    shared = {name: getattr(config, name) for name in ("allow_pickle", "offload", "render_batch_size")}
    precision = choose_precision(config.mixed_precision)
    evaluate.run(EvaluateConfig(run=run_dir, mixed_precision=precision, **shared))
    return read_results(run_dir)


def _check_alike(points: list[Point], results: list[Results], output: Path) -> None:
    """Refuse to compare runs that were evaluated in different ways, by `evaluate` with other options.

    Raises:
        UsageError
    """
    ways = [_way(found) for found in results]
    for point, way in zip(points, ways, strict=True):
        if different := [name for name, value in way.items() if value != ways[0][name]]:
            raise UsageError(
                f"{output / point.name} was evaluated with another {' and '.join(different)} than "
                f"{output / points[0].name}, so the two cannot be compared. Evaluate one like the other, or delete its "
                f"{RESULTS}, and repeat the sweep."
            )


def _way(results: Results) -> dict[str, Any]:
    """How a run was evaluated, by name."""
    concept, _ = measured(results)
    rows = [row for row in results.rows if (row.subject, row.concept) == (BASE, concept.slug)]
    return {
        **{name: getattr(results, name) for name in ("tier", "sampler", "seeds", "base")},
        "prompt set": (results.prompt_set, results.prompt_category),
        "concept file": concept.sha256,
        "number of images or group": {(row.metric, row.group, row.n) for row in rows if row.metric in sweep.SHOWN},
    }
