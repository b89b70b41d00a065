"""Prompts of freely chosen tokens, which the attacks `prefix`, `hard` and `ring` search."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sd_unlearn.models.base import Base
from sd_unlearn.models.learned_prompt import LearnedPrompt, content_positions, embedding_table

PLACEHOLDER = "x"  # a word of a single token, which stands where a token is chosen


class TokenPrompt(LearnedPrompt):
    """A prompt that begins with `count` freely chosen tokens, followed by a text (which may be empty)."""

    def __init__(self, base: Base, count: int, text: str = "") -> None:
        prompt = " ".join([PLACEHOLDER] * count + [text]).strip()
        positions = content_positions(base, prompt)[:count]
        super().__init__(base, prompt, positions)
        self.tables = [embedding_table(encoder).weight.detach().float() for encoder in base.text_encoders]

    def choose(self, ids: Tensor) -> None:
        """Use these tokens: [positions], or [N, positions] for N prompts."""
        self.vectors = [table[ids.to(table.device)] for table in self.tables]

    def mix(self, weights: Tensor) -> None:
        """Use mixtures of all tokens: weights [positions, vocabulary], differentiable."""
        self.vectors = [weights @ table for table in self.tables]

    def words(self, ids: Tensor) -> str:
        """Chosen tokens as text, followed by the prompt's own text."""
        own = self.prompt.split(" ", len(self.positions[0]))[len(self.positions[0]) :]
        return " ".join([self.base.pipeline.tokenizer.decode(ids.tolist()).strip(), *own])


def allowed_tokens(base: Base) -> Tensor:
    """[vocabulary] bool: all tokens but the start, end and padding tokens."""
    tokenizer = base.pipeline.tokenizer
    allowed = torch.ones(base.text_encoders[0].get_input_embeddings().num_embeddings, dtype=torch.bool)
    allowed[list(tokenizer.all_special_ids)] = False
    return allowed


def nearest(vectors: Tensor, table: Tensor, allowed: Tensor) -> Tensor:
    """[n] the allowed tokens whose embeddings (rows of table [V, width]) are closest to vectors [n, width]."""
    distance = torch.cdist(vectors.float(), table.float())
    distance[:, ~allowed.to(distance.device)] = torch.inf
    return distance.argmin(1)


def random_tokens(allowed: Tensor, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Allowed tokens of this shape, uniformly."""
    ids = torch.nonzero(allowed)[:, 0]
    return ids[torch.randint(len(ids), tuple(shape), generator=generator)]
