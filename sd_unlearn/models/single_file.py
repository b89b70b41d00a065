"""A pipeline or a VAE from one file, without a network: what the file does not hold comes with this package."""

from __future__ import annotations

import gzip
from functools import cache
from pathlib import Path
from typing import Any

from sd_unlearn.errors import UnlearnError
from sd_unlearn.models.checkpoint_header import UNET
from sd_unlearn.models.source import OPTION, SINGLE_FILE_DIR, Source

TOKENS = 77  # the length of CLIP's texts


@cache
def merges() -> list[tuple[str, str]]:
    """The 48,894 byte pairs that CLIP merges, most frequent first (assets/single_file/README.md)."""
    lines = gzip.decompress((SINGLE_FILE_DIR / "merges.txt.gz").read_bytes()).decode().splitlines()
    return [(first, second) for first, second in map(str.split, lines)]


def byte_letters() -> list[str]:
    """A printable letter for each byte, in the order of CLIP's vocabulary: printable bytes as they are, then others."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(byte) for byte in printable] + [chr(0x100 + n) for n in range(256 - len(printable))]


def clip_tokenizer(pad_token: str) -> Any:
    """CLIP's tokenizer, from its merges: letters, letters that end a word, merged pairs, start and end."""
    from transformers import CLIPTokenizer

    letters = byte_letters()
    pairs = ["".join(pair) for pair in merges()]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *pairs, "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges(), model_max_length=TOKENS, pad_token=pad_token)


def load_single_file(source: Source, dtype: Any, vae: Any = None) -> Any:
    """The pipeline of a single file, its configuration bundled or that of --single_file_config; with another VAE.

    Raises:
        UnlearnError: its weights are not those that the configuration describes.
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
    try:
        pipeline = load(str(source.place), config=str(config), local_files_only=True, dtype=dtype, **given)
    except SingleFileComponentError as error:
        raise UnlearnError(f"{OPTION} {source.name} is no whole checkpoint: {str(error).splitlines()[0]}") from error
    _check_whole(source, pipeline)
    pipeline.scheduler.register_to_config(prediction_type=source.predicts)
    if "ztsnr" in source.layout.shapes:  # a mark of models trained with a schedule that ends in pure noise
        pipeline.scheduler.register_to_config(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    if source.kind == "sd2" and source.predicts == "epsilon" and not source.single_file_config:
        pipeline.unet.register_to_config(sample_size=64)  # the -base models: 512 pixels
    return pipeline


def _tokenizers(config: Path, kind: str | None) -> dict[str, Any]:
    """The tokenizers that the folder of configurations does not hold. OpenCLIP pads with "!", CLIP with its end."""
    usual = {"tokenizer": "!" if kind == "sd2" else "<|endoftext|>"} | ({"tokenizer_2": "!"} if kind == "sdxl" else {})
    return {name: clip_tokenizer(pad) for name, pad in usual.items() if not (config / name).is_dir()}


def _check_whole(source: Source, pipeline: Any) -> None:
    """diffusers passes over weights that find no place, and leaves empty what finds no weights."""
    empty = [
        name
        for component in ("unet", "vae", "text_encoder", "text_encoder_2")
        for name, parameter in getattr(getattr(pipeline, component, None), "named_parameters", dict)()
        if parameter.is_meta
    ]
    left_over = len(list(source.layout.under(UNET))) - len(pipeline.unet.state_dict())
    if empty or left_over:
        what = f"lacks {empty[0]}" if empty else f"holds {left_over} tensors of the UNet more"
        raise UnlearnError(
            f"{OPTION} {source.name} {what} than the configuration {source.configs} describes. Name a diffusers folder "
            "with its own by --single_file_config."
        )


def load_vae_file(path: Path, config: Path, dtype: Any) -> Any:
    """A VAE of one file, which says neither sizes nor scale: they are those of `config`, a VAE's config.json."""
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_single_file(str(path), config=str(config.parent), local_files_only=True, dtype=dtype)
