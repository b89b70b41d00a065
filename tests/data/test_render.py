"""Prompts -> two folders of images: resumable to the byte, known beta, manifest last."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import CONCEPT_FILE, tree
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image
from safetensors.torch import load_file, save_file

from sd_unlearn.config.base import RenderConfig
from sd_unlearn.data import plan, render, render_job
from sd_unlearn.data.concept import Concept, expand_braces
from sd_unlearn.data.find_concept import load_concept, read_concept
from sd_unlearn.errors import UnlearnError, UsageError
from sd_unlearn.io.images import is_intact
from sd_unlearn.io.lock import locked
from sd_unlearn.io.reading import read_json, read_jsonl
from sd_unlearn.io.run_folder import DATA_MANIFEST, METADATA, POSITIVE, UNLABELED
from sd_unlearn.models import sampling
from sd_unlearn.models.base import Base, load_base
from sd_unlearn.models.find_base import find_base
from sd_unlearn.models.source import Source
from sd_unlearn.seeds import RENDER_SEEDS

pytestmark = pytest.mark.usefixtures("one_thread")
IMAGES = 4 + 1 + 4 + 4  # generic, mixed in, the keep line's two prompts, positive
Config = Callable[..., RenderConfig]


@pytest.fixture
def config(tiny_base: Path, concept_file: Path, tmp_path: Path) -> Config:
    """A quick rendering of the test concept, by default into tmp_path/data."""

    def make(**changes: object) -> RenderConfig:
        settings = {
            "concept": str(concept_file),
            "pretrained_model_name_or_path": str(tiny_base),
            "data_dir": tmp_path / "data",
            "num_inference_steps": 2,
            "render_batch_size": 3,
        }
        return RenderConfig(**(settings | changes))  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="module")
def rendered(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted rendering, made once; tests must not change it."""
    folder = tmp_path_factory.mktemp("rendered")
    (folder / "brad.yaml").write_text(CONCEPT_FILE)
    return render.run(
        RenderConfig(
            concept=str(folder / "brad.yaml"),
            pretrained_model_name_or_path=str(tiny_base),
            data_dir=folder / "data",
            num_inference_steps=2,
            render_batch_size=3,
        )
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_folders_follow_the_imagefolder_convention(rendered: Path) -> None:
    assert sorted(p.name for p in rendered.iterdir()) == [
        UNLABELED,
        POSITIVE,
        DATA_MANIFEST,
        "settings.json",
    ]
    seen = []
    for sub in (UNLABELED, POSITIVE):
        lines = read_jsonl(rendered / sub / METADATA)
        pictures = {p.name for p in (rendered / sub).iterdir()} - {METADATA}
        names = [line["file_name"] for line in lines]
        assert len(set(names)) == len(names)
        assert set(names) == pictures
        assert all({"file_name", "text", "seed", "guidance_scale", "steps", "group"} == set(line) for line in lines)
        seen += lines
    for picture in rendered.glob("*/*.png"):
        with Image.open(picture) as image:
            assert (image.format, image.mode, image.size) == ("PNG", "RGB", (32, 32))
    assert Counter((line["group"], line["text"]) for line in seen) == {
        ("generic", "a photo of a man"): 4,
        ("mixed_in", "a photo of Brad Pitt"): 1,
        ("keep", "a photo of a dog"): 2,
        ("keep", "a photo of a cat"): 2,
        ("positive", "a photo of Brad Pitt"): 4,
    }
    assert len({line["seed"] for line in seen}) == IMAGES
    assert all(RENDER_SEEDS[0] <= line["seed"] < RENDER_SEEDS[1] for line in seen)
    assert len({p.read_bytes() for p in rendered.glob("*/*.png")}) == IMAGES


def test_manifest_records_the_origin_of_the_images(rendered: Path, tiny_base: Path) -> None:
    manifest = read_json(rendered / DATA_MANIFEST)
    assert manifest["counts"] == {"generic": 4, "mixed_in": 1, "keep": 4, "positive": 4}
    assert manifest["base"] == load_base(str(tiny_base), device="cpu").describe()
    assert manifest["base"]["resolution"] == 32
    assert manifest["seeds"]["render"] == list(RENDER_SEEDS)
    assert manifest["sampler"] == {"name": "DDIM", "steps": 2, "guidance_scale": 7.5}


def test_image_is_reproduced_from_its_metadata_line(rendered: Path, loaded_base: Base) -> None:
    """The recorded prompt, seed, steps and guidance reproduce it (rounding differs with the batch)."""
    import numpy as np
    import torch

    line = read_jsonl(rendered / UNLABELED / METADATA)[5]
    again = loaded_base.pipeline(
        line["text"],
        num_inference_steps=line["steps"],
        guidance_scale=line["guidance_scale"],
        generator=torch.Generator("cpu").manual_seed(line["seed"]),
    ).images[0]
    with Image.open(rendered / UNLABELED / line["file_name"]) as image:
        off = np.abs(np.asarray(image, dtype=int) - np.asarray(again, dtype=int))
    assert off.max() <= 1


def test_beta_of_the_paper_setting() -> None:
    concept = load_concept("Brad Pitt")
    groups = render_job.plan_images(concept, RenderConfig())
    assert groups[0] == ("generic", "a photo of a middle aged man", 64)
    assert groups[1] == ("mixed_in", "a photo of Brad Pitt", 16)
    assert groups[-1] == ("positive", "a photo of Brad Pitt", 20)
    kept = sum(count for group, _, count in groups if group == "keep")
    assert kept == concept.images.keep * len(concept.keep)
    assert (
        render_job.known_beta(concept.generic_share, {"generic": 64, "mixed_in": 16, "keep": kept, "positive": 20})
        == 0.2
    )


@pytest.mark.parametrize(
    ("share", "generic", "mixed_in", "beta"),
    [(0.0, 64, 0, None), (0.1, 400, 0, 0.1), (0.2, 300, 100, 0.4), (0.0, 0, 5, None), (0.5, 1, 1, 0.75)],
)
def test_beta_from_shares(share: float, generic: int, mixed_in: int, beta: float | None) -> None:
    assert render_job.known_beta(share, {"generic": generic, "mixed_in": mixed_in, "keep": 99, "positive": 7}) == beta


def test_options_override_the_concept_file(concept: Concept) -> None:
    groups = render_job.plan_images(concept, RenderConfig(num_unlabeled=9, num_mixed_in=0, num_keep=0, num_positive=3))
    assert [count for _, _, count in groups] == [9, 0, 0, 0, 3]
    for wrong in (
        {"num_positive": 0},
        {"num_unlabeled": 0, "num_mixed_in": 0},
        {"num_keep": -1},
        {"num_keep": 999_999},  # of each keep prompt: too many together
        {"num_positive": 10**11},
    ):
        with pytest.raises(UsageError, match="--num_"):
            render_job.plan_images(concept, RenderConfig(**wrong))


@pytest.mark.parametrize(
    ("line", "count", "shares"),
    [
        ("a {cat,dog,cow}", 6, {"a cat": 2, "a dog": 2, "a cow": 2}),
        ("a {cat,dog,cow}", 8, {"a cat": 3, "a dog": 3, "a cow": 2}),
        ("a {cat,dog,cow}", 2, {"a cat": 1, "a dog": 1, "a cow": 0}),
        ("a {cat,dog,cow}", 0, {"a cat": 0, "a dog": 0, "a cow": 0}),
        ("a cat", 5, {"a cat": 5}),
        ("{a,the} {cat,dog}", 5, {"a cat": 2, "a dog": 1, "the cat": 1, "the dog": 1}),
    ],
)
def test_keep_line_is_split_evenly_over_its_alternatives(line: str, count: int, shares: dict[str, int]) -> None:
    groups = render_job._split_evenly(line, count)
    assert groups == [("keep", prompt, share) for prompt, share in shares.items()]
    assert sum(group.images for group in groups) == count


@pytest.mark.parametrize("asked", [None, 0, 1, 7, 40])
@pytest.mark.parametrize("name", ["seven", "red ink", "Brad Pitt"])
def test_every_keep_line_has_the_same_weight(name: str, asked: int | None) -> None:
    concept = load_concept(name)
    kept = [
        (prompt, n)
        for group, prompt, n in render_job.plan_images(concept, RenderConfig(num_keep=asked))
        if group == "keep"
    ]
    assert [prompt for prompt, _ in kept] == [prompt.text for prompt in concept.keep_prompts]
    left = iter(kept)
    for line in concept.keep:
        shares = [next(left)[1] for _ in expand_braces([line])]
        assert sum(shares) == (concept.images.keep if asked is None else asked)
        assert max(shares) - min(shares) <= 1


def test_keep_prompts_without_images_are_named(concept: Concept) -> None:
    few, none, enough = (render_job.plan_images(concept, RenderConfig(num_keep=images)) for images in (1, 0, 2))
    (line,) = render_job.describe_without_images(few)
    assert line.startswith('Warning: 1 of 2 keep prompts get no image, e.g. "a photo of a cat", and are not retained.')
    assert render_job.describe_without_images(none) == render_job.describe_without_images(enough) == []


def test_a_concept_that_is_replaced_with_itself_is_rendered_with_a_warning(
    config: Config, concept_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    concept_file.write_text(
        concept_file.read_text().replace("generic: a photo of a man", "generic: A photo of Brad Pitt")
    )
    render.run(config(num_unlabeled=1, num_keep=1, num_positive=1))
    err = capsys.readouterr().err
    assert 'Warning: caption and generic prompt of Brad Pitt are both "a photo of Brad Pitt".' in err
    assert "1 of 2 keep prompts get no image" in err


@pytest.mark.parametrize("saved", [0, 1, 4, IMAGES - 1])
def test_interrupted_and_resumed_equals_uninterrupted(
    rendered: Path, config: Config, monkeypatch: pytest.MonkeyPatch, saved: int
) -> None:
    left, save = [saved], sampling.save_image

    def until_interrupted(image: Image.Image, path: Path) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        save(image, path)

    monkeypatch.setattr(sampling, "save_image", until_interrupted)
    with pytest.raises(KeyboardInterrupt):
        render.run(config())
    folder = config().data_dir
    assert folder is not None
    assert len(list(folder.glob("*/*.png"))) == saved
    assert not (folder / DATA_MANIFEST).exists()
    monkeypatch.setattr(sampling, "save_image", save)
    render.run(config())
    assert contents(folder) == contents(rendered)


@pytest.mark.parametrize("lost", [["0_unlabeled/generic-00001.png"], ["1_positive/positive-00003.png", "0_unlabeled"]])
def test_deleted_images_are_rendered_again_identically(
    rendered: Path, config: Config, tmp_path: Path, lost: list[str]
) -> None:
    folder = shutil.copytree(rendered, tmp_path / "data")
    for name in lost:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = contents(folder)
    kept = {p: p.stat().st_mtime_ns for p in folder.glob("*/*.png")}
    render.run(config())
    assert contents(folder) == contents(rendered) != before
    assert all(p.stat().st_mtime_ns == time for p, time in kept.items())  # what was there was not drawn over


def test_a_missing_image_is_rendered_without_undoing_what_the_user_changed(
    rendered: Path, config: Config, tmp_path: Path
) -> None:
    """Removed images stay removed, and edited captions are kept."""
    folder = shutil.copytree(rendered, tmp_path / "data")
    metadata = folder / UNLABELED / METADATA
    lines = [line for line in metadata.read_text().splitlines() if "mixed_in" not in line]
    metadata.write_text("\n".join(lines).replace("a photo of a dog", "a photo of my dog"))
    (folder / UNLABELED / "mixed_in-00000.png").unlink()
    before = contents(folder)
    for lost in ("generic-00001.png", "keep-00000.png"):
        (folder / UNLABELED / lost).unlink()
    render.run(config())
    after = contents(folder)
    assert read_json(folder / DATA_MANIFEST)["counts"] == {"generic": 4, "keep": 4, "positive": 4}
    assert {k: v for k, v in after.items() if k != DATA_MANIFEST} == {
        k: v for k, v in before.items() if k != DATA_MANIFEST
    }


def test_a_damaged_image_of_a_complete_folder_is_rendered_again(rendered: Path, config: Config, tmp_path: Path) -> None:
    """Also if only its middle is damaged, so that its size and its end are right."""
    folder = shutil.copytree(rendered, tmp_path / "data")
    before = contents(folder)
    image = next((folder / POSITIVE).glob("*.png"))
    data = bytearray(image.read_bytes())
    data[len(data) // 2] ^= 255
    image.write_bytes(data)
    render.run(config())
    assert contents(folder) == before


def test_a_complete_folder_needs_no_model(rendered: Path, config: Config, tmp_path: Path) -> None:
    folder = shutil.copytree(rendered, tmp_path / "data")

    def no_base() -> Base:
        raise AssertionError("loaded")

    concept = read_concept(Path(str(config().concept)))
    job = render_job.make_job(concept, config(), find_base(config()))
    assert render.render_concept(job, no_base) == folder
    (folder / UNLABELED / "generic-00000.png").unlink()
    with pytest.raises(AssertionError, match="loaded"):
        render.render_concept(job, no_base)


@pytest.mark.parametrize("by", ["render", "train"])
def test_each_image_of_a_complete_folder_is_read_once(
    rendered: Path, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    shutil.copytree(rendered, tmp_path / "data")
    read: list[Path] = []
    monkeypatch.setattr(render, "is_intact", lambda path: read.append(path) or is_intact(path))
    if by == "render":
        render.run(config())
    else:
        concept = read_concept(Path(str(config().concept)))
        render.render_locked(render_job.make_job(concept, config(), find_base(config())), pytest.fail)
    assert len(read) == len(set(read)) == IMAGES


def test_the_manifest_is_written_last(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    order, rename = [], Path.replace

    def watched(self: Path, target: Path) -> Path:
        order.append(Path(target).name)
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    render.run(config())
    assert len(order) == IMAGES + 4  # settings first, two metadata files, the manifest
    assert order[-1] == DATA_MANIFEST
    assert order[-3:-1] == [METADATA, METADATA]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "--seed 0 then, 1 now"),
        ({"num_inference_steps": 3}, "--num_inference_steps 2 then, 3 now"),
        ({"guidance_scale": 2.0}, "--guidance_scale 7.5 then, 2.0 now"),
        ({"num_keep": 2}, "keep images (--num_keep) 4 then, 2 now"),
        ({"num_unlabeled": 5}, "--num_unlabeled 4 then, 5 now"),
        ({"num_mixed_in": 0, "seed": 2}, "--seed 0 then, 2 now; --num_mixed_in 1 then, 0 now"),
        ({"resolution": 64}, "--resolution default then, 64 now"),
    ],
)
def test_same_folder_with_other_settings_is_refused_by_name(
    rendered: Path, config: Config, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    folder = shutil.copytree(rendered, tmp_path / "data")
    with pytest.raises(UsageError) as caught:
        render.run(config(**change))
    assert str(caught.value).startswith(f"--data_dir {folder} was rendered with other settings: {message}. Repeat ")
    assert contents(folder) == contents(rendered)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("a photo of a man", "a picture of a man", 'generic prompts "a photo of a man" then, "a picture of a man" now'),
        ("{a dog,a cat}", "{a dog,a cow}", 'keep prompts "a photo of a cat" then, "a photo of a cow" now'),
        ("{a dog,a cat}", "{a dog,a cat,a cow,a hen}", 'keep prompts not used then, "a photo of a cow" and 1 more now'),
    ],
)
def test_other_prompts_are_refused_by_name(
    rendered: Path, config: Config, concept_file: Path, tmp_path: Path, old: str, new: str, message: str
) -> None:
    shutil.copytree(rendered, tmp_path / "data")
    concept_file.write_text(concept_file.read_text().replace(old, new))
    with pytest.raises(UsageError) as caught:
        render.run(config())
    assert f"other settings: {message}. " in str(caught.value)


def test_another_batch_size_uses_the_same_images(rendered: Path, config: Config, tmp_path: Path) -> None:
    folder = shutil.copytree(rendered, tmp_path / "data")
    assert render.run(config(render_batch_size=2)) == folder
    assert contents(folder) == contents(rendered)


def test_another_seed_gives_other_images(rendered: Path, config: Config) -> None:
    other = render.run(config(seed=1))
    pictures = {p.read_bytes() for p in rendered.glob("*/*.png")}
    assert not pictures & {p.read_bytes() for p in other.glob("*/*.png")}


def test_two_processes_together_render_everything(
    rendered: Path, loaded_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [(sub, line) for sub in (UNLABELED, POSITIVE) for line in read_jsonl(rendered / sub / METADATA)]
    requests = [sampling.ImageRequest(tmp_path / sub / r["file_name"], r["text"], r["seed"]) for sub, r in lines]
    sampler, drawn = sampling.Sampler(2, 7.5, 3), []
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        drawn.append(sampling.generate_missing(lambda: loaded_base, requests, sampler, "test"))
    assert sum(drawn) == IMAGES
    assert min(drawn) > 0
    pictures = {name: data for name, data in contents(rendered).items() if name.endswith(".png")}
    assert {k: v for k, v in contents(tmp_path).items() if k in pictures} == pictures


def test_processes_with_different_batch_sizes_share_the_images(
    rendered: Path, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each chooses how many images at once fit into its own memory. No image is left out, or rendered twice."""
    sizes = iter((1, 3))
    monkeypatch.setattr(plan, "planned_sampler", lambda _, sampler, __: replace(sampler, batch_size=next(sizes)))
    monkeypatch.setattr(render, "wait_for_images", lambda _: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    counts = []
    for rank in "10":
        monkeypatch.setenv("RANK", rank)
        before = len(list(tmp_path.glob("data/*/*.png")))
        render.run(config())
        counts.append(len(list(tmp_path.glob("data/*/*.png"))) - before)
    assert counts == [6, 7]
    assert tree(tmp_path / "data") == tree(rendered)


def test_another_resolution(config: Config) -> None:
    folder = render.run(config(resolution=64, num_unlabeled=1, num_keep=0, num_positive=1))
    with Image.open(folder / POSITIVE / "positive-00000.png") as image:
        assert image.size == (64, 64)


@pytest.mark.parametrize(
    "name", [f"{UNLABELED}/me.png", f"{POSITIVE}/{METADATA}", "settings.json", DATA_MANIFEST, f"{POSITIVE}/me.heic"]
)
def test_folders_of_own_images_are_not_rendered_into(config: Config, tmp_path: Path, name: str) -> None:
    path = tmp_path / "data" / name
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    with pytest.raises(UsageError, match=r"--data_dir .* holds .*, which sd-unlearn did not render"):
        render.run(config())
    assert contents(tmp_path / "data") == {name: b"{}"}


def test_a_folder_in_use_is_refused_unless_it_is_complete(rendered: Path, config: Config, tmp_path: Path) -> None:
    folder = shutil.copytree(rendered, tmp_path / "data")
    with locked(folder, "--data_dir"):
        assert render.run(config()) == folder
        (folder / UNLABELED / "generic-00000.png").unlink()
        with pytest.raises(UnlearnError, match="--data_dir .* is in use by process"):
            render.run(config())


def test_failed_load_leaves_no_files(config: Config, tiny_base: Path, tmp_path: Path) -> None:
    """A folder left behind would refuse the very command that the error message proposes."""
    hollow = shutil.copytree(tiny_base, tmp_path / "hollow")
    shutil.rmtree(hollow / "unet")
    before = tree(tmp_path)
    with pytest.raises(UnlearnError, match=f"--pretrained_model_name_or_path {hollow}"):
        render.run(config(pretrained_model_name_or_path=str(hollow)))
    assert tree(tmp_path) == before
    render.run(config())


def test_a_base_that_is_not_found_is_looked_for_once(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine without a network each attempt takes half a minute."""
    asked: list[str] = []

    def download(name: str, file: str, subfolder: str) -> str:
        asked.append(f"{name}/{subfolder}/{file}")
        raise LocalEntryNotFoundError("cannot reach the Hub")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr(render, "load_base", lambda *_: pytest.fail("loaded"))
    with pytest.raises(UnlearnError, match="models/mine: there is no such local folder or file, and it was not found"):
        render.run(config(pretrained_model_name_or_path="models/mine", render_batch_size=None))
    assert asked == ["models/mine/unet/config.json"]


def test_the_precision_is_accelerates_and_full_on_a_cpu(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def load(source: Source, precision: str) -> Base:
        asked.append(precision)
        raise UnlearnError("loaded")

    monkeypatch.setattr(render, "load_base", load)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    for has_gpu in (True, False):
        monkeypatch.setattr("torch.cuda.is_available", lambda has_gpu=has_gpu: has_gpu)
        for option in (None, "fp16"):
            with pytest.raises(UnlearnError, match="loaded"):
                render.run(config(mixed_precision=option))
    assert asked == ["bf16", "fp16", "no", "no"]
    assert "No CUDA device: computing in full precision on the CPU instead of fp16." in capsys.readouterr().err


def test_unwritable_folder_is_named_with_its_option(config: Config, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for place in ("file", "file/deeper"):
        with pytest.raises(UnlearnError, match=f"--data_dir {tmp_path / place}") as caught:
            render.run(config(data_dir=tmp_path / place))
        assert "--output_dir" not in str(caught.value)  # render has none


def test_metadata_is_readable_json_without_escapes(rendered: Path) -> None:
    text = (rendered / POSITIVE / METADATA).read_text(encoding="utf-8")
    assert [json.loads(line)["group"] for line in text.splitlines()] == ["positive"] * 4
    assert "\\u" not in text


def changed_base(tiny_base: Path, target: Path, part: str, name: str, value: float) -> str:
    """A copy of the tiny base with one weight set to a value. name: how the weight's name ends."""
    shutil.copytree(tiny_base, target)
    (file,) = (target / part).glob("*.safetensors")
    weights = load_file(file)
    next(weight for key, weight in weights.items() if key.endswith(name)).fill_(value)
    save_file(weights, file, {"format": "pt"})
    return str(target)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("part", "name"), [("vae", "decoder.conv_in.bias"), ("unet", "conv_in.bias")])
def test_base_with_a_weight_that_is_not_finite_is_refused_by_name(
    config: Config, tiny_base: Path, tmp_path: Path, part: str, name: str, value: float
) -> None:
    base = changed_base(tiny_base, tmp_path / "broken", part, name, value)
    with pytest.raises(UnlearnError, match=f'"{name}" of its {part} is not finite'):
        render.run(config(pretrained_model_name_or_path=base))
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("part", "name", "network"), [("vae", "decoder.conv_norm_out.weight", "VAE"), ("unet", "conv_out.bias", "UNet")]
)
def test_images_that_are_not_finite_are_refused_instead_of_saved_black(
    config: Config, tiny_base: Path, tmp_path: Path, part: str, name: str, network: str
) -> None:
    """The weights are finite, but what they compute overflows."""
    base = changed_base(tiny_base, tmp_path / "broken", part, name, 3e38)
    with pytest.raises(UnlearnError, match=f"The {network} of .* not finite"):
        render.run(config(pretrained_model_name_or_path=base))
    assert not list((tmp_path / "data").rglob("*.png"))


@pytest.mark.parametrize(
    ("part", "which", "name"),
    [
        ("vae", "VAE", "decoder.conv_in.bias"),
        ("unet", "UNet", "conv_in.bias"),
        ("text_encoder", "text encoder", "final_layer_norm.bias"),
    ],
)
def test_images_of_other_weights_under_the_same_name_are_refused(
    rendered: Path, config: Config, tiny_base: Path, tmp_path: Path, part: str, which: str, name: str
) -> None:
    """The base was replaced in place: a complete folder is not trained on, an unfinished one is not completed."""
    base_folder, data = tmp_path / "base", tmp_path / "data"
    shutil.copytree(tiny_base, base_folder)
    options = config(pretrained_model_name_or_path=str(base_folder))
    render.run(options)
    render.check_same_base(data, load_base(str(base_folder), device="cpu"))
    shutil.rmtree(base_folder)
    changed_base(tiny_base, base_folder, part, name, 0.5)
    replaced = load_base(str(base_folder), device="cpu")
    with pytest.raises(UsageError, match=f"the weights of its {which} differ .* Delete the folder"):
        render.check_same_base(data, replaced)
    (data / DATA_MANIFEST).unlink()
    next(data.rglob("*.png")).unlink()
    with pytest.raises(UsageError, match=f"the weights of its {which} differ"):
        render.run(options)


def test_a_moved_base_is_compared_by_its_weights(
    config: Config, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(tiny_base, old)
    folder = render.run(config(pretrained_model_name_or_path=str(old)))
    images = {name: data for name, data in contents(folder).items() if name.endswith((".png", ".jsonl"))}
    shutil.copytree(old, new)
    with pytest.raises(UsageError, match=f"--pretrained_model_name_or_path {old} then, {new} now"):
        render.run(config(pretrained_model_name_or_path=str(new)))  # both exist
    shutil.rmtree(old)
    render.run(config(pretrained_model_name_or_path=str(new)))
    assert {name: contents(folder)[name] for name in images} == images
    assert "Rendered 0 of 13 images" in capsys.readouterr().err
    assert read_json(folder / "settings.json")["base"] == str(new)
    shutil.rmtree(new)
    other = changed_base(tiny_base, tmp_path / "other", "unet", "conv_in.bias", 0.5)
    with pytest.raises(UsageError, match="the weights of its UNet differ"):
        render.run(config(pretrained_model_name_or_path=other))


def test_base_has_the_same_hash_in_every_precision(tiny_base: Path) -> None:
    bases = [load_base(str(tiny_base), precision, "cpu") for precision in ("no", "fp16", "bf16")]
    assert bases[0].hashes == bases[1].hashes == bases[2].hashes
    assert len(set(bases[0].hashes.values())) == 3


@pytest.mark.parametrize("rank", ["0", "1"])
def test_one_process_prints_the_plan(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    render.run(config(dry_run=True))
    assert ("Plan: render" in capsys.readouterr().out) == (rank == "0")
