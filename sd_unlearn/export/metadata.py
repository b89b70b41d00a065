"""What an exported file says of itself: the keys user interfaces show and filter by, and ours beside them."""

from __future__ import annotations

import json
from typing import Any

from sd_unlearn.data.concept import concept_sha256
from sd_unlearn.export import thumbnails
from sd_unlearn.export.trained_run import REQUIRED, Run, architecture, figures_of

# Recorded where the training says them; REQUIRED always is.
_OPTIONAL = ("method", "target", "push", "reduction", "zero_terminal_snr", "beta_source", "seed")
_LORA_ONLY = ("rank", "lora_alpha")
LICENCES = {  # of the bases people use, as the hub spells them; a LoRA comes under its base's
    "CompVis/stable-diffusion-v1-4": "creativeml-openrail-m",
    "runwayml/stable-diffusion-v1-5": "creativeml-openrail-m",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "creativeml-openrail-m",
    "stabilityai/stable-diffusion-2": "openrail++",
    "stabilityai/stable-diffusion-2-base": "openrail++",
    "stabilityai/stable-diffusion-2-1": "openrail++",
    "stabilityai/stable-diffusion-2-1-base": "openrail++",
    "stabilityai/stable-diffusion-xl-base-1.0": "openrail++",
    "digits": "apache-2.0",
}


def licence(run: Run, asked: str | None = None) -> str | None:
    """The licence asked for, else that of a base we know, else None."""
    return asked or LICENCES.get(run.base_name)


def lora_header(run: Run, digest: str, licence: str | None = None) -> dict[str, str]:
    """The header of the LoRA for user interfaces. `digest`: SHA-256 of the file after its header, in hex."""
    pairs, names = run.adapters[0].pairs, architecture(run.base)
    ranks = {pair.rank for pair in pairs}
    return (
        own_header(run)
        | _modelspec(run, digest, licence)
        | {
            "modelspec.architecture": f"{names.modelspec}/lora",
            "modelspec.implementation": "sgm" if run.kind == "sdxl" else "diffusers",
            "modelspec.title": f"Forget {run.concept.name}",
            "modelspec.usage_hint": "Load at strength 1. There is no trigger word.",
            "ss_output_name": run.concept.slug,
            "ss_network_module": "networks.lora",
            "ss_network_dim": str(pairs[0].rank) if len(ranks) == 1 else "Dynamic",
            "ss_network_alpha": str(pairs[0].alpha) if run.adapters[0].uniform else "Dynamic",
            "ss_base_model_version": names.kohya,
            "ss_v2": str(names.is_v2),
            "ss_sd_model_name": run.base_name,
            "sshs_model_hash": digest,
        }
    )


def checkpoint_header(run: Run, digest: str, strength: float, licence: str | None = None) -> dict[str, str]:
    """The header of a checkpoint with what was trained baked in."""
    hint = "There is no trigger word and no LoRA to load."
    if run.training.get("zero_terminal_snr"):
        hint += " Sample with a schedule of zero terminal SNR."
    return (
        own_header(run)
        | _modelspec(run, digest, licence)
        | {
            "modelspec.architecture": architecture(run.base).modelspec,
            "modelspec.implementation": "sgm",
            "modelspec.title": f"{run.base_name} without {run.concept.name}",
            "modelspec.usage_hint": hint,
            "sd_unlearn.strength": str(strength),
        }
    )


def own_header(run: Run) -> dict[str, str]:
    """How the weights came about and, once evaluated, what they were measured to do."""
    recorded = [key for key in (*REQUIRED, *_OPTIONAL) if key in run.training]
    header = {f"sd_unlearn.{k}": str(run.training[k]) for k in recorded if not (run.is_full and k in _LORA_ONLY)}
    header["sd_unlearn.concept"] = run.concept.name
    header["sd_unlearn.prompts_sha256"] = concept_sha256(run.concept)
    header["sd_unlearn.base"] = run.base_name
    header["sd_unlearn.base_sha256"] = str(run.base["sha256"])
    if run.training.get("versions"):
        header["sd_unlearn.versions"] = json.dumps(run.training["versions"], sort_keys=True)
    if run.results is not None:
        kept: dict[str, Any] = {key: run.results.get(key) for key in ("detector", "sampler", "seeds")}
        kept["rows"] = [row for row in figures_of(run.results) if row["subject"] == "lora"]
        header["sd_unlearn.results"] = json.dumps(kept, sort_keys=True)
    return header


def _modelspec(run: Run, digest: str, licence: str | None) -> dict[str, str]:
    """The keys of ModelSpec that a LoRA and a checkpoint share."""
    base = run.base
    header = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.description": f'Forgets "{run.concept.name}" and draws "{run.concept.generic}" instead.',
        "modelspec.tags": ", ".join(("unlearning", "concept erasure", run.concept.kind)),
        "modelspec.prediction_type": "v" if base.get("prediction_type") == "v_prediction" else "epsilon",
        "modelspec.hash_sha256": f"0x{digest}",
        "modelspec.resolution": f"{base['resolution']}x{base['resolution']}" if base.get("resolution") else "",
        "modelspec.date": str(run.training.get("created") or ""),
        "modelspec.license": licence or "",
        "modelspec.thumbnail": thumbnails.thumbnail(run) or "",
        "format": "pt",
    }
    return {key: value for key, value in header.items() if value}
