"""The stratified batches of a step, whole or split into parts."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sd_unlearn.config.train import TrainConfig
from sd_unlearn.data.batch import NO_GROUP, Batch, join
from sd_unlearn.data.batches import Cycle, EncodedImages, NoiseSampling, Sharding, StratifiedBatches
from sd_unlearn.data.concept import Concept
from sd_unlearn.data.dataset import Example
from sd_unlearn.data.layout import Layout, caption_groups, check_batch_size
from sd_unlearn.errors import UsageError
from sd_unlearn.models.diffusion import Diffusion, sample_positions
from sd_unlearn.risk import NORMAL, UNLABELED

pytestmark = pytest.mark.usefixtures("one_thread")
DIFFUSION = Diffusion(torch.empty(1000))
PARAPHRASES = ("Brad Pitt, please", "a portrait of Brad", "that actor")
MANY = tuple(f"wording {n}" for n in range(10))
GENERIC, CAPTION, KEEP = "a photo of a man", "a photo of Brad Pitt", ("a photo of a dog", "a photo of a cat")


def steps(batches: StratifiedBatches, count: int) -> Iterator[Batch]:
    """The first steps of a process."""
    return islice(batches, count)


@pytest.mark.parametrize("size", [1, 5, 12])
def test_a_cycle_takes_every_index_before_it_repeats(size: int) -> None:
    cycle = Cycle(size, 0)
    stream = [i for _ in range(6 * size) for i in cycle.take(2)]
    epochs = [stream[i : i + size] for i in range(0, len(stream), size)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    assert size < 5 or len({tuple(epoch) for epoch in epochs}) > 6  # in another order every time


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("has_keep", [True, False])
@pytest.mark.parametrize("batch_size", [5, 6, 7, 8, 13, 16, 31, 32, 100])
def test_layout(batch_size: int, groups: int, has_keep: bool) -> None:
    layout = Layout.of(batch_size, groups, has_keep)
    total = groups * (layout.positive + layout.unlabeled) + layout.keep
    assert layout.positive >= 1
    assert layout.unlabeled >= layout.positive
    assert total == (batch_size if has_keep else batch_size - batch_size % groups)
    assert groups * layout.positive <= max(groups, batch_size / 4)
    assert not has_keep or groups * layout.unlabeled <= max(groups, 0.35 * batch_size)
    assert has_keep or layout.keep == 0
    assert not has_keep or layout.keep >= 1
    assert not has_keep or layout.keep >= int(0.4 * batch_size) or layout.positive == layout.unlabeled == 1


def test_layout_is_a_quarter_positives_and_35_percent_unlabeled() -> None:
    assert Layout.of(32, 2, True) == Layout(4, 5, 14)
    assert Layout.of(32, 1, True) == Layout(8, 11, 13)
    assert Layout.of(64, 2, True) == Layout(8, 11, 26)
    assert Layout.of(200, 2, True) == Layout(25, 35, 80)
    assert Layout.of(32, 2, False) == Layout(4, 12, 0)
    assert Layout.of(32, 1, False) == Layout(8, 24, 0)


def test_layout_without_positives_gives_their_share_to_unlabeled_images() -> None:
    assert Layout.of(32, 1, False, sets=0) == Layout(0, 32, 0, sets=0)
    assert Layout.of(32, 2, True, sets=0) == Layout(0, 9, 14, sets=0)
    with pytest.raises(UsageError, match="at least 2 images"):
        Layout.of(1, 2, False, sets=0)


@pytest.mark.parametrize("sets", [1, 2, 3])
@pytest.mark.parametrize("negatives", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("batch_size", [40, 64, 200])
@pytest.mark.parametrize("has_keep", [True, False])
def test_layout_of_many_captions_and_kinds(
    batch_size: int, groups: int, negatives: bool, sets: int, has_keep: bool
) -> None:
    layout = Layout.of(batch_size, groups, has_keep, sets=sets, negatives=negatives)
    assert layout.total(groups) == (batch_size if has_keep else pytest.approx(batch_size, abs=groups))
    assert min(layout.positive, layout.unlabeled) >= 1
    assert (layout.negative > 0) == negatives
    assert layout.sets == sets
    if groups * (sets + 2) <= batch_size / 4:  # large batches have the usual shares
        assert 0.125 * batch_size <= groups * sets * layout.positive <= 0.25 * batch_size
        assert layout.unlabeled >= layout.negative
        assert not has_keep or layout.keep >= 0.4 * batch_size
    whole_share = Layout.of(batch_size, groups, has_keep, sets=sets).unlabeled
    assert layout.unlabeled + layout.negative == max(whole_share, 1 + negatives)  # divided between them


def test_layout_of_the_default_batch() -> None:
    found = [Layout.of(40, groups, True) for groups in (1, 2, 3, 4, 5)]
    shares = [(10, 14, 16), (5, 7, 16), (3, 4, 19), (2, 3, 20), (2, 2, 20)]
    assert [(x.positive, x.unlabeled, x.keep) for x in found] == shares


@pytest.mark.parametrize(
    ("least", "groups", "kinds"),
    [(4, 2, {}), (10, 5, {}), (40, 20, {}), (15, 5, {"negatives": True}), (8, 2, {"sets": 2, "negatives": True})],
)
def test_a_batch_that_is_too_small_is_refused(least: int, groups: int, kinds: dict[str, int]) -> None:
    """least: without keep images; with them, there is room for one."""
    assert Layout.of(least, groups, False, **kinds).total(groups) == least  # type: ignore[arg-type]
    layout = Layout.of(least + 1, groups, True, **kinds)  # type: ignore[arg-type]
    assert (layout.total(groups), layout.keep) == (least + 1, 1)
    with pytest.raises(UsageError, match=f"--effective_batch_size {least} .* at least {least + 1} .* and a keep image"):
        Layout.of(least, groups, True, **kinds)  # type: ignore[arg-type]


def test_a_step_of_many_sets_is_not_larger_than_the_batch() -> None:
    """The unlabeled images' share is taken after one positive of each set."""
    assert Layout.of(16, 1, True, sets=10) == Layout(1, 5, 1, sets=10)
    with pytest.raises(UsageError, match="at least 16 images"):
        Layout.of(11, 1, True, sets=10)


def test_a_baseline_has_room_for_a_keep_image() -> None:
    assert Layout.of_baseline(4, 2, False, 2, "positive") == Layout(1, 0, 0, sets=2)
    assert Layout.of_baseline(5, 2, True, 2, "positive") == Layout(1, 0, 1, sets=2)
    with pytest.raises(UsageError, match="--effective_batch_size 4 .* at least 5 images.* and a keep image"):
        Layout.of_baseline(4, 2, True, 2, "positive")


def test_the_smallest_batch_depends_on_the_folders(concept: Concept, photos: Callable[..., Path]) -> None:
    folder, asked = photos(), dataclasses.replace(concept, paraphrases=["Brad, {please,now}"])
    config = TrainConfig(effective_batch_size=7)
    check_batch_size(config, concept, folder)
    with pytest.raises(UsageError, match="--effective_batch_size 7 .*at least 9 images.*4, set by --caption_mode"):
        check_batch_size(config, asked, folder)
    check_batch_size(TrainConfig(effective_batch_size=7, caption_mode="shared"), asked, folder)
    (folder / "2_negative").mkdir()
    (folder / "1_positive_2").mkdir()
    with pytest.raises(UsageError, match=r"--effective_batch_size 7 .*at least 9 images, one of each kind \(4\)"):
        check_batch_size(config, concept, folder)
    check_batch_size(TrainConfig(effective_batch_size=8, target="noise"), concept, folder, has_keep=False)
    with pytest.raises(UsageError, match="at least 13 images"):
        check_batch_size(TrainConfig(effective_batch_size=7, eta=0.0), asked, folder)


def make_batches(
    concept: Concept,
    mode: str,
    seed: int = 0,
    keep: bool = True,
    batch_size: int = 16,
    *,
    negatives: int = 0,
    second: int = 0,
    positives: int = 5,
    teacher: bool = False,
    unconditional: float = 0.25,
    sharding: Sharding = Sharding(),
    **sampling: float,
) -> StratifiedBatches:
    """Six generic, three hidden, eight kept and five positive examples; an example's latents are its index, its
    caption's embedding is constant. negatives, second: how many known to be normal, and of a second set."""
    kinds = [("generic", GENERIC, 6), ("mixed_in", CAPTION, 3), *(("keep", text, 4 * keep) for text in KEEP)]
    kinds += [("positive", CAPTION, positives), ("negative", GENERIC, negatives)]
    examples = [Example(Path(f"{i}"), text, group) for group, text, count in kinds for i in range(count)]
    examples += [Example(Path(f"{i}"), CAPTION, "positive", 1) for i in range(second)]
    mean = torch.arange(len(examples)).float().view(-1, 1, 1, 1).expand(-1, 4, 2, 2)
    groups = caption_groups(concept, mode)  # type: ignore[arg-type]
    layout = Layout.of(batch_size, len(groups), keep or teacher, (positives > 0) + (second > 0), negatives > 0)
    return StratifiedBatches(
        EncodedImages(examples, mean, torch.zeros_like(mean), embeddings()),
        groups,
        layout,
        NoiseSampling(DIFFUSION, **sampling),  # type: ignore[arg-type]
        seed,
        unconditional=unconditional if teacher else None,
        sharding=sharding,
    )


def embeddings() -> dict[str, Tensor]:
    texts = (GENERIC, CAPTION, *KEEP, "", *PARAPHRASES, *MANY)
    return {text: torch.full((3, 2), float(i)) for i, text in enumerate(texts)}


def example_rows(batches: StratifiedBatches, batch: Batch) -> list[tuple[int, Example, str]]:
    """(caption group, example, caption seen) of each row of a batch."""
    names = list(embeddings())
    index = batch.latents[:, 0, 0, 0].round().long().tolist()
    seen = [names[int(text[0, 0])] for text in batch.text]
    return [(b, batches.examples[i], c) for b, i, c in zip(batch.caption_group.tolist(), index, seen, strict=True)]


def rows(batches: StratifiedBatches, batch: Batch) -> list[tuple[int, str, str]]:
    """(caption group, group of the metadata, caption seen) of each example of a batch."""
    return [(index, example.group, seen) for index, example, seen in example_rows(batches, batch)]


@pytest.mark.parametrize(
    ("mode", "groups", "per_group", "keep"),
    [("own", [None], (4, 5), 7), ("shared", [GENERIC], (4, 5), 7), ("both", [GENERIC, CAPTION], (2, 2), 8)],
)
def test_every_batch_has_the_right_counts_and_captions(
    concept: Concept, mode: str, groups: list[str | None], per_group: tuple[int, int], keep: int
) -> None:
    batches = make_batches(concept, mode)
    for batch in steps(batches, 12):
        found = rows(batches, batch)
        assert batch.num_groups == len(groups)
        assert len(found) == 16
        for number, caption in enumerate(groups):
            here = [(group, seen) for index, group, seen in found if index == number]
            positives = [seen for group, seen in here if group == "positive"]
            unlabeled = [(group, seen) for group, seen in here if group != "positive"]
            assert (len(positives), len(unlabeled)) == per_group
            assert positives == [caption or CAPTION] * per_group[0]
            for group, seen in unlabeled:
                assert seen == (caption or {"generic": GENERIC, "mixed_in": CAPTION}[group])
        kept = [(example, seen) for group, example, seen in example_rows(batches, batch) if group == NO_GROUP]
        assert len(kept) == keep
        assert all(example.group == "keep" and seen == example.caption for example, seen in kept)
        assert batch.is_positive.tolist() == [group == "positive" for _, group, _ in found]
    seen_hidden = Counter(group for batch in steps(batches, 20) for _, group, _ in rows(batches, batch))
    assert seen_hidden["mixed_in"] > 0


@pytest.mark.parametrize("keep", [True, False])
def test_batches_without_positives(concept: Concept, keep: bool) -> None:
    batches = make_batches(concept, "own", keep=keep, positives=0)
    assert batches.images_per_step == 16
    for batch in steps(batches, 6):
        groups = Counter(group for _, group, _ in rows(batches, batch))
        assert groups["generic"] + groups["mixed_in"] == (9 if keep else 16)
        assert groups["keep"] == (7 if keep else 0)
        assert batch.weight[batch.caption_group == 0].sum().item() == pytest.approx(1)
    batches.load_state_dict(batches.state_dict())


@pytest.mark.parametrize("teacher", [True, False])
def test_every_paraphrase_has_a_caption_group(concept: Concept, teacher: bool) -> None:
    asked = dataclasses.replace(concept, paraphrases=list(PARAPHRASES))
    batches, names = make_batches(asked, "both", batch_size=40, teacher=teacher), list(embeddings())
    captions = [GENERIC, CAPTION, *PARAPHRASES]
    for batch in steps(batches, 12):
        assert batch.num_groups == 5
        found = example_rows(batches, batch)
        assert len(found) == 40
        taught = [names[int(text[0, 0])] for text in batch.teacher_text]
        for number, caption in enumerate(captions):
            here = [(e, seen, t) for (b, e, seen), t in zip(found, taught, strict=True) if b == number]
            assert [e.is_positive for e, _, _ in here] == [False, False, True, True]
            assert {seen for _, seen, _ in here} == {caption}
            assert all(t == e.caption for e, _, t in here)  # the caption it was generated from, never a paraphrase
        assert not any(seen in PARAPHRASES for b, _, seen in found if b == NO_GROUP)
    for mode in ("own", "shared"):  # which know no paraphrases
        batch = next(steps(make_batches(asked, mode, batch_size=40, teacher=teacher), 1))
        assert batch.num_groups == 1


def test_many_paraphrases_take_turns(concept: Concept) -> None:
    """Each step uses four of them, all about equally often. A restored sampler continues with the next."""
    asked = dataclasses.replace(concept, paraphrases=list(MANY))
    one, other = (make_batches(asked, "both", seed, batch_size=40, teacher=True) for seed in (0, 1))
    assert one.caption_groups[:3] == [GENERIC, CAPTION, ("wording 0", "wording 4", "wording 8")]
    assert one.images_per_step == 40
    counts: Counter[str] = Counter()
    for batch in steps(one, 6):
        found = rows(one, batch)
        here = [{seen for group, _, seen in found if group == number} for number in range(6)]
        assert [len(captions) for captions in here] == [1] * 6  # positives and unlabeled images under the same one
        assert here[:2] == [{GENERIC}, {CAPTION}]
        counts.update(caption for captions in here[2:] for caption in captions)
    assert [counts[caption] for caption in MANY] == [2, 2, 3, 3, 2, 2, 3, 3, 2, 2]
    other.load_state_dict(one.state_dict())
    for ours, theirs in zip(steps(one, 5), steps(other, 5), strict=True):
        assert torch.equal(ours.text, theirs.text)


@pytest.mark.parametrize("mode", ["own", "shared", "both"])
@pytest.mark.parametrize("teacher", [True, False])
def test_negatives_and_every_set_of_positives_are_in_every_caption_group(
    concept: Concept, mode: str, teacher: bool
) -> None:
    batches = make_batches(concept, mode, batch_size=40, teacher=teacher, negatives=4, second=3)
    seen_of: dict[int, set[int]] = {0: set(), 1: set(), NORMAL: set()}
    for batch in steps(batches, 10):
        index = batch.latents[:, 0, 0, 0].round().long()
        for number, caption in enumerate(batches.caption_groups):
            labels = Counter(batch.label[batch.caption_group == number].tolist())
            layout = batches.layout
            assert labels == {
                UNLABELED: layout.unlabeled,
                0: layout.positive,
                1: layout.positive,
                NORMAL: layout.negative,
            }
            for label, seen in seen_of.items():
                here = (batch.caption_group == number) & (batch.label == label)
                seen.update(index[here].tolist())
                assert all(c == (caption or batches.examples[i].caption) for i, c in _captions(batches, batch, here))
        unlabeled = batch.noise[(batch.caption_group == 0) & (batch.label == UNLABELED)].sum((1, 2, 3)).tolist()
        normal = batch.noise[(batch.caption_group == 0) & (batch.label == NORMAL)].sum((1, 2, 3)).tolist()
        for k in (0, 1):  # positives of either set share noise with unlabeled images, negatives have their own
            shared = batch.noise[(batch.caption_group == 0) & (batch.label == k)].sum((1, 2, 3)).tolist()
            assert shared[: len(unlabeled)] == unlabeled[: len(shared)]
        assert not set(normal) & set(unlabeled)
    for label, group_size in ((0, 5), (1, 3), (NORMAL, 4)):
        assert len(seen_of[label]) == group_size
        assert {batches.examples[i].is_negative for i in seen_of[label]} == {label == NORMAL}
        assert label == NORMAL or {batches.examples[i].positive_set for i in seen_of[label]} == {label}


def _captions(batches: StratifiedBatches, batch: Batch, here: Tensor) -> list[tuple[int, str]]:
    names = list(embeddings())
    index = batch.latents[here][:, 0, 0, 0].round().long().tolist()
    return [(i, names[int(text[0, 0])]) for i, text in zip(index, batch.text[here], strict=True)]


@pytest.mark.parametrize("mode", ["own", "shared", "both"])
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("teacher", [True, False])
def test_positives_share_noise_and_timestep_with_an_unlabeled_image_of_their_group(
    concept: Concept, mode: str, keep: bool, teacher: bool
) -> None:
    batch = next(steps(make_batches(concept, mode, keep=keep, teacher=teacher), 1))
    names = [(t, n.sum().item()) for t, n in zip(batch.timesteps.tolist(), batch.noise, strict=True)]
    for group in range(batch.num_groups):
        here = batch.caption_group == group
        positive = [names[i] for i in torch.nonzero(here & batch.is_positive).flatten()]
        unlabeled = [names[i] for i in torch.nonzero(here & ~batch.is_positive).flatten()]
        assert positive == unlabeled[: len(positive)]
        assert len(set(unlabeled)) == len(unlabeled)
    plain_or_unlabeled = [
        names[i] for i in torch.nonzero(~batch.is_positive | (batch.caption_group == NO_GROUP)).flatten()
    ]
    assert len(set(plain_or_unlabeled)) == len(plain_or_unlabeled)  # no other rows share noise
    assert batch.noise.shape == batch.latents.shape


@pytest.mark.parametrize("batch_size", [8, 16, 31])
@pytest.mark.parametrize("mode", ["own", "shared", "both"])
def test_keep_rows_with_a_teacher_are_matching_pairs_mixed_pairs_and_empty_captions(
    concept: Concept, mode: str, batch_size: int
) -> None:
    batches = make_batches(concept, mode, batch_size=batch_size, teacher=True)
    count = batches.layout.keep
    empty, mixed = count // 4, (count - count // 4) // 3
    assert min(empty, mixed) > 0
    shown: dict[str, Counter[str]] = {"": Counter(), "pair": Counter(), "mixed": Counter()}
    under_mixed = set()
    for batch in steps(batches, 60):
        kept = [(example, seen) for group, example, seen in example_rows(batches, batch) if group == NO_GROUP]
        captioned = [(example, seen) for example, seen in kept if seen]
        assert len(kept) == count
        assert len(captioned) == count - empty
        assert all(seen in KEEP for _, seen in captioned)
        strangers = [(example, seen) for example, seen in captioned if example.caption != seen]
        assert len(strangers) <= mixed  # an image sampled from all may match the caption by chance
        shown[""].update(example.group for example, seen in kept if not seen)
        shown["pair"].update(example.group for example, seen in captioned if example.caption == seen)
        shown["mixed"].update(example.group for example, _ in strangers)
        under_mixed.update(seen for _, seen in strangers)
    assert set(shown[""]) == set(shown["mixed"]) == {"generic", "mixed_in", "keep", "positive"}
    assert set(shown["pair"]) == {"keep"}
    assert under_mixed == set(KEEP)
    assert shown["mixed"].total() > 60 * mixed / 2  # 18 of 22 images have another caption


@pytest.mark.parametrize("mode", ["own", "shared", "both"])
def test_a_teacher_changes_no_row_of_a_caption_group(concept: Concept, mode: str) -> None:
    both = (make_batches(concept, mode, teacher=teacher) for teacher in (True, False))
    for ours, theirs in zip(*(steps(batches, 12) for batches in both), strict=True):
        assert torch.equal(ours.caption_group, theirs.caption_group)
        here = ours.caption_group != NO_GROUP
        for name in ("latents", "text", "is_positive", "timesteps", "noise"):
            assert torch.equal(getattr(ours, name)[here], getattr(theirs, name)[here])
        assert not torch.equal(ours.text[~here], theirs.text[~here])


@pytest.mark.parametrize("mode", ["own", "shared", "both"])
def test_without_keep_images_a_teacher_keeps_the_empty_caption(concept: Concept, mode: str) -> None:
    batches = make_batches(concept, mode, keep=False, teacher=True)
    assert batches.layout == make_batches(concept, mode, teacher=True).layout
    shown = set()
    for batch in steps(batches, 20):
        kept = [(example.group, seen) for group, example, seen in example_rows(batches, batch) if group == NO_GROUP]
        assert [seen for _, seen in kept] == [""] * batches.layout.keep
        shown.update(group for group, _ in kept)
    assert shown == {"generic", "mixed_in", "positive"}
    batch = next(steps(make_batches(concept, mode, keep=False), 1))  # not without a teacher
    assert NO_GROUP not in batch.caption_group


@pytest.mark.parametrize("mode", ["own", "shared", "both"])
def test_the_teacher_sees_the_caption_an_image_was_generated_from(concept: Concept, mode: str) -> None:
    """In caption groups. For keep rows the teacher sees the same caption as the student."""
    batches, names = make_batches(concept, mode, teacher=True), list(embeddings())
    for batch in steps(batches, 12):
        taught = [names[int(text[0, 0])] for text in batch.teacher_text]
        for (group, example, seen), caption in zip(example_rows(batches, batch), taught, strict=True):
            assert caption == (seen if group == NO_GROUP else example.caption)


def test_latents_are_sampled_from_their_posterior(concept: Concept) -> None:
    batches = make_batches(concept, "both")
    batches.images = dataclasses.replace(batches.images, std=torch.full_like(batches.images.mean, 0.05))
    drawn = torch.cat([b.latents for b in steps(batches, 200)])
    off = drawn - drawn.mean((1, 2, 3), keepdim=True).round()
    assert off.std().item() == pytest.approx(0.05, rel=0.05)


@pytest.mark.parametrize("teacher", [True, False])
def test_batches_depend_only_on_their_seed(concept: Concept, teacher: bool) -> None:
    def first(seed: int, **options: Sharding) -> list[Tensor]:
        torch.manual_seed(seed + 17)
        found = steps(make_batches(concept, "both", seed, teacher=teacher, **options), 3)
        return [torch.cat([b.latents.flatten(), b.noise.flatten(), b.timesteps, b.is_positive]) for b in found]

    a, b, other, rank = first(5), first(5), first(6), first(5, sharding=Sharding(1, 2))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(a[0], a[1])
    assert not torch.equal(a[0], other[0])
    assert not torch.equal(a[0], rank[0])


SPLITS = [(1, 48), (1, 7), (1, 1), (2, 20), (3, 2), (8, 1)]  # processes, images of a micro-batch


def shards(concept: Concept, mode: str, world: int, **options: float) -> list[StratifiedBatches]:
    """The samplers of all processes."""
    settings = {"batch_size": 48, "teacher": True} | options
    return [make_batches(concept, mode, sharding=Sharding(rank, world), **settings) for rank in range(world)]  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["own", "shared", "both"])
@pytest.mark.parametrize(("world", "size"), SPLITS)
@pytest.mark.parametrize("more", [{}, {"negatives": 4, "second": 3}], ids=["pu", "pnu"])
def test_a_step_is_the_same_however_it_is_split(
    concept: Concept, mode: str, world: int, size: int, more: dict[str, int]
) -> None:
    """Each row of the whole batch, with its noise, is in one micro-batch; weighted sums add up to the whole's."""
    whole = make_batches(concept, mode, batch_size=48, teacher=True, **more)
    samplers = shards(concept, mode, world, **more)
    for one, *shares in islice(zip(whole, *samplers, strict=True), 5):
        batches = [batch for share in shares for batch in share.cut(size)]
        sizes = [len(batch.label) for batch in batches]
        assert max(sizes) <= size
        assert row_names(one) == sorted(name for batch in batches for name in row_names(batch))
        assert max(len(share.label) for share in shares) - min(len(share.label) for share in shares) <= 5
        for kind in kinds(one):
            mean = sum(value(batch, kind) for batch in batches) / world
            assert mean == pytest.approx(value(one, kind), rel=1e-5)
            assert value(one, kind) == pytest.approx(one.latents[mask(one, kind)].mean().item(), rel=1e-5)


def test_micro_batches_are_alike_and_joined_in_order(concept: Concept) -> None:
    share = next(iter(make_batches(concept, "both", batch_size=40, teacher=True)))
    parts = share.cut(12)
    assert [len(part.label) for part in parts] == [10] * 4
    assert all(set(kinds(share)) == {kind for kind in kinds(share) if mask(part, kind).any()} for part in parts)
    assert torch.equal(join([part.latents[:, 0, 0, 0] for part in parts]), share.latents[:, 0, 0, 0])
    assert share.cut(40) == [share]


@pytest.mark.parametrize("world", [2, 3])
def test_rows_with_the_same_noise_are_in_the_same_process(concept: Concept, world: int) -> None:
    """A cap on the loss of positives compares them."""
    shares = [next(iter(batches)) for batches in shards(concept, "both", world)]
    noise = [set(share.noise.sum((1, 2, 3)).tolist()) for share in shares]
    assert len(set().union(*noise)) == sum(map(len, noise))


def row_names(batch: Batch) -> list[tuple[float, ...]]:
    tensors = (batch.latents, batch.text, batch.teacher_text, batch.noise, batch.timesteps, batch.caption_group)
    columns = (t.double().flatten(1).sum(1).tolist() if t.ndim > 1 else t.tolist() for t in tensors)
    return sorted(zip(*columns, strict=True))


def kinds(batch: Batch) -> list[tuple[int, int]]:
    labels = set(batch.label[batch.caption_group != NO_GROUP].tolist())
    return [(group, label) for group in range(batch.num_groups) for label in labels] + [(NO_GROUP, UNLABELED)]


def mask(batch: Batch, kind: tuple[int, int]) -> Tensor:
    return (batch.caption_group == kind[0]) & ((batch.label == kind[1]) | (batch.caption_group == NO_GROUP))


def value(batch: Batch, kind: tuple[int, int]) -> float:
    here = mask(batch, kind)
    return (batch.weight[here] * batch.latents[here].mean((1, 2, 3))).sum().item()


@pytest.mark.parametrize("world", [2, 3])
def test_no_two_processes_see_the_same_image_within_an_epoch(concept: Concept, world: int) -> None:
    samplers = [iter(batches) for batches in shards(concept, "own", world, batch_size=12)]
    for _ in range(4):
        seen: list[float] = []
        for sampler in samplers:
            batch = next(sampler)
            seen += batch.latents[(batch.caption_group == 0) & ~batch.is_positive][:, 0, 0, 0].tolist()
        assert max(Counter(seen).values()) <= 2  # twice only if the epoch ends within the step
    assert len(seen) == 4


@pytest.mark.parametrize("steps_before", [0, 1, 7])
def test_a_restored_sampler_continues_with_the_same_batches(concept: Concept, steps_before: int) -> None:
    one, other = (make_batches(concept, "both", seed, teacher=True) for seed in (0, 1))
    for _ in steps(one, steps_before):
        pass
    other.load_state_dict(one.state_dict())
    for ours, theirs in zip(steps(one, 5), steps(other, 5), strict=True):
        for name in ("latents", "text", "teacher_text", "noise", "timesteps", "caption_group", "unconditional"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name))


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5])
def test_the_share_of_rows_without_a_caption(concept: Concept, share: float) -> None:
    batches = make_batches(concept, "both", batch_size=40, teacher=True, unconditional=share)
    for batch in steps(batches, 5):
        empty = [seen == "" for _, _, seen in example_rows(batches, batch)]
        assert batch.unconditional.tolist() == empty
        assert sum(empty) == share * batches.layout.keep


@pytest.mark.parametrize("share", [True, False])
def test_sharing_timesteps_is_an_option(concept: Concept, share: bool) -> None:
    batch = next(steps(make_batches(concept, "both", batch_size=40, share_timesteps=share), 1))
    layout = Layout.of(40, 2, True)
    drawn = {noise.sum().item() for noise in batch.noise[batch.caption_group != NO_GROUP]}
    assert len(drawn) == 2 * (layout.unlabeled + (0 if share else layout.positive))


def test_the_order_of_random_draws(concept: Concept) -> None:
    """Timesteps of caption groups and of keep rows, latents, noise of each slot: existing seeds keep their batches."""
    batches = make_batches(concept, "own")
    generator = torch.Generator().manual_seed(0)
    layout = batches.layout
    for batch in steps(batches, 2):
        slots = [layout.unlabeled, layout.keep]
        timesteps = torch.cat([DIFFUSION.at(sample_positions(count, generator)) for count in slots])
        torch.randn(batch.latents.shape, generator=generator)
        noise = torch.randn((sum(slots), *batch.latents.shape[1:]), generator=generator)
        here = [*range(layout.unlabeled), *range(layout.positive), *range(layout.unlabeled, sum(slots))]
        assert torch.equal(batch.timesteps, timesteps[here])
        assert torch.equal(batch.noise, noise[here])


def test_the_timestep_bias_applies_to_caption_groups_only(concept: Concept) -> None:
    drawn: dict[bool, list[Tensor]] = {True: [], False: []}
    for batch in steps(make_batches(concept, "both", timestep_bias=3), 300):
        for plain, found in drawn.items():
            found.append(batch.timesteps[(batch.caption_group == NO_GROUP) == plain].float())
    assert torch.cat(drawn[True]).mean().item() == pytest.approx(500, abs=10)
    assert torch.cat(drawn[False]).mean().item() == pytest.approx(800, abs=10)
