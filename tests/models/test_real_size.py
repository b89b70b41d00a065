"""Once in a while: a UNet of Stable Diffusion 1.5's real size, random weights, 64-pixel images.

Names, shapes and memory of the real thing, which the narrow models of the other tests cannot show. It takes some 6 GB
of memory, 2 GB of disk and, on two cores, a few minutes.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import CONCEPT_FILE
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from kinds import config_of, make_kind, original_names, text_config
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from sd_unlearn.cli import main
from sd_unlearn.io.reading import read_json
from sd_unlearn.models.checkpoint_header import read_checkpoint_header
from sd_unlearn.models.sampling import Sampler

pytestmark = pytest.mark.slow
FULL_PRECISION_MB = 4 * 859_520_964 // 2**20


def write_checkpoint(folder: Path) -> Path:
    """A half-precision checkpoint as model sites have them; its configuration, of 64 pixels, beside it in configs/."""
    torch.manual_seed(0)
    narrow = make_kind("sd1")
    unet = UNet2DConditionModel.from_config(config_of("sd1", "unet"), sample_size=8).half()
    pipeline = StableDiffusionPipeline(
        unet=unet,
        vae=narrow.vae,
        scheduler=narrow.scheduler,
        tokenizer=narrow.tokenizer,
        safety_checker=None,
        text_encoder=CLIPTextModel(text_config("sd1", "text_encoder", 768)),
        feature_extractor=None,
        requires_safety_checker=False,
    )
    save_file({k: v.half() for k, v in original_names(pipeline).items()}, folder / "model.safetensors")
    for name in ("vae", "text_encoder", "tokenizer", "scheduler"):
        getattr(pipeline, name).save_pretrained(folder / "configs" / name)
    unet.save_config(folder / "configs" / "unet")
    pipeline.save_config(folder / "configs")
    return folder / "model.safetensors"


def test_the_street_at_real_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sd_unlearn.models.sampling.DEFAULT_SAMPLER", Sampler(1, 3.0, 4))
    path = write_checkpoint(tmp_path)
    names = list(read_checkpoint_header(path, "").under("model.diffusion_model."))
    assert len(names) == 686  # as every SD 1.x checkpoint has
    assert "model.diffusion_model.output_blocks.11.0.skip_connection.weight" in names
    (tmp_path / "brad.yaml").write_text(CONCEPT_FILE.replace("unlabeled: 4, mixed_in: 1", "unlabeled: 3, mixed_in: 1"))
    told = ["--concept", "brad.yaml", "--pretrained_model_name_or_path", str(path), "--single_file_config", "configs"]
    quick = "--max_train_steps 2 --effective_batch_size 4 --caption_mode own --validation_steps 2 --lr_warmup_steps 0"
    assert main(["train", *told, *quick.split(), "--report_to", "none"]) == 0

    run = tmp_path / "runs" / "brad-pitt"
    record = read_json(run / "training.json")
    assert record["base"]["kind"] == "sd1"
    assert record["base"]["resolution"] == 64
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    assert len(adapter) == 2 * 128  # 16 transformers of two attentions of four projections
    into = {name: value.shape[1] for name, value in adapter.items() if name.endswith("attn2.to_k.lora_A.weight")}
    assert set(into.values()) == {768}
    assert {value.shape[0] for name, value in adapter.items() if "lora_B" in name} == {320, 640, 1280}
    assert all(value.any() for name, value in adapter.items() if "lora_B" in name)
    assert record["cost"]["peak_memory_mb"] < 2.5 * FULL_PRECISION_MB
    assert (run / "previews" / "step-000002.png").is_file()
