"""Load a pipeline or a VAE from a single file without a network: configurations and tokenizers are bundled."""

from __future__ import annotations

import gzip
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sd_unlearn.errors import UnlearnError, reason
from sd_unlearn.models import ldm_keys
from sd_unlearn.models.checkpoint_header import TEXT_ENCODERS, UNET, read_tensors_under
from sd_unlearn.models.kinds import KINDS
from sd_unlearn.models.source import OPTION, SINGLE_FILE_DIR, Source

TOKENS = 77  # CLIP's text length
CLIP = ldm_keys.CLIP["sd1"]
BARE_CLIP = CLIP.removesuffix("text_model.")
_UNUSED_LAYER = f"{ldm_keys.OPEN_CLIP['sd2']}transformer.resblocks.23."  # SD 2 uses the first 23 of 24 layers


@cache
def merges() -> list[tuple[str, str]]:
    """The 48,894 byte pairs that CLIP merges, most frequent first (assets/single_file/README.md)."""
    lines = gzip.decompress((SINGLE_FILE_DIR / "merges.txt.gz").read_bytes()).decode().splitlines()
    return [(first, second) for first, second in map(str.split, lines)]


def byte_letters() -> list[str]:
    """A printable letter for each byte, in the order of CLIP's vocabulary: printable bytes first."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return list(bytes_to_unicode().values())


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

    if KINDS[str(source.kind)].is_flow:
        from sd_unlearn.models.transformer_file import load_transformer_file

        return load_transformer_file(source, dtype, vae)
    config, is_xl = source.configs, source.kind == "sdxl"
    assert config is not None
    given: dict[str, Any] = _tokenizers(config, source.kind)
    if vae is not None:
        given["vae"] = vae
    if is_xl:
        given["add_watermarker"] = False
    load = (StableDiffusionXLPipeline if is_xl else StableDiffusionPipeline).from_single_file
    if _is_bare(source):
        given["text_encoder"] = _bare_text_encoder(source, dtype)
    try:
        with _lower_suffix(source.place) as place:
            pipeline = load(str(place), config=str(config), local_files_only=True, dtype=dtype, **given)
    except (SingleFileComponentError, KeyError, OSError, ValueError, RuntimeError) as error:
        _name_missing(source, given)
        if isinstance(error, SingleFileComponentError | KeyError):
            raise UnlearnError(f"{OPTION} {source.name} is not a complete checkpoint: {reason(error)}.") from error
        raise
    _check_weights_fit(source, pipeline, given)
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


def _name_missing(source: Source, given: Mapping[str, Any]) -> None:
    """Explain why a file cannot be loaded if it lacks a tensor of one of its networks: by the tensor's name.

    given: networks that are not read from the file.

    Raises:
        UnlearnError
    """
    try:
        needed = ldm_keys.checkpoint(_empty_networks(source), str(source.kind))
    except UnlearnError:  # the configuration has blocks that the layout has no names for
        return
    parts = {"UNet": (UNET,), "VAE": () if "vae" in given else (ldm_keys.VAE,), "text encoder": TEXT_ENCODERS}
    for part, prefixes in parts.items():
        names = [name for name in needed if name.startswith(prefixes) and not name.startswith(_UNUSED_LAYER)]
        if _is_bare(source):
            names = [name.replace(CLIP, BARE_CLIP, 1) for name in names]
        missing = [name for name in names if not any(key in source.header.shapes for key in _spellings(name))]
        if missing:
            raise UnlearnError(
                f"{OPTION} {source.name} could not be loaded: it lacks {len(missing)} of the {part}'s tensors, e.g. "
                f"{missing[0]}. Download it again, or add --single_file_config with a diffusers folder that holds its "
                "own configuration."
            )


def _empty_networks(source: Source) -> Any:
    """The networks of a pipeline by its configuration, without memory for their weights."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    encoders = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    with torch.device("meta"):
        networks = {
            "unet": UNet2DConditionModel.from_config(source.config_of("unet")),
            "vae": AutoencoderKL.from_config(source.config_of("vae")),
            **{
                name: network(CLIPTextConfig.from_dict(config))
                for name, network in encoders.items()
                if (config := source.config_of(name))
            },
        }
    return SimpleNamespace(**networks, scheduler=SimpleNamespace(config=SimpleNamespace(prediction_type="epsilon")))


def _spellings(name: str) -> tuple[str, ...]:
    """The names that a tensor has in single files of different programs."""
    return name, name.replace(ldm_keys.VAE, "vae.", 1)


def _is_bare(source: Source) -> bool:
    """Whether the text encoder is spelled as in NovelAI's files: without `text_model.`, which diffusers needs."""
    return f"{BARE_CLIP}embeddings.token_embedding.weight" in source.header.shapes


def _bare_text_encoder(source: Source, dtype: Any) -> Any:
    """The text encoder of a file that spells it as NovelAI does."""
    from transformers import CLIPTextConfig, CLIPTextModel

    encoder = CLIPTextModel(CLIPTextConfig.from_dict(source.config_of("text_encoder")))
    tensors = read_tensors_under(source.place, BARE_CLIP)
    names = {name: BARE_CLIP + name.removeprefix("text_model.") for name in encoder.state_dict()}
    if any(key not in tensors for key in names.values()):
        _name_missing(source, {})
    encoder.load_state_dict({name: tensors[key] for name, key in names.items()})
    return encoder.to(dtype)


def _tokenizers(config: Path, kind: str | None) -> dict[str, Any]:
    """The tokenizers missing in the configuration folder. OpenCLIP pads with "!", CLIP with its end token."""
    padding = {"tokenizer": "!" if kind == "sd2" else "<|endoftext|>"} | (
        {"tokenizer_2": "!"} if kind == "sdxl" else {}
    )
    return {name: clip_tokenizer(pad) for name, pad in padding.items() if not (config / name).is_dir()}


def _check_weights_fit(source: Source, pipeline: Any, given: Mapping[str, Any]) -> None:
    """Refuse weights that do not fit: diffusers ignores extra weights and leaves missing ones uninitialized."""
    empty = [
        name
        for component in ("unet", "vae", "text_encoder", "text_encoder_2")
        for name, parameter in getattr(getattr(pipeline, component, None), "named_parameters", dict)()
        if parameter.is_meta
    ]
    if empty:
        _name_missing(source, given)
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
