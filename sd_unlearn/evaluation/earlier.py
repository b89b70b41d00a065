"""Results that a new evaluation or attack replaces: what of them still holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sd_unlearn.errors import UsageError
from sd_unlearn.io.reading import read_json
from sd_unlearn.results import ATTACK_METRIC, FLOOR, parse_results

_KEYS = ("concept", "subject", "group", "attack", "detector")  # identify a row (group) or attack


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
    results.json. Attacks get the ids that `new` has for the attacked models.
    """
    subjects = list(new["subjects"])
    if all(subject["id"] != FLOOR for subject in subjects):
        subjects += [subject for subject in old["subjects"] if subject["id"] == FLOOR]
        new = new | {"subjects": subjects}
    same_base = old["base"].get("sha256") == new["base"].get("sha256")
    names = same_models(old, new) if same_base else {}
    slugs = {concept["slug"]: concept.get("sha256") for concept in new["concepts"]}
    of_old = {concept["slug"]: concept.get("sha256") for concept in old["concepts"]}
    done = {(entry["concept"], entry["subject"], entry["attack"]) for entry in new.get("attacks", ())}

    def is_valid(concept: str, subject: str, attack: str) -> bool:
        same_concept = concept in slugs and slugs[concept] == of_old.get(concept)
        return same_concept and subject in names and (concept, names[subject], attack) not in done

    entries = _renamed((e for e in old.get("attacks", ()) if is_valid(e["concept"], e["subject"], e["attack"])), names)
    rows = [row for row in old["rows"] if row["metric"] == ATTACK_METRIC]
    rows = _renamed((row for row in rows if is_valid(row["concept"], row["subject"], row["group"])), names)
    attacked = {entry["subject"] for entry in (*new.get("attacks", ()), *entries)}
    return new | {
        "rows": new["rows"] + rows,
        "attacks": [*new.get("attacks", ()), *entries],
        "subjects": [subject for subject in subjects if subject["id"] != FLOOR or FLOOR in attacked],
    }


def same_models(of: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, str]:
    """The subjects of results that other results have, too: id -> id there.

    A LoRA is the same if its weights and strength are: with several strengths `seven` is called `seven at 1`.
    """
    found = {}
    for subject in of["subjects"]:
        same = [other for other in others["subjects"] if _model(other) == _model(subject) is not None]
        if same:  # the same weights can be listed under several names
            preferred = max(same, key=lambda other: sum(other[key] == subject[key] for key in ("id", "name")))
            found[subject["id"]] = preferred["id"]
    return found


def _model(subject: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """What identifies the model of a subject, on the same base; None for image folders."""
    if subject["what"] == "images":
        return None
    if subject["id"] == FLOOR:
        return (FLOOR, subject["name"], subject.get("sha256"))
    return (subject.get("sha256") or subject["id"], subject.get("strength"))


def _renamed(items: Iterable[dict[str, Any]], names: Mapping[str, str]) -> list[dict[str, Any]]:
    """Rows or attacks under the ids of other results; of two that then have the same id, one."""
    renamed = [item | {"subject": names[item["subject"]]} for item in items]
    return list({tuple(item.get(key) for key in _KEYS): item for item in renamed}.values())
