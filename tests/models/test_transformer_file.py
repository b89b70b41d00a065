"""Transformers from single files: the same networks as from a folder, also from 8 bits; what is missing is named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from flow_kinds import KIND_OF, FlowKinds
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sd_unlearn.data.encoding import encode_captions
from sd_unlearn.errors import UnlearnError, UsageError
from sd_unlearn.models.base import Base, load_base
from sd_unlearn.models.checkpoint_header import kind_of_file, read_checkpoint_header
from sd_unlearn.models.find_base import check_source
from sd_unlearn.models.ldm_keys import checkpoint
from sd_unlearn.models.loading import load_pipeline
from sd_unlearn.models.source import Source

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ("sd35", "flux-dev", "z-image", "flux2-dev", "flux2-klein-base", "qwen-image")
UNET = "model.diffusion_model."


@pytest.fixture(scope="module")
def bases(flow_kinds: FlowKinds, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Base, Path, Path]]:
    """(base, its folder without the transformer's weights, single file) of each kind."""
    found = {}
    for name in NAMES:
        place = tmp_path_factory.mktemp(name)
        base = load_base(str(flow_kinds.folder(name)), device="cpu")
        if KIND_OF[name] == "sd3":
            nn.init.eye_(base.pipeline.text_encoder.text_projection.weight)  # which the files leave out
        base.pipeline.save_pretrained(place / "folder")
        tensors = {key: value.clone().contiguous() for key, value in checkpoint(base.pipeline, KIND_OF[name]).items()}
        save_file(tensors, place / "model.safetensors")
        for weights in (place / "folder" / "transformer").glob("*.safetensors"):
            weights.unlink()
        found[name] = (
            load_base(str(flow_kinds.folder(name)), device="cpu"),
            place / "folder",
            place / "model.safetensors",
        )
    return found


def loaded(file: Path, folder: Path) -> Base:
    source = Source(str(file), single_file_config=str(folder))
    check_source(source)
    return load_base(source, device="cpu")


@pytest.mark.parametrize("name", NAMES)
def test_a_file_gives_the_networks_of_the_folder(bases: dict[str, tuple[Base, Path, Path]], name: str) -> None:
    base, folder, file = bases[name]
    assert kind_of_file(read_checkpoint_header(file, "")) == KIND_OF[name]
    read = loaded(file, folder)
    assert (read.kind, read.sha256, read.vae_sha256) == (base.kind, base.sha256, base.vae_sha256)
    assert read.pipeline.scheduler.config.shift == base.pipeline.scheduler.config.shift


def test_the_networks_in_the_file_are_used_before_those_of_the_folder(
    bases: dict[str, tuple[Base, Path, Path]], tmp_path: Path
) -> None:
    _, folder, file = bases["sd35"]
    bare = shutil.copytree(folder, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = load_file(file)
    key = "text_encoders.clip_g.transformer.text_model.final_layer_norm.bias"
    tensors[key] = tensors[key] + 1
    save_file(tensors, tmp_path / "a.safetensors")
    encoder = loaded(tmp_path / "a.safetensors", bare).pipeline.text_encoder_2
    assert torch.equal(encoder.text_model.final_layer_norm.bias, tensors[key])
    t5 = loaded(tmp_path / "a.safetensors", bare).pipeline.text_encoder_3
    assert torch.equal(t5.encoder.embed_tokens.weight, tensors["text_encoders.t5xxl.transformer.shared.weight"])


def test_text_encoders_in_a_file_of_flux_are_read(bases: dict[str, tuple[Base, Path, Path]], tmp_path: Path) -> None:
    """As ComfyUI saves them: CLIP with its prefix, which transformers has dropped, and T5's embeddings once."""
    base, folder, file = bases["flux-dev"]
    tensors = load_file(file)
    clip = base.pipeline.text_encoder.state_dict()
    tensors |= {f"text_encoders.clip_l.transformer.text_model.{name}": value.clone() for name, value in clip.items()}
    state = base.pipeline.text_encoder_2.state_dict()
    t5 = {name: value for name, value in state.items() if "embed_tokens" not in name}
    tensors |= {f"text_encoders.t5xxl.transformer.{name}": value.clone() for name, value in t5.items()}
    save_file(tensors, tmp_path / "all.safetensors")
    bare = shutil.copytree(folder, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copytree(folder / "vae", bare / "vae", dirs_exist_ok=True)
    read = loaded(tmp_path / "all.safetensors", bare)
    assert (read.sha256, read.text_encoder_sha256) == (base.sha256, base.text_encoder_sha256)
    captions = ["a photo", "seven"]
    assert torch.equal(encode_captions(read, captions), encode_captions(base, captions))


@pytest.mark.parametrize("scale", [None, 0.01])
def test_bf16_files_are_read_as_such(
    bases: dict[str, tuple[Base, Path, Path]], tmp_path: Path, scale: float | None
) -> None:
    """In full precision they would take twice the memory. Eight bits with a scale are no bf16 numbers."""
    _, folder, file = bases["flux-dev"]
    half = {name: value.bfloat16() for name, value in load_file(file).items()}
    save_file(in_eight_bits(half, scale) if scale else half, tmp_path / "bf16.safetensors")
    source = Source(str(tmp_path / "bf16.safetensors"), single_file_config=str(folder))
    pipeline = load_pipeline(source, None)
    assert pipeline.transformer.dtype == (torch.float32 if scale else torch.bfloat16)
    assert {pipeline.vae.dtype, pipeline.text_encoder_2.dtype} == {torch.float32}
    assert load_pipeline(source, torch.float32).transformer.dtype == torch.float32


def in_eight_bits(tensors: dict[str, Tensor], scale: float | None) -> dict[str, Tensor]:
    """The matrices of the transformer in fp8, as ComfyUI's files have them: with a scale for each, or without."""
    made = dict(tensors)
    for name, value in tensors.items():
        if name.endswith(".weight") and value.ndim == 2 and "blocks." in name:
            made[name] = (value / (scale or 1)).to(torch.float8_e4m3fn)
            if scale:
                made[f"{name.removesuffix('.weight')}.scale_weight"] = torch.tensor(scale)
    return made | ({"scaled_fp8": torch.empty(2, dtype=torch.float8_e4m3fn)} if scale else {})


@pytest.mark.parametrize("scale", [None, 0.01])
def test_eight_bits_are_read_with_their_scales(
    bases: dict[str, tuple[Base, Path, Path]], tmp_path: Path, scale: float | None
) -> None:
    base, folder, file = bases["flux-dev"]
    save_file(in_eight_bits(load_file(file), scale), tmp_path / "fp8.safetensors")
    read = loaded(tmp_path / "fp8.safetensors", folder).pipeline.transformer.state_dict()
    for name, value in base.pipeline.transformer.state_dict().items():
        assert read[name].dtype == value.dtype
        assert torch.allclose(read[name], value, rtol=0.07, atol=0.002 if scale is None else 2e-4), name
    assert any(not torch.equal(read[name], value) for name, value in base.pipeline.transformer.state_dict().items())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"double_blocks.0.img_mlp.0.bias": None}, r"lacks double_blocks\.0\.img_mlp\.0\.bias"),
        ({"double_blocks.0.img_mlp.0.bias": torch.ones(64, dtype=torch.int8)}, "is int8: quantized weights"),
        ({"double_blocks.0.img_mlp.0.bias": torch.ones(3)}, r"has the shape \[3\] instead of \[64\]"),
    ],
)
def test_weights_that_do_not_fit_are_named(
    bases: dict[str, tuple[Base, Path, Path]], tmp_path: Path, change: dict[str, Tensor | None], says: str
) -> None:
    _, folder, file = bases["flux-dev"]
    tensors = {key: value for key, value in (load_file(file) | change).items() if value is not None}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UnlearnError, match=f"{says}.*Use the folder of the same model"):
        loaded(tmp_path / "a.safetensors", folder)


def test_what_is_missing_is_named_before_anything_loads(
    bases: dict[str, tuple[Base, Path, Path]], tmp_path: Path
) -> None:
    _, folder, file = bases["flux-dev"]
    _, sd3_folder, sd3_file = bases["sd35"]
    without = shutil.copytree(folder, tmp_path / "without", ignore=shutil.ignore_patterns("*.safetensors"))
    for place, config, says in (
        (file, None, "Add --single_file_config"),
        (file, tmp_path, "describes no pipeline"),
        (file, sd3_folder, "of kind flux, but .* describes a StableDiffusion3Pipeline"),
        (sd3_file, folder, "of kind sd3, but .* describes a FluxPipeline"),
        (file, without, "vae, text_encoder, text_encoder_2"),
    ):
        with pytest.raises(UsageError, match=says):
            check_source(Source(str(place), single_file_config=config and str(config)))
