"""A workflow for ComfyUI (its API format) that loads the base and the exported LoRA at the run's strength."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sd_unlearn.export.trained_run import TrainedRun

FILE = "comfyui-workflow.json"
STEPS, GUIDANCE, SIZE = 50, 7.5, 512  # of a run that was not evaluated


def render(run: TrainedRun) -> str:
    """The workflow of a run as JSON: its base, concept and strength, and the sampler of its evaluation."""
    sampler = run.results.sampler if run.results else {}
    name = Path(run.base_name).name
    nodes = make_nodes(
        checkpoint=name if name.endswith((".safetensors", ".ckpt")) else f"{name}.safetensors",
        lora=f"{run.concept.slug}.safetensors",
        prompt=run.concept.caption,
        strength=run.strength,
        size=sampler.get("resolution") or run.base.get("resolution") or SIZE,
        steps=sampler.get("steps", STEPS),
        guidance=sampler.get("guidance_scale", GUIDANCE),
    )
    return json.dumps(nodes, indent=2, ensure_ascii=False) + "\n"


def make_nodes(
    *,
    checkpoint: str,
    lora: str,
    prompt: str,
    strength: float = 1.0,
    size: int = SIZE,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
) -> dict[str, Any]:
    """The nodes by their ids. size: of the image in pixels."""
    model, clip = ["2", 0], ["2", 1]  # with the LoRA
    return {
        "1": _node("CheckpointLoaderSimple", "The base the LoRA was trained on", ckpt_name=checkpoint),
        "2": _node(
            "LoraLoader",
            f"What forgets: strength {strength:g}",
            lora_name=lora,
            strength_model=float(strength),
            strength_clip=float(strength),
            model=["1", 0],
            clip=["1", 1],
        ),
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


def _node(kind: str, title: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs, "_meta": {"title": title}}
