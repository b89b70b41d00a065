"""Safe latent diffusion: by hand, against the pipeline in diffusers, and without any strength."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler
from kinds import Kinds
from torch import Tensor

from sd_unlearn.models.base import Base, load_base
from sd_unlearn.models.safe_guidance import PRESETS, SafeGuidance, Safety, SafetySettings, safe_guidance

pytestmark = pytest.mark.usefixtures("one_thread")
TEXT = "7"
STRONG = SafetySettings(1, 200, 0.01, 0.5, 0.7)


def test_the_formulas_by_hand() -> None:
    """Scale 10, threshold 0.5, half of the momentum added, half of it kept; one step of warm-up."""
    guidance = SafeGuidance(SafetySettings(1, 10, 0.5, 0.5, 0.5))
    empty, prompt, concept = torch.zeros(2), torch.tensor([0.1, 0.9]), torch.tensor([0.05, 0.1])
    # differences 0.05 and 0.8, of which the second is above the threshold: factors min(1, 0.5) and 0
    first = guidance.next(empty, prompt, concept)
    assert torch.equal(first, torch.zeros(2))  # warm-up
    assert guidance.momentum is not None
    assert torch.allclose(guidance.momentum, torch.tensor([0.5 * 0.5 * 0.05, 0.0]))
    second = guidance.next(empty, torch.tensor([0.4, 0.4]), torch.tensor([0.1, 0.1]))  # factors min(1, 3)
    assert torch.allclose(second, torch.tensor([0.1 + 0.5 * 0.0125, 0.1]))
    assert torch.allclose(guidance.momentum, torch.tensor([0.5 * 0.0125 + 0.5 * 0.10625, 0.05]))


def test_the_presets_become_stronger() -> None:
    for weaker, stronger in pairwise(PRESETS.values()):
        assert weaker.warmup_steps > stronger.warmup_steps
        assert weaker.scale < stronger.scale
        assert weaker.threshold < stronger.threshold


def latents(base: Base, prompts: list[str], settings: SafetySettings | None = None, steps: int = 4) -> Tensor:
    """What the base's pipeline samples, guided if there are settings."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]

    def sample() -> Tensor:
        return base.pipeline(
            prompts, num_inference_steps=steps, guidance_scale=5.0, generator=generators, output_type="latent"
        ).images

    if settings is None:
        return sample()
    with safe_guidance(base, Safety("test", TEXT, settings)):
        return sample()


def test_without_strength_it_is_plain_guidance(loaded_base: Base) -> None:
    prompts = ["7 x", "a"]
    plain = latents(loaded_base, prompts)
    assert torch.equal(latents(loaded_base, prompts, dataclasses.replace(STRONG, scale=0)), plain)
    assert torch.equal(latents(loaded_base, prompts, dataclasses.replace(STRONG, warmup_steps=4)), plain)
    assert not torch.allclose(latents(loaded_base, prompts, STRONG), plain)
    assert torch.equal(latents(loaded_base, prompts), plain)  # the base is as before


def test_each_batch_starts_anew(loaded_base: Base) -> None:
    """Neither warm-up nor momentum of one batch reaches the next."""
    once = latents(loaded_base, ["7"], STRONG)
    with safe_guidance(loaded_base, Safety("test", TEXT, STRONG)):
        assert torch.equal(latents(loaded_base, ["7"]), once)
        assert torch.equal(latents(loaded_base, ["7"]), once)


@pytest.mark.parametrize("settings", [STRONG, PRESETS["max"]])
def test_it_is_the_pipeline_of_diffusers(loaded_base: Base, settings: SafetySettings) -> None:
    module = pytest.importorskip("diffusers.pipelines.deprecated.stable_diffusion_safe")
    parts = {name: getattr(loaded_base.pipeline, name) for name in ("vae", "text_encoder", "tokenizer", "unet")}
    safe = module.StableDiffusionPipelineSafe(
        **parts,
        scheduler=DDIMScheduler.from_config(loaded_base.pipeline.scheduler.config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    safe.safety_concept = TEXT
    safe.set_progress_bar_config(disable=True)
    prompts = ["7 x", "a"]
    theirs = safe(
        prompts,
        num_inference_steps=4,
        guidance_scale=5.0,
        generator=[torch.Generator().manual_seed(seed) for seed in range(2)],
        output_type="np",
        sld_guidance_scale=settings.scale,
        sld_warmup_steps=settings.warmup_steps,
        sld_threshold=settings.threshold,
        sld_momentum_scale=settings.momentum_scale,
        sld_mom_beta=settings.momentum_decay,
    ).images
    ours = latents(loaded_base, prompts, settings)
    with torch.no_grad():
        decoded = loaded_base.pipeline.vae.decode(ours / loaded_base.pipeline.vae.config.scaling_factor).sample
    pixels = (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert torch.allclose(torch.as_tensor(theirs), pixels, atol=1e-4)


def test_sdxl(kinds: Kinds) -> None:
    base = load_base(str(kinds.place("sdxl", "folder")), device="cpu")
    plain = latents(base, ["7", "a"], steps=2)
    assert torch.equal(latents(base, ["7", "a"], dataclasses.replace(STRONG, scale=0), steps=2), plain)
    assert not torch.allclose(latents(base, ["7", "a"], PRESETS["max"], steps=2), plain)
