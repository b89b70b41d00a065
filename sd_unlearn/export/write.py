"""Write the files of an export: LoRAs, model card, merged checkpoint. `export.py` has checked the options before."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from sd_unlearn.config.base import ExportConfig
from sd_unlearn.errors import UnlearnError, UsageError, reason
from sd_unlearn.export import merge, model_card, thumbnails, workflow
from sd_unlearn.export.lora_files import concept_of, diffusers_bytes, kohya_bytes
from sd_unlearn.export.metadata import licence_of
from sd_unlearn.export.trained_run import TrainedRun, read_run
from sd_unlearn.io.files import atomic_path, check_writable
from sd_unlearn.io.lock import locked, remove_leftovers
from sd_unlearn.io.own_files import CARD, is_own_card
from sd_unlearn.io.run_folder import DIFFUSERS_FILE, EXPORT_DIR, UNET_DIR
from sd_unlearn.models.source import OPTION

WAIT = 60  # seconds for another export into the same folder


def write_files(config: ExportConfig, run: Path) -> list[Path]:
    """Read a run folder and write what the options ask for. Returns the paths and raises as `export.run`."""
    trained = read_run(run)
    as_lora, folder = _check_lora(trained, config), config.output_dir or run / EXPORT_DIR
    if not as_lora:
        return _write_all(config, trained, None)
    check_writable(folder, "--output_dir")
    _check_overwriting(trained, folder, config.merge)
    with locked(folder, "--output_dir", wait=WAIT):
        _check_overwriting(trained, folder, config.merge)  # again: another process may have written since
        return _write_all(config, trained, folder)


def _write_all(config: ExportConfig, trained: TrainedRun, folder: Path | None) -> list[Path]:
    """Write everything once the options are checked. folder: of the LoRA files; None: the run has none."""
    hub_id = None
    if config.push_to_hub is not None:
        from sd_unlearn.export import hub

        hub_id = hub.check(config.push_to_hub)
    pipeline, name = None, config.pretrained_model_name_or_path
    if config.merge or trained.is_dora:
        pipeline = merge.trained_base(trained, config.allow_pickle, name)
    elif name is not None:
        raise UsageError(f"{OPTION} {name} is for --merge and DoRA, which need the base. Leave it out.")
    licence, files = licence_of(trained, config.license), {}
    if folder is not None:
        files[folder / DIFFUSERS_FILE] = diffusers_bytes(trained, config.dtype)
        files[folder / f"{trained.concept.slug}.safetensors"] = kohya_bytes(trained, config.dtype, pipeline, licence)
        grid = thumbnails.grid(trained)
        card = model_card.render(trained, licence, hub_id, has_grid=grid is not None)
        files[folder / CARD] = card.encode()
        if grid is not None:
            files[folder / model_card.GRID] = grid
        files[folder / workflow.FILE] = workflow.render(trained).encode()
        _write(folder, files)
    written = list(files)
    if config.merge is not None:
        merge.write(trained, pipeline, config.merge, strength=config.strength, dtype=config.dtype, licence=licence)
        written.append(config.merge)
    if hub_id is not None:
        hub.push(hub_id, trained, list(files), private=config.private)
    return written


def _check_overwriting(trained: TrainedRun, folder: Path, merged: Path | None) -> None:
    """Refuse to overwrite files of others in the folder, and to write the checkpoint over the LoRA."""
    lora_files, name = (folder / DIFFUSERS_FILE, folder / f"{trained.concept.slug}.safetensors"), trained.concept.name
    if merged is not None and merged.resolve() in {path.resolve() for path in (folder, *lora_files)}:
        raise UsageError(f"--merge {merged} is where the LoRA is written ({folder}). Choose another name.")
    loras = {path: concept_of(path) == name for path in lora_files if path.is_file()}
    others = [path for path, is_own in loras.items() if not is_own]
    card = folder / CARD
    has_card = is_own_card(card) and model_card.title(name) in card.read_text(encoding="utf-8")
    if not has_card and not any(loras.values()):  # the folder is no export of this concept
        others += [path for file in (CARD, model_card.GRID, workflow.FILE) if (path := folder / file).exists()]
    elif card.exists() and not has_card:
        raise UsageError(
            f"{card} was changed since it was exported, or is of an earlier version of sd-unlearn, and would be "
            "replaced. Rename it, or choose another --output_dir."
        )
    if others:
        raise UsageError(
            f'{others[0]} already exists and is not an export of "{name}", so it is not overwritten. '
            "Choose another --output_dir."
        )


def _check_lora(trained: TrainedRun, config: ExportConfig) -> bool:
    """Whether the run can be written as LoRA files.

    Raises:
        UnlearnError: it cannot, and --merge is missing or --push_to_hub is given.
    """
    if trained.is_full:
        obstacle = f"was trained with --method full: it has a whole UNet ({trained.folder / UNET_DIR}) and no LoRA"
    elif any(adapter.is_dora for adapter in trained.adapters[1:]):
        obstacle = (
            "has a DoRA on a text encoder (--use_dora, --train_text_encoder), whose magnitudes Diffusers' loader drops"
        )
    else:
        return True
    if config.merge is None:
        raise UnlearnError(f"--run {trained.folder} {obstacle}. Write a whole checkpoint with --merge PATH.")
    if config.push_to_hub is not None:
        raise UnlearnError(f"--push_to_hub uploads LoRA files, but --run {trained.folder} {obstacle}. Leave it out.")
    return False


def _write(folder: Path, files: dict[Path, bytes]) -> None:
    """Write all files or none: the renames happen after all files are complete, those of the LoRAs first.

    So after a kill between two renames, the next export recognizes the folder by a LoRA's header.
    """
    remove_leftovers(folder, [path.name for path in files])
    try:
        with ExitStack() as renames:
            for path, data in reversed(files.items()):
                if path.is_dir():
                    raise IsADirectoryError(0, f"{path.name} is a folder")
                renames.enter_context(atomic_path(path)).write_bytes(data)
    except OSError as error:
        raise UnlearnError(f"Cannot write {folder}: {reason(error)}. Choose another --output_dir.") from error
