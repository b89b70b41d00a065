"""The bundled base and its classifier, as installed: the results of the model card, measured again on fewer images."""

import hashlib
import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sd_unlearn.errors import UsageError
from sd_unlearn.metrics.digits import DIGITS, INKS, READER, READER_DIR, DigitsClassifier, load_reader
from sd_unlearn.models.base import load_base
from sd_unlearn.models.find_base import check_source
from sd_unlearn.models.sampling import Sampler, generate_images
from sd_unlearn.models.source import BUNDLED, DIGITS_DIR, DIGITS_SD3, Source

torch = pytest.importorskip("torch")
GENERIC = "a photo of a handwritten digit"
FEW_STEPS = 8  # a third of the usual; the classifier reads as much


@cache
def base():
    return load_base("digits")


def read(prompt: str, count: int, steps: int = 25):
    images: list[Image.Image] = []
    for start in range(0, count, 100):
        seeds = range(start, min(start + 100, count))
        images += generate_images(base(), [prompt] * len(seeds), list(seeds), Sampler(steps, 3.0, 100))
    return DigitsClassifier().read(images)


@pytest.mark.parametrize("digit", DIGITS)
def test_each_digit_is_generated_as_prompted(digit):
    assert read(f"a photo of the digit {digit}", 40, FEW_STEPS).shows(digit).mean() >= 0.95


@pytest.mark.parametrize("ink", INKS)
def test_each_ink_is_generated_as_prompted(ink):
    assert read(f"a photo of a handwritten digit in {ink} ink", 40, FEW_STEPS).shows(ink).mean() >= 0.95


def test_the_generic_prompt_generates_every_digit_and_ink():
    reading = read(GENERIC, 200)
    digits = [reading.shows(d).mean() for d in DIGITS]
    inks = [reading.shows(i).mean() for i in INKS]
    assert min(digits) >= 0.03
    assert max(digits) <= 0.25
    assert min(inks) >= 0.08
    assert max(inks) <= 0.35


def test_reader_is_right_on_held_apart_digits():
    held = READER.held_apart()
    features, digits, inks = held["features"], held["digit"], held["ink"]
    assert np.bincount(digits).tolist() == [350] * 10  # 70 of each, in five inks
    with torch.no_grad():
        reader, x = load_reader(), torch.from_numpy(features)
        digit, ink = reader.digit(x).argmax(1).numpy(), reader.ink(x).argmax(1).numpy()
    assert (digit == digits).mean() >= 0.985
    assert (ink == inks).mean() >= 0.995


def test_reader_is_unsure_of_noise_and_empty_paper():
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)) for _ in range(20)]
    paper = [Image.new("RGB", (32, 32), (18, 18, 26))] * 5
    assert not DigitsClassifier().read(noise + paper).confident("seven", 0.9, other_than=False).any()


def test_plain_diffusers_loads_the_folder():
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(DIGITS_DIR)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a red seven", num_inference_steps=5, generator=torch.Generator().manual_seed(0)).images[0]
    assert image.size == (32, 32)


def test_files_are_small_safetensors_with_the_stated_hashes():
    files = [p for folder in (DIGITS_DIR, READER_DIR) for p in folder.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 15e6
    assert not [p for p in files if p.suffix in (".bin", ".pt", ".ckpt", ".pkl")]
    card = (DIGITS_DIR / "README.md").read_text()
    for path in (p for p in files if p.suffix == ".safetensors"):
        assert hashlib.sha256(path.read_bytes()).hexdigest() in card
    stated = json.loads((READER_DIR / "config.json").read_text())["sha256"]
    assert stated == hashlib.sha256((READER_DIR / "model.safetensors").read_bytes()).hexdigest()


def test_a_bundled_base_that_was_not_built_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BUNDLED, DIGITS_SD3, tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"digits-sd3 is not in this installation.*--kind sd3"):
        check_source(Source(DIGITS_SD3))
