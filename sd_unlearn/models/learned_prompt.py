"""Prompts whose token embeddings are parameters: attacks learn them, and robust training defends against them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from sd_unlearn.models.base import Base
from sd_unlearn.models.conditioning import TextConditioning


class LearnedPrompt:
    """A prompt in which the embeddings of some tokens are parameters, in every text encoder of a pipeline."""

    def __init__(self, base: Base, prompt: str, positions: Sequence[int] | Sequence[list[int]]) -> None:
        """positions: of the tokens, counted with CLIP's start token; or those of each encoder, as its tokenizer counts.

        The tokens start as the prompt's own embeddings.
        """
        self.base, self.prompt, self.positions = base, prompt, of_each_encoder(base, positions)
        tables = [embedding_table(encoder) for encoder in base.text_encoders]
        self.scales = [float(table.weight.float().square().mean().sqrt()) for table in tables]
        self.vectors: list[Tensor] = [
            nn.Parameter(table.weight[ids].detach().float().clone())
            for table, ids in zip(tables, self._token_ids(), strict=True)
        ]  # of each encoder [positions, width]

    def _token_ids(self) -> list[Tensor]:
        return [
            torch.tensor(prompt_ids(tokenizer, self.prompt, self.base.conditioning))[positions]
            for tokenizer, positions in zip(readers(self.base), self.positions, strict=True)
        ]

    def start_from(self, ids_of: Callable[[Any], Sequence[int]]) -> None:
        """Start every position from the mean embedding of the tokens that ids_of gives for a tokenizer."""
        encoders = zip(self.vectors, self.base.text_encoders, tokenizers(self.base), strict=True)
        for vectors, encoder, tokenizer in encoders:
            vectors.data[:] = embedding_table(encoder).weight[list(ids_of(tokenizer))].float().mean(0)

    def add_noise(self, generator: torch.Generator) -> None:
        """Move every embedding by normal noise of the usual size of an embedding."""
        for vectors, scale in zip(self.vectors, self.scales, strict=True):
            vectors.data += scale * torch.randn(vectors.shape, generator=generator).to(vectors)

    def optimizer(self, learning_rate: float) -> torch.optim.Adam:
        """Adam of the vectors, with a learning rate in units of the usual size of an embedding."""
        groups = zip(self.vectors, self.scales, strict=True)
        return torch.optim.Adam([{"params": [vectors], "lr": learning_rate * scale} for vectors, scale in groups])

    def encode(self, count: int = 1) -> Tensor:
        """Text embeddings [count, rows, width] (packed, see models/conditioning), differentiable in the vectors.

        Vectors [count, positions, width] give as many prompts.
        """
        with ExitStack() as hooks:
            for encoder, vectors, at in zip(self.base.text_encoders, self.vectors, self.positions, strict=True):
                hook = embedding_table(encoder).register_forward_hook(_inserted(vectors, at))
                hooks.callback(hook.remove)
            return self.base.conditioning.encode(self.base.pipeline, [self.prompt] * count, self.base.device)


def _inserted(vectors: Tensor, positions: list[int]) -> Any:
    def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, positions] = vectors.to(output.dtype)
        return output

    return hook


def tokenizers(base: Base) -> list[Any]:
    """The tokenizers of the text encoders: that of FLUX.2 dev is in a processor of images and text."""
    return [getattr(reader, "tokenizer", reader) for reader in readers(base)]


def readers(base: Base) -> list[Any]:
    """The pipeline's tokenizers, as its conditioning takes them."""
    names = [name.replace("text_encoder", "tokenizer") for name in base.properties.text_encoders]
    return [tokenizer for name in names if (tokenizer := getattr(base.pipeline, name, None)) is not None]


def embedding_table(encoder: Any) -> nn.Embedding:
    """The table that a text encoder looks tokens up in. T5's stack has its own, tied to the one it reports."""
    table: nn.Embedding = getattr(getattr(encoder, "encoder", None), "embed_tokens", None)  # type: ignore[assignment]
    return table if table is not None else encoder.get_input_embeddings()


def of_each_encoder(base: Base, positions: Sequence[int] | Sequence[list[int]]) -> list[list[int]]:
    """The positions of tokens for each text encoder. Given once, they are CLIP's: T5 has no start token."""
    if positions and isinstance(positions[0], list):
        return [list(own) for own in positions]  # type: ignore[arg-type]
    starts = [1 if tokenizer.bos_token_id is None else 0 for tokenizer in tokenizers(base)]
    return [[position - start for position in positions] for start in starts]  # type: ignore[operator]


def prompt_ids(tokenizer: Any, prompt: str, conditioning: TextConditioning = TextConditioning()) -> list[int]:
    """Token ids of a prompt, padded to the length that the text encoder reads."""
    return conditioning.tokenized(tokenizer, prompt)[0]


def learned_positions(base: Base, prompt: str) -> list[list[int]]:
    """The tokens of a prompt, for each text encoder, that are learned if the whole prompt is."""
    length, conditioning = prompt_length(base), base.conditioning
    own = [conditioning.learned_positions(reader, prompt, length) for reader in readers(base)]
    return own if base.properties.reading == "chat" else of_each_encoder(base, own[0])


def prompt_length(base: Base) -> int:
    """Number of tokens that every text encoder of the pipeline reads, with start, end and padding."""
    return min(int(tokenizer.model_max_length) for tokenizer in tokenizers(base))


def content_positions(base: Base, prompt: str) -> list[int]:
    """Positions of a prompt's own tokens: without start token, end token and padding."""
    tokenizer = base.pipeline.tokenizer
    ids = prompt_ids(tokenizer, prompt)
    end = ids.index(tokenizer.eos_token_id, 1)
    return list(range(1, end))
