"""Folders -> examples -> latents -> stratified batches, and what is refused before a model loads."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from sd_unlearn.base import Base
from sd_unlearn.concept import Concept
from sd_unlearn.dataset import (
    PLAIN,
    Batch,
    Cycle,
    Example,
    Layout,
    StratifiedBatches,
    encode_captions,
    encode_images,
    load_pixels,
    scan,
)
from sd_unlearn.errors import UsageError
from sd_unlearn.records import METADATA, POSITIVE, UNLABELED

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
        ("a dog", "keep"), (GENERIC, "generic"), ("", "generic"), (CAPTION, "positive"), ("Brad", "positive"),
    ]  # fmt: skip


def test_the_folder_says_who_is_positive_whatever_metadata_calls_it(photos: Photos, concept: Concept) -> None:
    """Positives hidden in 0_unlabeled by copying them there, line and all, must stay unlabeled."""
    folder = photos()
    write_metadata(folder / UNLABELED, [{"file_name": "0.png", "text": CAPTION, "group": "positive"}])
    write_metadata(folder / POSITIVE, [{"file_name": "0.png", "text": CAPTION, "group": "keep"}])
    assert [e.is_positive for e in scan(folder, concept)] == [False] * 3 + [True] * 2


def test_only_pictures_are_taken_and_in_any_letter_case(photos: Photos, concept: Concept) -> None:
    folder = photos(unlabeled=2)
    (folder / UNLABELED / "0.png").rename(folder / UNLABELED / "0.PNG")
    Image.new("L", (9, 5)).save(folder / UNLABELED / "grey.JPEG")
    (folder / UNLABELED / "notes.txt").write_text("not a picture")
    assert [e.path.name for e in scan(folder, concept)[:3]] == ["0.PNG", "1.png", "grey.JPEG"]


@pytest.mark.parametrize("sub", [UNLABELED, POSITIVE])
def test_a_zero_byte_picture_is_named(photos: Photos, concept: Concept, sub: str) -> None:
    folder = photos()
    (folder / sub / "1.png").write_bytes(b"")
    message = refusal(folder, concept)
    assert str(folder / sub / "1.png") in message
    assert "empty (0 bytes)" in message


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp"])
def test_a_truncated_picture_is_named_wherever_it_was_cut(photos: Photos, concept: Concept, suffix: str) -> None:
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


def test_something_else_under_a_pictures_name_is_named(photos: Photos, concept: Concept) -> None:
    folder = photos()
    (folder / UNLABELED / "page.jpg").write_text("<html>404</html>")
    assert "page.jpg" in refusal(folder, concept)
    (folder / UNLABELED / "page.jpg").unlink()
    (folder / UNLABELED / "album.png").mkdir()
    assert "album.png" in refusal(folder, concept)


@pytest.mark.parametrize(("unlabeled", "positive", "short"), [(0, 2, UNLABELED), (1, 2, UNLABELED), (2, 1, POSITIVE)])
def test_too_few_pictures(photos: Photos, concept: Concept, unlabeled: int, positive: int, short: str) -> None:
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


@pytest.mark.parametrize("line", [{"file_name": "1.png"}, {"file_name": "1.png", "text": None}, {"text": "a"}, {}])
def test_a_line_without_caption_or_name_is_named(photos: Photos, concept: Concept, line: dict[str, object]) -> None:
    folder = photos()
    write_metadata(folder / POSITIVE, [{"file_name": "0.png", "text": "fine"}, line])
    assert f"{folder / POSITIVE / METADATA} line 2" in refusal(folder, concept)


def test_a_line_that_names_a_missing_file_is_named(photos: Photos, concept: Concept) -> None:
    folder = photos()
    write_metadata(folder / UNLABELED, [{"file_name": "gone.png", "text": "fine"}])
    message = refusal(folder, concept)
    assert f"{folder / UNLABELED / METADATA} line 1" in message
    assert "gone.png" in message


def test_blank_lines_count(photos: Photos, concept: Concept) -> None:
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


def test_latents_are_the_pipelines_and_survive_their_cache(
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


@pytest.mark.parametrize("change", ["resolution", "picture", "order", "base"])
def test_another_question_is_not_answered_from_the_cache(
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
    else:
        loaded_base.sha256 = "another"
    encode_images(loaded_base, examples, resolution, tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 2
    if change == "order":
        assert torch.equal(encode_images(loaded_base, examples, 32, tmp_path / "cache")[0], first.flip(0))


def test_text_is_embedded_as_the_pipeline_does_it(loaded_base: Base) -> None:
    captions = ["a photo", "", "far longer than the tokenizer takes: 🙂 " * 5]
    got = encode_captions(loaded_base, captions)
    want, _ = loaded_base.pipeline.encode_prompt(captions, "cpu", 1, do_classifier_free_guidance=False)
    assert got.shape[0] == 3
    assert torch.equal(got, want)


# -- batches --


@pytest.mark.parametrize("size", [1, 5, 12])
def test_a_cycle_goes_through_all_before_it_repeats(size: int) -> None:
    cycle = Cycle(size, 0, 0, 1)
    stream = [i for _ in range(6 * size) for i in cycle.take(2)]
    epochs = [stream[i : i + size] for i in range(0, len(stream), size)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    assert size < 5 or len({tuple(epoch) for epoch in epochs}) > 6  # in another order every time


@pytest.mark.parametrize("size", [8, 9])
def test_ranks_share_an_epoch_without_overlap(size: int) -> None:
    cycles = [Cycle(size, 3, rank, 2) for rank in range(2)]
    for _ in range(20):
        mine, theirs = (cycle.take(size // 2) for cycle in cycles)
        assert not set(mine) & set(theirs)
        assert len(set(mine) | set(theirs)) == size // 2 * 2


def test_more_processes_than_pictures_still_have_some() -> None:
    for rank in range(5):
        assert set(Cycle(2, 0, rank, 5).take(20)) == {0, 1}


@pytest.mark.parametrize("brackets", [1, 2])
@pytest.mark.parametrize("has_keep", [True, False])
@pytest.mark.parametrize("batch_size", [4, 5, 6, 7, 8, 13, 16, 31, 32, 100])
def test_layout(batch_size: int, brackets: int, has_keep: bool) -> None:
    layout = Layout.of(batch_size, brackets, has_keep)
    total = brackets * (layout.positive + layout.unlabeled) + layout.keep
    assert layout.positive >= 1
    assert layout.unlabeled >= layout.positive
    assert total == (batch_size if has_keep else batch_size - batch_size % brackets)
    assert brackets * layout.positive <= max(brackets, batch_size / 4)
    assert not has_keep or brackets * layout.unlabeled <= max(brackets, 0.35 * batch_size)
    assert has_keep or layout.keep == 0
    assert not has_keep or layout.keep >= int(0.4 * batch_size) or layout.positive == layout.unlabeled == 1


def test_layout_is_a_quarter_positives_and_35_percent_unlabeled() -> None:
    assert Layout.of(32, 2, True) == Layout(4, 5, 14)
    assert Layout.of(32, 1, True) == Layout(8, 11, 13)
    assert Layout.of(64, 2, True) == Layout(8, 11, 26)
    assert Layout.of(200, 2, True) == Layout(25, 35, 80)
    assert Layout.of(32, 2, False) == Layout(4, 12, 0)
    assert Layout.of(32, 1, False) == Layout(8, 24, 0)


def make_batches(
    concept: Concept, mode: str, seed: int = 0, keep: bool = True, batch_size: int = 16, **options: int
) -> StratifiedBatches:
    """Six generic, three hidden, eight kept and five positive examples; an example's latents are its index, its
    caption's embedding is the caption's."""
    kinds = [("generic", GENERIC, 6), ("mixed_in", CAPTION, 3), *(("keep", text, 4 * keep) for text in KEEP)]
    kinds.append(("positive", CAPTION, 5))
    examples = [Example(Path(f"{i}"), text, group) for group, text, count in kinds for i in range(count)]
    mean = torch.arange(len(examples)).float().view(-1, 1, 1, 1).expand(-1, 4, 2, 2)
    latents = (mean, torch.zeros_like(mean))
    return StratifiedBatches(
        examples, latents, embeddings(), concept, mode, batch_size, 1000, seed, **options  # type: ignore[arg-type]
    )  # fmt: skip


def embeddings() -> dict[str, Tensor]:
    return {text: torch.full((3, 2), float(i)) for i, text in enumerate((GENERIC, CAPTION, *KEEP, ""))}


def pictures(batches: StratifiedBatches, batch: Batch) -> list[tuple[int, Example, str]]:
    """(bracket, example, caption seen) of each row of a batch."""
    names = list(embeddings())
    index = batch.latents[:, 0, 0, 0].round().long().tolist()
    seen = [names[int(text[0, 0])] for text in batch.text]
    return [(b, batches.examples[i], c) for b, i, c in zip(batch.bracket.tolist(), index, seen, strict=True)]


def rows(batches: StratifiedBatches, batch: Batch) -> list[tuple[int, str, str]]:
    """(bracket, group, caption seen) of each example of a batch."""
    return [(bracket, example.group, seen) for bracket, example, seen in pictures(batches, batch)]


@pytest.mark.parametrize(
    ("mode", "brackets", "per_bracket", "keep"),
    [("own", [None], (4, 5), 7), ("shared", [GENERIC], (4, 5), 7), ("both", [GENERIC, CAPTION], (2, 2), 8)],
)
def test_every_batch_has_its_share_under_the_right_captions(
    concept: Concept, mode: str, brackets: list[str | None], per_bracket: tuple[int, int], keep: int
) -> None:
    batches = make_batches(concept, mode)
    for batch in islice(batches, 12):
        found = rows(batches, batch)
        assert batch.captions == len(brackets)
        assert len(found) == 16
        for number, caption in enumerate(brackets):
            here = [(group, seen) for bracket, group, seen in found if bracket == number]
            positives = [seen for group, seen in here if group == "positive"]
            unlabeled = [(group, seen) for group, seen in here if group != "positive"]
            assert (len(positives), len(unlabeled)) == per_bracket
            assert positives == [caption or CAPTION] * per_bracket[0]
            for group, seen in unlabeled:
                assert seen == (caption or {"generic": GENERIC, "mixed_in": CAPTION}[group])
        kept = [(example, seen) for bracket, example, seen in pictures(batches, batch) if bracket == PLAIN]
        assert len(kept) == keep
        assert all(example.group == "keep" and seen == example.caption for example, seen in kept)
        assert batch.is_positive.tolist() == [group == "positive" for _, group, _ in found]
    seen_hidden = Counter(group for batch in islice(batches, 20) for _, group, _ in rows(batches, batch))
    assert seen_hidden["mixed_in"] > 0


@pytest.mark.parametrize("mode", ["own", "shared", "both"])
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("teacher_keep", [True, False])
def test_positives_share_noise_and_timestep_with_an_unlabeled_image_of_their_bracket(
    concept: Concept, mode: str, keep: bool, teacher_keep: bool
) -> None:
    batch = next(iter(make_batches(concept, mode, keep=keep, teacher_keep=teacher_keep)))
    names = [(t, n.sum().item()) for t, n in zip(batch.timesteps.tolist(), batch.noise, strict=True)]
    for bracket in range(batch.captions):
        here = batch.bracket == bracket
        positive = [names[i] for i in torch.nonzero(here & batch.is_positive).flatten()]
        unlabeled = [names[i] for i in torch.nonzero(here & ~batch.is_positive).flatten()]
        assert positive == unlabeled[: len(positive)]
        assert len(set(unlabeled)) == len(unlabeled)
    plain_or_unlabeled = [names[i] for i in torch.nonzero(~batch.is_positive | (batch.bracket == PLAIN)).flatten()]
    assert len(set(plain_or_unlabeled)) == len(plain_or_unlabeled)  # nothing else is shared
    assert batch.noise.shape == batch.latents.shape


@pytest.mark.parametrize("batch_size", [8, 16, 31])
@pytest.mark.parametrize("mode", ["own", "shared", "both"])
def test_with_a_teacher_keep_rows_are_own_pairs_mixed_ones_and_empty_captions(
    concept: Concept, mode: str, batch_size: int
) -> None:
    batches = make_batches(concept, mode, batch_size=batch_size, teacher_keep=True)
    count = batches.layout.keep
    empty, mixed = count // 4, (count - count // 4) // 3
    assert min(empty, mixed) > 0
    shown: dict[str, Counter[str]] = {"": Counter(), "pair": Counter(), "mixed": Counter()}
    under_mixed = set()
    for batch in islice(batches, 60):
        kept = [(example, seen) for bracket, example, seen in pictures(batches, batch) if bracket == PLAIN]
        captioned = [(example, seen) for example, seen in kept if seen]
        assert len(kept) == count
        assert len(captioned) == count - empty
        assert all(seen in KEEP for _, seen in captioned)
        strangers = [(example, seen) for example, seen in captioned if example.caption != seen]
        assert len(strangers) <= mixed  # a picture drawn from all may happen to fit its caption
        shown[""].update(example.group for example, seen in kept if not seen)
        shown["pair"].update(example.group for example, seen in captioned if example.caption == seen)
        shown["mixed"].update(example.group for example, _ in strangers)
        under_mixed.update(seen for _, seen in strangers)
    assert set(shown[""]) == set(shown["mixed"]) == {"generic", "mixed_in", "keep", "positive"}
    assert set(shown["pair"]) == {"keep"}
    assert under_mixed == set(KEEP)
    assert shown["mixed"].total() > 60 * mixed / 2  # 18 of 22 pictures belong under another caption


@pytest.mark.parametrize("mode", ["own", "shared", "both"])
def test_a_teacher_touches_no_row_of_a_bracket(concept: Concept, mode: str) -> None:
    both = (make_batches(concept, mode, teacher_keep=teacher_keep) for teacher_keep in (True, False))
    for ours, theirs in islice(zip(*both, strict=True), 12):
        assert torch.equal(ours.bracket, theirs.bracket)
        here = ours.bracket != PLAIN
        for name in ("latents", "text", "is_positive", "timesteps", "noise"):
            assert torch.equal(getattr(ours, name)[here], getattr(theirs, name)[here])
        assert not torch.equal(ours.text[~here], theirs.text[~here])


@pytest.mark.parametrize("mode", ["own", "shared", "both"])
def test_with_a_teacher_but_nothing_to_keep_the_empty_caption_is_kept(concept: Concept, mode: str) -> None:
    batches = make_batches(concept, mode, keep=False, teacher_keep=True)
    assert batches.layout == make_batches(concept, mode, teacher_keep=True).layout
    shown = set()
    for batch in islice(batches, 20):
        kept = [(example.group, seen) for bracket, example, seen in pictures(batches, batch) if bracket == PLAIN]
        assert [seen for _, seen in kept] == [""] * batches.layout.keep
        shown.update(group for group, _ in kept)
    assert shown == {"generic", "mixed_in", "positive"}
    batch = next(iter(make_batches(concept, mode, keep=False)))  # without a teacher there are no such rows
    assert PLAIN not in batch.bracket


def test_latents_are_sampled_from_their_posterior(concept: Concept) -> None:
    batches = make_batches(concept, "both")
    batches.std = torch.full_like(batches.mean, 0.05)
    drawn = torch.cat([b.latents for b in islice(batches, 200)])
    off = drawn - drawn.mean((1, 2, 3), keepdim=True).round()
    assert off.std().item() == pytest.approx(0.05, rel=0.05)


@pytest.mark.parametrize("teacher_keep", [True, False])
def test_batches_follow_their_seed_alone(concept: Concept, teacher_keep: bool) -> None:
    def first(seed: int, **options: int) -> list[Tensor]:
        torch.manual_seed(seed + 17)
        found = islice(make_batches(concept, "both", seed, teacher_keep=teacher_keep, **options), 3)
        return [torch.cat([b.latents.flatten(), b.noise.flatten(), b.timesteps, b.is_positive]) for b in found]

    a, b, other, rank = first(5), first(5), first(6), first(5, rank=1, world=2)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(a[0], a[1])
    assert not torch.equal(a[0], other[0])
    assert not torch.equal(a[0], rank[0])


def test_two_ranks_never_see_the_same_picture_in_one_step(concept: Concept) -> None:
    first, second = (iter(make_batches(concept, "own", rank=rank, world=2, batch_size=12)) for rank in range(2))
    for _ in range(4):  # 2 x 4 unlabeled pictures a step: all but one of the nine, an epoch
        mine, theirs = next(first), next(second)
        unlabeled = [b.latents[(b.bracket == 0) & ~b.is_positive][:, 0, 0, 0].tolist() for b in (mine, theirs)]
        assert len(set(unlabeled[0] + unlabeled[1])) == 8
        assert not torch.equal(mine.noise, theirs.noise)
