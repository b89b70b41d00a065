"""The metadata in the headers of exported files: the keys that user interfaces show and filter by, and our own."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from sd_unlearn.data.concept import concept_sha256
from sd_unlearn.export import thumbnails
from sd_unlearn.export.trained_run import TrainedRun, architecture
from sd_unlearn.models.kinds import KINDS
from sd_unlearn.results import BASE, as_json

# Keys of training.json that are copied into the header, if present.
_RECORDED = (
    *("rank", "lora_alpha", "beta", "correction", "caption_mode", "version", "config_sha256"),
    *("objective", "fuse_method", "method", "target", "push", "reduction", "zero_terminal_snr", "beta_source", "seed"),
    *("truncation_error", "rounding_error_fp32", "rounding_error_fp16"),  # of a closed-form edit as a LoRA
    "quantize_base",
)
_LORA_ONLY = ("rank", "lora_alpha")
LICENCES = {  # of common bases, in the hub's spelling; a LoRA is under the licence of its base
    "CompVis/stable-diffusion-v1-4": "creativeml-openrail-m",
    "runwayml/stable-diffusion-v1-5": "creativeml-openrail-m",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "creativeml-openrail-m",
    "stabilityai/stable-diffusion-2": "openrail++",
    "stabilityai/stable-diffusion-2-base": "openrail++",
    "stabilityai/stable-diffusion-2-1": "openrail++",
    "stabilityai/stable-diffusion-2-1-base": "openrail++",
    "stabilityai/stable-diffusion-xl-base-1.0": "openrail++",
    "black-forest-labs/FLUX.1-schnell": "apache-2.0",
    "black-forest-labs/FLUX.2-klein-4B": "apache-2.0",
    "black-forest-labs/FLUX.2-klein-base-4B": "apache-2.0",
    "Qwen/Qwen-Image": "apache-2.0",
    "Qwen/Qwen-Image-2512": "apache-2.0",
    "Tongyi-MAI/Z-Image": "apache-2.0",
    "Tongyi-MAI/Z-Image-Turbo": "apache-2.0",
    "digits": "apache-2.0",
    "digits-sd3": "apache-2.0",
    "emoji": "cc-by-sa-4.0",  # of the strictest of its drawings, OpenMoji's
}


def licence_of(run: TrainedRun, chosen: str | None = None) -> str | None:
    """The licence that the user chose, else the licence of a known base, else None."""
    return chosen or LICENCES.get(run.base_name)


def lora_header(run: TrainedRun, digest: str, licence: str | None = None) -> dict[str, str]:
    """The header of the LoRA for ComfyUI, A1111 and Forge.

    Args:
        digest: SHA-256 of the file after its header, in hex.
        licence: In the hub's spelling; None if unknown.
    """
    pairs, names = run.adapters[0].pairs, architecture(run.base)
    ranks = {pair.rank for pair in pairs}
    return (
        own_header(run)
        | _modelspec(run, digest, licence)
        | {
            "modelspec.architecture": f"{names.modelspec}/lora",
            "modelspec.implementation": "sgm" if run.kind == "sdxl" else "diffusers",
            "modelspec.title": f"Forget {run.concept.name}",
            "modelspec.usage_hint": _usage(run, f"Load at strength {run.strength:g}. There is no trigger word."),
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


def checkpoint_header(run: TrainedRun, digest: str, strength: float, licence: str | None = None) -> dict[str, str]:
    """The header of a merged checkpoint in one file.

    Metrics, calibration and preview are of the run at strength 1, and left out at any other.
    """
    title = f"{run.base_name} without {run.concept.name}"
    if strength != 1:
        title += f", merged at strength {strength:g}"
        run = dataclasses.replace(run, results=None, calibration=None)
    return (
        own_header(run)
        | _modelspec(run, digest, licence, has_preview=strength == 1)
        | {
            "modelspec.architecture": architecture(run.base).modelspec,
            "modelspec.implementation": {"sd3": "sd3-ref", "flux": "flux"}.get(run.kind, "sgm"),
            "modelspec.title": title,
            "modelspec.usage_hint": _usage(run, "There is no trigger word and no LoRA to load."),
            "sd_unlearn.strength": str(strength),
        }
    )


def own_header(run: TrainedRun) -> dict[str, str]:
    """The `sd_unlearn.*` keys: how the weights were trained and, after an evaluation, its metrics."""
    recorded = [
        key for key in _RECORDED if run.training.get(key) is not None and not (run.is_full and key in _LORA_ONLY)
    ]
    header = {f"sd_unlearn.{key}": str(run.training[key]) for key in recorded}
    header["sd_unlearn.concept"] = run.concept.name
    if len(run.concept.parts) > 1:
        header["sd_unlearn.concepts"] = json.dumps([part.name for part in run.concept.parts])
    header["sd_unlearn.prompts_sha256"] = concept_sha256(run.concept)
    header["sd_unlearn.base"] = run.base_name
    header["sd_unlearn.base_sha256"] = str(run.base["sha256"])
    if text_encoder := run.base.get("text_encoder_sha256"):  # runs of older versions did not record it
        header["sd_unlearn.base_text_encoder_sha256"] = text_encoder
    if run.training.get("versions"):
        header["sd_unlearn.versions"] = json.dumps(run.training["versions"], sort_keys=True)
    if run.calibration is not None:
        found = run.calibration
        if found.strength is not None:
            header["sd_unlearn.calibrated_strength"] = f"{found.strength:g}"
        keys = ("leakage", "retention", "smallest", "largest", "strength", "message")
        header["sd_unlearn.calibration"] = json.dumps({key: getattr(found, key) for key in keys}, sort_keys=True)
    if run.results is not None:
        results = run.results
        rows = [as_json(row) | {"subject": "lora"} for row in results.rows if row.subject == results.subject]
        content: dict[str, Any] = {"detector": results.detector, "sampler": results.sampler, "rows": rows}
        content["seeds"] = as_json(results.seeds)
        content["problems"] = [
            as_json(problem) | ({} if problem.subject == BASE else {"subject": "lora"}) for problem in results.problems
        ]
        header["sd_unlearn.results"] = json.dumps(content, sort_keys=True)
    return header


def _usage(run: TrainedRun, hint: str) -> str:
    return f"{hint} Sample with a schedule of zero terminal SNR." if run.zero_terminal_snr else hint


def _prediction(run: TrainedRun) -> str:
    """ModelSpec's prediction type, which it does not define for flow matching."""
    if KINDS[run.kind].is_flow:
        return ""
    return "v" if run.base.get("prediction_type") == "v_prediction" else "epsilon"


def _modelspec(run: TrainedRun, digest: str, licence: str | None, has_preview: bool = True) -> dict[str, str]:
    """The ModelSpec keys that a LoRA and a merged checkpoint have in common, and the preview."""
    base, preview = run.base, thumbnails.thumbnail(run) if has_preview else None
    header = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.description": " ".join(
            f'Forgets "{part.name}"' + (f' and generates "{part.generic}" instead.' if run.to_generic else ".")
            for part in run.concept.parts
        ),
        "modelspec.tags": ", ".join(
            dict.fromkeys(["unlearning", "concept erasure", *(p.kind for p in run.concept.parts)])
        ),
        "modelspec.prediction_type": _prediction(run),
        "modelspec.hash_sha256": f"0x{digest}",
        "modelspec.resolution": f"{base['resolution']}x{base['resolution']}" if base.get("resolution") else "",
        "modelspec.date": str(run.training.get("created") or ""),
        "modelspec.license": licence or "",
        "modelspec.thumbnail": f"data:image/jpeg;base64,{preview}" if preview else "",
        # ComfyUI, A1111 and Forge show the first image of this list, and not the thumbnail
        "ssmd_cover_images": json.dumps([preview]) if preview else "",
        "format": "pt",
    }
    return {key: value for key, value in header.items() if value}
