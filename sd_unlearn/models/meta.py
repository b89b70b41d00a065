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
from sd_unlearn.models.base import resolution_of
from sd_unlearn.models.choose_conditioning import conditioning_of
from sd_unlearn.models.conditioning import TextConditioning
from sd_unlearn.models.find_base import check_source
from sd_unlearn.models.kinds import KINDS, NETWORKS, channels_of, kind_of, network_name
from sd_unlearn.models.published import PUBLISHED
from sd_unlearn.models.source import OPTION, SINGLE_FILE_DIR, Source

# Hub ids whose configuration is bundled, so that a plan for them needs no network.
KNOWN_IDS = {
    "sd1": re.compile(r".*/stable-diffusion-v1-\d"),
    "sd2": re.compile(r".*/stable-diffusion-2(-1)?(-base)?"),
    "sdxl": re.compile(r".*/stable-diffusion-xl-base-.*"),
    "sd3-medium": re.compile(r"stabilityai/stable-diffusion-3-medium.*"),
    "sd3.5-medium": re.compile(r"stabilityai/stable-diffusion-3\.5-medium"),
    "sd3.5-large": re.compile(r"stabilityai/stable-diffusion-3\.5-large.*"),
    "flux-schnell": re.compile(r"black-forest-labs/FLUX\.1-schnell"),
    "flux-dev": re.compile(r"black-forest-labs/FLUX\.1-(dev|Krea-dev)"),
    "flux2-dev": re.compile(r"black-forest-labs/FLUX\.2-dev"),
    "flux2-klein-4b": re.compile(r"black-forest-labs/FLUX\.2-klein-(base-)?4B"),
    "flux2-klein-9b": re.compile(r"black-forest-labs/FLUX\.2-klein-(base-)?9B"),
    "qwen-image": re.compile(r"Qwen/Qwen-Image(-2512)?"),
    "z-image": re.compile(r"Tongyi-MAI/Z-Image(-Turbo)?"),
}


class BaseNotFound(UnlearnError):
    """A base that is neither local nor found on the Hub, so that loading it would fail as well."""


@dataclass(frozen=True)
class MetaBase:
    """The networks of a base on the meta device: shapes and data types, no values and no memory."""

    name: str
    pipeline: Any  # has the networks that KINDS names

    @property
    def network(self) -> Any:
        """The UNet or transformer."""
        return getattr(self.pipeline, network_name(self.pipeline))

    @property
    def vae(self) -> Any:
        return self.pipeline.vae

    @property
    def text_encoders(self) -> list[nn.Module]:
        return [network for name, network in vars(self.pipeline).items() if name.startswith("text_encoder")]

    @property
    def kind(self) -> str:
        """A key of KINDS."""
        return kind_of(self.network.config)

    @property
    def conditioning(self) -> TextConditioning:
        return conditioning_of(self.network.config, self.pixels_per_latent)

    @property
    def text_shape(self) -> tuple[int, int]:
        """(rows, width) of an encoded caption, as TextConditioning.encode makes it."""
        has_t5 = any(hasattr(encoder.config, "d_model") for encoder in self.text_encoders)
        return self.conditioning.shape_of(self.network.config, self.tokens, has_t5)

    @property
    def channels(self) -> int:
        """Of a latent."""
        return channels_of(self.vae.config)

    @property
    def pixels_per_latent(self) -> int:
        stages = self.vae.config.get("temperal_downsample") or self.vae.config.block_out_channels[1:]
        return int(2 ** len(stages))

    @property
    def resolution(self) -> int:
        """Side in pixels of the images that the model was trained on."""
        return resolution_of(self.network.config, self.pixels_per_latent, self.vae)

    @property
    def tokens(self) -> int:
        """Length of a caption for CLIP."""
        return int(getattr(self.text_encoders[0].config, "max_position_embeddings", 77))

    def length_for(self, encoder: Any) -> int:
        """Length of a caption for a text encoder: that of T5 or a language model, else CLIP's."""
        is_longer = hasattr(encoder.config, "d_model") or KINDS[self.kind].reading == "chat"
        return self.conditioning.length if is_longer else self.tokens


@dataclass(frozen=True)
class Configs:
    """The configuration of a base's networks; hashable, so that what is counted of it can be kept."""

    name: str
    components: tuple[tuple[str, str], ...]  # (name, JSON)
    offload: bool = False  # whether large layers stay in the computer's memory

    @property
    def kind(self) -> str:
        """A key of KINDS."""
        return kind_of(json.loads(self.components[0][1]))


def read_configs(source: Source) -> Configs:
    """Read the configuration of a base. No weights are read. T5 is left out where loading leaves it out.

    Raises:
        UsageError: as check_source, or the configuration of a base is damaged.
        BaseNotFound: a Hub id whose configuration is neither bundled nor cached, and the Hub does not know it or cannot
            be reached.
        UnlearnError: the Hub has the id, but not the configuration.
    """
    check_source(source)
    network = _network_of(source)
    config = component_config(source, network)
    first, *others = KINDS[kind_of(config)].components
    if source.drop_t5 or _lacks_t5(source):
        others = [name for name in others if name != "text_encoder_3"]
    configs = {first: config} | {name: component_config(source, name) for name in others}
    components = tuple((name, json.dumps(config)) for name, config in configs.items())
    return Configs(source.name, components, source.offload)


def _network_of(source: Source) -> str:
    """The name of the component that is trained: unet or transformer."""
    if source.configs:
        return next((name for name in NETWORKS if source.config_of(name)), "unet")
    if cached := next((name for name in NETWORKS if _cached(source.name, name)), None):
        return cached
    if known := known_id(source.name):
        return KINDS[kind_of(_bundled(known, "unet") or _bundled(known, "transformer"))].network
    try:
        _download(source.name, "unet")
    except BaseNotFound:
        raise
    except UnlearnError:
        _download(source.name, "transformer")
        return "transformer"
    return "unet"


def known_id(name: str) -> str | None:
    """The key of KNOWN_IDS that a Hub id has: a folder of SINGLE_FILE_DIR, or a key of PUBLISHED."""
    return next((known for known, pattern in KNOWN_IDS.items() if pattern.fullmatch(name)), None)


def build_meta_base(configs: Configs, dtype: torch.dtype) -> MetaBase:
    """Build the networks of a base, frozen, with weights of a data type. Nothing is loaded.

    Raises:
        UsageError: the configuration does not describe such networks.
    """
    networks: dict[str, Any] = {}
    for name, config in configs.components:
        try:
            with torch.device("meta"):
                network = _make(configs.kind, name, json.loads(config))
        except (TypeError, ValueError, KeyError) as error:
            where = f"{OPTION} {configs.name}: {name}/config.json"
            raise UsageError(f"{where} does not describe a network of Stable Diffusion ({reason(error)}).") from error
        # Not Diffusers' own `to`, which warns about data types.
        networks[name] = nn.Module.to(network.requires_grad_(False).eval(), dtype)
    return MetaBase(configs.name, SimpleNamespace(**networks))


def _make(kind: str, name: str, config: dict[str, Any]) -> Any:
    """A network from its configuration."""
    import diffusers
    import transformers

    own = KINDS[kind]
    if name in (own.network, "vae"):
        return getattr(diffusers, own.vae_class if name == "vae" else own.network_class).from_config(config)
    known = {key: value for key, value in config.items() if key not in ("model_type", "dtype", "torch_dtype")}
    if own.reading == "chat":
        network = getattr(transformers, own.chat_class)
        return network(network.config_class(**known))
    if "d_model" in config:
        return transformers.T5EncoderModel(transformers.T5Config(**known))
    pools = name != "text_encoder" or kind == "sd3"  # SD 3 takes the pooled embedding of both CLIPs
    network = transformers.CLIPTextModelWithProjection if pools else transformers.CLIPTextModel
    return network(transformers.CLIPTextConfig(**known))


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
    if known := known_id(source.name):
        config = _bundled(known, component)
        return _at_512_pixels(config, known) if source.name.endswith("-base") else config
    return read_json(_download(source.name, component))


def _bundled(known: str, component: str) -> dict[str, Any]:
    """A component's bundled configuration; empty if the model has no such component."""
    if known in PUBLISHED:
        return PUBLISHED[known].get(component, {})
    path = SINGLE_FILE_DIR / known / component / "config.json"
    return read_json(path) if path.is_file() else {}


def _at_512_pixels(config: dict[str, Any], kind: str | None) -> dict[str, Any]:
    """SD 2.x that predicts the noise (the -base models) has the configuration of the others, at 512 pixels."""
    return config | {"sample_size": 64} if kind == "sd2" and config.get("sample_size") == 96 else config


def _lacks_t5(source: Source) -> bool:
    """Whether a base of SD 3 has no third text encoder: its folder, or its index in the cache of the Hub."""
    if source.configs:
        return not source.config_of("text_encoder_3")
    index = _cached(source.name, "", "model_index.json")
    return index is not None and (read_json(index).get("text_encoder_3") or [None])[0] is None


def _cached(name: str, component: str, file: str = "config.json") -> Path | None:
    """A component's configuration in the cache of the Hub."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, f"{component}/{file}" if component else file)
    return Path(found) if isinstance(found, str) else None


def _download(name: str, component: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    try:
        return Path(hf_hub_download(name, "config.json", subfolder=component))
    except RemoteEntryNotFoundError as error:
        raise UnlearnError(f"{OPTION} {name} has no {component}/config.json on the Hub.") from error
    except (OSError, ValueError) as error:
        raise BaseNotFound(
            f"{OPTION} {name}: there is no such local folder or file, and it was not found on the Hub "
            f"({reason(error)}). Check the name; without a network, use a local base or the bundled base digits."
        ) from error
