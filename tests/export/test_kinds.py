"""PEFT, Diffusers, a reader of the kohya format, a merged folder and a merged file all compute the same function."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from base_kinds import PREDICTION, make_base, open_pipeline, predict, sgm_spelled, spelled
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from export_runs import SLUG, exported, hand_run, read_header, training_record, write_run
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor, nn

from sd_unlearn.errors import UnlearnError, UsageError
from sd_unlearn.export import merge
from sd_unlearn.export.trained_run import TEXT_ADAPTER_2_DIR
from sd_unlearn.io.files import write_json
from sd_unlearn.io.reading import read_json
from sd_unlearn.io.run_folder import ADAPTER_DIR, DIFFUSERS_FILE, TEXT_ADAPTER_DIR
from sd_unlearn.models import lora
from sd_unlearn.models.base import Base, load_base, network_sha256
from sd_unlearn.models.recorded_base import check_recorded
from sd_unlearn.models.source import Source

KINDS = ("sd1", "sd2", "sdxl")
STRENGTHS = (0.0, 0.5, 1.0)
TOLERANCE = 1e-4
EFFECT = 20 * TOLERANCE  # minimum effect of a LoRA; without one, the comparisons would prove nothing
ENCODERS = {"text_encoder": TEXT_ADAPTER_DIR, "text_encoder_2": TEXT_ADAPTER_2_DIR}
CASES: dict[str, dict[str, Any]] = {
    "alpha is not rank": {"r": 4, "lora_alpha": 1.4},
    "rslora": {"r": 4, "lora_alpha": 1.5, "use_rslora": True},
    "ranks and alphas differ": {
        "r": 4,
        "lora_alpha": 3,
        "rank_pattern": {"to_k": 2, "conv1": 6},
        "alpha_pattern": {"ff.net.2": 0.7, "to_k": 9},
    },
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _any_base_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Load the base with Diffusers' own loader, with the SHA-256 of its UNet."""

    def load(record: dict[str, Any], *_: Any, name: str | None = None, **__: Any) -> Base:
        name = name or record["name"]
        pipeline = DiffusionPipeline.from_pretrained(name)
        sha256 = network_sha256(pipeline.unet), network_sha256(pipeline.vae)
        base = Base(name, pipeline, sha256[0], torch.device("cpu"), Source(name), sha256[1], "")
        check_recorded(base, record)
        return base

    monkeypatch.setattr(merge, "load_recorded_base", load)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: make_base(kind, tmp_path_factory.mktemp("base") / kind) for kind in KINDS}


def adapted(network: nn.Module, **settings: Any) -> PeftModel:
    """A LoRA on every linear layer and convolution, with up weights that are not zero, as after training."""
    everything = [n for n, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    torch.manual_seed(1)
    model = PeftModel(
        network,
        LoraConfig(target_modules=everything, init_lora_weights="gaussian", **settings),
        adapter_name=lora.ADAPTER_NAME,
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn_like(parameter))
            if "magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
    return model.eval()


def trained_run(base: Path, run: Path, kind: str, **settings: Any) -> PeftModel:
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    record = training_record(
        settings["r"],
        settings["lora_alpha"],
        name=str(base),
        kind=kind,
        sha256=network_sha256(unet),
        prediction_type=PREDICTION[kind],
    )
    write_run(run, record)
    model = adapted(unet, **settings)
    lora.save(model, run / ADAPTER_DIR)
    return model


def trained_noise(model: PeftModel, strength: float) -> Tensor:
    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    for layer in layers:
        layer.set_scale(lora.ADAPTER_NAME, strength)
    noise = predict(model)
    for layer in layers:
        layer.set_scale(lora.ADAPTER_NAME, 1.0)
    return noise


def kohya_weights(networks: dict[str, nn.Module], file: Path, strength: float) -> None:
    """An independent reader of the format: W + strength * alpha / rank * up @ down, or W + strength * `.diff`."""
    tensors = load_file(file)
    for key in sorted({name.split(".")[0] for name in tensors}):
        weight = networks[key].weight
        if f"{key}.diff" in tensors:
            weight.data += strength * tensors.pop(f"{key}.diff")
            continue
        down, up = tensors.pop(f"{key}.lora_down.weight"), tensors.pop(f"{key}.lora_up.weight")
        scale = tensors.pop(f"{key}.alpha").item() / len(down) if f"{key}.alpha" in tensors else 1.0
        weight.data += strength * scale * (up.flatten(1) @ down.flatten(1)).view(weight.shape)
    assert not tensors, "keys that nobody reads"


def kohya_names(pipeline: Any) -> dict[str, nn.Module]:
    """Every module by its name in a kohya file; for SDXL's UNet, the name in the sgm code."""
    if not hasattr(pipeline, "text_encoder_2"):
        return spelled(pipeline.unet, "lora_unet") | _text_spelled(pipeline.text_encoder, "lora_te")
    texts = _text_spelled(pipeline.text_encoder, "lora_te1") | _text_spelled(pipeline.text_encoder_2, "lora_te2")
    return sgm_spelled(pipeline.unet) | texts


def _text_spelled(encoder: nn.Module, prefix: str) -> dict[str, nn.Module]:
    return spelled(getattr(encoder, "text_model", encoder), f"{prefix}_text_model") | spelled(encoder, prefix)


def single_file(file: Path, base: Path) -> Any:
    kind = StableDiffusionXLPipeline if (base / "text_encoder_2").is_dir() else StableDiffusionPipeline
    return kind.from_single_file(file, config=str(base), local_files_only=True)


def readings(base: Path, run: Path, strength: float, place: Path) -> Iterator[tuple[str, Any]]:
    """(name of the reader, the pipeline that it loads from the run's files at a strength)."""
    pipeline = open_pipeline(base)
    pipeline.load_lora_weights(run / "export" / DIFFUSERS_FILE, adapter_name="it")
    pipeline.set_adapters("it", strength)
    yield "diffusers", pipeline
    pipeline = open_pipeline(base)
    kohya_weights(kohya_names(pipeline), run / "export" / f"{SLUG}.safetensors", strength)
    yield "kohya by the format", pipeline
    exported(run, merge=place / f"{strength}", strength=strength)
    yield "merged folder", open_pipeline(place / f"{strength}")
    exported(run, merge=place / f"{strength}.safetensors", strength=strength)
    yield "merged file", single_file(place / f"{strength}.safetensors", base)


def largest(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("kind", KINDS)
def test_all_readers_predict_the_trained_noise(bases: dict[str, Path], tmp_path: Path, kind: str, case: str) -> None:
    base, run = bases[kind], tmp_path / "run"
    model = trained_run(base, run, kind, **CASES[case])
    exported(run)
    untouched = predict(UNet2DConditionModel.from_pretrained(base, subfolder="unet"))
    for strength in STRENGTHS:
        want = trained_noise(model, strength)
        moved = largest(want, untouched)
        assert moved < TOLERANCE if strength == 0 else moved > EFFECT
        for reader, pipeline in readings(base, run, strength, tmp_path):
            assert largest(predict(pipeline.unet), want) < TOLERANCE, f"{reader} at strength {strength}"


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_kohya_names_are_read_by_diffusers_too(bases: dict[str, Path], tmp_path: Path, kind: str) -> None:
    model = trained_run(bases[kind], tmp_path / "run", kind, r=4, lora_alpha=1.4)
    _, file = exported(tmp_path / "run")
    pipeline = open_pipeline(bases[kind])
    pipeline.load_lora_weights(file)
    assert largest(predict(pipeline.unet), predict(model)) < TOLERANCE


def text_states(pipeline: Any) -> list[Tensor]:
    """Hidden states of each text encoder, and the pooled embedding that SDXL takes."""
    ids = torch.arange(40).view(2, 20)
    found = []
    with torch.no_grad():
        for name in ENCODERS:
            if getattr(pipeline, name, None) is not None:
                made = getattr(pipeline, name)(ids, output_hidden_states=True)
                found += [made[0], made.hidden_states[-1]]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_text_encoders_are_in_every_output(bases: dict[str, Path], tmp_path: Path, kind: str) -> None:
    base, run, whole = bases[kind], tmp_path / "run", open_pipeline(bases[kind])
    unet = trained_run(base, run, kind, r=4, lora_alpha=1.4)
    plain = text_states(open_pipeline(bases[kind]))
    for name, folder in ENCODERS.items():
        if getattr(whole, name, None) is not None:
            model = adapted(getattr(whole, name), r=2, lora_alpha=3.0)
            lora.save(model, run / folder)
    want = text_states(whole)
    assert all(largest(a, b) > EFFECT for a, b in zip(want, plain, strict=True))
    exported(run)
    for reader, pipeline in readings(base, run, 1.0, tmp_path):
        for a, b in zip(text_states(pipeline), want, strict=True):
            assert largest(a, b) < TOLERANCE, reader
        assert largest(predict(pipeline.unet), predict(unet)) < TOLERANCE, reader


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_file_holds_the_vae_and_describes_itself(bases: dict[str, Path], tmp_path: Path, kind: str) -> None:
    trained_run(bases[kind], tmp_path / "run", kind, r=4, lora_alpha=1.4)
    exported(tmp_path / "run", merge=tmp_path / "a.safetensors", strength=0.5)
    read, base = single_file(tmp_path / "a.safetensors", bases[kind]).vae.state_dict(), open_pipeline(bases[kind])
    assert all(torch.equal(read[key], value) for key, value in base.vae.state_dict().items())
    header = read_header(tmp_path / "a.safetensors")
    names = {
        "sd1": "stable-diffusion-v1",
        "sd2": "stable-diffusion-v2-768-v",
        "sdxl": "stable-diffusion-xl-v1-base",
    }
    assert header["modelspec.architecture"] == names[kind]
    assert header["modelspec.implementation"] == "sgm"
    assert (header["sd_unlearn.strength"], header["sd_unlearn.concept"]) == ("0.5", "Brad Pitt")
    assert not any(key.startswith("ss_") for key in header), "a checkpoint has no keys of a LoRA"


def test_half_precision_changes_the_predicted_noise_little(bases: dict[str, Path], tmp_path: Path) -> None:
    base, run = bases["sdxl"], tmp_path / "run"
    model = trained_run(base, run, "sdxl", r=4, lora_alpha=1.4)
    exported(run, dtype="fp16", merge=tmp_path / "a.safetensors")
    for file in (run / "export" / DIFFUSERS_FILE, run / "export" / f"{SLUG}.safetensors", tmp_path / "a.safetensors"):
        kinds = {value.dtype for key, value in load_file(file).items() if not key.endswith(".alpha")}
        assert kinds == {torch.float16}, file.name
    alphas = {v.dtype for k, v in load_file(run / "export" / f"{SLUG}.safetensors").items() if k.endswith(".alpha")}
    assert alphas == {torch.float32}
    for unet in (loaded := open_pipeline(base)).unet, single_file(tmp_path / "a.safetensors", base).unet:
        if unet is loaded.unet:
            loaded.load_lora_weights(run / "export" / DIFFUSERS_FILE)
        assert 0 < largest(predict(unet.float()), predict(model)) < 2e-2


# ---- DoRA ----


@pytest.mark.parametrize("kind", KINDS)
def test_every_reader_predicts_the_noise_of_a_trained_dora(bases: dict[str, Path], tmp_path: Path, kind: str) -> None:
    base, run = bases[kind], tmp_path / "run"
    model = trained_run(base, run, kind, r=4, lora_alpha=1.4, use_dora=True)
    exported(run)
    want = predict(model)
    without = {k: v for k, v in model.state_dict().items() if "magnitude" in k}
    assert without, "PEFT stores magnitudes"
    for reader, pipeline in readings(base, run, 1.0, tmp_path):
        assert largest(predict(pipeline.unet), want) < TOLERANCE, reader
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1.5)
    assert largest(predict(model), want) > EFFECT, "the magnitudes have an effect"


def test_the_kohya_file_of_a_dora_mixes_linearly_down_to_the_base(bases: dict[str, Path], tmp_path: Path) -> None:
    """PEFT's scale acts inside DoRA's norm, so Diffusers at strength 0 is not the base. The other files are."""
    base, run = bases["sd1"], tmp_path / "run"
    trained_run(base, run, "sd1", r=4, lora_alpha=1.4, use_dora=True)
    exported(run)
    untouched = predict(UNet2DConditionModel.from_pretrained(base, subfolder="unet"))
    found = {who: predict(pipeline.unet) for who, pipeline in readings(base, run, 0.0, tmp_path)}
    assert largest(found.pop("diffusers"), untouched) > EFFECT
    assert all(largest(noise, untouched) < TOLERANCE for noise in found.values())
    halves = {who: predict(pipeline.unet) for who, pipeline in readings(base, run, 0.5, tmp_path)}
    assert largest(halves["kohya by the format"], halves["merged folder"]) < TOLERANCE


def test_a_dora_on_a_text_encoder_can_only_be_merged(bases: dict[str, Path], tmp_path: Path) -> None:
    """The loader of Diffusers would drop its magnitudes."""
    base, run, whole = bases["sd1"], tmp_path / "run", open_pipeline(bases["sd1"])
    unet = trained_run(base, run, "sd1", r=4, lora_alpha=1.4, use_dora=True)
    lora.save(adapted(whole.text_encoder, r=2, lora_alpha=3.0, use_dora=True), run / TEXT_ADAPTER_DIR)
    with pytest.raises(UnlearnError, match=r"DoRA on a text encoder.*--merge"):
        exported(run)
    assert merge_path(run, tmp_path / "a.safetensors") == [tmp_path / "a.safetensors"]
    read = single_file(tmp_path / "a.safetensors", base)
    assert largest(predict(read.unet), predict(unet)) < TOLERANCE
    assert largest(text_states(read)[0], text_states(whole)[0]) < TOLERANCE
    assert largest(text_states(read)[0], text_states(open_pipeline(base))[0]) > EFFECT
    assert not (run / "export").exists()


# ---- full UNets and errors ----


def full_run(base: Path, run: Path) -> Tensor:
    """A run of --method full; returns what its UNet predicts."""
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    write_run(run, training_record(4, 4.0, name=str(base), sha256=network_sha256(unet)))
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    unet.save_pretrained(run / "unet")
    return predict(unet)


def test_a_full_unet_is_merged(bases: dict[str, Path], tmp_path: Path) -> None:
    base, run = bases["sd1"], tmp_path / "run"
    want = full_run(base, run)
    untouched = predict(UNet2DConditionModel.from_pretrained(base, subfolder="unet"))
    exported_paths = [merge_path(run, tmp_path / name) for name in ("folder", "a.safetensors")]
    assert exported_paths == [[tmp_path / "folder"], [tmp_path / "a.safetensors"]]
    for pipeline in (open_pipeline(tmp_path / "folder"), single_file(tmp_path / "a.safetensors", base)):
        assert largest(predict(pipeline.unet), want) < TOLERANCE < largest(want, untouched)
    merge_path(run, tmp_path / "none", strength=0.0)
    assert torch.equal(predict(open_pipeline(tmp_path / "none").unet), untouched)
    assert "sd_unlearn.rank" not in read_header(tmp_path / "a.safetensors")
    assert not (run / "export").exists()


def merge_path(run: Path, path: Path, **options: Any) -> list[Path]:
    from sd_unlearn.config.base import ExportConfig
    from sd_unlearn.export import export

    return export.run(ExportConfig(run=run, merge=path, **options))


def test_a_changed_base_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(bases["sd1"], changed)
    trained_run(changed, tmp_path / "run", "sd1", r=4, lora_alpha=1.4)
    unet = UNet2DConditionModel.from_pretrained(changed, subfolder="unet")
    unet.conv_in.weight.data += 0.1
    unet.save_pretrained(changed / "unet")
    with pytest.raises(UsageError, match="this is another version"):
        merge_path(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["sd2", "sdxl"])
def test_a_merged_file_names_the_schedule_of_zero_terminal_snr(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    run, base = tmp_path / "run", shutil.copytree(bases[kind], tmp_path / "base")
    schedule = read_json(base / "scheduler" / "scheduler_config.json") | {"prediction_type": "v_prediction"}
    write_json(base / "scheduler" / "scheduler_config.json", schedule)
    trained_run(base, run, kind, r=4, lora_alpha=1.4)
    write_json(run / "training.json", read_json(run / "training.json") | {"zero_terminal_snr": True})
    merge_path(run, tmp_path / "a.safetensors")
    assert "ztsnr" in load_file(tmp_path / "a.safetensors")
    assert "zero terminal SNR" in read_header(tmp_path / "a.safetensors")["modelspec.usage_hint"]
    read = load_base(Source(str(tmp_path / "a.safetensors"), single_file_config=str(base)), device="cpu")
    assert read.pipeline.scheduler.config.rescale_betas_zero_snr


def test_a_base_that_was_moved_is_named(bases: dict[str, Path], tmp_path: Path) -> None:
    run, there = tmp_path / "run", shutil.copytree(bases["sd1"], tmp_path / "there")
    trained_run(there, run, "sd1", r=4, lora_alpha=1.4)
    there.rename(tmp_path / "here")
    moved = {"pretrained_model_name_or_path": str(tmp_path / "here")}
    assert merge_path(run, tmp_path / "merged", **moved)[-1] == tmp_path / "merged"
    with pytest.raises(UsageError, match="this is another version"):
        merge_path(run, tmp_path / "other", pretrained_model_name_or_path=str(bases["sd2"]))
    with pytest.raises(UsageError, match="--pretrained_model_name_or_path .* is for --merge and DoRA"):
        exported(run, **moved)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("a.ckpt", "pickle"),
        ("a.pth", "pickle"),
        ("a.CKPT", "pickle"),
        ("there.safetensors", "exists"),
        ("full", "exists"),
        ("file/a", "written"),
    ],
)
def test_an_unusable_checkpoint_path_is_refused_before_anything_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, says: str
) -> None:
    (tmp_path / "there.safetensors").write_bytes(b"somebody's model")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "model_index.json").write_text("{}")
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(merge, "load_recorded_base", None)
    with pytest.raises(UsageError, match=f"--merge .*{says}"):
        merge_path(tmp_path / "no run needed", tmp_path / name)
    assert (tmp_path / "there.safetensors").read_bytes() == b"somebody's model"


def test_a_suffix_in_capitals_is_that_of_a_file_too(bases: dict[str, Path], tmp_path: Path) -> None:
    trained_run(bases["sd1"], tmp_path / "run", "sd1", r=4, lora_alpha=1.4)
    merge_path(tmp_path / "run", tmp_path / "a.SAFETENSORS")
    assert "sd_unlearn.strength" in read_header(tmp_path / "a.SAFETENSORS")
    (tmp_path / "b.Safetensors").mkdir()
    with pytest.raises(UsageError, match="exists"):
        merge_path(tmp_path / "run", tmp_path / "b.Safetensors")


def test_the_current_folder_is_refused_as_checkpoint_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"--merge \. is the current folder"):
        merge_path(tmp_path / "no run needed", Path())


@pytest.mark.parametrize("name", ["out", f"out/{SLUG}.safetensors", f"out/../out/{DIFFUSERS_FILE}"])
def test_a_checkpoint_does_not_overwrite_the_lora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(merge, "load_recorded_base", None)
    run = hand_run(tmp_path / "run")
    with pytest.raises(UsageError, match="--merge .* where the LoRA is written"):
        merge_path(run, tmp_path / name, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_merged_folder_does_not_contain_the_path_of_its_base(bases: dict[str, Path], tmp_path: Path) -> None:
    trained_run(bases["sdxl"], tmp_path / "run", "sdxl", r=4, lora_alpha=1.4)
    merge_path(tmp_path / "run", tmp_path / "out")
    configs = list((tmp_path / "out").rglob("*.json"))
    assert len(configs) > 5
    assert not [path for path in configs if str(bases["sdxl"]) in path.read_text(encoding="utf-8")]


def test_values_too_large_for_fp16_are_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    trained_run(bases["sd1"], tmp_path / "run", "sd1", r=4, lora_alpha=1.4)
    adapter = tmp_path / "run" / ADAPTER_DIR / "adapter_model.safetensors"
    from safetensors.torch import save_file

    save_file({k: v * 1e6 if "conv_in" in k and "lora_A" in k else v for k, v in load_file(adapter).items()}, adapter)
    for name in ("folder", "a.safetensors"):
        with pytest.raises(UnlearnError, match=r"conv_in.*65504.*--dtype fp32"):
            merge_path(tmp_path / "run", tmp_path / name, dtype="fp16")
        assert not (tmp_path / name).exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"strength": 0.5}, "--strength 0.5 is for --merge"),
        ({"strength": float("nan")}, "--strength nan"),
        ({"private": True}, "--private is for --push_to_hub"),
    ],
)
def test_contradicting_options_are_refused(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        exported(tmp_path, **options)
