"""Run folders for the tests of export, and a reader of the exported headers."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from sd_unlearn.config.base import ExportConfig
from sd_unlearn.data.concept import Concept
from sd_unlearn.data.find_concept import read_concept
from sd_unlearn.data.several import write_concepts
from sd_unlearn.export import export
from sd_unlearn.io.files import write_json

SLUG = "brad-pitt"
MODULES = ("mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0", "up_blocks.1.resnets.0.conv1")


def training_record(rank: int, alpha: float, **base: Any) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "concept": SLUG,
        "base": {"name": "tiny", "kind": "sd1", "sha256": "ab" * 32, "prediction_type": "epsilon", "resolution": 16}
        | base,
        "rank": rank,
        "lora_alpha": alpha,
        "beta": 0.25,
        "beta_source": "manifest",
        "correction": "abs",
        "caption_mode": "both",
        "config_sha256": "cd" * 32,
        "version": "0.1.0",
    }


def write_run(run: Path, training: dict[str, Any]) -> Path:
    run.mkdir(parents=True, exist_ok=True)
    concept = Concept(name="Brad Pitt", caption="a photo of Brad Pitt", generic="a photo of a man")
    write_concepts(run / "concept.yaml", concept)
    write_json(run / "training.json", training)
    return run


def exported(run: Path, **options: Any) -> tuple[Path, Path]:
    diffusers_file, kohya_file, *_ = export.run(ExportConfig(run=run, **options))
    return diffusers_file, kohya_file


def hand_run(run: Path, *, training: dict[str, Any] | None = None, drop: str = "", **settings: Any) -> Path:
    """A run of rank 2 and alpha 3 with a linear and a convolution; `tensors` adds weights, `drop` removes some."""
    rng = torch.Generator().manual_seed(0)
    linear, conv = MODULES
    shapes = {
        f"{linear}.lora_A": (2, 6),
        f"{linear}.lora_B": (5, 2),
        f"{conv}.lora_A": (2, 3, 3, 3),
        f"{conv}.lora_B": (4, 2, 1, 1),
    }
    tensors = {f"base_model.model.{key}.weight": torch.randn(shape, generator=rng) for key, shape in shapes.items()}
    tensors |= settings.pop("tensors", {})
    tensors = {key: value for key, value in tensors.items() if not drop or drop not in key}
    write_run(run, training or training_record(2, 3.0))
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3.0, "target_modules": ["to_out.0", "conv1"], "bias": "none"}
    write_json(run / "adapter" / "adapter_config.json", config | settings)
    save_file(tensors, run / "adapter" / "adapter_model.safetensors")
    return run


def read_header(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return opened.metadata()


def evaluation(run: Path, rows: list[dict[str, Any]], pairs: Any = (), **changes: Any) -> dict[str, Any]:
    """A results.json of the run's LoRA, with the id "mine", and the base; rows and pairs leave out the concept."""
    concept = read_concept(run / "concept.yaml")
    digest = hashlib.sha256((run / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()
    keys = ("slug", "name", "caption", "generic", "kind")
    content = {
        "schema_version": 2,
        "concepts": [{key: getattr(concept, key) for key in keys}],
        "subjects": [
            {"id": "base", "name": "tiny", "what": "base"},
            {"id": "mine", "name": "mine", "what": "lora", "strength": 1.0, "sha256": digest},
        ],
        "sampler": {"name": "DDIM", "steps": 25, "guidance_scale": 3.0},
        "seeds": {"evaluate": [5, 9], "seeds": [0]},
        "rows": [row | {"concept": concept.slug} for row in rows],
        "pairs": [pair | {"concept": concept.slug} for pair in pairs],
    }
    return content | changes


def evaluated(run: Path, *, concept: Concept | None = None, detector: str = "reader", **settings: Any) -> Path:
    """A run with metrics and images of two groups; `concept` and `training` replace those of hand_run."""
    hand_run(run, **settings)
    if concept:
        write_concepts(run / "concept.yaml", concept)
    shared = {"n": 200, "detector": detector, "interval": "wilson"}
    rows = [
        shared | {"metric": metric, "group": group, "subject": subject, "value": value, "low": low, "high": high}
        for metric, group, subject, value, low, high in (
            ("leakage", "direct", "base", 0.96, 0.92, 0.98),
            ("leakage", "direct", "mine", 0.01, 0.002, 0.03),
            ("retention", "alike", "mine", 0.99, 0.98, 1.0),
        )
    ]
    pairs = []
    for number, (group, red) in enumerate((("direct", 250), ("direct", 200), ("alike", 100))):
        files = {"base": f"images/base/{number}.png", "image": f"images/mine/{number}.png"}
        for side, green in (("base", 0), ("image", 255)):
            (run / files[side]).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (red, green, 0)).save(run / files[side])
        pairs.append({"subject": "mine", "prompt": "p", "group": group, "seed": number} | files)
    write_json(run / "results.json", evaluation(run, rows, pairs))
    return run
