"""Read a trained PEFT adapter, and write it under kohya's names, which ComfyUI, A1111 and Forge read.

`module_key` builds a kohya key from the name of a module in Diffusers:

    module_key("down_blocks.1.attentions.0.proj_in")               lora_unet_down_blocks_1_attentions_0_proj_in
    module_key("down_blocks.1.attentions.0.proj_in", kind="sdxl")  lora_unet_input_blocks_4_1_proj_in
    module_key("text_model.encoder.layers.0.self_attn.q_proj", "text_encoder")
                                                                   lora_te_text_model_encoder_layers_0_self_attn_q_proj

SD 1 and SD 2 keep Diffusers' names. For SDXL's UNet, ldm_keys.unet_key renames the module first, and its text encoders
have the prefixes lora_te1_ and lora_te2_. `kohya_tensors` appends .lora_down.weight, .lora_up.weight and .alpha.

For transformers (SD 3, FLUX, Z-Image), kohya's names fuse q, k and v, while ComfyUI and Forge also read Diffusers'
(`transformer.<module>.lora_A.weight`). Their files have those names, and no alpha: `transformer_tensors`.

PEFT computes W + alpha / r * up @ down (rsLoRA: alpha / sqrt(r)). A kohya file stores alpha as a separate tensor next
to each pair; a reader that finds no alpha uses the scale 1.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sd_unlearn.errors import UnlearnError, UsageError
from sd_unlearn.io.run_folder import WEIGHTS_FILE
from sd_unlearn.models.ldm_keys import SDXL_BLOCKS, UNetBlocks, unet_key
from sd_unlearn.models.lora_change import Change
from sd_unlearn.models.lora_file import PEFT_CONFIG, PEFT_PREFIX, PeftSettings, read_lora_file, read_peft_settings


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

    def applied_to(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        """The changed weight [out, in, ...], in float64."""
        parts = {"up": self.up, "down": self.down}
        if self.magnitude is not None:
            parts["magnitude"] = self.magnitude
        changed = Change("LoRA", parts, self.alpha / self.rank).weight(weight.double(), strength)
        assert changed is not None
        return changed


@dataclass(frozen=True)
class Adapter:
    """A checked adapter folder: its pairs, sorted by module, and PEFT's settings."""

    pairs: list[LoraPair]
    settings: PeftSettings
    network: str = "unet"  # or transformer, text_encoder, text_encoder_2

    @property
    def uniform(self) -> bool:
        """Whether all modules have the same rank and alpha."""
        return len({(pair.rank, pair.alpha) for pair in self.pairs}) == 1

    @property
    def is_dora(self) -> bool:
        return self.settings.use_dora


def read_adapter(folder: Path, network: str = "unet") -> Adapter:
    """Read a trained LoRA from an adapter folder, on the CPU in its own dtype.

    Args:
        network: "unet", "transformer", "text_encoder" or "text_encoder_2".

    Raises:
        UsageError: a file is missing, or the config is not the JSON that PEFT writes for a LoRA.
        UnlearnError: the weights cannot be read, are incomplete or not finite, contradict the config, or use a
            feature that the exported formats cannot express (biases, other PEFT methods).
    """
    for name in (PEFT_CONFIG, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise UsageError(f"--run {folder.parent} holds no trained LoRA: {folder / name} is missing. Train first.")
    settings = read_peft_settings(folder / PEFT_CONFIG)
    changes = read_lora_file(folder / WEIGHTS_FILE, "--run").changes
    pairs = [_pair(module, change, settings, folder / WEIGHTS_FILE) for module, change in sorted(changes.items())]
    if network.startswith(
        "text_encoder"
    ):  # kohya names start with text_model., which some versions of transformers leave out
        pairs = [dataclasses.replace(pair, module=_text_module(pair.module)) for pair in pairs]
    return Adapter(pairs, settings, network)


def module_key(module: str, network: str = "unet", kind: str = "sd1", blocks: UNetBlocks = SDXL_BLOCKS) -> str:
    """The kohya key of a module, without the ending of the tensor. Examples stand at the top of this file.

    Args:
        module: Name of the module in Diffusers.
        network: "unet", "transformer", "text_encoder" or "text_encoder_2".
        kind: Kind of the base, a key of KINDS.
        blocks: The blocks of an SDXL UNet, by which its modules are numbered.

    Raises:
        UnlearnError: an SDXL UNet with these blocks has no such module.
    """
    if network == "transformer":
        return f"transformer.{module}"
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
    if adapter.network == "transformer":
        return transformer_tensors(adapter)
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


def transformer_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """The weights of a transformer's adapter under Diffusers' names, which ComfyUI reads as well.

    The scale is multiplied into B (in float32): of both readers, one knows no alpha and the other no header. DoRA's
    magnitudes are included.
    """
    tensors: dict[str, Tensor] = {}
    for pair in adapter.pairs:
        key, scale = module_key(pair.module, adapter.network), pair.alpha / pair.rank
        tensors[f"{key}.lora_A.weight"] = pair.down.contiguous()
        up = pair.up if scale == 1 else (pair.up.double() * scale).float()
        tensors[f"{key}.lora_B.weight"] = up.contiguous()
        if pair.magnitude is not None:
            tensors[f"{key}.lora_magnitude_vector"] = pair.magnitude
    return tensors


def _text_module(module: str) -> str:
    return module if module == "text_projection" else "text_model." + module.removeprefix("text_model.")


def _pair(name: str, change: Change, settings: PeftSettings, path: Path) -> LoraPair:
    """The pair of a module. name: as in PEFT's files."""
    module, parts = name.removeprefix(PEFT_PREFIX), dict(change.parts)
    magnitude = parts.pop("magnitude", None)
    if module == name or parts.keys() != {"down", "up"}:
        raise UnlearnError(f'{path}: "{name}" is not a LoRA that PEFT trained, so it cannot be exported. Train again.')
    down, up = parts["down"], parts["up"]
    if down.shape[0] != up.shape[1]:
        raise UnlearnError(
            f'{path}: "{module}" has rank {down.shape[0]} (down) and {up.shape[1]} (up). Train the run again.'
        )
    if (magnitude is not None) != settings.use_dora:
        article, state = ("no", "on") if magnitude is None else ("a", "off")
        raise UnlearnError(
            f'{path}: "{module}" has {article} magnitude_vector, but DoRA (use_dora) is {state} in {PEFT_CONFIG}. '
            "Train the run again."
        )
    return LoraPair(module, down, up, settings.alpha_of(module, down.shape[0], str(path)), magnitude)
