"""Find a base by its name, and refuse what cannot be trained before anything is loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd_unlearn.config.base import DEFAULT_BASE, BaseOptions
from sd_unlearn.errors import UsageError
from sd_unlearn.io.schema import OPEN, validate
from sd_unlearn.models.checkpoint_header import (
    FILE_TEXT_ENCODERS,
    check_suffix,
    check_vae_file,
    kind_of_file,
    prediction_of_file,
    read_checkpoint_header,
    states_prediction,
)
from sd_unlearn.models.kinds import (
    COMPONENTS,
    KINDS,
    NETWORKS,
    SUPPORTED,
    Kind,
    channels_of,
    kind_of,
    text_width_of,
)
from sd_unlearn.models.source import BUNDLED, EMOJI, OPTION, WEIGHTS, Source, weights_in
from sd_unlearn.models.supported import check_class, check_drop_t5, check_network, check_prediction, check_schedule

# Hub ids of models that are not supported: others are recognized by their model_index.json.
UNSUPPORTED_IDS = {"FLUX.1 Kontext": re.compile(r"black-forest-labs/FLUX\.1-Kontext-.*")}


@dataclass(frozen=True)
class _NetworkConfig:
    """What is read here of the config.json of a UNet or transformer."""

    __pydantic_config__ = OPEN

    in_channels: int = 4
    cross_attention_dim: int | list[int] | None = None
    time_cond_proj_dim: int | None = None
    addition_embed_type: str | None = None
    use_linear_projection: bool | None = None
    joint_attention_dim: int | None = None
    cap_feat_dim: int | None = None
    pooled_projection_dim: int | None = None
    guidance_embeds: bool | None = None
    sample_size: int | None = None


@dataclass(frozen=True)
class _TextEncoderConfig:
    """What is read here of a text encoder's config.json."""

    __pydantic_config__ = OPEN

    hidden_size: int = 0
    d_model: int = 0  # T5


def find_base(options: BaseOptions, concept_base: str | None = None) -> Source:
    """The base of a command: --pretrained_model_name_or_path, else the concept file's `base`, else SD 1.4.

    Raises:
        UsageError: there is no such folder or file, its weights are pickles, it cannot be trained, or it contradicts
            the options. Nothing is loaded; of a Hub id only the name is checked.
    """
    name = options.pretrained_model_name_or_path or concept_base or DEFAULT_BASE
    source = Source(
        name,
        options.vae,
        options.prediction_type,
        options.variant,
        options.allow_pickle,
        options.single_file_config,
        options.drop_t5,
        options.offload,
    )
    check_source(source)
    return source


def check_source(source: Source) -> None:
    """The checks of find_base, for any Source."""
    for component in COMPONENTS:
        if kind := {**dict.fromkeys(NETWORKS, _NetworkConfig), "vae": None}.get(component, _TextEncoderConfig):
            validate(kind, source.config_of(component), f"{OPTION} {source.name}: {component}/config.json")
    if source.single_file_config and not source.is_file:
        raise UsageError(f"--single_file_config is for a single file; {OPTION} {source.name} is not a file.")
    if source.variant and source.is_file:
        raise UsageError(f"--variant is for a folder or Hub id; {OPTION} {source.name} is a file. Leave it out.")
    if source.is_file:
        _check_file(source)
    elif source.name in BUNDLED and not (source.place / "model_index.json").is_file():
        raise UsageError(
            f"{OPTION} {source.name} is not in this installation. Build it in a clone of the repository: python "
            f"scripts/{'build_emoji.py' if source.name == EMOJI else 'build_digits.py --kind sd3'}."
        )
    elif source.place.is_dir():
        _check_folder(source)
    else:
        _check_id(OPTION, source.name)
    if source.kind:
        check_network(source.name, source.network_config, channels_of(source.config_of("vae")))
        check_drop_t5(source, source.kind)
    check_prediction(source, source.known_prediction_type)
    if source.vae:
        _check_vae(source, source.vae)


def _check_file(source: Source) -> None:
    kind = kind_of_file(source.header)
    if KINDS[kind].is_flow:
        _check_transformer_file(source, KINDS[kind])
        return
    config = source.configs
    assert config is not None
    unet = source.config_of("unet")
    if not unet:
        raise UsageError(f"--single_file_config {config} holds no unet/config.json. Use a diffusers folder.")
    width, has = unet.get("cross_attention_dim"), source.header.text_width
    if source.single_file_config and (kind_of(unet), width) != (kind, has):
        raise UsageError(
            f"{OPTION} {source.name} is of kind {kind} with text {has} wide, but --single_file_config {config} "
            f"describes kind {kind_of(unet)} with text {width} wide."
        )
    if width != has:
        raise UsageError(
            f"{OPTION} {source.name} is of kind {kind} with text {has} wide, where the published models have {width}. "
            "Add --single_file_config with a diffusers folder that holds its configuration."
        )
    if not source.header.has_vae and not source.vae:
        raise UsageError(f"{OPTION} {source.name} holds no VAE. Add one with --vae.")
    if source.known_prediction_type is None:
        raise UsageError(
            f"{OPTION} {source.name} is a Stable Diffusion 2.x checkpoint that does not state its prediction type. Add "
            "--prediction_type v_prediction (768 pixels: SD 2.0 and 2.1) or epsilon (512 pixels: the -base models)."
        )
    stated = prediction_of_file(source.header, kind)
    if states_prediction(source.header) and source.known_prediction_type != stated:
        by = "--prediction_type" if source.prediction_type else "--single_file_config"
        raise UsageError(
            f"{by} says {source.known_prediction_type}, but {source.name} itself states that it predicts {stated}."
        )


def _check_transformer_file(source: Source, kind: Kind) -> None:
    """Refuse a file of SD 3 or FLUX if it and --single_file_config together do not hold every network."""
    name, folder = f"{OPTION} {source.name}", source.single_file_config
    if folder is None:
        raise UsageError(
            f"{name} lacks tokenizers and configurations. Add --single_file_config with the diffusers folder of the "
            "same model, which may lack the weights that the file holds."
        )
    index = source.config_of("", "model_index.json")
    if index.get("_class_name") != kind.pipeline or not source.config_of(kind.network):
        described = f"a {index['_class_name']}" if "_class_name" in index else "no pipeline"
        raise UsageError(f"{name} is of kind {kind.name}, but --single_file_config {folder} describes {described}.")
    components = [component for component in kind.components[1:] if _listed_class(index, component)]
    if source.drop_t5 and "text_encoder_3" in components:
        components.remove("text_encoder_3")
    in_file = {"vae"} if source.header.has_vae or source.vae else set()
    own = FILE_TEXT_ENCODERS.get(kind.name, {})
    in_file |= {c for c, part in own.items() if any(source.header.under(f"text_encoders.{part}."))}
    missing = [c for c in components if c not in in_file and not weights_in(Path(folder).expanduser() / c)]
    if missing:
        raise UsageError(
            f"{name}: neither the file nor --single_file_config {folder} holds the weights of {', '.join(missing)}. "
            "Download them into that folder."
        )


def _check_folder(source: Source) -> None:
    folder = source.place
    if not (folder / "model_index.json").is_file():
        raise UsageError(f"{OPTION} {source.name} holds no model_index.json. Use a diffusers folder.")
    index = source.config_of("", "model_index.json")
    check_class(source.name, index.get("_class_name"))
    kind = next(kind for kind in KINDS.values() if kind.pipeline == index["_class_name"])
    check_schedule(source.name, kind, str(_listed_class(index, "scheduler")))
    components = [name for name in COMPONENTS if _listed_class(index, name)]
    for component in components:
        weights = weights_in(folder / component)
        if weights and not source.allow_pickle and not any(form == "safetensors" for _, form in weights):
            pickled = min(path for path in (folder / component).glob("*.bin") if WEIGHTS.fullmatch(path.name))
            check_suffix(pickled, OPTION, allow_pickle=False)
    known = sorted({variant for c in components for variant, _ in weights_in(folder / c) if variant})
    if source.variant and source.variant not in known:
        has = f"variants here: {', '.join(known)}" if known else "it has none"
        raise UsageError(f"--variant {source.variant}: {source.name} has no such weights; {has}.")
    own = KINDS[source.kind or kind.name]
    if own.pipeline != kind.pipeline:
        raise UsageError(f"{OPTION} {source.name} is a {kind.pipeline} with a {own.title} of kind {own.name}.")
    _check_text_width(source, [name for name in components if name.startswith("text_encoder")])


def _check_text_width(source: Source, encoders: list[str]) -> None:
    """Refuse text encoders of other widths than the network takes: T5's own, else those of all CLIPs together."""
    configs = [source.config_of(name) for name in encoders]
    widths = [_hidden_size(config) for config in configs if not config.get("d_model")]
    given = next((config["d_model"] for config in configs if config.get("d_model")), sum(widths))
    network = source.network_config
    takes = text_width_of(network) or given
    if given != takes and not (source.kind == "sd3" and given < takes):  # without T5, padded with zeros
        raise UsageError(
            f"{OPTION} {source.name}: its {KINDS[source.kind or 'sd1'].title} takes text {takes} wide, its text "
            f"encoders give {given}."
        )


def _hidden_size(config: Mapping[str, Any]) -> int:
    """Of a text encoder; that of a model for images and text is in the part for text."""
    return int(config.get("hidden_size") or config.get("text_config", {}).get("hidden_size", 0))


def _listed_class(index: Mapping[str, Any], component: str) -> Any:
    """The class of a component in model_index.json ([library, class]); None if there is none."""
    entry = index.get(component)
    return entry[1] if isinstance(entry, list) and len(entry) == 2 else None


def _check_id(option: str, name: str) -> None:
    if name.count("/") != 1 or name.endswith((".safetensors", ".ckpt")) or not _is_valid_id(name):
        hints = [" The bundled bases are digits, digits-sd3 and emoji."] if option == OPTION else []
        if "@" in name:
            hints.append(
                " Revisions (owner/name@revision) are not supported: download one into a folder and give that."
            )
        raise UsageError(
            f"{option} {name} is neither a local folder or file nor a Hub id (owner/name).{''.join(hints)}"
        )
    for what, pattern in UNSUPPORTED_IDS.items():
        if pattern.match(name):
            raise UsageError(f"{option} {name} is a {what} model. {SUPPORTED}.")


def _is_valid_id(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _check_vae(source: Source, name: str) -> None:
    place = Path(name)
    if place.is_file():
        check_vae_file(read_checkpoint_header(place, "--vae", source.allow_pickle))
    elif not place.is_dir():
        _check_id("--vae", name)
    elif not any((place / sub / "config.json").is_file() for sub in ("", "vae")):
        raise UsageError(f"--vae {name} holds neither config.json nor vae/config.json. Use a VAE's folder or file.")
