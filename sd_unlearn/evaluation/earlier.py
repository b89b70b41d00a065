"""Results that a new evaluation or attack replaces: what of them still holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sd_unlearn.errors import UsageError
from sd_unlearn.io.progress import say
from sd_unlearn.io.reading import read_json
from sd_unlearn.models.base import HASHES
from sd_unlearn.results import ATTACK_METRIC, FLOOR, parse_results

Json = Mapping[str, Any]  # the content of a results.json, or a part of it
Place = tuple[str, str, str, str]  # concept, subject, attack and detector


def earlier_results(file: Path) -> dict[str, Any]:
    """The content of a results.json; {} if there is none or it is damaged."""
    try:
        data: dict[str, Any] = read_json(file)
        parse_results(data, str(file))
    except UsageError:
        return {}
    return data


def carry_attacks(new: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
    """New results with the attacks of older ones that still hold; a line on stderr says which do not, and why.

    An attack holds for the same weights, base, sampler, concept file and threshold. It gets the id that `new` has for
    the attacked model. Attacks that `new` has itself are not replaced. A floor is carried over with its attacks, and so
    are their problems and the cards of their detectors.
    """
    subjects = list(new["subjects"])
    if all(subject["id"] != FLOOR for subject in subjects):
        subjects += [subject for subject in old["subjects"] if subject["id"] == FLOOR]
        new = new | {"subjects": subjects}
    names = same_models(old, new)
    done = {(entry["concept"], entry["subject"], entry["attack"]) for entry in new.get("attacks", ())}
    entries, left_out = dict[Place, Json](), dict[str, list[str]]()
    for entry in old.get("attacks", ()):
        subject = names.get(entry["subject"], "")
        if (entry["concept"], subject, entry["attack"]) in done:
            continue
        if why := _why_not(entry, new, old, names):
            left_out.setdefault(why, []).append(f"{entry['attack']} on {entry['subject']}")
        else:
            entries[entry["concept"], subject, entry["attack"], entry["detector"]] = {**entry, "subject": subject}
    for why, attacks in left_out.items():
        say(f"Left out: earlier attacks {why} ({', '.join(attacks)}). Repeat them with sd-unlearn attack.")
    attacked = {entry["subject"] for entry in (*new.get("attacks", ()), *entries.values())}
    return new | {
        "rows": [*new["rows"], *_rows_of(entries, old, names)],
        "attacks": [*new.get("attacks", ()), *entries.values()],
        "cards": [*new["cards"], *_cards_of(entries, old, new)],
        "problems": [*new.get("problems", ()), *_problems_of(entries, old, names)],
        "subjects": [subject for subject in subjects if subject["id"] != FLOOR or FLOOR in attacked],
    }


def _why_not(entry: Json, new: Json, old: Json, names: Mapping[str, str]) -> str:
    """Why an attack of old results does not hold for new ones; "" if it does."""
    concepts, of_old = ({c["slug"]: c.get("sha256") for c in results["concepts"]} for results in (new, old))
    if settings := changed_settings(old, new):
        return f"with {', '.join(settings)}"
    if entry["concept"] not in concepts or concepts[entry["concept"]] != of_old[entry["concept"]]:
        return f"on another concept file than that of {', '.join(concepts)}"
    if entry["subject"] not in names:
        return "on other weights, or at another strength"
    if entry["detector"] in changed_detectors(old, new):
        return f"by another threshold of {entry['detector']}"
    return ""


def _rows_of(entries: Mapping[Place, Json], old: Json, names: Mapping[str, str]) -> list[Json]:
    """The rows of the attacks that were carried over from old results."""
    rows = {}
    for row in old["rows"]:
        place = (row.get("concept", ""), names.get(row["subject"], ""), row["group"], row.get("detector", ""))
        if row["metric"] == ATTACK_METRIC and place in entries:
            rows[place] = {**row, "subject": place[1]}
    return list(rows.values())


def _problems_of(entries: Mapping[Place, Json], old: Json, names: Mapping[str, str]) -> list[Json]:
    """The problems of the attacks that were carried over from old results; their group is the attack's name."""
    attacks, found = {place[:3] for place in entries}, {}
    for problem in old.get("problems", ()):
        place = (problem["concept"], names.get(problem["subject"], ""), problem.get("group", ""))
        if place in attacks:
            found[place] = {**problem, "subject": place[1]}
    return list(found.values())


def _cards_of(entries: Mapping[Place, Json], old: Json, new: Json) -> list[Json]:
    """The cards of old results that new ones need for the attacks that were carried over."""
    missing = {entry["detector"] for entry in entries.values()} - {card["detector"] for card in new["cards"]}
    return [card for card in old.get("cards", ()) if card["detector"] in missing]


def same_models(of: Json, others: Json) -> dict[str, str]:
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


def _model(subject: Json) -> tuple[Any, ...] | None:
    """What identifies the model of a subject, on the same base; None for image folders."""
    if subject["what"] == "images":
        return None
    if subject["id"] == FLOOR:
        return (FLOOR, subject["name"], subject.get("sha256"))
    return (subject.get("sha256") or subject["id"], subject.get("strength"))


def changed_settings(old: Json, new: Json) -> list[str]:
    """In which settings that all images depend on results differ: base and sampler. Unknown ones are not compared."""
    before, now = ({key: value for key, value in results.get("base", {}).items() if value} for results in (old, new))
    names = {**HASHES, "prediction_type": "prediction type", "schedule": "noise schedule"}
    differ = [key for key in names if key in before.keys() & now.keys() and before[key] != now[key]]
    found = [f"another {names[key]} of the base" for key in differ]
    if "sha256" in differ:
        found = [f"another base ({before.get('name')}, now {now.get('name')})"]
    before, now = old.get("sampler", {}), new["sampler"]
    keys = [key for key in now if key in before and key != "tiled_images"]  # a count of this evaluation's images
    return found + [f"{key} {before[key]} (now {now[key]})" for key in keys if before[key] != now[key]]


def changed_detectors(old: Json, new: Json) -> list[str]:
    """The detectors that judged by another threshold, or counted other classes. Their names are the same."""
    now = {card["detector"]: card for card in new["cards"]}
    return [
        card["detector"]
        for card in old.get("cards", ())
        if card["detector"] in now and _threshold(card) != _threshold(now[card["detector"]])
    ]


def _threshold(card: Json) -> tuple[Any, ...]:
    return card.get("threshold", ""), card.get("extra", {}).get("classes")
