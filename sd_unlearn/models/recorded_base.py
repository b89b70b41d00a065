"""The base of a run, from the record in its training.json: load it again and refuse other weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sd_unlearn.errors import UsageError
from sd_unlearn.models.base import HASHES, Base, load_base
from sd_unlearn.models.source import OPTION, Source

OPTIONS = ("vae", "variant", "single_file_config", "prediction_type", "drop_t5")  # of loading a base, that runs record


def recorded_source(record: Mapping[str, Any], allow_pickle: bool = False, name: str | None = None) -> Source:
    """The Source of a run's base. record: "base" of its training.json; name: where the base is now, if it was moved."""
    options: dict[str, Any] = {key: record.get(key) for key in OPTIONS}
    options["drop_t5"] = bool(options["drop_t5"])
    if name is None:
        name, path = record["name"], record.get("path")  # a relative name is of the folder in which the training ran
        if path and not Path(name).expanduser().exists() and Path(path).exists():
            name = path
    return Source(name, allow_pickle=allow_pickle, **options)


def existing_source(record: Mapping[str, Any], allow_pickle: bool = False, name: str | None = None) -> Source:
    """The same, once its local folders and files are found.

    Raises:
        UsageError: the base, its VAE or its configuration was moved or deleted.
    """
    source, path = recorded_source(record, allow_pickle, name), record.get("path")
    if name is None and path and not source.place.exists():
        raise UsageError(f"The base that was trained on is not at {path} any more. Name its place with {OPTION}.")
    for option, place in (("vae", source.vae), ("single_file_config", source.single_file_config)):
        if place and Path(place).is_absolute() and not Path(place).exists():
            raise UsageError(
                f"The --{option} of the training is not at {place} any more. Put it back, or a link to it."
            )
    return source


def load_recorded_base(
    record: Mapping[str, Any],
    precision: str = "no",
    device: Any = None,
    allow_pickle: bool = False,
    name: str | None = None,
) -> Base:
    """Load the base of a run as it was loaded for the training. record, name: as for recorded_source.

    Raises:
        UsageError: it is not where it was, its weights changed since the training, or they are pickles without
            allow_pickle.
        UnlearnError: as load_base.
    """
    base = load_base(existing_source(record, allow_pickle, name), precision, device)
    check_recorded(base, record)
    return base


def check_recorded(base: Base, record: Mapping[str, Any]) -> None:
    """Refuse a base that is not the one a run was trained on. record: "base" of its training.json.

    Raises:
        UsageError: the weights of a part changed since the training.
    """
    if key := different_hash(base.hashes, record):
        raise UsageError(f"The {base.part(key)} of {base.name} changed since the training: this is another version.")


def different_hash(a: Mapping[str, Any], b: Mapping[str, Any]) -> str | None:
    """The first key of HASHES that differs between two records. What one of them lacks is not compared."""
    return next((key for key in HASHES if a.get(key) and b.get(key) and a[key] != b[key]), None)
