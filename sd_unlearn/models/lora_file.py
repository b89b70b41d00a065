"""Read a LoRA file: every tensor of it belongs to the change of one module, or the file is refused.

Accepted names: kohya (lora_unet_..., also in the layout of single files), Diffusers (unet...., transformer.... and
text_encoder....), the original code of transformers (diffusion_model....), OneTrainer (lora_transformer_...) and PEFT
(base_model.model...., with adapter_config.json in the same folder). Accepted kinds of change: LoRA (also of
convolutions and with a middle matrix), DoRA in Diffusers' and PEFT's files, LoHa, LoKr, and whole differences of
weights and biases.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sd_unlearn.errors import UnlearnError, UsageError, reason
from sd_unlearn.io.reading import read_json
from sd_unlearn.io.schema import OPEN, validate
from sd_unlearn.models.lora_change import KINDS, Change, kind_of_change

PEFT_CONFIG, PEFT_PREFIX = "adapter_config.json", "base_model.model."
NETWORKS = ("unet", "transformer", "text_encoder", "text_encoder_2")
# End of a tensor's name -> its part in the change of the module.
ENDINGS = {
    **{f"lora{a}.weight": part for part in ("down", "up", "mid") for a in (f"_{part}", f".{part}")},
    **{f"lora_linear_layer.{part}.weight": part for part in ("down", "up")},
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_magnitude_vector": "magnitude",
    "alpha": "alpha",
    **{f"hada_{part}": part for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{part}": f"k_{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    **{part: part for part in ("diff", "diff_b", "w_norm", "b_norm")},
}
# Part of a tensor's name -> what it is and why it is refused.
REFUSED = {
    "dora_scale": "a DoRA in kohya's format, whose readers normalize the weights in different ways",
    "oft_": "OFT, which multiplies weights",
    "boft_": "BOFT, which multiplies weights",
    "on_input": "IA3, which multiplies activations",
    "ia3_": "IA3, which multiplies activations",
    ".a1.weight": "GLoRA",
    ".a2.weight": "GLoRA",
    ".b1.weight": "GLoRA",
    ".b2.weight": "GLoRA",
    "vera_": "VeRA, whose shared matrices are not in the file",
    "reshape_weight": "a change of a weight's shape",
    "set_weight": "a replaced weight",
    "lora_A.bias": "a LoRA with a bias",
    "lora_B.bias": "a LoRA with a bias",
    "lora_embedding": "a LoRA of an embedding",
    "bundle_emb": "a textual inversion inside the LoRA",
}
_MODULE = re.compile(rf"(?P<module>.+)\.(?P<ending>{'|'.join(sorted(map(re.escape, ENDINGS), key=len, reverse=True))})")
# The names of Diffusers' former attention processors -> the module names.
_OLD_NAMES = (
    (re.compile(r"\.processor\.to_([qkv])_lora\.(down|up)\.weight$"), r".to_\1.lora.\2.weight"),
    (re.compile(r"\.processor\.to_out_lora\.(down|up)\.weight$"), r".to_out.0.lora.\1.weight"),
    (re.compile(r"\.self_attn\.to_([qkv])_lora\.(down|up)\.weight$"), r".self_attn.\1_proj.lora.\2.weight"),
    (re.compile(r"\.self_attn\.to_out_lora\.(down|up)\.weight$"), r".self_attn.out_proj.lora.\1.weight"),
)
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class PeftSettings:
    """The settings of PEFT's adapter_config.json, or of Diffusers' header, that matter here."""

    __pydantic_config__ = OPEN

    r: int
    lora_alpha: float
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool = False
    bias: str = "none"
    lora_bias: bool = False
    fan_in_fan_out: bool = False
    modules_to_save: Any = None
    layer_replication: Any = None
    use_qalora: bool = False
    use_dora: bool = False
    target_modules: list[str] | str | None = None
    peft_type: str = "LORA"

    def alpha_of(self, module: str, rank: int, where: str) -> float:
        """alpha of a module, with which the scale is alpha / rank; rsLoRA's alpha / sqrt(rank) is converted.

        Raises:
            UnlearnError: the file's rank is not the one of the settings.
        """
        stated = _setting_of(module, self.rank_pattern, self.r)
        if stated != rank:
            raise UnlearnError(
                f"{where}: {module} has rank {rank}, but the settings say {str(stated)[:20]}. Export it again."
            )
        alpha = float(_setting_of(module, self.alpha_pattern, self.lora_alpha))
        if not math.isfinite(alpha):
            raise UnlearnError(f"{where}: the alpha of {module} is {alpha}. The LoRA is broken; train it again.")
        return alpha * math.sqrt(rank) if self.use_rslora else alpha


@dataclass(frozen=True)
class LoraFile:
    """The content of a LoRA file."""

    path: Path
    header: dict[str, str]
    changes: dict[str, Change]  # by the module's name in the file


def read_lora_file(path: Path, option: str) -> LoraFile:
    """Read and check a LoRA file. Which modules the names stand for depends on the base (lora_change.find_modules).

    Raises:
        UsageError: not a .safetensors file, damaged, or not a LoRA.
        UnlearnError: a tensor is not finite, of another type than floating point, incomplete or of an unsupported kind.
    """
    if path.suffix.lower() != ".safetensors":
        raise UsageError(f"{option} {path} is not a .safetensors file. Other formats can run code when loaded.")
    where = f"{option} {path}"
    header, tensors = read_tensors(path, option)
    if not any(_MODULE.fullmatch(_current(key)) or _refusal(key) for key in tensors):
        raise UsageError(f"{where} is not a LoRA: none of its {len(tensors)} weights has a LoRA's name.")
    grouped = _by_module(tensors, where)
    changes = {module: _change(module, parts, where) for module, parts in grouped.items()}
    return LoraFile(path, header, _with_settings(changes, _settings(path, header, grouped, where), where))


def read_tensors(path: Path, option: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The header and the tensors of a .safetensors file, all of them floating point and finite.

    Raises:
        UsageError: the file is damaged.
        UnlearnError: names the tensor that is not finite, or not of a floating-point type.
    """
    from safetensors import safe_open

    try:
        with safe_open(str(path), "pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors raises several types for types and sizes that it cannot read
        raise UsageError(f"{option} {path} is damaged or not a safetensors file ({reason(error)}).") from None
    for key, tensor in tensors.items():
        if tensor.dtype not in _FLOATS:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UnlearnError(f'{option} {path}: "{key}" is {kind}. Convert the file to fp32, fp16 or bf16.')
        if not torch.isfinite(tensor).all():
            raise UnlearnError(
                f'{option} {path}: "{key}" is not finite (NaN or infinity), so the LoRA is broken. Train it again.'
            )
    return header, tensors


def _by_module(tensors: Mapping[str, Tensor], where: str) -> dict[str, dict[str, tuple[str, Tensor]]]:
    """Module -> part -> (name in the file, tensor)."""
    modules: dict[str, dict[str, tuple[str, Tensor]]] = {}
    for key, tensor in tensors.items():
        match = _MODULE.fullmatch(_current(key))
        what = _refusal(key)
        if what or match is None:
            raise UnlearnError(
                f'{where}: "{key}" is {what or "not a tensor of a LoRA that sd-unlearn knows"}, which is not '
                "supported. Convert the file to a plain LoRA."
            )
        parts, part = modules.setdefault(match["module"], {}), ENDINGS[match["ending"]]
        if part in parts:
            raise UnlearnError(f'{where} has both "{parts[part][0]}" and "{key}". Keep one of them.')
        parts[part] = key, tensor
    return modules


def _current(key: str) -> str:
    """A tensor's name; those of Diffusers' former attention processors are converted."""
    for pattern, replacement in _OLD_NAMES:
        key = pattern.sub(replacement, key)
    return key


def _refusal(key: str) -> str | None:
    return next((what for part, what in REFUSED.items() if part in key), None)


def _change(module: str, parts: dict[str, tuple[str, Tensor]], where: str) -> Change:
    """The change of one module, with the scale of its own alpha; 1 without an alpha."""
    for part, (key, tensor) in parts.items():
        few = part not in ("alpha", "diff", "diff_b", "w_norm", "b_norm", "magnitude") and tensor.ndim < 2
        if few or tensor.numel() == 0 or (part == "alpha" and tensor.numel() != 1):
            raise UnlearnError(f'{where}: "{key}" has the shape {list(tensor.shape)}. The LoRA is broken.')
    tensors = {part: tensor for part, (_, tensor) in parts.items()}
    kind = kind_of_change(tensors)
    if kind is None:
        present = ", ".join(key.removeprefix(f"{module}.") for key, _ in parts.values())
        raise UnlearnError(
            f"{where}: {module} has only {present}, which is not a complete change of any kind ({', '.join(KINDS)}). "
            "Download or export the file again."
        )
    change = Change(kind, {part: tensor for part, tensor in tensors.items() if part != "alpha"})
    if "alpha" not in tensors or change.rank is None:
        return change
    return change.scaled(float(tensors["alpha"]) / change.rank)


def _settings(path: Path, header: Mapping[str, str], modules: Mapping[str, Any], where: str) -> dict[str, PeftSettings]:
    """Prefix of module names -> PEFT's settings: of Diffusers' header, or of adapter_config.json beside a PEFT file."""
    if any(module.startswith(PEFT_PREFIX) for module in modules):
        config = path.parent / PEFT_CONFIG
        if not config.is_file():
            raise UnlearnError(f"{where} is an adapter of PEFT without its {PEFT_CONFIG}, which holds the scale.")
        return {PEFT_PREFIX: read_peft_settings(config)}
    if "lora_adapter_metadata" not in header:
        return {}
    try:
        data = json.loads(header["lora_adapter_metadata"])
    except (ValueError, RecursionError) as error:
        raise UnlearnError(f"{where}: lora_adapter_metadata in its header is not JSON ({reason(error)}).") from None
    found, hint = {}, "Export the file again."
    for prefix in (*(f"{network}." for network in NETWORKS), ""):
        if isinstance(data, dict) and f"{prefix}r" in data:
            own = {key.removeprefix(prefix): value for key, value in data.items() if key.startswith(prefix)}
            found[prefix] = _supported(validate(PeftSettings, own, f"{where}, lora_adapter_metadata", hint), where)
    return found


def read_peft_settings(config: Path) -> PeftSettings:
    """Read PEFT's adapter_config.json.

    Raises:
        UsageError: it is not the JSON that PEFT writes for a LoRA.
        UnlearnError: it uses a feature that is not supported.
    """
    return _supported(validate(PeftSettings, read_json(config), str(config), "Train the run again."), str(config))


def _supported(settings: PeftSettings, where: str) -> PeftSettings:
    if settings.peft_type != "LORA":
        raise UnlearnError(f'{where}: peft_type is "{settings.peft_type}"; only LORA is supported.')
    for key in ("lora_bias", "modules_to_save", "layer_replication", "fan_in_fan_out", "use_qalora"):
        if getattr(settings, key):
            raise UnlearnError(f"{where}: {key} is on, which is not supported.")
    if settings.bias != "none":
        raise UnlearnError(f'{where}: bias is "{settings.bias}", which is not supported.')
    return settings


def _with_settings(changes: dict[str, Change], settings: dict[str, PeftSettings], where: str) -> dict[str, Change]:
    """The changes at the scale of PEFT's settings, if there are any."""
    scaled = dict(changes)
    for module, change in changes.items():
        prefix = next((prefix for prefix in settings if module.startswith(prefix)), None)
        if prefix is None or change.rank is None:
            continue
        if change.scale is not None:
            raise UnlearnError(f"{where} states the scale of {module} twice: as a tensor and in its settings.")
        alpha = settings[prefix].alpha_of(module.removeprefix(prefix), change.rank, where)
        scaled[module] = change.scaled(alpha / change.rank)
    return scaled


def _setting_of(module: str, patterns: Mapping[str, float] | None, default: float) -> float:
    """The rank or alpha of a module. PEFT's own function matches the patterns, so that both always agree."""
    if not patterns:
        return default
    from peft.utils.other import get_pattern_key

    return patterns.get(get_pattern_key(list(patterns), module), default)
