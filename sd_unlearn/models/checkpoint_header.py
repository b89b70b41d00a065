"""What one weights file holds, told from its names and shapes alone: of a .safetensors file only the header is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sd_unlearn.errors import UsageError

PICKLES = (".ckpt", ".pt", ".pth", ".bin")
SUPPORTED = "Stable Diffusion 1.x, 2.x and XL can be trained"
UNET = "model.diffusion_model."
VAES = ("first_stage_model.", "vae.")
TEXT_ENCODERS = ("cond_stage_model.", "conditioner.embedders.")
# A part of a name -> what a file with it is. The first that fits is told.
FOREIGN = {
    "lora_up.": "a LoRA, not a base model",
    "lora_A.": "a LoRA, not a base model",
    "lora_down.": "a LoRA",
    "control_model.": "a ControlNet",
    "controlnet_": "a ControlNet",
    "motion_modules.": "an AnimateDiff motion module",
    "string_to_param": "a textual inversion",
    "emb_params": "a textual inversion",
    "joint_blocks.": "a Stable Diffusion 3 model",
    "double_blocks.": "a FLUX model or a relative of it",
    "edm_mean": "a Playground 2.5 model, which has an EDM schedule,",
    "edm_vpred.": "a model with an EDM schedule",
    "double_stream_blocks.": "a HiDream model",
    "clip_txt_mapper.": "a Stable Cascade model",
}
# Width of the text that the UNets of the published models see.
TEXT_WIDTHS = {"sd1": 768, "sd2": 1024, "sdxl": 2048}


@dataclass(frozen=True)
class Layout:
    """Names and shapes of a file's tensors, and what its header says beside them."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str] = field(default_factory=dict)

    def under(self, *prefixes: str) -> Iterator[str]:
        """The names that start so."""
        return (name for name in self.shapes if name.startswith(prefixes))

    def ending(self, suffix: str) -> tuple[int, ...]:
        """The shape of the first tensor of the UNet whose name ends so; empty if there is none."""
        return next((self.shapes[name] for name in self.under(UNET) if name.endswith(suffix)), ())

    @property
    def text_width(self) -> int:
        """Width of the text embeddings that the UNet's cross attention takes; 0 without cross attention."""
        return self.ending("attn2.to_k.weight")[1] if self.ending("attn2.to_k.weight") else 0

    @property
    def has_vae(self) -> bool:
        return any(self.under(*VAES))


def check_suffix(path: Path, option: str, allow_pickle: bool) -> None:
    """Refuse a file by its name's ending.

    Raises:
        UsageError: a pickle without --allow_pickle, or neither a pickle nor .safetensors.
    """
    if path.suffix in PICKLES and not allow_pickle:
        raise UsageError(
            f"{option} {path} is a pickle: opening one can run code of whoever made it. Take the .safetensors file of "
            "the same model, or add --allow_pickle if you trust where it is from."
        )
    if path.suffix not in (".safetensors", *PICKLES):
        raise UsageError(f"{option} {path} is no weights file: .safetensors is needed (.ckpt with --allow_pickle).")


def read_layout(path: Path, option: str, allow_pickle: bool = False) -> Layout:
    """The layout of a weights file. A pickle is opened by torch's restricted reader, which takes tensors only.

    Raises:
        UsageError: a pickle without --allow_pickle, another kind of file, a damaged one.
    """
    check_suffix(path, option, allow_pickle)
    if path.suffix in PICKLES:
        return Layout(path, _pickled(path, option))
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            return Layout(path, shapes, file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{option} {path} cannot be read ({error}). Fetch it again.") from None


def _pickled(path: Path, option: str) -> dict[str, tuple[int, ...]]:
    import torch

    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler of an unknown file raises nearly anything
        raise UsageError(
            f"{option} {path} holds more than tensors or is damaged, and is not opened ({str(error).splitlines()[0]}). "
            "Convert it to .safetensors where it is trusted."
        ) from None
    while isinstance(found, Mapping) and "state_dict" in found:
        found = found["state_dict"]
    if not isinstance(found, Mapping):
        raise UsageError(f"{option} {path} holds a {type(found).__name__} instead of named tensors: it is no model.")
    return {name: tuple(value.shape) for name, value in found.items() if isinstance(value, torch.Tensor)}


def kind_of_file(layout: Layout, option: str = "--pretrained_model_name_or_path") -> str:
    """sd1, sd2 or sdxl, by what their UNets differ in at any size: XL alone embeds sizes and a pooled caption
    (label_emb), and SD 1.x alone enters its transformers by convolutions (4-dimensional proj_in).

    Raises:
        UsageError: a file of anything else, named as what it is where that can be told.
    """
    what = _foreign(layout)
    if what:
        raise UsageError(f"{option} {layout.path} is {what}. {SUPPORTED}; name such a checkpoint.")
    if not any(layout.under(*TEXT_ENCODERS)):
        raise UsageError(f"{option} {layout.path} holds a UNet without its text encoder; name the whole checkpoint.")
    if f"{UNET}label_emb.0.0.weight" in layout.shapes:
        return "sdxl"
    return "sd2" if len(layout.ending("proj_in.weight")) == 2 else "sd1"


def _foreign(layout: Layout) -> str:
    """What a file is that is no checkpoint of Stable Diffusion 1.x, 2.x or XL; empty if it is one."""
    for part, what in FOREIGN.items():
        if any(part in name for name in layout.shapes):
            return what
    if not layout.text_width:
        return _part_of_a_model(layout)
    channels = layout.shapes.get(f"{UNET}input_blocks.0.0.weight", (0, 0))[1]
    if channels != 4:
        return {9: "an inpainting model", 8: "an InstructPix2Pix model"}.get(
            channels, f"a model that sees {channels} channels instead of a latent's 4"
        )
    if f"{UNET}label_emb.0.0.weight" in layout.shapes and "conditioner.embedders.1.model.ln_final.weight" not in (
        layout.shapes
    ):
        return "the refiner of Stable Diffusion XL"
    return ""


def _part_of_a_model(layout: Layout) -> str:
    names = layout.shapes
    if any(name.endswith("decoder.conv_in.weight") for name in names):
        return "a VAE alone: that is for --vae"
    if any(name.startswith(("down_blocks.", "text_model.", "embeddings.")) for name in names):
        return "one network of a diffusers folder: name the folder"
    return "no checkpoint of Stable Diffusion"


def prediction_of_file(layout: Layout, kind: str) -> str | None:
    """What a file's model predicts: what its header says, else epsilon, as the published SD 1.x and XL do.

    SD 2.x was published both ways with the same names and shapes: None where the header says nothing.
    """
    said = layout.metadata.get("modelspec.prediction_type", "")
    architecture = layout.metadata.get("modelspec.architecture", "").split("/")[0]
    if "v_pred" in layout.shapes or said in ("v", "v_prediction") or architecture.endswith("-v"):
        return "v_prediction"
    if said == "epsilon" or architecture == "stable-diffusion-v2-512" or kind != "sd2":
        return "epsilon"
    return None


def says_prediction(layout: Layout) -> bool:
    """Whether a file itself says what its model predicts."""
    return prediction_of_file(layout, "sd2") is not None


def check_vae_file(layout: Layout) -> None:
    """Refuse a --vae file that is none.

    Raises:
        UsageError
    """
    if any(name.endswith("decoder.conv_in.weight") for name in layout.shapes):
        return
    raise UsageError(f"--vae {layout.path} holds no VAE (no decoder.conv_in.weight); name a VAE's file or folder.")
