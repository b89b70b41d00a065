"""The export command: write a run's LoRA in the formats of Diffusers, ComfyUI, A1111 and Forge, with a model card.

`pytorch_lora_weights.safetensors` is for Diffusers' load_lora_weights, `<slug>.safetensors` for ComfyUI, A1111 and
Forge, and README.md is the model card. --merge also writes a whole checkpoint. Exporting the same run again gives the
same bytes.
"""

from __future__ import annotations

from pathlib import Path

from sd_unlearn.config.base import ExportConfig
from sd_unlearn.config.options import check_ranges
from sd_unlearn.errors import UsageError
from sd_unlearn.io.files import check_writable
from sd_unlearn.io.run_folder import check_trained
from sd_unlearn.models.checkpoint_header import PICKLES


def run(config: ExportConfig) -> list[Path]:
    """Write the LoRA files and model card of a run and, if requested, a merged checkpoint; upload them if requested.

    Returns:
        The paths written: LoRA for Diffusers, LoRA for ComfyUI, card, images of the card, checkpoint.

    Raises:
        UsageError: --run is missing or is not the folder of a finished training, options contradict each other, or
            the files would overwrite those of others.
        UnlearnError: the formats cannot express the run, --output_dir or --merge cannot be written, or the hub
            refuses. Nothing is left half-written.
    """
    if config.run is None:
        raise UsageError("--run is missing: name the run folder of a finished training, e.g. --run runs/seven.")
    check_options(config)
    if config.merge is not None:
        _check_place(config.merge)
    check_trained(config.run)
    from sd_unlearn.export.write import write_files  # only now: it imports torch, which takes seconds

    return write_files(config, config.run)


def check_options(config: ExportConfig) -> None:
    """Refuse options that contradict each other, whatever the run. Looks at no file.

    Raises:
        UsageError
    """
    check_ranges(config)
    if config.strength != 1 and config.merge is None:
        raise UsageError(
            f"--strength {config.strength:g} is for --merge: the strength of a LoRA is set where it is loaded. "
            "Leave it out."
        )
    if config.private and config.push_to_hub is None:
        raise UsageError("--private is for --push_to_hub, which was not given. Leave it out.")
    if config.merge is not None and config.merge.suffix.lower() in PICKLES:
        raise UsageError(
            f"--merge {config.merge}: a pickle can run code when loaded. Name a .safetensors file or a folder."
        )


def _check_place(path: Path) -> None:
    """Check where --merge writes.

    Raises:
        UsageError: the path exists or cannot be written.
    """
    if path.is_file() or (path.is_dir() and (path.suffix.lower() == ".safetensors" or any(path.iterdir()))):
        raise UsageError(f"--merge {path} exists and is not overwritten. Choose another name or delete it.")
    if not path.name:
        raise UsageError(f"--merge {path} is the current folder. Name a new one.")
    check_writable(path.parent, "--merge")
