"""beta, the share of the concept among the unlabeled images: given by hand, known from the manifest, or assumed."""

from __future__ import annotations

from pathlib import Path

from sd_unlearn.records import DATA_MANIFEST, read_json

ASSUMED_BETA = 0.1


def resolve_beta(asked: float | None, data_dir: Path) -> tuple[float, str]:
    """(beta in (0, 1), where it is from: option | manifest | assumed)."""
    if asked is not None:
        return asked, "option"
    manifest = data_dir / DATA_MANIFEST
    known = read_json(manifest).get("beta") if manifest.is_file() else None
    return (float(known), "manifest") if known else (ASSUMED_BETA, "assumed")
