"""Export: what a run has learned, where people use it, at the scale it was trained at, in files that say what they are.

`pytorch_lora_weights.safetensors` is for Diffusers' load_lora_weights, `<slug>.safetensors` for ComfyUI, A1111 and
Forge, README.md is a model card; --merge writes a whole checkpoint. Nothing depends on the clock or on hash order: the
same run gives the same bytes.
"""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path

from sd_unlearn.config.base import ExportConfig
from sd_unlearn.errors import UnlearnError, UsageError
from sd_unlearn.export import merge, model_card, thumbnails
from sd_unlearn.export.lora_files import DIFFUSERS_FILE, concept_of, diffusers_bytes, kohya_bytes
from sd_unlearn.export.metadata import licence
from sd_unlearn.export.trained_run import Run, read_run
from sd_unlearn.io.run_folder import EXPORT_DIR, UNET_DIR


def run(config: ExportConfig) -> list[Path]:
    """Write the LoRA files and the card of a run, and the checkpoint asked for; upload them where asked.

    Returns:
        The paths written: the LoRA for Diffusers, that for ComfyUI, the card, its pictures, the checkpoint.

    Raises:
        UsageError: --run is missing or is not the folder of a finished training, options contradict each other, or
            files of others are where these would go.
        UnlearnError: the run cannot be expressed in the formats, --output_dir or --merge cannot be written, or the
            hub refuses. Nothing is left half-written.
    """
    if config.run is None:
        raise UsageError("--run is missing: name the run folder of a finished training, e.g. --run runs/seven.")
    _check(config)
    found = read_run(config.run)
    as_lora, folder = _check_lora(found, config), config.output_dir or config.run / EXPORT_DIR
    if as_lora:
        _check_places(found, folder, config.merge)
    hub_id = None
    if config.push_to_hub is not None:
        from sd_unlearn.export import hub

        hub_id = hub.check(config.push_to_hub)
    pipeline = merge.trained_base(found, config.allow_pickle) if config.merge or found.is_dora else None
    terms, files = licence(found, config.license), {}
    if as_lora:
        files[folder / DIFFUSERS_FILE] = diffusers_bytes(found, config.dtype)
        files[folder / f"{found.concept.slug}.safetensors"] = kohya_bytes(found, config.dtype, pipeline, terms)
        pictures = thumbnails.grid(found)
        card = model_card.render(found, terms, hub_id, has_pictures=pictures is not None)
        files[folder / model_card.FILE] = card.encode()
        if pictures is not None:
            files[folder / model_card.PICTURES] = pictures
        _write(folder, files)
    written = list(files)
    if config.merge is not None:
        merge.write(found, pipeline, config.merge, strength=config.strength, dtype=config.dtype, licence=terms)
        written.append(config.merge)
    if hub_id is not None:
        hub.push(hub_id, found, list(files), private=config.private)
    return written


def _check(config: ExportConfig) -> None:
    if not math.isfinite(config.strength):
        raise UsageError(f"--strength {config.strength} is no number to multiply with. 1 is what was trained.")
    if config.strength != 1 and config.merge is None:
        raise UsageError(
            f"--strength {config.strength:g} is for --merge: a LoRA gets its strength where it is loaded. Leave it out."
        )
    if config.private and config.push_to_hub is None:
        raise UsageError("--private is for --push_to_hub, which was not given. Leave it out.")
    if config.merge is not None:
        merge.check_place(config.merge)


def _check_places(found: Run, folder: Path, merged: Path | None) -> None:
    """Neither what others put into the folder nor the LoRA that is about to be written there may be replaced."""
    named, ours = (folder / DIFFUSERS_FILE, folder / f"{found.concept.slug}.safetensors"), found.concept.name
    if merged is not None and merged.resolve() in {path.resolve() for path in (folder, *named)}:
        raise UsageError(f"--merge {merged} is where the LoRA goes ({folder}). Choose another name.")
    others = [path for path in named if path.is_file() and concept_of(path) != ours]
    readme = folder / model_card.FILE
    if readme.is_file() and model_card.title(ours) not in readme.read_text(encoding="utf-8", errors="replace"):
        others.append(readme)
    if others:
        raise UsageError(
            f'{others[0]} is there already and no export of "{ours}"; it is not replaced. Choose another --output_dir.'
        )


def _check_lora(found: Run, config: ExportConfig) -> bool:
    """Whether the run can be said as LoRA files; if not, a whole checkpoint must be asked for."""
    if found.is_full:
        why = f"was trained with --method full: it has a whole UNet ({found.folder / UNET_DIR}) and no LoRA"
    elif any(adapter.is_dora for adapter in found.adapters[1:]):
        why = (
            "has a DoRA on a text encoder (--use_dora, --train_text_encoder), whose magnitudes Diffusers' loader drops"
        )
    else:
        return True
    if config.merge is None:
        raise UnlearnError(f"--run {found.folder} {why}. Write a whole checkpoint with --merge PATH.")
    if config.push_to_hub is not None:
        raise UnlearnError(f"--push_to_hub uploads LoRA files, and --run {found.folder} {why}. Leave it out.")
    return False


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
