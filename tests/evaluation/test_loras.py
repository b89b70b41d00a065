"""LoRAs from runs, files of both formats and Hub ids, applied to a base at a strength."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from evaluation_runs import make_run
from safetensors.torch import load_file, save_file

from sd_unlearn.config.base import ExportConfig
from sd_unlearn.config.evaluate import EvaluateConfig
from sd_unlearn.errors import UnlearnError, UsageError
from sd_unlearn.evaluation import evaluate
from sd_unlearn.evaluation.loras import open_lora, open_run, unique_names
from sd_unlearn.export import export
from sd_unlearn.models.base import Base, load_base

pytestmark = pytest.mark.usefixtures("one_thread")
FEW = {"groups": ["direct"], "num_images": 1, "num_inference_steps": 1, "metrics": ["digits"]}
RECORD = {"lora_alpha": 2.0, "correction": "pu", "caption_mode": "fixed", "version": "0", "config_sha256": "0"}


@pytest.fixture(scope="module")
def run(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "seven", tiny_base)


def kohya_file(run: Path, target: Path, header: dict[str, str] | None = None) -> Path:
    """The run's LoRA under the names of ComfyUI and A1111, alpha = rank."""
    tensors = {}
    for key, value in load_file(run / "adapter" / "adapter_model.safetensors").items():
        module, side = key.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".lora_", 1)
        name = "lora_unet_" + module.replace(".", "_")
        tensors[f"{name}.lora_{'down' if side == 'A' else 'up'}.weight"] = value.contiguous()
        tensors[f"{name}.alpha"] = torch.tensor(2.0)
    save_file(tensors, target, header or {})
    return target


def predict(base: Base) -> torch.Tensor:
    noisy, text = torch.ones(1, 4, 8, 8), torch.ones(1, 24, 16)
    with torch.no_grad():
        return base.pipeline.unet(noisy, torch.tensor([500]), encoder_hidden_states=text).sample


def test_run_and_file_are_equivalent_and_restore_the_base(run: Path, tiny_base: Path, tmp_path: Path) -> None:
    base = load_base(str(tiny_base), device="cpu")
    plain = predict(base)
    found = {}
    for name, given in (("run", str(run)), ("file", str(kohya_file(run, tmp_path / "seven.safetensors")))):
        lora = open_lora(given)
        for strength in (1.0, 0.5, 0.0):
            with lora.applied_to(base, strength):
                found[name, strength] = predict(base)
            assert torch.equal(predict(base), plain)
    for strength in (1.0, 0.5, 0.0):
        assert torch.allclose(found["run", strength], found["file", strength], atol=1e-5)
    assert torch.allclose(found["run", 0.0], plain, atol=1e-5)
    assert (found["run", 1.0] - plain).abs().max() > 1e-2
    assert (found["run", 0.5] - found["run", 1.0]).abs().max() > 1e-3


def test_dora_run_and_file_are_equivalent_at_all_strengths(tiny_base: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "dora", tiny_base, use_dora=True, **RECORD)
    merged = tmp_path / "merged"
    options = {"merge": merged, "strength": 0.5}
    files = [p for p in export.run(ExportConfig(run=run, **options)) if p.suffix == ".safetensors"]
    base = load_base(str(tiny_base), device="cpu")
    found = {}
    for given in (run, *files):
        for strength in (1.0, 0.5):
            with open_lora(str(given)).applied_to(base, strength):
                found[given, strength] = predict(base)
    assert len(files) == 2, "the magnitudes for Diffusers, and the whole changes for ComfyUI"
    for file in files:
        for strength in (1.0, 0.5):
            assert torch.allclose(found[run, strength], found[file, strength], atol=1e-4)
    assert (found[run, 0.5] - found[run, 1.0]).abs().max() > 1e-2
    assert torch.allclose(predict(load_base(str(merged), device="cpu")), found[run, 0.5], atol=1e-4)


def test_zero_terminal_snr_of_files_and_runs(run: Path, tmp_path: Path) -> None:
    told = [{"sd_unlearn.zero_terminal_snr": said} for said in ("True", "False")]
    files = [kohya_file(run, tmp_path / f"{n}.safetensors", header) for n, header in enumerate([*told, {}])]
    loras = [open_lora(str(file)) for file in files]
    assert [lora.zero_terminal_snr for lora in loras] == [True, False, None]
    assert open_run(run).zero_terminal_snr is False


def test_attributes_of_runs_and_files(run: Path, tmp_path: Path) -> None:
    lora = open_run(run)
    assert (lora.name, lora.is_run, lora.concept and lora.concept.slug) == ("seven", True, "seven")
    assert lora.base_hashes["sha256"]
    header = {"sd_unlearn.concept": "seven", "sd_unlearn.base": "digits", "sd_unlearn.base_sha256": "ab"}
    file = open_lora(str(kohya_file(run, tmp_path / "mine.safetensors", header)))
    assert (file.name, file.is_run, file.base_name, file.base_hashes) == ("mine", False, "digits", {"sha256": "ab"})
    assert file.concept is not None  # the file in prompts/
    assert file.concept.alternatives == []
    assert open_lora(str(tmp_path)).path == file.path  # the only one of its folder
    header["sd_unlearn.concept"] = "seven?"  # another concept, whose file would have the same name
    assert open_lora(str(kohya_file(run, tmp_path / "mine.safetensors", header))).concept is None
    unknown = open_lora(str(kohya_file(run, tmp_path / "other.safetensors")))
    assert unknown.concept is None
    with pytest.raises(UsageError, match="2 .safetensors files"):
        open_lora(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.safetensors", None, "not a run folder, a .safetensors file"),
        ("a.bin", b"x", "is not a .safetensors file"),
        ("b.safetensors", b"broken", "damaged"),
    ],
)
def test_missing_or_invalid_lora_is_refused(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        open_lora(str(tmp_path / name))


def test_hub_id_is_downloaded(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    file = kohya_file(run, tmp_path / "seven.safetensors")
    offered = ["README.md", "seven.safetensors"]
    asked: list[tuple[str, str]] = []
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repository: offered)

    def fetch(repository: str, name: str) -> str:
        if name not in offered:
            raise EntryNotFoundError(name)
        asked.append((repository, name))
        return str(file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    lora = open_lora("somebody/forget-seven")
    assert (lora.name, asked) == ("forget-seven", [("somebody/forget-seven", "seven.safetensors")])
    offered.append("other.safetensors")
    with pytest.raises(UsageError, match="has 2 .safetensors files"):
        open_lora("somebody/forget-seven")
    offered.append("pytorch_lora_weights.safetensors")
    monkeypatch.setattr(huggingface_hub, "list_repo_files", None)  # needs the network even for what is downloaded
    open_lora("somebody/forget-seven")
    assert asked[-1][1] == "pytorch_lora_weights.safetensors"


def test_other_weights_and_empty_folders_are_refused(tmp_path: Path) -> None:
    save_file({"conv.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match="is not a LoRA"):
        open_lora(str(tmp_path / "model.safetensors"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no LoRA and no finished training"):
        open_lora(str(tmp_path / "empty"))
    with pytest.raises(UsageError, match="--run .* is not a folder"):
        open_run(tmp_path / "nowhere")
    with pytest.raises(UnlearnError, match="not found locally or on the Hub"):
        open_lora("somebody/their-lora")
    with pytest.raises(UsageError, match="--lora runs/seven is not a run folder"):  # and no Hub id
        open_lora("runs/seven")


def test_lora_of_another_architecture_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    base = load_base(str(tiny_base), device="cpu")
    plain = predict(base)
    where = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    wrong = {
        f"{where}.lora_down.weight": torch.zeros(2, 640),
        f"{where}.lora_up.weight": torch.zeros(640, 2),
        f"{where}.alpha": torch.tensor(2.0),
    }
    save_file(wrong, tmp_path / "wrong.safetensors")
    lora = open_lora(str(tmp_path / "wrong.safetensors"))
    with pytest.raises(UnlearnError, match="does not fit"), lora.applied_to(base, 1):
        pass
    assert torch.equal(predict(base), plain)


def test_lora_names_are_unique(run: Path, tiny_base: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "push" / "seven", tiny_base, seed=1)
    third = make_run(tmp_path / "base", tiny_base, seed=2)
    loras = [open_run(run), open_run(other), open_run(third), open_run(third)]
    names = unique_names(loras)
    assert names[:2] == ["seven", "push-seven"]
    assert "base" not in names
    assert len(set(names)) == 4
    floor = make_run(tmp_path / "floor", tiny_base)  # the id of a model that never saw the concept (attack --floor)
    assert unique_names([open_run(floor)]) == [f"{tmp_path.name}-floor"]


def damaged_run(run: Path, target: Path, value: float = float("nan")) -> Path:
    shutil.copytree(run, target)
    file = target / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    weights[min(weights)][0, 0] = value
    save_file(weights, file)
    return target


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_lora_that_is_not_finite_is_refused_when_it_is_opened(run: Path, tmp_path: Path, value: float) -> None:
    """Nothing is generated or measured, so that no result of it can exist."""
    broken = damaged_run(run, tmp_path / "broken", value)
    for given in (broken, kohya_file(broken, tmp_path / "broken.safetensors")):
        with pytest.raises(UnlearnError, match='lora_(A|down).weight" is not finite'):
            open_lora(str(given))
    with pytest.raises(UnlearnError, match="is not finite"):
        evaluate.run(EvaluateConfig(run=broken))
    assert not (broken / "results.json").exists()


def test_whole_unet_that_is_not_finite_is_refused(run: Path, tiny_base: Path, tmp_path: Path) -> None:
    full = tmp_path / "full"
    shutil.copytree(run, full)
    shutil.rmtree(full / "adapter")
    shutil.copytree(tiny_base / "unet", full / "unet")
    file = full / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["conv_in.bias"][0] = float("nan")
    save_file(weights, file)
    with pytest.raises(UnlearnError, match='"conv_in.bias" is not finite'):
        open_run(full)


def test_lora_of_other_base_weights_gets_no_verdict(run: Path, tiny_base: Path, tmp_path: Path) -> None:
    """Unless the user names the base: then one line says so."""
    header = {"sd_unlearn.concept": "seven", "sd_unlearn.base": str(tiny_base), "sd_unlearn.base_sha256": "ab" * 32}
    file = kohya_file(run, tmp_path / "mine.safetensors", header)
    few = {**FEW, "cache_dir": tmp_path}
    results = evaluate.run(EvaluateConfig(lora=[str(file)], output_dir=tmp_path / "out", **few))  # type: ignore[arg-type]
    (problem,) = [problem for problem in results["problems"] if problem["kind"] == "base"]
    assert (problem["subject"], problem["concept"]) == ("mine", "")
    assert "was trained on other weights" in problem["message"]
    assert str(tiny_base) not in problem["message"]  # no paths of the user


def test_lora_of_another_text_encoder_is_named(run: Path, loaded_base: Base, tmp_path: Path) -> None:
    record = loaded_base.describe()
    header = {f"sd_unlearn.base_{key}": record[key] for key in ("sha256", "text_encoder_sha256")}
    assert (
        open_lora(str(kohya_file(run, tmp_path / "a.safetensors", header))).other_base(loaded_base.describe()) is None
    )
    header["sd_unlearn.base_text_encoder_sha256"] = "ab" * 32
    other = open_lora(str(kohya_file(run, tmp_path / "b.safetensors", header)))
    assert "b was trained on a text encoder with other weights" in str(other.other_base(record))
    del header["sd_unlearn.base_text_encoder_sha256"]  # as older versions exported it
    older = open_lora(str(kohya_file(run, tmp_path / "c.safetensors", header)))
    assert older.other_base(record) is None


def test_lora_of_other_base_weights_on_a_named_base(
    run: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    header = {"sd_unlearn.concept": "seven", "sd_unlearn.base_sha256": "ab" * 32}
    file = kohya_file(run, tmp_path / "mine.safetensors", header)
    few = {**FEW, "cache_dir": tmp_path}
    named = {"pretrained_model_name_or_path": str(tiny_base), "output_dir": tmp_path / "out"}
    results = evaluate.run(EvaluateConfig(lora=[str(file)], **few, **named))  # type: ignore[arg-type]
    assert not [problem for problem in results["problems"] if problem["kind"] == "base"]
    assert "mine was trained on other weights" in capsys.readouterr().err
