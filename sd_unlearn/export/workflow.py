"""A workflow for ComfyUI (its API format) that loads the base and the exported LoRA at the run's strength."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sd_unlearn.export.trained_run import TrainedRun
from sd_unlearn.models.kinds import KINDS
from sd_unlearn.models.recorded_base import recorded_source
from sd_unlearn.models.sampling import Z_IMAGE_TURBO_SAMPLER, default_sampler, known_network
from sd_unlearn.models.source import Source

FILE = "comfyui-workflow.json"
STEPS, GUIDANCE, SIZE = 50, 7.5, 512
KLEIN_4B_ENCODER, KLEIN_9B_ENCODER = "qwen_3_4b.safetensors", "qwen_3_8b.safetensors"


def render(run: TrainedRun) -> str:
    """The workflow of a run as JSON: its base, concept and strength, and the sampler of its evaluation or its base."""
    source, kind = recorded_source(run.base), KINDS[run.kind]
    sampler, usual = run.results.sampler if run.results else {}, default_sampler(source)
    guidance = sampler.get("guidance_scale", usual.guidance_scale)
    name = Path(run.base_name).name
    zero_snr = {"zero_terminal_snr": True} if run.zero_terminal_snr else {}  # only UNets can have it
    own: dict[str, Any] = {}
    if run.kind == "flux2-klein":
        own["text_encoder"] = KLEIN_9B_ENCODER if _is_9b(source) else KLEIN_4B_ENCODER
    elif run.kind == "z-image":
        own["shift"] = 3.0 if usual == Z_IMAGE_TURBO_SAMPLER else 6.0
    make = {
        "sd3": sd3_nodes,
        "flux": flux_nodes,
        "flux2": flux2_nodes,
        "flux2-klein": klein_nodes,
        "z-image": z_image_nodes,
        "qwen-image": qwen_image_nodes,
    }.get(run.kind, make_nodes)
    nodes = make(
        checkpoint=name if name.endswith((".safetensors", ".ckpt")) else f"{name}.safetensors",
        lora=f"{run.concept.slug}.safetensors",
        prompt=run.concept.caption,
        strength=run.strength,
        size=sampler.get("resolution") or run.base.get("resolution") or SIZE,
        steps=sampler.get("steps", usual.steps),
        guidance=kind.guidance_of(guidance) if kind.uses_guidance else guidance,  # else the network takes the value
        **zero_snr,
        **own,
    )
    return json.dumps(nodes, indent=2, ensure_ascii=False) + "\n"


def _is_9b(source: Source) -> bool:
    """Whether FLUX.2 klein is the model with 9 billion parameters: by its local configuration, else its name."""
    _, network = known_network(source)
    return network["joint_attention_dim"] > 7680 if network else "9b" in source.name.lower()


def make_nodes(
    *,
    checkpoint: str,
    lora: str,
    prompt: str,
    strength: float = 1.0,
    size: int = SIZE,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    zero_terminal_snr: bool = False,
) -> dict[str, Any]:
    """The nodes by their ids. size: of the image in pixels."""
    model, clip = ["2", 0], ["2", 1]  # with the LoRA
    schedule = {}
    if zero_terminal_snr:
        title, sampling = "Zero terminal SNR", {"sampling": "v_prediction", "zsnr": True}
        schedule["9"] = _node("ModelSamplingDiscrete", title, **sampling, model=model)
        model = ["9", 0]
    return {
        "1": _node("CheckpointLoaderSimple", "The base the LoRA was trained on", ckpt_name=checkpoint),
        "2": _node(
            "LoraLoader",
            f"LoRA, strength {strength:g}",
            lora_name=lora,
            strength_model=float(strength),
            strength_clip=float(strength),
            model=["1", 0],
            clip=["1", 1],
        ),
        **schedule,
        "3": _node("CLIPTextEncode", "Prompt", text=prompt, clip=clip),
        "4": _node("CLIPTextEncode", "Negative prompt", text="", clip=clip),
        "5": _node("EmptyLatentImage", "Size: 512, SD 2 (v) 768, SDXL 1024", width=size, height=size, batch_size=1),
        "6": _node(
            "KSampler",
            "The sampler of the evaluation",
            seed=0,
            steps=steps,
            cfg=guidance,
            sampler_name="ddim",
            scheduler="ddim_uniform",
            denoise=1.0,
            model=model,
            positive=["3", 0],
            negative=["4", 0],
            latent_image=["5", 0],
        ),
        "7": _node("VAEDecode", "Decode", samples=["6", 0], vae=["1", 2]),
        "8": _node("SaveImage", "Save", filename_prefix="forgotten", images=["7", 0]),
    }


def sd3_nodes(
    *, checkpoint: str, lora: str, prompt: str, strength: float, size: int, steps: int, guidance: float
) -> dict[str, Any]:
    """As `make_nodes`, for Stable Diffusion 3 and 3.5. Their files hold no text encoders."""
    encoders = {"clip_name1": "clip_g.safetensors", "clip_name2": "clip_l.safetensors"}
    return {
        "1": _node("CheckpointLoaderSimple", "The base the LoRA was trained on", ckpt_name=checkpoint),
        "2": _lora(lora, strength, ["1", 0]),
        "9": _node("TripleCLIPLoader", "Text encoders", **encoders, clip_name3="t5xxl_fp16.safetensors"),
        "10": _node("ModelSamplingSD3", "Shift of the noise levels", shift=3.0, model=["2", 0]),
        "3": _node("CLIPTextEncode", "Prompt", text=prompt, clip=["9", 0]),
        "4": _node("CLIPTextEncode", "Negative prompt", text="", clip=["9", 0]),
        **_euler(["10", 0], ["3", 0], size, steps, guidance, "sgm_uniform"),
        "7": _node("VAEDecode", "Decode", samples=["6", 0], vae=["1", 2]),
        "8": _node("SaveImage", "Save", filename_prefix="forgotten", images=["7", 0]),
    }


def flux_nodes(
    *, checkpoint: str, lora: str, prompt: str, strength: float, size: int, steps: int, guidance: float
) -> dict[str, Any]:
    """As `make_nodes`, for FLUX.1, of which each network is a file. guidance: the embedded one; dev uses it."""
    encoders = {"clip_name1": "t5xxl_fp16.safetensors", "clip_name2": "clip_l.safetensors", "type": "flux"}
    return {
        "1": _node("UNETLoader", "The base the LoRA was trained on", unet_name=checkpoint, weight_dtype="default"),
        "2": _lora(lora, strength, ["1", 0]),
        "9": _node("DualCLIPLoader", "Text encoders", **encoders),
        "10": _node("VAELoader", "VAE", vae_name="ae.safetensors"),
        "3": _node("CLIPTextEncode", "Prompt", text=prompt, clip=["9", 0]),
        "11": _node("FluxGuidance", "Guidance", guidance=guidance, conditioning=["3", 0]),
        "4": _node("CLIPTextEncode", "Not used", text="", clip=["9", 0]),
        **_euler(["2", 0], ["11", 0], size, steps, 1.0, "simple"),
        "7": _node("VAEDecode", "Decode", samples=["6", 0], vae=["10", 0]),
        "8": _node("SaveImage", "Save", filename_prefix="forgotten", images=["7", 0]),
    }


def flux2_nodes(*, guidance: float, **run: Any) -> dict[str, Any]:
    """As `make_nodes`, for FLUX.2 dev, of which each network is a file. guidance: the embedded one."""
    return {
        **_flux2("mistral_3_small_flux2_bf16.safetensors", **run),
        "11": _node("FluxGuidance", "Guidance", guidance=guidance, conditioning=["3", 0]),
        "12": _node("BasicGuider", "Without a negative prompt", model=["2", 0], conditioning=["11", 0]),
    }


def klein_nodes(*, guidance: float, text_encoder: str = KLEIN_4B_ENCODER, **run: Any) -> dict[str, Any]:
    """As `make_nodes`, for FLUX.2 klein, of which each network is a file. guidance: 1 for a distilled one."""
    return {
        **_flux2(text_encoder, **run),
        "4": _node("CLIPTextEncode", "Negative prompt", text="", clip=["9", 0]),
        "12": _node("CFGGuider", "Guidance", cfg=guidance, model=["2", 0], positive=["3", 0], negative=["4", 0]),
    }


def _flux2(
    text_encoder: str, *, checkpoint: str, lora: str, prompt: str, strength: float, size: int, steps: int
) -> dict[str, Any]:
    """What the workflows of FLUX.2 have in common. Node 12 is the guider."""
    return {
        "1": _node("UNETLoader", "The base the LoRA was trained on", unet_name=checkpoint, weight_dtype="default"),
        "2": _lora(lora, strength, ["1", 0]),
        "9": _node("CLIPLoader", "Text encoder", clip_name=text_encoder, type="flux2"),
        "10": _node("VAELoader", "VAE", vae_name="flux2-vae.safetensors"),
        "3": _node("CLIPTextEncode", "Prompt", text=prompt, clip=["9", 0]),
        "5": _node("EmptyFlux2LatentImage", "Size", width=size, height=size, batch_size=1),
        "13": _node("RandomNoise", "Seed", noise_seed=0),
        "14": _node("KSamplerSelect", "The sampler of the evaluation", sampler_name="euler"),
        "15": _node("Flux2Scheduler", "Steps", steps=steps, width=size, height=size),
        "6": _node(
            "SamplerCustomAdvanced",
            "Sample",
            noise=["13", 0],
            guider=["12", 0],
            sampler=["14", 0],
            sigmas=["15", 0],
            latent_image=["5", 0],
        ),
        "7": _node("VAEDecode", "Decode", samples=["6", 0], vae=["10", 0]),
        "8": _node("SaveImage", "Save", filename_prefix="forgotten", images=["7", 0]),
    }


def z_image_nodes(*, shift: float = 6.0, **run: Any) -> dict[str, Any]:
    """As `make_nodes`, for Z-Image, of which each network is a file. guidance: 1 for Turbo, whose shift is 3."""
    return _shifted(("qwen_3_4b.safetensors", "lumina2"), "ae.safetensors", "Shift: 6, Turbo 3", shift, **run)


def qwen_image_nodes(**run: Any) -> dict[str, Any]:
    """As `make_nodes`, for Qwen-Image, of which each network is a file."""
    encoder = ("qwen_2.5_vl_7b_fp8_scaled.safetensors", "qwen_image")
    return _shifted(encoder, "qwen_image_vae.safetensors", "Shift", 3.1, **run)


def _shifted(
    encoder: tuple[str, str],
    vae: str,
    title: str,
    shift: float,
    *,
    checkpoint: str,
    lora: str,
    prompt: str,
    strength: float,
    size: int,
    steps: int,
    guidance: float,
) -> dict[str, Any]:
    """A workflow with a file for each network and a shift of the noise levels. encoder: its file and type."""
    return {
        "1": _node("UNETLoader", "The base the LoRA was trained on", unet_name=checkpoint, weight_dtype="default"),
        "2": _lora(lora, strength, ["1", 0]),
        "9": _node("CLIPLoader", "Text encoder", clip_name=encoder[0], type=encoder[1]),
        "10": _node("VAELoader", "VAE", vae_name=vae),
        "11": _node("ModelSamplingAuraFlow", title, shift=shift, model=["2", 0]),
        "3": _node("CLIPTextEncode", "Prompt", text=prompt, clip=["9", 0]),
        "4": _node("CLIPTextEncode", "Negative prompt", text="", clip=["9", 0]),
        **_euler(["11", 0], ["3", 0], size, steps, guidance, "simple"),
        "7": _node("VAEDecode", "Decode", samples=["6", 0], vae=["10", 0]),
        "8": _node("SaveImage", "Save", filename_prefix="forgotten", images=["7", 0]),
    }


def _lora(name: str, strength: float, model: list[Any]) -> dict[str, Any]:
    title = f"LoRA, strength {strength:g}"
    return _node("LoraLoaderModelOnly", title, lora_name=name, strength_model=float(strength), model=model)


def _euler(
    model: list[Any], positive: list[Any], size: int, steps: int, guidance: float, scheduler: str
) -> dict[str, Any]:
    """The sampler of flow-matching models and its empty latents; the negative prompt is node 4."""
    return {
        "5": _node("EmptySD3LatentImage", "Size", width=size, height=size, batch_size=1),
        "6": _node(
            "KSampler",
            "The sampler of the evaluation",
            seed=0,
            steps=steps,
            cfg=guidance,
            sampler_name="euler",
            scheduler=scheduler,
            denoise=1.0,
            model=model,
            positive=positive,
            negative=["4", 0],
            latent_image=["5", 0],
        ),
    }


def _node(kind: str, title: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs, "_meta": {"title": title}}
