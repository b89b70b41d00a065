"""Load SD 3, FLUX or Z-Image from the single file of its transformer. What it lacks comes from a diffusers folder.

The published files hold the transformer alone (FLUX.1, Z-Image), or with the VAE (SD 3.5) and text encoders. Weights in
8-bit floating point are converted to the precision of the base, with their scales if the file has some.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sd_unlearn.errors import UnlearnError
from sd_unlearn.models.checkpoint_header import (
    SD3_TEXT_ENCODERS,
    TEXT_ENCODERS,
    UNET,
    VAES,
    read_tensors_under,
)
from sd_unlearn.models.kinds import KINDS
from sd_unlearn.models.source import OPTION, Source
from sd_unlearn.models.transformer_keys import diffusers_weights

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, *_FP8)
_SCALE = ".scale_weight"  # of a weight in 8 bits: the weight is this times the stored one
_UNUSED = ("norm_final.weight",)  # of a norm that Z-Image's final layer does without
_NOT_WEIGHTS = (_SCALE, ".scale_input", "scaled_fp8")


def load_transformer_file(source: Source, dtype: torch.dtype, vae: Any = None) -> Any:
    """The pipeline of a file with a transformer and the folder --single_file_config. vae: replaces both VAEs.

    Raises:
        UnlearnError: the weights do not fit the configuration, or are of an unknown type.
    """
    import diffusers

    from sd_unlearn.models.single_file import load_vae_file

    kind, folder = KINDS[str(source.kind)], source.configs
    assert folder is not None
    given: dict[str, Any] = {kind.network: _transformer(source, dtype), **_text_encoders(source, dtype)}
    if vae is not None:
        given["vae"] = vae
    elif source.header.has_vae:
        given["vae"] = load_vae_file(source.place, folder / "vae" / "config.json", dtype)
    if source.drop_t5:
        given |= {"text_encoder_3": None, "tokenizer_3": None}
    if not source.allow_pickle:
        given["use_safetensors"] = True
    return getattr(diffusers, kind.pipeline).from_pretrained(str(folder), dtype=dtype, local_files_only=True, **given)


def _transformer(source: Source, dtype: torch.dtype) -> nn.Module:
    import diffusers
    from accelerate import init_empty_weights

    network = getattr(diffusers, KINDS[str(source.kind)].network_class)
    with init_empty_weights():
        transformer = network.from_config(source.network_config)
    prefix = UNET if any(source.header.under(UNET)) else ""
    tensors = {
        name.removeprefix(prefix): tensor
        for name, tensor in read_tensors_under(source.place, prefix).items()
        if not name.startswith((*VAES, *TEXT_ENCODERS)) and name.removeprefix(prefix) not in _UNUSED
    }
    shapes = {name: tuple(value.shape) for name, value in transformer.state_dict().items()}
    try:
        state = diffusers_weights(str(source.kind), shapes, _in_precision(tensors, dtype))
    except UnlearnError as error:
        raise UnlearnError(
            f"{OPTION} {source.name} does not fit --single_file_config {source.configs}: {error}. Use the folder of "
            "the same model, or download the file again."
        ) from None
    transformer.load_state_dict(state, assign=True)
    return transformer


def _text_encoders(source: Source, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The text encoders of SD 3 that the file holds."""
    encoders = {}
    for component, name in SD3_TEXT_ENCODERS.items():
        prefix, config = f"text_encoders.{name}.transformer.", source.config_of(component)
        if (component == "text_encoder_3" and source.drop_t5) or not config or not any(source.header.under(prefix)):
            continue
        encoder = _empty_encoder(component, config)
        tensors = _in_precision(read_tensors_under(source.place, prefix), dtype)
        state = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
        if "text_projection.weight" not in state:  # the file leaves out the identity
            state["text_projection.weight"] = torch.eye(config.get("hidden_size", 1), dtype=dtype)
        if "shared.weight" in state:
            state["encoder.embed_tokens.weight"] = state["shared.weight"]
        wanted = encoder.state_dict()
        fault = next((key for key in wanted if key not in state or state[key].shape != wanted[key].shape), None)
        if fault:
            raise UnlearnError(
                f"{OPTION} {source.name}: its {component} lacks {prefix}{fault}, or it has another size than in "
                f"{source.configs}. Use the folder of the same model, or download the file again."
            )
        encoder.load_state_dict({key: state[key] for key in wanted})
        encoders[component] = encoder.to(dtype)
    return encoders


def _empty_encoder(component: str, config: dict[str, Any]) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    if component == "text_encoder_3":
        return T5EncoderModel(T5Config.from_dict(config))
    return CLIPTextModelWithProjection(CLIPTextConfig.from_dict(config))


def _in_precision(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights in a precision, those in 8 bits multiplied by their scales.

    Raises:
        UnlearnError: a weight is not of a floating-point type.
    """
    weights = {}
    for name, tensor in tensors.items():
        if name.endswith(_NOT_WEIGHTS):
            continue
        if tensor.dtype not in _FLOATS:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UnlearnError(f"{name} is {kind}: quantized weights other than fp8 cannot be read")
        scale = tensors.get(name.removesuffix(".weight") + _SCALE) if tensor.dtype in _FP8 else None
        weights[name] = tensor.to(dtype) if scale is None else (tensor.float() * scale.float()).to(dtype)
    return weights
