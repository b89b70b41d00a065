"""Captions that are learned against the student while it is trained."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from flow_kinds import FlowKinds

from sd_unlearn.config.train import TrainConfig
from sd_unlearn.data.batches import EncodedImages
from sd_unlearn.data.dataset import Example
from sd_unlearn.data.find_concept import load_concept
from sd_unlearn.data.layout import compose_step, learned_caption
from sd_unlearn.errors import UsageError
from sd_unlearn.models.base import Base, load_base
from sd_unlearn.models.denoiser import Denoiser
from sd_unlearn.models.source import Source
from sd_unlearn.training import learned_captions
from sd_unlearn.training.learned_captions import LearnedCaption, Network, RobustSteps

SEVEN = load_concept("seven")


@pytest.fixture
def images() -> EncodedImages:
    """Four positives and two other images with equal latents."""
    generator = torch.Generator().manual_seed(0)
    examples = [Example(Path(f"{n}.png"), SEVEN.caption, "positive" if n < 4 else "generic") for n in range(6)]
    mean = torch.randn(1, 4, 4, 4, generator=generator).expand(6, -1, -1, -1)
    return EncodedImages(examples, mean, torch.zeros_like(mean), {})


def network_of(base: Base, micro_batch_size: int = 16) -> Network:
    return Network(base, Denoiser.of(base, base.network), Accelerator(cpu=True), micro_batch_size)


def test_searches_make_the_network_predict_the_concept(
    loaded_base: Base, images: EncodedImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learned_captions, "POOL", 1)
    monkeypatch.setattr(learned_captions, "SEARCH_STEPS", 1)
    frozen = {name: value.clone() for name, value in loaded_base.network.state_dict().items()}
    losses: list[float] = []
    autograd = torch.autograd.grad

    def watched(loss: torch.Tensor, *arguments: Any) -> Any:
        losses.append(float(loss.detach()))
        return autograd(loss, *arguments)

    monkeypatch.setattr(torch.autograd, "grad", watched)
    caption = LearnedCaption(SEVEN, images, network_of(loaded_base), seed=0)
    before = images.text[learned_caption(SEVEN)]
    for n in range(8):
        caption.generator.manual_seed(1)  # the same images, noise and timesteps
        caption.update(learned_captions.START + n)
    assert losses[-1] < losses[0]
    assert not torch.equal(images.text[learned_caption(SEVEN)], before)
    assert all(torch.equal(value, frozen[name]) for name, value in loaded_base.network.state_dict().items())
    assert all(parameter.grad is None for parameter in loaded_base.network.parameters())


def test_a_search_in_parts_is_the_search_of_the_whole(
    loaded_base: Base, images: EncodedImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learned_captions, "SEARCH_STEPS", 1)
    found = []
    for size in (16, 3):
        caption = LearnedCaption(SEVEN, images, network_of(loaded_base, size), seed=0)
        caption.update(learned_captions.START)
        found.append(caption.pool[0][0].vectors[0].grad)
    assert torch.allclose(*found, rtol=1e-3, atol=1e-4 * float(found[0].abs().max()))  # type: ignore[arg-type]


def test_captions_take_turns_and_nothing_is_searched_before_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    updates: list[tuple[int, int]] = []
    captions: list[Any] = [SimpleNamespace(update=lambda step, n=n: updates.append((n, step))) for n in range(2)]
    steps: Any = iter(range(100))
    robust = RobustSteps(steps, captions)
    assert [batch for batch, _ in zip(robust, range(11), strict=False)] == list(range(11))
    assert updates == [(0, 0), (1, 5), (0, 10)]


def test_a_caption_with_another_number_of_tokens_is_searched_anew(
    flow_kinds: FlowKinds, images: EncodedImages, capsys: pytest.CaptureFixture[str]
) -> None:
    """--force_resume accepts another caption, and language models as text encoders read no padding."""
    base = load_base(Source(str(flow_kinds.folder("z-image"))))

    def robust(text: str) -> RobustSteps:
        concept = dataclasses.replace(SEVEN, caption=text)
        steps: Any = SimpleNamespace(state_dict=dict, load_state_dict=lambda _: None)
        return RobustSteps(steps, [LearnedCaption(concept, images, network_of(base), seed=0)])

    saved = robust("a seven")
    saved.count = 5
    saved.captions[0].update(0)
    for text, updates in (("a seven", 1), ("seven", 0)):
        resumed = robust(text)
        resumed.load_state_dict(saved.state_dict())
        assert (resumed.count, resumed.captions[0].updates) == (5, updates)
        resumed.captions[0].update(5)
        assert ("starts anew" in capsys.readouterr().err) == (text == "seven")


@pytest.mark.parametrize("objective", ["pu", "esd-x", "anchor"])
def test_the_learned_caption_is_one_more_caption_group(objective: Any) -> None:
    concept = load_concept("seven")
    plain, robust = (
        compose_step(TrainConfig(concept=["seven"], objective=objective, robust=on), concept, 1, True, 1, False)[0]
        for on in (False, True)
    )
    assert robust == [*plain, learned_caption(concept)]
    assert learned_caption(concept) not in plain


def test_a_trained_text_encoder_is_refused() -> None:
    from sd_unlearn.config.checks import check_train

    with pytest.raises(UsageError, match=r"--robust.*--train_text_encoder"):
        check_train(TrainConfig(concept=["seven"], robust=True, train_text_encoder=True))
