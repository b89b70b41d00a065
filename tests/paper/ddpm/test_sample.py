"""Images of a DDPM: each from its own seed, kept when a run is interrupted, in the usual file format."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel

from sd_unlearn.paper.ddpm import sample
from sd_unlearn.paper.ddpm.sample import from_bytes, generate, generate_all, load_samples, make_sampler, to_bytes
from sd_unlearn.paper.ddpm.unet import make_schedule


@pytest.fixture
def unet() -> UNet2DModel:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        norm_num_groups=4,
        num_class_embeds=5,
        attention_head_dim=8,
        **blocks,
    ).eval()


def conditions_of(count: int) -> torch.Tensor:
    return torch.arange(count) % 5


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_an_image_depends_on_its_seed_and_not_on_its_batch(unet: UNet2DModel, name: Any) -> None:
    sampler = make_sampler(name, make_schedule(), 4)
    together = generate(unet, sampler, [1, 2, 3], conditions_of(3))
    alone = generate(unet, make_sampler(name, make_schedule(), 4), [2], conditions_of(2)[1:])
    assert torch.allclose(together[1], alone[0], atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-2)
    assert together.shape == (3, 1, 8, 8)
    assert together.abs().max() <= 1


def test_the_condition_reaches_the_network(unet: UNet2DModel) -> None:
    sampler = make_sampler("ddim", make_schedule(), 4)
    some, others = (generate(unet, sampler, [1], torch.tensor([c])) for c in (0, 3))
    assert not torch.equal(some, others)


def test_ddpm_uses_all_timesteps_and_ddim_a_subset() -> None:
    assert make_sampler("ddpm", make_schedule(), 1000).timesteps.tolist() == list(range(999, -1, -1))
    assert len(make_sampler("ddim", make_schedule(), 50).timesteps) == 50


def test_batches_of_an_interrupted_run_are_kept(
    unet: UNet2DModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = make_sampler("ddim", make_schedule(), 2)
    generate_all(unet, sampler, tmp_path / "whole", 5, 0, 2, 5)
    sizes: list[int] = []

    def few(*args: Any) -> torch.Tensor:
        sizes.append(len(args[2]))
        if len(sizes) == 3:
            raise KeyboardInterrupt
        return generate(*args)

    with monkeypatch.context() as patched:
        patched.setattr(sample, "generate", few)
        with pytest.raises(KeyboardInterrupt):
            generate_all(unet, sampler, tmp_path / "broken", 5, 0, 2, 5)
    sizes.clear()
    shutil.copytree(tmp_path / "broken", tmp_path / "other")
    generate_all(unet, sampler, tmp_path / "other", 5, 0, 3, 5)  # in other batches
    assert np.allclose(load_samples(tmp_path / "other").astype(int), load_samples(tmp_path / "whole"), atol=1)
    monkeypatch.setattr(sample, "generate", few)
    generate_all(unet, sampler, tmp_path / "broken", 5, 0, 2, 5)
    assert sizes == [1]
    assert np.array_equal(load_samples(tmp_path / "broken"), load_samples(tmp_path / "whole"))
    assert [p.name for p in (tmp_path / "broken").iterdir()] == ["samples.npz"]


def test_bytes_are_converted_back_to_images(tmp_path: Path) -> None:
    images = torch.rand(3, 3, 4, 4) * 2 - 1
    pixels = to_bytes(images)
    assert pixels.shape == (3, 4, 4, 3)
    assert pixels.dtype == np.uint8
    assert torch.allclose(from_bytes(pixels), images, atol=1 / 127)
    assert np.array_equal(to_bytes(from_bytes(pixels)), pixels)
    assert to_bytes(torch.tensor([-1.0, 1.0]).view(1, 1, 1, 2)).ravel().tolist() == [0, 255]
