"""Bases by hub id, from a cache in huggingface_hub's layout. Nothing is downloaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from flow_kinds import FlowKinds
from kinds import KINDS, Kinds

from sd_unlearn.errors import UnlearnError, UsageError
from sd_unlearn.io.reading import read_json
from sd_unlearn.models.base import load_base
from sd_unlearn.models.meta import read_configs
from sd_unlearn.models.recorded_base import load_recorded_base
from sd_unlearn.models.source import Source

COMMIT = "0" * 40


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def fetched(cache: Path, folder: Path, name: str) -> Path:
    """Put a folder into the cache as if it had been downloaded as `name`."""
    place = cache / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(COMMIT)
    return Path(shutil.copytree(folder, place / "snapshots" / COMMIT))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_base_from_the_hub_equals_its_folder(cache: Path, kinds: Kinds, kind: str, variant: str | None) -> None:
    """Also if it has weights in half precision only."""
    fetched(cache, kinds.folder(kind, variant), "owner/model")
    base = load_base("owner/model", device="cpu")
    assert base.sha256 == load_base(str(kinds.folder(kind)), device="cpu").sha256
    assert base.describe()["name"] == "owner/model"
    assert base.kind == kind
    assert load_recorded_base(base.describe(), device="cpu").describe() == base.describe()


def test_drop_t5_is_refused_for_other_kinds_before_weights_load(cache: Path, kinds: Kinds) -> None:
    place = fetched(cache, kinds.folder("sd1"), "owner/model")
    for file in place.rglob("*.safetensors"):
        file.unlink()
    with pytest.raises(UsageError, match=r"--drop_t5 is for .*owner/model is of kind sd1\. Leave it out"):
        load_base(Source("owner/model", drop_t5=True), device="cpu")


@pytest.mark.parametrize("name", ["sd35", "sd3-without-t5", "flux-schnell"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_flow_matching_base_from_the_hub(cache: Path, flow_kinds: FlowKinds, name: str, precision: str) -> None:
    """With bf16 the precision of the stored weights is read before they are loaded."""
    fetched(cache, flow_kinds.folder(name), "owner/model")
    base = load_base("owner/model", precision, "cpu")
    assert base.hashes == load_base(str(flow_kinds.folder(name)), device="cpu").hashes
    assert load_recorded_base(base.describe(), device="cpu").hashes == base.hashes
    configs = [read_configs(Source(place)).components for place in ("owner/model", str(flow_kinds.folder(name)))]
    assert dict(configs[0]) == dict(configs[1])


def test_a_download_is_announced_and_a_cached_base_is_not(
    cache: Path, kinds: Kinds, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = fetched(cache, kinds.folder("sd1"), "owner/model")
    load_base("owner/model", device="cpu")
    assert capsys.readouterr().err == ""
    (copy / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UnlearnError, match="owner/model could not be loaded"):
        load_base("owner/model", device="cpu")
    assert capsys.readouterr().err.startswith("Downloading owner/model from the Hugging Face Hub")


def test_other_pipelines_are_refused_before_their_weights_are_downloaded(
    cache: Path, kinds: Kinds, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = fetched(cache, kinds.folder("sd1"), "owner/other") / "model_index.json"
    index.write_text(json.dumps(read_json(index) | {"_class_name": "FluxKontextPipeline"}))
    monkeypatch.setattr("diffusers.DiffusionPipeline.download", lambda *_, **__: pytest.fail("weights were downloaded"))
    with pytest.raises(UsageError, match="owner/other is a FluxKontextPipeline"):
        load_base("owner/other", device="cpu")


def test_mismatches_that_only_the_download_shows_are_reported_after_loading(cache: Path, kinds: Kinds) -> None:
    fetched(cache, kinds.folder("sd1"), "owner/model")
    with pytest.raises(UsageError, match="--prediction_type v_prediction: .* predicts epsilon"):
        load_base(Source("owner/model", prediction_type="v_prediction"), device="cpu")
    with pytest.raises(UsageError, match="--vae .* another kind's VAE"):
        load_base(Source("owner/model", vae=str(kinds.folder("sdxl"))), device="cpu")
    unet = fetched(cache, kinds.folder("sd1"), "owner/lcm") / "unet" / "config.json"
    unet.write_text(json.dumps(read_json(unet) | {"time_cond_proj_dim": 8}))
    with pytest.raises(UsageError, match=r"distilled \(LCM\)"):
        load_base("owner/lcm", device="cpu")


def test_a_vae_from_the_hub(cache: Path, kinds: Kinds) -> None:
    fetched(cache, kinds.folder("sd2") / "vae", "owner/vae")
    base = load_base(Source(str(kinds.folder("sd1")), vae="owner/vae"), device="cpu")
    assert base.vae_sha256 == load_base(str(kinds.folder("sd2")), device="cpu").vae_sha256
    with pytest.raises(UnlearnError, match="--vae owner/none could not be loaded"):
        load_base(Source(str(kinds.folder("sd1")), vae="owner/none"), device="cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_a_vae_file_for_a_base_from_the_hub(cache: Path, kinds: Kinds, kind: str) -> None:
    """A file states neither sizes nor scale, so those of the base's own VAE are used."""
    place = fetched(cache, kinds.folder(kind), "owner/model")
    file = place / "vae" / "diffusion_pytorch_model.safetensors"
    base = load_base(Source("owner/model", vae=str(file)), device="cpu")
    plain = load_base("owner/model", device="cpu")
    assert base.vae_sha256 == plain.vae_sha256
    assert base.pipeline.vae.config.scaling_factor == plain.pipeline.vae.config.scaling_factor


def test_pickles_from_the_hub(cache: Path, kinds: Kinds) -> None:
    place = fetched(cache, kinds.folder("sd1"), "owner/pickled")
    (place / "unet" / "diffusion_pytorch_model.safetensors").rename(place / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(UnlearnError, match="owner/pickled could not be loaded.*--allow_pickle"):
        load_base("owner/pickled", device="cpu")
