"""Load SD 3, FLUX or Z-Image from the single file of its transformer. What it lacks comes from a diffusers folder.

The published files hold the transformer alone (FLUX.1, Z-Image) or with the VAE (SD 3.5), and some the text encoders,
too. Weights in 8-bit floating point are converted to the precision of the base, with their scales if the file has some.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sd_unlearn.errors import UnlearnError
from sd_unlearn.models.checkpoint_header import (
    FILE_TEXT_ENCODERS,
    TEXT_ENCODERS,
    UNET,
    VAES,
    read_tensors_under,
)
from sd_unlearn.models.kinds import KINDS
from sd_unlearn.models.source import OPTION, Source
from sd_unlearn.models.transformer_keys import diffusers_weights

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_EXACT = {torch.bfloat16, *_FP8}  # what bfloat16 holds without a loss
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, *_FP8)
_SCALE = ".scale_weight"  # of a weight in 8 bits: the weight is this times the stored one
_UNUSED = ("norm_final.weight",)  # of a norm that Z-Image's final layer does without
_NOT_WEIGHTS = (_SCALE, ".scale_input", "scaled_fp8")


Precision = torch.dtype | dict[str, torch.dtype]  # or of each component of the folder; the file's are as stored then


def load_transformer_file(source: Source, dtype: Precision, vae: Any = None) -> Any:
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
        given["vae"] = load_vae_file(source.place, folder / "vae" / "config.json", as_stored(dtype, ()))
    if source.drop_t5:
        given |= {"text_encoder_3": None, "tokenizer_3": None}
    if not source.allow_pickle:
        given["use_safetensors"] = True
    return getattr(diffusers, kind.pipeline).from_pretrained(str(folder), dtype=dtype, local_files_only=True, **given)


def as_stored(dtype: Precision, tensors: Collection[Tensor]) -> torch.dtype:
    """The precision of a network in the file: if it is read as stored, bfloat16 where that loses nothing."""
    if isinstance(dtype, torch.dtype):
        return dtype
    return torch.bfloat16 if tensors and {tensor.dtype for tensor in tensors} <= _EXACT else torch.float32


def _transformer(source: Source, dtype: Precision) -> nn.Module:
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


def _text_encoders(source: Source, dtype: Precision) -> dict[str, nn.Module]:
    """The text encoders of SD 3 or FLUX that the file holds."""
    encoders, kind = {}, str(source.kind)
    for component, name in FILE_TEXT_ENCODERS.get(kind, {}).items():
        prefix, config = f"text_encoders.{name}.transformer.", source.config_of(component)
        if (component == "text_encoder_3" and source.drop_t5) or not config or not any(source.header.under(prefix)):
            continue
        encoder = _empty_encoder(kind, name, config)
        tensors = _in_precision(read_tensors_under(source.place, prefix), dtype)
        state = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
        if "text_projection.weight" not in state:  # the file leaves out the identity
            state["text_projection.weight"] = torch.eye(config.get("hidden_size", 1))
        if "shared.weight" in state:
            state["encoder.embed_tokens.weight"] = state["shared.weight"]
        state |= {key.removeprefix("text_model."): tensor for key, tensor in state.items()}  # of a CLIPTextModel
        wanted = encoder.state_dict()
        fault = next((key for key in wanted if key not in state or state[key].shape != wanted[key].shape), None)
        if fault:
            raise UnlearnError(
                f"{OPTION} {source.name}: its {component} lacks {prefix}{fault}, or it has another size than in "
                f"{source.configs}. Use the folder of the same model, or download the file again."
            )
        encoders[component] = encoder.to(as_stored(dtype, tensors.values()))
        encoder.load_state_dict({key: state[key] for key in wanted})
    return encoders


def _empty_encoder(kind: str, name: str, config: dict[str, Any]) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    if name == "t5xxl":
        return T5EncoderModel(T5Config.from_dict(config))
    clip = CLIPTextModelWithProjection if kind == "sd3" else CLIPTextModel
    return clip(CLIPTextConfig.from_dict(config))


def _in_precision(tensors: Mapping[str, Tensor], dtype: Precision) -> dict[str, Tensor]:
    """The weights in a precision, those in 8 bits multiplied by their scales.

    Raises:
        UnlearnError: a weight is not of a floating-point type.
    """
    weights, scales = {}, [tensor for name, tensor in tensors.items() if name.endswith(_SCALE)]
    stored = [tensor for name, tensor in tensors.items() if not name.endswith(_NOT_WEIGHTS)]
    dtype = as_stored(dtype, [] if scales else stored)
    for name, tensor in tensors.items():
        if name.endswith(_NOT_WEIGHTS):
            continue
        if tensor.dtype not in _FLOATS:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UnlearnError(f"{name} is {kind}: quantized weights other than fp8 cannot be read")
        scale = tensors.get(name.removesuffix(".weight") + _SCALE) if tensor.dtype in _FP8 else None
        weights[name] = tensor.to(dtype) if scale is None else (tensor.float() * scale.float()).to(dtype)
    return weights
