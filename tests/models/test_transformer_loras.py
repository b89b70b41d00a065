"""LoRA files of transformers in the spellings of all trainers: every module's change is what the file says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_kinds import make_chat_kind
from flow_kinds import KIND_OF, make_flux, make_sd3, make_vae
from safetensors.torch import save_file
from torch import Tensor

from sd_unlearn.errors import UnlearnError
from sd_unlearn.models.lora_change import apply_changes, find_modules
from sd_unlearn.models.lora_file import read_lora_file
from sd_unlearn.models.transformer_keys import diffusers_weights, original_weights

pytestmark = pytest.mark.usefixtures("one_thread")
Pairs = dict[str, tuple[Tensor, Tensor, float]]  # module -> down, up and alpha
NAMES = ("sd35", "flux-dev", "z-image", "flux2-dev", "qwen-image")


@pytest.fixture(scope="module")
def pipelines() -> dict[str, Any]:
    chat = {name: make_chat_kind(name, make_vae("flux")) for name in ("z-image", "flux2-dev", "qwen-image")}
    return {"sd35": make_sd3("sd35"), "flux-dev": make_flux("flux-dev"), **chat}


def pairs_of(weights: dict[str, Tensor]) -> Pairs:
    """A LoRA of every matrix; ranks and alphas differ. weights: their state dict."""
    torch.manual_seed(0)
    pairs = {}
    matrices = {n.removesuffix(".weight"): w for n, w in weights.items() if n.endswith(".weight") and w.ndim == 2}
    for n, (name, weight) in enumerate(matrices.items()):
        rank = 1 + n % 4
        pairs[name] = torch.randn(rank, weight.shape[1]), torch.randn(len(weight), rank), (0.5, 1.0, 3.0)[n % 3]
    return pairs


def delta(pair: tuple[Tensor, Tensor, float]) -> Tensor:
    down, up, alpha = pair
    return alpha / len(down) * (up @ down)


def kohya(pairs: Pairs, prefix: str) -> dict[str, Tensor]:
    tensors = {}
    for name, (down, up, alpha) in pairs.items():
        key = prefix + name.replace(".", "_")
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(alpha)}
    return tensors


def dotted(pairs: Pairs, prefix: str) -> dict[str, Tensor]:
    """Without an alpha: the scale is in B, as exports have it."""
    tensors = {}
    for name, (down, up, alpha) in pairs.items():
        tensors |= {f"{prefix}{name}.lora_A.weight": down, f"{prefix}{name}.lora_B.weight": alpha / len(down) * up}
    return tensors


SPELLINGS: dict[str, tuple[bool, Callable[[Pairs, str], dict[str, Tensor]], str]] = {  # in the original layout?
    "Diffusers, exports": (False, dotted, "transformer."),
    "Diffusers, bare": (False, dotted, ""),
    "OneTrainer": (False, kohya, "lora_transformer_"),
    "SimpleTuner": (False, kohya, "lycoris_"),
    "kohya": (True, kohya, "lora_unet_"),
    "original code": (True, dotted, "diffusion_model."),
    "Diffusers' names with the original code's prefix": (False, dotted, "diffusion_model."),
    "original code, bare": (True, dotted, ""),
}


@torch.no_grad()
def changed(pipeline: Any, file: Path) -> dict[str, Tensor]:
    """The transformer's weights with the file at strength 1; checks that the base is restored."""
    transformer = pipeline.transformer
    before = {name: value.clone() for name, value in transformer.state_dict().items()}
    targets = find_modules(pipeline, read_lora_file(file, "--lora").changes, "--lora", "the base")
    with apply_changes(targets, 1.0, "--lora"):
        after = {name: value.clone() for name, value in transformer.state_dict().items()}
    assert all(torch.equal(value, before[name]) for name, value in transformer.state_dict().items())
    return after


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", NAMES)
def test_every_module_of_every_spelling_is_changed(
    pipelines: dict[str, Any], tmp_path: Path, name: str, spelling: str
) -> None:
    kind, pipeline = KIND_OF[name], pipelines[name]
    is_original, spell, prefix = SPELLINGS[spelling]
    state = pipeline.transformer.state_dict()
    own = original_weights(kind, state) if is_original else state
    pairs = pairs_of(own)
    want = own | {f"{module}.weight": own[f"{module}.weight"] + delta(pair) for module, pair in pairs.items()}
    if is_original:  # the reader of single files, which diffusers' converter checks
        want = diffusers_weights(kind, {key: tuple(value.shape) for key, value in state.items()}, want)
    save_file(spell(pairs, prefix), tmp_path / "a.safetensors")
    after = changed(pipeline, tmp_path / "a.safetensors")
    moved = [key for key in state if not torch.equal(after[key], state[key])]
    assert len(moved) == sum(key.endswith(".weight") and value.ndim == 2 for key, value in state.items())
    for key, value in want.items():
        assert torch.allclose(after[key], value, atol=1e-6), key


def test_the_text_encoders_of_kohya_are_found(pipelines: dict[str, Any], tmp_path: Path) -> None:
    pipeline = pipelines["sd35"]
    modules = {
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj": (pipeline.text_encoder, "self_attn.q_proj"),
        "lora_te2_text_model_encoder_layers_1_mlp_fc1": (pipeline.text_encoder_2, "layers.1.mlp.fc1"),
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q": (pipeline.text_encoder_3, "SelfAttention.q"),
    }
    tensors: dict[str, Tensor] = {}
    wanted = []
    for key, (encoder, end) in modules.items():
        wanted.append(next(module for name, module in encoder.named_modules() if name.endswith(end)))
        rows, columns = wanted[-1].weight.shape
        tensors |= {f"{key}.lora_down.weight": torch.ones(1, columns), f"{key}.lora_up.weight": torch.ones(rows, 1)}
    save_file(tensors, tmp_path / "a.safetensors")
    targets = find_modules(pipeline, read_lora_file(tmp_path / "a.safetensors", "").changes, "", "")
    assert {target.name: target.module for target in targets} == dict(zip(modules, wanted, strict=True))


def test_a_fused_module_of_another_width_and_a_module_changed_twice_are_refused(
    pipelines: dict[str, Any], tmp_path: Path
) -> None:
    pipeline, key = pipelines["flux-dev"], "lora_unet_double_blocks_0_img_attn_qkv"
    down, up = torch.ones(2, 16), torch.ones(48, 2)
    own = {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
    query = "transformer.transformer_blocks.0.attn.to_q"
    for change, says in (
        ({f"{key}.lora_up.weight": torch.ones(47, 2)}, r"img_attn_qkv: the change has the shape \[47, 16\]"),
        (
            {f"{query}.lora_A.weight": down.clone(), f"{query}.lora_B.weight": torch.ones(16, 2)},
            "changes one module twice",
        ),
    ):
        save_file(own | change, tmp_path / "a.safetensors")
        with pytest.raises(UnlearnError, match=says):
            find_modules(pipeline, read_lora_file(tmp_path / "a.safetensors", "--lora").changes, "--lora", "tiny")
