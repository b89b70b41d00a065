"""Random-weight models of the kinds whose text encoder is a language model: real architectures with narrow layers."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from tokenizers import pre_tokenizers
from torch import nn
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

CHAT_WIDTH = 16  # of the language models
MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Qwen's template for the messages that pipelines make: roles, and an empty thought where thinking is switched off.
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def make_chat_tokenizer() -> Qwen2Tokenizer:
    """Qwen's bytes without merges: one token a letter, and the marks of its chat template."""
    alphabet = {letter: n for n, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    marks = MARKS[1:]
    tokenizer = Qwen2Tokenizer(vocab=alphabet, merges=[], extra_special_tokens=marks, model_max_length=131072)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def qwen3_config(layers: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=300,
        hidden_size=CHAT_WIDTH,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=1024,
    )


def make_z_image(name: str, vae: AutoencoderKL) -> ZImagePipeline:
    """Z-Image, or z-image-turbo with its scheduler, in miniature."""
    torch.manual_seed(3)
    transformer = ZImageTransformer2DModel(
        dim=16,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=CHAT_WIDTH,
        axes_dims=[4, 2, 2],
        axes_lens=[640, 16, 16],
    )
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        nn.init.normal_(token)  # learned in the published model
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0 if name == "z-image-turbo" else 6.0),
        vae=vae,
        text_encoder=Qwen3Model(qwen3_config(layers=3)),
        tokenizer=make_chat_tokenizer(),
        transformer=transformer,
    )


def make_chat_kind(name: str, vae: Any) -> Any:
    """The pipeline of a kind. vae: with 16 channels, of FLUX.1."""
    return make_z_image(name, vae)
