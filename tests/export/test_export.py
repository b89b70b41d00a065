"""Every exported file, loaded into a new pipeline, must predict the noise of the trained network."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from export_runs import SLUG, exported, read_header, training_record, write_run
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sd_unlearn.config.objective import Weights
from sd_unlearn.errors import UnlearnError
from sd_unlearn.io.run_folder import ADAPTER_DIR, DIFFUSERS_FILE
from sd_unlearn.models import lora
from sd_unlearn.models.base import load_base
from sd_unlearn.models.student import make_student

WIDTH, SIDE, TOKENS = 16, 8, 12
STRENGTHS = (0.0, 0.5, 1.0)
NOISE_TOLERANCE, DELTA_TOLERANCE = 1e-5, 1e-7
EFFECT = 100 * NOISE_TOLERANCE  # minimum effect of a LoRA; without one, the comparisons would prove nothing
EVERYTHING = [
    *lora.ATTENTION,
    "ff.net.0.proj",
    "ff.net.2",
    "proj_in",
    "proj_out",
    "conv1",
    "conv2",
    "conv_shortcut",
    "conv",
    "time_emb_proj",
    "conv_in",
    "conv_out",
    "linear_1",
    "linear_2",
]

# name -> rank and alpha for lora.attach, or a PEFT configuration that it does not offer
CASES: dict[str, dict[str, Any]] = {
    "alpha is rank": {"rank": 4, "alpha": 4.0},
    "alpha is not rank": {"rank": 4, "alpha": 1.4},
    "every linear and convolution": {"rank": 4, "alpha": 1.4, "targets": "all_linear+conv"},
    "rank pattern": {"r": 4, "lora_alpha": 3, "rank_pattern": {"to_k": 2, "attn2.to_v": 6}},
    "alpha pattern": {"r": 4, "lora_alpha": 3, "alpha_pattern": {"to_q": 11, "mid_block.*to_v": 0.7}},
    "rslora": {"r": 4, "lora_alpha": 3, "use_rslora": True},
    "conv and ff": {"r": 4, "lora_alpha": 1.4, "target_modules": EVERYTHING},
    "conv and ff, patterns": {
        "r": 4,
        "lora_alpha": 3,
        "target_modules": EVERYTHING,
        "rank_pattern": {"to_k": 2, "conv1": 6},
        "alpha_pattern": {"ff.net.2": 0.7, "to_k": 9, "conv2": 5},
    },
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline folder of a small random Stable Diffusion 1."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*tokens, *(f"{token}</w>" for token in tokens), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=TOKENS)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=WIDTH,
            intermediate_size=WIDTH,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=TOKENS,
            projection_dim=WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=SIDE,
        block_out_channels=(8, 12),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        sample_size=2 * SIDE,
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def fresh(base: Path) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def train(base: Path, case: dict[str, Any]) -> PeftModel:
    """A LoRA as after training: up is not zero, and deltas are below 1, where float32 resolves 1e-7."""
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    if "rank" in case:
        options = Weights(rank=case["rank"], lora_alpha=case["alpha"], lora_targets=case.get("targets", "attention"))
        model = lora.attach(unet, options, lora.network_targets(unet, options.lora_targets), seed=1)
    else:
        torch.manual_seed(1)
        settings = {"target_modules": lora.ATTENTION, "init_lora_weights": "gaussian"} | case
        model = PeftModel(unet, LoraConfig(**settings), adapter_name=lora.ADAPTER_NAME)
    noise = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=noise) * 0.05)
    return model.eval()


@pytest.fixture(scope="module", params=list(CASES))
def trained(
    request: pytest.FixtureRequest, base: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PeftModel, Path]:
    """A trained network and its run folder, exported."""
    model, run = train(base, CASES[request.param]), tmp_path_factory.mktemp("run")
    settings = model.peft_config[lora.ADAPTER_NAME]
    write_run(run, training_record(settings.r, settings.lora_alpha))
    lora.save(model, run / ADAPTER_DIR)
    exported(run)
    return model, run


@torch.no_grad()
def predict(unet: nn.Module) -> Tensor:
    """The noise predicted for two fixed latents under fixed text states; [2, 4, 8, 8]."""
    rng = torch.Generator().manual_seed(3)
    latents = torch.randn(2, 4, SIDE, SIDE, generator=rng)
    text = torch.randn(2, TOKENS, WIDTH, generator=rng)
    return unet(latents, torch.tensor([700, 20]), encoder_hidden_states=text).sample


def lora_layers(model: nn.Module) -> dict[str, Any]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}


def trained_noise(model: PeftModel, strength: float) -> Tensor:
    layers = lora_layers(model).values()
    for layer in layers:
        layer.set_scale(lora.ADAPTER_NAME, strength)
    noise = predict(model)
    for layer in layers:
        layer.set_scale(lora.ADAPTER_NAME, 1.0)
    return noise


def loaded_noise(base: Path, file: Path, strength: float) -> Tensor:
    pipeline = fresh(base)
    pipeline.load_lora_weights(file, adapter_name="it")
    pipeline.set_adapters("it", strength)
    return predict(pipeline.unet)


def spelled(module: nn.Module, prefix: str = "lora_unet") -> Iterator[tuple[str, nn.Module]]:
    """Every module with its name in a kohya file, found by traversing the network."""
    for name, child in module.named_children():
        yield f"{prefix}_{name}", child
        yield from spelled(child, f"{prefix}_{name}")


def kohya_deltas(unet: UNet2DConditionModel, file: Path) -> dict[nn.Module, Tensor]:
    """An independent reader of the format: alpha / rank * up @ down, scale 1 if alpha is missing."""
    tensors, modules, deltas = load_file(file), dict(spelled(unet)), {}
    for key in sorted({name.split(".")[0] for name in tensors}):
        down, up = tensors.pop(f"{key}.lora_down.weight"), tensors.pop(f"{key}.lora_up.weight")
        scale = tensors.pop(f"{key}.alpha").item() / len(down) if f"{key}.alpha" in tensors else 1.0
        deltas[modules[key]] = scale * (up.flatten(1) @ down.flatten(1)).view(modules[key].weight.shape)
    assert not tensors, "keys that nobody reads"
    return deltas


def kohya_noise(base: Path, file: Path, strength: float) -> Tensor:
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    for module, delta in kohya_deltas(unet, file).items():
        module.weight.data += strength * delta
    return predict(unet)


def largest(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def farthest(found: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """Largest difference of any module's delta; both must name the same modules."""
    assert found.keys() == want.keys()
    return max(largest(found[name], want[name]) for name in want)


# ---- all readers compute the same function ----


def test_all_readers_predict_the_trained_noise(base: Path, trained: tuple[PeftModel, Path]) -> None:
    model, run = trained
    folder = run / "export"
    untouched = predict(UNet2DConditionModel.from_pretrained(base, subfolder="unet"))
    for strength in STRENGTHS:
        want = trained_noise(model, strength)
        moved = largest(want, untouched)
        assert moved < NOISE_TOLERANCE if strength == 0 else moved > EFFECT
        readings = {
            "diffusers": loaded_noise(base, folder / DIFFUSERS_FILE, strength),
            "kohya in diffusers": loaded_noise(base, folder / f"{SLUG}.safetensors", strength),
            "kohya by the format": kohya_noise(base, folder / f"{SLUG}.safetensors", strength),
        }
        for reader, noise in readings.items():
            assert largest(noise, want) < NOISE_TOLERANCE, f"{reader} at strength {strength}"


def test_every_pair_is_applied_with_its_own_delta(base: Path, trained: tuple[PeftModel, Path]) -> None:
    model, run = trained
    want = {
        name.removeprefix("base_model.model."): layer.get_delta_weight(lora.ADAPTER_NAME)
        for name, layer in lora_layers(model).items()
    }
    for file in (run / "export" / DIFFUSERS_FILE, run / "export" / f"{SLUG}.safetensors"):
        pipeline = fresh(base)
        pipeline.load_lora_weights(file, adapter_name="it")
        found = {name: layer.get_delta_weight("it") for name, layer in lora_layers(pipeline.unet).items()}
        assert len(found) == sum("lora_A" in key or "lora_down" in key for key in load_file(file))
        assert farthest(found, want) < DELTA_TOLERANCE
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    names = {module: name for name, module in unet.named_modules()}
    deltas = kohya_deltas(unet, run / "export" / f"{SLUG}.safetensors")
    read = {names[module]: delta for module, delta in deltas.items()}
    assert farthest(read, want) < DELTA_TOLERANCE


@pytest.mark.parametrize("name", [DIFFUSERS_FILE, f"{SLUG}.safetensors"])
def test_reloaded_images_equal_those_of_the_training_process(
    base: Path, trained: tuple[PeftModel, Path], name: str
) -> None:
    model, run = trained
    fresh_one, in_process = fresh(base), fresh(base)
    plain = _images(fresh_one)
    in_process.unet = model.get_base_model()
    fresh_one.load_lora_weights(run / "export" / name)
    want, got = _images(in_process), _images(fresh_one)
    assert np.abs(want - plain).max() > EFFECT
    assert np.abs(want - got).max() < NOISE_TOLERANCE


def _images(pipeline: StableDiffusionPipeline) -> np.ndarray:
    rng = torch.Generator().manual_seed(4)
    return pipeline("Brad Pitt", num_inference_steps=3, guidance_scale=3.0, generator=rng, output_type="np").images


@pytest.mark.parametrize("trained", ["alpha is not rank"], indirect=True)
def test_the_comparison_notices_a_wrong_scale(base: Path, trained: tuple[PeftModel, Path], tmp_path: Path) -> None:
    model, run = trained
    want = trained_noise(model, 1.0)
    tensors = load_file(run / "export" / f"{SLUG}.safetensors")
    tampered = {key: torch.tensor(4.0) if key.endswith(".alpha") else value for key, value in tensors.items()}
    save_file(tampered, tmp_path / "alpha-is-rank.safetensors")
    save_file({k: v for k, v in tensors.items() if "alpha" not in k}, tmp_path / "no-alpha.safetensors")
    for name in ("alpha-is-rank.safetensors", "no-alpha.safetensors"):
        assert largest(kohya_noise(base, tmp_path / name, 1.0), want) > EFFECT
        assert largest(loaded_noise(base, tmp_path / name, 1.0), want) > EFFECT
    save_file(load_file(run / "export" / DIFFUSERS_FILE), tmp_path / "no-header.safetensors")
    assert largest(loaded_noise(base, tmp_path / "no-header.safetensors", 1.0), want) > EFFECT


@pytest.mark.parametrize("trained", ["alpha is not rank"], indirect=True)
def test_diffusers_file_is_what_diffusers_itself_would_write(trained: tuple[PeftModel, Path], tmp_path: Path) -> None:
    model, run = trained
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers={key.removeprefix("base_model.model."): value for key, value in adapter.items()},
        unet_lora_adapter_metadata=copy.deepcopy(model.peft_config[lora.ADAPTER_NAME].to_dict()),
    )
    theirs, ours = tmp_path / DIFFUSERS_FILE, run / "export" / DIFFUSERS_FILE
    want, got = load_file(theirs), load_file(ours)
    assert want.keys() == got.keys()
    assert all(torch.equal(want[key], got[key]) for key in want)
    settings, full = (json.loads(read_header(file)["lora_adapter_metadata"]) for file in (ours, theirs))
    full["unet.target_modules"].sort()
    assert {"unet.r", "unet.lora_alpha", "unet.target_modules"} <= settings.keys()
    assert settings == {key: full[key] for key in settings}


def text_run(base: Path, run: Path) -> tuple[PeftModel, PeftModel]:
    """A run with LoRAs on both networks, with up weights that are not zero."""
    student = make_student(
        load_base(str(base), device="cpu"),
        Weights(rank=4, lora_alpha=1.4, train_text_encoder=True),
        1,
        needs_teacher=False,
    )
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in student.trainable():
            parameter += 0.05 * torch.randn_like(parameter)
    write_run(run, training_record(4, 1.4))
    student.save(run)
    unet, encoder = student.adapters
    return unet.eval(), encoder.eval()


def test_the_lora_of_a_text_encoder_is_in_both_files(base: Path, tmp_path: Path) -> None:
    """Diffusers computes the trained embeddings, and the kohya file holds the delta of every module."""
    unet, encoder = text_run(base, tmp_path / "run")
    diffusers_file, kohya_file = exported(tmp_path / "run")
    ids = torch.arange(2 * TOKENS).view(2, TOKENS)
    with torch.no_grad():
        wanted, plain = encoder(ids)[0], fresh(base).text_encoder(ids)[0]
    assert largest(wanted, plain) > EFFECT
    for file in (diffusers_file, kohya_file):
        pipeline = fresh(base)
        pipeline.load_lora_weights(file)
        with torch.no_grad():
            assert largest(pipeline.text_encoder(ids)[0], wanted) < NOISE_TOLERANCE
        assert largest(predict(pipeline.unet), predict(unet)) < NOISE_TOLERANCE
    tensors = load_file(kohya_file)
    deltas = {
        "lora_te_text_model_" + name.removeprefix("base_model.model.").replace(".", "_"): layer
        for name, layer in lora_layers(encoder).items()
    }
    assert len(deltas) == 4
    for key, layer in deltas.items():
        up, down = tensors[f"{key}.lora_up.weight"], tensors[f"{key}.lora_down.weight"]
        delta = tensors[f"{key}.alpha"].item() / len(down) * up @ down
        assert largest(delta, layer.get_delta_weight(lora.ADAPTER_NAME)) < DELTA_TOLERANCE


def test_a_full_unet_is_not_exported_as_a_lora(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", training_record(4, 4.0))
    (run / "unet").mkdir()
    save_file({"weight": torch.zeros(1)}, run / "unet" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UnlearnError, match=r"--method full.*run/unet.*no LoRA"):
        exported(run)
