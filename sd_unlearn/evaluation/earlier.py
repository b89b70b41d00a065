"""Results that a new evaluation or attack replaces: what of them still holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sd_unlearn.errors import UsageError
from sd_unlearn.io.reading import read_json
from sd_unlearn.results import ATTACK_METRIC, FLOOR, parse_results


def earlier_results(file: Path) -> dict[str, Any]:
    """The content of a results.json; {} if there is none or it is damaged."""
    try:
        data: dict[str, Any] = read_json(file)
        parse_results(data, str(file))
    except UsageError:
        return {}
    return data


def carry_attacks(new: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
    """New results with the attacks of older ones, as far as they were on the same weights and concepts.

    Attacks that `new` has itself are not replaced, and a floor is carried over with its attacks. Both are contents of a
    results.json.
    """
    subjects = list(new["subjects"])
    if all(subject["id"] != FLOOR for subject in subjects):
        subjects += [subject for subject in old["subjects"] if subject["id"] == FLOOR]
        new = new | {"subjects": subjects}
    known = {_weights(new, subject["id"]) for subject in new["subjects"]} - {None}
    slugs = {concept["slug"]: concept.get("sha256") for concept in new["concepts"]}
    of_old = {concept["slug"]: concept.get("sha256") for concept in old["concepts"]}
    done = {(entry["concept"], entry["subject"], entry["attack"]) for entry in new.get("attacks", ())}

    def is_valid(concept: str, subject: str, attack: str) -> bool:
        same_concept = concept in slugs and slugs[concept] == of_old.get(concept)
        return same_concept and _weights(old, subject) in known and (concept, subject, attack) not in done

    entries = [e for e in old.get("attacks", ()) if is_valid(e["concept"], e["subject"], e["attack"])]
    rows = [
        row
        for row in old["rows"]
        if row["metric"] == ATTACK_METRIC and is_valid(row["concept"], row["subject"], row["group"])
    ]
    attacked = {entry["subject"] for entry in (*new.get("attacks", ()), *entries)}
    return new | {
        "rows": new["rows"] + rows,
        "attacks": [*new.get("attacks", ()), *entries],
        "subjects": [subject for subject in subjects if subject["id"] != FLOOR or FLOOR in attacked],
    }


def _weights(results: dict[str, Any], subject: str) -> tuple[Any, ...] | None:
    """What identifies the weights of a subject; None for image folders and unknown ids."""
    for entry in results["subjects"]:
        if entry["id"] == subject and entry["what"] != "images":
            own = (entry["name"], entry.get("sha256")) if subject == FLOOR else entry.get("sha256")
            return (subject, own, entry.get("strength"), results["base"].get("sha256"))
    return None
