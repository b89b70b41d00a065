"""How each kind's network is conditioned on a caption: the caption's encoding as one tensor, and the network's call.

SD 1.x and 2.x take the text encoder's output [tokens, width]. XL, SD 3 and FLUX also take a pooled embedding of the
caption. It is stored as one more row, padded with zeros to the width, so that caching and batching work for all. What
the kinds with a language model as text encoder have in common is in chat.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from sd_unlearn.models import flow

GUIDANCE_IN_TRAINING = 1.0  # embedded guidance of FLUX.1 dev: its prediction without guidance


class Conditioning(Protocol):
    """How a network is called."""

    def predict(self, model: nn.Module, noisy: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        """The prediction, shaped as noisy; the arguments are those of Denoiser.predict."""


@dataclass(frozen=True)
class NoConditioning:
    """UNet2DModel, the DDPMs of the paper. They work on pixels."""

    def predict(self, model: nn.Module, noisy: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        return model(noisy, timesteps).sample


@dataclass(frozen=True)
class ClassConditioning:
    """UNet2DModel with class numbers [B, 1] as text."""

    def predict(self, model: nn.Module, noisy: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        return model(noisy, timesteps, class_labels=text[:, 0].long()).sample


@dataclass(frozen=True)
class TextConditioning:
    """SD 1.x and 2.x, and what the other kinds have in common with them.

    No attention mask is passed to any network: the pipelines pass none, so training must not either.
    """

    @property
    def length(self) -> int:
        """Tokens of a caption that T5 or a language model reads; 0 if only CLIP reads it."""
        return 0

    def predict(self, model: nn.Module, noisy: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        return model(noisy, timesteps, encoder_hidden_states=text).sample

    def encode(self, pipeline: Any, captions: Sequence[str], device: Any) -> Tensor:
        """[N, tokens, width] as the pipeline makes them, differentiable; packed if there is a pooled embedding."""
        encoded: Tensor = pipeline.encode_prompt(
            list(captions), device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )[0]
        return encoded

    def token_counts(self, tokenizer: Any, captions: Sequence[str]) -> list[int]:
        """How many tokens the text encoder would read of each caption if it read all, with those of a chat template."""
        return [len(ids) for ids in tokenizer(list(captions), truncation=False, verbose=False).input_ids]

    def tokenized(self, tokenizer: Any, caption: str) -> tuple[list[int], list[int]]:
        """Token ids of a caption, padded to the length that the text encoder reads; 1 where they are not padding."""
        length = tokenizer.model_max_length
        found = tokenizer(caption, padding="max_length", max_length=length, truncation=True)
        return found.input_ids, found.attention_mask

    def learned_positions(self, tokenizer: Any, caption: str, length: int) -> list[int]:
        """The tokens that an attack on the whole prompt learns: all but the first, also padding, which is not masked.

        length: that all text encoders of the pipeline read.
        """
        return list(range(1, length))

    def tokens_of(self, text: Tensor) -> Tensor:
        """The rows of encoded captions [N, rows, width] that stand for tokens."""
        return text

    def shape_of(self, network: Mapping[str, Any], tokens: int, has_t5: bool = True) -> tuple[int, int]:
        """(rows, width) of an encoded caption. network: its configuration; tokens: that CLIP reads."""
        return tokens, int(network["cross_attention_dim"])

    def arguments(self, text: Tensor, empty: Tensor) -> dict[str, Any]:
        """The pipeline's arguments for prompts, from encoded captions. empty: the empty caption, as often as text."""
        return {"prompt_embeds": text, "negative_prompt_embeds": empty}

    def options(self, pipeline: Any) -> dict[str, Any]:
        """Further arguments of the pipeline, for prompts in words and encoded ones."""
        return {}

    def guidance(self, scale: float, prompts: Mapping[str, Any]) -> dict[str, Any]:
        """The pipeline's arguments for guidance of this scale. prompts: those with the prompts or embeddings."""
        return {"guidance_scale": scale}

    def shift_of(self, scheduler: Mapping[str, Any], image_tokens: int) -> float:
        """The shift with which the pipeline spaces its steps for images of this many patches (flow matching)."""
        return flow.shift_of(scheduler, image_tokens)

    def to_pipeline(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] as the pipeline has them while it samples."""
        return latents

    def from_pipeline(self, latents: Tensor, height: int, width: int) -> Tensor:
        """The inverse of to_pipeline. height, width: of the latents [B, C, h, w]."""
        return latents

    def as_argument(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] as the pipeline takes them for its argument `latents`."""
        return self.to_pipeline(latents)

    def finished(self, pipeline: Any, latents: Tensor, height: int, width: int) -> Tensor:
        """Latents [B, C, h, w] from what the pipeline returns for `output_type="latent"`."""
        return self.from_pipeline(latents, height, width)


@dataclass(frozen=True)
class XLConditioning(TextConditioning):
    """SDXL: two text encoders, a pooled embedding, and sizes."""

    pooled_width: int
    pixels_per_latent: int = 8

    def predict(self, model: nn.Module, noisy: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        tokens, pooled = unpack(text, self.pooled_width)
        added = {"text_embeds": pooled, "time_ids": time_ids(noisy, self.pixels_per_latent)}
        return model(noisy, timesteps, encoder_hidden_states=tokens, added_cond_kwargs=added).sample

    def encode(self, pipeline: Any, captions: Sequence[str], device: Any) -> Tensor:
        tokens, _, pooled, _ = pipeline.encode_prompt(
            list(captions), device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return pack(tokens, pooled)

    def tokens_of(self, text: Tensor) -> Tensor:
        return text[:, :-1]

    def shape_of(self, network: Mapping[str, Any], tokens: int, has_t5: bool = True) -> tuple[int, int]:
        return tokens + 1, int(network["cross_attention_dim"])

    def arguments(self, text: Tensor, empty: Tensor) -> dict[str, Any]:
        (tokens, pooled), (no_tokens, no_pooled) = (unpack(rows, self.pooled_width) for rows in (text, empty))
        return {
            "prompt_embeds": tokens,
            "pooled_prompt_embeds": pooled,
            "negative_prompt_embeds": no_tokens,
            "negative_pooled_prompt_embeds": no_pooled,
        }


@dataclass(frozen=True)
class SD3Conditioning(XLConditioning):
    """SD 3 and 3.5: the tokens of two CLIPs side by side, then those of T5; both CLIPs' pooled embeddings.

    Without T5 its tokens are zeros: as many as CLIP's, which was Diffusers' number until it became an argument.
    """

    @property
    def length(self) -> int:
        """As many as the pipeline lets T5 read."""
        return 256

    def predict(self, model: nn.Module, noisy: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        tokens, pooled = unpack(text, self.pooled_width)
        return model(
            hidden_states=noisy, timestep=timesteps, encoder_hidden_states=tokens, pooled_projections=pooled
        ).sample

    def encode(self, pipeline: Any, captions: Sequence[str], device: Any) -> Tensor:
        tokens, _, pooled, _ = pipeline.encode_prompt(
            list(captions), None, None, device=device, do_classifier_free_guidance=False, **self.options(pipeline)
        )
        return pack(tokens, pooled)

    def options(self, pipeline: Any) -> dict[str, Any]:
        has_t5 = pipeline.text_encoder_3 is not None
        return {"max_sequence_length": self.length if has_t5 else pipeline.tokenizer_max_length}

    def shape_of(self, network: Mapping[str, Any], tokens: int, has_t5: bool = True) -> tuple[int, int]:
        return tokens + (self.length if has_t5 else tokens) + 1, int(network["joint_attention_dim"])


class InPatches:
    """Of pipelines that sample latents in patches of 2 x 2: FLUX and Qwen-Image."""

    def to_pipeline(self, latents: Tensor) -> Tensor:
        return to_patches(latents)

    def from_pipeline(self, latents: Tensor, height: int, width: int) -> Tensor:
        return from_patches(latents, height, width)


@dataclass(frozen=True)
class FluxConditioning(InPatches, XLConditioning):
    """FLUX.1: the tokens of T5, the pooled embedding of CLIP, latents in patches of 2 x 2, and their positions."""

    embeds_guidance: bool = False  # dev, which is distilled from guided predictions; schnell is not

    @property
    def length(self) -> int:
        """As published for dev and for schnell."""
        return 512 if self.embeds_guidance else 256

    def predict(self, model: nn.Module, noisy: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        tokens, pooled = unpack(text, self.pooled_width)
        height, width = noisy.shape[2:]
        guidance = torch.full((len(noisy),), GUIDANCE_IN_TRAINING, device=noisy.device)
        predicted = model(
            hidden_states=to_patches(noisy),
            timestep=timesteps / 1000,  # the network multiplies by 1000
            guidance=guidance if self.embeds_guidance else None,
            pooled_projections=pooled,
            encoder_hidden_states=tokens,
            txt_ids=noisy.new_zeros(tokens.shape[1], 3),
            img_ids=positions(height // 2, width // 2, noisy),
        ).sample
        return from_patches(predicted, height, width)

    def encode(self, pipeline: Any, captions: Sequence[str], device: Any) -> Tensor:
        tokens, pooled, _ = pipeline.encode_prompt(list(captions), None, device, max_sequence_length=self.length)
        return pack(tokens, pooled)

    def shape_of(self, network: Mapping[str, Any], tokens: int, has_t5: bool = True) -> tuple[int, int]:
        return self.length + 1, int(network["joint_attention_dim"])

    def arguments(self, text: Tensor, empty: Tensor) -> dict[str, Any]:
        tokens, pooled = unpack(text, self.pooled_width)
        return {"prompt_embeds": tokens, "pooled_prompt_embeds": pooled}

    def options(self, pipeline: Any) -> dict[str, Any]:
        return {"max_sequence_length": self.length}


def pack(tokens: Tensor, pooled: Tensor) -> Tensor:
    """tokens [N, tokens, width], pooled [N, pooled width <= width] -> [N, tokens + 1, width]."""
    row = pad(pooled, (0, tokens.shape[-1] - pooled.shape[-1]))
    return torch.cat([tokens, row[:, None]], dim=1)


def unpack(text: Tensor, pooled_width: int) -> tuple[Tensor, Tensor]:
    """The inverse of pack(): tokens [N, tokens, width], pooled [N, pooled_width]."""
    return text[:, :-1], text[:, -1, :pooled_width]


def time_ids(noisy: Tensor, pixels: int) -> Tensor:
    """SDXL's time ids [B, 6] for latents [B, 4, h, w]: original size, crop and target size in pixels.

    Podell et al. 2023, section 2.2: (height, width, top, left, height, width), without cropping or resizing, as the
    pipeline sets them. pixels: pixels per latent.
    """
    ids = noisy.new_zeros(len(noisy), 6)
    ids[:, 0::4] = noisy.shape[2] * pixels  # slices: an index tensor would synchronize the device
    ids[:, 1::4] = noisy.shape[3] * pixels
    return ids


def to_patches(latents: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, h w / 4, 4 C], a row per patch of 2 x 2 latents, as FLUX's pipeline packs them."""
    rows = latents.unflatten(2, (-1, 2)).unflatten(4, (-1, 2))  # [B, C, h/2, 2, w/2, 2]
    return rows.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def from_patches(patches: Tensor, height: int, width: int) -> Tensor:
    """The inverse of to_patches: [B, C, height, width]."""
    rows = patches.unflatten(2, (-1, 2, 2)).unflatten(1, (height // 2, width // 2))
    return rows.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def positions(height: int, width: int, like: Tensor) -> Tensor:
    """[height * width, 3]: FLUX's position (0, row, column) of each patch."""
    ids = like.new_zeros(height, width, 3)
    ids[..., 1] += torch.arange(height, device=like.device)[:, None]
    ids[..., 2] += torch.arange(width, device=like.device)
    return ids.flatten(0, 1)
