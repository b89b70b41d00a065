"""What a file is, told from names and shapes."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from kinds import KINDS, Kinds, original_names
from safetensors.torch import save_file

from sd_unlearn.errors import UsageError
from sd_unlearn.models.checkpoint_header import (
    CheckpointHeader,
    check_vae_file,
    kind_of_file,
    prediction_of_file,
    read_checkpoint_header,
)

OPTION = "--pretrained_model_name_or_path"
UNET = "model.diffusion_model."
QKV = "double_blocks.0.img_attn.qkv"
FLUX = {f"{QKV}.weight": (9216, 3072), "double_blocks.0.img_attn.norm.query_norm.scale": (128,)}
SD3 = {"joint_blocks.0.x_block.attn.qkv.weight": (4608, 1536)}


def real(kind: str, **changes: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Shapes as published checkpoints have them, of the tensors that tell a kind."""
    width, block = {"sd1": (768, "1.1"), "sd2": (1024, "1.1"), "sdxl": (2048, "4.1")}[kind]
    shapes: dict[str, tuple[int, ...]] = {
        f"{UNET}input_blocks.0.0.weight": (320, 4, 3, 3),
        f"{UNET}input_blocks.{block}.proj_in.weight": (320, 320, 1, 1) if kind == "sd1" else (320, 320),
        f"{UNET}input_blocks.{block}.transformer_blocks.0.attn2.to_k.weight": (320, width),
        "first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3),
        "cond_stage_model.transformer.text_model.final_layer_norm.weight": (768,),
    }
    if kind == "sdxl":
        shapes |= {
            f"{UNET}label_emb.0.0.weight": (1280, 2816),
            "conditioner.embedders.1.model.ln_final.weight": (1280,),
        }
    return shapes | changes


def header(shapes: dict[str, tuple[int, ...]], **metadata: str) -> CheckpointHeader:
    return CheckpointHeader(
        Path("some.safetensors"), shapes, {f"modelspec.{key}": value for key, value in metadata.items()}
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_kind_of_published_and_of_narrow_models(kinds: Kinds, kind: str) -> None:
    published = header(real(kind))
    assert kind_of_file(published) == kind
    assert published.text_width == {"sd1": 768, "sd2": 1024, "sdxl": 2048}[kind]
    narrow = read_checkpoint_header(kinds.file(kind), OPTION)
    assert kind_of_file(narrow) == kind
    assert narrow.shapes == {name: tuple(value.shape) for name, value in original_names(kinds.pipeline(kind)).items()}


@pytest.mark.parametrize("prefix", ["", UNET])
def test_the_kind_of_transformers(prefix: str) -> None:
    assert kind_of_file(header({f"{prefix}{name}": shape for name, shape in SD3.items()})) == "sd3"
    flux = FLUX | {"img_in.weight": (3072, 64)}
    assert kind_of_file(header({f"{prefix}{name}": shape for name, shape in flux.items()})) == "flux"
    klein = FLUX | {"double_stream_modulation_img.lin.weight": (18432, 3072)}
    assert kind_of_file(header({f"{prefix}{name}": shape for name, shape in klein.items()})) == "flux2-klein"
    flux2 = klein | {"guidance_in.in_layer.weight": (6144, 256)}
    assert kind_of_file(header({f"{prefix}{name}": shape for name, shape in flux2.items()})) == "flux2"
    qwen = {"transformer_blocks.0.img_mod.1.weight": (18432, 3072)}
    assert kind_of_file(header({f"{prefix}{name}": shape for name, shape in qwen.items()})) == "qwen-image"
    z_image = {"noise_refiner.0.attention.qkv.weight": (11520, 3840), "x_pad_token": (1, 3840)}
    assert kind_of_file(header({f"{prefix}{name}": shape for name, shape in z_image.items()})) == "z-image"


@pytest.mark.parametrize(
    ("shapes", "named"),
    [
        ({"lora_unet_down_blocks_0.lora_up.weight": (8, 4)}, "a LoRA"),
        ({"unet.down_blocks.0.attn1.to_q.lora_A.weight": (8, 4)}, "a LoRA"),
        (real("sd1") | {"control_model.time_embed.0.weight": (1280, 320)}, "a ControlNet"),
        (FLUX | {"distilled_guidance_layer.in_proj.weight": (5120, 64)}, "a Chroma model"),
        (FLUX | {"txt_in.individual_token_refiner.blocks.0.mlp.fc1.bias": (1,)}, "a HunyuanVideo model"),
        (FLUX | {"img_in.weight": (3072, 384)}, r"a FLUX model that takes 384 channels \(Fill"),
        ({f"{QKV}.weight.quant_state.bitsandbytes__nf4": (1,)}, "quantized .* by bitsandbytes"),
        ({"transformer_blocks.0.qkv_proj.qweight": (1,)}, "quantized for Nunchaku"),
        ({"transformer_blocks.0.attn.to_q.weight": (8, 8)}, "one network of a diffusers folder"),
        ({"noise_refiner.0.attention.to_q.weight": (8, 8)}, "one network of a diffusers folder"),  # Z-Image
        (real("sd1") | {f"{UNET}input_blocks.0.0.weight": (320, 9, 3, 3)}, "an inpainting model"),
        (real("sd1") | {f"{UNET}input_blocks.0.0.weight": (320, 8, 3, 3)}, "an InstructPix2Pix model"),
        (real("sd1") | {f"{UNET}input_blocks.0.0.weight": (320, 7, 3, 3)}, "7 channels"),
        (real("sdxl") | {f"{UNET}input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (320, 1280)}, "the refiner"),
        ({k: v for k, v in real("sdxl").items() if "embedders.1" not in k}, "a UNet without its second text encoder"),
        ({k: v for k, v in real("sdxl").items() if k.startswith(UNET)}, "a UNet without its text encoder"),
        ({"first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3)}, "only a VAE: use it with --vae"),
        ({"down_blocks.0.resnets.0.conv1.weight": (320, 320, 3, 3)}, "one network of a diffusers folder"),
        (real("sdxl") | {"edm_mean": (1, 4, 1, 1), "edm_std": (1, 4, 1, 1)}, "Playground 2.5 model, .* EDM schedule"),
        (real("sdxl") | {"edm_vpred.sigma_max": ()}, "a model with an EDM schedule"),
        ({"something": (1,)}, "not a checkpoint of Stable Diffusion"),
        ({k: v for k, v in real("sd1").items() if "cond_stage" not in k}, "a UNet without its text encoder"),
    ],
)
def test_what_is_no_base_is_named(shapes: dict[str, tuple[int, ...]], named: str) -> None:
    with pytest.raises(UsageError, match=rf"{OPTION} some\.safetensors .*{named}"):
        kind_of_file(header(shapes))


@pytest.mark.parametrize(
    ("kind", "metadata", "extra", "predicts"),
    [
        ("sd1", {}, {}, "epsilon"),
        ("sdxl", {}, {}, "epsilon"),
        ("sd2", {}, {}, None),
        ("sd2", {"architecture": "stable-diffusion-v2-768-v"}, {}, "v_prediction"),
        ("sd2", {"architecture": "stable-diffusion-v2-512"}, {}, "epsilon"),
        ("sd2", {"prediction_type": "v"}, {}, "v_prediction"),
        ("sd2", {"prediction_type": "epsilon"}, {}, "epsilon"),
        ("sd1", {"prediction_type": "v"}, {}, "v_prediction"),
        ("sdxl", {"architecture": "stable-diffusion-xl-v1-base"}, {}, "epsilon"),
        ("sdxl", {}, {"v_pred": (0,)}, "v_prediction"),
    ],
)
def test_what_a_file_predicts(
    kind: str, metadata: dict[str, str], extra: dict[str, tuple[int, ...]], predicts: str | None
) -> None:
    assert prediction_of_file(header(real(kind) | extra, **metadata), kind) == predicts


def test_pickles_are_opened_when_asked_and_then_for_tensors_only(kinds: Kinds, tmp_path: Path) -> None:
    tensors, path = original_names(kinds.pipeline("sd1")), tmp_path / "model.ckpt"
    torch.save({"state_dict": tensors, "epoch": 3}, path)
    with pytest.raises(UsageError, match=r"is a pickle.*can run code.*--allow_pickle"):
        read_checkpoint_header(path, OPTION)
    assert read_checkpoint_header(path, OPTION, allow_pickle=True).shapes == {
        k: tuple(v.shape) for k, v in tensors.items()
    }

    class Malice:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return Path.touch, (tmp_path / "ran",)

    path.write_bytes(pickle.dumps({"state_dict": Malice()}))
    with pytest.raises(UsageError, match="more than tensors or is damaged"):
        read_checkpoint_header(path, OPTION, allow_pickle=True)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("held", [torch.zeros(3), [1, 2], {"state_dict": [1, 2]}])
def test_pickles_that_hold_no_named_tensors(tmp_path: Path, held: object) -> None:
    torch.save(held, tmp_path / "model.ckpt")
    with pytest.raises(UsageError, match=r"--vae .*model\.ckpt holds a (Tensor|list), not named tensors"):
        read_checkpoint_header(tmp_path / "model.ckpt", "--vae", allow_pickle=True)


def test_damaged_and_foreign_files(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"no header")
    with pytest.raises(UsageError, match=r"a\.safetensors cannot be read"):
        read_checkpoint_header(tmp_path / "a.safetensors", OPTION)
    for name in ("a.gguf", "a"):
        with pytest.raises(UsageError, match=r"not a weights file: \.safetensors is needed"):
            read_checkpoint_header(tmp_path / name, OPTION)


def test_what_a_header_says(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"decoder.conv_in.weight": torch.zeros(3)}, path, {"modelspec.architecture": "x"})
    found = read_checkpoint_header(path, "--vae")
    assert (found.shapes, found.metadata) == ({"decoder.conv_in.weight": (3,)}, {"modelspec.architecture": "x"})
    check_vae_file(found)
    with pytest.raises(UsageError, match="--vae .* holds no VAE"):
        check_vae_file(header({"something": (1,)}))
