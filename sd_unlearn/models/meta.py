"""A base's networks without weights, on torch's meta device: built from its configuration alone, in about a second."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from sd_unlearn.errors import UnlearnError, UsageError, reason
from sd_unlearn.io.reading import read_json
from sd_unlearn.models.source import COMPONENTS, OPTION, SINGLE_FILE_DIR, Source, kind_of, pooled_width_of

# Hub ids whose configuration is bundled, so that a plan for them needs no network.
KNOWN_IDS = {
    "sd1": re.compile(r".*/stable-diffusion-v1-\d"),
    "sd2": re.compile(r".*/stable-diffusion-2(-1)?(-base)?"),
    "sdxl": re.compile(r".*/stable-diffusion-xl-base-.*"),
}


@dataclass(frozen=True)
class MetaBase:
    """The networks of a base on the meta device: shapes and data types, no values and no memory."""

    name: str
    pipeline: Any  # has unet, vae and text_encoder, for SDXL also text_encoder_2

    @property
    def unet(self) -> Any:
        return self.pipeline.unet

    @property
    def vae(self) -> Any:
        return self.pipeline.vae

    @property
    def text_encoders(self) -> list[nn.Module]:
        """Two for SDXL."""
        return [network for name, network in vars(self.pipeline).items() if name.startswith("text_encoder")]

    @property
    def kind(self) -> str:
        """sd1, sd2 or sdxl."""
        return kind_of(self.unet.config)

    @property
    def pooled_width(self) -> int | None:
        """Width of the pooled text embedding that an SDXL UNet takes besides the tokens; None for other kinds."""
        return pooled_width_of(self.unet.config) if self.kind == "sdxl" else None

    @property
    def text_width(self) -> int:
        """Width of the text embeddings that the UNet takes."""
        return int(self.unet.config.cross_attention_dim)

    @property
    def pixels_per_latent(self) -> int:
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def resolution(self) -> int:
        """Side in pixels of the images that the model was trained on."""
        return int(self.unet.config.sample_size * self.pixels_per_latent)

    @property
    def tokens(self) -> int:
        """Length of a caption for the text encoders."""
        return int(getattr(self.text_encoders[0].config, "max_position_embeddings", 77))


@dataclass(frozen=True)
class Configs:
    """The configuration of a base's networks; hashable, so that what is counted of it can be kept."""

    name: str
    components: tuple[tuple[str, str], ...]  # (name, JSON)


def read_configs(source: Source) -> Configs:
    """Read the configuration of a base. No weights are read.

    Raises:
        UsageError: the configuration of a local base is damaged.
        UnlearnError: that of a Hub id is neither bundled nor cached nor on the Hub.
    """
    unet = component_config(source, "unet")
    names = COMPONENTS if kind_of(unet) == "sdxl" else COMPONENTS[:3]
    configs = {"unet": unet} | {name: component_config(source, name) for name in names[1:]}
    return Configs(source.name, tuple((name, json.dumps(config)) for name, config in configs.items()))


def build_meta_base(configs: Configs, dtype: torch.dtype) -> MetaBase:
    """Build the networks of a base, frozen, with weights of a data type. Nothing is loaded.

    Raises:
        UsageError: the configuration does not describe such networks.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    def make(name: str, config: dict[str, Any]) -> Any:
        if name in ("unet", "vae"):
            return {"unet": UNet2DConditionModel, "vae": AutoencoderKL}[name].from_config(config)
        known = {key: value for key, value in config.items() if key not in ("model_type", "dtype", "torch_dtype")}
        return (CLIPTextModel if name == "text_encoder" else CLIPTextModelWithProjection)(CLIPTextConfig(**known))

    networks: dict[str, Any] = {}
    for name, config in configs.components:
        try:
            with torch.device("meta"):
                network = make(name, json.loads(config))
        except (TypeError, ValueError, KeyError) as error:
            where = f"{OPTION} {configs.name}: {name}/config.json"
            raise UsageError(f"{where} does not describe a network of Stable Diffusion ({reason(error)}).") from error
        # Not Diffusers' own `to`, which warns about data types.
        networks[name] = nn.Module.to(network.requires_grad_(False).eval(), dtype)
    return MetaBase(configs.name, SimpleNamespace(**networks))


def component_config(source: Source, component: str) -> dict[str, Any]:
    """The configuration of a component of a base: local, cached, bundled (a published base) or downloaded.

    Raises:
        UnlearnError: the source is of another kind.
    """
    if source.configs:
        config = source.config_of(component) or _bundled(source.kind or "sd1", component)
        if source.is_file and source.known_prediction_type == "epsilon" and not source.single_file_config:
            config = _at_512_pixels(config, source.kind)
        return config
    if cached := _cached(source.name, component):
        return read_json(cached)
    for kind, name in KNOWN_IDS.items():
        if name.fullmatch(source.name):
            config = _bundled(kind, component)
            return _at_512_pixels(config, kind) if source.name.endswith("-base") else config
    return read_json(_download(source.name, component))


def _bundled(kind: str, component: str) -> dict[str, Any]:
    return read_json(SINGLE_FILE_DIR / kind / component / "config.json")


def _at_512_pixels(config: dict[str, Any], kind: str | None) -> dict[str, Any]:
    """SD 2.x that predicts the noise (the -base models) has the configuration of the others, at 512 pixels."""
    return config | {"sample_size": 64} if kind == "sd2" and config.get("sample_size") == 96 else config


def _cached(name: str, component: str) -> Path | None:
    """A component's config.json in the cache of the Hub."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, f"{component}/config.json")
    return Path(found) if isinstance(found, str) else None


def _download(name: str, component: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "config.json", subfolder=component))
    except (OSError, ValueError) as error:
        raise UnlearnError(
            f"{OPTION} {name}: its configuration could not be downloaded ({reason(error)}), and no memory can be "
            "predicted without it. Use a local base, or connect to the Hub."
        ) from error
