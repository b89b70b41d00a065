"""Random-weight models of each kind: the real architectures with narrow layers, as folders, fp16 folders and files."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sd_unlearn.models.source import SINGLE_FILE_DIR

KINDS = ("sd1", "sd2", "sdxl")
FORMS = ("folder", "file", "fp16")
PREDICTS = {"sd1": "epsilon", "sd2": "v_prediction", "sdxl": "epsilon"}
TOKENS = 24
WIDTH, POOLED = 16, 24  # of the first and the second text encoder
SHRUNK: dict[str, dict[str, Any]] = {  # what is narrower than the published models' configurations; all else is theirs
    "unet": {"norm_num_groups": 4, "sample_size": 8, "layers_per_block": 1},
    "sd1": {"block_out_channels": [8, 8, 16, 16], "attention_head_dim": 2, "cross_attention_dim": WIDTH},
    "sd2": {"block_out_channels": [8, 8, 16, 16], "attention_head_dim": [1, 1, 2, 2], "cross_attention_dim": WIDTH},
    "sdxl": {
        "block_out_channels": [8, 8, 16],
        "attention_head_dim": [1, 1, 2],
        "cross_attention_dim": WIDTH + POOLED,
        "transformer_layers_per_block": [1, 2, 3],
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": POOLED + 6 * 8,
    },
    "vae": {"block_out_channels": [4, 4, 8, 8], "layers_per_block": 1, "norm_num_groups": 2, "sample_size": 64},
}


def make_tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """CLIP's byte vocabulary without merges: every string is encodable, one token a letter."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{letter}</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=TOKENS, pad_token=pad_token)


def make_kind(kind: str) -> Any:
    """64 x 64 pixels, 8 x 8 latents, a vocabulary of letters."""
    torch.manual_seed(KINDS.index(kind))
    unet = UNet2DConditionModel.from_config(config_of(kind, "unet") | SHRUNK["unet"] | SHRUNK[kind])
    vae = AutoencoderKL.from_config(config_of(kind, "vae") | SHRUNK["vae"])
    scheduler = DDIMScheduler.from_config(
        config_of(kind, "scheduler", "scheduler_config.json"), prediction_type=PREDICTS[kind]
    )
    parts = {"unet": unet, "vae": vae, "scheduler": scheduler}
    parts["text_encoder"] = CLIPTextModel(text_config(kind, "text_encoder", WIDTH))
    parts["tokenizer"] = make_tokenizer("!" if kind == "sd2" else "<|endoftext|>")
    if kind != "sdxl":
        return StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    second = CLIPTextModelWithProjection(text_config(kind, "text_encoder_2", POOLED))
    return StableDiffusionXLPipeline(
        **parts, text_encoder_2=second, tokenizer_2=make_tokenizer("!"), add_watermarker=False
    )


def config_of(kind: str, component: str, file: str = "config.json") -> dict[str, Any]:
    return dict(json.loads((SINGLE_FILE_DIR / kind / component / file).read_text()))


def text_config(kind: str, component: str, width: int) -> CLIPTextConfig:
    narrow = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokenizer = make_tokenizer()
    words = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    return CLIPTextConfig(**config_of(kind, component) | narrow | words | {"projection_dim": width})


class Kinds:
    """Where models of each kind and form lie; made when first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.pipeline = cache(make_kind)
        self.folder = cache(self._folder)
        self.file = cache(self._file)
        self.configs = cache(self._configs)

    def place(self, kind: str, form: str) -> Path:
        """Of a model: a folder, a folder with fp16 weights only, a single file."""
        return self.file(kind) if form == "file" else self.folder(kind, "fp16" if form == "fp16" else None)

    def options(self, kind: str, form: str) -> dict[str, str]:
        """What a command must be told."""
        told = {"pretrained_model_name_or_path": str(self.place(kind, form))}
        return told | ({"single_file_config": str(self.configs(kind))} if form == "file" else {})

    def _folder(self, kind: str, variant: str | None = None) -> Path:
        place = self.root / f"{kind}-{variant or 'folder'}"
        if variant is None:
            self.pipeline(kind).save_pretrained(place)
        else:
            make_kind(kind).to(dtype=torch.float16).save_pretrained(place, variant=variant)
        return place

    def _file(self, kind: str) -> Path:
        path = self.root / f"{kind}.safetensors"
        save_file(original_names(self.pipeline(kind)), path)
        return path

    def _configs(self, kind: str) -> Path:
        """The folder without its weights."""
        unwanted = shutil.ignore_patterns("*.safetensors")
        return Path(shutil.copytree(self.folder(kind), self.root / f"{kind}-configs", ignore=unwanted))


# -- the names of the original code, in which single files are written --


def original_names(pipeline: Any) -> dict[str, Tensor]:
    """The weights of a pipeline as one checkpoint of model sites."""
    unet = {f"model.diffusion_model.{k}": v for k, v in _unet(pipeline.unet).items()}
    vae = {f"first_stage_model.{k}": v for k, v in _vae(pipeline.vae).items()}
    text: dict[str, Tensor]
    if isinstance(pipeline, StableDiffusionXLPipeline):
        text = _clip(pipeline.text_encoder, "conditioner.embedders.0.transformer.")
        text |= _open_clip(pipeline.text_encoder_2, "conditioner.embedders.1.model.")
    elif pipeline.unet.config.use_linear_projection:
        text = _open_clip(pipeline.text_encoder, "cond_stage_model.model.")
    else:
        text = _clip(pipeline.text_encoder, "cond_stage_model.transformer.")
    return {name: value.detach().clone().contiguous() for name, value in (unet | vae | text).items()}


def _rename(
    state: dict[str, Tensor], rules: list[tuple[str, str | Callable[[re.Match[str]], str]]]
) -> dict[str, Tensor]:
    renamed = {}
    for name, value in state.items():
        for pattern, new in rules:
            name = re.sub(pattern, new, name)
        renamed[name] = value
    assert len(renamed) == len(state)
    return renamed


def _unet(unet: Any) -> dict[str, Tensor]:
    layers = unet.config.layers_per_block
    attends = [kind.startswith("CrossAttn") for kind in unet.config.up_block_types]

    def down(m: re.Match[str]) -> str:
        return f"input_blocks.{1 + int(m[1]) * (layers + 1) + int(m[3])}.{int(m[2] == 'attentions')}."

    def up(m: re.Match[str]) -> str:
        return f"output_blocks.{int(m[1]) * (layers + 1) + int(m[3])}.{int(m[2] == 'attentions')}."

    def upsample(m: re.Match[str]) -> str:
        return f"output_blocks.{int(m[1]) * (layers + 1) + layers}.{1 + attends[int(m[1])]}.conv."

    return _rename(
        unet.state_dict(),
        [
            (r"^conv_in\.", "input_blocks.0.0."),
            (r"^conv_norm_out\.", "out.0."),
            (r"^conv_out\.", "out.2."),
            (r"^time_embedding\.linear_1", "time_embed.0"),
            (r"^time_embedding\.linear_2", "time_embed.2"),
            (r"^add_embedding\.linear_1", "label_emb.0.0"),
            (r"^add_embedding\.linear_2", "label_emb.0.2"),
            (r"^down_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.", down),
            (
                r"^down_blocks\.(\d+)\.downsamplers\.0\.conv\.",
                lambda m: f"input_blocks.{(int(m[1]) + 1) * (layers + 1)}.0.op.",
            ),
            (r"^mid_block\.resnets\.(\d)\.", lambda m: f"middle_block.{2 * int(m[1])}."),
            (r"^mid_block\.attentions\.0\.", "middle_block.1."),
            (r"^up_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.", up),
            (r"^up_blocks\.(\d+)\.upsamplers\.0\.conv\.", upsample),
            *_resnet("in_layers.0", "in_layers.2", "out_layers.0", "out_layers.3"),
            (r"\.time_emb_proj\.", ".emb_layers.1."),
            (r"\.conv_shortcut\.", ".skip_connection."),
        ],
    )


def _resnet(norm1: str, conv1: str, norm2: str, conv2: str) -> list[tuple[str, str]]:
    """Of a resnet only: transformer blocks have a norm1 and a norm2, too."""
    new = {"norm1": norm1, "conv1": conv1, "norm2": norm2, "conv2": conv2}
    return [(rf"^(?!.*transformer_blocks)(.*)\.{old}\.", rf"\1.{name}.") for old, name in new.items()]


def _vae(vae: Any) -> dict[str, Tensor]:
    last = len(vae.config.block_out_channels) - 1
    renamed = _rename(
        vae.state_dict(),
        [
            (r"\.down_blocks\.(\d)\.resnets\.", r".down.\1.block."),
            (r"\.down_blocks\.(\d)\.downsamplers\.0", r".down.\1.downsample"),
            (r"\.up_blocks\.(\d)\.resnets\.", lambda m: f".up.{last - int(m[1])}.block."),
            (r"\.up_blocks\.(\d)\.upsamplers\.0", lambda m: f".up.{last - int(m[1])}.upsample"),
            (r"\.mid_block\.resnets\.(\d)", lambda m: f".mid.block_{int(m[1]) + 1}"),
            (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
            (r"\.group_norm\.", ".norm."),
            (r"\.to_(q|k|v)\.", r".\1."),
            (r"\.to_out\.0\.", ".proj_out."),
            (r"\.conv_norm_out\.", ".norm_out."),
            (r"\.conv_shortcut\.", ".nin_shortcut."),
        ],
    )
    attention = re.compile(r"\.attn_1\.(q|k|v|proj_out)\.weight$")  # convolutions in the original code
    return {name: value[:, :, None, None] if attention.search(name) else value for name, value in renamed.items()}


def _plain(text_encoder: Any) -> dict[str, Tensor]:
    """Names without text_model., which some versions of transformers have."""
    return {name.removeprefix("text_model."): value for name, value in text_encoder.state_dict().items()}


def _clip(text_encoder: Any, prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}text_model.{name}": value for name, value in _plain(text_encoder).items()}


def _open_clip(text_encoder: Any, prefix: str) -> dict[str, Tensor]:
    state = _plain(text_encoder)
    width = state["final_layer_norm.weight"].shape[0]
    projection = state.pop("text_projection.weight", torch.zeros(width, width))  # SD 2.x has one, unused
    for name in [name for name in state if ".q_proj." in name]:
        joined = torch.cat([state.pop(name.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"])
        state[name.replace(".self_attn.q_proj.", ".attn.in_proj_")] = joined
    renamed = _rename(
        state,
        [
            (r"^embeddings\.position_embedding\.weight$", "positional_embedding"),
            (r"^embeddings\.token_embedding\.", "token_embedding."),
            (r"^final_layer_norm\.", "ln_final."),
            (r"^encoder\.layers\.", "transformer.resblocks."),
            (r"\.layer_norm(\d)\.", r".ln_\1."),
            (r"\.self_attn\.", ".attn."),
            (r"\.fc1\.", ".c_fc."),
            (r"\.fc2\.", ".c_proj."),
        ],
    )
    return {prefix + name: value for name, value in renamed.items()} | {f"{prefix}text_projection": projection.T}
