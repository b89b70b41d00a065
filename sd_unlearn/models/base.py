"""A base model, loaded and frozen on its device."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sd_unlearn.config.objective import TimestepSampling
from sd_unlearn.config.paths import local_path
from sd_unlearn.errors import UnlearnError, UsageError
from sd_unlearn.io.noise import silence_libraries
from sd_unlearn.models.device import default_device
from sd_unlearn.models.find_base import check_source
from sd_unlearn.models.halving import HalvingBatches
from sd_unlearn.models.kinds import KINDS, Kind, channels_of, kind_of, network_name
from sd_unlearn.models.loading import load_pipeline
from sd_unlearn.models.source import BUNDLED, FLOW, OPTION, Source
from sd_unlearn.models.supported import check_network, check_prediction, check_schedule

if TYPE_CHECKING:  # imported in functions: torch takes seconds to import
    from sd_unlearn.models.conditioning import TextConditioning
    from sd_unlearn.models.diffusion import Process

# Hashes in the records of runs and rendered folders -> the part of the base. Older records lack some of them.
HASHES = {"sha256": "UNet", "vae_sha256": "VAE", "text_encoder_sha256": "text encoder"}


def _batches(doing: str) -> Any:
    return field(default_factory=lambda: HalvingBatches(doing), repr=False)


@dataclass
class Base:
    """A loaded, frozen pipeline and its identity, and what was learnt about memory while using it."""

    name: str
    pipeline: Any  # of Diffusers, as KINDS names it, with a DDIM or FlowMatchEuler scheduler
    sha256: str
    device: Any
    source: Source
    vae_sha256: str
    text_encoder_sha256: str  # of all text encoders
    own_resolution: int | None = None  # in pixels, found while the VAE is there, which training may drop
    vae_tile: int | None = None  # side of the VAE's tiles in pixels, if memory was too small for whole images
    generating: HalvingBatches = _batches("generating images")
    decoding: HalvingBatches = _batches("decoding images")
    encoding: HalvingBatches = _batches("encoding images")
    captioning: HalvingBatches = _batches("encoding captions")
    attacking: HalvingBatches = _batches("computing the gradients of an attack")

    @property
    def network(self) -> Any:
        """The UNet or transformer."""
        return getattr(self.pipeline, network_name(self.pipeline))

    @network.setter
    def network(self, network: Any) -> None:
        setattr(self.pipeline, network_name(self.pipeline), network)

    @property
    def kind(self) -> str:
        """A key of KINDS."""
        return kind_of(self.network.config)

    @property
    def properties(self) -> Kind:
        """What the base's kind has."""
        return KINDS[self.kind]

    @property
    def resolution(self) -> int:
        """Side in pixels of the images that the model was trained on."""
        if self.own_resolution:
            return self.own_resolution
        return resolution_of(self.network.config, self.pipeline.vae_scale_factor, self.pipeline.vae)

    @property
    def prediction_type(self) -> str:
        """epsilon, v_prediction or flow."""
        return FLOW if self.properties.is_flow else self.pipeline.scheduler.config.prediction_type

    @property
    def conditioning(self) -> TextConditioning:
        """How the network takes captions."""
        from sd_unlearn.models.choose_conditioning import conditioning_of

        return conditioning_of(self.network.config, self.pipeline.vae_scale_factor, self.pipeline)

    @property
    def is_distilled(self) -> bool:
        """Whether the pipeline says that the model was distilled, so that it does not guide (FLUX.2 klein)."""
        return bool(self.pipeline.config.get("is_distilled"))

    def guidance_of(self, scale: float | None) -> float:
        """The s of u + s (f - u) with which images are generated at this --guidance_scale; 1 without guidance."""
        return 1.0 if self.is_distilled else self.properties.guidance_of(scale or 0.0)

    @property
    def longest_tokenizer(self) -> tuple[Any, int]:
        """The tokenizer whose text encoder reads most of a caption, and how many tokens: T5's if it is there."""
        is_longer = self.conditioning.length and not self.source.drop_t5
        name = self.properties.text_encoders[-1 if is_longer else 0].replace("text_encoder", "tokenizer")
        tokenizer = getattr(self.pipeline, name)
        return tokenizer, self.conditioning.length if is_longer else tokenizer.model_max_length

    @property
    def text_encoders(self) -> list[Any]:
        """The pipeline's text encoders that are loaded."""
        found = (getattr(self.pipeline, name, None) for name in self.properties.text_encoders)
        return [encoder for encoder in found if encoder is not None]

    def process(self, resolution: int | None = None, sampling: TimestepSampling | None = None) -> Process:
        """The forward process of its training.

        resolution: of the images, in pixels; None for the base's own. sampling: of timesteps, for a flow-matching base;
        None for its scheduler's.
        """
        from sd_unlearn.models.diffusion import Diffusion
        from sd_unlearn.models.flow import Flow

        config = self.pipeline.scheduler.config
        if not self.properties.is_flow:
            return Diffusion(self.pipeline.scheduler.alphas_cumprod.to(self.device), self.prediction_type)  # type: ignore[arg-type]
        side = (resolution or self.resolution) // (2 * self.pipeline.vae_scale_factor)  # in patches
        shift = self.conditioning.shift_of(config, side * side)
        return Flow(shift, sampling or "shift", config.num_train_timesteps, self.device)

    @property
    def hashes(self) -> dict[str, str]:
        """The hash of each part, with the keys of HASHES."""
        return {key: getattr(self, key) for key in HASHES}

    def part(self, key: str) -> str:
        """What a key of HASHES is the hash of, in words."""
        return self.properties.title if key == "sha256" else HASHES[key]

    def describe(self) -> dict[str, Any]:
        """The base's identity and loading options, as recorded in manifests (see `load_recorded_base`)."""
        source = self.source
        options = {
            "vae": local_path(source.vae),
            "variant": source.variant,
            "single_file_config": local_path(source.single_file_config),
            "drop_t5": source.drop_t5,
        }
        return {
            "name": self.name,
            "kind": self.kind,
            **self.hashes,
            "prediction_type": self.prediction_type,
            "resolution": self.resolution,
            **({"unet": _blocks_of(self.network.config)} if self.kind == "sdxl" else {}),
            **{key: value for key, value in options.items() if value},
            **({"vae_tile": self.vae_tile} if self.vae_tile else {}),
            **({"path": str(source.place.absolute())} if self.name not in BUNDLED and source.place.exists() else {}),
        }


def _blocks_of(unet: Any) -> dict[str, Any]:
    """What the names of an XL LoRA in ComfyUI depend on."""
    layers = unet.layers_per_block
    return {
        "layers_per_block": layers if isinstance(layers, int) else list(layers),
        "up_block_types": list(unet.up_block_types),
    }


def resolution_of(network: Any, pixels_per_latent: int, vae: Any) -> int:
    """Side in pixels of the images that a base was trained on, by the configuration of its networks."""
    side = network.get("sample_size")  # FLUX's transformer takes any size
    return int(side * pixels_per_latent if side else vae.config.get("sample_size", 1024))


def check_text_encoder(kind: str | None, name: str) -> None:
    """Refuse --train_text_encoder for bases with several text encoders or a language model as text encoder.

    kind: None if it is not known yet.

    Raises:
        UsageError
    """
    if kind and (len(KINDS[kind].text_encoders) > 1 or KINDS[kind].reading == "chat"):
        raise UsageError(
            f"--train_text_encoder: {name} is a base of kind {kind}, whose text encoders cannot be trained. Leave the "
            "option out."
        )


def load_base(source: Source | str, precision: str = "no", device: Any = None) -> Base:
    """Load a frozen pipeline with DDIM (or flow-matching Euler) sampling and no safety checker.

    source: what find_base() returned, or a name. device: CUDA by default if there is a GPU, else the CPU.

    Raises:
        UsageError: the base cannot be trained, or contradicts itself or the options.
        UnlearnError: it cannot be downloaded (no such id, no network, gated), its weights do not fit or are not finite.
    """
    import torch

    from sd_unlearn.models.offload import offload_linear_layers

    silence_libraries()
    source = Source(source) if isinstance(source, str) else source
    check_source(source)
    device = device or default_device()
    # bf16 is converted only after hashing, so that a base has the same hash in every precision; weights that are stored
    # in bf16 have it already.
    pipeline = load_pipeline(source, {"fp16": torch.float16, "bf16": None}.get(precision, torch.float32))
    network = getattr(pipeline, network_name(pipeline))
    kind = KINDS[kind_of(network.config)]
    if kind.name == "sd3" and pipeline.text_encoder_3 is None:  # the folder has none
        source = dataclasses.replace(source, drop_t5=True)
    _set_scheduler(source, kind, pipeline)
    check_network(source.name, network.config, channels_of(pipeline.vae.config))
    pipeline.set_progress_bar_config(disable=True)
    for component in kind.components:
        if part := getattr(pipeline, component, None):
            part.requires_grad_(False).eval()
    if kind.is_large:
        pipeline.vae.enable_slicing()  # one image at a time: 1024 pixels in full precision take much memory
    _check_finite(source, kind, pipeline)
    encoders = [getattr(pipeline, name, None) for name in kind.text_encoders]
    parts = ([network], [pipeline.vae], [encoder for encoder in encoders if encoder])
    hashes = [network_sha256(*networks) for networks in parts]
    for part in (network, *filter(None, encoders)) if source.offload else ():
        offload_linear_layers(part)
    pipeline = pipeline.to(device, torch.bfloat16) if precision == "bf16" else pipeline.to(device)
    sha256, vae, text_encoder = hashes
    resolution = resolution_of(network.config, pipeline.vae_scale_factor, pipeline.vae)
    return Base(source.name, pipeline, sha256, torch.device(device), source, vae, text_encoder, resolution)


def _set_scheduler(source: Source, kind: Kind, pipeline: Any) -> None:
    """Let a pipeline sample with the scheduler of its kind and the model's own schedule."""
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    config = pipeline.scheduler.config
    check_schedule(source.name, kind, type(pipeline.scheduler).__name__)
    check_prediction(source, FLOW if kind.is_flow else config.prediction_type)
    if kind.is_flow:
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
        return
    # DDIM's own defaults are for images: it would clip latents to [-1, 1] where another scheduler's file says nothing.
    unstated = config.get("_use_default_values", ())
    latent = {"set_alpha_to_one": False, "steps_offset": 1}
    missing = {key: value for key, value in latent.items() if key not in config or key in unstated}
    pipeline.scheduler = DDIMScheduler.from_config(config, clip_sample=False, **missing)


def _check_finite(source: Source, kind: Kind, pipeline: Any) -> None:
    """Refuse weights that are not finite: Diffusers would generate black images with them."""
    import torch

    for component in kind.components:
        network = getattr(pipeline, component, None)
        for name, weight in network.state_dict().items() if network else ():
            if not torch.isfinite(weight).all():
                where = f"--vae {source.vae}" if component == "vae" and source.vae else f"{OPTION} {source.name}"
                raise UnlearnError(
                    f'{where} is broken: "{name}" of its {component} is not finite (NaN or infinity). Download it '
                    "again; a model that was converted to fp16 may have overflowed."
                )


def network_sha256(*networks: Any) -> str:
    """SHA-256 of the weights of networks in half precision, so that a base and its fp16 copy have the same hash.

    Names and constants that differ between versions of transformers are left out.
    """
    import torch

    digest = hashlib.sha256()
    for network in networks:
        state = {key.removeprefix("text_model."): value for key, value in network.state_dict().items()}
        for key, value in sorted(state.items()):
            if key.endswith("position_ids"):
                continue
            digest.update(key.encode())
            half = value.to("cpu", torch.float16).contiguous().view(-1)  # a dimension of size 1 may have any stride
            digest.update(half.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
