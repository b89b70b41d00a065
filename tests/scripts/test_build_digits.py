"""The training of the bundled bases: leaving a digit or an ink out, and the parts of digits-sd3."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from sd_unlearn.models.base import load_base
from sd_unlearn.models.source import DIGITS_DIR

ROOT = Path(__file__).parents[2]


@pytest.fixture
def digits_sd3(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import digits_sd3

    return digits_sd3


@pytest.mark.parametrize(("concept", "left"), [("seven", [0, 3]), ("red", [0, 1])])
def test_a_pool_without_a_concept(concept: str, left: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from digits_variants import leave_out

    latents = torch.arange(4.0).view(4, 1, 1, 1)
    digits, inks = torch.tensor([1, 7, 7, 0]), torch.tensor([0, 3, 1, 1])
    kept = leave_out((latents, digits, inks), concept)
    assert [rows.tolist() for rows in (kept[1], kept[2])] == [digits[left].tolist(), inks[left].tolist()]
    assert kept[0].flatten().tolist() == left


def test_a_variant_is_a_base_of_the_given_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import digits_variants

    digits = (torch.rand(8, 1, 32, 32), torch.arange(8))
    monkeypatch.setattr(digits_variants, "load_digits", lambda: (*digits, *digits))
    variant = digits_variants.Variant("seven", 0.25, 8, "v_prediction")
    assert variant.name == "digits-without-seven-width-0.25-factor-8-v"
    digits_variants.build_variant(variant, tmp_path, vae_steps=0, steps=1)
    base = load_base(str(tmp_path / "pipeline"))
    unet, vae = base.pipeline.unet.config, base.pipeline.vae.config
    assert (tuple(unet.block_out_channels), unet.in_channels, unet.sample_size) == ((16, 24), 16, 4)
    assert (len(vae.block_out_channels), vae.latent_channels) == (4, 16)
    assert base.pipeline.scheduler.config.prediction_type == "v_prediction"
    [image] = base.pipeline("a photo of the digit two", num_inference_steps=1).images
    assert image.size == (32, 32)


@torch.no_grad()
@pytest.mark.parametrize("count", [0, 1, 200])
def test_tokens_of_zeros_act_as_one_with_the_log_of_their_number(digits_sd3: Any, count: int) -> None:
    transformer = digits_sd3.make_transformer()
    torch.manual_seed(0)
    for parameter in transformer.parameters():
        parameter += 0.05 * torch.randn_like(parameter)  # the modulations start at zero
    noisy, tokens = torch.randn(2, 4, 8, 8), torch.randn(2, 3, digits_sd3.JOINT_WIDTH)
    pooled, timesteps = torch.randn(2, sum(digits_sd3.TEXT_WIDTHS)), torch.tensor([30.0, 700.0])

    def predict(zeros: int) -> torch.Tensor:
        padded = torch.cat([tokens, tokens.new_zeros(2, zeros, digits_sd3.JOINT_WIDTH)], dim=1)
        return transformer(noisy, padded, pooled, timesteps).sample

    want = predict(count)
    with digits_sd3.EmptyTokens(torch.full((2,), math.log(count) if count else -math.inf)):
        assert torch.allclose(predict(1), want, atol=1e-5)
    assert not torch.allclose(predict(7), want, atol=1e-5)


def test_an_interrupted_training_of_digits_sd3_resumes_to_the_same_weights(
    digits_sd3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundled = StableDiffusionPipeline.from_pretrained(DIGITS_DIR)
    pool = digits_sd3.Pool(torch.randn(8, 4, 8, 8), torch.arange(8), torch.zeros(8, dtype=torch.long))
    flow_loss = digits_sd3.flow_loss

    def train(name: str) -> dict[str, torch.Tensor]:
        (tmp_path / name).mkdir(exist_ok=True)
        torch.manual_seed(0)
        digits_sd3.random.seed(0)
        digits_sd3.train_flow(pool, bundled, 3, tmp_path / name, lambda average: "", batch=2, every=1)
        return load_file(tmp_path / name / "transformer" / "diffusion_pytorch_model.safetensors")

    whole, calls = train("whole"), []

    def stops_at_the_third(*args: Any) -> torch.Tensor:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return flow_loss(*args)

    monkeypatch.setattr(digits_sd3, "flow_loss", stops_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        train("stopped")
    resumed = train("stopped")
    assert len(calls) == 4
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    assert any(value.abs().sum() > 0 for name, value in whole.items() if "norm1.linear" in name), "nothing was learned"
