"""Before/after pairs: brought together by prompt and seed, so that the base's picture is there once for all LoRAs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sd_unlearn.errors import UsageError
from sd_unlearn.report.cases import cases_of, labels
from sd_unlearn.report.formatting import GROUPS, rank
from sd_unlearn.report.images import Boxes, embed
from sd_unlearn.results import BASE

FIRST = 12  # cards of a group shown before the rest is unfolded


def shelves(results: dict[str, Any], folder: Path, most: int, blurred: bool) -> dict[str, Any]:
    """The pairs by concept and group as cards, leaks and losses first: what the section of pictures shows.

    Raises:
        UsageError: `blurred` when no face was looked for.
    """
    pairs = [_completed(pair) for pair in results["pairs"]]
    unmeant = {(c.concept["slug"], c.subject["id"]) for c in cases_of(results) if not c.meant}
    for pair in pairs:  # what nobody tried to remove does not leak
        pair["leak"] = bool(pair["leak"]) and (pair["concept"], pair["subject"]) not in unmeant
    looked = any(row["metric"] == "face_rate" for row in results["rows"])  # else boxes are not of faces
    if blurred and pairs and not looked:
        raise UsageError(
            "--blur_faces: results.json has no faces, because no face detector was run. Evaluate with one (the "
            "identity metric) first, or leave out --blur_faces."
        )
    chosen = sorted(pairs, key=lambda p: not (p["leak"] or p["lost"]))[:most]  # the sort keeps the order of equals
    place = {s["id"]: i for i, s in enumerate(results["subjects"])}
    cards = _cards(sorted(chosen, key=lambda p: place[p["subject"]]))
    images = embed(folder, *_asked(cards, blurred))
    order = {c["slug"]: i for i, c in enumerate(results["concepts"])}
    names = labels(results)
    what = {s["id"]: s["what"] for s in results["subjects"]}
    made: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for card in cards:
        for shot in card["shots"]:
            shot["image"], shot["name"] = images.get(shot["path"]), names.get(shot["subject"], "")
            shot["given"] = what.get(shot["subject"]) == "images"
        made.setdefault((card["concept"], card["group"]), []).append(card)
    keys = sorted(made, key=lambda key: (order[key[0]], rank(GROUPS, key[1])))
    about = {c["slug"]: c for c in results["concepts"]}
    groups = [_group(about[slug], name, made[slug, name]) for slug, name in keys]
    several = len({p["subject"] for p in chosen}) > 1
    return {
        "groups": groups,
        "several": several,
        "total": len(chosen),
        "left_out": len(pairs) - len(chosen),
        "leaks": sum(p["leak"] for p in chosen),
        "lost": sum(p["lost"] for p in chosen),
        "boxed": any(p["faces"] or p["base_faces"] for p in chosen),
        "blurred": blurred,
        "box": "faces" if looked else "detections",
        "concepts": [about[slug] for slug in dict.fromkeys(key[0] for key in keys)],
        "subjects": [
            (i, names[i])
            for i in dict.fromkeys(s["id"] for s in results["subjects"])
            if i in {p["subject"] for p in chosen}
        ],
        "names": list(dict.fromkeys(key[1] for key in keys)),
    }


def _completed(raw: dict[str, Any]) -> dict[str, Any]:
    pair = {"expected": "", "base_read": "", "image_read": "", "leak": False, "seed": None, **raw}
    if "lost" not in raw:  # version 1 did not say. Only what the base drew can be lost
        asked, before, after = (_words(pair[k]) for k in ("expected", "base_read", "image_read"))
        kept = pair["group"] not in ("direct", "held_out", "generic")
        pair["lost"] = bool(asked) and kept and asked <= before and not asked <= after
    for key in ("faces", "base_faces"):
        pair[key] = _boxes(raw.get(key))
    return pair


def _boxes(found: Any) -> list[list[float]]:
    """The boxes that are four numbers, cut to the picture."""
    made = []
    for box in found if isinstance(found, list | tuple) else ():
        if isinstance(box, list | tuple) and len(box) == 4 and all(isinstance(v, int | float) for v in box):
            x0, y0, x1, y1 = (min(1.0, max(0.0, float(v))) for v in box)
            if x0 < x1 and y0 < y1:
                made.append([x0, y0, x1, y1])
    return made


def _words(text: Any) -> set[str]:
    return set(re.findall(r"\w+", str(text).lower()))


def _cards(pairs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One card a prompt and seed: the base's picture, then every subject's."""
    cards: dict[tuple[Any, ...], dict[str, Any]] = {}
    for pair in pairs:
        key = (pair["concept"], pair["group"], pair["prompt"], str(pair["seed"]), pair["base"])
        card = cards.setdefault(key, {k: pair[k] for k in ("concept", "group", "prompt", "seed", "expected")})
        if not card.setdefault("shots", []) and pair["base"]:
            card["shots"].append(_shot(BASE, pair["base"], pair["base_read"], pair["base_faces"]))
        card["shots"].append(
            _shot(pair["subject"], pair["image"], pair["image_read"], pair["faces"], pair["leak"], pair["lost"])
        )
    return list(cards.values())


def _shot(subject: str, path: str, read: Any, faces: Boxes, leak: Any = False, lost: Any = False) -> dict[str, Any]:
    verdict = "leak" if leak else "lost" if lost else "good"
    return {"subject": subject, "path": path, "read": str(read or ""), "faces": faces, "verdict": verdict}


def _asked(cards: Sequence[dict[str, Any]], blurred: bool) -> tuple[dict[str, int], dict[str, Boxes]]:
    """How often the page holds each picture, and where faces are on it."""
    counts: dict[str, int] = {}
    faces: dict[str, Boxes] = {}
    for shot in (shot for card in cards for shot in card["shots"]):
        counts[shot["path"]] = counts.get(shot["path"], 0) + 1
        if blurred:
            faces[shot["path"]] = [*faces.get(shot["path"], ()), *shot["faces"]]
    return counts, faces


def _group(concept: dict[str, Any], name: str, cards: list[dict[str, Any]]) -> dict[str, Any]:
    ranks = {"leak": 0, "lost": 1, "good": 2}
    cards.sort(key=lambda card: min(ranks[shot["verdict"]] for shot in card["shots"]))
    shots = [shot for card in cards for shot in card["shots"]]
    drawn = [shot for shot in shots if shot["subject"] != BASE]
    return {
        "concept": concept,
        "name": name,
        "cards": cards,
        "total": len(drawn),
        "first": len(cards) if len(cards) <= FIRST + 4 else FIRST,
        "leaks": sum(shot["verdict"] == "leak" for shot in drawn),
        "lost": sum(shot["verdict"] == "lost" for shot in drawn),
        "tiny": all(shot["image"]["tiny"] for shot in shots if shot["image"]),
        "one_prompt": len({card["prompt"] for card in cards}) == 1,
    }
