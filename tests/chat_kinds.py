"""Random-weight models of the kinds whose text encoder is a language model: real architectures with narrow layers."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralImageProcessor,
    PixtralProcessor,
    PixtralVisionConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)

CHAT_WIDTH = 16  # of the language models
SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": CHAT_WIDTH,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 1024,
}
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
    return Qwen3Config(num_hidden_layers=layers, **SIZES)


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


MISTRAL_MARKS = ["[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"]
# Mistral's template for the two messages of FLUX.2's pipeline.
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'system' %}"
    "[SYSTEM_PROMPT]{{ message.content[0].text }}[/SYSTEM_PROMPT]{% else %}"
    "[INST]{{ message.content[0].text }}[/INST]{% endif %}{% endfor %}"
)


def make_mistral_processor() -> PixtralProcessor:
    """Of images and text, as FLUX.2 dev has it: one token a letter, padding on the left as published."""
    letters = ["<unk>", "<s>", "</s>", "<pad>", *MISTRAL_MARKS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.WordLevel({letter: n for n, letter in enumerate(letters)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.Split("", "isolated")]
    )
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=MISTRAL_MARKS,
        padding_side="left",
    )
    return PixtralProcessor(PixtralImageProcessor(), fast, chat_template=MISTRAL_TEMPLATE)


def make_mistral(layers: int) -> Mistral3ForConditionalGeneration:
    text = MistralConfig(num_hidden_layers=layers, **SIZES)
    vision = PixtralVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = Mistral3Config(text_config=text.to_dict(), vision_config=vision.to_dict(), image_token_index=8)
    return Mistral3ForConditionalGeneration(config)


def make_flux2_vae() -> AutoencoderKLFlux2:
    vae = AutoencoderKLFlux2(
        block_out_channels=(4, 4, 8, 8), layers_per_block=1, norm_num_groups=2, sample_size=64, latent_channels=32
    )
    nn.init.normal_(vae.bn.running_mean)
    nn.init.uniform_(vae.bn.running_var, 0.5, 2.0)
    return vae


def make_flux2(name: str) -> Flux2Pipeline | Flux2KleinPipeline:
    """FLUX.2 dev, klein base, or the distilled klein, in miniature."""
    torch.manual_seed(4)
    is_dev = name == "flux2-dev"
    transformer = Flux2Transformer2DModel(
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=3 * CHAT_WIDTH,
        timestep_guidance_channels=16,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=is_dev,
    )
    parts = {
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        "vae": make_flux2_vae(),
        "transformer": transformer,
    }
    if is_dev:
        return Flux2Pipeline(text_encoder=make_mistral(30), tokenizer=make_mistral_processor(), **parts)
    return Flux2KleinPipeline(
        text_encoder=Qwen3ForCausalLM(qwen3_config(layers=28)),
        tokenizer=make_chat_tokenizer(),
        is_distilled=name == "flux2-klein",
        **parts,
    )


def make_qwen_image() -> QwenImagePipeline:
    """Qwen-Image in miniature."""
    torch.manual_seed(5)
    text = {
        "vocab_size": 300,
        "hidden_size": CHAT_WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": CHAT_WIDTH}
    vae = AutoencoderKLQwenImage(
        base_dim=4, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    transformer = QwenImageTransformer2DModel(
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=CHAT_WIDTH,
        axes_dims_rope=(4, 2, 2),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192
    )
    return QwenImagePipeline(
        scheduler=scheduler,
        vae=vae,
        text_encoder=Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)),
        tokenizer=make_chat_tokenizer(),
        transformer=transformer,
    )


def make_chat_kind(name: str, vae: Any) -> Any:
    """The pipeline of a kind. vae: with 16 channels, of FLUX.1."""
    if name == "qwen-image":
        return make_qwen_image()
    return make_flux2(name) if name.startswith("flux2") else make_z_image(name, vae)
