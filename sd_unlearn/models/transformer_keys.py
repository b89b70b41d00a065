"""Rename the weights of transformers to the layout of their original single files, and back.

ComfyUI and Forge read checkpoints in this layout, and many trainers name the modules of a LoRA by it. Some modules of
Diffusers are one module there, whose rows are theirs in sequence:

    transformer_blocks.0.attn.to_q, to_k, to_v    joint_blocks.0.x_block.attn.qkv (SD 3)
                                                  double_blocks.0.img_attn.qkv (FLUX)
    layers.0.attention.to_q, to_k, to_v           layers.0.attention.qkv (Z-Image)

The final modulation is (shift, scale) there and (scale, shift) in Diffusers. In SD 3 that of the context in the last
block is, too.
Diffusers' from_single_file does the reverse; the tests check that each undoes the other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sd_unlearn.errors import UnlearnError

# Name in the original layout -> names in Diffusers. Those of the blocks have "{}" for the number of the block.
_EMBEDDER = "time_text_embed.timestep_embedder.linear_"
_POOLED, _GUIDANCE = "time_text_embed.text_embedder.linear_", "time_text_embed.guidance_embedder.linear_"
_FINAL = {"final_layer.linear": "proj_out", "final_layer.adaLN_modulation.1": "norm_out.linear"}
_FLUX2 = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    **_FINAL,
}
_LAYOUTS: dict[str, dict[str, str]] = {
    "sd3": {
        "x_embedder.proj": "pos_embed.proj",
        "t_embedder.mlp.0": f"{_EMBEDDER}1",
        "t_embedder.mlp.2": f"{_EMBEDDER}2",
        "y_embedder.mlp.0": f"{_POOLED}1",
        "y_embedder.mlp.2": f"{_POOLED}2",
        "context_embedder": "context_embedder",
        **_FINAL,
    },
    "flux": {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "time_in.in_layer": f"{_EMBEDDER}1",
        "time_in.out_layer": f"{_EMBEDDER}2",
        "vector_in.in_layer": f"{_POOLED}1",
        "vector_in.out_layer": f"{_POOLED}2",
        "guidance_in.in_layer": f"{_GUIDANCE}1",
        "guidance_in.out_layer": f"{_GUIDANCE}2",
        **_FINAL,
    },
    "flux2": _FLUX2,
    "flux2-klein": _FLUX2,
    "z-image": {
        "x_embedder": "all_x_embedder.2-1",
        "final_layer.linear": "all_final_layer.2-1.linear",
        "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
        **{name: name for name in ("t_embedder.mlp.0", "t_embedder.mlp.2", "cap_embedder.0", "cap_embedder.1")},
    },
}
# Parameters that are not the weight or bias of a module.
_CONSTANTS = {"pos_embed": "pos_embed.pos_embed", "x_pad_token": "x_pad_token", "cap_pad_token": "cap_pad_token"}
_CONTEXT = "attn.add_q_proj attn.add_k_proj attn.add_v_proj"
_FLUX2_BLOCKS = {
    ("double_blocks", "transformer_blocks"): {
        "img_attn.qkv": "attn.to_q attn.to_k attn.to_v",
        "img_attn.norm.query_norm": "attn.norm_q",
        "img_attn.norm.key_norm": "attn.norm_k",
        "img_attn.proj": "attn.to_out.0",
        "img_mlp.0": "ff.linear_in",
        "img_mlp.2": "ff.linear_out",
        "txt_attn.qkv": _CONTEXT,
        "txt_attn.norm.query_norm": "attn.norm_added_q",
        "txt_attn.norm.key_norm": "attn.norm_added_k",
        "txt_attn.proj": "attn.to_add_out",
        "txt_mlp.0": "ff_context.linear_in",
        "txt_mlp.2": "ff_context.linear_out",
    },
    ("single_blocks", "single_transformer_blocks"): {
        "linear1": "attn.to_qkv_mlp_proj",
        "linear2": "attn.to_out",
        "norm.query_norm": "attn.norm_q",
        "norm.key_norm": "attn.norm_k",
    },
}
_Z_IMAGE_BLOCK = {
    "attention.qkv": "attention.to_q attention.to_k attention.to_v",
    "attention.out": "attention.to_out.0",
    "attention.q_norm": "attention.norm_q",
    "attention.k_norm": "attention.norm_k",
    "adaLN_modulation.0": "adaLN_modulation.0",
    **{name: name for name in ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")},
    **{name: name for name in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")},
}
_BLOCKS: dict[str, dict[tuple[str, str], dict[str, str]]] = {  # (original, Diffusers) name of a list of blocks
    "sd3": {
        ("joint_blocks", "transformer_blocks"): {
            "x_block.attn.qkv": "attn.to_q attn.to_k attn.to_v",
            "x_block.attn.ln_q": "attn.norm_q",
            "x_block.attn.ln_k": "attn.norm_k",
            "x_block.attn.proj": "attn.to_out.0",
            "x_block.attn2.qkv": "attn2.to_q attn2.to_k attn2.to_v",
            "x_block.attn2.ln_q": "attn2.norm_q",
            "x_block.attn2.ln_k": "attn2.norm_k",
            "x_block.attn2.proj": "attn2.to_out.0",
            "x_block.adaLN_modulation.1": "norm1.linear",
            "x_block.mlp.fc1": "ff.net.0.proj",
            "x_block.mlp.fc2": "ff.net.2",
            "context_block.attn.qkv": _CONTEXT,
            "context_block.attn.ln_q": "attn.norm_added_q",
            "context_block.attn.ln_k": "attn.norm_added_k",
            "context_block.attn.proj": "attn.to_add_out",
            "context_block.adaLN_modulation.1": "norm1_context.linear",
            "context_block.mlp.fc1": "ff_context.net.0.proj",
            "context_block.mlp.fc2": "ff_context.net.2",
        },
    },
    "flux": {
        ("double_blocks", "transformer_blocks"): {
            "img_attn.qkv": "attn.to_q attn.to_k attn.to_v",
            "img_attn.norm.query_norm": "attn.norm_q",
            "img_attn.norm.key_norm": "attn.norm_k",
            "img_attn.proj": "attn.to_out.0",
            "img_mod.lin": "norm1.linear",
            "img_mlp.0": "ff.net.0.proj",
            "img_mlp.2": "ff.net.2",
            "txt_attn.qkv": _CONTEXT,
            "txt_attn.norm.query_norm": "attn.norm_added_q",
            "txt_attn.norm.key_norm": "attn.norm_added_k",
            "txt_attn.proj": "attn.to_add_out",
            "txt_mod.lin": "norm1_context.linear",
            "txt_mlp.0": "ff_context.net.0.proj",
            "txt_mlp.2": "ff_context.net.2",
        },
        ("single_blocks", "single_transformer_blocks"): {
            "linear1": "attn.to_q attn.to_k attn.to_v proj_mlp",
            "linear2": "proj_out",
            "norm.query_norm": "attn.norm_q",
            "norm.key_norm": "attn.norm_k",
            "modulation.lin": "norm.linear",
        },
    },
    "flux2": _FLUX2_BLOCKS,
    "flux2-klein": _FLUX2_BLOCKS,
    "z-image": {(name, name): _Z_IMAGE_BLOCK for name in ("layers", "noise_refiner", "context_refiner")},
}


@dataclass(frozen=True)
class Rows:
    """Where the rows of a module of Diffusers are in a module of the original layout."""

    module: str  # of Diffusers
    start: int
    stop: int
    total: int  # rows of the module of the original layout
    swapped: bool = False  # the first half of the rows is the second here

    @property
    def is_whole(self) -> bool:
        """Whether the module is the same in both layouts."""
        return self.stop - self.start == self.total and not self.swapped

    def of(self, fused: Tensor) -> Tensor:
        """The rows of this module in a tensor [all rows, ...] of the original layout."""
        return swap(fused[self.start : self.stop]) if self.swapped else fused[self.start : self.stop]


def swap(rows: Tensor) -> Tensor:
    """Exchange the halves of a tensor [2 N, ...]: (shift, scale) and (scale, shift)."""
    return torch.cat(rows.chunk(2)[::-1])


def original_modules(kind: str, rows: Mapping[str, int]) -> dict[str, list[Rows]]:
    """The modules of the original layout, and what is in each. kind: one with a transformer.

    rows: the rows of the weight of each module of the transformer in Diffusers.
    """
    found: dict[str, list[Rows]] = {}
    for original, modules in _names(kind, rows):
        if not set(modules) <= rows.keys():
            continue
        start, total = 0, sum(rows[module] for module in modules)
        found[original] = []
        for module in modules:
            stop = start + rows[module]
            found[original].append(Rows(module, start, stop, total, _is_swapped(kind, module, rows)))
            start = stop
    return found


def _names(kind: str, modules: Iterable[str]) -> Iterable[tuple[str, Sequence[str]]]:
    if kind not in _LAYOUTS:  # Qwen-Image, which has the same names in both
        yield from ((module, (module,)) for module in modules)
        return
    for original, module in _LAYOUTS[kind].items():
        yield original, (module,)
    for (new, old), names in _BLOCKS[kind].items():
        for number in sorted({int(match[1]) for name in modules if (match := re.match(rf"{old}\.(\d+)\.", name))}):
            for original, inner in names.items():
                yield f"{new}.{number}.{original}", [f"{old}.{number}.{name}" for name in inner.split()]


def _is_swapped(kind: str, module: str, modules: Mapping[str, int]) -> bool:
    if module == "norm_out.linear":
        return kind in _LAYOUTS
    block = re.fullmatch(r"transformer_blocks\.(\d+)\.norm1_context\.linear", module)
    if block is None or kind != "sd3":
        return False
    return f"transformer_blocks.{int(block[1]) + 1}.norm1.linear" not in modules


def _parameter(original: str, name: str) -> str:
    """The name of a parameter: FLUX calls the weight of a norm `scale`."""
    return f"{original}.scale" if original.endswith(("query_norm", "key_norm")) else f"{original}.{name}"


def original_weights(kind: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a transformer in the original layout, without a prefix. state: those of Diffusers.

    Raises:
        UnlearnError: the layout has no name for a weight.
    """
    left, weights = dict(state), dict[str, Tensor]()
    weights |= {original: left.pop(name) for original, name in _CONSTANTS.items() if name in left}
    rows = {name.removesuffix(".weight"): len(value) for name, value in state.items() if name.endswith(".weight")}
    for original, parts in original_modules(kind, rows).items():
        for name in ("weight", "bias"):
            if f"{parts[0].module}.{name}" in left:
                values = [left.pop(f"{part.module}.{name}") for part in parts]
                weights[_parameter(original, name)] = torch.cat(
                    [swap(value) if part.swapped else value for part, value in zip(parts, values, strict=True)]
                )
    if left:
        raise UnlearnError(
            f'The transformer\'s "{next(iter(left))}" has no name in the layout of single files, so it cannot be '
            "written. Write a folder instead, or choose a run on a published model."
        )
    return weights


def diffusers_weights(
    kind: str, shapes: Mapping[str, Sequence[int]], weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The reverse of `original_weights`. shapes: of the transformer's weights in Diffusers.

    Raises:
        UnlearnError: a weight is missing, or there is one too many.
    """
    left, state = dict(weights), dict[str, Tensor]()
    state |= {n: left.pop(original) for original, n in _CONSTANTS.items() if original in left and n in shapes}
    rows = {name.removesuffix(".weight"): shape[0] for name, shape in shapes.items() if name.endswith(".weight")}
    for original, parts in original_modules(kind, rows).items():
        for name in ("weight", "bias"):
            if f"{parts[0].module}.{name}" not in shapes:
                continue
            fused = left.pop(_parameter(original, name), None)
            if fused is None:
                raise UnlearnError(f"it lacks {_parameter(original, name)}")
            state |= {f"{part.module}.{name}": part.of(fused).contiguous() for part in parts}
    if left:
        raise UnlearnError(f"it holds {len(left)} tensors too many, e.g. {next(iter(left))}")
    for name, value in state.items():
        if tuple(value.shape) != tuple(shapes[name]):
            raise UnlearnError(f"{name} has the shape {list(value.shape)} instead of {list(shapes[name])}")
    return state
