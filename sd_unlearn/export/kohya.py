"""Read a trained PEFT adapter, and write it under kohya's names, which ComfyUI, A1111 and Forge read.

`module_key` builds a kohya key from the name of a module in Diffusers:

    module_key("down_blocks.1.attentions.0.proj_in")               lora_unet_down_blocks_1_attentions_0_proj_in
    module_key("down_blocks.1.attentions.0.proj_in", kind="sdxl")  lora_unet_input_blocks_4_1_proj_in
    module_key("text_model.encoder.layers.0.self_attn.q_proj", "text_encoder")
                                                                   lora_te_text_model_encoder_layers_0_self_attn_q_proj

SD 1 and SD 2 keep Diffusers' names. For SDXL's UNet, ldm_keys.unet_key renames the module first, and its text encoders
have the prefixes lora_te1_ and lora_te2_. `kohya_tensors` appends .lora_down.weight, .lora_up.weight and .alpha.

PEFT computes W + alpha / r * up @ down (rsLoRA: alpha / sqrt(r)). A kohya file stores alpha as a separate tensor next
to each pair; a reader that finds no alpha uses the scale 1.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sd_unlearn.errors import UnlearnError, UsageError
from sd_unlearn.io.reading import read_json
from sd_unlearn.io.schema import OPEN, validate
from sd_unlearn.models.ldm_keys import SDXL_BLOCKS, UNetBlocks, unet_key
from sd_unlearn.models.lora_file import read_tensors

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>A\.weight|B\.weight|magnitude_vector)")
# Settings of PEFT that change the result and that the exported formats cannot express.
_UNSUPPORTED = ("lora_bias", "modules_to_save", "use_qalora", "layer_replication", "fan_in_fan_out")


@dataclass(frozen=True)
class AdapterConfig:
    """The settings that export uses of PEFT's adapter_config.json."""

    __pydantic_config__ = OPEN

    peft_type: str
    r: int
    lora_alpha: float
    bias: str = "none"
    use_dora: bool = False
    use_rslora: bool = False
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    target_modules: list[str] | str | None = None


@dataclass(frozen=True)
class LoraPair:
    """The trained update of one module."""

    module: str  # name in the UNet, e.g. mid_block.attentions.0.transformer_blocks.0.attn1.to_q
    down: Tensor  # lora_A, [r, in] or [r, in, kh, kw]
    up: Tensor  # lora_B, [out, r] or [out, r, 1, 1]
    alpha: float  # the update is alpha / r * up @ down; the square root of rsLoRA is already included
    magnitude: Tensor | None = None  # DoRA: one value per output channel, [out], for a convolution [1, out, 1, 1]

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def change(self, weight: Tensor) -> Tensor:
        """The difference that the pair adds to a weight [out, in, ...], in float64.

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
    """A checked adapter folder: its pairs, sorted by module, and PEFT's config."""

    pairs: list[LoraPair]
    config: dict[str, Any]  # adapter_config.json as written, valid as AdapterConfig
    network: str = "unet"  # or text_encoder, text_encoder_2

    @property
    def uniform(self) -> bool:
        """Whether all modules have the same rank and alpha."""
        return len({(pair.rank, pair.alpha) for pair in self.pairs}) == 1

    @property
    def is_dora(self) -> bool:
        return bool(self.config.get("use_dora"))


def read_adapter(folder: Path, network: str = "unet") -> Adapter:
    """Read a trained LoRA from an adapter folder, on the CPU in its own dtype.

    Args:
        network: "unet", "text_encoder" or "text_encoder_2".

    Raises:
        UsageError: a file is missing, or the config is not the JSON that PEFT writes for a LoRA.
        UnlearnError: the weights cannot be read, are incomplete or not finite, contradict the config, or use a
            feature that the exported formats cannot express (biases, other PEFT methods).
    """
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise UsageError(f"--run {folder.parent} holds no trained LoRA: {folder / name} is missing. Train first.")
    data = read_json(folder / CONFIG_FILE)
    config = validate(AdapterConfig, data, f"{folder / CONFIG_FILE}", "Train the run again.")
    _check_supported(config, data, folder / CONFIG_FILE)
    _, tensors = read_tensors(folder / WEIGHTS_FILE, "--run")
    pairs = _pairs(tensors, config, folder / WEIGHTS_FILE)
    if network != "unet":  # kohya names start with text_model., which some versions of transformers leave out
        pairs = [dataclasses.replace(pair, module=_text_module(pair.module)) for pair in pairs]
    return Adapter(pairs, data, network)


def module_key(module: str, network: str = "unet", kind: str = "sd1", blocks: UNetBlocks = SDXL_BLOCKS) -> str:
    """The kohya key of a module, without the ending of the tensor. Examples stand at the top of this file.

    Args:
        module: Name of the module in Diffusers.
        network: "unet", "text_encoder" or "text_encoder_2".
        kind: Kind of the base: "sd1", "sd2" or "sdxl".
        blocks: The blocks of an SDXL UNet, by which its modules are numbered.

    Raises:
        UnlearnError: an SDXL UNet with these blocks has no such module.
    """
    if network == "unet":
        return "lora_unet_" + (unet_key(module, blocks) if kind == "sdxl" else module).replace(".", "_")
    prefix = {"sdxl": {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}}.get(kind, {})
    return prefix.get(network, "lora_te_") + module.replace(".", "_")


def kohya_tensors(adapter: Adapter, kind: str = "sd1", blocks: UNetBlocks = SDXL_BLOCKS) -> dict[str, Tensor]:
    """The adapter's weights under kohya's names: `<key>.lora_down.weight`, `<key>.lora_up.weight` and `<key>.alpha`.

    Alpha is a 0-d float32 tensor; weights keep their dtype. If ranks or alphas differ between modules, no alpha is
    written and the scale is multiplied into up (float32), because Diffusers applies per-module alphas to the wrong
    attention modules without a warning. Not for DoRA, which has no form here (see lora_files.kohya_bytes).
    """
    tensors: dict[str, Tensor] = {}
    for pair in adapter.pairs:
        key, up = module_key(pair.module, adapter.network, kind, blocks), pair.up
        if adapter.uniform:
            tensors[f"{key}.alpha"] = torch.tensor(pair.alpha, dtype=torch.float32)
        else:
            up = (up.double() * (pair.alpha / pair.rank)).float()
        tensors[f"{key}.lora_down.weight"] = pair.down.contiguous()
        tensors[f"{key}.lora_up.weight"] = up.contiguous()
    return tensors


def _text_module(module: str) -> str:
    return module if module == "text_projection" else "text_model." + module.removeprefix("text_model.")


def _check_supported(config: AdapterConfig, data: dict[str, Any], path: Path) -> None:
    if config.peft_type != "LORA":
        raise UnlearnError(f'{path}: peft_type is "{config.peft_type}"; only LORA can be exported.')
    for key in _UNSUPPORTED:
        if data.get(key):
            raise UnlearnError(f"{path}: {key} is on, which export does not support. Train without it.")
    if config.bias != "none":
        raise UnlearnError(f'{path}: bias is "{config.bias}", which export does not support. Train with bias none.')


def _pairs(tensors: dict[str, Tensor], config: AdapterConfig, path: Path) -> list[LoraPair]:
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise UnlearnError(f'{path}: "{key}" is not a LoRA weight, so export cannot write it. Train the run again.')
        modules.setdefault(match["module"], {})[match["side"]] = tensor
    if not modules:
        raise UnlearnError(f"{path} holds no LoRA weights. Train the run again.")
    return [_pair(module, sides, config, path) for module, sides in sorted(modules.items())]


def _pair(module: str, sides: dict[str, Tensor], config: AdapterConfig, path: Path) -> LoraPair:
    magnitude = sides.pop("magnitude_vector", None)
    if len(sides) < 2:
        side = next((side.removesuffix(".weight") for side in sides), "magnitude_vector")
        raise UnlearnError(f'{path}: "{module}" has only its lora_{side} weight. Train the run again.')
    if (magnitude is not None) != config.use_dora:
        article, state = ("no", "on") if magnitude is None else ("a", "off")
        raise UnlearnError(
            f'{path}: "{module}" has {article} magnitude_vector, but DoRA (use_dora) is {state} in {CONFIG_FILE}. '
            "Train the run again."
        )
    down, up = sides["A.weight"], sides["B.weight"]
    rank = _setting_of(module, config.rank_pattern, config.r)
    if not down.shape[0] == up.shape[1] == rank:
        raise UnlearnError(
            f'{path}: "{module}" has rank {down.shape[0]} (down) and {up.shape[1]} (up), but {CONFIG_FILE} says '
            f"{rank}. Train the run again."
        )
    alpha = float(_setting_of(module, config.alpha_pattern, config.lora_alpha))
    if not math.isfinite(alpha):
        raise UnlearnError(f'{path}: the alpha of "{module}" in {CONFIG_FILE} is {alpha}. Train the run again.')
    return LoraPair(module, down, up, alpha * math.sqrt(rank) if config.use_rslora else alpha, magnitude)


def _setting_of(module: str, patterns: dict[str, Any] | None, default: float) -> float:
    """The rank or alpha of a module. PEFT's own function matches the patterns, so that both always agree."""
    if not patterns:
        return default
    from peft.utils.other import get_pattern_key  # takes seconds to import, and few runs have patterns

    return patterns.get(get_pattern_key(list(patterns), module), default)
