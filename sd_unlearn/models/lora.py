"""The LoRA on the UNet or transformer and, optionally, on the text encoder: attach, save, read."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

from sd_unlearn.config.objective import LoraTargets, Weights
from sd_unlearn.config.train import default_lora_targets
from sd_unlearn.errors import UsageError
from sd_unlearn.io.files import atomic_path, write_json
from sd_unlearn.io.reading import read_json
from sd_unlearn.io.run_folder import ADAPTER_DIR, TEXT_ADAPTER_DIR, WEIGHTS_FILE
from sd_unlearn.models.kinds import KINDS, kind_of
from sd_unlearn.models.lora_file import PEFT_CONFIG, LoraFile, read_lora_file

ADAPTER_NAME = "default"
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
# The same projections of the text tokens in a transformer with joint attention, as SD 3 and FLUX.
CONTEXT = ["add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
# Those of FLUX.2's single blocks, fused with their feed-forward layers.
_FUSED = r"single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
_ATTENTION, _JOINT = (
    f"({'|'.join(re.escape(name) for name in names)})" for names in (ATTENTION, [*ATTENTION, *CONTEXT])
)
# Regular expressions that match whole module names of a UNet.
TARGETS: dict[LoraTargets, str] = {
    "attention": rf".*\.{_ATTENTION}",
    "cross_attention": rf".*\.attn2\.{_ATTENTION}",
    "attention+mlp": rf".*\.({_ATTENTION}|ff\.net\.0\.proj|ff\.net\.2)",
}
# The same of a transformer with joint attention, which has no layers of cross-attention of their own. FLUX's single
# blocks have their feed-forward layers in proj_mlp and proj_out, Z-Image's blocks in w1, w2 and w3.
_MLP = (
    r"(ff|ff_context|img_mlp|txt_mlp)\.(net\.0\.proj|net\.2|linear_in|linear_out)|feed_forward\.w[123]"
    r"|single_transformer_blocks\.\d+\.(proj_mlp|proj_out)"
)
JOINT_TARGETS: dict[LoraTargets, str] = {
    "attention": rf".*\.{_JOINT}|{_FUSED}",
    "attention+mlp": rf".*\.{_JOINT}|{_FUSED}|(.*\.)?({_MLP})",
}
WITHOUT_JOINT_ATTENTION: tuple[LoraTargets, ...] = ("cross_attention", "not_cross_attention")
# ComfyUI has no Diffusers names for these layers of FLUX.2, which see neither image nor caption, and applies a change
# of the modulation of SD 3's last context to the wrong half. So they get no LoRA.
_UNNAMED = r"(double_stream_modulation_(img|txt)|single_stream_modulation|time_guidance_embed)\..*"
TEXT_TARGETS = r".*\.(q_proj|k_proj|v_proj|out_proj)"


def attach(network: nn.Module, options: Weights, target_modules: list[str], seed: int) -> PeftModel:
    """Wrap a network with a new LoRA on the named modules. The up matrix starts at zero, so the output is unchanged."""
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.lora_alpha or options.rank,
        lora_dropout=options.lora_dropout,
        use_dora=options.use_dora,
        target_modules=target_modules,
        init_lora_weights="gaussian",
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not of GPUs, as torch.manual_seed: their dropout must differ
        return PeftModel(network, config, adapter_name=ADAPTER_NAME)


@torch.no_grad()
def attach_factors(network: nn.Module, factors: dict[str, tuple[Tensor, Tensor]]) -> PeftModel:
    """Wrap a network with a LoRA that adds up @ down to each weight.

    factors: module -> (down [rank, in], up [out, rank]), of the same rank everywhere; of a convolution `in` are the
    elements of a patch.
    """
    rank = len(next(iter(factors.values()))[0])
    model = attach(network, Weights(rank=rank), list(factors), seed=0)
    for name, (down, up) in factors.items():
        layer = network.get_submodule(name)
        for weights, factor in ((layer.lora_A, down), (layer.lora_B, up)):
            weight = weights[ADAPTER_NAME].weight  # type: ignore[index,union-attr]
            weight.copy_(factor.reshape(weight.shape))
    return model


def network_targets(network: nn.Module, group: LoraTargets | None) -> list[str]:
    """Names of the modules of a UNet or transformer that a choice of --lora_targets selects.

    group: None for the default of --objective pu.

    Raises:
        UsageError: the network has no such layers.
    """
    is_joint = KINDS[kind_of(network.config)].is_flow  # type: ignore[arg-type]
    group = group or default_lora_targets("pu")
    if is_joint and group in WITHOUT_JOINT_ATTENTION:
        raise UsageError(
            f"--lora_targets {group} needs a base with cross-attention; transformers (SD 3, FLUX, Z-Image, Qwen-Image) "
            "have joint attention. Use attention, attention+mlp or all_linear+conv."
        )
    if group in ("all_linear+conv", "not_cross_attention"):
        layers = [name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        left_out = _left_out(network) if group == "all_linear+conv" else r".*\.attn2\..*"
        return [name for name in layers if not re.fullmatch(left_out, name)]
    return _matching(network, (JOINT_TARGETS if is_joint else TARGETS)[group])


def _left_out(network: nn.Module) -> str:
    """A regular expression of the linear layers that get no LoRA with all_linear+conv."""
    if kind_of(network.config) != "sd3":  # type: ignore[arg-type]
        return _UNNAMED
    last = len(network.transformer_blocks) - 1  # type: ignore[arg-type]
    return rf"transformer_blocks\.{last}\.norm1_context\.linear"


def text_encoder_targets(text_encoder: nn.Module) -> list[str]:
    """Names of the attention projections of a text encoder."""
    return _matching(text_encoder, TEXT_TARGETS)


def _matching(network: nn.Module, pattern: str) -> list[str]:
    return [name for name, _ in network.named_modules() if re.fullmatch(pattern, name)]


def save(model: PeftModel, folder: Path) -> None:
    """Write an adapter folder in PEFT's format, atomically. The same adapter always gives the same bytes."""
    with atomic_path(folder) as temporary:
        model.save_pretrained(str(temporary))
        _sort_targets(temporary / PEFT_CONFIG)
        (temporary / "README.md").unlink(missing_ok=True)  # PEFT's empty card; export writes a real one


def _sort_targets(config: Path) -> None:
    """Sort the names of the trained modules in adapter_config.json: PEFT keeps them in a set, whose order varies."""
    data = read_json(config)
    data["target_modules"] = sorted(data["target_modules"])
    write_json(config, data)


def read_run(run: Path) -> list[LoraFile]:
    """Read and check the adapters of a run folder: the UNet's and, if it was trained, the text encoder's.

    Raises:
        UsageError: the run folder holds no adapter, or a damaged one.
        UnlearnError: a weight is not finite, or the adapter is incomplete.
    """
    folder = run / ADAPTER_DIR
    if not (folder / WEIGHTS_FILE).is_file():
        raise UsageError(f"--run {run} holds no trained LoRA ({folder / WEIGHTS_FILE}). Run sd-unlearn train first.")
    folders = [folder, run / TEXT_ADAPTER_DIR]
    return [read_lora_file(folder / WEIGHTS_FILE, "--run") for folder in folders if folder.is_dir()]
