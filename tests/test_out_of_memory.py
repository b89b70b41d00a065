"""Memory runs out at chosen places of every command: smaller batches give the same result, or one clear error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.autoencoders.vae import Decoder, Encoder
from evaluation_runs import make_run
from out_of_memory import limit_memory
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from train_runs import ADAPTER, make, rendered
from transformers import CLIPTextModel

from sd_unlearn import cli
from sd_unlearn.config.base import RenderConfig
from sd_unlearn.data import encoding, render
from sd_unlearn.data.concept import Concept
from sd_unlearn.data.dataset import scan
from sd_unlearn.data.encoding import encode_captions, encode_images
from sd_unlearn.io.reading import read_json
from sd_unlearn.metrics.digits import DigitReader
from sd_unlearn.models import sampling, vae
from sd_unlearn.models.base import Base
from sd_unlearn.training import previews, probe, trainer

pytestmark = pytest.mark.usefixtures("one_thread")
Photos = Callable[..., Path]


@pytest.fixture
def options(tiny_base: Path, concept_file: Path) -> Callable[..., RenderConfig]:
    def make_options(folder: str, **changes: Any) -> RenderConfig:
        given = {"num_inference_steps": 1, "render_batch_size": 4} | changes
        base = str(tiny_base)
        return RenderConfig(
            concept=str(concept_file), pretrained_model_name_or_path=base, data_dir=Path(folder), **given
        )

    return make_options


def images(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).rglob("*.png")}


def test_render_halves_the_batch_and_gives_the_images_of_the_smaller_one(
    options: Callable[..., RenderConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    render.run(options("small", render_batch_size=2))
    rows = limit_memory(monkeypatch, UNet2DConditionModel, "forward", 4)  # guidance doubles the images
    render.run(options("halved"))
    assert images("halved") == images("small")
    assert [count for count in rows if count > 4] == [8]  # tried once, then remembered
    assert capsys.readouterr().err.count("Out of memory while generating images, 4 at once: continuing with 2") == 1


def test_decoding_alone_is_halved_if_only_the_vae_runs_out(
    options: Callable[..., RenderConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    render.run(options("whole"))
    unet = limit_memory(monkeypatch, UNet2DConditionModel, "forward", 8)
    decoder = limit_memory(monkeypatch, Decoder, "forward", 1)
    render.run(options("halved"))
    for name, path in ((path.name, path) for path in Path("halved").rglob("*.png")):
        other = next(Path("whole").rglob(name))
        difference = np.asarray(Image.open(path)).astype(int) - np.asarray(Image.open(other))
        assert np.abs(difference).max() <= 1  # rounding
    assert set(unet) == {8, 2}  # 13 images: three batches of four with guidance, and the last one
    assert decoder.count(4) == 1


def test_one_image_that_does_not_fit_is_decoded_in_tiles_and_the_manifest_says_so(
    options: Callable[..., RenderConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(vae, "MIN_TILE", 4)
    decode = Decoder.forward

    def limited(self: Any, latents: torch.Tensor, *arguments: Any) -> Any:
        if latents[0, 0].numel() > 16:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return decode(self, latents, *arguments)

    render.run(options("whole"))
    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "forward", limited)
        render.run(options("tiled"))
    assert "in tiles of 16 pixels" in capsys.readouterr().err
    assert read_json(Path("tiled/manifest.json"))["sampler"]["tiled_images"] == 13
    assert read_json(Path("tiled/manifest.json"))["base"]["vae_tile"] == 16
    assert "tiled_images" not in read_json(Path("whole/manifest.json"))["sampler"]
    Path("tiled/manifest.json").unlink()  # killed before it was written: the images themselves know
    next(Path("tiled").rglob("*.png")).unlink()
    render.run(options("tiled"))
    assert 9 <= read_json(Path("tiled/manifest.json"))["sampler"]["tiled_images"] < 13


def test_an_error_names_what_is_left_and_keeps_the_rendered_images(
    options: Callable[..., RenderConfig],
    tiny_base: Path,
    concept_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["render", str(concept_file), "--pretrained_model_name_or_path", str(tiny_base), "--data_dir", "data"]
    command += ["--num_inference_steps", "1", "--render_batch_size", "4"]
    generate, calls = sampling.sample, []

    def short(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return generate(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(sampling, "sample", short)
        assert cli.main(command) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("Error: Out of memory while generating images, even one at a time (CUDA out of memory.")
    assert "--mixed_precision fp16" in error
    assert "bug" not in error
    kept = images("data")
    assert len(kept) == 8
    assert cli.main(command) == 0
    render.run(options("whole"))
    assert images("data") == images("whole")


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError(), RuntimeError("CUDA error: out of memory")]
)
def test_out_of_memory_anywhere_else_is_not_called_a_bug(
    error: Exception,
    concept_file: Path,
    tiny_base: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def load(*_: Any) -> None:
        raise error

    monkeypatch.setattr(render, "load_base", load)
    assert cli.main(["render", str(concept_file), "--pretrained_model_name_or_path", str(tiny_base)]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("Error: Out of memory: ")
    assert "--resolution" in line
    assert "bug" not in line


def test_out_of_memory_while_loading_is_not_called_a_broken_file(
    concept_file: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def short(*_: Any, **__: Any) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried")

    monkeypatch.setattr(AutoencoderKL, "from_pretrained", short)
    assert cli.main(["render", str(concept_file), "--pretrained_model_name_or_path", str(tiny_base)]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("Error: Out of memory: ")


# -- training images and captions --


def test_latents_are_those_of_the_smaller_batch(
    loaded_base: Base, photos: Photos, concept: Concept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = scan(photos(unlabeled=6, positive=3), concept)
    expected = encode_images(loaded_base, examples, 32, tmp_path / "small", batch_size=2)
    rows = limit_memory(monkeypatch, Encoder, "forward", 2)
    found = encode_images(loaded_base, examples, 32, tmp_path / "halved", batch_size=8)
    assert rows == [8, 4, 2, 2, 2, 2, 1]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_latents_are_all_encoded_in_the_same_tiles_and_the_cache_says_so(
    loaded_base: Base, photos: Photos, concept: Concept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vae, "MIN_TILE", 4)
    examples, encode, calls = scan(photos(), concept), Encoder.forward, []

    def limited(self: Any, pixels: torch.Tensor) -> Any:
        calls.append(len(pixels))
        if len(calls) > 2 and pixels.shape[-1] > 16:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return encode(self, pixels)

    monkeypatch.setattr(Encoder, "forward", limited)
    mean, _ = encode_images(loaded_base, examples, 32, tmp_path / "cache", batch_size=2)
    again = Base(**{**vars(loaded_base), "vae_tile": None})
    cached, _ = encode_images(again, examples, 32, tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    with safe_open(file, framework="pt") as latents:
        assert latents.metadata() == {"sd_unlearn.vae_tile": "16"}
    assert (loaded_base.vae_tile, again.vae_tile) == (16, 16)
    assert torch.equal(cached, mean)
    first = encoding.load_pixels(examples[0].path, 32)[None]
    one = loaded_base.pipeline.vae.encode(first).latent_dist.mean * loaded_base.pipeline.vae.config.scaling_factor
    assert torch.allclose(mean[:1], one, atol=1e-5)  # the first image, too, although it fitted as a whole


def test_captions_are_those_of_the_smaller_batch(loaded_base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    captions = [f"a photo of a man {n}" for n in range(6)]
    expected = encode_captions(loaded_base, captions)
    rows = limit_memory(monkeypatch, CLIPTextModel, "forward", 2)
    assert torch.allclose(encode_captions(loaded_base, captions), expected, atol=1e-6)
    assert rows[-3:] == [2, 2, 2]


# -- previews and probes --


@pytest.fixture(scope="module")
def place(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rendered(tmp_path_factory.mktemp("place"), tiny_base)


def few(place: Path, tiny_base: Path, output: str, **changes: Any) -> Any:
    common = {"max_train_steps": 2, "effective_batch_size": 8, "checkpointing_steps": 0, "render_batch_size": 8}
    return make(place, tiny_base, output, **(common | changes))


@pytest.fixture
def only_in(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """only_in(owner, method, most): the UNet runs out of memory above `most` rows while a method runs."""

    def limit(owner: type, method: str, most: int) -> None:
        original = getattr(owner, method)

        def limited(*arguments: Any) -> Any:
            with monkeypatch.context() as patch:
                limit_memory(patch, UNet2DConditionModel, "forward", most)
                return original(*arguments)

        monkeypatch.setattr(owner, method, limited)

    return limit


def test_previews_are_halved_and_training_does_not_change(
    place: Path, tiny_base: Path, only_in: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    trainer.run(few(place, tiny_base, "whole", validation_steps=2, render_batch_size=2))
    only_in(previews.ImageGenerator, "generate", 4)
    trainer.run(few(place, tiny_base, "halved", validation_steps=2))
    assert images("halved/previews") == images("whole/previews") != {}
    assert "8 at once: continuing with 4" in capsys.readouterr().err
    ours, theirs = (load_file(Path(name) / ADAPTER) for name in ("halved", "whole"))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_preview_that_does_not_fit_is_skipped_and_training_continues(
    place: Path, tiny_base: Path, only_in: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    only_in(previews.ImageGenerator, "generate", 0)
    trainer.run(few(place, tiny_base, "run", validation_steps=1))
    assert capsys.readouterr().err.count("skipped. Out of memory while generating images") == 3  # the base's, too
    assert Path("run/training.json").is_file()
    assert not images("run/previews")


def test_the_ratio_probe_is_that_of_smaller_batches(
    place: Path, tiny_base: Path, only_in: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def ratio(output: str) -> float:
        trainer.run(few(place, tiny_base, output, probe_steps=2))
        (line,) = [line for line in Path(output, "metrics.jsonl").read_text().splitlines() if "probe_ratio" in line]
        return float(line.partition('"probe_ratio": ')[2].partition(",")[0])

    expected = ratio("whole")
    only_in(probe.RatioProbe, "_ratio", 2)
    assert ratio("halved") == pytest.approx(expected, rel=1e-5)
    assert "while running --probe ratio, 8 at once: continuing with 4" in capsys.readouterr().err


# -- evaluate --


@pytest.fixture(scope="module")
def run(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"), tiny_base)


@pytest.fixture
def evaluate(run: Path) -> Iterator[Callable[..., int]]:
    def command(folder: str, *options: str) -> int:
        few_images = ["--num_images", "2", "--num_keep_images", "2", "--num_inference_steps", "1"]
        places = ["--output_dir", folder, "--cache_dir", f"{folder}/cache"]
        return cli.main(["evaluate", "--run", str(run), "--groups", "direct", *few_images, *places, *options])

    return command


def test_evaluate_gives_the_same_results_with_less_memory(
    evaluate: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate("small", "--render_batch_size", "1") == 0
    limit_memory(monkeypatch, UNet2DConditionModel, "forward", 2)
    reader = limit_memory(monkeypatch, DigitReader, "features", 1)
    capsys.readouterr()
    assert evaluate("halved", "--render_batch_size", "2") == 0
    assert 1 in reader
    error = capsys.readouterr().err
    assert "while generating images, 2 at once: continuing with 1" in error
    assert "while classifying images, 2 at once: continuing with 1" in error
    assert images("halved/cache") == images("small/cache")
    ours, theirs = (read_json(Path(name, "results.json"))["rows"] for name in ("halved", "small"))
    assert ours == theirs


def test_out_of_memory_of_an_evaluation_is_not_blamed_on_the_lora(
    evaluate: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generate, calls = sampling.sample, []

    def short(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return generate(*arguments, **options)

    monkeypatch.setattr(sampling, "sample", short)
    assert evaluate("out", "--keep_going") == 1
    assert "Error: Out of memory while generating images" in capsys.readouterr().err.splitlines()[-1]
    assert len(images("out/cache")) == 2  # the base's
    assert not Path("out/results.json").exists()
