"""A base model, loaded and frozen on its device."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sd_unlearn.config.paths import local_path
from sd_unlearn.errors import UnlearnError, UsageError
from sd_unlearn.io.noise import silence_libraries
from sd_unlearn.models.find_base import check_prediction, check_schedule, check_source, check_unet
from sd_unlearn.models.halving import HalvingBatches
from sd_unlearn.models.loading import load_pipeline
from sd_unlearn.models.source import COMPONENTS, DIGITS, OPTION, Source, kind_of, pooled_width_of

# Hashes in the records of runs and rendered folders -> the part of the base. Older records lack some of them.
HASHES = {"sha256": "UNet", "vae_sha256": "VAE", "text_encoder_sha256": "text encoder"}


def _batches(doing: str) -> Any:
    return field(default_factory=lambda: HalvingBatches(doing), repr=False)


@dataclass
class Base:
    """A loaded, frozen Stable Diffusion pipeline and its identity, and what was learnt about memory while using it."""

    name: str
    pipeline: Any  # diffusers.StableDiffusionPipeline or StableDiffusionXLPipeline with a DDIM scheduler
    sha256: str
    device: Any
    source: Source
    vae_sha256: str
    text_encoder_sha256: str  # of both for SDXL
    vae_tile: int | None = None  # side of the VAE's tiles in pixels, if memory was too small for whole images
    generating: HalvingBatches = _batches("generating images")
    decoding: HalvingBatches = _batches("decoding images")
    encoding: HalvingBatches = _batches("encoding images")
    captioning: HalvingBatches = _batches("encoding captions")

    @property
    def kind(self) -> str:
        """sd1, sd2 or sdxl."""
        return kind_of(self.pipeline.unet.config)

    @property
    def resolution(self) -> int:
        """Side in pixels of the images that the model was trained on."""
        return self.pipeline.unet.config.sample_size * self.pipeline.vae_scale_factor

    @property
    def prediction_type(self) -> str:
        return self.pipeline.scheduler.config.prediction_type

    @property
    def pooled_width(self) -> int | None:
        """Width of the pooled text embedding that an SDXL UNet takes besides the tokens; None for other kinds."""
        return pooled_width_of(self.pipeline.unet.config) if self.kind == "sdxl" else None

    @property
    def hashes(self) -> dict[str, str]:
        """The hash of each part, with the keys of HASHES."""
        return {key: getattr(self, key) for key in HASHES}

    def describe(self) -> dict[str, Any]:
        """The base's identity and loading options, as recorded in manifests (see `load_recorded_base`)."""
        source, unet = self.source, self.pipeline.unet.config
        layers = unet.layers_per_block  # an XL LoRA's names in ComfyUI count them
        blocks = {
            "layers_per_block": layers if isinstance(layers, int) else list(layers),
            "up_block_types": list(unet.up_block_types),
        }
        options = {
            "vae": local_path(source.vae),
            "variant": source.variant,
            "single_file_config": local_path(source.single_file_config),
        }
        return {
            "name": self.name,
            "kind": self.kind,
            **self.hashes,
            "prediction_type": self.prediction_type,
            "resolution": self.resolution,
            **({"unet": blocks} if self.kind == "sdxl" else {}),
            **{key: value for key, value in options.items() if value},
            **({"vae_tile": self.vae_tile} if self.vae_tile else {}),
            **({"path": str(source.place.absolute())} if self.name != DIGITS and source.place.exists() else {}),
        }


def check_zero_terminal_snr(source: Source) -> None:
    """Refuse --zero_terminal_snr for an epsilon model before it loads, if its configuration is local.

    Raises:
        UsageError: the model does not predict v.
    """
    if source.known_prediction_type:  # not known for a Hub id
        _refuse_unless_v(source.name, source.known_prediction_type)


def check_text_encoder(kind: str | None, name: str) -> None:
    """Refuse --train_text_encoder for SDXL. kind: None if it is not known yet.

    Raises:
        UsageError
    """
    if kind == "sdxl":
        raise UsageError(
            f"--train_text_encoder: {name} is an SDXL base, whose text encoders cannot be trained. Leave the "
            "option out."
        )


def use_zero_terminal_snr(base: Base) -> None:
    """Rescale the base's schedule to end in pure noise, and sample from there (Lin et al. 2023, sections 3.1 and 3.3).

    Raises:
        UsageError: the base does not predict v. For pure noise, x_t is eps, so an epsilon prediction is trivial.
    """
    from diffusers import DDIMScheduler

    _refuse_unless_v(base.name, base.prediction_type)
    base.pipeline.scheduler = DDIMScheduler.from_config(
        base.pipeline.scheduler.config, rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )


def _refuse_unless_v(name: str, prediction_type: str) -> None:
    if prediction_type != "v_prediction":
        raise UsageError(
            f"--zero_terminal_snr needs a base that predicts v (SD 2.x at 768 pixels); {name} predicts "
            f"{prediction_type}, which carries no information at pure noise. Leave the option out."
        )


def wanted_precision(option: str | None) -> str:
    """--mixed_precision, else accelerate's setting, else no."""
    return option or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def choose_precision(option: str | None) -> str:
    """--mixed_precision, else accelerate's setting, else no. Without CUDA always no, with a message."""
    import torch

    wanted = wanted_precision(option)
    if wanted != "no" and not torch.cuda.is_available():
        print(f"No CUDA device: training in full precision on the CPU instead of {wanted}.", file=sys.stderr)
        return "no"
    return wanted


def default_device() -> str:
    """Where networks run: CUDA if there is a GPU, else the CPU."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def load_base(source: Source | str, precision: str = "no", device: Any = None) -> Base:
    """Load a frozen pipeline with DDIM sampling and no safety checker.

    source: what find_base() returned, or a name. device: CUDA by default if there is a GPU, else the CPU.

    Raises:
        UsageError: the base cannot be trained, or contradicts itself or the options.
        UnlearnError: it cannot be downloaded (no such id, no network, gated), its weights do not fit or are not finite.
    """
    import torch

    silence_libraries()
    from diffusers import DDIMScheduler

    source = Source(source) if isinstance(source, str) else source
    check_source(source)
    device = device or default_device()
    # bf16 is converted only after hashing, so that a base has the same hash in every precision.
    pipeline = load_pipeline(source, torch.float16 if precision == "fp16" else torch.float32)
    check_schedule(source.name, type(pipeline.scheduler).__name__)
    check_prediction(source, pipeline.scheduler.config.prediction_type)
    check_unet(source.name, pipeline.unet.config)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    for component in COMPONENTS:
        if network := getattr(pipeline, component, None):
            network.requires_grad_(False).eval()
    if kind_of(pipeline.unet.config) == "sdxl":
        pipeline.vae.enable_slicing()  # one image at a time: 1024 pixels in full precision take much memory
    _check_finite(source, pipeline)
    encoders = [getattr(pipeline, name, None) for name in ("text_encoder", "text_encoder_2")]
    parts = ([pipeline.unet], [pipeline.vae], [encoder for encoder in encoders if encoder])
    hashes = [network_sha256(*networks) for networks in parts]
    pipeline = pipeline.to(device, torch.bfloat16) if precision == "bf16" else pipeline.to(device)
    unet, vae, text_encoder = hashes
    return Base(source.name, pipeline, unet, torch.device(device), source, vae, text_encoder)


def _check_finite(source: Source, pipeline: Any) -> None:
    """Refuse weights that are not finite: Diffusers would generate black images with them."""
    import torch

    for component in COMPONENTS:
        network = getattr(pipeline, component, None)
        for name, weight in network.state_dict().items() if network else ():
            if not torch.isfinite(weight).all():
                where = f"--vae {source.vae}" if component == "vae" and source.vae else f"{OPTION} {source.name}"
                raise UnlearnError(
                    f'{where} is broken: "{name}" of its {component} is not finite (NaN or infinity). Download it '
                    "again; a model that was converted to fp16 may have overflowed."
                )


def recorded_source(record: Mapping[str, Any], allow_pickle: bool = False) -> Source:
    """The Source of a run's base. record: "base" of its training.json."""
    options = {key: record.get(key) for key in ("vae", "variant", "single_file_config", "prediction_type")}
    name, path = record["name"], record.get("path")  # a relative name is of the folder in which the training ran
    if path and not Path(name).expanduser().exists() and Path(path).exists():
        name = path
    return Source(name, allow_pickle=allow_pickle, **options)


def load_recorded_base(
    record: Mapping[str, Any], precision: str = "no", device: Any = None, allow_pickle: bool = False
) -> Base:
    """Load the base of a run as it was loaded for the training. record: "base" of its training.json.

    Raises:
        UsageError: its weights changed since the training, or they are pickles without allow_pickle.
        UnlearnError: as load_base.
    """
    base = load_base(recorded_source(record, allow_pickle), precision, device)
    check_recorded(base, record)
    return base


def check_recorded(base: Base, record: Mapping[str, Any]) -> None:
    """Refuse a base that is not the one a run was trained on. record: "base" of its training.json.

    Raises:
        UsageError: the weights of a part changed since the training.
    """
    if key := different_hash(base.hashes, record):
        raise UsageError(f"The {HASHES[key]} of {base.name} changed since the training: this is another version.")


def different_hash(a: Mapping[str, Any], b: Mapping[str, Any]) -> str | None:
    """The first key of HASHES that differs between two records. What one of them lacks is not compared."""
    return next((key for key in HASHES if a.get(key) and b.get(key) and a[key] != b[key]), None)


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
