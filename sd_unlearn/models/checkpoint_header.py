"""Recognize a checkpoint file by the names and shapes of its tensors; of .safetensors only the header is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sd_unlearn.errors import UsageError, reason
from sd_unlearn.models.kinds import SUPPORTED

PICKLES = (".ckpt", ".pt", ".pth", ".bin")
UNET = "model.diffusion_model."
VAES = ("first_stage_model.", "vae.")
TEXT_ENCODERS = ("cond_stage_model.", "conditioner.embedders.", "text_encoders.")
REFINER_TEXT_WIDTH = 1280  # of XL's second text encoder alone; the base takes both, 2048
# Kind -> component -> its name in single files, after text_encoders.
FILE_TEXT_ENCODERS = {
    "sd3": {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"},
    "flux": {"text_encoder": "clip_l", "text_encoder_2": "t5xxl"},
}
# Part of a tensor name -> what a file with such a tensor is. The first match is reported.
UNSUPPORTED_TENSORS = {
    "lora_up.": "a LoRA, not a base model",
    "lora_A.": "a LoRA, not a base model",
    "lora_down.": "a LoRA",
    "control_model.": "a ControlNet",
    "controlnet_": "a ControlNet",
    "motion_modules.": "an AnimateDiff motion module",
    "string_to_param": "a textual inversion",
    "emb_params": "a textual inversion",
    ".quant_state.": "quantized to 4 or 8 bits by bitsandbytes (--quantize_base does this on loading)",
    ".qweight": "quantized for Nunchaku",
    "distilled_guidance_layer.": "a Chroma model",
    "individual_token_refiner.": "a HunyuanVideo model",
    "edm_mean": "a Playground 2.5 model, which has an EDM schedule,",
    "edm_vpred.": "a model with an EDM schedule",
    "double_stream_blocks.": "a HiDream model",
    "clip_txt_mapper.": "a Stable Cascade model",
}


@dataclass(frozen=True)
class CheckpointHeader:
    """Names and shapes of a file's tensors, and the metadata of its header."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str] = field(default_factory=dict)

    def under(self, *prefixes: str) -> Iterator[str]:
        """The tensor names with one of these prefixes."""
        return (name for name in self.shapes if name.startswith(prefixes))

    def unet_shape(self, suffix: str) -> tuple[int, ...]:
        """The shape of the UNet's first tensor whose name has this suffix; empty if there is none."""
        return next((self.shapes[name] for name in self.under(UNET) if name.endswith(suffix)), ())

    @property
    def text_width(self) -> int:
        """Width of the text embeddings that the UNet's cross attention takes; 0 without cross attention."""
        shape = self.unet_shape("attn2.to_k.weight")
        return shape[1] if len(shape) == 2 else 0

    @property
    def has_vae(self) -> bool:
        return any(self.under(*VAES))


def check_suffix(path: Path, option: str, allow_pickle: bool) -> None:
    """Refuse a file by its suffix.

    Raises:
        UsageError: a pickle without --allow_pickle, or neither a pickle nor .safetensors.
    """
    if path.suffix.lower() in PICKLES and not allow_pickle:
        raise UsageError(
            f"{option} {path} is a pickle, which can run code when it is opened. Use the .safetensors file of the same "
            "model, or add --allow_pickle if you trust its source."
        )
    if path.suffix.lower() not in (".safetensors", *PICKLES):
        raise UsageError(f"{option} {path} is not a weights file: .safetensors is needed (.ckpt with --allow_pickle).")


def read_checkpoint_header(path: Path, option: str, allow_pickle: bool = False) -> CheckpointHeader:
    """Read the header of a weights file. A pickle is opened with weights_only, which loads tensors only.

    Raises:
        UsageError: a pickle without --allow_pickle, another kind of file, a damaged one.
    """
    check_suffix(path, option, allow_pickle)
    if path.suffix.lower() in PICKLES:
        tensors = _pickled_tensors(path, option)
        return CheckpointHeader(path, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            return CheckpointHeader(path, shapes, file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{option} {path} cannot be read ({reason(error)}). Download it again.") from None


def read_tensors_under(path: Path, prefix: str) -> dict[str, Any]:
    """The tensors of a weights file, whose header was read, with a prefix of their names."""
    if path.suffix.lower() in PICKLES:
        return {name: tensor for name, tensor in _pickled_tensors(path, "").items() if name.startswith(prefix)}
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118


def _pickled_tensors(path: Path, option: str) -> dict[str, Any]:
    import torch

    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises nearly anything for an unknown file
        raise UsageError(
            f"{option} {path} holds more than tensors or is damaged, and was not opened ({reason(error)}). "
            "If you trust it, convert it to .safetensors."
        ) from None
    while isinstance(content, Mapping) and "state_dict" in content:
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise UsageError(f"{option} {path} holds a {type(content).__name__}, not named tensors: it is not a model.")
    return {str(name): value for name, value in content.items() if isinstance(value, torch.Tensor)}


def kind_of_file(header: CheckpointHeader, option: str = "--pretrained_model_name_or_path") -> str:
    """A key of KINDS, by tensors that do not depend on the model's width.

    Transformers have blocks of their own. Of the UNets only XL embeds sizes and a pooled caption (label_emb), and
    only SD 1.x enters its transformers by a convolution (4-dimensional proj_in).

    Raises:
        UsageError: the file is not such a checkpoint; says what it is if that is known.
    """
    fault = _unsupported(header)
    if fault:
        raise UsageError(f"{option} {header.path} is {fault}. {SUPPORTED}; use such a checkpoint.")
    if kind := _transformer_kind(header):
        return kind
    is_xl = f"{UNET}label_emb.0.0.weight" in header.shapes
    missing = "" if any(header.under(*TEXT_ENCODERS)) else "text encoder"
    if is_xl and not missing and "conditioner.embedders.1.model.ln_final.weight" not in header.shapes:
        missing = "second text encoder"
    if missing:
        raise UsageError(f"{option} {header.path} holds a UNet without its {missing}. Use the complete checkpoint.")
    if is_xl:
        return "sdxl"
    return "sd2" if len(header.unet_shape("proj_in.weight")) == 2 else "sd1"


def _unsupported(header: CheckpointHeader) -> str:
    """What a file is if it is not a checkpoint of a supported kind; empty if it is one."""
    for part, what in UNSUPPORTED_TENSORS.items():
        if any(part in name for name in header.shapes):
            return what
    if (kind := _transformer_kind(header)) in ("sd3", "flux"):
        inputs = next((shape[1] for name, shape in header.shapes.items() if name.endswith("img_in.weight")), 64)
        return (
            "" if kind == "sd3" or inputs == 64 else f"a FLUX model that takes {inputs} channels (Fill, Depth, Canny)"
        )
    if not header.text_width:
        return "" if kind else _part_of_a_model(header)
    channels = (*header.shapes.get(f"{UNET}input_blocks.0.0.weight", ()), 0, 0)[1]
    if channels != 4:
        return {9: "an inpainting model", 8: "an InstructPix2Pix model"}.get(
            channels, f"a model that takes {channels} channels instead of a latent's 4"
        )
    is_refiner = f"{UNET}label_emb.0.0.weight" in header.shapes and header.text_width == REFINER_TEXT_WIDTH
    return "the refiner of Stable Diffusion XL" if is_refiner else ""


def _transformer_kind(header: CheckpointHeader) -> str | None:
    """A kind with a transformer, by the names of its blocks; None for other files."""
    if any("joint_blocks.0.x_block.attn.qkv." in name for name in header.shapes):
        return "sd3"
    if any("double_stream_modulation_img.lin." in name for name in header.shapes):
        return "flux2" if any("guidance_in.in_layer." in name for name in header.shapes) else "flux2-klein"
    if any("double_blocks.0.img_attn.norm.query_norm." in name for name in header.shapes):
        return "flux"
    if any("noise_refiner.0.attention.qkv." in n for n in header.shapes) and any(
        "x_pad_token" in n for n in header.shapes
    ):
        return "z-image"
    if any("transformer_blocks.0.img_mod.1." in name for name in header.shapes):
        return "qwen-image"
    return None


def _part_of_a_model(header: CheckpointHeader) -> str:
    names = header.shapes
    if any(name.endswith("decoder.conv_in.weight") for name in names):
        return "only a VAE: use it with --vae"
    networks = ("down_blocks.", "transformer_blocks.", "noise_refiner.", "text_model.", "embeddings.")
    if any(name.startswith(networks) for name in names):
        return "one network of a diffusers folder: use the folder"
    return "not a checkpoint of Stable Diffusion"


def prediction_of_file(header: CheckpointHeader, kind: str) -> str | None:
    """The prediction type of a file's model: what its header says, else epsilon, as for the published SD 1.x and XL.

    SD 2.x was published with both types and the same names and shapes: None if the header does not say.
    """
    stated = header.metadata.get("modelspec.prediction_type", "")
    architecture = header.metadata.get("modelspec.architecture", "").split("/")[0]
    if "v_pred" in header.shapes or stated in ("v", "v_prediction") or architecture.endswith("-v"):
        return "v_prediction"
    if stated == "epsilon" or architecture == "stable-diffusion-v2-512" or kind != "sd2":
        return "epsilon"
    return None


def states_prediction(header: CheckpointHeader) -> bool:
    """Whether the file itself states its prediction type."""
    return prediction_of_file(header, "sd2") is not None


def check_vae_file(header: CheckpointHeader) -> None:
    """Refuse a --vae file that holds no VAE.

    Raises:
        UsageError
    """
    if any(name.endswith("decoder.conv_in.weight") for name in header.shapes):
        return
    raise UsageError(f"--vae {header.path} holds no VAE (no decoder.conv_in.weight). Use a VAE's file or folder.")
