"""The kinds whose text encoder is a language model that reads captions in a chat template: FLUX.2, Z-Image, Qwen-Image.

Encoded captions of Z-Image and Qwen-Image have as many tokens as the caption. They are stored padded with rows of
zeros, which no token has, so that caching and batching work as for the other kinds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from sd_unlearn.models import conditioning
from sd_unlearn.models.conditioning import InPatches, TextConditioning, from_patches, positions, to_patches
from sd_unlearn.models.kinds import KINDS, kind_of, text_width_of
from sd_unlearn.models.latent_scale import LatentScale

INSTRUCTION = 34  # tokens of the instruction in Qwen-Image's template, prompt_template_encode_start_idx of its pipeline


@dataclass(frozen=True)
class ChatConditioning(TextConditioning):
    """What these kinds have in common."""

    @property
    def length(self) -> int:
        """As many as the pipelines let a language model read by default, those of the template included."""
        return 512

    thinks = False  # whether the template lets the model think before it answers

    def shape_of(self, network: Mapping[str, Any], tokens: int, has_t5: bool = True) -> tuple[int, int]:
        width = text_width_of(network) or 0
        return self.length, width * KINDS[kind_of(network)].hidden_states

    def options(self, pipeline: Any) -> dict[str, Any]:
        return {"max_sequence_length": self.length}

    def as_read(self, tokenizer: Any, caption: str) -> str:
        """A caption in the chat template, as the pipeline writes it."""
        messages = [{"role": "user", "content": caption}]
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=self.thinks
        )
        return text

    def token_counts(self, tokenizer: Any, captions: Sequence[str]) -> list[int]:
        return super().token_counts(tokenizer, [self.as_read(tokenizer, caption) for caption in captions])

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

    thinks = True

    def predict(self, model: nn.Module, noisy: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        frames = list(noisy.unsqueeze(2))  # the network is made for videos, too: [C, 1, h, w] each
        predicted = model(x=frames, t=(1000 - timesteps) / 1000, cap_feats=without_padding(text)).sample
        return -torch.stack(list(predicted))[:, :, 0]

    def encode(self, pipeline: Any, captions: Sequence[str], device: Any) -> Tensor:
        rows, _ = pipeline.encode_prompt(
            list(captions), device, do_classifier_free_guidance=False, max_sequence_length=self.length
        )
        return with_padding(rows, self.length)

    def arguments(self, text: Tensor, empty: Tensor) -> dict[str, Any]:
        return {"prompt_embeds": without_padding(text), "negative_prompt_embeds": without_padding(empty)}


@dataclass(frozen=True)
class Flux2Conditioning(InPatches, ChatConditioning):
    """What FLUX.2 dev and klein have in common: three hidden states of the language model side by side, with padding.

    Latents are in patches of 2 x 2 as for FLUX.1, positions are (0, row, column, place in the caption).
    """

    steps: int = 50  # that images are generated in; the pipeline spaces them by their number
    embeds_guidance = False

    def predict(self, model: nn.Module, noisy: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        height, width = noisy.shape[2:]
        guidance = torch.full((len(noisy),), conditioning.GUIDANCE_IN_TRAINING, device=noisy.device)
        predicted = model(
            hidden_states=to_patches(noisy),
            timestep=timesteps / 1000,  # the network multiplies by 1000
            guidance=guidance if self.embeds_guidance else None,
            encoder_hidden_states=text,
            txt_ids=pad(torch.arange(text.shape[1], device=noisy.device)[:, None], (3, 0)),
            img_ids=pad(positions(height // 2, width // 2, noisy), (0, 1)),
        ).sample
        return from_patches(predicted, height, width)

    def encode(self, pipeline: Any, captions: Sequence[str], device: Any) -> Tensor:
        text: Tensor = pipeline.encode_prompt(list(captions), device, max_sequence_length=self.length)[0]
        return text

    def learned_positions(self, tokenizer: Any, caption: str, length: int) -> list[int]:
        """All but the first, as for CLIP: the transformer attends to the padding, too."""
        return list(range(1, self.length))

    def shift_of(self, scheduler: Mapping[str, Any], image_tokens: int) -> float:
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        if not scheduler.get("use_dynamic_shifting"):
            return super().shift_of(scheduler, image_tokens)
        return math.exp(compute_empirical_mu(image_tokens, self.steps))

    def as_argument(self, latents: Tensor) -> Tensor:
        height, width = latents.shape[2:]
        return to_patches(latents).transpose(1, 2).unflatten(2, (height // 2, width // 2))


@dataclass(frozen=True)
class Flux2DevConditioning(Flux2Conditioning):
    """FLUX.2 dev: Mistral, and a guidance scale as an input."""

    embeds_guidance = True

    def token_counts(self, tokenizer: Any, captions: Sequence[str]) -> list[int]:
        return [len(self._read(tokenizer, caption)["input_ids"][0]) for caption in captions]

    def tokenized(self, tokenizer: Any, caption: str) -> tuple[list[int], list[int]]:
        cut = {"padding": "max_length", "truncation": True, "max_length": self.length}
        found = self._read(tokenizer, caption, **cut)
        ids, mask = (list(map(int, found[key][0])) for key in ("input_ids", "attention_mask"))
        return ids, mask

    def _read(self, processor: Any, caption: str, **options: Any) -> Any:
        from diffusers.pipelines.flux2.pipeline_flux2 import format_input

        return processor.apply_chat_template(format_input([caption]), tokenize=True, return_dict=True, **options)

    def arguments(self, text: Tensor, empty: Tensor) -> dict[str, Any]:
        return {"prompt_embeds": text}


@dataclass(frozen=True)
class Flux2KleinConditioning(Flux2Conditioning):
    """FLUX.2 klein: Qwen3, and classifier-free guidance, if it is not distilled."""

    def finished(self, pipeline: Any, latents: Tensor, height: int, width: int) -> Tensor:
        """The pipeline returns them as the VAE takes them."""
        return LatentScale.of(pipeline.vae, latents).apply(latents)


@dataclass(frozen=True)
class QwenImageConditioning(InPatches, ChatConditioning):
    """Qwen-Image: captions of any length with a mask, latents in patches of 2 x 2 as for FLUX.1."""

    template: str = "{}"  # the pipeline's, which is no template of the tokenizer

    def predict(self, model: nn.Module, noisy: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        height, width = noisy.shape[2:]
        tokens, mask = masked(text)
        predicted = model(
            hidden_states=to_patches(noisy),
            timestep=timesteps / 1000,  # the network multiplies by 1000
            encoder_hidden_states=tokens,
            encoder_hidden_states_mask=mask,
            img_shapes=[[(1, height // 2, width // 2)]] * len(noisy),
        ).sample
        return from_patches(predicted, height, width)

    def encode(self, pipeline: Any, captions: Sequence[str], device: Any) -> Tensor:
        text, _ = pipeline.encode_prompt(list(captions), device, max_sequence_length=self.length)
        return pad(text, (0, 0, 0, self.length - text.shape[1]))  # padded with zeros to the longest caption already

    def as_read(self, tokenizer: Any, caption: str) -> str:
        return self.template.format(caption)

    def token_counts(self, tokenizer: Any, captions: Sequence[str]) -> list[int]:
        """Without those of the instruction in front, which the pipeline reads and drops."""
        return [count - INSTRUCTION for count in super().token_counts(tokenizer, captions)]

    def tokenized(self, tokenizer: Any, caption: str) -> tuple[list[int], list[int]]:
        """Without padding: the pipeline pads to the longest caption of a batch only."""
        limit = self.length + INSTRUCTION
        found = tokenizer(self.as_read(tokenizer, caption), truncation=True, max_length=limit)
        return found.input_ids, found.attention_mask

    def arguments(self, text: Tensor, empty: Tensor) -> dict[str, Any]:
        (tokens, mask), (no_tokens, no_mask) = masked(text), masked(empty)
        return {
            "prompt_embeds": tokens,
            "prompt_embeds_mask": mask,
            "negative_prompt_embeds": no_tokens,
            "negative_prompt_embeds_mask": no_mask,
        }

    def guidance(self, scale: float, prompts: Mapping[str, Any]) -> dict[str, Any]:
        """The pipeline guides only with a negative prompt; that of the others is the empty caption by default."""
        negative = {"negative_prompt": [""] * len(prompts["prompt"])} if scale > 1 and "prompt" in prompts else {}
        return {"true_cfg_scale": scale, **negative}


def with_padding(rows: Sequence[Tensor], length: int) -> Tensor:
    """Captions [tokens, width] with different numbers of tokens -> [N, length, width]."""
    return torch.stack([pad(row, (0, 0, 0, length - len(row))) for row in rows])


def without_padding(text: Tensor) -> list[Tensor]:
    """The inverse of with_padding. On the meta device, which has no values, nothing counts as padding."""
    if text.is_meta:
        return list(text)
    counts = text.any(-1).sum(1).tolist()
    return [caption[:count] for caption, count in zip(text, counts, strict=True)]


def masked(text: Tensor) -> tuple[Tensor, Tensor | None]:
    """Padded captions [N, length, width] -> (the same up to the longest, mask [N, tokens]: True where a token is).

    None instead of a mask if there is no padding, or on the meta device.
    """
    if text.is_meta:
        return text, None
    mask = text.any(-1)
    longest = int(mask.sum(1).max())
    mask = mask[:, :longest]
    return text[:, :longest], None if bool(mask.all()) else mask
