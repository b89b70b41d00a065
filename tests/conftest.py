"""Fixtures for all tests: a Stable Diffusion of a few thousand random weights, a concept for it, a working folder."""

from __future__ import annotations

import json
import os
import shutil

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: no test may wait for a network
# Read when torch is imported, also by the programs that tests start: the models are so small that threads only wait for
# each other. pytest-xdist uses the other cores.
os.environ["OMP_NUM_THREADS"] = "1"

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from flow_kinds import FlowKinds
from kinds import TOKENS, Kinds, make_tokenizer
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

from sd_unlearn.data.concept import Concept
from sd_unlearn.data.find_concept import read_concept
from sd_unlearn.io.reading import read_json
from sd_unlearn.io.run_folder import POSITIVE, UNLABELED
from sd_unlearn.models.base import Base, load_base

os.fsync = lambda descriptor: None  # a disk's seconds; nothing here outlives a power cut

WIDTH = 16
CONCEPT_FILE = """\
name: Brad Pitt
kind: person
caption: a photo of Brad Pitt
generic: a photo of a man
images: {positive: 4, unlabeled: 4, mixed_in: 1, keep: 4}
alternatives: [Tom Hanks]
keep: ["a photo of {a dog,a cat}"]
evaluate:
  direct: [a photo of Brad Pitt]
"""


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test writes into the checkout, and none is one of several processes."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Threads only wait on each other over tensors this small: on a busy machine many times longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_pipeline() -> StableDiffusionPipeline:
    """32x32 pixels, 8x8x4 latents; the block types are those of the real one, in miniature."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=WIDTH,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=TOKENS,
            projection_dim=WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(4, 4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        sample_size=32,
        scaling_factor=0.5,
        mid_block_add_attention=False,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=2,
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    scheduler = DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random-weight StableDiffusionPipeline."""
    folder = tmp_path_factory.mktemp("tiny-base")
    make_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def v_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base as one that predicts v."""
    return scheduled(tiny_base, tmp_path_factory.mktemp("v") / "base", prediction_type="v_prediction")


@pytest.fixture(scope="session")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Kinds:
    """Narrow models of each real architecture, in each form."""
    return Kinds(tmp_path_factory.mktemp("kinds"))


@pytest.fixture(scope="session")
def flow_kinds(tmp_path_factory: pytest.TempPathFactory) -> FlowKinds:
    """Narrow models of SD 3, SD 3.5 and FLUX.1."""
    return FlowKinds(tmp_path_factory.mktemp("flow-kinds"))


@pytest.fixture(scope="session")
def tiny_sd3(flow_kinds: FlowKinds) -> Path:
    """The folder of a random-weight StableDiffusion3Pipeline, with T5."""
    return flow_kinds.folder("sd35")


@pytest.fixture(scope="session")
def tiny_flux(flow_kinds: FlowKinds) -> Path:
    """The folder of a random-weight FluxPipeline with embedded guidance."""
    return flow_kinds.folder("flux-dev")


def scheduled(base: Path, copy: Path, **changes: object) -> Path:
    """A copy of a base with another scheduler_config.json."""
    schedule = shutil.copytree(base, copy) / "scheduler" / "scheduler_config.json"
    schedule.write_text(json.dumps(read_json(schedule) | changes))
    return copy


@pytest.fixture
def loaded_base(tiny_base: Path) -> Base:
    """The tiny base, loaded as a stage loads it; fresh for each test, because training changes it."""
    return load_base(str(tiny_base), device="cpu")


@pytest.fixture
def concept_file(tmp_path: Path) -> Path:
    path = tmp_path / "brad.yaml"
    path.write_text(CONCEPT_FILE)
    return path


@pytest.fixture
def concept(concept_file: Path) -> Concept:
    return read_concept(concept_file)


@pytest.fixture
def photos(tmp_path: Path) -> Callable[..., Path]:
    """photos(unlabeled=3, positive=2): a data folder of one's own pictures, each of another colour, no metadata."""

    def make(unlabeled: int = 3, positive: int = 2, folder: str = "photos") -> Path:
        for sub, count, blue in ((UNLABELED, unlabeled, 0), (POSITIVE, positive, 200)):
            place = tmp_path / folder / sub
            place.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (40, 32), (30 * i, 255 - 30 * i, blue)).save(place / f"{i}.png")
        return tmp_path / folder

    return make


def tree(folder: Path) -> set[str]:
    """Everything under a folder, as relative paths."""
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}
