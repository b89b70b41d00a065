"""Single files: the bundled configurations and tokenizer, and that nothing of a file is lost on the way."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import init_empty_weights
from conftest import scheduled
from diffusers import AutoencoderKL, UNet2DConditionModel
from kinds import KINDS, Kinds, config_of, original_names
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sd_unlearn.errors import UnlearnError, UsageError
from sd_unlearn.models.base import Base, load_base
from sd_unlearn.models.recorded_base import load_recorded_base
from sd_unlearn.models.sampling import Sampler, generate_images
from sd_unlearn.models.single_file import _tokenizers, clip_tokenizer, merges
from sd_unlearn.models.source import SINGLE_FILE_DIR, Source

pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = [
    "a photo of a cat",
    "",
    "Ein Foto, 1234 x 5!",
    "naïve café 日本 🙂",
    "it's  the\tEND of <the> world's",
    "x" * 400,
]
# As published: what a whole network of the kind has, known from elsewhere than the configurations.
PARAMETERS = {
    "sd1": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sd2": {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
    "sdxl": {
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    },
}


def load(path: Path, kinds: Kinds, kind: str, **options: Any) -> Base:
    return load_base(Source(str(path), single_file_config=str(kinds.configs(kind)), **options), device="cpu")


# -- what is bundled --


@pytest.mark.parametrize("kind", KINDS)
def test_the_bundled_configurations_are_those_of_the_published_models(kind: str) -> None:
    with init_empty_weights():
        networks = {
            "unet": UNet2DConditionModel.from_config(config_of(kind, "unet")),
            "vae": AutoencoderKL.from_config(config_of(kind, "vae")),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**config_of(kind, "text_encoder"))),
        }
        if kind == "sdxl":
            second = CLIPTextConfig(**config_of(kind, "text_encoder_2"))
            networks["text_encoder_2"] = CLIPTextModelWithProjection(second)
    counted = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
    assert counted == PARAMETERS[kind]
    assert networks["vae"].config.scaling_factor == (0.13025 if kind == "sdxl" else 0.18215)
    assert networks["unet"].config.sample_size * 8 == {"sd1": 512, "sd2": 768, "sdxl": 1024}[kind]


def test_the_bundled_tokenizer_is_clips() -> None:
    """Against open_clip's own reading of the same merges: begin, tokens, end, at the same places."""
    open_clip = pytest.importorskip("open_clip")
    theirs = open_clip.SimpleTokenizer()
    ours = clip_tokenizer("<|endoftext|>")
    assert len(merges()) == 48_894
    assert (len(ours), ours.bos_token_id, ours.eos_token_id) == (49_408, 49_406, 49_407)
    for text in TEXTS:
        tokens = theirs.encode(text)[:75]
        ids = ours(text, padding="max_length", truncation=True, max_length=77).input_ids
        assert ids == ([49_406, *tokens, 49_407] + [49_407] * 75)[:77], text


def test_texts_are_padded_as_each_encoder_was_trained() -> None:
    for kind, pads in (("sd1", [49_407]), ("sd2", [0]), ("sdxl", [49_407, 0])):
        tokenizers = _tokenizers(SINGLE_FILE_DIR / kind, kind).values()
        assert [t("a", padding="max_length").input_ids[-1] for t in tokenizers] == pads
        assert all(t.model_max_length == 77 for t in tokenizers)


def test_the_bundle_is_small() -> None:
    assert sum(path.stat().st_size for path in SINGLE_FILE_DIR.rglob("*") if path.is_file()) < 300_000


# -- what is in a file --


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_a_file_is_lost(kinds: Kinds, kind: str) -> None:
    """Every network has the weights of the one that was written."""
    there, here = load(kinds.file(kind), kinds, kind).pipeline, kinds.pipeline(kind)
    for name in PARAMETERS[kind]:
        wanted, found = (getattr(p, name).state_dict() for p in (here, there))
        assert wanted.keys() == found.keys()
        assert all(torch.equal(wanted[key].float(), found[key]) for key in wanted), name


def test_a_configuration_that_does_not_fit(kinds: Kinds, tmp_path: Path) -> None:
    tensors = original_names(kinds.pipeline("sd1"))
    more = tensors | {"model.diffusion_model.extra.weight": torch.zeros(1), "model_ema.decay": torch.zeros(1)}
    save_file(more, tmp_path / "more.safetensors")
    with pytest.raises(
        UnlearnError, match=r"does not fit the configuration .*holds 1 UNet tensors too many.*--single_file_config"
    ):
        load(tmp_path / "more.safetensors", kinds, "sd1")
    last = max(name for name in tensors if "final_layer_norm" in name)
    save_file({k: v for k, v in tensors.items() if k != last}, tmp_path / "less.safetensors")
    with pytest.raises(UnlearnError, match=r"lacks .*final_layer_norm"):
        load(tmp_path / "less.safetensors", kinds, "sd1")
    wide = {k: torch.zeros(9, 4, 3, 3) if k.endswith("input_blocks.0.0.weight") else v for k, v in tensors.items()}
    save_file(wide, tmp_path / "wide.safetensors")
    with pytest.raises(UnlearnError, match=r"could not be loaded: .*--single_file_config"):
        load(tmp_path / "wide.safetensors", kinds, "sd1")


def test_pickled_checkpoints(kinds: Kinds, tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": original_names(kinds.pipeline("sd1")), "global_step": 7}, path)
    with pytest.raises(UsageError, match="is a pickle"):
        load(path, kinds, "sd1")
    assert load(path, kinds, "sd1", allow_pickle=True).sha256 == load(kinds.file("sd1"), kinds, "sd1").sha256


@pytest.mark.parametrize(("predicts", "side"), [("epsilon", 512), ("v_prediction", 64)])
def test_a_file_with_the_bundled_configuration(
    kinds: Kinds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, predicts: str, side: int
) -> None:
    """As a published SD 2.x is loaded; here the bundle is one of narrow configurations, without tokenizers."""
    unwanted = shutil.ignore_patterns("tokenizer*")
    shutil.copytree(kinds.configs("sd2"), tmp_path / "sd2", ignore=unwanted)
    scheduled(tmp_path / "sd2", tmp_path / "bundle" / "sd2", prediction_type="epsilon")  # as the real bundle
    monkeypatch.setattr("sd_unlearn.models.source.SINGLE_FILE_DIR", tmp_path / "bundle")
    base = load_base(Source(str(kinds.file("sd2")), prediction_type=predicts), device="cpu")
    assert (base.prediction_type, base.resolution) == (predicts, side)
    assert base.pipeline.tokenizer("a", padding="max_length").input_ids == [49_406, 320, 49_407] + [0] * 74
    again = load_recorded_base(base.describe(), device="cpu")
    assert again.describe() == base.describe()


def test_the_schedule_of_a_file(kinds: Kinds, tmp_path: Path) -> None:
    """v models of XL mark themselves, and that they were trained to pure noise."""
    path, marks = tmp_path / "v.safetensors", {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    save_file(original_names(kinds.pipeline("sdxl")) | marks, path)
    with pytest.raises(UsageError, match=r"--single_file_config says epsilon, but .* predicts v_prediction"):
        load(path, kinds, "sdxl")
    configs = scheduled(kinds.configs("sdxl"), tmp_path / "configs", prediction_type="v_prediction")
    marked = load_base(Source(str(path), single_file_config=str(configs)), device="cpu")
    plain = load(kinds.file("sdxl"), kinds, "sdxl")
    assert (marked.prediction_type, plain.prediction_type) == ("v_prediction", "epsilon")
    assert marked.pipeline.scheduler.alphas_cumprod[-1] == 0
    assert plain.pipeline.scheduler.alphas_cumprod[-1] > 1e-3


# -- VAEs --


def test_a_vae_as_folder_pipeline_or_file_is_the_same(kinds: Kinds, tmp_path: Path) -> None:
    vae = kinds.pipeline("sd2").vae
    vae.save_pretrained(tmp_path / "vae")
    original = {k: v for k, v in original_names(kinds.pipeline("sd2")).items() if k.startswith("first_stage_model.")}
    save_file(original, tmp_path / "prefixed.safetensors")
    save_file({k.removeprefix("first_stage_model."): v for k, v in original.items()}, tmp_path / "bare.safetensors")
    named = (
        tmp_path / "vae",
        kinds.folder("sd2"),
        tmp_path / "vae" / "diffusion_pytorch_model.safetensors",
        tmp_path / "prefixed.safetensors",
        tmp_path / "bare.safetensors",
        kinds.file("sd2"),
    )
    bases = [load_base(Source(str(kinds.folder("sd1")), vae=str(name)), device="cpu") for name in named]
    assert {base.vae_sha256 for base in bases} == {load_base(str(kinds.folder("sd2")), device="cpu").vae_sha256}
    of_file = load(kinds.file("sd1"), kinds, "sd1", vae=str(tmp_path / "vae"))
    images = [generate_images(base, ["a cat"], [1], Sampler(2, 3.0, 1))[0] for base in (bases[0], of_file)]
    assert np.array_equal(*images)


def test_the_vae_of_another_kind_is_refused(kinds: Kinds) -> None:
    for base, other in (("sdxl", "sd1"), ("sd1", "sdxl")):
        with pytest.raises(UsageError, match=r"--vae .* has scaling_factor .* another kind's VAE"):
            load_base(Source(str(kinds.folder(base)), vae=str(kinds.folder(other))), device="cpu")
        with pytest.raises(UsageError, match=r"--vae .* has scaling_factor"):
            load(kinds.file(base), kinds, base, vae=str(kinds.folder(other)))


def test_a_file_without_a_vae(kinds: Kinds, tmp_path: Path) -> None:
    whole = original_names(kinds.pipeline("sd1"))
    save_file({k: v for k, v in whole.items() if not k.startswith("first_stage")}, tmp_path / "bare.safetensors")
    base = load(tmp_path / "bare.safetensors", kinds, "sd1", vae=str(kinds.folder("sd1")))
    assert base.vae_sha256 == load(kinds.file("sd1"), kinds, "sd1").vae_sha256


@pytest.mark.parametrize("kind", KINDS)
def test_missing_tensor_is_named(kinds: Kinds, tmp_path: Path, kind: str) -> None:
    parts = {"attn2.to_k": "UNet", "decoder.conv_in.bias": "VAE", "ln_final.bias": "text encoder"}
    parts |= {"layer_norm1.bias": "text encoder", "attn.in_proj_weight": "text encoder"}  # CLIP's, OpenCLIP's
    weights = load_file(kinds.file(kind))
    for name, part in parts.items():
        missing = next((key for key in weights if name in key), None)
        if missing:
            save_file({key: weights[key] for key in weights if key != missing}, tmp_path / "lacks.safetensors")
            with pytest.raises(UnlearnError, match=f"lacks 1 of the {part}'s tensors, e.g. {re.escape(missing)}"):
                load(tmp_path / "lacks.safetensors", kinds, kind)


def test_text_encoder_as_novelai_spells_it(kinds: Kinds, tmp_path: Path) -> None:
    """Without `text_model`, as in the first anime models and the many merges with them."""
    spelled = {
        key.replace("transformer.text_model.", "transformer."): w for key, w in load_file(kinds.file("sd1")).items()
    }
    save_file(spelled, tmp_path / "anime.safetensors")
    torch.save({"state_dict": spelled}, tmp_path / "anime.ckpt")
    whole = load(kinds.file("sd1"), kinds, "sd1")
    for name in ("anime.safetensors", "anime.ckpt"):
        base = load(tmp_path / name, kinds, "sd1", allow_pickle=True)
        assert base.hashes == whole.hashes
    missing = next(key for key in spelled if "layer_norm2.weight" in key)
    save_file({key: spelled[key] for key in spelled if key != missing}, tmp_path / "lacks.safetensors")
    with pytest.raises(UnlearnError, match=f"lacks 1 of the text encoder's tensors, e.g. {re.escape(missing)}"):
        load(tmp_path / "lacks.safetensors", kinds, "sd1")


def test_any_case_of_the_suffix(kinds: Kinds, tmp_path: Path) -> None:
    shutil.copy(kinds.file("sd1"), tmp_path / "BIG.SAFETENSORS")
    shutil.copy(kinds.file("sd1"), tmp_path / "small.safetensors")
    big, small = (load(tmp_path / name, kinds, "sd1") for name in ("BIG.SAFETENSORS", "small.safetensors"))
    assert (big.sha256, big.vae_sha256) == (small.sha256, small.vae_sha256)
    (tmp_path / "A.CKPT").write_bytes(b"x")
    with pytest.raises(UsageError, match="is a pickle"):
        load(tmp_path / "A.CKPT", kinds, "sd1")


def test_relative_base_is_found_from_another_folder(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_base, tmp_path / "models/mine")
    record = load_base("models/mine", device="cpu").describe()
    assert record["name"] == "models/mine"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_recorded_base(record, device="cpu").sha256 == record["sha256"]


def test_tilde_in_the_name_of_a_base(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(tiny_base, tmp_path / "mine")
    assert load_base("~/mine", device="cpu").sha256 == load_base(str(tiny_base), device="cpu").sha256
