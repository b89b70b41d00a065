"""paper.json: the record of a text-to-image run, in the format of the DDPM runs' results.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sd_unlearn.data.dataset import fingerprint, scan
from sd_unlearn.data.find_concept import read_concept
from sd_unlearn.data.render_job import known_beta
from sd_unlearn.errors import UsageError
from sd_unlearn.io.reading import read_json, read_yaml
from sd_unlearn.io.run_folder import CONCEPT, CONFIG, DATA_MANIFEST, TRAINING, weights_sha256
from sd_unlearn.paper.experiments import Size
from sd_unlearn.results import Card, Results, Row

SCHEMA_VERSION = 1
DISTANCES = ("fid-inception", "kid-inception", "fid-digits", "kid-digits")
TRAIN_OPTIONS = (
    *("objective", "correction", "eta", "reduction", "max_train_steps", "learning_rate"),
    *("lr_warmup_steps", "ema_decay", "method", "rank", "caption_mode", "target"),
)


def record_of(experiment: str, size: Size, folder: Path, results: Results, seconds: float) -> dict[str, Any]:
    """The content of paper.json.

    Args:
        folder: The finished run folder of `train`.
        results: The evaluation of that run; its last subject is the trained model.
        seconds: How long the evaluation took.

    Raises:
        UsageError: no detector measured leakage.
    """
    training, options = read_json(folder / TRAINING), read_yaml(folder / CONFIG, "--output_dir")
    rate, *distances = rows_of([row for row in results.rows if row.subject == results.subjects[-1].id])
    data_dir = Path(options["data_dir"])
    manifest = read_json(data_dir / DATA_MANIFEST) if (data_dir / DATA_MANIFEST).is_file() else {}
    counts, concept = manifest.get("counts", {}), read_concept(folder / CONCEPT)
    unsupervised = options["objective"] == "unsupervised"
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "paper",
        "experiment": experiment,
        "size": size,
        "seed": options["seed"],
        "settings": {
            **{name: options[name] for name in TRAIN_OPTIONS},
            "train_batch_size": options["effective_batch_size"],
            "beta": None if unsupervised else training["beta"],
            "beta_source": None if unsupervised else training["beta_source"],
            "conditional": True,
            "missing": [],
            "contamination": known_beta(concept.generic_share, counts),
            "num_negative": 0,
            "sampler": "ddim",
            "num_inference_steps": results.sampler["steps"],
            "guidance_scale": results.sampler["guidance_scale"],
            "num_images": rate.n,
            "base": training["base"],
        },
        "counts": {
            "normal": counts.get("generic"),
            "mixed_in": counts.get("mixed_in", 0),
            "positive": counts.get("positive"),
            "negative": 0,
        },
        "classifier": _classifier(results.cards, rate.detector),
        "rows": [dataclasses.asdict(row) for row in (rate, *distances)],
        "cost": training["cost"] | {"sampling_seconds": round(seconds, 1)},
        "data_sha256": fingerprint(scan(data_dir, concept, 0.0)),
        "weights_sha256": weights_sha256(folder),
        **{name: training[name] for name in ("version", "versions", "commit")},
        "created": results.created,
    }


def rows_of(evaluated: Sequence[Row]) -> list[Row]:
    """The non-sensitive rate first, then the distances on retained prompts, each with its prompt group in the note.

    The rate is one minus the leakage on the generic prompt by the first detector; its interval is mirrored. Rows of
    this kind of record have no prompt groups, so all are of the group "all".

    Args:
        evaluated: The rows of the trained model.

    Raises:
        UsageError: no detector measured leakage.
    """
    leak = next((row for row in evaluated if (row.metric, row.group) == ("leakage", "generic")), None)
    if leak is None:
        raise UsageError("No detector measured leakage on the generic prompt. Add one that does to --metrics.")
    common: dict[str, Any] = {"group": "all", "subject": "", "seeds": None}
    value, low, high = (None if end is None else 1 - end for end in (leak.value, leak.high, leak.low))
    rate = dataclasses.replace(leak, metric="non_sensitive_rate", value=value, low=low, high=high, **common)
    distances: dict[str, Row] = {}
    for row in evaluated:
        if row.metric in DISTANCES and row.value is not None:
            note = f"of the {row.group} prompts: {row.note}"
            distances.setdefault(row.metric, dataclasses.replace(row, note=note, **common))
    return [rate, *distances.values()]


def _classifier(cards: Sequence[Card], detector: str) -> dict[str, Any]:
    """The detector of the rate. Its accuracy is not measured here."""
    card = next((card for card in cards if card.detector == detector), Card(detector))
    _, _, digest = card.weights.partition("sha256:")
    return {"name": detector, "sha256": digest or None, "accuracy": None, "n": None}
