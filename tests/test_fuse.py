"""`fuse`: two LoRAs of the tiny base become one run that every other command reads."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from diffusers.models.normalization import AdaLayerNormContinuous
from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2DCrossAttn
from export_runs import exported, read_header
from flow_kinds import FlowKinds
from out_of_memory import limit_memory
from safetensors.torch import load_file, save_file

from sd_unlearn import cli, fusion
from sd_unlearn.config.fuse import FuseConfig, FuseMethod
from sd_unlearn.config.objective import Weights
from sd_unlearn.config.train import TrainConfig
from sd_unlearn.data.encoding import encode_captions
from sd_unlearn.errors import UsageError
from sd_unlearn.evaluation.loras import open_lora
from sd_unlearn.io.reading import read_json
from sd_unlearn.io.run_folder import ADAPTER_DIR, weights_sha256
from sd_unlearn.models import lora, sampling
from sd_unlearn.models.base import Base, load_base
from sd_unlearn.models.layer_inputs import LayerInputs
from sd_unlearn.models.offload import OffloadedLinear
from sd_unlearn.models.sampling import Sampler, default_sampler
from sd_unlearn.models.source import Source
from sd_unlearn.report import reproduce
from sd_unlearn.training import trainer

pytestmark = pytest.mark.usefixtures("one_thread")
# one letter a token: the captions end alike, so the subjects are the first letters
FILE = "name: {name}\ncaption: {caption}\ngeneric: it x\nkeep: [ab, '{{c,d}} e']\n"
CONCEPTS = {"seven": "7 x", "three": "3 x"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> list[Path]:
    folder = tmp_path_factory.mktemp("fuse")
    for name, caption in CONCEPTS.items():
        (folder / f"{name}.yaml").write_text(FILE.format(name=name, caption=caption))
        trainer.run(
            TrainConfig(
                concept=str(folder / f"{name}.yaml"),
                pretrained_model_name_or_path=str(tiny_base),
                objective="uce",
                output_dir=folder / name,
            )
        )
    return [folder / name for name in CONCEPTS]


@pytest.fixture(scope="module", params=["least_squares", "sum"])
def fused(request: pytest.FixtureRequest, runs: list[Path]) -> Path:
    output = runs[0].parent / f"fused-{request.param}"
    return fusion.run(FuseConfig(lora=[str(run) for run in runs], output_dir=output, method=request.param))


def changes(run: Path, base_folder: Path) -> dict[str, torch.Tensor]:
    base = load_base(Source(str(base_folder)))
    return {name: edit.up @ edit.down for name, edit in fusion.edits_of(open_lora(str(run)), base).items()}


def test_the_record_names_both_and_the_error(fused: Path, runs: list[Path]) -> None:
    record = read_json(fused / "training.json")
    assert record["concepts"] == ["seven", "three"]
    assert [lora["name"] for lora in record["fused"]] == ["seven", "three"]
    assert record["truncation_error"] < 1e-6
    assert [concept.name for concept in open_lora(str(fused)).concepts] == ["seven", "three"]


def test_it_is_exported_as_any_lora(fused: Path, tmp_path: Path) -> None:
    for file in exported(fused, output_dir=tmp_path / "export"):
        header = read_header(file)
        assert json.loads(header["sd_unlearn.concepts"]) == ["seven", "three"]
        assert float(header["sd_unlearn.truncation_error"]) < 1e-6
        assert header["sd_unlearn.objective"] == "fuse"


def test_what_it_changes(fused: Path, runs: list[Path], tiny_base: Path) -> None:
    whole, first, second = (changes(run, tiny_base) for run in (fused, *runs))
    assert whole.keys() == first.keys()
    same = [torch.allclose(whole[name], first[name] + second[name], atol=1e-5) for name in whole]
    assert all(same) == fused.name.endswith("sum")


def test_the_command_of_the_report_repeats_it(
    fused: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command, _ = reproduce.commands(fused)
    assert command == f"sd-unlearn fuse --config {fused.name}/config.yaml --output_dir {fused.name}-again"
    monkeypatch.chdir(fused.parent)
    assert cli.main(shlex.split(command)[1:]) == 0
    assert capsys.readouterr().out == f"{fused.name}-again\n"
    assert weights_sha256(Path(f"{fused.name}-again")) == weights_sha256(fused)


@pytest.mark.parametrize("options", [{"offload": True}, {"mixed_precision": "fp16"}])
def test_the_base_may_be_offloaded_or_in_half_precision(
    runs: list[Path], tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    loras = [Path(shutil.copytree(run, tmp_path / run.name)) for run in runs]
    for seed, run in enumerate(loras):
        randomize(run, tiny_base, seed)
    used: list[Base] = []
    monkeypatch.setattr(fusion, "load_base", lambda *given: used.append(load_base(*given)) or used[-1])
    monkeypatch.setattr(fusion, "choose_precision", lambda option: option)  # on a CPU always no
    config = FuseConfig(lora=list(map(str, loras)), output_dir=tmp_path / "plain")
    plain = fusion.run(config)
    other = fusion.run(replace(config, output_dir=tmp_path / "other", **options))
    networks = [base.network for base in used]
    assert [any(isinstance(m, OffloadedLinear) for m in n.modules()) for n in networks] == [False, "offload" in options]
    assert networks[1].dtype == (torch.float32 if "offload" in options else torch.float16)
    if "offload" in options:
        assert weights_sha256(plain) == weights_sha256(other)
    tensors = load_file(other / ADAPTER_DIR / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    whole, rounded = changes(plain, tiny_base), changes(other, tiny_base)
    assert all((whole[name] - rounded[name]).norm() < 0.02 * whole[name].norm() for name in whole)


def test_a_lower_rank_says_what_it_costs(runs: list[Path], tmp_path: Path) -> None:
    loras = [str(run) for run in runs]
    run = fusion.run(FuseConfig(lora=loras, output_dir=tmp_path / "low", method="sum", rank=1))
    assert read_json(run / "training.json")["truncation_error"] > 0.01


def randomize(run: Path, base_folder: Path, seed: int) -> None:
    """Give a run a LoRA on all layers instead, with random weights."""
    network = load_base(Source(str(base_folder))).network
    model = lora.attach(network, Weights(rank=2), lora.network_targets(network, None), seed)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    lora.save(model, run / ADAPTER_DIR)


def test_every_prompt_has_an_image_and_a_long_list_is_thinned_out_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fusion.prompts_of_images(["a", "b"], 5) == ["a", "b", "a", "b", "a"]
    assert fusion.prompts_of_images(list("abcdef"), 4) == list("abcdef")  # six concepts of one LoRA
    monkeypatch.setattr(fusion, "MAX_PROMPTS", 2)
    assert fusion.prompts_of_images(["a", "b", "c"], 1) == ["a", "c"]


def test_a_module_that_a_file_fuses_is_read_in_parts(flow_kinds: FlowKinds, tmp_path: Path) -> None:
    base = load_base(Source(str(flow_kinds.folder("sd35"))))
    width = base.network.get_submodule("transformer_blocks.0.attn.to_k").in_features
    down, up = torch.randn(2, width), torch.randn(3 * width, 2)
    name = "diffusion_model.joint_blocks.0.x_block.attn.qkv"
    save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, tmp_path / "a.safetensors")
    edits = fusion.edits_of(open_lora(str(tmp_path / "a.safetensors")), base)
    for number, part in enumerate(("to_q", "to_k", "to_v")):
        edit = edits[f"transformer_blocks.0.attn.{part}"]
        assert torch.equal(edit.up, up.chunk(3)[number].double())
        assert torch.equal(edit.down, down.double())


def test_the_empty_caption_of_guidance_counts_among_the_retained_only(loaded_base: Base) -> None:
    name, sums = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k", {}
    layers = {name: loaded_base.network.get_submodule(name)}
    factors = {name: torch.eye(layers[name].in_features)}
    for part, own in (("LoRA", factors), ("retained", None)):
        inputs = LayerInputs(layers, {name: None}, {})
        fusion.record_inputs(loaded_base, inputs, ["7 x"], 1, {name: 1.0}, own)
        sums[part] = inputs.total(name)
    prompt, empty = (tokens.T @ tokens / len(tokens) for tokens in encode_captions(loaded_base, ["7 x", ""]))
    steps = default_sampler(loaded_base.source).steps
    assert torch.allclose(sums["LoRA"], steps * prompt, rtol=1e-4, atol=1e-4)
    assert torch.allclose(sums["retained"], steps * (prompt + empty) / 2, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(sums["retained"], sums["LoRA"], rtol=0.01)


@pytest.mark.parametrize(
    ("name", "late", "own"),
    [
        ("tiny", UNetMidBlock2DCrossAttn, True),
        ("tiny", UNetMidBlock2DCrossAttn, False),
        ("flux2-klein-base", AdaLayerNormContinuous, True),  # with a pass of its own for the empty caption
    ],
)
def test_what_was_recorded_before_memory_ran_out_does_not_count(
    tiny_base: Path, flow_kinds: FlowKinds, monkeypatch: pytest.MonkeyPatch, name: str, late: type, own: bool
) -> None:
    """Each attempt fails in a late module, after the hooks of earlier layers."""
    base = load_base(str(tiny_base if name == "tiny" else flow_kinds.folder(name)), device="cpu")
    monkeypatch.setattr(sampling, "default_sampler", lambda _: Sampler(2, 3.0, 4, 64))
    layers = {n: m for n, m in base.network.named_modules() if type(m) is torch.nn.Linear}
    factors = {n: torch.ones(1, layer.in_features) for n, layer in layers.items()} if own else None

    def recorded() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        inputs = LayerInputs(layers, dict.fromkeys(layers), {})
        products = fusion.record_inputs(base, inputs, ["7 x", "3 x"], 3, dict.fromkeys(layers, 1.0), factors)
        return {n: inputs.total(n) for n in layers}, products

    expected = recorded()
    rows = limit_memory(monkeypatch, late, "forward", 2)
    found = recorded()
    assert max(rows) > 2 >= rows[-1]  # some attempts failed
    for of_whole, of_parts in zip(expected, found, strict=True):
        assert of_whole.keys() == of_parts.keys()
        assert all(torch.allclose(of_parts[n], of_whole[n], rtol=1e-3, atol=1e-4) for n in of_whole)
    assert (len(found[1]) > 0) == own


def test_the_noise_schedule_is_that_of_the_loras(runs: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    changed: list[Base] = []
    monkeypatch.setattr(fusion, "use_zero_terminal_snr", changed.append)
    loras = [Path(shutil.copytree(run, run.name)) for run in runs]
    for number, run in enumerate(loras):
        record = read_json(run / "training.json") | {"zero_terminal_snr": True}
        (run / "training.json").write_text(json.dumps(record))
        config = FuseConfig(lora=[str(run) for run in loras], output_dir=Path("fused"), method="sum")
        if number == 0:
            with pytest.raises(UsageError, match="--zero_terminal_snr"):
                fusion.run(config)
    assert open_lora(str(fusion.run(config))).zero_terminal_snr
    assert len(changed) == 1


@pytest.mark.parametrize("method", get_args(FuseMethod))
def test_convolutions_are_fused_too(runs: list[Path], tmp_path: Path, tiny_base: Path, method: FuseMethod) -> None:
    loras = [Path(shutil.copytree(run, tmp_path / run.name)) for run in runs]
    for seed, run in enumerate(loras):
        randomize(run, tiny_base, seed)
    output = fusion.run(FuseConfig(lora=list(map(str, loras)), output_dir=tmp_path / "fused", method=method))
    whole, first, second = (changes(run, tiny_base) for run in (output, *loras))
    assert "conv_in" in whole
    for name, change in whole.items():
        assert torch.linalg.matrix_rank(change) <= 4
        assert torch.allclose(change, first[name] + second[name], atol=1e-5) == (method == "sum"), name
    for name in ("conv_in", "mid_block.resnets.0.conv1"):  # between nothing and the sum
        assert 0 < (whole[name] * first[name]).sum() <= 1.01 * (first[name] * (first[name] + second[name])).sum()
    assert len(exported(output, output_dir=tmp_path / "export")) == 2


def test_what_is_refused(runs: list[Path], fused: Path) -> None:
    seven, three = map(str, runs)
    with pytest.raises(UsageError, match="takes two or more LoRAs"):
        fusion.run(FuseConfig(lora=[seven]))
    with pytest.raises(UsageError, match='^fuse: the concept "seven" is listed twice'):
        fusion.run(FuseConfig(lora=[seven, seven]))
    with pytest.raises(UsageError, match="is not empty: add --overwrite"):
        fusion.run(FuseConfig(lora=[seven, three], output_dir=fused))
    for option in ({"keep_weight": 0.5}, {"num_images": 3}):
        with pytest.raises(UsageError, match=f"--{next(iter(option))} .* is for --method least_squares"):
            fusion.run(FuseConfig(lora=[seven, three], method="sum", **option))  # type: ignore[arg-type]


def test_files_of_others_in_a_run_are_not_replaced(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = FuseConfig(lora=[str(run) for run in runs], output_dir=tmp_path / "fused", method="sum", overwrite=True)
    output = fusion.run(config)
    notes = output / ADAPTER_DIR / "notes.txt"
    notes.write_text("mine")
    with pytest.raises(UsageError, match=r"sd-unlearn did not write .*notes\.txt"):
        fusion.run(config)
    notes.unlink()
    monkeypatch.setattr(fusion, "remove_leftovers", lambda _: pytest.fail("not checked again"))
    monkeypatch.setattr(fusion, "check_output", meanwhile(fusion.check_output, lambda: notes.write_text("mine")))
    with pytest.raises(UsageError, match=r"sd-unlearn did not write .*notes\.txt"):
        fusion.run(config)
    assert notes.read_text() == "mine"


def meanwhile(check: Callable[..., None], change: Callable[[], object]) -> Callable[..., None]:
    """The check, after whose first call something changes."""

    def checked(*given: Any) -> None:
        check(*given)
        change()

    return checked


def test_several_processes_are_refused(runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would write the same folder."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="^fuse runs in one process: start it without accelerate launch"):
        fusion.run(FuseConfig(lora=[str(run) for run in runs], output_dir=tmp_path / "fused"))
    assert not (tmp_path / "fused").exists()


def test_a_base_that_was_moved_is_named(runs: list[Path], tmp_path: Path, tiny_base: Path) -> None:
    loras = [Path(shutil.copytree(run, tmp_path / run.name)) for run in runs]
    for run in loras:
        record = read_json(run / "training.json")
        record["base"] |= {"name": str(tmp_path / "gone"), "path": str(tmp_path / "gone")}
        (run / "training.json").write_text(json.dumps(record))
    options: dict[str, Any] = {"lora": list(map(str, loras)), "output_dir": tmp_path / "fused", "method": "sum"}
    with pytest.raises(UsageError, match="not at .*/gone any more.* --pretrained_model_name_or_path"):
        fusion.run(FuseConfig(**options))
    run = fusion.run(FuseConfig(**options, pretrained_model_name_or_path=str(tiny_base)))
    assert read_json(run / "training.json")["base"]["path"] == str(tiny_base)


def test_no_input_is_overwritten(runs: list[Path], tmp_path: Path) -> None:
    seven, three = runs
    file = exported(three, output_dir=tmp_path / "files")[1]
    before = [weights_sha256(seven), file.read_bytes()]
    link = tmp_path / "link"
    link.symlink_to(seven)
    for output in (seven, link, seven / "fused", seven.parent, file.parent):
        with pytest.raises(UsageError, match="--output_dir .* one of the LoRAs to fuse"):
            fusion.run(FuseConfig(lora=[str(seven), str(file)], output_dir=output, overwrite=True))
    assert [weights_sha256(seven), file.read_bytes()] == before
    fusion.check_output(file.parent / "fused", False, [open_lora(str(file))])
