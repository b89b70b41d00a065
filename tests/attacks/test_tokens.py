"""Prompts of chosen tokens and learned embeddings."""

from __future__ import annotations

import pytest
import torch
from attack_cases import make_target

from sd_unlearn.attacks.embedding import EmbeddingSettings, learn
from sd_unlearn.attacks.noise_prediction import noise_loss, sample_batch
from sd_unlearn.attacks.prefix import project
from sd_unlearn.attacks.ring import RingSettings, evolve
from sd_unlearn.attacks.token import split_caption
from sd_unlearn.attacks.tokens import TokenPrompt, allowed_tokens, nearest, random_tokens
from sd_unlearn.data.concept import Concept
from sd_unlearn.data.encoding import encode_captions
from sd_unlearn.models.base import Base
from sd_unlearn.models.learned_prompt import LearnedPrompt, content_positions


def test_a_learned_prompt_starts_as_the_prompt(loaded_base: Base) -> None:
    text = "a photo of the digit seven"
    prompt = LearnedPrompt(loaded_base, text, content_positions(loaded_base, text))
    with torch.no_grad():
        assert torch.allclose(prompt.encode(), encode_captions(loaded_base, [text]), atol=1e-6)
        assert torch.allclose(prompt.encode(2)[1], encode_captions(loaded_base, [text])[0], atol=1e-6)
        prompt.add_noise(torch.Generator().manual_seed(0))
        assert not torch.allclose(prompt.encode(), encode_captions(loaded_base, [text]), atol=1e-3)
    own = loaded_base.conditioning.encode(loaded_base.pipeline, [text], loaded_base.device)
    assert torch.equal(own, encode_captions(loaded_base, [text]))  # no hook is left


def test_learning_lowers_the_loss_on_the_images(loaded_base: Base) -> None:
    target = make_target(loaded_base)
    prompt = LearnedPrompt(loaded_base, "a photo", content_positions(loaded_base, "a photo"))
    batch = sample_batch(target.positives, 3, torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = noise_loss(target, batch, prompt.encode())
    settings = EmbeddingSettings(30, restarts=1, images=1, batch_size=3, learning_rate=1.0)
    list(learn(target, prompt, settings, torch.Generator().manual_seed(2)))
    with torch.no_grad():
        assert noise_loss(target, batch, prompt.encode()) < before


def test_chosen_tokens_are_those_of_the_typed_prompt(loaded_base: Base) -> None:
    typed = "the digit a photo"
    tokenizer = loaded_base.pipeline.tokenizer
    ids = torch.tensor(tokenizer(typed, add_special_tokens=False).input_ids)
    free = len(ids) - len(tokenizer("photo", add_special_tokens=False).input_ids)
    prompt = TokenPrompt(loaded_base, free, "photo")
    prompt.choose(ids[:free])
    with torch.no_grad():
        assert torch.allclose(prompt.encode(), encode_captions(loaded_base, [typed]), atol=1e-6)
    assert prompt.words(ids[:free]).split()[-1] == "photo"


def test_projection_onto_the_simplex() -> None:
    """Closed forms, and the defining property: no allowed point of the simplex is closer."""
    allowed = torch.tensor([True, True, True, False])
    weights = torch.tensor([[0.2, 0.3, 0.5, 9.0], [2.0, 0.0, 0.0, 0.0], [1.0, 1.0, -5.0, 3.0], [0.1, 0.1, 0.1, 0.0]])
    found = project(weights, allowed)
    wanted = [[0.2, 0.3, 0.5, 0.0], [1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3, 0.0]]
    assert torch.allclose(found, torch.tensor(wanted), atol=1e-6)
    points = torch.rand(1000, 4).where(allowed, 0)
    points = points / points.sum(1, keepdim=True)
    assert ((points - weights[2]).norm(dim=1) >= (found[2] - weights[2]).norm() - 1e-5).all()


def test_nearest_tokens_are_allowed_ones() -> None:
    table = torch.tensor([[0.0], [1.0], [2.0]])
    vectors = torch.tensor([[0.9], [1.6]])
    assert nearest(vectors, table, torch.tensor([True, True, True])).tolist() == [1, 2]
    assert nearest(vectors, table, torch.tensor([True, False, False])).tolist() == [0, 0]


def test_the_genetic_search_gets_closer(loaded_base: Base) -> None:
    prompt, allowed = TokenPrompt(loaded_base, 3), allowed_tokens(loaded_base)
    hidden = random_tokens(allowed, [3], torch.Generator().manual_seed(3))

    def distance(ids: torch.Tensor) -> float:
        prompt.choose(ids)
        return float((prompt.encode() - wanted).square().sum())

    with torch.no_grad():
        prompt.choose(hidden)
        wanted = prompt.encode()
        found = []
        for generations in (0, 5, 40):
            settings = RingSettings(generations, 3, 1, population=20)
            ids = evolve(prompt, wanted, settings, allowed, torch.Generator().manual_seed(0))
            found.append(distance(ids))
    assert found[0] > found[2]
    assert found == sorted(found, reverse=True)
    tokenizer = loaded_base.pipeline.tokenizer
    assert not allowed[[tokenizer.bos_token_id, tokenizer.eos_token_id]].any()


@pytest.mark.parametrize(
    ("name", "label", "caption", "parts"),
    [
        ("seven", "", "the digit seven here", ("the digit ", "seven", " here")),
        ("red ink", "red", "a digit in red pen", ("a digit in ", "red", " pen")),
        ("Brad Pitt", "", "a man", ("a man, ", "Brad Pitt", "")),
        ("art", "", "an artwork in the style of art", ("an artwork in the style of ", "art", "")),
        ("art", "", "an artwork", ("an artwork, ", "art", "")),
    ],
)
def test_where_the_learned_token_goes(name: str, label: str, caption: str, parts: tuple[str, str, str]) -> None:
    assert split_caption(Concept(name=name, label=label, caption=caption, generic="a photo")) == parts
