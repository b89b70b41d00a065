"""sweep.json: the settings of a sweep, and of every run what its report shows. Imports no torch."""

from __future__ import annotations

import dataclasses
from typing import Any

from sd_unlearn import __version__
from sd_unlearn.config.train import TrainConfig
from sd_unlearn.data.concept import Concept
from sd_unlearn.io.files import timestamp
from sd_unlearn.report.examples import one_of_each_prompt
from sd_unlearn.report.lines import lines_of, presence
from sd_unlearn.report.sweep import SCHEMA_VERSION, SHOWN
from sd_unlearn.results import BASE, ConceptEntry, Results, SubjectEntry, as_json

PICTURES = {"direct": 3, "held_out": 1, "alike": 2, "general": 1}  # pairs of each prompt group on the page


@dataclasses.dataclass(frozen=True)
class Point:
    """One run of a sweep: a factor, and beta and push scaled by it."""

    factor: float
    beta: float  # in (0, 1)
    push: float

    @property
    def name(self) -> str:
        return f"factor-{self.factor:g}"


def make_record(
    config: TrainConfig, concept: Concept, beta: float, source: str, points: list[Point], results: list[Results]
) -> dict[str, Any]:
    """The content of sweep.json: of every run the rows that the report shows, with their intervals.

    beta, source: before scaling, and where it comes from.
    """
    evaluated, lora = measured(results[0])
    detected = presence(lines_of(results[0].rows_of(evaluated.slug, lora.id), evaluated.kind))
    return {
        "schema_version": SCHEMA_VERSION,
        "concept": concept.slug,
        "name": concept.name,
        "kind": evaluated.kind,
        "caption": evaluated.caption,
        "generic": evaluated.generic,
        "base": results[0].base,
        "detector": detected.main.detector if detected else "",
        "target": config.target,
        "factors": [p.factor for p in points],
        "beta": beta,
        "beta_source": source,
        "push": config.push,
        "created": timestamp(),
        "version": __version__,
        "runs": [_run_record(point, found) for point, found in zip(points, results, strict=True)],
        "pictures": _pictures(points, results),
    }


def at_full_strength(results: Results) -> tuple[ConceptEntry, SubjectEntry] | None:
    """The run's concept and its LoRA at strength 1, which may have been evaluated at others, too."""
    return next((both for both in results.evaluated if both[1].strength in (None, 1.0)), None)


def measured(results: Results) -> tuple[ConceptEntry, SubjectEntry]:
    """The run's concept and LoRA in results of an evaluation."""
    return at_full_strength(results) or results.evaluated[0]


def _run_record(point: Point, results: Results) -> dict[str, Any]:
    """A run as sweep.json holds it: its one LoRA on its one concept, as subject "lora"."""
    concept, lora = measured(results)
    rows = [row for row in results.rows_of(concept.slug, lora.id) if row.metric in SHOWN]
    return dataclasses.asdict(point) | {
        "folder": point.name,
        "adapter_sha256": lora.sha256,
        "cost": lora.cost or {},
        "problems": [as_json(problem) for problem in results.problems_of(concept.slug, lora.id)],
        "rows": [as_json(row) | ({} if row.subject == BASE else {"subject": "lora"}) for row in rows],
    }


def _pictures(points: list[Point], results: list[Results]) -> list[dict[str, Any]]:
    """The first image pairs that every run has, some of each prompt group; none of nudity.

    Paths are relative to the sweep's folder.
    """
    if results[0].evaluated[0][0].kind == "nudity":
        return []
    by_run = [
        {(p.group, p.prompt, p.seed): p for p in found.pairs if p.base and p.subject == measured(found)[1].id}
        for found in results
    ]
    pictures = []
    for group, count in PICTURES.items():
        common = [p for key, p in by_run[0].items() if p.group == group and all(key in pairs for pairs in by_run)]
        for pair in one_of_each_prompt(common, [pair.prompt for pair in common])[:count]:
            key = (pair.group, pair.prompt, pair.seed)
            shots = [
                {"factor": point.factor, "image": f"{point.name}/{own.image}", "read": own.image_read}
                | {"leak": own.leak, "lost": own.lost}
                for point, own in zip(points, (pairs[key] for pairs in by_run), strict=True)
            ]
            known = {"group": pair.group, "prompt": pair.prompt, "seed": pair.seed, "expected": pair.expected}
            pictures.append(
                known | {"base": f"{points[0].name}/{pair.base}", "base_read": pair.base_read, "shots": shots}
            )
    return pictures
