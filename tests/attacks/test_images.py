"""Attacks that start from images of the concept, and attacks on the sampler and the weights."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from attack_cases import SAMPLER, make_target
from diffusers import UNet2DConditionModel
from out_of_memory import limit_memory

from sd_unlearn.attacks.completion import COMPLETION, ImageSettings, _keep_left_half
from sd_unlearn.attacks.inversion import invert
from sd_unlearn.attacks.noise import noisier
from sd_unlearn.attacks.quantisation import NF4, quantised, to_fp16, to_int8, to_nf4
from sd_unlearn.attacks.registry import ATTACKS
from sd_unlearn.data.encoding import encode_captions
from sd_unlearn.models.base import Base, load_base
from sd_unlearn.models.source import DIGITS


def test_completion_gives_the_left_half(loaded_base: Base) -> None:
    """Sampling ends with the image's own latent in the left half, whatever the model makes of the right one."""
    target = make_target(loaded_base)
    known = target.positives.mean[:1]
    callback = _keep_left_half(known, torch.randn(known.shape), loaded_base)
    seen: list[torch.Tensor] = []

    def watch(
        pipeline: object, step: int, timestep: object, values: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        values = callback(pipeline, step, timestep, values)
        seen.append(values["latents"])
        return values

    text = encode_captions(loaded_base, [target.concept.caption])
    target.generate(text, [1], callback_on_step_end=watch)
    half = known.shape[-1] // 2
    assert torch.allclose(seen[-1][..., :half], known[..., :half])
    assert not torch.allclose(seen[0][..., :half], known[..., :half])
    assert not torch.allclose(seen[-1][..., half:], known[..., half:])


def test_completion_of_fewer_images_than_the_budget(loaded_base: Base) -> None:
    target = make_target(loaded_base)
    few = replace(target, positives=target.positives.first(1))
    [whole], [found] = (COMPLETION.run(one, ImageSettings(3), 0) for one in (target, few))
    assert (len(whole.images), len(found.images)) == (3, 1)
    assert np.array_equal(np.asarray(found.images[0]), np.asarray(whole.images[0]))


def test_sampling_from_an_inverted_image_returns_to_it() -> None:
    """Without guidance and in small steps, DDIM undoes its inversion; the smoother the model, the better."""
    loaded_base = load_base(DIGITS, device="cpu")
    target = replace(make_target(loaded_base), sampler=replace(SAMPLER, steps=50, guidance_scale=1.0))
    known = 0.5 * target.positives.mean[:1]
    text = encode_captions(loaded_base, [target.concept.caption])
    noise = invert(target, known, text)
    last: list[torch.Tensor] = []

    def watch(
        pipeline: object, step: int, timestep: object, values: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        last[:] = [values["latents"]]
        return values

    target.generate(text, [0], latents=noise, callback_on_step_end=watch)
    assert (last[0] - known).norm() < 0.1 * (noise - known).norm()


def test_the_noise_probe_at_its_lowest_setting_is_ordinary_stochastic_sampling(loaded_base: Base) -> None:
    target = make_target(loaded_base)
    text = encode_captions(loaded_base, [target.concept.caption])
    with noisier(loaded_base.pipeline, 1.0, 1.0):
        plain = target.generate(text, [3])
    wanted = target.generate(text, [3], eta=1.0)
    assert np.abs(np.asarray(plain[0], int) - np.asarray(wanted[0], int)).max() <= 1
    with noisier(loaded_base.pipeline, 1.8, 1.0):
        assert not np.array_equal(np.asarray(target.generate(text, [3])[0]), np.asarray(plain[0]))


def test_rounding_of_weights() -> None:
    weight = torch.randn(8, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    scale = weight.flatten(1).abs().amax(1).view(-1, 1, 1, 1)
    assert ((to_int8(weight) - weight).abs() <= scale / 254 + 1e-7).all()
    assert torch.allclose(to_fp16(weight), weight, rtol=1e-3)
    rounded = to_nf4(weight)
    assert torch.allclose(to_nf4(rounded), rounded, atol=1e-6)  # levels stay levels
    flat = weight.flatten()[:64]
    levels = torch.tensor(NF4) * flat.abs().max()
    nearest = levels[(flat[:, None] - levels).abs().argmin(1)]
    assert torch.allclose(rounded.flatten()[:64], nearest, atol=1e-6)
    assert to_int8(torch.zeros(2, 2)).abs().sum() == 0


def test_weights_return_after_an_error(loaded_base: Base) -> None:
    layer = loaded_base.pipeline.unet.conv_in
    before = layer.weight.clone()
    seen: list[torch.Tensor] = []

    def fail() -> None:
        with quantised(loaded_base.pipeline.unet, to_nf4):
            seen.append(layer.weight.clone())
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert not torch.equal(seen[0], before)
    assert torch.equal(layer.weight, before)


def test_weights_are_quantised_in_place(loaded_base: Base) -> None:
    """A second copy of the network does not fit beside a large one on the device."""
    weights = [module.weight for module in loaded_base.pipeline.unet.modules() if isinstance(module, torch.nn.Linear)]
    before = [(weight.data_ptr(), weight.clone()) for weight in weights]
    with quantised(loaded_base.pipeline.unet, to_int8):
        assert [weight.data_ptr() for weight in weights] == [place for place, _ in before]
        rounded = [to_int8(original) for _, original in before]
        assert all(torch.equal(weight, wanted) for weight, wanted in zip(weights, rounded, strict=True))
        assert not all(torch.equal(weight, old) for weight, (_, old) in zip(weights, before, strict=True))
    assert all(torch.equal(weight, old) for weight, (_, old) in zip(weights, before, strict=True))


@pytest.mark.parametrize("name", ["inversion", "completion"])
def test_batches_are_halved_if_memory_runs_out(name: str, loaded_base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    target = make_target(loaded_base)  # two images at once
    one = replace(target, sampler=replace(SAMPLER, batch_size=1))
    [wanted] = ATTACKS[name].run(one, ImageSettings(3), 0)
    rows = limit_memory(monkeypatch, UNet2DConditionModel, "forward", 2)  # guidance doubles the images
    [found] = ATTACKS[name].run(target, ImageSettings(3), 0)
    assert rows.count(4) == 1
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(found.images, wanted.images, strict=True))
