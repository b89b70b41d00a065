"""Pictures of a DDPM: each from its own seed, kept when a run is killed, in the field's file format."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel

from sd_unlearn.paper.ddpm import sample
from sd_unlearn.paper.ddpm.sample import as_bytes, as_pictures, draw, draw_all, load_samples, make_sampler
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


def asked(count: int) -> torch.Tensor:
    return torch.arange(count) % 5


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_a_picture_depends_on_its_seed_and_not_on_its_batch(unet: UNet2DModel, name: Any) -> None:
    sampler = make_sampler(name, make_schedule(), 4)
    together = draw(unet, sampler, [1, 2, 3], asked(3))
    alone = draw(unet, make_sampler(name, make_schedule(), 4), [2], asked(2)[1:])
    assert torch.allclose(together[1], alone[0], atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-2)
    assert together.shape == (3, 1, 8, 8)
    assert together.abs().max() <= 1


def test_the_condition_reaches_the_network(unet: UNet2DModel) -> None:
    sampler = make_sampler("ddim", make_schedule(), 4)
    some, others = (draw(unet, sampler, [1], torch.tensor([c])) for c in (0, 3))
    assert not torch.equal(some, others)


def test_ddpm_adds_noise_on_the_way_and_ddim_does_not() -> None:
    assert make_sampler("ddpm", make_schedule(), 1000).timesteps.tolist() == list(range(999, -1, -1))
    assert len(make_sampler("ddim", make_schedule(), 50).timesteps) == 50


def test_what_a_killed_run_drew_is_kept(unet: UNet2DModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = make_sampler("ddim", make_schedule(), 2)
    draw_all(unet, sampler, tmp_path / "whole", 5, 0, 2, 5)
    drawn: list[int] = []

    def few(*args: Any) -> torch.Tensor:
        drawn.append(len(args[2]))
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return draw(*args)

    with monkeypatch.context() as patched:
        patched.setattr(sample, "draw", few)
        with pytest.raises(KeyboardInterrupt):
            draw_all(unet, sampler, tmp_path / "broken", 5, 0, 2, 5)
    drawn.clear()
    shutil.copytree(tmp_path / "broken", tmp_path / "other")
    draw_all(unet, sampler, tmp_path / "other", 5, 0, 3, 5)  # in other parts
    assert np.allclose(load_samples(tmp_path / "other").astype(int), load_samples(tmp_path / "whole"), atol=1)
    monkeypatch.setattr(sample, "draw", few)
    draw_all(unet, sampler, tmp_path / "broken", 5, 0, 2, 5)
    assert drawn == [1]
    assert np.array_equal(load_samples(tmp_path / "broken"), load_samples(tmp_path / "whole"))
    assert [p.name for p in (tmp_path / "broken").iterdir()] == ["samples.npz"]


def test_pictures_survive_the_file(tmp_path: Path) -> None:
    pictures = torch.rand(3, 3, 4, 4) * 2 - 1
    pixels = as_bytes(pictures)
    assert pixels.shape == (3, 4, 4, 3)
    assert pixels.dtype == np.uint8
    assert torch.allclose(as_pictures(pixels), pictures, atol=1 / 127)
    assert np.array_equal(as_bytes(as_pictures(pixels)), pixels)
    assert as_bytes(torch.tensor([-1.0, 1.0]).view(1, 1, 1, 2)).ravel().tolist() == [0, 255]
