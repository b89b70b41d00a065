"""Random-weight models of the flow-matching kinds: the real architectures with narrow layers, as folders."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from chat_kinds import make_chat_kind
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from kinds import TOKENS, make_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

CHAT_KINDS = ("z-image", "flux2-dev", "flux2-klein-base", "qwen-image")
DISTILLED = ("z-image-turbo", "flux2-klein")  # the same networks; other schedulers and samplers
FLOW_KINDS = ("sd3", "sd35", "flux-dev", "flux-schnell", *CHAT_KINDS)
KIND_OF = {"sd3": "sd3", "sd35": "sd3", "flux-dev": "flux", "flux-schnell": "flux"}
KIND_OF |= dict.fromkeys(("z-image", "z-image-turbo"), "z-image")
KIND_OF |= {"flux2-dev": "flux2", "qwen-image": "qwen-image"} | dict.fromkeys(
    ("flux2-klein-base", "flux2-klein"), "flux2-klein"
)
WIDTHS, T5_WIDTH = (8, 12), 24  # of the two CLIPs; of T5
VAES = {"sd3": (1.5305, 0.0609), "flux": (0.3611, 0.1159)}  # scaling and shift of the published models


def make_vae(kind: str) -> AutoencoderKL:
    """8 pixels a latent, 64 pixels, 16 channels, no convolutions around the latents."""
    scaling, shift = VAES[kind]
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 8, 8),
        layers_per_block=1,
        norm_num_groups=2,
        sample_size=64,
        latent_channels=16,
        scaling_factor=scaling,
        shift_factor=shift,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def make_clip(network: Any, width: int) -> Any:
    tokenizer = make_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return network(config)


def make_t5_tokenizer() -> PreTrainedTokenizerFast:
    """T5's special tokens (padding 0, end 1, no start) with letters instead of its vocabulary."""
    letters = ["<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.WordLevel({letter: n for n, letter in enumerate(letters)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.Split("", "isolated")]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def make_t5() -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=300,
            d_model=T5_WIDTH,
            d_kv=4,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
        )
    )


def make_sd3(name: str = "sd35", t5: bool = True) -> StableDiffusion3Pipeline:
    """SD 3 medium in miniature; sd35: with normalized queries and a second attention, as SD 3.5 medium."""
    torch.manual_seed(1)
    newer: dict[str, Any] = {"qk_norm": "rms_norm", "dual_attention_layers": (0,)} if name == "sd35" else {}
    transformer = SD3Transformer2DModel(
        sample_size=8,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=sum(WIDTHS),
        pos_embed_max_size=12,
        **newer,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=make_vae("sd3"),
        text_encoder=make_clip(CLIPTextModelWithProjection, WIDTHS[0]),
        text_encoder_2=make_clip(CLIPTextModelWithProjection, WIDTHS[1]),
        text_encoder_3=make_t5() if t5 else None,
        tokenizer=make_tokenizer(),
        tokenizer_2=make_tokenizer("!"),
        tokenizer_3=make_t5_tokenizer() if t5 else None,
    )


def make_flux(name: str = "flux-dev") -> FluxPipeline:
    """FLUX.1 dev, or schnell without embedded guidance, in miniature."""
    torch.manual_seed(2)
    is_dev = name == "flux-dev"
    transformer = FluxTransformer2DModel(
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=WIDTHS[0],
        guidance_embeds=is_dev,
        axes_dims_rope=(4, 2, 2),
    )
    dynamic = {"shift": 3.0, "use_dynamic_shifting": True} if is_dev else {"shift": 1.0}
    return FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**dynamic),
        vae=make_vae("flux"),
        text_encoder=make_clip(CLIPTextModel, WIDTHS[0]),
        text_encoder_2=make_t5(),
        tokenizer=make_tokenizer(),
        tokenizer_2=make_t5_tokenizer(),
    )


class FlowKinds:
    """Folders of models of each kind; made when first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = cache(self._folder)

    def _folder(self, name: str) -> Path:
        """name: of FLOW_KINDS or DISTILLED, or sd3-without-t5."""
        if name in (*CHAT_KINDS, *DISTILLED):
            pipeline: Any = make_chat_kind(name, make_vae("flux"))
        elif name == "sd3-without-t5":
            pipeline = make_sd3("sd3", t5=False)
        else:
            pipeline = make_sd3(name) if KIND_OF[name] == "sd3" else make_flux(name)
        pipeline.save_pretrained(self.root / name)
        return self.root / name
