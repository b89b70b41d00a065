"""Names in files for ComfyUI and A1111, compared with the names that these programs look for, on real architectures."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sgm_unet
import torch
from diffusers import UNet2DConditionModel
from sgm_unet import REAL, real_unet
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sd_unlearn.export import kohya, workflow
from sd_unlearn.export.kohya import Adapter, LoraPair
from sd_unlearn.io.files import write_json
from sd_unlearn.models import ldm_keys, lora
from sd_unlearn.models.lora_file import PeftSettings
from sd_unlearn.models.published import PUBLISHED

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
ARCHITECTURES = {"sd1": sgm_unet.SD1, "sd2": sgm_unet.SD2, "sdxl": sgm_unet.SDXL}


def adapter_of(network: nn.Module, name: str = "unet", targets: list[str] | None = None) -> Adapter:
    """An adapter of rank 2 for modules of a network, with weights on the meta device."""
    found = [n for n, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    pairs = []
    for module in found if targets is None else targets:
        weight = network.get_submodule(module).weight
        down = torch.empty(2, *weight.shape[1:], device="meta")
        up = torch.empty(weight.shape[0], 2, *[1] * (weight.ndim - 2), device="meta")
        named = module if name == "unet" else "text_model." + module.removeprefix("text_model.")
        pairs.append(LoraPair(named, down, up, 1.0))
    return Adapter(pairs, PeftSettings(r=2, lora_alpha=1.0), name)


def comfy_unet_names(kind: str) -> dict[str, tuple[int, ...]]:
    """What ComfyUI's loader looks for -> shape of the weight it changes.

    Every weight of the checkpoint under its own name, and of SD 1/2 and SDXL alike under Diffusers' name, which the
    loader counts out from the architecture.
    """
    sgm = sgm_unet.sgm_modules(**ARCHITECTURES[kind])
    known = {f"lora_unet_{name.replace('.', '_')}": shape for name, shape in sgm.items()}
    resnet = {
        "in_layers.2": "conv1",
        "emb_layers.1": "time_emb_proj",
        "out_layers.3": "conv2",
        "skip_connection": "conv_shortcut",
    }
    fixed = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "input_blocks.0.0": "conv_in",
        "out.2": "conv_out",
    }
    levels = len(ARCHITECTURES[kind]["multiples"])  # type: ignore[arg-type]
    places: dict[str, str] = {
        "middle_block.0": "mid_block.resnets.0",
        "middle_block.1": "mid_block.attentions.0",
        "middle_block.2": "mid_block.resnets.1",
    }
    for block in range(levels):
        for layer in range(2):
            number = 3 * block + 1 + layer
            places[f"input_blocks.{number}.0"] = f"down_blocks.{block}.resnets.{layer}"
            places[f"input_blocks.{number}.1"] = f"down_blocks.{block}.attentions.{layer}"
        places[f"input_blocks.{3 * block + 3}.0.op"] = f"down_blocks.{block}.downsamplers.0.conv"
        for layer in range(3):
            number = 3 * block + layer
            places[f"output_blocks.{number}.0"] = f"up_blocks.{block}.resnets.{layer}"
            places[f"output_blocks.{number}.1"] = f"up_blocks.{block}.attentions.{layer}"
        for slot in (1, 2):
            places[f"output_blocks.{3 * block + 2}.{slot}.conv"] = f"up_blocks.{block}.upsamplers.0.conv"
    for name, shape in sgm.items():
        place = next((p for p in sorted(places, key=len, reverse=True) if f"{name}.".startswith(f"{p}.")), None)
        if name in fixed:
            theirs = fixed[name]
        elif place is None:
            continue
        else:
            inner = name[len(place) + 1 :]
            theirs = ".".join(filter(None, (places[place], resnet.get(inner, inner))))
        known[f"lora_unet_{theirs.replace('.', '_')}"] = shape
    return known


def applied(tensors: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Module key -> shape of the weight that up @ down gives; every tensor must belong to one."""
    keys = {name.split(".")[0] for name in tensors}
    assert {f"{k}.{part}" for k in keys for part in ("alpha", "lora_down.weight", "lora_up.weight")} == tensors.keys()
    up, down = ({k: tensors[f"{k}.lora_{side}.weight"].shape for k in keys} for side in ("up", "down"))
    return {key: (up[key][0], *down[key][1:]) for key in keys}


@pytest.mark.parametrize(("kind", "count"), [("sd1", 282), ("sd2", 282), ("sdxl", 794)])
def test_comfyui_maps_every_key_of_a_unet(kind: str, count: int) -> None:
    adapter = adapter_of(real_unet(kind))
    found, known = applied(kohya.kohya_tensors(adapter, kind)), comfy_unet_names(kind)
    assert len(found) == count
    assert {key: known.get(key) for key in found} == found


def test_an_sdxl_file_has_the_names_of_the_sgm_code() -> None:
    """A1111 knows an SDXL UNet by these only, and takes every one: lora_unet_ stands for diffusion_model_."""
    found = applied(kohya.kohya_tensors(adapter_of(real_unet("sdxl")), "sdxl"))
    modules = {f"lora_unet_{name.replace('.', '_')}" for name in sgm_unet.sgm_modules(**sgm_unet.SDXL)}
    assert found.keys() == modules


@pytest.mark.parametrize("layers", [1, 3])
def test_an_sdxl_of_other_depth_has_the_names_of_the_sgm_code_too(layers: int) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**REAL["sdxl"][1], layers_per_block=layers)
    found = applied(kohya.kohya_tensors(adapter_of(unet), "sdxl", ldm_keys.blocks_of(unet.config)))
    modules = sgm_unet.sgm_modules(**sgm_unet.SDXL, layers=layers)
    assert found == {f"lora_unet_{name.replace('.', '_')}": shape for name, shape in modules.items()}


def a1111_module(key: str) -> str:
    """The part of the sgm UNet that A1111 reads a Diffusers-style key of an SD 1 or SD 2 file as."""
    inner = {
        "conv1": "in_layers_2",
        "conv2": "out_layers_3",
        "time_emb_proj": "emb_layers_1",
        "conv_shortcut": "skip_connection",
    }
    rules = (
        (r"lora_unet_conv_in", lambda m: "input_blocks_0_0"),
        (r"lora_unet_conv_out", lambda m: "out_2"),
        (r"lora_unet_time_embedding_linear_(\d+)", lambda m: f"time_embed_{int(m[1]) * 2 - 2}"),
        (
            r"lora_unet_down_blocks_(\d+)_(attentions|resnets)_(\d+)_(.+)",
            lambda m: (
                f"input_blocks_{1 + int(m[1]) * 3 + int(m[3])}_{int(m[2] == 'attentions')}_{inner.get(m[4], m[4])}"
            ),
        ),
        (
            r"lora_unet_mid_block_(attentions|resnets)_(\d+)_(.+)",
            lambda m: f"middle_block_{1 if m[1] == 'attentions' else int(m[2]) * 2}_{inner.get(m[3], m[3])}",
        ),
        (
            r"lora_unet_up_blocks_(\d+)_(attentions|resnets)_(\d+)_(.+)",
            lambda m: f"output_blocks_{int(m[1]) * 3 + int(m[3])}_{int(m[2] == 'attentions')}_{inner.get(m[4], m[4])}",
        ),
        (r"lora_unet_down_blocks_(\d+)_downsamplers_0_conv", lambda m: f"input_blocks_{3 + int(m[1]) * 3}_0_op"),
        (
            r"lora_unet_up_blocks_(\d+)_upsamplers_0_conv",
            lambda m: f"output_blocks_{2 + int(m[1]) * 3}_{2 if int(m[1]) > 0 else 1}_conv",
        ),
    )
    return next(made(match) for pattern, made in rules if (match := re.fullmatch(pattern, key)))


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_a1111_maps_every_key_of_a_unet(kind: str) -> None:
    found = applied(kohya.kohya_tensors(adapter_of(real_unet(kind)), kind))
    sgm = {k.replace(".", "_"): shape for k, shape in sgm_unet.sgm_modules(**ARCHITECTURES[kind]).items()}
    assert {a1111_module(key): shape for key, shape in found.items()} == sgm


@pytest.mark.parametrize(
    ("kind", "network", "prefix", "layers", "width"),
    [
        ("sd1", "text_encoder", "lora_te", 12, 768),
        ("sd2", "text_encoder", "lora_te", 23, 1024),
        ("sdxl", "text_encoder", "lora_te1", 12, 768),
        ("sdxl", "text_encoder_2", "lora_te2", 32, 1280),
    ],
)
def test_every_key_of_a_text_encoder_is_known(kind: str, network: str, prefix: str, layers: int, width: int) -> None:
    """ComfyUI, A1111 and kohya count out the same names; training takes the attention's four."""
    config = CLIPTextConfig(hidden_size=width, num_hidden_layers=layers, intermediate_size=width, num_attention_heads=8)
    with torch.device("meta"):
        encoder = (CLIPTextModelWithProjection if network == "text_encoder_2" else CLIPTextModel)(config)
    adapter = adapter_of(encoder, network, lora.text_encoder_targets(encoder))
    known = {
        f"{prefix}_text_model_encoder_layers_{layer}_self_attn_{part}_proj"
        for layer in range(layers)
        for part in ("q", "k", "v", "out")
    }
    assert applied(kohya.kohya_tensors(adapter, kind)).keys() == known


# ---- the workflow that comes with the documentation, and the table of what is tested ----

# class -> (inputs that are links, by type; what it gives)
NODES: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    "CheckpointLoaderSimple": ({}, ("MODEL", "CLIP", "VAE")),
    "LoraLoader": ({"model": "MODEL", "clip": "CLIP"}, ("MODEL", "CLIP")),
    "LoraLoaderModelOnly": ({"model": "MODEL"}, ("MODEL",)),
    "UNETLoader": ({}, ("MODEL",)),
    "VAELoader": ({}, ("VAE",)),
    "CLIPLoader": ({}, ("CLIP",)),
    "DualCLIPLoader": ({}, ("CLIP",)),
    "TripleCLIPLoader": ({}, ("CLIP",)),
    "ModelSamplingSD3": ({"model": "MODEL"}, ("MODEL",)),
    "ModelSamplingDiscrete": ({"model": "MODEL"}, ("MODEL",)),
    "ModelSamplingAuraFlow": ({"model": "MODEL"}, ("MODEL",)),
    "FluxGuidance": ({"conditioning": "CONDITIONING"}, ("CONDITIONING",)),
    "EmptySD3LatentImage": ({}, ("LATENT",)),
    "CLIPTextEncode": ({"clip": "CLIP"}, ("CONDITIONING",)),
    "EmptyLatentImage": ({}, ("LATENT",)),
    "KSampler": (
        {"model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING", "latent_image": "LATENT"},
        ("LATENT",),
    ),
    "EmptyFlux2LatentImage": ({}, ("LATENT",)),
    "RandomNoise": ({}, ("NOISE",)),
    "KSamplerSelect": ({}, ("SAMPLER",)),
    "Flux2Scheduler": ({}, ("SIGMAS",)),
    "BasicGuider": ({"model": "MODEL", "conditioning": "CONDITIONING"}, ("GUIDER",)),
    "CFGGuider": ({"model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING"}, ("GUIDER",)),
    "SamplerCustomAdvanced": (
        {"noise": "NOISE", "guider": "GUIDER", "sampler": "SAMPLER", "sigmas": "SIGMAS", "latent_image": "LATENT"},
        ("LATENT", "LATENT"),
    ),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, ("IMAGE",)),
    "SaveImage": ({"images": "IMAGE"}, ()),
}
SETTINGS = {
    "CheckpointLoaderSimple": {"ckpt_name"},
    "LoraLoader": {"lora_name", "strength_model", "strength_clip"},
    "LoraLoaderModelOnly": {"lora_name", "strength_model"},
    "UNETLoader": {"unet_name", "weight_dtype"},
    "VAELoader": {"vae_name"},
    "CLIPLoader": {"clip_name", "type"},
    "DualCLIPLoader": {"clip_name1", "clip_name2", "type"},
    "TripleCLIPLoader": {"clip_name1", "clip_name2", "clip_name3"},
    "ModelSamplingSD3": {"shift"},
    "ModelSamplingDiscrete": {"sampling", "zsnr"},
    "ModelSamplingAuraFlow": {"shift"},
    "FluxGuidance": {"guidance"},
    "EmptySD3LatentImage": {"width", "height", "batch_size"},
    "CLIPTextEncode": {"text"},
    "EmptyLatentImage": {"width", "height", "batch_size"},
    "KSampler": {"seed", "steps", "cfg", "sampler_name", "scheduler", "denoise"},
    "EmptyFlux2LatentImage": {"width", "height", "batch_size"},
    "RandomNoise": {"noise_seed"},
    "KSamplerSelect": {"sampler_name"},
    "Flux2Scheduler": {"steps", "width", "height"},
    "BasicGuider": set(),
    "CFGGuider": {"cfg"},
    "SamplerCustomAdvanced": set(),
    "VAEDecode": set(),
    "SaveImage": {"filename_prefix"},
}


MODEL_NODES = (
    *("KSampler", "CLIPTextEncode", "ModelSamplingSD3", "ModelSamplingDiscrete", "ModelSamplingAuraFlow"),
    *("BasicGuider", "CFGGuider"),
)
OF_A_RUN = {"lora": "a.safetensors", "prompt": "a", "strength": 1.0, "size": 1024, "steps": 28, "guidance": 4.5}


@pytest.mark.parametrize(
    "kind", ["sd1", "sd2, zero SNR", "sd3", "flux", "flux2", "flux2-klein", "z-image", "qwen-image"]
)
def test_the_workflow_is_one_that_comfyui_runs(kind: str) -> None:
    """Every input is there, a link names a node and an output of the right type, and nothing goes past the LoRA."""
    nodes = {
        "sd1": lambda: json.loads((DOCS / "comfyui-workflow.json").read_text(encoding="utf-8")),
        "sd2, zero SNR": lambda: workflow.make_nodes(checkpoint="v.safetensors", zero_terminal_snr=True, **OF_A_RUN),
        "sd3": lambda: workflow.sd3_nodes(checkpoint="sd3.safetensors", **OF_A_RUN),
        "flux": lambda: workflow.flux_nodes(checkpoint="flux.safetensors", **OF_A_RUN),
        "flux2": lambda: workflow.flux2_nodes(checkpoint="flux2.safetensors", **OF_A_RUN),
        "flux2-klein": lambda: workflow.klein_nodes(checkpoint="klein.safetensors", **OF_A_RUN),
        "qwen-image": lambda: workflow.qwen_image_nodes(checkpoint="qwen_image.safetensors", **OF_A_RUN),
        "z-image": lambda: workflow.z_image_nodes(checkpoint="z_image.safetensors", **OF_A_RUN),
    }[kind]()
    for name, node in nodes.items():
        links, _ = NODES[node["class_type"]]
        assert node["inputs"].keys() == links.keys() | SETTINGS[node["class_type"]], name
        for key, kind in links.items():
            source, slot = node["inputs"][key]
            assert NODES[nodes[source]["class_type"]][1][slot] == kind, f"{name}.{key}"
    kinds = [node["class_type"] for node in nodes.values()]
    assert kinds.count("SaveImage") == 1
    behind, waiting = set(), [name for name, node in nodes.items() if node["class_type"] == "SaveImage"]
    while waiting:
        behind.add(name := waiting.pop())
        waiting += [v[0] for v in nodes[name]["inputs"].values() if isinstance(v, list) and v[0] not in behind]
    assert behind == nodes.keys(), "a node that nothing comes of"
    (loader,) = (name for name, node in nodes.items() if node["class_type"].startswith("LoraLoader"))
    strengths = {value for key, value in nodes[loader]["inputs"].items() if key.startswith("strength")}
    assert strengths == {1.0}
    takes_clip = "clip" in nodes[loader]["inputs"]  # LoRAs of SD 3 and FLUX have no text encoder
    for node in nodes.values():
        source = node["inputs"].get("model") or (takes_clip and node["inputs"].get("clip"))
        if source and node["class_type"] in MODEL_NODES:
            assert source[0] == loader or nodes[source[0]]["inputs"]["model"][0] == loader


def test_the_workflow_of_the_documentation_is_made_as_that_of_an_export() -> None:
    written = json.loads((DOCS / "comfyui-workflow.json").read_text(encoding="utf-8"))
    assert written == workflow.make_nodes(
        checkpoint="v1-5-pruned-emaonly.safetensors", lora="brad-pitt.safetensors", prompt="a photo of Brad Pitt"
    )


def test_every_cell_of_the_table_is_a_test() -> None:
    text = (DOCS / "tested.md").read_text(encoding="utf-8").partition("## Exported files")[2]
    table = [line for line in text.splitlines() if line.startswith(("| SD", "| FLUX", "| Z-Image", "| Qwen"))]
    named = [re.findall(r"`(test_\w+)`", line) for line in table]
    assert len(table) >= 18
    assert all(named), "a line without a test"
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    defined = set(re.findall(r"^def (test_\w+)\(", sources, re.MULTILINE))
    assert {name for names in named for name in names} <= defined
    kinds = {line.split("|")[1].strip() for line in table}
    assert kinds == {"SD 1", "SD 2", "SDXL", "SD 3", "FLUX", "FLUX.2", "Z-Image", "Qwen-Image"}


def nodes_of(kind: str, base: str, **sampler: Any) -> dict[str, Any]:
    """The workflow of a run that was trained on this base. sampler: of its evaluation, if it was evaluated."""
    concept = SimpleNamespace(slug="a", caption="a")
    run = SimpleNamespace(base={"name": base, "kind": kind}, base_name=base, kind=kind, concept=concept)
    results = SimpleNamespace(sampler=sampler) if sampler else None
    vars(run).update(results=results, strength=1.0, zero_terminal_snr=False)
    return dict(json.loads(workflow.render(run)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("base", "encoder"),
    [
        ("black-forest-labs/FLUX.2-klein-4B", "qwen_3_4b.safetensors"),
        ("black-forest-labs/FLUX.2-klein-base-9B", "qwen_3_8b.safetensors"),
    ],
)
def test_the_workflow_of_klein_has_the_text_encoder_of_its_size(tmp_path: Path, base: str, encoder: str) -> None:
    assert nodes_of("flux2-klein", base)["9"]["inputs"]["clip_name"] == encoder
    (tmp_path / "transformer").mkdir()
    width = PUBLISHED[f"flux2-klein-{base[-2:].lower()}"]["transformer"]["joint_attention_dim"]
    config = {"_class_name": "Flux2Transformer2DModel", "joint_attention_dim": width, "guidance_embeds": False}
    write_json(tmp_path / "transformer" / "config.json", config)
    assert nodes_of("flux2-klein", str(tmp_path))["9"]["inputs"]["clip_name"] == encoder


@pytest.mark.parametrize(("name", "shift"), [("Z-Image", 6.0), ("Z-Image-Turbo", 3.0)])
def test_the_workflow_of_z_image_has_the_shift_of_its_model(name: str, shift: float) -> None:
    assert nodes_of("z-image", f"Tongyi-MAI/{name}")["11"]["inputs"]["shift"] == shift


def test_the_workflow_does_not_open_a_pickled_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.load", lambda *_, **__: pytest.fail("opened"))
    (tmp_path / "base.ckpt").write_bytes(pickle.dumps({"state_dict": {}}))
    assert nodes_of("sd1", str(tmp_path / "base.ckpt"))["6"]["inputs"]["steps"] == 50


@pytest.mark.parametrize(
    ("kind", "base", "cfg"),
    [
        ("sd1", "stable-diffusion-v1-5/stable-diffusion-v1-5", [1.0, 4.0]),
        ("sd3", "stabilityai/stable-diffusion-3.5-large-turbo", [1.0, 4.0]),
        ("z-image", "Tongyi-MAI/Z-Image-Turbo", [1.0, 5.0]),  # its pipeline adds 1
        ("qwen-image", "Qwen/Qwen-Image", [1.0, 4.0]),
    ],
)
def test_the_workflow_samples_the_prompt_where_guidance_is_off(kind: str, base: str, cfg: list[float]) -> None:
    """With cfg 0, ComfyUI would sample the negative prompt."""
    assert [nodes_of(kind, base, guidance_scale=scale)["6"]["inputs"]["cfg"] for scale in (0.0, 4.0)] == cfg
    if base.lower().endswith("turbo"):
        assert nodes_of(kind, base)["6"]["inputs"]["cfg"] == 1.0  # not evaluated


def test_the_workflow_keeps_the_guidance_that_a_network_takes_as_an_input() -> None:
    for kind in ("flux", "flux2"):
        nodes = nodes_of(kind, "a base", guidance_scale=0.0)
        assert nodes["11"]["inputs"]["guidance"] == 0.0
