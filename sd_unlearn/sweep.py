"""Several trainings that differ in how hard they forget, each evaluated -> one picture of what that costs.

The sensitivity analysis of Takahashi et al. (ICLR 2025), figure 4, on one's own concept: <output_dir>/factor-1 and so
on are ordinary run folders, <output_dir>/sweep.html shows leakage against retention.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from sd_unlearn import __version__
from sd_unlearn.config.base import as_dict
from sd_unlearn.config.checks import check_train
from sd_unlearn.config.evaluate import EvaluateConfig
from sd_unlearn.config.train import TrainConfig
from sd_unlearn.data.concept import Concept, load_concept
from sd_unlearn.data.prior import ASSUMED_BETA, resolve_beta
from sd_unlearn.data.render import data_dir_of, known_beta, plan
from sd_unlearn.errors import UsageError
from sd_unlearn.evaluation import evaluate
from sd_unlearn.io.files import check_writable, read_yaml, write_json, write_text
from sd_unlearn.io.run_folder import CONCEPT, DATA_MANIFEST, RESULTS, TRAINING, weights_sha256
from sd_unlearn.launch import process_count
from sd_unlearn.models.source import find_base
from sd_unlearn.report import sweep
from sd_unlearn.report.sweep import SWEEP
from sd_unlearn.results import BASE, Results, as_json, read_results
from sd_unlearn.training import trainer

SETTINGS = "sweep.yaml"  # what the runs share; a sweep that goes on must mean the same
NOT_COMPARED = ("beta_sweep", "output_dir", "overwrite", "resume_from_checkpoint", "force_resume", "config", "debug")


@dataclasses.dataclass(frozen=True)
class Point:
    """One run of a sweep: the factor and what it makes of beta and push."""

    factor: float
    beta: float  # in (0, 1)
    push: float

    @property
    def name(self) -> str:
        return f"factor-{self.factor:g}"


def run(config: TrainConfig) -> Path:
    """Train and evaluate a run for each factor of --beta_sweep, then write the report. Returns sweep.html.

    What is finished already is not done again, so a sweep that was killed goes on, and one can be given more factors.

    Raises:
        UsageError, UnlearnError: what is wrong, checked before a model is loaded wherever that is possible.
    """
    factors = parse_factors(config.beta_sweep or "")
    concept = load_concept(config.concept, config.anchor)
    check_train(config)
    check_alone(config)
    find_base(config, concept.base)
    folder, output = data_dir_of(config, concept), config.output_dir or Path("runs") / f"{concept.slug}-sweep"
    beta, source = beta_of(config, concept, folder)
    points = scale(factors, beta, config.push, config.target, source)
    shared = as_dict(dataclasses.replace(config, beta=beta, data_dir=folder))
    settings = {k: v for k, v in shared.items() if k not in NOT_COMPARED}
    check_output(output, settings, config.overwrite)
    if config.overwrite:
        shutil.rmtree(output, ignore_errors=True)
    write_text(output / SETTINGS, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))

    for number, point in enumerate(points, 1):
        head = f"Sweep, run {number} of {len(points)}: factor {point.factor:g}, beta {point.beta:g}"
        print(f"{head}, push {point.push:g}." if config.target == "teacher" else f"{head}.", file=sys.stderr)
        _train(config, point, folder, output / point.name)
    results = [_evaluate(output / point.name, config.allow_pickle) for point in points]
    record = _record(config, concept, beta, source, points, results)
    page = sweep.write(output, record)
    write_json(output / SWEEP, record)
    return page


def parse_factors(text: str) -> list[float]:
    """The numbers of --beta_sweep, in the order given.

    Raises:
        UsageError: one that is not a finite number above 0, or that comes twice.
    """
    factors: list[float] = []
    for word in text.split(","):
        try:
            factor = float(word)
        except ValueError:
            raise UsageError(f'--beta_sweep "{text}": "{word.strip()}" is no number. E.g. 0.5,1,2.') from None
        if not 0 < factor < math.inf:
            raise UsageError(f"--beta_sweep {text}: {factor:g} must be a number above 0; 1 is the beta as it is.")
        if f"{factor:g}" in {f"{known:g}" for known in factors}:  # as in the folders' names
            raise UsageError(f"--beta_sweep {text}: {factor:g} comes twice. Give each factor once.")
        factors.append(factor)
    return factors


def check_alone(config: TrainConfig) -> None:
    """Refuse what a sweep cannot share out over its runs.

    Raises:
        UsageError
    """
    world = process_count()
    if world > 1:
        raise UsageError(
            f"--beta_sweep runs as one process, not {world}. Start each run of it with --beta and --push instead."
        )
    if config.beta == "estimate":
        raise UsageError("--beta_sweep needs a number to multiply: train once with --beta estimate, then --beta X.")
    if config.resume_from_checkpoint not in (None, "latest"):
        raise UsageError(
            f"--resume_from_checkpoint {config.resume_from_checkpoint} belongs to one run; a sweep goes on by itself."
        )
    trainer.choose_tracker(config.report_to)


def beta_of(config: TrainConfig, concept: Concept, folder: Path) -> tuple[float, str]:
    """(beta, its source) before anything is rendered: as `train` will find it once the folders are there."""
    assert config.beta != "estimate"  # check_alone
    if concept.betas and config.beta is None:
        return sum(concept.betas.values()), "concept"
    if config.beta is not None or trainer.has_own_photos(folder) or (folder / DATA_MANIFEST).is_file():
        prior = resolve_beta(config.beta, folder)
        return prior.beta, prior.source
    counts: dict[str, int] = {}
    for group, _, count in plan(concept, config):
        counts[group] = counts.get(group, 0) + count
    known = known_beta(concept, counts)
    return (known, "manifest") if known else (ASSUMED_BETA, "assumed")


def scale(factors: list[float], beta: float, push: float, target: str, source: str) -> list[Point]:
    """Each factor times beta, and with a teacher times the push, which stands in for beta as how hard to forget.

    Raises:
        UsageError: a factor that leaves no share for anything else among the unlabeled images (beta >= 1).
    """
    for factor in factors:
        if factor * beta >= 1:
            raise UsageError(
                f"--beta_sweep: {factor:g} times beta {beta:g} ({source}) is {factor * beta:g}, and beta must be below "
                f"1. Give factors below {1 / beta:.3g}, or another --beta."
            )
    pushes = [factor * push if target == "teacher" else push for factor in factors]
    return [Point(f, float(f"{f * beta:.10g}"), float(f"{p:.10g}")) for f, p in zip(factors, pushes, strict=True)]


def check_output(output: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """Refuse, touching nothing, a folder of something else, or a sweep whose runs would not belong together.

    Raises:
        UsageError
    """
    check_writable(output, "--output_dir")
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not (output / SETTINGS).is_file():
        raise UsageError(f"--output_dir {output} holds files that are no sweep of sd-unlearn; name an empty folder.")
    before = read_yaml(output / SETTINGS, "--output_dir")
    changed = [k for k in settings if before.get(k) != settings[k]]
    if changed and not overwrite and any(output.glob("factor-*")):
        key = changed[0]
        raise UsageError(
            f"--output_dir {output} holds a sweep with --{key} {before.get(key)}, and this one has {settings[key]}. "
            "Name another --output_dir, or add --overwrite to start over."
        )


def _train(config: TrainConfig, point: Point, data_dir: Path, place: Path) -> None:
    """Train one run unless it is finished; one that was cut short goes on from its last checkpoint."""
    if (place / TRAINING).is_file():
        print(f"{place} is trained already.", file=sys.stderr)
        return
    if not (place / CONCEPT).is_file():
        shutil.rmtree(place, ignore_errors=True)  # killed while it was begun
    trainer.run(
        dataclasses.replace(
            config,
            beta=point.beta,
            push=point.push,
            beta_sweep=None,
            data_dir=data_dir,
            output_dir=place,
            overwrite=False,
            resume_from_checkpoint="latest" if place.is_dir() else None,
        )
    )


def _evaluate(place: Path, allow_pickle: bool) -> Results:
    """The results of a run, measured unless they are there for exactly this LoRA."""
    if (place / RESULTS).is_file() and read_results(place).evaluated[0][1].sha256 == weights_sha256(place):
        print(f"{place} is already evaluated.", file=sys.stderr)
    else:
        evaluate.run(EvaluateConfig(run=place, allow_pickle=allow_pickle))
    return read_results(place)


def _record(
    config: TrainConfig, concept: Concept, beta: float, source: str, points: list[Point], results: list[Results]
) -> dict[str, Any]:
    """The content of sweep.json: of every run the rows that the report shows, with their intervals."""
    evaluated = results[0].evaluated[0][0]
    detectors = (row.detector for row in results[0].rows if row.metric in ("leakage", "nudity"))
    return {
        "schema_version": sweep.SCHEMA_VERSION,
        "concept": concept.slug,
        "name": concept.name,
        "caption": evaluated.caption,
        "generic": evaluated.generic,
        "base": results[0].base,
        "detector": next(detectors, ""),
        "target": config.target,
        "factors": [p.factor for p in points],
        "beta": beta,
        "beta_source": source,
        "push": config.push,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
        "version": __version__,
        "runs": [_run_record(point, found) for point, found in zip(points, results, strict=True)],
    }


def _run_record(point: Point, results: Results) -> dict[str, Any]:
    """A run as sweep.json holds it: its one LoRA on its one concept, as subject "lora"."""
    concept, lora = results.evaluated[0]
    rows = [row for row in results.rows_of(concept.slug, lora.id) if row.metric in sweep.SHOWN]
    return dataclasses.asdict(point) | {
        "folder": point.name,
        "adapter_sha256": lora.sha256,
        "cost": lora.cost or {},
        "rows": [as_json(row) | ({} if row.subject == BASE else {"subject": "lora"}) for row in rows],
    }
