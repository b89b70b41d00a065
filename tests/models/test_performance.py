"""Attention kernels, checkpointing and compilation give the same values, or are refused by name."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import CONCEPT_FILE
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor

from sd_unlearn.config.objective import Weights
from sd_unlearn.config.train import TrainConfig
from sd_unlearn.errors import UsageError
from sd_unlearn.models import lora, performance
from sd_unlearn.models.base import Base
from sd_unlearn.models.student import Student
from sd_unlearn.training import trainer

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


def with_lora(unet: Any, config: TrainConfig) -> Any:
    """The UNet as the trainer prepares it, with a LoRA that has learned something."""
    performance.prepare(unet, config)
    model = lora.attach(unet, Weights(rank=2), lora.network_targets(unet, "attention"), 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(2))
    return model


def inputs(count: int, side: int = 8) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(count)
    return {
        "sample": torch.randn(count, 4, side, side, generator=rng),
        "timestep": torch.linspace(50, 950, count).long(),
        "encoder_hidden_states": torch.randn(count, 24, 16, generator=rng),
    }


def gradients(model: Any) -> list[Tensor]:
    """After a forward pass of the teacher and one of the student, as in a step."""
    given = {name: value.to(model.dtype) for name, value in inputs(3).items()}
    with torch.no_grad(), model.disable_adapter():
        taught = model(**given).sample
    (model(**given).sample - taught).square().sum().backward()
    found = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    return found


def assert_close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    scale = max(g.abs().max().item() for g in theirs)
    assert scale > 0
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= 1e-5 * scale


@pytest.mark.parametrize(("asked", "kind"), [("sdpa", AttnProcessor2_0), ("eager", AttnProcessor)])
def test_attention_option_selects_an_equivalent_kernel(loaded_base: Base, asked: Any, kind: type) -> None:
    model = with_lora(loaded_base.pipeline.unet, TrainConfig()).double()  # random weights magnify rounding
    plain = gradients(model)
    performance.prepare(loaded_base.pipeline.unet, TrainConfig(attention=asked))
    assert {type(p) for p in loaded_base.pipeline.unet.attn_processors.values()} == {kind}
    assert_close(gradients(model), plain)


@pytest.mark.parametrize("asked", [True, False])
def test_checkpointing_recomputes_and_gives_the_same_gradients(loaded_base: Base, asked: bool) -> None:
    model = with_lora(loaded_base.pipeline.unet, TrainConfig())
    plain = gradients(model)
    calls: list[bool] = []
    block = loaded_base.pipeline.unet.up_blocks[0].resnets[1]  # there is a LoRA before it
    block.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    Student(model).set_checkpointing(asked)
    assert_close(gradients(model), plain)
    assert len(calls) == (3 if asked else 2)  # the teacher's once; the student's again in the backward pass


def three_widths() -> Any:
    """The widths of SD 1.x in miniature; two layers a block, so that blocks are repeated."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(4, 8, 16, 16),
        layers_per_block=2,
        norm_num_groups=2,
        cross_attention_dim=16,
        attention_head_dim=2,
    )
    return unet.requires_grad_(False).eval()


@pytest.mark.parametrize("widths", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_compiled_blocks_give_the_same_and_compile_once(
    loaded_base: Base, monkeypatch: pytest.MonkeyPatch, widths: int
) -> None:
    """With the adapter off and on, with gradients and without, for batches of several sizes."""
    from torch._dynamo.utils import counters

    unet = loaded_base.pipeline.unet if widths == 1 else three_widths()
    model = with_lora(unet, TrainConfig())
    names, sizes, side = set(unet.state_dict()), (3, 5, 4, 6), unet.config.sample_size

    def walk(count: int) -> list[Tensor]:
        with torch.no_grad(), model.disable_adapter():
            off = model(**inputs(count, side)).sample
        with torch.no_grad():
            still = model(**inputs(count + 7, side)).sample
        on = model(**inputs(count, side)).sample
        on.square().sum().backward()
        found = [off, still, on.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]
        model.zero_grad()
        return found

    plain = [walk(count) for count in sizes]
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)  # torch's own; put back after the test
    compile_ = functools.partial(unet.compile_repeated_blocks, backend="eager")  # the graphs, without the compiler
    monkeypatch.setattr(unet, "compile_repeated_blocks", compile_)
    performance.compile_blocks(unet, TrainConfig(torch_compile=True))
    compiled = [walk(count) for count in sizes[:2]]
    graphs = counters["stats"]["unique_graphs"]
    compiled += [walk(count) for count in sizes[2:]]
    assert graphs > 0
    assert widths == 1 or graphs > 8  # more than torch's own limit lets be compiled
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["unimplemented"]
    assert set(unet.state_dict()) == names
    for ours, theirs in zip(compiled, plain, strict=True):
        assert_close(ours, theirs)


def test_nothing_is_compiled_by_default(loaded_base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaded_base.pipeline.unet, "compile_repeated_blocks", lambda: pytest.fail("compiled"))
    performance.compile_blocks(loaded_base.pipeline.unet, TrainConfig())
    performance.check(TrainConfig(), CPU)


def test_compilation_that_does_not_work_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Any) -> Callable[[Tensor], Tensor]:
        def run(_: Tensor) -> Tensor:
            raise RuntimeError("no working\nC++ compiler.")

        return run

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(UsageError, match=r"--torch_compile.*cpu.*\(no working C\+\+ compiler\).*leave the option out"):
        performance.check(TrainConfig(torch_compile=True), CPU)


def xformers_that(fails: Exception | None, unloaded: Exception | None) -> dict[str, ModuleType]:
    """A stand-in for the package, whose kernel fails."""

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if fails:
            raise fails
        return query + key + value

    whole, ops, library = (ModuleType(name) for name in ("xformers", "xformers.ops", "xformers._cpp_lib"))
    whole.__dict__.update(__version__="9.9", ops=ops, _cpp_lib=library, __spec__=object())
    ops.__dict__.update(memory_efficient_attention=attention)
    library.__dict__.update(_cpp_library_load_exception=unloaded)
    return {module.__name__: module for module in (whole, ops, library)}


MISSING = NotImplementedError("No operator found for `memory_efficient_attention_forward`")
OTHER_TORCH = ImportError("xFormers was built for:\n  PyTorch 2.10.0")


@pytest.mark.parametrize(
    ("unloaded", "said"),
    [(None, r"9\.9 has no kernel for cpu \(No operator"), (OTHER_TORCH, r"9\.9 do not load with torch 2.*2\.10\.0")],
)
def test_xformers_without_kernels_is_refused(
    monkeypatch: pytest.MonkeyPatch, unloaded: Exception | None, said: str
) -> None:
    for name, module in xformers_that(MISSING, unloaded).items():
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(UsageError, match=f"--attention xformers: .*{said}.*--attention sdpa"):
        performance.check(TrainConfig(attention="xformers"), CPU)


def test_xformers_that_works_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in xformers_that(None, OTHER_TORCH).items():  # torch's own kernels may serve all the same
        monkeypatch.setitem(sys.modules, name, module)
    performance.check(TrainConfig(attention="xformers"), CPU)


@pytest.mark.skipif(importlib.util.find_spec("xformers") is not None, reason="xformers is installed")
def test_the_trainer_refuses_xformers_before_a_model_loads(
    tiny_base: Path, photos: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "load_base", lambda *_: pytest.fail("the base was loaded"))
    Path("brad.yaml").write_text(CONCEPT_FILE)
    config = TrainConfig(
        concept="brad.yaml",
        pretrained_model_name_or_path=str(tiny_base),
        data_dir=photos(),
        attention="xformers",
        report_to="none",
    )
    with pytest.raises(UsageError, match=r"--attention xformers: xformers is not installed.*--attention sdpa"):
        trainer.run(config)
    assert not Path("runs").exists()
