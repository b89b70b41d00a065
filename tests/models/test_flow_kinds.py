"""The street on models of the flow-matching kinds: render, train, evaluate, attack and export, as a user types them."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flow_kinds import FLOW_KINDS, KIND_OF, FlowKinds
from safetensors.torch import load_file
from train_runs import flags

from sd_unlearn.cli import main
from sd_unlearn.config.evaluate import EvaluateConfig
from sd_unlearn.config.train import TrainConfig
from sd_unlearn.data.batch import NO_GROUP, Batch
from sd_unlearn.data.encoding import encode_captions
from sd_unlearn.data.find_concept import load_concept
from sd_unlearn.errors import UsageError
from sd_unlearn.evaluation.subjects import check_guidance
from sd_unlearn.io.reading import read_json
from sd_unlearn.models import sampling
from sd_unlearn.models.base import load_base
from sd_unlearn.models.denoiser import Denoiser
from sd_unlearn.models.lora_change import apply_changes, find_modules
from sd_unlearn.models.lora_file import read_lora_file
from sd_unlearn.models.sampling import Sampler, generate_images
from sd_unlearn.models.source import Source
from sd_unlearn.objectives.losses import example_losses
from sd_unlearn.objectives.movement import Movement
from sd_unlearn.objectives.teacher import Teacher
from sd_unlearn.risk import UNLABELED
from sd_unlearn.training.encoded_data import read_data
from sd_unlearn.training.preflight import check_kind
from sd_unlearn.training.setup import default_unconditional

pytestmark = pytest.mark.usefixtures("one_thread")
SIDES = {"qwen-image": 1024}  # whose configuration has none; it is trained at 64 here
ADAPTER = "adapter/adapter_model.safetensors"


@pytest.fixture(scope="module", autouse=True)
def _few_steps() -> Iterator[None]:
    few = Sampler(2, 3.0, 16)
    with pytest.MonkeyPatch.context() as patch:
        for name in (name for name in vars(sampling) if name.endswith("_SAMPLER")):
            patch.setattr(sampling, name, few)
        yield


def base_flags(flow_kinds: FlowKinds, name: str) -> list[str]:
    counts: dict[str, Any] = {"num_unlabeled": 4, "num_mixed_in": 2, "num_positive": 3, "num_keep": 1}
    counts |= {"concept": "seven"} | ({"resolution": 64} if name == "qwen-image" else {})
    return flags({"pretrained_model_name_or_path": str(flow_kinds.folder(name)), **counts})


def training(**changes: object) -> list[str]:
    options: dict[str, object] = {
        "max_train_steps": 2,
        "effective_batch_size": 8,
        "rank": 2,
        "learning_rate": 0.01,
        "validation_steps": 2,
        "lr_warmup_steps": 0,
        "report_to": "none",
    }
    return flags(options | changes)


def rendered(flow_kinds: FlowKinds, name: str) -> Path:
    """The working folder of a base after `render`."""
    place = flow_kinds.root / f"street-{name}"
    if not place.is_dir():
        place.mkdir()
        with contextlib.chdir(place):
            assert main(["render", *base_flags(flow_kinds, name)]) == 0
    return place


def trained(flow_kinds: FlowKinds, name: str) -> Path:
    """The same after `train`."""
    place = rendered(flow_kinds, name)
    if not (place / "runs").is_dir():
        with contextlib.chdir(place):
            assert main(["train", *base_flags(flow_kinds, name), *training()]) == 0
    return place


@pytest.mark.parametrize("name", FLOW_KINDS)
def test_render(flow_kinds: FlowKinds, name: str) -> None:
    manifest = read_json(rendered(flow_kinds, name) / "data" / "seven" / "manifest.json")
    base = manifest["base"]
    assert (base["kind"], base["prediction_type"], base["resolution"]) == (KIND_OF[name], "flow", SIDES.get(name, 64))
    assert manifest["sampler"]["name"] == "FlowMatchEuler"


@pytest.mark.parametrize("name", FLOW_KINDS)
def test_train(flow_kinds: FlowKinds, name: str) -> None:
    place = trained(flow_kinds, name)
    run = place / "runs" / "seven"
    adapter = load_file(run / ADAPTER)
    # every module was reached, but the last block of SD 3 gives the text tokens no output
    untouched = {key for key, value in adapter.items() if "lora_B" in key and not value.any()}
    assert not {key for key in untouched if "transformer_blocks.2" not in key}
    assert any(("attention.to_k" if KIND_OF[name] == "z-image" else "add_k_proj") in key for key in adapter)
    assert (run / "previews" / "step-000002.png").is_file()
    record = read_json(run / "training.json")
    assert record["base"] == read_json(place / "data" / "seven" / "manifest.json")["base"]
    assert record["unconditional"] == (
        0.25 if name in ("sd3", "sd35", "z-image", "flux2-klein-base", "qwen-image") else 0.0
    )


@pytest.mark.parametrize("name", ["sd35", "flux-dev", "z-image", "flux2-dev"])
def test_a_resumed_training_gives_the_same_weights(flow_kinds: FlowKinds, name: str) -> None:
    place = trained(flow_kinds, name)
    more = training(validation_steps=0, checkpointing_steps=1, timestep_sampling="logit_normal")
    with contextlib.chdir(place):
        for output in ("whole", "resumed"):
            assert main(["train", *base_flags(flow_kinds, name), *more, "--output_dir", output]) == 0
        whole = (place / "whole" / ADAPTER).read_bytes()
        assert (place / "resumed" / ADAPTER).read_bytes() == whole != (place / "runs" / "seven" / ADAPTER).read_bytes()
        for folder in ("adapter", "checkpoints/step-000002"):
            shutil.rmtree(place / "resumed" / folder)
        (place / "resumed" / "training.json").unlink()
        again = [*more, "--output_dir", "resumed", "--resume_from_checkpoint", "latest"]
        assert main(["train", *base_flags(flow_kinds, name), *again]) == 0
    assert (place / "resumed" / ADAPTER).read_bytes() == whole


@pytest.mark.parametrize("name", FLOW_KINDS)
def test_evaluate(flow_kinds: FlowKinds, name: str) -> None:
    run = trained(flow_kinds, name) / "runs" / "seven"
    few = ["--groups", "direct", "--num_images", "2", "--num_keep_images", "1"]
    few += ["--resolution", "64"] if name in SIDES else []
    assert main(["evaluate", "--run", str(run), *few]) == 0
    results = read_json(run / "results.json")
    assert results["sampler"]["name"] == "FlowMatchEuler"
    base, unlearned = ([(run / pair[side]).read_bytes() for pair in results["pairs"]] for side in ("base", "image"))
    assert base != unlearned  # the LoRA does something


@pytest.mark.parametrize("option", ["--drop_t5", "--quantize_base int8", "--target noise --snr_gamma 5", "--robust"])
def test_train_with(flow_kinds: FlowKinds, option: str) -> None:
    """--drop_t5 changes the images, so they are rendered with it, too."""
    place, flag = rendered(flow_kinds, "sd35"), option.split()
    data = ["--data_dir", "without-t5"] if option == "--drop_t5" else []
    output = option.split()[0].removeprefix("--")
    with contextlib.chdir(place):
        steps = [*training(validation_steps=0), "--output_dir", output]
        assert main(["train", *base_flags(flow_kinds, "sd35"), *steps, *flag, *data]) == 0
    assert bool(read_json(place / output / "training.json")["base"].get("drop_t5")) == (option == "--drop_t5")


@pytest.mark.parametrize("name", ["sd35", "flux-dev"])
def test_two_concepts_at_once_and_fused(flow_kinds: FlowKinds, name: str) -> None:
    place = trained(flow_kinds, name)
    options = [word for word in base_flags(flow_kinds, name) if word not in ("--concept", "seven")]
    options += training(validation_steps=0)
    with contextlib.chdir(place):
        assert main(["train", "three", *options]) == 0
        assert main(["train", "seven", "three", *options]) == 0
        assert main(["fuse", "runs/seven", "runs/three", "--num_images", "1"]) == 0
        for run in ("seven-three", "seven-three-fused"):
            assert read_json(place / "runs" / run / "training.json")["concepts"] == ["seven", "three"]
            assert main(["export", "--run", f"runs/{run}"]) == 0
    fused, seven, three = (
        set(load_file(place / "runs" / run / ADAPTER)) for run in ("seven-three-fused", "seven", "three")
    )
    assert fused == seven == three


# -- what a base without classifier-free guidance changes --


def test_the_held_prediction_needs_no_offset_without_guidance(flow_kinds: FlowKinds) -> None:
    """FLUX samples without the empty caption, so its prediction may change. Spillover is still measured."""
    base = load_base(str(flow_kinds.folder("flux-dev")), device="cpu")
    assert not base.properties.uses_guidance
    assert default_unconditional(base, 3.5) == 0
    text = encode_captions(base, ["a digit", "a digit in red"])
    student = _Moved(base.network)
    denoiser = Denoiser.of(base, student)
    empty = encode_captions(base, [""])[0]
    teacher = Teacher(denoiser, lambda: contextlib.nullcontext(base.network), text[0], empty, guidance_scale=1.0)
    x0, noise = torch.randn(2, 2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    keep, label = torch.full((2,), NO_GROUP), torch.full((2,), UNLABELED)
    seen, timesteps = torch.zeros(2).bool(), torch.tensor([300.0, 700.0])
    batch = Batch(x0, text, text, label, keep, 1, timesteps, noise, seen, torch.full((2,), 0.5))
    with torch.no_grad():
        losses = example_losses(denoiser, batch, teacher=teacher)
        assert torch.allclose(losses, torch.tensor(16.0 * 8 * 8), rtol=1e-4)  # |f - f*|^2, f* the base's own prediction
        guided = example_losses(denoiser, batch, teacher=replace(teacher, guidance_scale=4.0, movement=Movement()))
    assert torch.allclose(guided, torch.tensor(16.0 * 8 * 8 / 4**2), rtol=1e-4)  # 1 less (1 - 1/4) x 1
    noisy = denoiser.process.add_noise(x0, noise, timesteps)
    captioned, without = (teacher.predict(noisy, timesteps, of) for of in (text, empty.expand_as(text)))
    teacher.movement.end_step(lambda sums: sums)
    effect = (captioned - without).square().sum()
    assert teacher.movement.read()["spillover"] == pytest.approx(float(x0.numel() / effect) ** 0.5, rel=1e-3)


class _Moved(torch.nn.Module):
    """A network whose prediction has moved by one."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, **given: Any) -> Any:
        answer = self.network(**given)
        answer.sample = answer.sample + 1
        return answer


# -- what is refused --


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"method": "full"}, "--method full: .* transformer has billions of weights"),
        ({"attention": "eager"}, "--attention eager: .* uses torch's own attention"),
        ({"lora_targets": "cross_attention"}, "--lora_targets cross_attention needs a base with cross-attention"),
        ({"objective": "esd-x"}, "--objective esd-x needs a base with cross-attention"),
        ({"objective": "uce"}, "--objective uce needs a base with cross-attention"),
        ({"objective": "speed"}, "--objective speed needs a base with cross-attention"),
        ({"objective": "rece"}, "--objective rece needs a base with cross-attention"),
        ({"train_text_encoder": True}, "--train_text_encoder: .* of kind (flux|flux2|flux2-klein|z-image|qwen-image)"),
    ],
)
def test_options_that_are_refused(changes: dict[str, Any], why: str) -> None:
    for kind in ("flux", "flux2", "flux2-klein", "z-image", "qwen-image"):
        with pytest.raises(UsageError, match=why):
            check_kind(TrainConfig(**changes), kind, "a base")
    if "train_text_encoder" not in changes:
        check_kind(TrainConfig(**changes), "sd1", "a base")
    check_kind(TrainConfig(**changes), None, "a base")  # a Hub id of which nothing is known yet


def test_safety_guidance_is_refused(flow_kinds: FlowKinds) -> None:
    base = str(flow_kinds.folder("sd35"))
    with pytest.raises(UsageError, match=r"--sld is for SD 1\.x, 2\.x and XL; .* is of kind sd3"):
        check_guidance(EvaluateConfig(sld=["weak"]), Source(base))


def test_options_of_flow_matching_are_refused_for_other_bases(
    flow_kinds: FlowKinds, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match=r"--timestep_sampling uniform is for .*\(SD 3, FLUX, Z-Image, Qwen-Image\)"):
        check_kind(TrainConfig(timestep_sampling="uniform"), "sd1", "a base")
    place = str(flow_kinds.folder("flux-dev"))
    command = ["--concept", "seven", "--pretrained_model_name_or_path", place]
    for options, why in (
        (["--zero_terminal_snr"], "--zero_terminal_snr needs a base that predicts v"),
        (["--prediction_type", "epsilon"], "--prediction_type epsilon: .* predicts flow"),
        (["--resolution", "72"], "needs a multiple of 16 pixels"),
    ):
        assert main(["train", *command, *options]) == 2
        assert why.split(": .* ")[-1] in capsys.readouterr().err


def test_the_resolution_is_checked_again_once_a_hub_id_is_loaded(flow_kinds: FlowKinds, tmp_path: Path) -> None:
    base = replace(load_base(str(flow_kinds.folder("sd35")), device="cpu"), source=Source("owner/name"))
    why = "--resolution 72: .* needs a multiple of 16 pixels"
    with pytest.raises(UsageError, match=why):
        generate_images(base, ["a photo"], [0], Sampler(1, 1.0, 1, resolution=72))
    with pytest.raises(UsageError, match=why):
        read_data(TrainConfig(resolution=72, data_dir=tmp_path), load_concept("seven"), base, 1)


@pytest.mark.parametrize("name", FLOW_KINDS)
def test_export(flow_kinds: FlowKinds, name: str) -> None:
    """The exported LoRAs change the base as the run does, and the merged folder is the changed base."""
    place = trained(flow_kinds, name)
    run, merged = place / "runs" / "seven", place / "merged"
    with contextlib.chdir(place):
        assert main(["export", "--run", str(run), "--merge", str(merged)]) == 0
    base, weights = load_base(str(flow_kinds.folder(name)), device="cpu"), []
    untouched = {key: value.clone() for key, value in base.network.state_dict().items()}
    for file in (run / ADAPTER, run / "export/seven.safetensors", run / "export/pytorch_lora_weights.safetensors"):
        targets = find_modules(base.pipeline, read_lora_file(file, "--lora").changes, "--lora", base.name)
        with apply_changes(targets, 1.0, "--lora"):
            weights.append({key: value.clone() for key, value in base.network.state_dict().items()})
    weights.append(load_base(str(merged), device="cpu").network.state_dict())
    assert any(not torch.equal(value, untouched[key]) for key, value in weights[0].items())
    for other in weights[1:]:
        assert all(torch.allclose(other[key], value, atol=1e-7) for key, value in weights[0].items())


def test_every_cell_of_the_documented_table_is_a_test() -> None:
    page = (Path(__file__).parents[2] / "docs" / "tested.md").read_text(encoding="utf-8")
    named = re.findall(r"`test_flow_kinds\.py::(test_\w+)\[([\w-]+)\]`", page)
    tests = ("test_render", "test_train", "test_evaluate", "test_export")
    assert sorted(named) == sorted((test, name) for test in tests for name in FLOW_KINDS)
    assert all(test in globals() for test in tests)
