"""LoRA files of others: every module's change is what the file says, or the file is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from kinds import Kinds
from safetensors.torch import save_file
from torch import Tensor

from sd_unlearn.errors import UnlearnError, UsageError
from sd_unlearn.models.base import Base, load_base
from sd_unlearn.models.ldm_keys import blocks_of, unet_key
from sd_unlearn.models.lora_change import apply_changes, find_modules
from sd_unlearn.models.lora_file import read_lora_file

pytestmark = pytest.mark.usefixtures("one_thread")
Weights = dict[str, Tensor]  # network/module -> weight or change
WHERE = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
KEY = "lora_unet_" + WHERE.replace(".", "_")


def modules_of(base: Base, networks: tuple[str, ...] = ("unet", "text_encoder")) -> Weights:
    """The weights that a LoRA can be of: matrices and convolutions, except embeddings."""
    return {
        f"{network}/{name}": module.weight.detach().clone()
        for network in networks
        for name, module in getattr(base.pipeline, network).named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    }


def pairs_of(weights: Weights) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Module -> down, up and alpha. Ranks and alphas differ, as tools that resize LoRAs write them."""
    torch.manual_seed(0)
    pairs = {}
    for n, (name, weight) in enumerate(weights.items()):
        rank = 1 + n % 4
        up = 0.1 * torch.randn(weight.shape[0], rank, *([1, 1] if weight.ndim == 4 else []))
        pairs[name] = 0.1 * torch.randn(rank, *weight.shape[1:]), up, (0.5, 1.0, 3.0)[n % 3]
    return pairs


def expected(pairs: dict[str, tuple[Tensor, Tensor, float]], weights: Weights) -> Weights:
    return {
        name: alpha / len(down) * (up.flatten(1).double() @ down.flatten(1).double()).view(weights[name].shape)
        for name, (down, up, alpha) in pairs.items()
    }


def changes_of(base: Base, file: Path, strength: float = 1.0) -> Weights:
    """What the file changes in the base; checks that the base is restored bit by bit."""
    before = modules_of(base)
    read = read_lora_file(file, "--lora")
    with apply_changes(find_modules(base.pipeline, read.changes, "--lora", base.name), strength, "--lora"):
        after = modules_of(base)
    assert all(torch.equal(before[name], weight) for name, weight in modules_of(base).items())
    return {name: after[name].double() - before[name].double() for name in before}


def kohya_key(name: str) -> str:
    network, module = name.split("/")
    if network == "unet":
        return "lora_unet_" + module.replace(".", "_")
    return "lora_te_text_model_" + module.removeprefix("text_model.").replace(".", "_")


def write_kohya(pairs: dict[str, tuple[Tensor, Tensor, float]], file: Path, base: Base) -> None:
    tensors: Weights = {}
    for name, (down, up, alpha) in pairs.items():
        key = kohya_key(name)
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(alpha)}
    save_file(tensors, file)


def write_ldm(pairs: dict[str, tuple[Tensor, Tensor, float]], file: Path, base: Base) -> None:
    """kohya's names with the LDM layout's modules."""
    blocks = blocks_of(base.pipeline.unet.config)
    tensors: Weights = {}
    for name, (down, up, alpha) in pairs.items():
        network, module = name.split("/")
        ldm = "lora_unet_" + unet_key(module, blocks).replace(".", "_") if network == "unet" else kohya_key(name)
        tensors |= {f"{ldm}.lora_down.weight": down, f"{ldm}.lora_up.weight": up, f"{ldm}.alpha": torch.tensor([alpha])}
    save_file(tensors, file)


def write_diffusers(pairs: dict[str, tuple[Tensor, Tensor, float]], file: Path, base: Base) -> None:
    """Ranks and alphas in the header."""
    tensors: Weights = {}
    settings: dict[str, object] = {}
    for name, (down, up, _) in pairs.items():
        tensors |= {f"{name.replace('/', '.')}.lora_A.weight": down, f"{name.replace('/', '.')}.lora_B.weight": up}
    for network in ("unet", "text_encoder"):
        own = {name.split("/")[1]: pair for name, pair in pairs.items() if name.startswith(f"{network}/")}
        settings |= {f"{network}.r": 1, f"{network}.lora_alpha": 1}
        settings[f"{network}.rank_pattern"] = {module: len(down) for module, (down, _, _) in own.items()}
        settings[f"{network}.alpha_pattern"] = {module: alpha for module, (_, _, alpha) in own.items()}
    save_file(tensors, file, {"lora_adapter_metadata": json.dumps(settings)})


def write_former_diffusers(pairs: dict[str, tuple[Tensor, Tensor, float]], file: Path, base: Base) -> None:
    """Names of the former training scripts, alpha as tensors."""
    tensors: Weights = {}
    for name, (down, up, alpha) in pairs.items():
        key = name.replace("/", ".")
        tensors |= {f"{key}.lora.down.weight": down, f"{key}.lora.up.weight": up, f"{key}.alpha": torch.tensor(alpha)}
    save_file(tensors, file)


def write_peft(pairs: dict[str, tuple[Tensor, Tensor, float]], file: Path, base: Base) -> None:
    own = {name.split("/")[1]: pair for name, pair in pairs.items()}
    tensors = {}
    for module, (down, up, _) in own.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = down
        tensors[f"base_model.model.{module}.lora_B.weight"] = up
    save_file(tensors, file)
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 1.0}
    settings["rank_pattern"] = {module: len(down) for module, (down, _, _) in own.items()}
    settings["alpha_pattern"] = {module: alpha for module, (_, _, alpha) in own.items()}
    (file.parent / "adapter_config.json").write_text(json.dumps(settings))


Writer = Callable[[dict[str, tuple[Tensor, Tensor, float]], Path, Base], None]


@pytest.mark.parametrize("write", [write_kohya, write_ldm, write_diffusers, write_former_diffusers, write_peft])
def test_every_module_changes_as_the_file_says(write: Writer, loaded_base: Base, tmp_path: Path) -> None:
    """UNet and text encoder, attention, feed-forward and convolutions; a rank and an alpha per module."""
    weights = modules_of(loaded_base)
    pairs = pairs_of(weights)
    write(pairs, tmp_path / "a.safetensors", loaded_base)
    right = expected(pairs, weights)
    assert len(right) > 60
    for strength in (1.0, 0.5):
        got = changes_of(loaded_base, tmp_path / "a.safetensors", strength)
        assert all(torch.allclose(got[name], strength * right[name], atol=1e-6) for name in right)


@pytest.mark.parametrize("kind", ["sd2", "sdxl"])
def test_files_of_other_kinds(kind: str, kinds: Kinds, tmp_path: Path) -> None:
    base = load_base(str(kinds.folder(kind)), device="cpu")
    weights = modules_of(base, ("unet",))
    pairs = pairs_of(weights)
    right = expected(pairs, weights)
    for number, write in enumerate((write_kohya, write_ldm, write_peft)):
        write(pairs, tmp_path / f"{number}.safetensors", base)
        got = changes_of(base, tmp_path / f"{number}.safetensors")
        assert all(torch.allclose(got[name], right[name], atol=1e-6) for name in right)


def test_both_text_encoders_of_sdxl(kinds: Kinds, tmp_path: Path) -> None:
    base = load_base(str(kinds.folder("sdxl")), device="cpu")
    module = "encoder.layers.0.self_attn.q_proj"
    for prefix, network in (("lora_te1_", "text_encoder"), ("lora_te2_", "text_encoder_2")):
        encoder = getattr(base.pipeline, network)
        weight = next(m.weight for name, m in encoder.named_modules() if name.endswith(module))
        difference = torch.ones_like(weight)
        key = f"{prefix}text_model_{module.replace('.', '_')}"
        save_file({f"{key}.diff": difference}, tmp_path / "a.safetensors")
        read, before = read_lora_file(tmp_path / "a.safetensors", "--lora"), weight.clone()
        with apply_changes(find_modules(base.pipeline, read.changes, "", ""), 1.0, ""):
            assert torch.allclose(weight, before + difference)
        assert torch.equal(weight, before)


def lycoris() -> dict[str, tuple[Weights, Callable[[Weights], Tensor]]]:
    """Tensors of a 8 x 8 weight and the change they stand for, by formulas written out here."""
    torch.manual_seed(1)
    a, b, c, d = torch.randn(8, 2), torch.randn(2, 8), torch.randn(8, 2), torch.randn(2, 8)
    w1, w2, p, q = torch.randn(2, 2), torch.randn(4, 4), torch.randn(4, 2), torch.randn(2, 4)
    half = {"alpha": torch.tensor(1.0)}  # rank 2
    return {
        "loha": (
            {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d} | half,
            lambda _: 0.5 * (a @ b) * (c @ d),
        ),
        "lokr": ({"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(9.0)}, lambda _: torch.kron(w1, w2)),
        "lokr-low-rank": (
            {"lokr_w1": w1, "lokr_w2_a": p, "lokr_w2_b": q} | half,
            lambda _: 0.5 * torch.kron(w1, p @ q),
        ),
        "difference": ({"diff": 2 * torch.ones(8, 8)}, lambda _: 2 * torch.ones(8, 8)),
    }


@pytest.mark.parametrize("kind", ["loha", "lokr", "lokr-low-rank", "difference"])
def test_lycoris(kind: str, loaded_base: Base, tmp_path: Path) -> None:
    tensors, right = lycoris()[kind]
    save_file({f"{KEY}.{end}": tensor for end, tensor in tensors.items()}, tmp_path / "a.safetensors")
    got = changes_of(loaded_base, tmp_path / "a.safetensors")
    assert torch.allclose(got.pop(f"unet/{WHERE}").float(), right(tensors), atol=1e-5)
    assert not any(change.any() for change in got.values())


def test_convolution_with_a_middle_matrix(loaded_base: Base, tmp_path: Path) -> None:
    """LoCon's three convolutions in a row are the convolution with the change."""
    name, conv = "mid_block.resnets.0.conv1", loaded_base.pipeline.unet.mid_block.resnets[0].conv1
    out, wide = conv.weight.shape[:2]
    torch.manual_seed(0)
    down, mid, up = torch.randn(2, wide, 1, 1), torch.randn(2, 2, 3, 3), torch.randn(out, 2, 1, 1)
    key = "lora_unet_" + name.replace(".", "_")
    tensors = {f"{key}.lora_{part}.weight": t for part, t in (("down", down), ("mid", mid), ("up", up))}
    save_file(tensors, tmp_path / "a.safetensors")
    change = changes_of(loaded_base, tmp_path / "a.safetensors")[f"unet/{name}"].float()
    x, conv2d = torch.randn(1, wide, 5, 5), torch.nn.functional.conv2d
    assert torch.allclose(conv2d(x, change), conv2d(conv2d(conv2d(x, down), mid), up), atol=1e-3)


def test_norms_and_biases(loaded_base: Base, tmp_path: Path) -> None:
    unet = loaded_base.pipeline.unet
    norm, conv = unet.conv_norm_out, unet.conv_in
    before = [t.clone() for t in (norm.weight, norm.bias, conv.weight, conv.bias)]
    changes = {
        "lora_unet_conv_norm_out.w_norm": torch.ones_like(norm.weight),
        "lora_unet_conv_norm_out.b_norm": 2 * torch.ones_like(norm.bias),
        "lora_unet_conv_in.diff_b": 3 * torch.ones_like(conv.bias),
    }
    save_file(changes, tmp_path / "a.safetensors")
    read = read_lora_file(tmp_path / "a.safetensors", "--lora")
    with apply_changes(find_modules(loaded_base.pipeline, read.changes, "", ""), 0.5, ""):
        after = [t.clone() for t in (norm.weight, norm.bias, conv.weight, conv.bias)]
    assert [float((x - y).mean().round(decimals=4)) for x, y in zip(after, before, strict=True)] == [0.5, 1.0, 0.0, 1.5]
    assert all(
        torch.equal(x, y) for x, y in zip((norm.weight, norm.bias, conv.bias), before[:2] + before[3:], strict=True)
    )


def test_dora_in_a_text_encoder(loaded_base: Base, tmp_path: Path) -> None:
    """Diffusers drops these magnitudes."""
    name = next(n for n in modules_of(loaded_base, ("text_encoder",)) if n.endswith("q_proj"))
    weight = modules_of(loaded_base)[name].double()
    torch.manual_seed(0)
    down, up, magnitude = torch.randn(2, 16), torch.randn(16, 2), torch.rand(16) + 1
    key = name.replace("/", ".")
    parts = {"lora_A.weight": down, "lora_B.weight": up, "lora_magnitude_vector": magnitude}
    save_file({f"{key}.{end}": t for end, t in parts.items()}, tmp_path / "a.safetensors")
    total = weight + up.double() @ down.double()
    right = magnitude.double()[:, None] * total / total.norm(dim=1, keepdim=True) - weight
    assert torch.allclose(changes_of(loaded_base, tmp_path / "a.safetensors")[name], right, atol=1e-5)


DOWN, UP = torch.ones(2, 8), torch.ones(8, 2)
PLAIN = {f"{KEY}.lora_down.weight": DOWN, f"{KEY}.lora_up.weight": UP, f"{KEY}.alpha": torch.tensor(2.0)}
NAN = float("nan")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({f"{KEY}.lora_up.weight": UP * NAN}, 'lora_up.weight" is not finite'),
        ({f"{KEY}.lora_down.weight": DOWN * float("inf")}, 'lora_down.weight" is not finite'),
        ({f"{KEY}.alpha": torch.tensor(NAN)}, 'alpha" is not finite'),
        ({f"{KEY}.alpha": torch.tensor(-float("inf"))}, 'alpha" is not finite'),
        ({f"{KEY}.lora_up.weight": UP.to(torch.float8_e4m3fn)}, "is float8_e4m3fn"),
        ({f"{KEY}.lora_up.weight": UP.bool()}, "is bool"),
        ({f"{KEY}.alpha": torch.tensor(2)}, 'alpha" is int64'),
        ({f"{KEY}.lora_up.weight": torch.tensor(1.0)}, r'lora_up.weight" has the shape \[\]'),
        ({f"{KEY}.lora_up.weight": torch.ones(8)}, r"has the shape \[8\]"),
        ({f"{KEY}.lora_up.weight": torch.ones(8, 0)}, r"has the shape \[8, 0\]"),
        ({f"{KEY}.alpha": torch.ones(2)}, r"has the shape \[2\]"),
        ({f"{KEY}.dora_scale": torch.ones(8, 1)}, "dora_scale.* a DoRA in kohya's format"),
        ({f"{KEY}.oft_blocks": torch.ones(2, 4, 4)}, "OFT"),
        ({f"{KEY}.a1.weight": torch.ones(2, 8)}, "GLoRA"),
        ({f"{KEY}.lora_B.bias": torch.ones(8)}, "a LoRA with a bias"),
        ({f"{KEY}.something": torch.ones(8)}, 'something" is not a tensor of a LoRA'),
        ({f"{KEY}.lora_A.weight": torch.ones(2, 8)}, "has both"),
        ({f"{KEY}.hada_w1_a": torch.ones(2, 8)}, "not a complete change"),
        ({f"{KEY.replace('to_q', 'to_k')}.lora_up.weight": UP.clone()}, "has only lora_up.weight"),
        ({f"{KEY.replace('to_q', 'to_k')}.alpha": torch.tensor(1.0)}, "has only alpha"),
    ],
)
def test_broken_and_unsupported_tensors_are_named(changed: Weights, message: str, tmp_path: Path) -> None:
    save_file(PLAIN | changed, tmp_path / "a.safetensors")
    with pytest.raises(UnlearnError, match=message):
        read_lora_file(tmp_path / "a.safetensors", "--lora")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lora_unet_nowhere.diff": torch.ones(2, 2)}, "lacks 1 of the 2 modules .* e.g. lora_unet_nowhere"),
        ({"lora_te3_encoder.diff": torch.ones(2, 2)}, "lacks 1 of the 2 modules .* e.g. lora_te3_encoder"),
        ({f"unet.{WHERE}.diff": torch.ones(8, 8)}, "changes one module twice"),
        ({f"{KEY}.lora_down.weight": torch.ones(2, 9)}, r"the change has the shape \[8, 9\]"),
        ({f"{KEY}.lora_down.weight": torch.ones(3, 8)}, "does not fit"),
        ({f"{KEY}.diff_b": torch.ones(8)}, "the change of the bias"),  # to_q has none
    ],
)
def test_what_the_base_lacks_is_refused(changed: Weights, message: str, loaded_base: Base, tmp_path: Path) -> None:
    save_file(PLAIN | changed, tmp_path / "a.safetensors")
    read = read_lora_file(tmp_path / "a.safetensors", "--lora")
    with pytest.raises(UnlearnError, match=message):
        find_modules(loaded_base.pipeline, read.changes, "--lora a", "the base")


def test_adapter_without_its_settings_is_refused(loaded_base: Base, tmp_path: Path) -> None:
    tensors = {f"base_model.model.{WHERE}.lora_{side}.weight": t for side, t in (("A", DOWN), ("B", UP))}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    file = tmp_path / "adapter_model.safetensors"
    with pytest.raises(UnlearnError, match="without its adapter_config.json"):
        read_lora_file(file, "--lora")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_rslora": True}
    for broken, message in (
        ({}, 'needs the key "r"'),
        ({**settings, "r": 3}, "has rank 2, but the settings say 3"),
        ({**settings, "peft_type": "LOHA"}, "only LORA"),
        ({**settings, "bias": "all"}, 'bias is "all"'),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(broken))
        with pytest.raises(UnlearnError, match=message):
            read_lora_file(file, "--lora")
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    right = 4 / 2**0.5 * UP @ DOWN
    assert torch.allclose(changes_of(loaded_base, file)[f"unet/{WHERE}"].float(), right, atol=1e-5)


def test_header_of_diffusers_that_is_damaged(tmp_path: Path) -> None:
    tensors = {f"unet.{WHERE}.lora_A.weight": DOWN, f"unet.{WHERE}.lora_B.weight": UP}
    for text in ("{", '{"unet.r": "two", "unet.lora_alpha": 1}'):
        save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": text})
        with pytest.raises(UnlearnError, match="lora_adapter_metadata"):
            read_lora_file(tmp_path / "a.safetensors", "--lora")


def test_any_case_of_the_suffix(tmp_path: Path) -> None:
    save_file(PLAIN, tmp_path / "A.SAFETENSORS")
    assert list(read_lora_file(tmp_path / "A.SAFETENSORS", "--lora").changes) == [KEY]
    with pytest.raises(UsageError, match="can run code"):
        read_lora_file(tmp_path / "a.ckpt", "--lora")
