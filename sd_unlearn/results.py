"""results.json: what an evaluation found, as it lies on disk (docs/results.md). Imports no torch.

Version 2 holds any number of concepts and subjects (the base, LoRAs at strengths, folders of pictures). A file of
version 1, which held one LoRA, is read as the same thing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd_unlearn.errors import UsageError
from sd_unlearn.io.files import read_json
from sd_unlearn.io.run_folder import RESULTS

SCHEMA_VERSION = 2
BASE = "base"  # the subject without any LoRA
KINDS = ("base", "lora", "images")


@dataclass(frozen=True)
class Difference:
    """How far two subjects lie apart in what was counted picture by picture; value = subject - against."""

    concept: str
    metric: str
    group: str
    subject: str
    against: str
    value: float | None
    n: int
    low: float | None = None
    high: float | None = None
    p: float | None = None  # two-sided, of this difference alone
    p_holm: float | None = None  # corrected for all comparisons of the same figure (Holm 1979)
    detector: str = ""
    interval: str = "paired-bootstrap"


def read_results(path: Path) -> dict[str, Any]:
    """The checked content of a results.json, given itself or its folder, as version 2 whatever it was written as.

    Raises:
        UsageError: missing, not JSON, another schema_version, or a key that is not as it must be; names it.
    """
    file = path if path.name == RESULTS else path / RESULTS
    if not file.parent.is_dir():
        raise UsageError(f"--run {file.parent} does not exist. Give the run folder of a finished evaluation.")
    if not file.is_file():
        raise UsageError(f"--run {file.parent} has no {RESULTS}. Run sd-unlearn evaluate --run {file.parent} first.")
    results, again = read_json(file), f"Run sd-unlearn evaluate --run {file.parent} again."
    version = results.get("schema_version") if isinstance(results, dict) else None
    if version not in (1, SCHEMA_VERSION):
        raise UsageError(f"{file}: schema_version is {version!r}, this version reads 1 and {SCHEMA_VERSION}. {again}")
    if version == 1:
        if why := _fault(results, _OLD):
            raise UsageError(f"{file}: {why}. {again}")
        results = upgrade(results)
    if why := _fault(results, _KEYS) or _stray(results):
        raise UsageError(f"{file}: {why}. {again}")
    return results


def upgrade(old: dict[str, Any]) -> dict[str, Any]:
    """A version 1 file, one LoRA against its base, as version 2."""
    name, slug, detector = str(old.get("run") or "lora"), old["concept"], str(old.get("detector") or "")
    name = f"{name}-lora" if name == BASE else name
    ids = {"base": BASE, "lora": name}
    concept = {key: old.get(key, "") for key in ("caption", "generic", "kind")}
    seeds = old.get("seeds") or {}
    lora = {
        "id": name,
        "name": name,
        "what": "lora",
        "strength": 1.0,
        "sha256": str(old.get("adapter_sha256") or ""),
        "forgets": slug,
        "training": old.get("training") or {},
        "cost": old.get("cost") or {},
    }
    return {
        "schema_version": SCHEMA_VERSION,
        "created": str(old.get("created") or ""),
        "version": str(old.get("version") or ""),
        "tier": "",
        "base": old["base"],
        "sampler": old.get("sampler") or {},
        "seeds": {"evaluate": seeds.get("evaluate"), "seeds": [seeds.get("seed", 0)]},
        "concepts": [{"slug": slug, "name": slug, **concept}],
        "subjects": [{"id": BASE, "name": old["base"].get("name", ""), "what": "base"}, lora],
        "cards": [{"detector": detector, "metrics": [], "about": ""}] if detector else [],
        "rows": [{**row, "concept": slug, "subject": ids[row["subject"]]} for row in old["rows"]],
        "differences": [],
        "pairs": [
            {**pair, "concept": slug, "subject": name, "image": pair["lora"], "image_read": pair.get("lora_read", "")}
            for pair in old.get("pairs") or []
        ],
        "skipped": old.get("skipped") or [],
    }


def loras(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The subjects other than the base, in their order."""
    return [subject for subject in results["subjects"] if subject["what"] != "base"]


def judged(results: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(concept, subject) of everything but the base that has a row, subjects in their order."""
    have = {(row["concept"], row["subject"]) for row in results["rows"]}
    return [(c, s) for s in loras(results) for c in results["concepts"] if (c["slug"], s["id"]) in have]


def view(results: dict[str, Any], concept: str, subject: str) -> dict[str, Any]:
    """One subject on one concept against the base, in the words of a single run: subjects are base and lora.

    Keys: concept, name, caption, generic, kind, run, adapter_sha256, strength, training, cost, base, sampler, seeds,
    created, version, detector, rows, pairs, skipped.

    Raises:
        KeyError: no such concept or subject.
    """
    about = {c["slug"]: c for c in results["concepts"]}[concept]
    what = {s["id"]: s for s in results["subjects"]}[subject]
    ids = {BASE: "base", subject: "lora"}
    rows = [
        {**row, "subject": ids[row["subject"]]}
        for row in results["rows"]
        if row["concept"] == concept and row["subject"] in ids
    ]
    pairs = [
        {**p, "lora": p["image"], "lora_read": p.get("image_read", "")}
        for p in results["pairs"]
        if p["concept"] == concept and p["subject"] == subject
    ]
    detectors = dict.fromkeys(row.get("detector", "") for row in rows if row["metric"] in ("leakage", "nudity"))
    return {
        "concept": concept,
        "name": about["name"],
        "caption": about["caption"],
        "generic": about["generic"],
        "kind": about.get("kind", ""),
        "run": what["name"],
        "adapter_sha256": what.get("sha256", ""),
        "strength": what.get("strength"),
        "training": what.get("training") or {},
        "cost": what.get("cost") or {},
        **{key: results[key] for key in ("base", "sampler", "seeds", "created", "version", "skipped")},
        "detector": next(iter(detectors), ""),
        "rows": rows,
        "pairs": pairs,
    }


# -- what a file must hold --

_Fault = Callable[[Any], str | None]


def _texts(*keys: str) -> _Fault:
    def fault(item: Any) -> str | None:
        good = isinstance(item, dict) and all(isinstance(item.get(key), str) for key in keys)
        return None if good else f"needs {', '.join(keys)} as text"

    return fault


def _figure(*keys: str) -> _Fault:
    def fault(item: Any) -> str | None:
        if why := _texts(*keys)(item):
            return why
        numbers = all(isinstance(item.get(k), int | float | None) for k in ("value", "low", "high"))
        if not numbers or "value" not in item:
            return "needs a number as value (and numbers or null as low and high)"
        return None if isinstance(item.get("n"), int) else "needs a whole number as n"

    return fault


def _old_row(item: Any) -> str | None:
    if why := _figure("metric", "group", "subject")(item):
        return why
    known = item["subject"] in ("base", "lora")
    return None if known else f'has subject "{item["subject"]}"; it must be base or lora'


def _subject(item: Any) -> str | None:
    if why := _texts("id", "name", "what")(item):
        return why
    return None if item["what"] in KINDS else f'is a "{item["what"]}"; it must be one of {", ".join(KINDS)}'


# key -> its type, whether it may be missing, and the check of each of its items
_OLD: dict[str, tuple[type, bool, _Fault | None]] = {
    "concept": (str, False, None),
    "caption": (str, False, None),
    "generic": (str, False, None),
    "base": (dict, False, None),
    "rows": (list, False, _old_row),
    "pairs": (list, True, _texts("prompt", "group", "base", "lora")),
    "skipped": (list, True, None),
    "cost": (dict, True, None),
    "training": (dict, True, None),
    "sampler": (dict, True, None),
    "seeds": (dict, True, None),
}
_KEYS: dict[str, tuple[type, bool, _Fault | None]] = {
    "created": (str, True, None),
    "version": (str, True, None),
    "tier": (str, True, None),
    "base": (dict, True, None),
    "sampler": (dict, True, None),
    "seeds": (dict, True, None),
    "concepts": (list, False, _texts("slug", "name", "caption", "generic")),
    "subjects": (list, False, _subject),
    "cards": (list, True, _texts("detector", "about")),
    "rows": (list, False, _figure("concept", "subject", "metric", "group")),
    "differences": (list, True, _figure("concept", "subject", "against", "metric", "group")),
    "pairs": (list, True, _texts("concept", "subject", "group", "prompt", "base", "image")),
    "skipped": (list, True, None),
}


def _fault(results: dict[str, Any], keys: dict[str, tuple[type, bool, _Fault | None]]) -> str | None:
    """What is wrong with the keys or their items, or None; fills in the optional keys."""
    for key, (kind, optional, check) in keys.items():
        value = results.setdefault(key, kind()) if optional else results.get(key)
        if not isinstance(value, kind):
            return f'"{key}" is missing or not a {kind.__name__}'
        for number, item in enumerate(value if check and isinstance(value, list) else []):
            if check and (why := check(item)):
                return f"{key}[{number}] {why}"
    return None


def _stray(results: dict[str, Any]) -> str | None:
    """A figure or pair of a concept or subject that the file does not list."""
    slugs, ids = {c["slug"] for c in results["concepts"]}, {s["id"] for s in results["subjects"]}
    for key in ("rows", "differences", "pairs"):
        for number, item in enumerate(results[key]):
            unknown = [item["concept"]] if item["concept"] not in slugs else []
            unknown += [item[k] for k in ("subject", "against") if k in item and item[k] not in ids]
            if unknown:
                return f'{key}[{number}] is of "{unknown[0]}", which concepts and subjects do not list'
    return None


def as_json(item: Any) -> dict[str, Any]:
    """A row, difference, pair or card as results.json holds it."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(item).items()}


@dataclasses.dataclass(frozen=True)
class Row:
    """One figure of results.json. Every rate says what was counted, n and a 95 % interval."""

    metric: str
    group: str
    subject: str  # base, or the id of a LoRA or folder of images
    value: float | None  # None: unknown, e.g. a ratio over zero
    n: int
    low: float | None = None
    high: float | None = None
    detector: str = ""
    interval: str = ""  # wilson | paired-bootstrap | bootstrap | none
    note: str = ""
    concept: str = ""
    seeds: tuple[float, ...] | None = None  # the value for each of several seeds

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], **changes: Any) -> Row:
        """A row from an entry of results.json, with `changes` in place of its values; unknown keys are ignored."""
        names = {field.name for field in dataclasses.fields(cls)}
        known = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items() if key in names}
        return cls(**{**known, **changes})


@dataclasses.dataclass(frozen=True)
class Pair:
    """One prompt and seed drawn with and without a LoRA; paths are relative to the folder of results.json."""

    concept: str
    subject: str
    group: str
    prompt: str
    seed: int
    base: str  # "" where there is none
    image: str
    expected: str = ""
    base_read: str = ""
    image_read: str = ""
    leak: bool = False
    lost: bool = False  # was as asked, and is no more
    faces: tuple[tuple[float, ...], ...] = ()  # [x0, y0, x1, y1] as shares of width and height
    base_faces: tuple[tuple[float, ...], ...] = ()
