"""The configurations of the published flow-matching models, in Diffusers' format: sizes of their networks.

A plan for them needs no network. They were written for this package; tests/models/test_published.py compares them with
the published numbers of parameters.
"""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]

_CLIP: Config = {"max_position_embeddings": 77, "vocab_size": 49408, "bos_token_id": 0, "eos_token_id": 2}
CLIP_L = _CLIP | {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}
CLIP_G = _CLIP | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
T5_XXL: Config = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": False,
}
_VAE: Config = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 16,
    "sample_size": 1024,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
SD3_VAE = _VAE | {"scaling_factor": 1.5305, "shift_factor": 0.0609}
FLUX_VAE = _VAE | {"scaling_factor": 0.3611, "shift_factor": 0.1159}
_SD3: Config = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
SD3_MEDIUM = _SD3 | {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}
SD35_MEDIUM = SD3_MEDIUM | {
    "pos_embed_max_size": 384,
    "qk_norm": "rms_norm",
    "dual_attention_layers": list(range(13)),
}
SD35_LARGE = _SD3 | {
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "qk_norm": "rms_norm",
}
FLUX: Config = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "axes_dims_rope": [16, 56, 56],
}

FLUX2_VAE = _VAE | {"latent_channels": 32, "use_quant_conv": True, "use_post_quant_conv": True}
_FLUX2: Config = {
    "patch_size": 1,
    "in_channels": 128,
    "attention_head_dim": 128,
    "timestep_guidance_channels": 256,
    "mlp_ratio": 3.0,
    "axes_dims_rope": [32, 32, 32, 32],
    "rope_theta": 2000,
}
FLUX2_DEV = _FLUX2 | {
    "num_layers": 8,
    "num_single_layers": 48,
    "num_attention_heads": 48,
    "joint_attention_dim": 15360,
}
KLEIN_4B = _FLUX2 | {
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}
KLEIN_9B = _FLUX2 | {
    "num_layers": 8,
    "num_single_layers": 24,
    "num_attention_heads": 32,
    "joint_attention_dim": 12288,
    "guidance_embeds": False,
}
Z_IMAGE: Config = {
    "all_patch_size": [2],
    "all_f_patch_size": [1],
    "in_channels": 16,
    "dim": 3840,
    "n_layers": 30,
    "n_refiner_layers": 2,
    "n_heads": 30,
    "n_kv_heads": 30,
    "qk_norm": True,
    "cap_feat_dim": 2560,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
}
QWEN3_4B: Config = {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
}

QWEN3_8B = QWEN3_4B | {"hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False}
MISTRAL_24B: Config = {  # Mistral Small 3.1; its part for images has the sizes of Mistral3Config
    "tie_word_embeddings": False,
    "text_config": {
        "model_type": "mistral",
        "hidden_size": 5120,
        "intermediate_size": 32768,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 131072,
        "max_position_embeddings": 131072,
    },
}

QWEN_IMAGE: Config = {
    "patch_size": 2,
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 60,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 3584,
    "axes_dims_rope": [16, 56, 56],
}
QWEN_IMAGE_VAE: Config = {
    "base_dim": 96,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "temperal_downsample": [False, True, True],
}
QWEN_VL_7B: Config = {
    "tie_word_embeddings": False,
    "text_config": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
    },
}


def _sd3(transformer: Config) -> dict[str, Config]:
    encoders = {"text_encoder": CLIP_L, "text_encoder_2": CLIP_G, "text_encoder_3": T5_XXL}
    return {"transformer": transformer, "vae": SD3_VAE, **encoders}


def _flux(guidance_embeds: bool) -> dict[str, Config]:
    transformer = FLUX | {"guidance_embeds": guidance_embeds}
    return {"transformer": transformer, "vae": FLUX_VAE, "text_encoder": CLIP_L, "text_encoder_2": T5_XXL}


# Name -> component -> configuration.
PUBLISHED: dict[str, dict[str, Config]] = {
    "sd3-medium": _sd3(SD3_MEDIUM),
    "sd3.5-medium": _sd3(SD35_MEDIUM),
    "sd3.5-large": _sd3(SD35_LARGE),
    "flux-dev": _flux(guidance_embeds=True),
    "flux-schnell": _flux(guidance_embeds=False),
    "flux2-dev": {"transformer": FLUX2_DEV, "vae": FLUX2_VAE, "text_encoder": MISTRAL_24B},
    "flux2-klein-4b": {"transformer": KLEIN_4B, "vae": FLUX2_VAE, "text_encoder": QWEN3_4B},
    "flux2-klein-9b": {"transformer": KLEIN_9B, "vae": FLUX2_VAE, "text_encoder": QWEN3_8B},
    "qwen-image": {"transformer": QWEN_IMAGE, "vae": QWEN_IMAGE_VAE, "text_encoder": QWEN_VL_7B},
    "z-image": {"transformer": Z_IMAGE, "vae": FLUX_VAE, "text_encoder": QWEN3_4B},
}
