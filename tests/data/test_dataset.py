"""Folders -> examples -> latents, and what is refused before a model loads."""

from __future__ import annotations

import dataclasses
import io
import json
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from sd_unlearn.data import encoding
from sd_unlearn.data.concept import Concept
from sd_unlearn.data.dataset import fingerprint, has_negatives, positive_sets, scan, split_beta
from sd_unlearn.data.encoding import encode_captions, encode_each, encode_images, load_pixels
from sd_unlearn.errors import UsageError
from sd_unlearn.io.run_folder import METADATA, NEGATIVE, POSITIVE, UNLABELED
from sd_unlearn.models.base import Base

pytestmark = pytest.mark.usefixtures("one_thread")
Photos = Callable[..., Path]
GENERIC, CAPTION, KEEP = "a photo of a man", "a photo of Brad Pitt", ("a photo of a dog", "a photo of a cat")


def write_metadata(place: Path, lines: list[dict[str, object]]) -> None:
    (place / METADATA).write_text("".join(json.dumps(line) + "\n" for line in lines))


def refusal(folder: Path, concept: Concept) -> str:
    with pytest.raises(UsageError) as caught:
        scan(folder, concept)
    message = str(caught.value)
    assert "--data_dir" in message
    assert "\n" not in message
    return message


# -- folders of one's own pictures --


def test_own_photos_need_no_metadata(photos: Photos, concept: Concept) -> None:
    folder = photos(unlabeled=3, positive=2)
    found = [(e.path.parent.name, e.caption, e.group, e.is_positive) for e in scan(folder, concept)]
    assert found == [(UNLABELED, GENERIC, "generic", False)] * 3 + [(POSITIVE, CAPTION, "positive", True)] * 2


def test_captions_and_groups_come_from_metadata_where_it_has_them(photos: Photos, concept: Concept) -> None:
    folder = photos(unlabeled=3, positive=2)
    lines = [{"file_name": "0.png", "text": "a dog", "group": "keep"}, {"file_name": "2.png", "text": ""}]
    write_metadata(folder / UNLABELED, lines)
    write_metadata(folder / POSITIVE, [{"file_name": "1.png", "text": "Brad"}])
    found = [(e.caption, e.group) for e in scan(folder, concept)]
    assert found == [
        ("a dog", "keep"),
        (GENERIC, "generic"),
        ("", "generic"),
        (CAPTION, "positive"),
        ("Brad", "positive"),
    ]


def test_the_folder_decides_which_images_are_positive(photos: Photos, concept: Concept) -> None:
    """Positives hidden in 0_unlabeled by copying them there, line and all, must stay unlabeled."""
    folder = photos()
    write_metadata(folder / UNLABELED, [{"file_name": "0.png", "text": CAPTION, "group": "positive"}])
    write_metadata(folder / POSITIVE, [{"file_name": "0.png", "text": CAPTION, "group": "keep"}])
    assert [e.is_positive for e in scan(folder, concept)] == [False] * 3 + [True] * 2


def test_only_images_are_read_with_suffixes_in_any_case(photos: Photos, concept: Concept) -> None:
    folder = photos(unlabeled=2)
    (folder / UNLABELED / "0.png").rename(folder / UNLABELED / "0.PNG")
    Image.new("L", (9, 5)).save(folder / UNLABELED / "grey.JPEG")
    (folder / UNLABELED / "notes.txt").write_text("not a picture")
    assert [e.path.name for e in scan(folder, concept)[:3]] == ["0.PNG", "1.png", "grey.JPEG"]


@pytest.mark.parametrize("sub", [UNLABELED, POSITIVE])
def test_empty_image_file_is_named(photos: Photos, concept: Concept, sub: str) -> None:
    folder = photos()
    (folder / sub / "1.png").write_bytes(b"")
    message = refusal(folder, concept)
    assert str(folder / sub / "1.png") in message
    assert "empty (0 bytes)" in message


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp"])
def test_truncated_image_is_named(photos: Photos, concept: Concept, suffix: str) -> None:
    folder = photos()
    path, whole = folder / POSITIVE / f"cut.{suffix}", io.BytesIO()
    noise = torch.randint(0, 256, (24, 24, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.frombytes("RGB", (24, 24), noise.numpy().tobytes()).save(whole, {"jpg": "jpeg"}.get(suffix, suffix))
    data = whole.getvalue()
    for cut in sorted({*range(1, 90), len(data) // 2, len(data) - 40}):
        path.write_bytes(data[:cut])
        assert f"{path} cannot be read" in refusal(folder, concept)
    path.write_bytes(data)
    assert len(scan(folder, concept)) == 6


def test_other_content_with_an_image_suffix_is_named(photos: Photos, concept: Concept) -> None:
    folder = photos()
    (folder / UNLABELED / "page.jpg").write_text("<html>404</html>")
    assert "page.jpg" in refusal(folder, concept)
    (folder / UNLABELED / "page.jpg").unlink()
    (folder / UNLABELED / "album.png").mkdir()
    assert "album.png" in refusal(folder, concept)


@pytest.mark.parametrize(("unlabeled", "positive", "short"), [(0, 2, UNLABELED), (1, 2, UNLABELED), (2, 1, POSITIVE)])
def test_too_few_images(photos: Photos, concept: Concept, unlabeled: int, positive: int, short: str) -> None:
    folder = photos(unlabeled, positive)
    message = refusal(folder, concept)
    assert f"{folder / short} holds {min(unlabeled, positive)} images" in message


def test_missing_folders(tmp_path: Path, photos: Photos, concept: Concept) -> None:
    assert UNLABELED in refusal(tmp_path / "nowhere", concept)
    folder = photos()
    for path in (folder / POSITIVE).iterdir():
        path.unlink()
    (folder / POSITIVE).rmdir()
    assert POSITIVE in refusal(folder, concept)


def add_folder(folder: Path, name: str, count: int, red: int) -> Path:
    place = folder / name
    place.mkdir()
    for i in range(count):
        Image.new("RGB", (40, 32), (red, 20 * i, 0)).save(place / f"{i}.png")
    return place


def test_negatives(photos: Photos, concept: Concept) -> None:
    folder = photos(unlabeled=3, positive=2)
    before = scan(folder, concept)
    assert not has_negatives(folder, 0.5)
    place = add_folder(folder, NEGATIVE, 3, 90)
    lines = [{"file_name": "0.png", "text": "Tom", "group": "keep"}, {"file_name": "1.png", "text": "a man at sea"}]
    write_metadata(place, lines)
    write_metadata(folder / UNLABELED, [{"file_name": "0.png", "text": "a man at sea", "group": "negative"}])
    found = scan(folder, concept)
    assert [e.caption for e in found if e.is_negative] == ["Tom", "a man at sea", GENERIC]
    assert [e.path.parent.name for e in found if e.is_negative] == [NEGATIVE] * 3  # the folder decides
    assert [e.is_positive for e in found] == [e.is_positive for e in before] + [False] * 3
    (place / "1.png").write_bytes(b"")
    assert str(place / "1.png") in refusal(folder, concept)
    assert len(scan(folder, concept, eta=0)) == len(before)  # at weight zero they are not even read
    assert has_negatives(folder, 0.5)
    assert not has_negatives(folder, 0.0)


def test_too_few_negatives(photos: Photos, concept: Concept) -> None:
    folder = photos()
    assert f"{add_folder(folder, NEGATIVE, 1, 90)} holds 1 images" in refusal(folder, concept)


def test_several_sets_of_positives(photos: Photos, concept: Concept) -> None:
    folder = photos(unlabeled=3, positive=2)
    assert positive_sets(folder) == [POSITIVE]
    write_metadata(add_folder(folder, f"{POSITIVE}_b", 3, 90), [{"file_name": "1.png", "text": "Brad"}])
    add_folder(folder, f"{POSITIVE}_a", 2, 200)
    (folder / f"{POSITIVE}.txt").write_text("no folder")
    assert positive_sets(folder) == [POSITIVE, f"{POSITIVE}_a", f"{POSITIVE}_b"]
    found = [(e.path.parent.name, e.caption, e.positive_set) for e in scan(folder, concept) if e.is_positive]
    assert found == [
        *[(POSITIVE, CAPTION, 0)] * 2,
        *[(f"{POSITIVE}_a", CAPTION, 1)] * 2,
        (f"{POSITIVE}_b", CAPTION, 2),
        (f"{POSITIVE}_b", "Brad", 2),
        (f"{POSITIVE}_b", CAPTION, 2),
    ]


def test_the_betas_of_several_sets(concept: Concept) -> None:
    sets = [POSITIVE, f"{POSITIVE}_2"]
    told = dataclasses.replace(concept, betas={f"{POSITIVE}_2": 0.1, POSITIVE: 0.3})
    assert split_beta(concept, sets, 0.3, "option") == ([0.15, 0.15], "option")
    assert split_beta(concept, sets[:1], 0.3, "manifest") == ([0.3], "manifest")
    assert split_beta(told, sets, 0.1, "assumed") == ([0.3, 0.1], "concept")
    for asked in ("option", "estimated"):  # the total is the command's
        betas, source = split_beta(told, sets, 0.2, asked)
        assert betas == pytest.approx([0.15, 0.05])
        assert source == asked


def test_betas_for_other_sets_are_refused(photos: Photos, concept: Concept) -> None:
    folder = photos()
    told = dataclasses.replace(concept, betas={f"{POSITIVE}_2": 0.1, POSITIVE: 0.3})
    assert "holds the sets 1_positive, but the concept file has betas for 1_positive, 1_pos" in refusal(folder, told)
    add_folder(folder, f"{POSITIVE}_2", 2, 90)
    assert len(scan(folder, told)) == 7


@pytest.mark.parametrize("line", [{"file_name": "1.png"}, {"file_name": "1.png", "text": None}, {"text": "a"}, {}])
def test_line_without_caption_or_file_name_is_named(photos: Photos, concept: Concept, line: dict[str, object]) -> None:
    folder = photos()
    write_metadata(folder / POSITIVE, [{"file_name": "0.png", "text": "fine"}, line])
    assert f"{folder / POSITIVE / METADATA} line 2" in refusal(folder, concept)


def test_line_with_a_missing_file_is_named(photos: Photos, concept: Concept) -> None:
    folder = photos()
    write_metadata(folder / UNLABELED, [{"file_name": "gone.png", "text": "fine"}])
    message = refusal(folder, concept)
    assert f"{folder / UNLABELED / METADATA} line 1" in message
    assert "gone.png" in message


def test_blank_lines_count_in_line_numbers(photos: Photos, concept: Concept) -> None:
    folder = photos()
    (folder / UNLABELED / METADATA).write_text('\n\n{"file_name": "gone.png", "text": "x"}\n')
    assert "line 3" in refusal(folder, concept)


@pytest.mark.parametrize("content", [b"{", b"[]\n", b'{"file_name": "0.png", "text": "\xff"}\n'])
def test_damaged_metadata_is_named(photos: Photos, concept: Concept, content: bytes) -> None:
    folder = photos()
    (folder / UNLABELED / METADATA).write_bytes(content)
    assert str(folder / UNLABELED / METADATA) in refusal(folder, concept)


# -- pixels, latents, text --


def test_pixels_are_square_upright_and_in_range(tmp_path: Path) -> None:
    wide = Image.new("RGB", (60, 20), (255, 255, 255))
    wide.paste((0, 0, 0), (20, 0, 40, 20))  # the middle third is what a centre crop keeps
    wide.save(tmp_path / "wide.png")
    pixels = load_pixels(tmp_path / "wide.png", 16)
    assert pixels.shape == (3, 16, 16)
    assert pixels.dtype == torch.float32
    assert torch.equal(pixels[:, :, 2:-2], torch.full((3, 16, 12), -1.0))
    assert load_pixels(tmp_path / "wide.png", 20).max() <= 1

    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    halves = Image.new("RGB", (32, 32), (255, 0, 0))
    halves.paste((0, 0, 255), (0, 16, 32, 32))
    halves.save(tmp_path / "turned.png", exif=exif)
    red, _, blue = load_pixels(tmp_path / "turned.png", 32)
    assert red[:, 20:].min() > 0.9
    assert blue[:, :12].min() > 0.9


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    Image.new(mode, (8, 8)).save(path)
    pixels = load_pixels(path, 8)
    assert pixels.shape == (3, 8, 8)
    assert pixels.abs().max() <= 1


def test_latents_equal_the_vaes_and_are_cached(
    loaded_base: Base, photos: Photos, concept: Concept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = scan(photos(), concept)
    vae = loaded_base.pipeline.vae
    mean, std = encode_images(loaded_base, examples, 32, tmp_path / "cache")
    assert mean.shape == std.shape == (5, 4, 8, 8)
    posterior = vae.encode(torch.stack([load_pixels(e.path, 32) for e in examples])).latent_dist
    assert torch.allclose(mean, posterior.mean * vae.config.scaling_factor, atol=1e-6)
    assert torch.allclose(std, posterior.std * vae.config.scaling_factor, atol=1e-6)
    assert not mean.requires_grad
    assert not torch.allclose(mean[0], mean[4])

    (file,) = (tmp_path / "cache").iterdir()  # and no temporary file beside it
    monkeypatch.setattr(vae, "encode", None)  # a second time nothing is encoded
    again = encode_images(loaded_base, examples, 32, tmp_path / "cache")
    assert torch.equal(mean, again[0])
    assert torch.equal(std, again[1])
    assert file.suffix == ".safetensors"


def test_a_damaged_cache_file_is_replaced(loaded_base: Base, photos: Photos, concept: Concept, tmp_path: Path) -> None:
    examples = scan(photos(), concept)
    encoded = encode_images(loaded_base, examples, 32, tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    again = encode_images(loaded_base, examples, 32, tmp_path / "cache")
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(again, encoded, strict=True))
    assert file.read_bytes() == whole


def test_latents_of_a_channels_last_vae(tmp_path: Path, photos: Photos, concept: Concept, loaded_base: Base) -> None:
    """As convolutions of real size do by themselves on some machines."""
    examples = scan(photos(), concept)
    for i, example in enumerate(examples):  # of one colour only, normalisation would magnify the rounding
        Image.effect_noise((32, 32), 50 + i).convert("RGB").save(example.path)
    plain = encode_images(loaded_base, examples, 32, tmp_path / "cache")
    loaded_base.pipeline.vae.to(memory_format=torch.channels_last)
    got = encode_images(loaded_base, examples, 32, tmp_path / "other")
    for ours, theirs in zip(got, plain, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("change", ["resolution", "picture", "order", "base", "vae", "precision"])
def test_cache_is_not_used_for_other_inputs(
    loaded_base: Base, photos: Photos, concept: Concept, tmp_path: Path, change: str
) -> None:
    examples, resolution = scan(photos(), concept), 32
    first, _ = encode_images(loaded_base, examples, 32, tmp_path / "cache")
    if change == "resolution":
        resolution = 64
    elif change == "picture":
        Image.new("RGB", (32, 32), (9, 9, 9)).save(examples[0].path)
    elif change == "order":
        examples.reverse()
    elif change == "vae":
        loaded_base.vae_sha256 = "another"
    elif change == "precision":
        loaded_base.pipeline.vae.to(torch.bfloat16)
    else:
        loaded_base.sha256 = "another"
    encode_images(loaded_base, examples, resolution, tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 2
    if change == "order":
        assert torch.equal(encode_images(loaded_base, examples, 32, tmp_path / "cache")[0], first.flip(0))


def test_fingerprint_depends_on_the_positive_set(photos: Photos, concept: Concept) -> None:
    examples = scan(photos(), concept)
    assert fingerprint(examples) == fingerprint(list(examples))
    assert fingerprint(examples) != fingerprint([*examples[:-1], dataclasses.replace(examples[-1], positive_set=1)])


def test_text_embeddings_equal_the_pipelines(loaded_base: Base) -> None:
    captions = ["a photo", "", "far longer than the tokenizer takes: 🙂 " * 5]
    got = encode_captions(loaded_base, captions)
    want, _ = loaded_base.pipeline.encode_prompt(captions, "cpu", 1, do_classifier_free_guidance=False)
    assert got.shape[0] == 3
    assert torch.equal(got, want)


class _OnDevice(torch.Tensor):
    """A part of the captions that is on the device until it is moved to the CPU."""

    def to(self, device: object) -> torch.Tensor:  # type: ignore[override]
        assert device == "cpu"
        return self.as_subclass(torch.Tensor).clone()


def test_the_captions_of_a_training_leave_the_device_part_by_part(
    loaded_base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All captions of FLUX.2 together may be larger than the GPU."""
    captions = [f"a photo {n}" for n in range(5)]
    expected = encode_captions(loaded_base, captions)
    monkeypatch.setattr(type(loaded_base.properties), "captions_at_once", 2)
    embed, parts = encoding._embed, list[weakref.ref[torch.Tensor]]()

    def on_device(base: Base, part: list[str]) -> torch.Tensor:
        assert not any(earlier() is not None for earlier in parts)
        found = embed(base, part).as_subclass(_OnDevice)
        parts.append(weakref.ref(found))
        return found

    monkeypatch.setattr(encoding, "_embed", on_device)
    found = encode_each(loaded_base, captions)
    assert len(parts) == 3
    assert list(found) == captions
    assert torch.allclose(torch.stack(list(found.values())), expected, atol=1e-6)


# -- batches --
