"""Load a pipeline or a VAE from a single file without a network: configurations and tokenizers are bundled."""

from __future__ import annotations

import gzip
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from sd_unlearn.errors import UnlearnError, reason
from sd_unlearn.models.checkpoint_header import UNET
from sd_unlearn.models.ldm_keys import blocks_of, unet_key
from sd_unlearn.models.source import OPTION, SINGLE_FILE_DIR, Source

TOKENS = 77  # CLIP's text length


@cache
def merges() -> list[tuple[str, str]]:
    """The 48,894 byte pairs that CLIP merges, most frequent first (assets/single_file/README.md)."""
    lines = gzip.decompress((SINGLE_FILE_DIR / "merges.txt.gz").read_bytes()).decode().splitlines()
    return [(first, second) for first, second in map(str.split, lines)]


def byte_letters() -> list[str]:
    """A printable letter for each byte, in the order of CLIP's vocabulary: printable bytes first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(byte) for byte in printable] + [chr(0x100 + n) for n in range(256 - len(printable))]


def clip_tokenizer(pad_token: str) -> Any:
    """CLIP's tokenizer, built from its merges: letters, letters that end a word, merged pairs, start and end."""
    from transformers import CLIPTokenizer

    letters = byte_letters()
    pairs = ["".join(pair) for pair in merges()]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *pairs, "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges(), model_max_length=TOKENS, pad_token=pad_token)


def load_single_file(source: Source, dtype: Any, vae: Any = None) -> Any:
    """Load the pipeline of a single file, with the bundled configuration or --single_file_config.

    vae: replaces the file's own VAE.

    Raises:
        UnlearnError: the weights do not fit the configuration.
    """
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    config, is_xl = source.configs, source.kind == "sdxl"
    assert config is not None
    given: dict[str, Any] = _tokenizers(config, source.kind)
    if vae is not None:
        given["vae"] = vae
    if is_xl:
        given["add_watermarker"] = False
    load = (StableDiffusionXLPipeline if is_xl else StableDiffusionPipeline).from_single_file
    _check_complete(source)
    try:
        with _lower_suffix(source.place) as place:
            pipeline = load(str(place), config=str(config), local_files_only=True, dtype=dtype, **given)
    except SingleFileComponentError as error:
        raise UnlearnError(f"{OPTION} {source.name} is not a complete checkpoint: {reason(error)}.") from error
    _check_weights_fit(source, pipeline)
    pipeline.scheduler.register_to_config(prediction_type=source.known_prediction_type)
    if "ztsnr" in source.header.shapes:  # marks models trained with a zero-terminal-SNR schedule
        pipeline.scheduler.register_to_config(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    if source.kind == "sd2" and source.known_prediction_type == "epsilon" and not source.single_file_config:
        pipeline.unet.register_to_config(sample_size=64)  # the -base models: 512 pixels
    return pipeline


@contextmanager
def _lower_suffix(path: Path) -> Iterator[Path]:
    """The file under a name with a lower-case suffix, by which diffusers chooses its reader."""
    if path.suffix == path.suffix.lower():
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / f"{path.stem}{path.suffix.lower()}"
        link.symlink_to(path.resolve())
        yield link


def _check_complete(source: Source) -> None:
    """Refuse a checkpoint that lacks a tensor of its UNet, by the tensor's name.

    Raises:
        UnlearnError
    """
    import torch
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(source.config_of("unet"))
    try:
        needed = [UNET + unet_key(name, blocks_of(unet.config)) for name in unet.state_dict()]
    except UnlearnError:  # the configuration has blocks that the layout has no names for
        return
    missing = [key for key in needed if key not in source.header.shapes]
    if missing:
        raise UnlearnError(
            f"{OPTION} {source.name} could not be loaded: it lacks {len(missing)} of the UNet's tensors, e.g. "
            f"{missing[0]}. Download it again, or add --single_file_config with a diffusers folder that holds its own "
            "configuration."
        )


def _tokenizers(config: Path, kind: str | None) -> dict[str, Any]:
    """The tokenizers missing in the configuration folder. OpenCLIP pads with "!", CLIP with its end token."""
    padding = {"tokenizer": "!" if kind == "sd2" else "<|endoftext|>"} | (
        {"tokenizer_2": "!"} if kind == "sdxl" else {}
    )
    return {name: clip_tokenizer(pad) for name, pad in padding.items() if not (config / name).is_dir()}


def _check_weights_fit(source: Source, pipeline: Any) -> None:
    """Refuse weights that do not fit: diffusers ignores extra weights and leaves missing ones uninitialized."""
    empty = [
        name
        for component in ("unet", "vae", "text_encoder", "text_encoder_2")
        for name, parameter in getattr(getattr(pipeline, component, None), "named_parameters", dict)()
        if parameter.is_meta
    ]
    left_over = len(list(source.header.under(UNET))) - len(pipeline.unet.state_dict())
    if empty or left_over:
        fault = f"lacks {empty[0]}" if empty else f"holds {left_over} UNet tensors too many"
        raise UnlearnError(
            f"{OPTION} {source.name} does not fit the configuration {source.configs}: it {fault}. Add "
            "--single_file_config with a diffusers folder that holds its own configuration."
        )


def load_vae_file(path: Path, config: Path, dtype: Any) -> Any:
    """Load a VAE from a single file. Its sizes and scale, which the file does not state, are those of `config`, a VAE's
    config.json."""
    from diffusers import AutoencoderKL

    with _lower_suffix(path) as place:
        return AutoencoderKL.from_single_file(str(place), config=str(config.parent), local_files_only=True, dtype=dtype)
