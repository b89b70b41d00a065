"""What a closed-form edit needs: the layers it changes, and the text embeddings it replaces and preserves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sd_unlearn.choices import ObjectiveName
from sd_unlearn.data.concept import Concept
from sd_unlearn.data.encoding import encode_captions, tokenize
from sd_unlearn.data.layout import MOST_PARAPHRASES
from sd_unlearn.models.base import Base

# Endings of the names of the edited layers, by objective. SPEED edits values only.
LAYERS: dict[ObjectiveName, tuple[str, ...]] = {
    "uce": ("attn2.to_k", "attn2.to_v"),
    "speed": ("attn2.to_v",),
    "rece": ("attn2.to_k", "attn2.to_v"),
}


@dataclass(frozen=True)
class Embeddings:
    """Token embeddings, one a row."""

    concepts: Tensor  # [n, width]
    anchors: Tensor  # [n, width], what each is replaced with
    preserved: Tensor  # [m, width]


def read_weights(base: Base, objective: ObjectiveName) -> dict[str, Tensor]:
    """The weights [out, width] that a closed-form objective edits, by module; offloaded ones come to the device."""
    layers = base.network.named_modules()
    return {name: m.weight.detach().to(base.device) for name, m in layers if name.endswith(LAYERS[objective])}


@torch.no_grad()
def embed(base: Base, concept: Concept) -> Embeddings:
    """The embeddings to edit, of every concept that is erased, and those of all keep prompts."""
    edited, anchors = zip(*(subjects(base, part) for part in concept.parts), strict=True)
    keep = [prompt.text for prompt in concept.keep_prompts]
    preserved = _tokens(base, keep).flatten(0, 1) if keep else edited[0][:0]
    return Embeddings(torch.cat(edited), torch.cat(anchors), preserved)


def subjects(base: Base, concept: Concept) -> tuple[Tensor, Tensor]:
    """[n, width] each: the embeddings of a concept's subject in its captions, and those they are replaced with.

    The captions are the concept's and its first paraphrases, as many as a training step has: with all of 25, UCE and
    RECE retained less of everything else (docs/training.md). Of each, the tokens from the subject's last one to the end
    of the sequence are edited (`last_token`), as in the code of UCE and RECE: the end and the padding follow the
    subject, so their embeddings describe it, too.
    """
    texts = [concept.generic, *concept.captions[: 1 + MOST_PARAPHRASES]]
    generic, *captions = _tokens(base, texts)
    ids_of_generic, *ids = tokenize(base, texts).tolist()
    concepts, anchors = [], []
    for caption, ids_of_caption in zip(captions, ids, strict=True):
        ends = base.pipeline.tokenizer.eos_token_id
        subject, instead = last_tokens(ids_of_caption, ids_of_generic, ends)
        count = len(caption) - max(subject, instead)
        concepts.append(caption[subject : subject + count])
        anchors.append(generic[instead : instead + count])
    return torch.cat(concepts), torch.cat(anchors)


def _tokens(base: Base, captions: Sequence[str]) -> Tensor:
    """[N, tokens, width]: what cross-attention takes, without the pooled embedding."""
    text = encode_captions(base, captions)
    return base.conditioning.tokens_of(text)


def last_tokens(caption: Sequence[int], generic: Sequence[int], end: int) -> tuple[int, int]:
    """Where the subject of each caption ends: the last token before the words that both captions end with.

    "a photo of seven in red", "a photo of a digit in red": seven and digit. caption, generic: token ids with start and
    end token.
    """
    first, second = caption[1 : caption.index(end)], generic[1 : generic.index(end)]
    shortest, shared = max(0, min(len(first), len(second)) - 1), 0
    while shared < shortest and first[-1 - shared] == second[-1 - shared]:
        shared += 1
    return max(1, len(first) - shared), max(1, len(second) - shared)
