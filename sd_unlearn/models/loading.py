"""Load a diffusers pipeline from a Hub id, a folder or a single file, optionally with another VAE."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sd_unlearn.errors import UnlearnError, UsageError, reason
from sd_unlearn.launch import process_rank
from sd_unlearn.models.kinds import COMPONENTS, KINDS, NETWORKS
from sd_unlearn.models.source import OPTION, SINGLE_FILE_DIR, Source, variant_of
from sd_unlearn.models.supported import check_class, check_drop_t5


def load_pipeline(source: Source, dtype: Any) -> Any:
    """Load the pipeline of a base, of a class that KINDS names, on the CPU, without a safety checker.

    dtype: of the weights; None: bfloat16 for networks that are stored in it, else float32.

    Raises:
        UsageError: the base is another pipeline, or the VAE is of another kind.
        UnlearnError: the weights cannot be loaded, or do not fit the configuration.
    """
    import torch

    try:
        vae = _load_vae(source, dtype or torch.float32) if source.vae else None
    except (OSError, ValueError, RuntimeError) as error:
        raise UnlearnError(f"--vae {source.vae} could not be loaded: {reason(error)}.") from error
    try:
        return _load_file_or_folder(source, dtype, vae)
    except (OSError, ValueError, RuntimeError) as error:
        hint = "Without a network, use a local diffusers folder or file, or the bundled base digits."
        if source.is_file:
            hint = "If it differs from the published models, add --single_file_config with its own configuration."
        elif "safetensors" in str(error) and not source.allow_pickle:
            hint = "If it only has pickled weights (.bin), add --allow_pickle."
        raise UnlearnError(f"{OPTION} {source.name} could not be loaded: {reason(error)}. {hint}") from error


def _load_file_or_folder(source: Source, dtype: Any, vae: Any) -> Any:
    import diffusers
    import torch

    if source.is_file:
        from sd_unlearn.models.single_file import load_single_file

        if vae is not None:
            _check_vae_config(vae, _config(source, "vae", "config.json"), source)
        if dtype is None and KINDS[str(source.kind)].is_flow:
            assert source.configs is not None
            dtype = _stored_dtypes(source.configs)
        return load_single_file(source, dtype or torch.float32, vae)
    place = str(source.place) if source.place.is_dir() else source.name
    index = _config(source, None, "model_index.json")  # before the weights, which may be many gigabytes
    check_class(source.name, index.get("_class_name"))
    check_drop_t5(source, next(kind.name for kind in KINDS.values() if kind.pipeline == index["_class_name"]))
    given = _left_out(source, index)
    if vae is not None:
        _check_vae_config(vae, _config(source, "vae", "config.json"), source)
        given["vae"] = vae
    if not source.allow_pickle:
        given["use_safetensors"] = True
    pipeline = getattr(diffusers, index["_class_name"])
    load, variant = pipeline.from_pretrained, variant_of(source)
    if not source.place.is_dir():
        _announce_download(source.name)
    try:
        if dtype is None:
            folder = source.place if source.place.is_dir() else pipeline.download(place, variant=variant, **given)
            dtype = _stored_dtypes(Path(folder))
        return load(place, dtype=dtype, variant=variant, **given)
    except (OSError, ValueError) as error:
        if variant or source.place.is_dir():
            raise
        with contextlib.suppress(OSError, ValueError):
            return load(
                place, dtype=dtype or torch.float32, variant="fp16", **given
            )  # a repository may only have half precision
        raise error


def _stored_dtypes(folder: Path) -> dict[str, Any]:
    """bfloat16 for the components whose weights are stored in it, float32 for the others, as from_pretrained takes it.

    A model of 12 billion weights takes 24 GB in bfloat16 and 48 GB in float32.
    """
    import torch
    from safetensors import safe_open

    dtypes = {"default": torch.float32}
    for component in COMPONENTS:
        if file := next(iter(sorted((folder / component).glob("*.safetensors"))), None):
            with safe_open(file, framework="pt") as weights:
                stored = {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
            if stored == {"BF16"}:
                dtypes[component] = torch.bfloat16
    return dtypes


def _left_out(source: Source, index: Mapping[str, Any]) -> dict[str, Any]:
    """The pipeline's arguments that leave out what is not used. index: its model_index.json.

    SD 3 is loaded without T5 if its folder has none, or with --drop_t5.
    """
    if index["_class_name"] == KINDS["sdxl"].pipeline:
        return {"add_watermarker": False}
    if index["_class_name"] == KINDS["sd3"].pipeline:
        has_t5 = (index.get("text_encoder_3") or [None])[0] is not None
        return {} if has_t5 and not source.drop_t5 else {"text_encoder_3": None, "tokenizer_3": None}
    if index["_class_name"] == KINDS["sd1"].pipeline:
        return {"safety_checker": None, "requires_safety_checker": False}
    return {}


def _announce_download(name: str) -> None:
    """Unless the weights of a Hub id are in the cache: say that they are downloaded, on a terminal with a bar."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.utils import enable_progress_bars

    endings = (".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin", ".safetensors.index.json")
    files = (f"{network}/diffusion_pytorch_model{ending}" for network in NETWORKS for ending in endings)
    if process_rank() > 0 or any(isinstance(try_to_load_from_cache(name, file), str) for file in files):
        return
    print(f"Downloading {name} from the Hugging Face Hub: several gigabytes, only once.", file=sys.stderr)
    if sys.stderr is not None and sys.stderr.isatty():
        enable_progress_bars()


def _config(source: Source, component: str | None, file: str) -> dict[str, Any]:
    """A configuration of the base, local or downloaded."""
    if source.configs:
        return source.config_of(component or "", file)
    return dict(json.loads(_download(source.name, component, file).read_text(encoding="utf-8")))


def _download(name: str, component: str | None, file: str) -> Path:
    """Download a file of a Hub id and return its path."""
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(name, file, subfolder=component))


def _load_vae(source: Source, dtype: Any) -> Any:
    import diffusers

    name, vae = str(source.vae), _vae_class(source)
    if Path(name).is_file():
        if vae != "AutoencoderKL":
            raise UsageError(f"--vae {name} is a file; for {source.name}, which has a {vae}, use a folder or a Hub id.")
        from sd_unlearn.models.single_file import load_vae_file

        return load_vae_file(Path(name), _vae_config(source), dtype)
    inside = "vae" if (Path(name) / "vae" / "config.json").is_file() else None
    safe = {} if source.allow_pickle else {"use_safetensors": True}
    return getattr(diffusers, vae).from_pretrained(name, subfolder=inside, dtype=dtype, **safe)


def _vae_class(source: Source) -> str:
    """The class in Diffusers of the base's own VAE."""
    own = source.config_of("vae") if source.configs else _config(source, "vae", "config.json")
    return str(own.get("_class_name", "AutoencoderKL"))


def _vae_config(source: Source) -> Path:
    """config.json of the base's own VAE, or of the published models of its kind if the base has none."""
    if source.configs is None:
        return _download(source.name, "vae", "config.json")
    own = source.configs / "vae" / "config.json"
    return own if own.is_file() else SINGLE_FILE_DIR / (source.kind or "sd1") / "vae" / "config.json"


def _check_vae_config(vae: Any, own: Mapping[str, Any], source: Source) -> None:
    """Refuse a VAE whose latents differ in channels or scale from those that the base was trained on."""
    for key, default in (("latent_channels", 4), ("scaling_factor", 0.18215), ("z_dim", None)):
        actual, expected = vae.config.get(key, default), own.get(key, default)
        if actual != expected:
            raise UsageError(
                f"--vae {source.vae} has {key} {actual}, but {source.name} was trained with {key} {expected}. "
                "It is another kind's VAE."
            )
