"""Exports of runs on SD 3, FLUX and Z-Image: every reader has the trained network, and ComfyUI knows every name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, SD3Transformer2DModel, StableDiffusion3Pipeline
from export_runs import SLUG, exported, read_header, training_record, write_run
from flow_kinds import KIND_OF, FlowKinds
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from sd_unlearn.export import merge
from sd_unlearn.io.run_folder import ADAPTER_DIR, DIFFUSERS_FILE
from sd_unlearn.models import lora
from sd_unlearn.models.base import load_base, network_sha256
from sd_unlearn.models.kinds import KINDS
from sd_unlearn.models.sampling import Sampler, generate_images
from sd_unlearn.models.student import apply_run
from sd_unlearn.models.transformer_keys import diffusers_weights, original_weights

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ("sd35", "flux-dev", "z-image", "flux2-dev", "flux2-klein-base", "qwen-image")
CASES: dict[str, dict[str, Any]] = {
    "alpha is not rank": {"r": 4, "lora_alpha": 1.4},
    "rslora": {"r": 4, "lora_alpha": 1.5, "use_rslora": True},
    "ranks and alphas differ": {
        "r": 4,
        "lora_alpha": 3,
        "rank_pattern": {"to_k": 2},
        "alpha_pattern": {"ff.net.2": 0.7, "to_k": 9},
    },
}
TOLERANCE = 1e-6  # of a weight, in float32


@pytest.fixture(autouse=True)
def _any_base_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Load the base with Diffusers' own loader."""

    def load(run: Any, allow_pickle: bool = False, name: str | None = None) -> Any:
        return open_pipeline(Path(run.base["name"]))

    monkeypatch.setattr(merge, "trained_base", load)


def open_pipeline(folder: Path) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    if hasattr(pipeline, "text_encoder_3"):
        nn.init.eye_(pipeline.text_encoder.text_projection.weight)  # as in the published model
    return pipeline


def trained_run(base: Path, run: Path, kind: str, **settings: Any) -> dict[str, Tensor]:
    """A run with a LoRA on the default layers, up weights not zero; returns the trained weights of the transformer."""
    transformer = getattr(diffusers, KINDS[kind].network_class).from_pretrained(base, subfolder="transformer")
    record = training_record(
        settings["r"],
        settings["lora_alpha"],
        name=str(base),
        kind=kind,
        sha256=network_sha256(transformer),
        prediction_type="flow",
    )
    write_run(run, record)
    torch.manual_seed(1)
    config = LoraConfig(
        target_modules=lora.network_targets(transformer, None), init_lora_weights="gaussian", **settings
    )
    model = PeftModel(transformer, config, adapter_name=lora.ADAPTER_NAME)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))
            if "magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
    lora.save(model, run / ADAPTER_DIR)
    return {name: value.clone() for name, value in model.merge_and_unload().state_dict().items()}


def comfy_names(kind: str, transformer: Any) -> dict[str, tuple[str, int]]:
    """What ComfyUI looks for: a name in the LoRA -> the original weight and its first row.

    Written from the rules of its tables (mmdit_to_diffusers, flux_to_diffusers, z_image_to_diffusers), independently of
    transformer_keys.
    """
    if kind == "z-image":
        return z_image_names(transformer)
    if kind == "qwen-image":  # the same names
        modules = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
        return {f"transformer.{name}": (name, 0) for name in modules}
    width, found = transformer.inner_dim, {}
    first, x, context = ("joint_blocks", "x_block.", "context_block.")
    rest = {
        "attn.to_out.0": "x_block.attn.proj",
        "attn.to_add_out": "context_block.attn.proj",
        "attn2.to_out.0": "x_block.attn2.proj",
        "norm1.linear": "x_block.adaLN_modulation.1",
        "norm1_context.linear": "context_block.adaLN_modulation.1",
        "ff.net.0.proj": "x_block.mlp.fc1",
        "ff.net.2": "x_block.mlp.fc2",
        "ff_context.net.0.proj": "context_block.mlp.fc1",
        "ff_context.net.2": "context_block.mlp.fc2",
    }
    embedder = "time_text_embed"
    outside = {
        "pos_embed.proj": "x_embedder.proj",
        "context_embedder": "context_embedder",
        **{f"{embedder}.timestep_embedder.linear_{n}": f"t_embedder.mlp.{2 * n - 2}" for n in (1, 2)},
        **{f"{embedder}.text_embedder.linear_{n}": f"y_embedder.mlp.{2 * n - 2}" for n in (1, 2)},
    }
    if kind.startswith("flux"):
        first, x, context = ("double_blocks", "img_", "txt_")
        rest = {
            "attn.to_out.0": "img_attn.proj",
            "attn.to_add_out": "txt_attn.proj",
            "norm1.linear": "img_mod.lin",
            "norm1_context.linear": "txt_mod.lin",
            "ff.net.0.proj": "img_mlp.0",
            "ff.net.2": "img_mlp.2",
            "ff_context.net.0.proj": "txt_mlp.0",
            "ff_context.net.2": "txt_mlp.2",
            "ff.linear_in": "img_mlp.0",
            "ff.linear_out": "img_mlp.2",
            "ff_context.linear_in": "txt_mlp.0",
            "ff_context.linear_out": "txt_mlp.2",
        }
        outside = {"x_embedder": "img_in", "context_embedder": "txt_in"}
        for ours, theirs in (("timestep", "time_in"), ("text", "vector_in"), ("guidance", "guidance_in")):
            outside[f"{embedder}.{ours}_embedder.linear_1"] = f"{theirs}.in_layer"
            outside[f"{embedder}.{ours}_embedder.linear_2"] = f"{theirs}.out_layer"
    outside |= {"proj_out": "final_layer.linear", "norm_out.linear": EXCHANGED}
    found |= {f"transformer.{name}": (other, 0) for name, other in outside.items()}
    for number in range(len(transformer.transformer_blocks)):
        ours, theirs = f"transformer.transformer_blocks.{number}.", f"{first}.{number}."
        for place, part in enumerate("qkv"):
            found[f"{ours}attn.to_{part}"] = f"{theirs}{x}attn.qkv", place * width
            found[f"{ours}attn2.to_{part}"] = f"{theirs}{x}attn2.qkv", place * width
            found[f"{ours}attn.add_{part}_proj"] = f"{theirs}{context}attn.qkv", place * width
        found |= {ours + name: (theirs + other, 0) for name, other in rest.items()}
    for number in range(len(getattr(transformer, "single_transformer_blocks", []))):
        ours, theirs = f"transformer.single_transformer_blocks.{number}.", f"single_blocks.{number}."
        for place, name in enumerate(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")):
            found[ours + name] = f"{theirs}linear1", place * width
        found |= {f"{ours}attn.to_qkv_mlp_proj": (f"{theirs}linear1", 0), f"{ours}attn.to_out": (f"{theirs}linear2", 0)}
        found[f"{ours}proj_out"], found[f"{ours}norm.linear"] = (f"{theirs}linear2", 0), (f"{theirs}modulation.lin", 0)
    return found


def z_image_names(transformer: Any) -> dict[str, tuple[str, int]]:
    """Of Z-Image: the names are the same but for the attention, the first layer and the last."""
    lists = ("layers", "noise_refiner", "context_refiner")
    blocks = [f"{name}.{n}." for name in lists for n in range(len(getattr(transformer, name)))]
    found: dict[str, tuple[str, int]] = {"transformer.all_x_embedder.2-1": ("x_embedder", 0)}
    for name in ("linear", "adaLN_modulation.1"):
        found[f"transformer.all_final_layer.2-1.{name}"] = f"final_layer.{name}", 0
    for name in ("t_embedder.mlp.0", "t_embedder.mlp.2", "cap_embedder.1"):
        found[f"transformer.{name}"] = name, 0
    for block in blocks:
        for place, part in enumerate("qkv"):
            found[f"transformer.{block}attention.to_{part}"] = f"{block}attention.qkv", place * transformer.dim
        found[f"transformer.{block}attention.to_out.0"] = f"{block}attention.out", 0
        for same in ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "adaLN_modulation.0"):
            found[f"transformer.{block}{same}"] = f"{block}{same}", 0
    return found


EXCHANGED = "final_layer.adaLN_modulation.1"  # ComfyUI exchanges the halves of a change of norm_out.linear


def comfy_reads(kind: str, transformer: Any, file: Path, strength: float) -> dict[str, Tensor]:
    """An independent reader: the weights in the original layout, W[rows] + strength * B @ A."""
    weights = {name: value.clone() for name, value in original_weights(kind, transformer.state_dict()).items()}
    tensors, names = load_file(file), comfy_names(kind, transformer)
    assert not [key for key in tensors if not key.endswith((".lora_A.weight", ".lora_B.weight"))], "no alpha"
    for key in {key.split(".lora_")[0] for key in tensors}:
        name, row = names[key]
        up, down = (tensors[f"{key}.lora_{letter}.weight"] for letter in "BA")
        change = (strength * up.flatten(1) @ down.flatten(1)).unflatten(1, down.shape[1:])
        if key == "transformer.norm_out.linear" and name == EXCHANGED:
            change = torch.cat(change.chunk(2)[::-1])
        weights[f"{name}.weight"][row : row + len(change)] += change
    return weights


def mixed(base: dict[str, Tensor], trained: dict[str, Tensor], strength: float) -> dict[str, Tensor]:
    return {name: torch.lerp(value, trained[name], strength) for name, value in base.items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], what: object = "") -> None:
    """what: which of several weights these are, for the message."""
    assert a.keys() == b.keys(), what
    for name, value in a.items():
        assert torch.allclose(value, b[name], atol=TOLERANCE), (what, name)


def with_lora(base: Path, file: Path, strength: float) -> dict[str, Tensor]:
    """What Diffusers makes of the transformer: its own loader, and the weights that it fuses."""
    pipeline = open_pipeline(base)
    pipeline.load_lora_weights(file, adapter_name="it")
    pipeline.fuse_lora(components=["transformer"], lora_scale=strength)
    pipeline.unload_lora_weights()
    return dict(pipeline.transformer.state_dict())


def merged(run: Path, kind: str, base: Path, place: Path, strength: float) -> Iterator[tuple[str, dict[str, Tensor]]]:
    exported(run, merge=place / f"{strength}", strength=strength)
    yield "folder", dict(open_pipeline(place / f"{strength}").transformer.state_dict())
    file = place / f"{strength}.safetensors"
    exported(run, merge=file, strength=strength)
    if kind == "sd3":
        config = str(base / "transformer")
        yield "file", dict(SD3Transformer2DModel.from_single_file(str(file), config=config).state_dict())
    else:  # Diffusers' converter knows the real width only; test_transformer_keys.py compares it with this one
        shapes = {n: tuple(v.shape) for n, v in open_pipeline(base).transformer.state_dict().items()}
        yield "file", diffusers_weights(kind, shapes, load_file(file))


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("name", NAMES)
def test_all_readers_have_the_trained_weights(flow_kinds: FlowKinds, tmp_path: Path, name: str, case: str) -> None:
    kind, base, run = KIND_OF[name], flow_kinds.folder(name), tmp_path / "run"
    trained = trained_run(base, run, kind, **CASES[case])
    for_diffusers, for_comfy = exported(run)
    transformer = open_pipeline(base).transformer
    untouched = {name: value.clone() for name, value in transformer.state_dict().items()}
    for strength in (0.5, 1.0):
        want = mixed(untouched, trained, strength)
        assert max((want[key] - value).abs().max() for key, value in untouched.items()) > 100 * TOLERANCE
        for file in (for_diffusers, for_comfy):
            assert_same(with_lora(base, file, strength), want)
            assert_same(comfy_reads(kind, transformer, file, strength), original_weights(kind, want))
    for strength in (0.5, 1.0) if case == "alpha is not rank" else ():
        for what, weights in merged(run, kind, base, tmp_path, strength):
            assert_same(weights, mixed(untouched, trained, strength), what)


@pytest.mark.parametrize("name", NAMES)
def test_all_layers_but_those_that_comfyui_cannot_change_get_a_lora(flow_kinds: FlowKinds, name: str) -> None:
    transformer = open_pipeline(flow_kinds.folder(name)).transformer
    names, targets = comfy_names(KIND_OF[name], transformer), lora.network_targets(transformer, None)
    layers = {n for n, m in transformer.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    assert {f"transformer.{module}" for module in targets} <= set(names)
    last = f"transformer_blocks.{len(getattr(transformer, 'transformer_blocks', [])) - 1}.norm1_context.linear"
    shared = {n for n in layers if "_stream_modulation" in n or n.startswith("time_guidance_embed.")}
    assert layers - set(targets) == {"sd35": {last}, "flux2-dev": shared, "flux2-klein-base": shared}.get(name, set())


@pytest.mark.parametrize("name", NAMES)
def test_the_image_with_the_file_in_plain_diffusers_is_ours(flow_kinds: FlowKinds, tmp_path: Path, name: str) -> None:
    base, run = flow_kinds.folder(name), tmp_path / "run"
    trained_run(base, run, KIND_OF[name], r=4, lora_alpha=1.4)
    plain, ours = DiffusionPipeline.from_pretrained(base), load_base(str(base), device="cpu")
    ours.own_resolution = 64  # Qwen-Image's configuration has none
    untouched = np.asarray(generate_images(ours, ["seven"], [3], Sampler(2, 3.0, 1))[0]).astype(int)
    with apply_run(ours, run):
        wanted = np.asarray(generate_images(ours, ["seven"], [3], Sampler(2, 3.0, 1))[0]).astype(int)
    plain.load_lora_weights(exported(run)[1])
    given: dict[str, Any] = {"num_inference_steps": 2, "height": 64, "width": 64}
    given |= ours.conditioning.options(plain) | ours.conditioning.guidance(3.0, {"prompt": ["seven"]})
    image = plain(prompt=["seven"], generator=torch.Generator().manual_seed(3), **given).images[0]
    assert np.abs(np.asarray(image).astype(int) - wanted).max() <= 1
    assert np.abs(untouched - wanted).max() > 1


@pytest.mark.parametrize("name", NAMES)
def test_a_dora_is_read_by_diffusers_and_as_whole_changes(flow_kinds: FlowKinds, tmp_path: Path, name: str) -> None:
    kind, base, run = KIND_OF[name], flow_kinds.folder(name), tmp_path / "run"
    trained = trained_run(base, run, kind, r=4, lora_alpha=1.4, use_dora=True)
    for_diffusers, for_comfy = exported(run)
    untouched = open_pipeline(base).transformer.state_dict()
    assert_same(with_lora(base, for_diffusers, 1.0), trained)
    for key, change in load_file(for_comfy).items():
        weight = f"{key.removeprefix('transformer.').removesuffix('.diff')}.weight"
        assert torch.allclose(untouched[weight] + change, trained[weight], atol=TOLERANCE), key


def test_a_merged_file_of_sd3_holds_vae_and_text_encoders(flow_kinds: FlowKinds, tmp_path: Path) -> None:
    base, run, file = flow_kinds.folder("sd35"), tmp_path / "run", tmp_path / "a.safetensors"
    trained_run(base, run, "sd3", r=4, lora_alpha=1.4)
    exported(run, merge=file, dtype="fp16")
    tensors, pipeline = load_file(file), open_pipeline(base)
    assert {value.dtype for value in tensors.values()} == {torch.float16}
    names = {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"}
    for component, name in names.items():
        prefix = f"text_encoders.{name}.transformer."
        own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        state = getattr(pipeline, component).state_dict()
        left_out = set(state) - set(own)
        assert left_out <= {"text_projection.weight", "encoder.embed_tokens.weight"}
        assert all(torch.allclose(value.float(), state[key], atol=1e-3) for key, value in own.items())
    assert "first_stage_model.decoder.up.0.block.0.conv1.weight" in tensors
    assert "model.diffusion_model.joint_blocks.0.x_block.attn2.qkv.weight" in tensors
    read = StableDiffusion3Pipeline.from_single_file(str(file), config=str(base), local_files_only=True)
    for component in (*names, "vae"):
        state = getattr(read, component).state_dict()
        for key, value in getattr(pipeline, component).state_dict().items():
            assert torch.allclose(state[key].float(), value, atol=1e-3), f"{component} {key}"
    header = read_header(file)
    assert header["modelspec.architecture"] == "stable-diffusion-3"
    assert "modelspec.prediction_type" not in header, "ModelSpec defines none for flow matching"


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("sd35", "stable-diffusion-3"),
        ("flux-dev", "flux-1"),
        ("z-image", "Z-Image"),
        ("flux2-dev", "Flux.2-dev"),
        ("qwen-image", "Qwen-Image"),
    ],
)
def test_headers_card_and_workflow_are_those_of_the_kind(
    flow_kinds: FlowKinds, tmp_path: Path, name: str, architecture: str
) -> None:
    kind, run = KIND_OF[name], tmp_path / "run"
    trained_run(flow_kinds.folder(name), run, kind, r=4, lora_alpha=1.4)
    _, file = exported(run)
    header = read_header(file)
    assert header["modelspec.architecture"] == f"{architecture}/lora"
    assert (
        header["ss_base_model_version"]
        == {"sd3": "sd3", "flux": "flux1", "z-image": "zimage", "flux2": "flux2", "qwen-image": "qwen_image"}[kind]
    )
    assert "lora_adapter_metadata" not in read_header(run / "export" / DIFFUSERS_FILE), "the scale is in the weights"
    card = (run / "export" / "README.md").read_text()
    assert KINDS[kind].pipeline in card
    assert "A1111" not in card
    nodes = json.loads((run / "export" / "comfyui-workflow.json").read_text())
    assert nodes["2"]["class_type"] == "LoraLoaderModelOnly"
    assert nodes["2"]["inputs"]["lora_name"] == f"{SLUG}.safetensors"
    links = [value for node in nodes.values() for value in node["inputs"].values() if isinstance(value, list)]
    assert {node for node, _ in links} <= nodes.keys()
