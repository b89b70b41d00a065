"""From a base's name to a loaded diffusers pipeline, of a hub id, a folder or one file, another VAE if asked."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sd_unlearn.errors import UnlearnError, UsageError
from sd_unlearn.models.source import OPTION, PIPELINES, SINGLE_FILE_DIR, Source, check_class, variant_of


def load_pipeline(source: Source, dtype: Any) -> Any:
    """The StableDiffusionPipeline or StableDiffusionXLPipeline of a base, without a safety checker, on the CPU.

    Raises:
        UsageError: another pipeline, a VAE of another kind.
        UnlearnError: the weights cannot be had, or are not those that the configuration describes.
    """
    try:
        vae = _load_vae(source, dtype) if source.vae else None
    except (OSError, ValueError, RuntimeError) as error:
        raise UnlearnError(f"--vae {source.vae} could not be loaded: {_first_line(error)}") from error
    try:
        return _load_file_or_folder(source, dtype, vae)
    except (OSError, ValueError, RuntimeError) as error:
        hint = "Without a network, name a local diffusers folder or file, or the bundled base: digits."
        if source.is_file:
            hint = "If it differs from the published models, --single_file_config names a folder that describes it."
        elif "safetensors" in str(error) and not source.allow_pickle:
            hint = "If it has pickled weights only (.bin), --allow_pickle loads them."
        raise UnlearnError(f"{OPTION} {source.name} could not be loaded: {_first_line(error)} {hint}") from error


def _load_file_or_folder(source: Source, dtype: Any, vae: Any) -> Any:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    if source.is_file:
        from sd_unlearn.models.single_file import load_single_file

        if vae is not None:
            _check_scale(vae, _config(source, "vae", "config.json"), source)
        return load_single_file(source, dtype, vae)
    place = str(source.place) if source.place.is_dir() else source.name
    index = _config(source, None, "model_index.json")  # of a hub id before its weights, which may be many gigabytes
    check_class(source.name, index.get("_class_name"))
    is_xl = index["_class_name"] == PIPELINES[1]
    given: dict[str, Any] = (
        {"add_watermarker": False} if is_xl else {"safety_checker": None, "requires_safety_checker": False}
    )
    if vae is not None:
        _check_scale(vae, _config(source, "vae", "config.json"), source)
        given["vae"] = vae
    if not source.allow_pickle:
        given["use_safetensors"] = True
    load = (StableDiffusionXLPipeline if is_xl else StableDiffusionPipeline).from_pretrained
    variant = variant_of(source)
    try:
        return load(place, dtype=dtype, variant=variant, **given)
    except (OSError, ValueError) as error:
        if variant or source.place.is_dir():
            raise
        with contextlib.suppress(OSError, ValueError):
            return load(place, dtype=dtype, variant="fp16", **given)  # a repository may hold half precision only
        raise error


def _config(source: Source, component: str | None, file: str) -> dict[str, Any]:
    """A configuration of the base, from here or from the hub."""
    if source.configs:
        return source.config_of(component or "", file)
    return dict(json.loads(_fetched(source.name, component, file).read_text(encoding="utf-8")))


def _fetched(name: str, component: str | None, file: str) -> Path:
    """Where a file of a hub id lies once it is here."""
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(name, file, subfolder=component))


def _load_vae(source: Source, dtype: Any) -> Any:
    from diffusers import AutoencoderKL

    name = str(source.vae)
    if Path(name).is_file():
        from sd_unlearn.models.single_file import load_vae_file

        return load_vae_file(Path(name), _vae_config(source), dtype)
    inside = "vae" if (Path(name) / "vae" / "config.json").is_file() else None
    safe = {} if source.allow_pickle else {"use_safetensors": True}
    return AutoencoderKL.from_pretrained(name, subfolder=inside, dtype=dtype, **safe)


def _vae_config(source: Source) -> Path:
    """The config.json of the base's own VAE; where it has none here, that of the published models of its kind."""
    if source.configs is None:
        return _fetched(source.name, "vae", "config.json")
    own = source.configs / "vae" / "config.json"
    return own if own.is_file() else SINGLE_FILE_DIR / (source.kind or "sd1") / "vae" / "config.json"


def _check_scale(vae: Any, usual: Mapping[str, Any], source: Source) -> None:
    """Refuse a VAE whose latents are not those that the base was trained on."""
    for key, default in (("latent_channels", 4), ("scaling_factor", 0.18215)):
        has, wants = vae.config[key], usual.get(key, default)
        if has != wants:
            raise UsageError(
                f"--vae {source.vae} has {key} {has}, but {source.name} was trained on latents of {key} {wants}: "
                "it is another kind's VAE."
            )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
