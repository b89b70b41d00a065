"""What a base's name stands for, and what is refused before anything loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import KINDS, PREDICTS, Kinds, original_names
from safetensors.torch import save_file

from sd_unlearn.cli import main
from sd_unlearn.config.base import DEFAULT_BASE, BaseOptions
from sd_unlearn.errors import UsageError
from sd_unlearn.io.reading import read_json
from sd_unlearn.models.checkpoint_header import read_checkpoint_header
from sd_unlearn.models.find_base import find_base
from sd_unlearn.models.kinds import kind_of
from sd_unlearn.models.source import BUNDLED, Source, variant_of


def found(name: object, **options: Any) -> Source:
    return find_base(BaseOptions(pretrained_model_name_or_path=str(name), **options))


def refused(named: str, name: object, **options: Any) -> None:
    with pytest.raises(UsageError, match=named):
        found(name, **options)


def changed(folder: Path, copy: Path, file: str, **changes: object) -> Path:
    """A copy of a folder with other entries in one of its configurations."""
    path = shutil.copytree(folder, copy) / file
    path.write_text(json.dumps(read_json(path) | changes))
    return copy


def test_the_option_wins_over_the_concept_file() -> None:
    assert find_base(BaseOptions(), None).name == DEFAULT_BASE
    assert find_base(BaseOptions(), "digits").name == "digits"
    assert find_base(BaseOptions(pretrained_model_name_or_path="a/b"), "digits").name == "a/b"


def test_a_file_that_is_no_base_is_named_for_what_it_is(tmp_path: Path) -> None:
    weights = {
        "lora_unet_mid_block.lora_down.weight": torch.zeros(2, 8),
        "lora_unet_mid_block.alpha": torch.tensor(2.0),
    }
    save_file(weights, tmp_path / "lora.safetensors")
    refused(r"lora\.safetensors is a LoRA\.", tmp_path / "lora.safetensors")
    (tmp_path / "model.ckpt").write_bytes(b"PK\x03\x04")
    refused("--allow_pickle", tmp_path / "model.ckpt")


@pytest.mark.parametrize("kind", KINDS)
def test_kind_and_prediction_come_from_the_models_own_configuration(kinds: Kinds, kind: str) -> None:
    for form in ("folder", "fp16", "file"):
        told = kinds.options(kind, form)
        source = found(told.pop("pretrained_model_name_or_path"), **told)
        assert (source.kind, source.known_prediction_type) == (kind, PREDICTS[kind])
        assert variant_of(source) == ("fp16" if form == "fp16" else None)
    hub = found("owner/name")
    assert (hub.kind, hub.known_prediction_type, variant_of(hub)) == (None, None, None)
    assert found("digits").kind == "sd1"


def test_kinds_do_not_depend_on_widths() -> None:
    assert kind_of({"addition_embed_type": "text_time", "use_linear_projection": True}) == "sdxl"
    assert kind_of({"use_linear_projection": True, "cross_attention_dim": 64}) == "sd2"
    assert kind_of({"cross_attention_dim": 1024}) == "sd1"


# -- names --


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("./nowhere", "is neither a local folder or file nor a Hub id"),
        ("nowhere.safetensors", "is neither a local folder or file"),
        ("models/nowhere.safetensors", "is neither a local folder or file"),
        ("a/b/c", "nor a Hub id"),
        ("models/my model", "nor a Hub id"),
        ("owner/name@main", r"nor a Hub id .*Revisions \(owner/name@revision\) are not supported"),
        (
            "black-forest-labs/FLUX.1-Kontext-dev",
            r"is a FLUX\.1 Kontext model\. Stable Diffusion 1\.x, 2\.x, XL, 3 and 3\.5, FLUX\.1, FLUX\.2, "
            "Z-Image and Qwen-Image can",
        ),
    ],
)
def test_names_that_cannot_be_a_base(name: str, why: str) -> None:
    refused(f"--pretrained_model_name_or_path {name} .*{why}|{why}", name)


# -- folders --


@pytest.mark.parametrize(
    "pipeline", ["FluxKontextPipeline", "FluxFillPipeline", "StableDiffusionXLImg2ImgPipeline", None]
)
def test_other_pipelines_are_refused_by_name(kinds: Kinds, tmp_path: Path, pipeline: str | None) -> None:
    other = changed(kinds.folder("sd1"), tmp_path / "other", "model_index.json", _class_name=pipeline)
    refused(
        rf"is a {pipeline}\. Stable Diffusion 1\.x, 2\.x, XL, 3 and 3\.5, FLUX\.1, FLUX\.2, Z-Image and Qwen-Image "
        "can be trained",
        other,
    )


@pytest.mark.parametrize(
    ("file", "changes", "why"),
    [
        ("unet/config.json", {"in_channels": 9}, "9 channels instead of a latent's 4, an inpainting model"),
        ("unet/config.json", {"time_cond_proj_dim": 256}, r"distilled \(LCM\)"),
        ("unet/config.json", {"cross_attention_dim": 768}, "UNet takes text 768 wide, its text encoders give 16"),
        ("unet/config.json", {"addition_embed_type": "text_time"}, "StableDiffusionPipeline with a UNet of kind sdxl"),
        ("model_index.json", {"scheduler": ["diffusers", "EDMEulerScheduler"]}, "noise schedule of EDMEulerScheduler"),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "predicts sample; epsilon and v_prediction"),
    ],
)
def test_folders_that_cannot_be_trained(
    kinds: Kinds, tmp_path: Path, file: str, changes: dict[str, Any], why: str
) -> None:
    refused(why, changed(kinds.folder("sd1"), tmp_path / "other", file, **changes))


def test_latents_have_as_many_channels_as_the_vae_says(kinds: Kinds, tmp_path: Path) -> None:
    unet_only = changed(kinds.folder("sd1"), tmp_path / "unet", "unet/config.json", in_channels=16)
    refused("takes 16 channels instead of a latent's 4", unet_only)
    found(changed(unet_only, tmp_path / "both", "vae/config.json", latent_channels=16))


def test_a_bundled_base_without_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BUNDLED, "emoji", tmp_path / "emoji")
    refused(r"emoji is not in this installation.*scripts/build_emoji\.py", "emoji")


def test_folders_that_are_none_or_damaged(kinds: Kinds, tmp_path: Path) -> None:
    refused("holds no model_index.json", tmp_path)
    for file in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json"):
        copy = shutil.copytree(kinds.folder("sd1"), tmp_path / file.replace("/", "-"))
        (copy / file).write_text("{")
        refused(f"{file.split('/')[-1]} is damaged", copy)


def test_pickled_weights_of_a_folder(kinds: Kinds, tmp_path: Path) -> None:
    copy = shutil.copytree(kinds.folder("sd1"), tmp_path / "pickled")
    weights = copy / "text_encoder" / "model.safetensors"
    shutil.copy(weights, copy / "text_encoder" / "pytorch_model.bin")
    found(copy)  # the other is taken
    weights.unlink()
    refused(r"text_encoder/pytorch_model\.bin is a pickle, which can run code", copy)
    found(copy, allow_pickle=True)
    unet = copy / "unet" / "diffusion_pytorch_model.safetensors"
    unet.rename(unet.with_suffix(".bin"))
    refused(r"unet/diffusion_pytorch_model\.bin is a pickle", copy)


def test_variants(kinds: Kinds, tmp_path: Path) -> None:
    refused("--variant is for a folder or Hub id", kinds.file("sd1"), variant="fp16")
    refused("--variant fp16: .* has no such weights; it has none", kinds.folder("sd1"), variant="fp16")
    refused("--variant ema: .*variants here: fp16", kinds.folder("sd1", "fp16"), variant="ema")
    both = shutil.copytree(kinds.folder("sd1"), tmp_path / "both")
    shutil.copytree(kinds.folder("sd1", "fp16"), both, dirs_exist_ok=True)
    assert variant_of(found(both)) is None
    assert variant_of(found(both, variant="fp16")) == "fp16"


def test_a_prediction_type_against_the_models_own(kinds: Kinds) -> None:
    refused("--prediction_type v_prediction: .* predicts epsilon", kinds.folder("sd1"), prediction_type="v_prediction")
    assert found(kinds.folder("sd2"), prediction_type="v_prediction").known_prediction_type == "v_prediction"


# -- single files --


def published(path: Path, kind: str, **metadata: str) -> Path:
    """A file that has all that is asked of a published model's before it is loaded, and zeros elsewhere."""
    width = {"sd1": 768, "sd2": 1024, "sdxl": 2048}[kind]
    unet = "model.diffusion_model."
    tensors = {
        f"{unet}input_blocks.0.0.weight": torch.zeros(1, 4, 1, 1),
        f"{unet}input_blocks.1.1.proj_in.weight": torch.zeros(1, 1, *((1, 1) if kind == "sd1" else ())),
        f"{unet}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(1, width),
        "first_stage_model.decoder.conv_in.weight": torch.zeros(1),
        "cond_stage_model.x": torch.zeros(1),
    }
    if kind == "sdxl":
        tensors |= {
            f"{unet}label_emb.0.0.weight": torch.zeros(1),
            "conditioner.embedders.1.model.ln_final.weight": torch.zeros(1),
        }
    save_file(tensors, path, {f"modelspec.{key}": value for key, value in metadata.items()})
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_a_published_file_needs_no_configuration(tmp_path: Path, kind: str) -> None:
    told = {"prediction_type": "v_prediction"} if kind == "sd2" else {}
    source = found(published(tmp_path / "m.safetensors", kind), **told)
    assert (source.kind, source.known_prediction_type) == (kind, PREDICTS[kind])


def test_sd2_files_need_a_prediction_type_unless_they_state_it(tmp_path: Path) -> None:
    silent = published(tmp_path / "silent.safetensors", "sd2")
    refused(r"does not state its prediction type\. Add --prediction_type v_prediction \(768", silent)
    assert found(silent, prediction_type="epsilon").known_prediction_type == "epsilon"
    telling = published(tmp_path / "telling.safetensors", "sd2", architecture="stable-diffusion-v2-768-v")
    assert found(telling).known_prediction_type == "v_prediction"
    refused("--prediction_type says epsilon, but .* predicts v_prediction", telling, prediction_type="epsilon")
    sd1 = published(tmp_path / "sd1.safetensors", "sd1")
    assert (
        found(sd1, prediction_type="v_prediction").known_prediction_type == "v_prediction"
    )  # there are such, and few say so


def test_a_file_and_its_configuration_must_agree(kinds: Kinds, tmp_path: Path) -> None:
    refused("text 16 wide, where the published models have 768.*--single_file_config", kinds.file("sd1"))
    other = str(kinds.folder("sd2"))
    refused(
        r"of kind sd1 with text 16 wide, but --single_file_config .* kind sd2 with text 16",
        kinds.file("sd1"),
        single_file_config=other,
    )
    refused("holds no unet/config.json", kinds.file("sd1"), single_file_config=str(tmp_path))
    refused("--single_file_config is for a single file", kinds.folder("sd1"), single_file_config=other)
    refused(
        "--prediction_type epsilon: .* predicts v_prediction",
        kinds.file("sd2"),
        prediction_type="epsilon",
        single_file_config=other,
    )


def test_files_without_a_vae_need_one(kinds: Kinds, tmp_path: Path) -> None:
    tensors = {k: v for k, v in original_names(kinds.pipeline("sd1")).items() if not k.startswith("first_stage")}
    save_file(tensors, tmp_path / "bare.safetensors")
    told = {"single_file_config": str(kinds.folder("sd1"))}
    refused("holds no VAE. Add one with --vae", tmp_path / "bare.safetensors", **told)
    found(tmp_path / "bare.safetensors", **told, vae=str(kinds.folder("sd1")))


# -- the VAE --


def test_what_is_not_a_vae_is_refused(kinds: Kinds, tmp_path: Path) -> None:
    base = kinds.folder("sd1")
    refused("--vae .* is neither a local folder or file nor a Hub id", base, vae="./nowhere")
    refused("--vae .* nor a Hub id .*Revisions", base, vae="owner/name@main")
    refused("--vae .* holds neither config.json nor vae/config.json", base, vae=str(tmp_path))
    save_file({"something": torch.zeros(1)}, tmp_path / "x.safetensors")
    refused("--vae .* holds no VAE", base, vae=str(tmp_path / "x.safetensors"))
    (tmp_path / "vae.pt").write_bytes(b"")
    refused("--vae .* is a pickle", base, vae=str(tmp_path / "vae.pt"))


# -- as it is typed --


def test_refused_before_anything_loads(
    kinds: Kinds, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("data.render", "training.trainer"):
        monkeypatch.setattr(f"sd_unlearn.{module}.load_base", lambda *_: pytest.fail("a model was loaded"))
    for command in ("render", "train"):
        options = ["--concept", "seven", "--pretrained_model_name_or_path"]
        assert main([command, *options, "black-forest-labs/FLUX.1-Kontext-dev"]) == 2
        assert "FLUX" in capsys.readouterr().err
    assert main(["train", *options, str(kinds.folder("sdxl")), "--train_text_encoder"]) == 2
    assert "--train_text_encoder" in capsys.readouterr().err
    assert not Path("data").exists()


def test_the_header_is_read_once(kinds: Kinds, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    monkeypatch.setattr(
        "sd_unlearn.models.source.read_checkpoint_header",
        lambda *args: reads.append(args) or read_checkpoint_header(*args),
    )
    found(kinds.file("sd1"), single_file_config=str(kinds.configs("sd1")))
    assert len(reads) == 1
