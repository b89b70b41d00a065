"""What learns and what stays frozen, for every kind of student: save, load, the base behind it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sd_unlearn.config.objective import Weights
from sd_unlearn.io.reading import read_json
from sd_unlearn.io.run_folder import weights_sha256
from sd_unlearn.models.base import Base, load_base
from sd_unlearn.models.lora import TARGETS, network_targets
from sd_unlearn.models.student import Student, apply_run, make_student

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = {
    "lora": Weights(rank=2),
    "attention": Weights(rank=2, lora_targets="attention"),
    "alpha": Weights(rank=4, lora_alpha=3.0),
    "dora": Weights(rank=2, use_dora=True),
    "cross": Weights(rank=2, lora_targets="cross_attention"),
    "mlp": Weights(rank=2, lora_targets="attention+mlp"),
    "text": Weights(rank=2, train_text_encoder=True),
    "full": Weights(method="full"),
}
NOISY, TIME = torch.linspace(-1, 1, 2 * 4 * 8 * 8).view(2, 4, 8, 8), torch.tensor([10, 700])


def text_of(base: Base, options: Weights) -> Tensor:
    ids = base.pipeline.tokenizer(["ab", "c"], padding="max_length", return_tensors="pt").input_ids
    return ids if options.train_text_encoder else base.pipeline.text_encoder(ids)[0].detach()


def predict(student: Student, text: Tensor) -> Tensor:
    with torch.no_grad():
        return student.model(NOISY, TIME, encoder_hidden_states=text).sample


def scatter(student: Student) -> None:
    """Move every weight that learns, none of them by chance to where it was."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in student.trainable():
            parameter += 0.1 * torch.randn_like(parameter)


@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_as_the_base_moves_and_comes_back(kind: str, loaded_base: Base, tiny_base: Path) -> None:
    options, run = KINDS[kind], Path("run")
    text = text_of(loaded_base, options)
    embedded = loaded_base.pipeline.text_encoder(text)[0].detach() if options.train_text_encoder else text
    with torch.no_grad():
        before = loaded_base.pipeline.unet(NOISY, TIME, encoder_hidden_states=embedded).sample
    student = make_student(loaded_base, options, 0, needs_teacher=True)
    assert torch.allclose(predict(student, text), before, atol=1e-5)
    scatter(student)
    learned = predict(student, text)
    assert (learned - before).abs().max() > 1e-3
    with student.frozen() as frozen, torch.no_grad():
        assert torch.allclose(frozen(NOISY, TIME, encoder_hidden_states=text).sample, before, atol=1e-5)
    assert torch.equal(predict(student, text), learned)
    assert all(p.requires_grad for p in student.trainable())  # frozen() gave them back

    student.save(run)
    fresh = load_base(str(tiny_base), device="cpu")
    with apply_run(fresh, run), torch.no_grad():
        again = text_of(fresh, Weights()) if options.train_text_encoder else text
        loaded = fresh.pipeline.unet(NOISY, TIME, encoder_hidden_states=again).sample
    assert torch.allclose(loaded, learned, atol=1e-5)
    again = text_of(fresh, Weights())  # and the base as it was once that is over
    with torch.no_grad():
        assert torch.equal(fresh.pipeline.unet(NOISY, TIME, encoder_hidden_states=again).sample, before)
    for strength, expected in ((0.0, before), (1.0, learned)):
        with apply_run(fresh, run, strength), torch.no_grad():
            again = text_of(fresh, Weights()) if options.train_text_encoder else text
            moved = fresh.pipeline.unet(NOISY, TIME, encoder_hidden_states=again).sample
        assert torch.allclose(moved, expected, atol=1e-5)
    with apply_run(fresh, run, 0.5), torch.no_grad():
        again = text_of(fresh, Weights()) if options.train_text_encoder else text
        half = fresh.pipeline.unet(NOISY, TIME, encoder_hidden_states=again).sample
    assert min((half - before).abs().max(), (half - learned).abs().max()) > 1e-4
    assert len(weights_sha256(run)) == 64


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_is_all_that_learns_and_nothing_else(kind: str, loaded_base: Base) -> None:
    student = make_student(loaded_base, KINDS[kind], 0, needs_teacher=False)
    state = copy.deepcopy(student.state())
    assert len(state) == len(student.trainable()) > 0
    text = text_of(loaded_base, KINDS[kind])
    before = predict(student, text)
    scatter(student)
    assert not torch.equal(predict(student, text), before)
    student.load_state(state)
    assert torch.equal(predict(student, text), before)
    if kind != "full":
        assert all("lora_" in name for name in state)


def test_gradients_reach_the_text_encoder(loaded_base: Base) -> None:
    student = make_student(loaded_base, KINDS["text"], 0, needs_teacher=False)
    scatter(student)
    student.model(NOISY, TIME, encoder_hidden_states=text_of(loaded_base, KINDS["text"])).sample.sum().backward()
    named = dict(student.model.named_parameters())
    touched = [name for name, p in named.items() if p.requires_grad and p.grad is not None and p.grad.any()]
    assert any(name.startswith("text_encoder.") for name in touched)
    assert any(name.startswith("unet.") for name in touched)
    assert all(p.grad is None for p in named.values() if not p.requires_grad)


def test_the_scale_is_the_one_that_was_asked_for(loaded_base: Base) -> None:
    """alpha / rank; alpha is the rank by default."""
    for kind, scale in (("lora", 1.0), ("alpha", 3.0 / 4)):
        base = copy.deepcopy(loaded_base)
        (adapter,) = make_student(base, KINDS[kind], 0, needs_teacher=False).adapters
        layers = [module for module in adapter.modules() if hasattr(module, "scaling")]
        assert layers
        assert all(layer.scaling["default"] == pytest.approx(scale) for layer in layers)


def test_an_adapter_is_written_to_the_same_bytes_by_every_process(loaded_base: Base) -> None:
    """PEFT writes the names of the modules in the random order of a set."""
    weights = Weights(rank=2, lora_targets="attention", train_text_encoder=True)
    make_student(copy.deepcopy(loaded_base), weights, 0, needs_teacher=False).save(Path("run"))
    for folder in ("adapter", "text_encoder_adapter"):
        names = read_json(Path("run") / folder / "adapter_config.json")["target_modules"]
        assert names == sorted(names)
        assert len(names) == 4


def test_the_groups_of_layers_are_what_their_names_say(loaded_base: Base) -> None:
    unet = loaded_base.pipeline.unet
    found = {group: set(network_targets(unet, group)) for group in (*TARGETS, "all_linear+conv")}
    assert all(name.split(".attn")[1][2:] in ("to_q", "to_k", "to_v", "to_out.0") for name in found["attention"])
    assert found["cross_attention"] == {name for name in found["attention"] if ".attn2." in name}
    assert {name for name in found["attention"] if ".attn1." in name}
    mlp = found["attention+mlp"] - found["attention"]
    assert {name.split(".ff.")[1] for name in mlp} == {"net.0.proj", "net.2"}
    assert found["attention+mlp"] < found["all_linear+conv"]
    assert {"conv_in", "conv_out", "time_embedding.linear_1"} <= found["all_linear+conv"]


def test_a_full_student_without_a_teacher_holds_the_unet_once(loaded_base: Base) -> None:
    assert make_student(loaded_base, KINDS["full"], 0, needs_teacher=False).base_copy is None
    student = make_student(loaded_base, KINDS["full"], 0, needs_teacher=True)
    assert student.base_copy is not None
    assert not any(p.requires_grad for p in student.base_copy.parameters())
