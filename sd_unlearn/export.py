"""Export: the LoRA of a run where people use it, with the scale it was trained at and a header that says what it is.

`pytorch_lora_weights.safetensors` is for Diffusers' load_lora_weights, `<slug>.safetensors` for ComfyUI, A1111 and
Forge. Nothing depends on the clock or on hash order: the same run gives the same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from sd_unlearn.concept import Concept, read_concept
from sd_unlearn.config import ExportConfig
from sd_unlearn.errors import UnlearnError, UsageError
from sd_unlearn.kohya import Adapter, kohya_tensors, read_adapter
from sd_unlearn.records import (
    ADAPTER_DIR,
    CONCEPT,
    EXPORT_DIR,
    RESULTS,
    TEXT_ADAPTER_DIR,
    TRAINING,
    UNET_DIR,
    read_json,
    weights_sha256,
)

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
HEADER_LIMIT = 1024 * 1024  # above this ComfyUI shows no header at all
# What Diffusers needs to rebuild the adapter. PEFT's whole config would make an older PEFT refuse the file over
# settings it does not know, and can name folders of this machine.
_ADAPTER_KEYS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "bias")
_TRAINING_KEYS = ("rank", "lora_alpha", "beta", "correction", "caption_mode", "version", "config_sha256")


@dataclass(frozen=True)
class Run:
    """A finished run as it lies on disk. `results` is None before evaluation, or when they judge another adapter."""

    concept: Concept
    training: dict[str, Any]
    adapter: Adapter
    results: dict[str, Any] | None
    text_adapter: Adapter | None = None

    @property
    def adapters(self) -> list[Adapter]:
        return [self.adapter, *([self.text_adapter] if self.text_adapter else [])]


@dataclass(frozen=True)
class Architecture:
    """How the user interfaces name a base: ModelSpec's architecture and kohya's ss_base_model_version."""

    modelspec: str
    kohya: str
    v2: bool


def run(config: ExportConfig) -> list[Path]:
    """Write both LoRA files of a run; returns their paths, Diffusers' first.

    Raises:
        UsageError: --run is missing or is not the folder of a finished training.
        UnlearnError: the run cannot be expressed in the formats, or --output_dir cannot be written. Nothing is
            left half-written.
    """
    if config.run is None:
        raise UsageError("--run is missing: name the run folder of a finished training, e.g. --run runs/seven.")
    found = read_run(config.run)
    folder = config.output_dir or config.run / EXPORT_DIR
    files = {
        folder / DIFFUSERS_FILE: diffusers_bytes(found),
        folder / f"{found.concept.slug}.safetensors": kohya_bytes(found),
    }
    _write(folder, files)
    return list(files)


def read_run(folder: Path) -> Run:
    """Everything export needs of a run folder, checked.

    Raises:
        UsageError: the folder or one of its files is missing or not readable as what it should be.
        UnlearnError: the base or the adapter is of a kind that cannot be exported, or the adapter is another run's.
    """
    if not folder.is_dir():
        raise UsageError(f"--run {folder} does not exist. Name the run folder of a finished training.")
    for name in (TRAINING, CONCEPT):
        if not (folder / name).is_file():
            raise UsageError(f"--run {folder} holds no finished training ({folder / name}). Train first.")
    training = read_json(folder / TRAINING)
    _check_training(training, folder / TRAINING)
    architecture(training["base"])
    if (folder / UNET_DIR).is_dir():
        raise UnlearnError(
            f"--run {folder} was trained with --method full: it has a whole UNet ({folder / UNET_DIR}) and no LoRA. "
            "Give it to a pipeline: unet=UNet2DConditionModel.from_pretrained(...)."
        )
    adapter = read_adapter(folder / ADAPTER_DIR)
    beside = folder / TEXT_ADAPTER_DIR
    text_adapter = read_adapter(beside, "text_encoder") if beside.is_dir() else None
    for key, ours in (("rank", "r"), ("lora_alpha", "lora_alpha")):
        if training[key] != adapter.config[ours]:
            raise UnlearnError(
                f"--run {folder} mixes two trainings: {TRAINING} says {key} {training[key]}, the adapter "
                f"{adapter.config[ours]}. Train it again with --overwrite."
            )
    return Run(read_concept(folder / CONCEPT), training, adapter, _results(folder), text_adapter)


def architecture(base: dict[str, Any]) -> Architecture:
    """The names of a base (training.json's entry) by its kind and prediction type.

    Raises:
        UnlearnError: SDXL, and every kind that the exported formats do not cover.
    """
    v_prediction = base.get("prediction_type") == "v_prediction"
    if base["kind"] == "sd1":
        return Architecture("stable-diffusion-v1/lora", "sd_v1", v2=False)
    if base["kind"] == "sd2" and v_prediction:
        return Architecture("stable-diffusion-v2-768-v/lora", "sd_v2_v", v2=True)
    if base["kind"] == "sd2":
        return Architecture("stable-diffusion-v2-512/lora", "sd_v2", v2=True)
    if base["kind"] == "sdxl":
        raise UnlearnError(
            f"--run was trained on {_base_name(base)}, an SDXL base (sdxl), which export cannot write yet. "
            "Choose a run on an SD 1 or SD 2 base."
        )
    raise UnlearnError(
        f'--run was trained on a base of kind "{base["kind"]}", which export cannot write. '
        "Choose a run on an SD 1 or SD 2 base."
    )


def diffusers_bytes(run: Run) -> bytes:
    """The file for Diffusers: PEFT's names under `unet.` and `text_encoder.`, the adapters' scale in the header.

    Without `lora_adapter_metadata` load_lora_weights takes alpha = rank, whatever was trained.
    """
    tensors: dict[str, Tensor] = {}
    packed: dict[str, Any] = {}
    for adapter in run.adapters:
        network = adapter.network
        for pair in adapter.pairs:
            tensors[f"{network}.{pair.module}.lora_A.weight"] = pair.down
            tensors[f"{network}.{pair.module}.lora_B.weight"] = pair.up
        settings = {key: adapter.config[key] for key in _ADAPTER_KEYS if key in adapter.config}
        targets = adapter.config.get("target_modules")
        modules = targets if isinstance(targets, list) else [pair.module for pair in adapter.pairs]
        settings["target_modules"] = sorted(modules)
        packed |= {f"{network}.{key}": value for key, value in settings.items()}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(packed, indent=2, sort_keys=True)}
    return pack(tensors, metadata | own_header(run))


def kohya_bytes(run: Run) -> bytes:
    """The file for ComfyUI, A1111 and Forge: kohya's names, the true alpha, ModelSpec and kohya header keys."""
    tensors = {key: value for adapter in run.adapters for key, value in kohya_tensors(adapter).items()}
    digest = hashlib.sha256(_split(safetensors.torch.save(tensors))[1]).hexdigest()
    return pack(tensors, {"format": "pt"} | interface_header(run, digest) | own_header(run))


def interface_header(run: Run, digest: str) -> dict[str, str]:
    """What the user interfaces show and filter by. `digest`: SHA-256 of the file after its header, in hex."""
    base, names, pairs = run.training["base"], architecture(run.training["base"]), run.adapter.pairs
    ranks, scale_kept = {pair.rank for pair in pairs}, run.adapter.uniform
    header = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": names.modelspec,
        "modelspec.implementation": "diffusers",
        "modelspec.title": f"Forget {run.concept.name}",
        "modelspec.description": f'Forgets "{run.concept.name}" and draws "{run.concept.generic}" instead.',
        "modelspec.usage_hint": "Load at strength 1. There is no trigger word.",
        "modelspec.tags": ", ".join(("unlearning", "concept erasure", run.concept.kind)),
        "modelspec.prediction_type": "v" if base.get("prediction_type") == "v_prediction" else "epsilon",
        "modelspec.hash_sha256": f"0x{digest}",
        "ss_output_name": run.concept.slug,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(pairs[0].rank) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(pairs[0].alpha) if scale_kept else "Dynamic",
        "ss_base_model_version": names.kohya,
        "ss_v2": str(names.v2),
        "ss_sd_model_name": _base_name(base),
        "sshs_model_hash": digest,
    }
    if base.get("resolution"):
        header["modelspec.resolution"] = f"{base['resolution']}x{base['resolution']}"
    if run.training.get("created"):
        header["modelspec.date"] = str(run.training["created"])
    return header


def own_header(run: Run) -> dict[str, str]:
    """How the LoRA came about and, once evaluated, what it was measured to do."""
    header = {f"sd_unlearn.{key}": str(run.training[key]) for key in _TRAINING_KEYS}
    header["sd_unlearn.concept"] = run.concept.name
    header["sd_unlearn.base"] = _base_name(run.training["base"])
    header["sd_unlearn.base_sha256"] = str(run.training["base"]["sha256"])
    if run.results is not None:
        kept = {key: run.results.get(key) for key in ("detector", "sampler", "seeds")}
        kept["rows"] = [row for row in run.results["rows"] if row.get("subject") == "lora"]
        header["sd_unlearn.results"] = json.dumps(kept, sort_keys=True)
    return header


def pack(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """A safetensors file. safetensors' own writer orders the header's metadata by chance; here it is sorted.

    Raises:
        UnlearnError: the header reaches 1 MiB.
    """
    header, payload = _split(safetensors.torch.save(tensors))
    text = json.dumps({"__metadata__": dict(sorted(metadata.items())), **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors start at a multiple of eight bytes
    if len(text) >= HEADER_LIMIT:
        raise UnlearnError(
            f"The header would take {len(text)} bytes, and ComfyUI shows none above {HEADER_LIMIT}. Shorten {CONCEPT}."
        )
    return len(text).to_bytes(8, "little") + text + payload


def _split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's header (tensors only) and everything after it."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header.pop("__metadata__", None)
    return header, data[end:]


def _base_name(base: dict[str, Any]) -> str:
    """The base's name; of a folder on this machine only the last part, the rest is nobody's business."""
    name = str(base["name"])
    return Path(name).name if Path(name).is_absolute() else name


def _check_training(training: Any, path: Path) -> None:
    base = training.get("base") if isinstance(training, dict) else None
    if not isinstance(base, dict):
        raise UsageError(f'{path} holds no "base": it is no record of a training. Train again with --overwrite.')
    missing = [key for key in _TRAINING_KEYS if key not in training]
    missing += [f"base.{key}" for key in ("name", "kind", "sha256") if key not in base]
    if missing:
        raise UsageError(f'{path} lacks "{missing[0]}", which every training writes. Train again with --overwrite.')


def _results(folder: Path) -> dict[str, Any] | None:
    """The evaluation of exactly this adapter, if there is one: figures of an earlier training would be a lie here."""
    if not (folder / RESULTS).is_file():
        return None
    results = read_json(folder / RESULTS)
    if not isinstance(results, dict) or not isinstance(results.get("rows"), list):
        raise UsageError(f'{folder / RESULTS} holds no "rows". Run sd-unlearn evaluate again, or delete it.')
    return results if results.get("adapter_sha256") == weights_sha256(folder) else None


def _write(folder: Path, files: dict[Path, bytes]) -> None:
    """Write all files or none: every one under a temporary name first, renamed when all are whole."""
    temporary = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in files}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, data in files.items():
            if path.is_dir():
                raise IsADirectoryError(0, f"{path.name} is a folder")
            temporary[path].write_bytes(data)
        for path in files:
            temporary[path].replace(path)
    except OSError as error:
        for path in temporary.values():
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        raise UnlearnError(f"Cannot write {folder}: {error.strerror}. Choose another --output_dir.") from error
