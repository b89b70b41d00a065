"""A base model: found by name before anything heavy loads, then loaded frozen on the device it will run on."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd_unlearn.config import DEFAULT_BASE
from sd_unlearn.errors import UnlearnError, UsageError

DIGITS = "digits"
DIGITS_DIR = Path(__file__).parent / "assets" / DIGITS


@dataclass(frozen=True)
class Sampling:
    """How a base is asked for images unless the command says otherwise."""

    steps: int
    guidance_scale: float
    batch_size: int


SAMPLING = {DIGITS: Sampling(25, 3.0, 100)}
DEFAULT_SAMPLING = Sampling(50, 7.5, 4)


@dataclass
class Base:
    """A loaded Stable Diffusion pipeline, frozen, and what identifies it."""

    name: str
    pipeline: Any  # diffusers.StableDiffusionPipeline with a DDIM scheduler
    sha256: str
    device: Any

    @property
    def resolution(self) -> int:
        """The side in pixels the model was trained for."""
        return self.pipeline.unet.config.sample_size * self.pipeline.vae_scale_factor

    @property
    def prediction_type(self) -> str:
        return self.pipeline.scheduler.config.prediction_type

    def describe(self) -> dict[str, Any]:
        """The base's identity as written in manifests."""
        return {
            "name": self.name, "kind": "sd2" if self.pipeline.unet.config.cross_attention_dim == 1024 else "sd1",
            "sha256": self.sha256, "prediction_type": self.prediction_type, "resolution": self.resolution,
        }  # fmt: skip


def resolve_name(asked: str | None, from_concept: str | None) -> str:
    """The base to use: the option, else the concept file's, else SD 1.4; checked to exist as far as that is cheap.

    Raises:
        UsageError: a local path that holds no diffusers pipeline.
    """
    name = asked or from_concept or DEFAULT_BASE
    if name == DIGITS:
        return name
    path = Path(name)
    if path.is_dir():
        index = path / "model_index.json"
        if not index.is_file():
            raise UsageError(
                f"--pretrained_model_name_or_path {name} holds no model_index.json; name a diffusers folder."
            )
        try:
            kind = dict(json.loads(index.read_text(encoding="utf-8"))).get("_class_name")
        except (ValueError, TypeError):
            raise UsageError(
                f"--pretrained_model_name_or_path {name}: {index.name} is damaged; restore it or name another model."
            ) from None
        if kind != "StableDiffusionPipeline":
            raise UsageError(
                f"--pretrained_model_name_or_path {name} is a {kind}; StableDiffusionPipeline (SD 1.x, 2.x) is needed."
            )
    elif path.exists():
        raise UsageError(
            f"--pretrained_model_name_or_path {name} is a file; name a hub id, a diffusers folder or digits."
        )
    elif name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UsageError(
            f"--pretrained_model_name_or_path {name} is no folder here and no hub id (owner/name). "
            "For the bundled base: digits."
        )
    return name


def check_zero_terminal_snr(name: str) -> None:
    """Refuse --zero_terminal_snr for an epsilon model before it loads, where its configuration lies in a folder here.

    Raises:
        UsageError: the model does not predict v.
    """
    path = (DIGITS_DIR if name == DIGITS else Path(name)) / "scheduler" / "scheduler_config.json"
    try:
        prediction_type = json.loads(path.read_text(encoding="utf-8")).get("prediction_type", "epsilon")
    except (OSError, ValueError, AttributeError):
        return  # a hub id, or something that loading tells more about
    _refuse_unless_v(name, prediction_type)


def use_zero_terminal_snr(base: Base) -> None:
    """Rescale the base's schedule to end in pure noise and draw from there (Lin et al. 2023, sections 3.1 and 3.3).

    Raises:
        UsageError: the base does not predict v. An epsilon model has nothing to say about pure noise: x_t is eps.
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
            f"{prediction_type}, and at pure noise that says nothing about the picture. Leave the option out."
        )


def sampling_of(name: str) -> Sampling:
    """The sampler settings a base is used with by default."""
    return SAMPLING.get(name, DEFAULT_SAMPLING)


def choose_precision(asked: str | None) -> str:
    """The arithmetic to use: the option, else accelerate's setting, else full. Without CUDA it is full, and says so."""
    import torch

    wanted = asked or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if wanted != "no" and not torch.cuda.is_available():
        print(f"No CUDA device: training in full precision on the CPU instead of {wanted}.", file=sys.stderr)
        return "no"
    return wanted


def load_base(name: str, precision: str = "no", device: Any = None) -> Base:
    """Load a pipeline frozen, with DDIM sampling and no safety checker, on `device` (default: the best there is).

    Raises:
        UnlearnError: the model cannot be had (no such id, no network, gated) or has an unsupported prediction type.
    """
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from diffusers.utils import logging
    from transformers.utils import logging as transformers_logging

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)
    source = str(DIGITS_DIR) if name == DIGITS else name
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        pipeline = StableDiffusionPipeline.from_pretrained(
            source, dtype=dtype, safety_checker=None, requires_safety_checker=False
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise UnlearnError(
            f"--pretrained_model_name_or_path {name} could not be loaded: {reason} "
            "Without a network, name a local diffusers folder, or the bundled base: digits."
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    if pipeline.scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
        raise UnlearnError(
            f"{name} predicts {pipeline.scheduler.config.prediction_type}; epsilon and v_prediction are supported."
        )
    for network in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        network.requires_grad_(False).eval()
    sha256 = network_sha256(pipeline.unet)
    return Base(name, pipeline.to(device), sha256, torch.device(device))


def network_sha256(network: Any) -> str:
    """SHA-256 of a network's weights in half precision, so that a base and its fp16 copy are the same base."""
    import torch

    digest = hashlib.sha256()
    for key, value in sorted(network.state_dict().items()):
        digest.update(key.encode())
        half = value.to("cpu", torch.float16).contiguous().view(-1)  # flat: a side of 1 may have any stride
        digest.update(half.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
