"""A trained PEFT adapter as plain tensors, and the same update under the names ComfyUI, A1111 and Forge read.

PEFT applies W + alpha / r * up @ down (rsLoRA: alpha / sqrt(r)); a kohya file says alpha in a tensor of its own
beside each pair, and a reader that finds none takes the scale to be 1.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from sd_unlearn.errors import UnlearnError, UsageError
from sd_unlearn.export.ldm_keys import SDXL, Layout, unet_key
from sd_unlearn.io.files import read_json

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>A\.weight|B\.weight|magnitude_vector)")
# What changes the function and an exported file cannot say.
_UNSUPPORTED = ("lora_bias", "modules_to_save", "use_qalora", "layer_replication", "fan_in_fan_out")


@dataclass(frozen=True)
class LoraPair:
    """The update of one module."""

    module: str  # name in the UNet, e.g. mid_block.attentions.0.transformer_blocks.0.attn1.to_q
    down: Tensor  # lora_A, [r, in] or [r, in, kh, kw]
    up: Tensor  # lora_B, [out, r] or [out, r, 1, 1]
    alpha: float  # the update is alpha / r * up @ down; rsLoRA's square root is already in it
    magnitude: Tensor | None = None  # DoRA's, one an output channel: [out], of a convolution [1, out, 1, 1]

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def change(self, weight: Tensor) -> Tensor:
        """What the pair adds to a weight [out, in, ...], in float64.

        DoRA (Liu et al. 2024, equation 5) rescales each output channel of the sum to its magnitude.
        """
        plain = weight.double()
        delta = self.alpha / self.rank * (self.up.double().flatten(1) @ self.down.double().flatten(1))
        delta = delta.view(weight.shape)
        if self.magnitude is None:
            return delta
        total = (plain + delta).flatten(1)
        scaled = self.magnitude.double().view(-1, 1) * total / total.norm(dim=1, keepdim=True)
        return scaled.view(weight.shape) - plain


@dataclass(frozen=True)
class Adapter:
    """An adapter folder read and checked: every pair, sorted by module, and PEFT's config."""

    pairs: list[LoraPair]
    config: dict[str, Any]
    network: str = "unet"  # or text_encoder, text_encoder_2

    @property
    def uniform(self) -> bool:
        """Whether one rank and one alpha hold for every module."""
        return len({(pair.rank, pair.alpha) for pair in self.pairs}) == 1

    @property
    def is_dora(self) -> bool:
        return bool(self.config.get("use_dora"))


def read_adapter(folder: Path, network: str = "unet") -> Adapter:
    """The trained LoRA of an adapter folder, on the CPU in its own dtype; network: unet, text_encoder, text_encoder_2.

    Raises:
        UsageError: a file is missing, or the config is not JSON.
        UnlearnError: the weights cannot be read, are incomplete or not finite, contradict the config, or hold
            what the exported formats cannot say (biases, other PEFT methods).
    """
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise UsageError(f"--run {folder.parent} holds no trained LoRA ({folder / name}). Train first.")
    config = read_json(folder / CONFIG_FILE)
    _check_config(config, folder / CONFIG_FILE)
    try:
        tensors = safetensors.torch.load_file(folder / WEIGHTS_FILE)
    except (safetensors.SafetensorError, OSError) as error:
        raise UnlearnError(f"{folder / WEIGHTS_FILE} cannot be read ({error}). Train the run again.") from None
    pairs = _pairs(tensors, config, folder / WEIGHTS_FILE)
    if network != "unet":  # files say text_model. in front, whether this version of transformers does or not
        pairs = [dataclasses.replace(p, module=_text_module(p.module)) for p in pairs]
    return Adapter(pairs, config, network)


def module_key(module: str, network: str = "unet", kind: str = "sd1", layout: Layout = SDXL) -> str:
    """A module's name in files for ComfyUI and A1111, by the base's kind: lora_unet_down_blocks_0_..._to_out_0.

    SD 1/2 keep Diffusers' names of the UNet, SDXL takes those of the LDM layout, which count the base's layers.

    Raises:
        UnlearnError: an SDXL of that layout has no such module.
    """
    if network == "unet":
        return "lora_unet_" + (unet_key(module, layout) if kind == "sdxl" else module).replace(".", "_")
    prefix = {"sdxl": {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}}.get(kind, {})
    return prefix.get(network, "lora_te_") + module.replace(".", "_")


def kohya_tensors(adapter: Adapter, kind: str = "sd1", layout: Layout = SDXL) -> dict[str, Tensor]:
    """The adapter as `<key>.lora_down.weight`, `.lora_up.weight` and, where one scale holds for all, `.alpha`.

    Alpha is 0-d float32; weights keep their dtype. Not for DoRA, which these cannot say: `kohya_differences`.
    Where ranks or alphas differ, the scale is multiplied into up (float32) and no alpha is written: Diffusers gives
    the alpha of a minority to the wrong attention modules without a word.
    """
    tensors: dict[str, Tensor] = {}
    for pair in adapter.pairs:
        key, up = module_key(pair.module, adapter.network, kind, layout), pair.up
        if adapter.uniform:
            tensors[f"{key}.alpha"] = torch.tensor(pair.alpha, dtype=torch.float32)
        else:
            up = (up.double() * (pair.alpha / pair.rank)).float()
        tensors[f"{key}.lora_down.weight"] = pair.down.contiguous()
        tensors[f"{key}.lora_up.weight"] = up.contiguous()
    return tensors


def _text_module(module: str) -> str:
    return module if module == "text_projection" else "text_model." + module.removeprefix("text_model.")


def _check_config(config: Any, path: Path) -> None:
    numbers = [config.get(key) for key in ("r", "lora_alpha")] if isinstance(config, dict) else [None]
    if not all(isinstance(number, (int, float)) for number in numbers):
        raise UnlearnError(f"{path} holds no r and lora_alpha: it is no LoRA that PEFT saved. Train the run again.")
    if config.get("peft_type") != "LORA":
        raise UnlearnError(f'{path}: peft_type is "{config.get("peft_type")}"; only LORA can be exported.')
    for key in _UNSUPPORTED:
        if config.get(key):
            raise UnlearnError(f"{path}: {key} is on, which export cannot write. Train without it.")
    if config.get("bias", "none") != "none":
        raise UnlearnError(f'{path}: bias is "{config["bias"]}", which export cannot write. Train with bias none.')


def _pairs(tensors: dict[str, Tensor], config: dict[str, Any], path: Path) -> list[LoraPair]:
    sides: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise UnlearnError(f'{path}: "{key}" is no weight of a LoRA; export cannot write it. Drop it.')
        if not torch.isfinite(tensor).all():
            raise UnlearnError(f'{path}: "{key}" is not finite (NaN). Train again with a lower --learning_rate.')
        sides.setdefault(match["module"], {})[match["side"]] = tensor
    if not sides:
        raise UnlearnError(f"{path} holds no LoRA weights. Train the run again.")
    return [_pair(module, found, config, path) for module, found in sorted(sides.items())]


def _pair(module: str, found: dict[str, Tensor], config: dict[str, Any], path: Path) -> LoraPair:
    magnitude = found.pop("magnitude_vector", None)
    if len(found) < 2:
        side = next((side.removesuffix(".weight") for side in found), "magnitude_vector")
        raise UnlearnError(f'{path}: "{module}" has only its lora_{side} weight. Train the run again.')
    if (magnitude is not None) != bool(config.get("use_dora")):
        has, says = ("no", "on") if magnitude is None else ("a", "off")
        raise UnlearnError(
            f'{path}: "{module}" has {has} magnitude_vector, but {CONFIG_FILE} says that DoRA (use_dora) is {says}. '
            "Train the run again."
        )
    down, up = found["A.weight"], found["B.weight"]
    rank = _by_module(config, "rank_pattern", module, config["r"])
    if not down.shape[0] == up.shape[1] == rank:
        raise UnlearnError(
            f'{path}: "{module}" has rank {down.shape[0]} (down) and {up.shape[1]} (up), but {CONFIG_FILE} says '
            f"{rank}. Train the run again."
        )
    alpha = float(_by_module(config, "alpha_pattern", module, config["lora_alpha"]))
    return LoraPair(module, down, up, alpha * math.sqrt(rank) if config.get("use_rslora") else alpha, magnitude)


def _by_module(config: dict[str, Any], pattern: str, module: str, default: float) -> float:
    """The module's own rank or alpha. PEFT's own rule decides which pattern is meant, so both always agree."""
    patterns = config.get(pattern)
    if not patterns:
        return default
    from peft.utils.other import get_pattern_key  # seconds to import, and hardly any run has patterns

    return patterns.get(get_pattern_key(list(patterns), module), default)
