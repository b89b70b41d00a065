"""What a base's name stands for - a hub id, a diffusers folder, one file - and what can be refused before it loads."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sd_unlearn.config.base import DEFAULT_BASE, BaseOptions
from sd_unlearn.errors import UsageError
from sd_unlearn.models.checkpoint_header import (
    SUPPORTED,
    Layout,
    check_suffix,
    check_vae_file,
    kind_of_file,
    prediction_of_file,
    read_layout,
    says_prediction,
)

OPTION = "--pretrained_model_name_or_path"
ASSETS = Path(__file__).parent.parent / "assets"
DIGITS = "digits"
DIGITS_DIR = ASSETS / DIGITS
SINGLE_FILE_DIR = ASSETS / "single_file"  # a folder of configurations a kind
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2")
# Hub ids that need no look at the hub to be refused.
UNSUPPORTED_IDS = {
    "FLUX": re.compile(r"black-forest-labs/"),
    "Stable Diffusion 3": re.compile(r"stabilityai/stable-diffusion-3"),
}
WEIGHTS = re.compile(r"(?:diffusion_pytorch_model|model|pytorch_model)(?:\.(\w+))?(?:-\d+-of-\d+)?\.(safetensors|bin)")
PREDICTIONS = ("epsilon", "v_prediction")


@dataclass(frozen=True)
class Source:
    """A base by the name it was asked for, and how it is to be loaded."""

    name: str
    vae: str | None = None
    prediction_type: str | None = None
    variant: str | None = None
    allow_pickle: bool = False
    single_file_config: str | None = None

    @property
    def place(self) -> Path:
        """Where the base lies, if it lies here."""
        return DIGITS_DIR if self.name == DIGITS else Path(self.name)

    @property
    def is_file(self) -> bool:
        return self.place.is_file()

    @cached_property
    def layout(self) -> Layout:
        """Of a single file."""
        return read_layout(self.place, OPTION, self.allow_pickle)

    @property
    def configs(self) -> Path | None:
        """The folder whose configurations describe the base; None for a hub id."""
        if self.is_file:
            return Path(self.single_file_config or SINGLE_FILE_DIR / kind_of_file(self.layout))
        return self.place if self.place.is_dir() else None

    def config_of(self, component: str, file: str = "config.json") -> dict[str, Any]:
        """A component's configuration as it lies here; empty if there is none."""
        try:
            return dict(json.loads((self.configs / component / file).read_text(encoding="utf-8")))  # type: ignore[operator]
        except (TypeError, OSError):
            return {}
        except ValueError:
            raise UsageError(
                f"{OPTION} {self.name}: {component}/{file} is damaged; restore it or name another model."
            ) from None

    @property
    def kind(self) -> str | None:
        """sd1, sd2 or sdxl; None where only the hub could tell."""
        unet = self.config_of("unet")
        return kind_of(unet) if unet else None

    @property
    def predicts(self) -> str | None:
        """The prediction type; None where only the hub could tell."""
        if self.is_file and not self.single_file_config:
            return self.prediction_type or prediction_of_file(self.layout, kind_of_file(self.layout))
        schedule = self.config_of("scheduler", "scheduler_config.json")
        return schedule.get("prediction_type", "epsilon") if schedule else None


def find_base(options: BaseOptions, from_concept: str | None = None) -> Source:
    """The base to use - the option, else the concept file's, else SD 1.4 - checked as far as that is cheap.

    Raises:
        UsageError: no such folder or file, pickled weights, a model that cannot be trained or contradicts itself or
            the options. Nothing was loaded.
    """
    name = options.pretrained_model_name_or_path or from_concept or DEFAULT_BASE
    source = Source(
        name, options.vae, options.prediction_type, options.variant, options.allow_pickle, options.single_file_config
    )
    check_source(source)
    return source


def check_source(source: Source) -> None:
    """As find_base."""
    if source.single_file_config and not source.is_file:
        raise UsageError(f"--single_file_config describes a single file; {OPTION} {source.name} is none.")
    if source.is_file:
        _check_file(source)
    elif source.place.is_dir():
        _check_folder(source)
    else:
        _check_id(OPTION, source.name)
    if source.kind:
        check_unet(source.name, source.config_of("unet"))
    check_prediction(source, source.predicts)
    if source.vae:
        _check_vae(source, source.vae)


def kind_of(unet: Mapping[str, Any]) -> str:
    """sd1, sd2 or sdxl by a UNet's configuration: XL alone embeds sizes and a pooled caption, and SD 1.x alone enters
    its transformers by convolutions. Widths are not asked, so that a small relative is of its kind, too."""
    if unet.get("addition_embed_type") == "text_time":
        return "sdxl"
    return "sd2" if unet.get("use_linear_projection") else "sd1"


def check_class(name: str, pipeline: object) -> None:
    """Refuse a pipeline class, model_index.json's, that cannot be trained.

    Raises:
        UsageError
    """
    if pipeline not in PIPELINES:
        raise UsageError(f"{OPTION} {name} is a {pipeline}. {SUPPORTED} ({' or '.join(PIPELINES)}).")


def check_unet(name: str, unet: Mapping[str, Any]) -> None:
    """Refuse relatives of Stable Diffusion whose UNet is fed with more than latents, a timestep and a caption.

    Raises:
        UsageError
    """
    channels = unet.get("in_channels", 4)
    if channels != 4:
        what = {9: ", an inpainting model", 8: ", an InstructPix2Pix model"}.get(channels, "")
        raise UsageError(f"{OPTION} {name} sees {channels} channels instead of a latent's 4{what}. {SUPPORTED}.")
    if unet.get("time_cond_proj_dim"):
        raise UsageError(f"{OPTION} {name} is a distilled (LCM) model. {SUPPORTED}; name the model it is made of.")


def check_schedule(name: str, scheduler: str) -> None:
    """Refuse a scheduler class whose noise is not that of DDPM.

    Raises:
        UsageError
    """
    if scheduler.startswith(("EDM", "FlowMatch")):
        raise UsageError(f"{OPTION} {name} has the noise schedule of {scheduler}, not that of DDPM. {SUPPORTED}.")


def check_prediction(source: Source, predicts: str | None) -> None:
    """Refuse a prediction type that is not supported or contradicts --prediction_type. None: not known yet.

    Raises:
        UsageError
    """
    if predicts is None:
        return
    if predicts not in PREDICTIONS:
        raise UsageError(f"{OPTION} {source.name} predicts {predicts}; {' and '.join(PREDICTIONS)} are supported.")
    if source.prediction_type not in (None, predicts):
        raise UsageError(
            f"--prediction_type {source.prediction_type}: by its configuration {source.name} predicts {predicts}. "
            "Leave the option out."
        )


def weights_in(folder: Path) -> set[tuple[str | None, str]]:
    """(variant or None, safetensors or bin) of the weights in a component's folder."""
    found = (WEIGHTS.fullmatch(path.name) for path in folder.glob("*"))
    return {(match[1], match[2]) for match in found if match}


def _check_file(source: Source) -> None:
    kind = kind_of_file(source.layout)
    config = source.configs
    assert config is not None
    unet = source.config_of("unet")
    if not unet:
        raise UsageError(f"--single_file_config {config} holds no unet/config.json; name a diffusers folder.")
    width, has = unet.get("cross_attention_dim"), source.layout.text_width
    if source.single_file_config and (kind_of(unet), width) != (kind, has):
        raise UsageError(
            f"{OPTION} {source.name} is of kind {kind} with text {has} wide, but --single_file_config {config} "
            f"describes kind {kind_of(unet)} with text {width} wide."
        )
    if width != has:
        raise UsageError(
            f"{OPTION} {source.name} is of kind {kind} with text {has} wide, where the published models have {width}. "
            "Name a diffusers folder with its configuration by --single_file_config."
        )
    if not source.layout.has_vae and not source.vae:
        raise UsageError(f"{OPTION} {source.name} holds no VAE; name one with --vae.")
    if source.predicts is None:
        raise UsageError(
            f"{OPTION} {source.name} is a Stable Diffusion 2.x checkpoint that does not say what it predicts. Add "
            "--prediction_type v_prediction (768 pixels: SD 2.0 and 2.1) or epsilon (512 pixels: the -base models)."
        )
    said = prediction_of_file(source.layout, kind)
    if says_prediction(source.layout) and source.predicts != said:
        by = "--prediction_type" if source.prediction_type else "--single_file_config"
        raise UsageError(f"{by} says {source.predicts}, but {source.name} says of itself that it predicts {said}.")


def _check_folder(source: Source) -> None:
    folder = source.place
    if not (folder / "model_index.json").is_file():
        raise UsageError(f"{OPTION} {source.name} holds no model_index.json; name a diffusers folder.")
    index = source.config_of("", "model_index.json")
    check_class(source.name, index.get("_class_name"))
    check_schedule(source.name, str(index.get("scheduler", ["", ""])[1]))
    components = [name for name in COMPONENTS if index.get(name, [None])[0]]
    for component in components:
        found = weights_in(folder / component)
        if found and not source.allow_pickle and not any(form == "safetensors" for _, form in found):
            check_suffix(folder / component / "pytorch_model.bin", OPTION, allow_pickle=False)
    known = sorted({variant for c in components for variant, _ in weights_in(folder / c) if variant})
    if source.variant and source.variant not in known:
        has = f"variants here: {', '.join(known)}" if known else "it has none"
        raise UsageError(f"--variant {source.variant}: {source.name} has no such weights; {has}.")
    is_xl = index["_class_name"] == PIPELINES[1]
    if source.kind and (source.kind == "sdxl") != is_xl:
        raise UsageError(f"{OPTION} {source.name} is a {index['_class_name']} with a UNet of kind {source.kind}.")
    given = sum(source.config_of(name).get("hidden_size", 0) for name in components if name.startswith("text_encoder"))
    takes = source.config_of("unet").get("cross_attention_dim", given)
    if given != takes:
        raise UsageError(f"{OPTION} {source.name}: its UNet takes text {takes} wide, its text encoders give {given}.")


def variant_of(source: Source) -> str | None:
    """Which weights of a folder are taken: those asked for, else the usual ones, else, where they lack, fp16's."""
    if source.variant or not source.place.is_dir():
        return source.variant
    for component in COMPONENTS:
        variants = {variant for variant, _ in weights_in(source.place / component)}
        if variants and None not in variants:
            return "fp16" if "fp16" in variants else sorted(filter(None, variants))[0]
    return None


def _check_id(option: str, name: str) -> None:
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith((".safetensors", ".ckpt")):
        raise UsageError(
            f"{option} {name} is no folder and no file here, and no hub id (owner/name)."
            + (" For the bundled base: digits." if option == OPTION else "")
        )
    for what, pattern in UNSUPPORTED_IDS.items():
        if pattern.match(name):
            raise UsageError(f"{option} {name} is a {what} model. {SUPPORTED}.")


def _check_vae(source: Source, name: str) -> None:
    place = Path(name)
    if place.is_file():
        check_vae_file(read_layout(place, "--vae", source.allow_pickle))
    elif not place.is_dir():
        _check_id("--vae", name)
    elif not any((place / sub / "config.json").is_file() for sub in ("", "vae")):
        raise UsageError(f"--vae {name} holds neither config.json nor vae/config.json; name a VAE's folder or file.")
