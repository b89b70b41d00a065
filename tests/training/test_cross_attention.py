"""The text embeddings of a closed-form edit."""

from __future__ import annotations

import torch
from torch import Tensor

from sd_unlearn.data.concept import Concept
from sd_unlearn.models.base import Base
from sd_unlearn.training import cross_attention


def test_the_subjects_of_two_captions() -> None:
    start, end = 90, 91
    assert cross_attention.last_tokens([start, 1, 2, end, end], [start, 3, end, end, end], end) == (2, 1)
    assert cross_attention.last_tokens([start, 1, 7, 8, end], [start, 3, 8, end, end], end) == (2, 1)  # both end with 8
    assert cross_attention.last_tokens([start, 5, 8, end], [start, 8, end, 0], end) == (2, 1)  # "red digit", "digit"
    assert cross_attention.last_tokens([start, 4, end, 0], [start, 4, end, 0], end) == (1, 1)


def test_the_edited_tokens_reach_from_the_subject_to_the_end(loaded_base: Base) -> None:
    concept = Concept(name="seven", caption="7 x", generic="it x", keep=("ab", "{c,d} e"))
    found = cross_attention.embed(loaded_base, concept)
    tokens = loaded_base.pipeline.tokenizer.model_max_length
    encode = loaded_base.pipeline.text_encoder

    def encoded(caption: str) -> Tensor:
        ids = loaded_base.pipeline.tokenizer(caption, padding="max_length", return_tensors="pt").input_ids
        return encode(ids)[0][0].detach()

    # One letter is a token: start, 7, x and start, i, t, x. The subjects are at 1 and 2, so two fewer tokens have a
    # partner.
    assert torch.allclose(found.concepts, encoded("7 x")[1 : tokens - 1])
    assert torch.allclose(found.anchors, encoded("it x")[2:])
    assert torch.allclose(found.preserved, torch.cat([encoded(p) for p in ("ab", "c e", "d e")]))


def test_only_the_first_paraphrases_are_edited(loaded_base: Base) -> None:
    """More would change what the words in them mean elsewhere."""
    concept = Concept(name="7", caption="7 x", generic="it x", paraphrases=["7 a", "7 b", "7 c", "7 d"])
    more = Concept(name="7", caption="7 x", generic="it x", paraphrases=[*concept.paraphrases, "7 e", "7 f"])
    for found, few in zip(*(cross_attention.subjects(loaded_base, each) for each in (more, concept)), strict=True):
        assert torch.equal(found, few)
