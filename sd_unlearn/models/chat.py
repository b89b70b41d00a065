"""The kinds whose text encoder is a language model that reads captions in a chat template: Z-Image.

Their encoded captions have as many tokens as the caption. They are stored padded with rows of zeros, which no token
has, so that caching and batching work as for the other kinds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from sd_unlearn.models.conditioning import TextConditioning
from sd_unlearn.models.kinds import text_width_of


@dataclass(frozen=True)
class ChatConditioning(TextConditioning):
    """What these kinds have in common."""

    @property
    def length(self) -> int:
        """As many as the pipelines let a language model read by default, those of the template included."""
        return 512

    def shape_of(self, network: Mapping[str, Any], tokens: int, has_t5: bool = True) -> tuple[int, int]:
        return self.length, text_width_of(network) or 0

    def tokenized(self, tokenizer: Any, caption: str) -> tuple[list[int], list[int]]:
        read = self.as_read(tokenizer, caption)
        found = tokenizer(read, padding="max_length", max_length=self.length, truncation=True)
        return found.input_ids, found.attention_mask

    def learned_positions(self, tokenizer: Any, caption: str, length: int) -> list[int]:
        """Those of the template, too, but no padding: the encoding does not depend on it."""
        return [n for n, is_token in enumerate(self.tokenized(tokenizer, caption)[1]) if is_token][1:]


@dataclass(frozen=True)
class ZImageConditioning(ChatConditioning):
    """Z-Image: captions of any length, and a network that takes the time 1 - s and predicts x_0 - n."""

    def predict(self, model: nn.Module, noisy: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        frames = list(noisy.unsqueeze(2))  # the network is made for videos, too: [C, 1, h, w] each
        predicted = model(x=frames, t=(1000 - timesteps) / 1000, cap_feats=without_padding(text)).sample
        return -torch.stack(list(predicted))[:, :, 0]

    def encode(self, pipeline: Any, captions: Sequence[str], device: Any) -> Tensor:
        rows, _ = pipeline.encode_prompt(
            list(captions), device, do_classifier_free_guidance=False, max_sequence_length=self.length
        )
        return with_padding(rows, self.length)

    def as_read(self, tokenizer: Any, caption: str) -> str:
        messages = [{"role": "user", "content": caption}]
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        return text

    def arguments(self, text: Tensor, empty: Tensor) -> dict[str, Any]:
        return {"prompt_embeds": without_padding(text), "negative_prompt_embeds": without_padding(empty)}

    def options(self, pipeline: Any) -> dict[str, Any]:
        return {"max_sequence_length": self.length}


def with_padding(rows: Sequence[Tensor], length: int) -> Tensor:
    """Captions [tokens, width] with different numbers of tokens -> [N, length, width]."""
    return torch.stack([pad(row, (0, 0, 0, length - len(row))) for row in rows])


def without_padding(text: Tensor) -> list[Tensor]:
    """The inverse of with_padding. On the meta device, which has no values, nothing counts as padding."""
    if text.is_meta:
        return list(text)
    counts = text.any(-1).sum(1).tolist()
    return [caption[:count] for caption, count in zip(text, counts, strict=True)]
