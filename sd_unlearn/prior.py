"""beta, the share of the concept among the unlabeled images: given by hand, known from the manifest, or assumed;
and what a bracket makes of it."""

from __future__ import annotations

from pathlib import Path

from sd_unlearn.config import CaptionMode
from sd_unlearn.records import DATA_MANIFEST, read_json

ASSUMED_BETA = 0.1
GENERIC_BETA = 0.5


def resolve_beta(asked: float | None, data_dir: Path) -> tuple[float, str]:
    """(beta in (0, 1), where it is from: option | manifest | assumed)."""
    if asked is not None:
        return asked, "option"
    manifest = data_dir / DATA_MANIFEST
    known = read_json(manifest).get("beta") if manifest.is_file() else None
    return (float(known), "manifest") if known else (ASSUMED_BETA, "assumed")


def bracket_betas(beta: float, margin: float, generic_beta: float | None, mode: CaptionMode) -> tuple[float, ...]:
    """The weight of the positives in each bracket of a caption mode, each in (0, 1), generic caption first.

    At beta itself, the share of the concept, the pull of the concept's images hidden in U and the push of those in S
    cancel: nothing drives the concept out. So the concept's caption gets beta + margin (1 - beta), margin in [0, 1),
    and the generic one `generic_beta`, by default 0.5 or what the concept's caption gets if that is more.
    """
    raised = beta + margin * (1 - beta)
    generic = max(GENERIC_BETA, raised) if generic_beta is None else generic_beta
    return {"own": (raised,), "shared": (generic,), "both": (generic, raised)}[mode]
