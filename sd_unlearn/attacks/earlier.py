"""The results.json that attacks are added to: checked before the first attack, and merged with what was found."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from sd_unlearn.config.attack import ATTACKS
from sd_unlearn.errors import UsageError
from sd_unlearn.evaluation.earlier import carry_attacks, changed_detectors, changed_settings, same_models
from sd_unlearn.evaluation.job import EvaluationJob
from sd_unlearn.io.reading import read_json
from sd_unlearn.results import ATTACK_METRIC, FLOOR, parse_results


def read_earlier(job: EvaluationJob, file: Path) -> dict[str, Any]:
    """The content of results.json, to which the attacks are added; {} without one.

    The job's LoRAs get the ids that they have there.

    Raises:
        UsageError: it is damaged, or has no results of a LoRA's present weights at the attacked strength.
    """
    if not file.is_file():
        return {}
    earlier: dict[str, Any] = read_json(file)
    parse_results(earlier, str(file), "Run sd-unlearn evaluate again, or choose another --output_dir.")
    names = same_models({"subjects": [subject.describe() for subject in job.subjects]}, earlier)
    for subject in job.subjects:
        if subject.id not in names:
            raise UsageError(
                f"{file} has no results of {subject.name} with its present weights at strength {subject.strength:g}. "
                "Run sd-unlearn evaluate again, or choose another --output_dir."
            )
    known = {names[subject.id]: dataclasses.replace(subject, id=names[subject.id]) for subject in job.subjects}
    job.subjects[:] = known.values()
    return earlier


def check_same_settings(earlier: dict[str, Any], new: dict[str, Any], file: Path) -> None:
    """Refuse to add attacks to results whose images were generated, or judged, with other settings.

    Args:
        new: Results without attacks: settings, concepts, and the cards of the detectors.

    Raises:
        UsageError
    """
    of_earlier = {concept["slug"]: concept.get("sha256") for concept in earlier["concepts"]}
    changed = [c["slug"] for c in new["concepts"] if of_earlier.get(c["slug"], c["sha256"]) != c["sha256"]]
    what = [f"another concept file of {slug}" for slug in changed]
    what += changed_settings(earlier, new)
    what += [f"another threshold of {detector}" for detector in changed_detectors(earlier, new)]
    if what:
        raise UsageError(
            f"{file} holds results with {', '.join(what)}. Use the same settings, run sd-unlearn evaluate again with "
            "the new ones, or choose another --output_dir."
        )


def added(new: dict[str, Any], earlier: dict[str, Any]) -> dict[str, Any]:
    """Earlier results with the new attacks, and those of its own that were not repeated."""
    rows = [row for row in earlier["rows"] if row["metric"] != ATTACK_METRIC]
    cards = {card["detector"]: card for card in (*new["cards"], *earlier.get("cards", ()))}
    subjects = {subject["id"]: subject for subject in (*earlier["subjects"], *_unmeasured(new, earlier))}
    concepts = {concept["slug"]: concept for concept in (*earlier["concepts"], *new["concepts"])}
    problems = [problem for problem in earlier.get("problems", ()) if problem.get("group") not in ATTACKS]
    changes = {
        "rows": rows + new["rows"],
        "problems": problems + [problem for problem in new["problems"] if problem["group"] in ATTACKS],
        "attacks": new["attacks"],
        "cards": list(cards.values()),
        "subjects": list(subjects.values()),
        "concepts": list(concepts.values()),
    }
    return carry_attacks(earlier | changes, earlier)


def _unmeasured(new: dict[str, Any], earlier: dict[str, Any]) -> list[dict[str, Any]]:
    """Subjects that earlier results do not have. The floor has no other results than attacks, so it may change."""
    known = {subject["id"] for subject in earlier["subjects"]} - {FLOOR}
    return [subject for subject in new["subjects"] if subject["id"] not in known]
