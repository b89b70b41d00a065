"""Every kind of base in every form it comes in, through the whole street (the table of docs/tested.md)."""

from __future__ import annotations

import contextlib
import copy
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kinds import FORMS, KINDS, PREDICTS, Kinds, original_names
from PIL import Image
from safetensors.torch import load_file

from sd_unlearn.cli import main
from sd_unlearn.config.objective import Weights
from sd_unlearn.config.train import TrainConfig
from sd_unlearn.data.dataset import scan
from sd_unlearn.data.encoding import encode_captions, encode_images
from sd_unlearn.data.find_concept import load_concept
from sd_unlearn.errors import UnlearnError, UsageError
from sd_unlearn.io.files import write_json
from sd_unlearn.io.reading import read_json
from sd_unlearn.io.run_folder import DIFFUSERS_FILE, POSITIVE
from sd_unlearn.models.base import Base, load_base
from sd_unlearn.models.checkpoint_header import UNET
from sd_unlearn.models.denoiser import Denoiser
from sd_unlearn.models.recorded_base import load_recorded_base
from sd_unlearn.models.sampling import Sampler, generate_images
from sd_unlearn.models.source import Source
from sd_unlearn.models.student import apply_run, make_student
from sd_unlearn.models.vae import decode
from sd_unlearn.training import setup
from sd_unlearn.training.previews import ImageGenerator

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPTS, SEEDS = ["a photo of the digit seven", "a photo of a handwritten digit"], [3, 4]
FEW = Sampler(2, 5.0, 2)


@pytest.fixture(scope="module", autouse=True)
def _few_steps() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sd_unlearn.models.sampling.DEFAULT_SAMPLER", Sampler(2, 7.5, 16))
        yield


def flags(options: dict[str, Any]) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def loaded(kinds: Kinds, kind: str, form: str = "folder", precision: str = "no") -> Base:
    told = kinds.options(kind, form)
    source = Source(told.pop("pretrained_model_name_or_path"), **told)  # type: ignore[arg-type]
    return load_base(source, precision, "cpu")


def pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


def distance(images: np.ndarray, others: np.ndarray) -> float:
    """Mean absolute difference, in levels of 255."""
    return float(np.abs(images.astype(int) - others.astype(int)).mean())


# -- the street --


def rendered(kinds: Kinds, kind: str, form: str) -> Path:
    """The working folder of a base after `render`, as a user types it."""
    place = kinds.root / f"street-{kind}-{form}"
    if not place.is_dir():
        place.mkdir()
        with contextlib.chdir(place):
            assert main(["render", *base_flags(kinds, kind, form)]) == 0
    return place


def trained(kinds: Kinds, kind: str, form: str) -> Path:
    """The same after `train`."""
    place = rendered(kinds, kind, form)
    if not (place / "runs").is_dir():
        options = {
            "max_train_steps": 2,
            "effective_batch_size": 8,
            "rank": 2,
            "learning_rate": 0.01,
            "validation_steps": 2,
            "lr_warmup_steps": 0,
            "report_to": "none",
        }
        with contextlib.chdir(place):
            assert main(["train", *base_flags(kinds, kind, form), *flags(options)]) == 0
    return place


def base_flags(kinds: Kinds, kind: str, form: str) -> list[str]:
    counts = {"num_unlabeled": 4, "num_mixed_in": 2, "num_positive": 3, "num_keep": 1, "concept": "seven"}
    return flags(kinds.options(kind, form) | counts)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_render(kinds: Kinds, kind: str, form: str) -> None:
    folder = rendered(kinds, kind, form) / "data" / "seven"
    manifest = read_json(folder / "manifest.json")["base"]
    assert (manifest["kind"], manifest["prediction_type"]) == (kind, PREDICTS[kind])
    assert manifest["name"] == str(kinds.place(kind, form))
    assert manifest["resolution"] == 64
    with Image.open(folder / POSITIVE / "positive-00000.png") as image:
        assert image.size == (64, 64)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_train(kinds: Kinds, kind: str, form: str) -> None:
    place = trained(kinds, kind, form)
    run = place / "runs" / "seven"
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    assert all(value.any() for name, value in adapter.items() if "lora_B" in name)  # every module was reached
    assert (run / "previews" / "step-000002.png").is_file()
    rendered_from = read_json(place / "data" / "seven" / "manifest.json")["base"]
    assert read_json(run / "training.json")["base"] == rendered_from


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_evaluate(kinds: Kinds, kind: str, form: str) -> None:
    run = trained(kinds, kind, form) / "runs" / "seven"
    few = ["--groups", "direct", "--num_images", "2", "--num_keep_images", "1"]
    assert main(["evaluate", "--run", str(run), *few]) == 0
    pairs = read_json(run / "results.json")["pairs"]
    assert pairs
    base, lora = ([(run / pair[side]).read_bytes() for pair in pairs] for side in ("base", "image"))
    assert base != lora  # the LoRA does something


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_export(kinds: Kinds, kind: str, form: str, tmp_path: Path) -> None:
    """The file for Diffusers, and the checkpoint with the LoRA baked in, draw what the run draws."""
    run = trained(kinds, kind, form) / "runs" / "seven"
    out = ["--output_dir", str(tmp_path / "out"), "--merge", str(tmp_path / "merged")]
    assert main(["export", "--run", str(run), *out]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"README.md", "seven.safetensors", DIFFUSERS_FILE}
    base = loaded(kinds, kind, form)
    if kind == "sdxl":  # whose blocks have one layer here, and two in what was published
        layers = original_names(kinds.pipeline(kind))
        written = {name.split(".")[0] for name in load_file(tmp_path / "out" / "seven.safetensors")}
        known = {name.removeprefix(UNET).removesuffix(".weight").replace(".", "_") for name in layers}
        assert written <= {f"lora_unet_{name}" for name in known}
    with apply_run(base, run):
        wanted = pixels(generate_images(base, PROMPTS, SEEDS, FEW))
    assert not np.array_equal(pixels(generate_images(base, PROMPTS, SEEDS, FEW)), wanted)
    merged = load_base(str(tmp_path / "merged"), device="cpu")
    base.pipeline.load_lora_weights(tmp_path / "out", weight_name=DIFFUSERS_FILE)
    for one in (base, merged):  # a rounding step of 8 bits at most
        assert np.abs(pixels(generate_images(one, PROMPTS, SEEDS, FEW)).astype(int) - wanted.astype(int)).max() <= 1


# -- one model, whatever it comes as --


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_draws_what_its_folder_draws(kinds: Kinds, kind: str) -> None:
    folder, file, fp16 = (loaded(kinds, kind, form) for form in FORMS)
    assert folder.kind == file.kind == kind
    assert folder.sha256 == file.sha256 == fp16.sha256
    assert folder.vae_sha256 == file.vae_sha256 == fp16.vae_sha256
    # Copied, because on some CPUs the last bit of a matrix product depends on where the weights lie in a mapped file.
    copies = [copy.deepcopy(base) for base in (folder, file)]
    pictures = [pixels(generate_images(base, PROMPTS, SEEDS, FEW)) for base in copies]
    assert np.array_equal(*pictures)


@pytest.mark.parametrize("kind", KINDS)
def test_what_training_predicts_is_what_drawing_predicts(
    kinds: Kinds, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The denoiser with cached captions calls the UNet as diffusers' pipeline does, with all that SDXL adds."""
    base = loaded(kinds, kind)
    calls: list[tuple[torch.Tensor, Any, dict[str, Any], torch.Tensor]] = []
    forward = base.pipeline.unet.forward

    def watched(noisy: torch.Tensor, timestep: Any, **given: Any) -> Any:
        answer = forward(noisy, timestep, **given)
        calls.append((noisy, timestep, given, answer[0]))
        return answer

    monkeypatch.setattr(base.pipeline.unet, "forward", watched)
    generate_images(base, PROMPTS, SEEDS, FEW)
    drawn = calls[0]  # with guidance: the empty caption twice, then both prompts
    denoiser = Denoiser.of(base, base.pipeline.unet)
    with torch.no_grad():
        text = encode_captions(base, ["", "", *PROMPTS])
        ours = denoiser.predict(drawn[0], drawn[1].expand(4), text)
    told = calls[-1][2]
    assert torch.allclose(told["encoder_hidden_states"], drawn[2]["encoder_hidden_states"], atol=1e-6)
    if kind == "sdxl":
        assert torch.equal(told["added_cond_kwargs"]["time_ids"], drawn[2]["added_cond_kwargs"]["time_ids"])
        assert told["added_cond_kwargs"]["time_ids"][0].tolist() == [64, 64, 0, 0, 64, 64]
        pooled = told["added_cond_kwargs"]["text_embeds"]
        assert torch.allclose(pooled, drawn[2]["added_cond_kwargs"]["text_embeds"], atol=1e-6)
        assert pooled.shape == (4, 24)
        assert pooled[2:].any(dim=1).all()
    assert torch.allclose(ours, drawn[3], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_previews_are_generated_like_images(kinds: Kinds, kind: str) -> None:
    """From embeddings, with the text encoders gone."""
    base = loaded(kinds, kind)
    wanted = pixels(generate_images(base, PROMPTS, SEEDS, FEW))
    known = {text: encode_captions(base, [text])[0] for text in ("", *PROMPTS)}
    base.pipeline.text_encoder = None
    if kind == "sdxl":
        base.pipeline.text_encoder_2 = None
    generator = ImageGenerator(base, FEW, lambda texts: torch.stack([known[t] for t in texts]), base.pipeline.unet)
    found = pixels(generator.generate(PROMPTS, SEEDS))
    assert np.abs(found.astype(int) - wanted).max() <= 1


def test_sdxl_leaves_the_empty_caption_out_as_its_pipeline_says(kinds: Kinds) -> None:
    base = loaded(kinds, "sdxl")
    assert not encode_captions(base, [""]).any()
    base.pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    assert encode_captions(base, [""])[0].any(dim=1).all()


def test_the_vae_of_sdxl_is_lent_in_full_precision(kinds: Kinds, tmp_path: Path) -> None:
    """Its activations leave the range of fp16. Here they are made to."""
    base = loaded(kinds, "sdxl", precision="fp16")
    vae = base.pipeline.vae
    with torch.no_grad():
        vae.encoder.conv_in.weight *= 3e4
        vae.encoder.conv_in.bias += 3e4
        shape = (1, 3, 64, 64)
        assert not vae.encode(torch.ones(shape, dtype=torch.float16)).latent_dist.mean.isfinite().all()
    for folder in ("0_unlabeled", POSITIVE):
        (tmp_path / "data" / folder).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (64, 64), (255, 255, 255 - i)).save(tmp_path / "data" / folder / f"{i}.png")
    examples = scan(tmp_path / "data", load_concept("seven", None))
    mean, std = encode_images(base, examples, 64, tmp_path / "cache")
    assert mean.isfinite().all()
    assert std.isfinite().all()
    assert vae.dtype == torch.float16  # given back as it was


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_images_are_decoded_in_full_precision_where_fp16_overflows(kinds: Kinds, kind: str) -> None:
    """SDXL's configuration says so; of other VAEs it is seen in the result."""
    base = loaded(kinds, kind, precision="fp16")
    network, latents = base.pipeline.vae, torch.full((2, 4, 8, 8), 2.0, dtype=torch.float16)
    with torch.no_grad():
        network.decoder.conv_in.weight *= 3e4
        network.decoder.conv_in.bias += 3e4
        scale = network.config.scaling_factor
        assert not network.decode(latents / scale).sample.isfinite().all()
    images = pixels(decode(base, latents))
    assert network.dtype == torch.float16  # given back as it was
    network.float()
    assert np.array_equal(images, pixels(decode(base, latents)))


def test_a_vae_that_is_not_finite_in_full_precision_either_is_refused(kinds: Kinds) -> None:
    base = loaded(kinds, "sd1", precision="fp16")
    with torch.no_grad():
        base.pipeline.vae.decoder.conv_in.bias += float("inf")
    with pytest.raises(UnlearnError, match="The VAE of .* not finite"):
        decode(base, torch.zeros(1, 4, 8, 8, dtype=torch.float16))
    with pytest.raises(UnlearnError, match="The UNet of .* not finite"):
        decode(base, torch.full((1, 4, 8, 8), float("nan"), dtype=torch.float16))


# -- what is recorded, and loaded again --


def test_a_recorded_configuration_that_was_moved_is_named() -> None:
    record = {"name": "owner/name", "single_file_config": "/gone/configs"}
    with pytest.raises(UsageError, match="The --single_file_config of the training is not at /gone/configs any more"):
        load_recorded_base(record, device="cpu")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_base_is_loaded_again_as_it_was_recorded(kinds: Kinds, kind: str, form: str) -> None:
    base = loaded(kinds, kind, form)
    again = load_recorded_base(base.describe(), device="cpu")
    assert again.describe() == base.describe()


def test_another_vae_is_recorded_and_used(kinds: Kinds, tmp_path: Path) -> None:
    other = kinds.pipeline("sd2").vae
    other.save_pretrained(tmp_path / "vae")
    plain = loaded(kinds, "sd1")
    base = load_base(Source(str(kinds.folder("sd1")), vae=str(tmp_path / "vae")), device="cpu")
    assert base.describe()["vae"] == str(tmp_path / "vae")
    assert base.sha256 == plain.sha256
    assert base.vae_sha256 != plain.vae_sha256 == load_recorded_base(plain.describe(), device="cpu").vae_sha256
    assert load_recorded_base(base.describe(), device="cpu").vae_sha256 == base.vae_sha256
    pictures = [pixels(generate_images(b, PROMPTS, SEEDS, FEW)) for b in (plain, base)]
    assert not np.array_equal(*pictures)
    with pytest.raises(UsageError, match="VAE of .* changed"):
        load_recorded_base(base.describe() | {"vae_sha256": plain.vae_sha256}, device="cpu")
    with pytest.raises(UsageError, match="UNet of .* changed"):
        load_recorded_base(base.describe() | {"sha256": "0"}, device="cpu")


def test_a_folder_rendered_with_another_vae_is_not_continued(kinds: Kinds, tmp_path: Path) -> None:
    kinds.pipeline("sd2").vae.save_pretrained(tmp_path / "vae")
    few = {"num_unlabeled": 2, "num_mixed_in": 0, "num_positive": 2, "num_keep": 0, "concept": "seven"}
    command = ["render", *flags(kinds.options("sd1", "folder") | few)]
    assert main(command) == 0
    assert main([*command, "--vae", str(tmp_path / "vae")]) == 2


def test_a_run_of_before_the_vae_was_recorded(kinds: Kinds) -> None:
    record = loaded(kinds, "sd1").describe()
    assert load_recorded_base({k: v for k, v in record.items() if k != "vae_sha256"}, device="cpu").kind == "sd1"


def test_a_lora_of_sdxl_changes_images_after_loading(kinds: Kinds, tmp_path: Path) -> None:
    base = loaded(kinds, "sdxl")
    before = pixels(generate_images(base, PROMPTS, SEEDS, FEW))
    student = make_student(base, Weights(rank=2), 0, needs_teacher=False)
    with torch.no_grad():
        for parameter in student.trainable():
            parameter.normal_()
    trained = pixels(generate_images(base, PROMPTS, SEEDS, FEW))
    student.save(tmp_path)
    fresh = loaded(kinds, "sdxl")
    with apply_run(fresh, tmp_path):
        applied = pixels(generate_images(fresh, PROMPTS, SEEDS, FEW))
    # apply_run adds the change to the weights, which rounds differently: single pixels may move by a few levels
    assert distance(applied, trained) < 0.01 * distance(before, trained)
    assert np.array_equal(pixels(generate_images(fresh, PROMPTS, SEEDS, FEW)), before)
    assert not np.array_equal(before, trained)


def test_both_text_encoders_of_sdxl_go_once_captions_are_cached(kinds: Kinds) -> None:
    base = loaded(kinds, "sdxl")
    unused: Any = None
    assert setup._make_generator(TrainConfig(validation_steps=0), base, unused, unused) is None
    assert base.pipeline.text_encoder is base.pipeline.text_encoder_2 is base.pipeline.vae is None


def test_every_cell_of_the_documented_table_is_a_test() -> None:
    page = (Path(__file__).parents[2] / "docs" / "tested.md").read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+)\[(\w+)-(\w+)\]`", page)
    assert sorted(named) == sorted(
        (test.__name__, kind, form)
        for test in (test_render, test_train, test_evaluate, test_export)
        for kind in KINDS
        for form in FORMS
    )


# -- schedulers --


def test_latents_are_not_clipped_if_the_scheduler_is_not_ddim(kinds: Kinds, tmp_path: Path) -> None:
    folder = shutil.copytree(kinds.folder("sdxl"), tmp_path / "euler")
    shared = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")
    ddim = read_json(folder / "scheduler" / "scheduler_config.json")
    euler = {"_class_name": "EulerDiscreteScheduler"} | {key: ddim[key] for key in shared}
    index = read_json(folder / "model_index.json")
    write_json(folder / "model_index.json", index | {"scheduler": ["diffusers", "EulerDiscreteScheduler"]})
    for stated in ({}, {"steps_offset": 0}):
        write_json(folder / "scheduler" / "scheduler_config.json", euler | stated)
        base = load_base(Source(str(folder)), device="cpu")
        config = base.pipeline.scheduler.config
        assert (config.clip_sample, config.set_alpha_to_one) == (False, False)
        assert config.steps_offset == stated.get("steps_offset", 1)
        if not stated:
            same = generate_images(base, PROMPTS, SEEDS, FEW)
    assert np.array_equal(pixels(same), pixels(generate_images(loaded(kinds, "sdxl"), PROMPTS, SEEDS, FEW)))
