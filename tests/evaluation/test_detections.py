"""Each detector reads every image once, and unreadable images are reported; folders of existing images."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sd_unlearn.data.concept import Concept, Evaluation
from sd_unlearn.errors import UsageError
from sd_unlearn.evaluation import detections
from sd_unlearn.evaluation.image_folders import read_image_folder
from sd_unlearn.evaluation.pairs import count_outcomes, pick_pairs
from sd_unlearn.evaluation.prompts import Tier, plan_images
from sd_unlearn.evaluation.score import ConceptResults, SubjectImages
from sd_unlearn.metrics.base import DetectorOutput, ImageValues

CONCEPT = Concept("seven", "a seven", "a digit", evaluate=Evaluation(alike=["a {one,two}"]))


class Mean:
    """The mean brightness; counts what it was shown."""

    name = "mean v1"
    metric = "gap"

    def __init__(self) -> None:
        self.shown = 0

    def read(self, images: Sequence[Image.Image]) -> DetectorOutput:
        self.shown += len(images)
        values = [float(np.asarray(image).mean()) for image in images]
        return {"mean": np.array(values, dtype=float), "size": np.array([i.size for i in images]).reshape(-1, 2)}

    def distance(self, base: Sequence[Image.Image], other: Sequence[Image.Image]) -> Any:
        self.shown += len(base)
        return np.abs(self.read(base)["mean"] - self.read(other)["mean"])


def save(folder: Path, values: dict[str, int]) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in values.items():
        Image.new("RGB", (4, 4), (value,) * 3).save(folder / name)
    return [folder / name for name in values]


def test_pairs_with_damaged_images_are_retried(tmp_path: Path) -> None:
    paths = save(tmp_path / "a", {"0.png": 0, "1.png": 1}), save(tmp_path / "b", {"0.png": 5, "1.png": 9})
    paths[1][1].write_bytes(b"torn")
    first = detections.pair_distances(Mean(), *paths, tmp_path / "b", "t")
    assert first[0] == 5
    assert np.isnan(first[1])
    save(tmp_path / "b", {"1.png": 9})
    assert detections.pair_distances(Mean(), *paths, tmp_path / "b", "t").tolist() == [5, 8]


def test_images_are_read_once_and_the_cache_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detections, "CHUNK", 2)
    paths = save(tmp_path / "drawn", {f"{n}.png": n for n in range(5)})
    metric, cache = Mean(), tmp_path / "drawn"
    seen, failed = detections.detect(metric, [paths[3], *paths[:3], paths[3]], "a", cache, "t")
    assert seen.output["mean"].tolist() == [3, 0, 1, 2, 3]
    assert (metric.shown, failed) == (4, {})
    again, _ = detections.detect(metric, paths, "a", cache, "t")
    assert again.output["mean"].tolist() == [0, 1, 2, 3, 4]
    assert metric.shown == 5  # the one that was new
    other = Mean()
    other.name = "mean v2"
    detections.detect(other, paths, "a", cache, "t")
    assert other.shown == 5  # another detector has its own word
    assert not list(tmp_path.rglob("*.tmp"))


def test_unreadable_images_are_reported(tmp_path: Path) -> None:
    paths = save(tmp_path, {"a.png": 1, "b.png": 2, "c.png": 3})
    paths[1].write_bytes(b"no picture")
    seen, failed = detections.detect(Mean(), [*paths, tmp_path / "none.png"], "a", None, "t")
    assert seen.readable.tolist() == [True, False, True, False]
    assert seen.output["mean"].tolist() == [1, 3]
    assert failed[tmp_path / "none.png"] == "missing"
    assert "it is not one of PNG" in failed[paths[1]]
    nothing, _ = detections.detect(Mean(), [paths[1]], "a", None, "t")
    assert nothing.output["mean"].shape == (0,)


def test_replaced_images_are_read_again(tmp_path: Path) -> None:
    (path,) = save(tmp_path / "mine", {"a.png": 1})
    assert detections.detect(Mean(), [path], "a", tmp_path / "cache", "t")[0].output["mean"].tolist() == [1]
    Image.new("RGB", (8, 8), (9,) * 3).save(path)
    assert detections.detect(Mean(), [path], "a", tmp_path / "cache", "t")[0].output["mean"].tolist() == [9]


def test_damaged_cache_is_ignored(tmp_path: Path) -> None:
    paths = save(tmp_path, {"a.png": 1})
    metric = Mean()
    detections.detect(metric, paths, "a", tmp_path, "t")
    (file,) = (tmp_path / "readings").iterdir()
    file.write_bytes(file.read_bytes()[:40])
    assert detections.detect(metric, paths, "a", tmp_path, "t")[0].output["mean"].tolist() == [1]
    assert metric.shown == 2


def test_pair_distances_are_cached_and_nan_for_unreadable_images(tmp_path: Path) -> None:
    base = save(tmp_path / "base", {"a.png": 1, "b.png": 2, "c.png": 3})
    other = save(tmp_path / "other", {"a.png": 1, "b.png": 9, "c.png": 9})
    other[2].write_bytes(b"")
    metric = Mean()
    values = detections.pair_distances(metric, base, other, tmp_path / "other", "t")
    assert values[:2].tolist() == [0, 7]
    assert np.isnan(values[2])
    shown = metric.shown
    detections.pair_distances(metric, base, other, tmp_path / "other", "t")
    assert metric.shown == shown


# -- folders of existing images --


def test_folder_with_the_images_of_the_plan(tmp_path: Path) -> None:
    specs = plan_images(CONCEPT, Tier(2, 0, 0, 2, 0), [0])
    save(tmp_path / "theirs", {specs[0].file_name: 1})
    with pytest.raises(UsageError, match="1 of the 4 images"):  # what was never drawn is not forgotten
        read_image_folder(str(tmp_path / "theirs"), CONCEPT, specs)
    save(tmp_path / "theirs", {specs[2].file_name: 1})
    ready = read_image_folder(f"esd={tmp_path / 'theirs'}", CONCEPT, specs)
    assert (ready.name, ready.planned, ready.specs) == ("esd", True, specs)
    assert [path.is_file() for path in ready.paths] == [True, False, True, False]  # missing ones stay in n


def test_folder_with_metadata(tmp_path: Path) -> None:
    save(tmp_path, {"x.png": 1, "y.png": 2, "z.png": 3})
    lines = [
        '{"file_name": "x.png", "text": "a seven"}',
        '{"file_name": "y.png", "text": "a one"}',
        '{"file_name": "z.png", "prompt": "7", "group": "held_out"}',
        '{"file_name": "w.png", "text": "?", "concept": "eight"}',
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    ready = read_image_folder(str(tmp_path), CONCEPT, [])
    assert [(s.group, s.prompt.text, s.prompt.expect) for s in ready.specs] == [
        ("direct", "a seven", ()),
        ("alike", "a one", ("one",)),
        ("held_out", "7", ()),
    ]
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "x.png", "text": "what?"}')
    with pytest.raises(UsageError, match=r'line 1: "what\?" is not a prompt'):
        read_image_folder(str(tmp_path), CONCEPT, [])


def test_folder_with_metadata_csv(tmp_path: Path) -> None:
    """Read as in data folders: byte order mark, backslashes, several files refused, unknown groups refused."""
    save(tmp_path / "sub", {"x.png": 1, "y.png": 2})
    text = "\ufefffile_name,text,group,seed\nsub\\x.png,a seven,,5\n./sub/y.png,7,held_out,\n./gone.png,7,direct,\n"
    (tmp_path / "metadata.csv").write_text(text, encoding="utf-8")
    ready = read_image_folder(str(tmp_path), CONCEPT, [])
    assert [(s.group, s.prompt.text, s.seed) for s in ready.specs] == [
        ("direct", "a seven", 5),
        ("held_out", "7", 3),
        ("direct", "7", 4),
    ]
    assert ready.paths == [tmp_path / "sub/x.png", tmp_path / "sub/y.png", tmp_path / "gone.png"]
    (tmp_path / "metadata.csv").write_text("file_name,text,group\nsub/x.png,a seven,diret\n")
    with pytest.raises(UsageError, match=r'line 2: unknown group "diret"\. Did you mean "direct"\?'):
        read_image_folder(str(tmp_path), CONCEPT, [])
    for name in ("../x.png", "/etc/x.png"):
        (tmp_path / "metadata.csv").write_text(f"file_name,text\n{name},a seven\n")
        with pytest.raises(UsageError, match="is not inside"):
            read_image_folder(str(tmp_path), CONCEPT, [])
    (tmp_path / "metadata.jsonl").write_text("")
    with pytest.raises(UsageError, match="several metadata files"):
        read_image_folder(str(tmp_path), CONCEPT, [])


def test_an_image_of_the_metadata_counts_once(tmp_path: Path) -> None:
    """One good image, listed a hundred times under any of its names, must not look like a hundred images."""
    save(tmp_path, {"x.png": 1})
    (tmp_path / "link.png").symlink_to("x.png")
    line = '{"file_name": "%s", "text": "a seven"}\n'
    for name in ("x.png", "./x.png", "link.png"):
        (tmp_path / "metadata.jsonl").write_text(line % "x.png" + line % name)
        with pytest.raises(UsageError, match=f"line 2: {name} is listed twice as direct"):
            read_image_folder(str(tmp_path), CONCEPT, [])
    (tmp_path / "metadata.jsonl").write_text(
        line % "x.png" + '{"file_name": "x.png", "text": "7", "group": "held_out"}\n'
    )
    assert len(read_image_folder(str(tmp_path), CONCEPT, []).specs) == 2  # as two groups


def test_folder_with_group_subfolders(tmp_path: Path) -> None:
    save(tmp_path / "direct", {"1.png": 1, "2.jpg": 2})
    save(tmp_path / "alike", {"1.png": 1})
    ready = read_image_folder(str(tmp_path), CONCEPT, [])
    assert [spec.group for spec in ready.specs] == ["direct", "direct", "alike"]
    assert ready.specs[0].prompt.text == "a seven"
    assert ready.specs[2].prompt.text == ""  # which of the two cannot be told


def test_several_concepts_need_metadata(tmp_path: Path) -> None:
    """Otherwise the images in direct/ would count for every concept."""
    save(tmp_path / "direct", {"1.png": 1})
    with pytest.raises(UsageError, match="one --concept at a time"):
        read_image_folder(str(tmp_path), CONCEPT, [], only_concept=False)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "direct/1.png", "text": "a seven", "group": "direct"}\n')
    with pytest.raises(UsageError, match="line 1 needs a concept"):
        read_image_folder(str(tmp_path), CONCEPT, [], only_concept=False)
    line = '{"file_name": "direct/1.png", "text": "a seven", "group": "direct", "concept": "seven"}\n'
    (tmp_path / "metadata.jsonl").write_text(line + line.replace('"concept": "seven"', '"concept": "red-ink"'))
    assert len(read_image_folder(str(tmp_path), CONCEPT, [], only_concept=False).specs) == 1


def test_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--images .*is not a folder"):
        read_image_folder(str(tmp_path / "none"), CONCEPT, [])
    with pytest.raises(UsageError, match="--write_plan"):
        read_image_folder(str(tmp_path), CONCEPT, [])


def test_pairs_are_picked_without_metrics_of_single_images(tmp_path: Path) -> None:
    """As with --metrics lpips: nothing is known to leak, and the images are still shown."""
    specs = plan_images(CONCEPT, Tier(2, 0, 0, 0, 0), [0])
    images = []
    for name in ("base", "mine"):
        paths = save(tmp_path / name, {spec.file_name: 1 for spec in specs})
        images.append(SubjectImages(name, specs, paths, None))
    pairs = pick_pairs(ConceptResults(CONCEPT, images), tmp_path / "out", 5)
    assert [(pair.subject, pair.leak, pair.image_read) for pair in pairs] == [("mine", False, "")] * 2
    assert all((tmp_path / "out" / file).is_file() for pair in pairs for file in (pair.base, pair.image))


@pytest.mark.parametrize(("kind", "leak"), [("nudity", True), ("person", False)])
def test_pairs_leak_by_the_detector_that_gives_the_verdict(tmp_path: Path, kind: Any, leak: bool) -> None:
    concept = dataclasses.replace(CONCEPT, kind=kind)
    specs = plan_images(concept, Tier(1, 0, 0, 0, 0), [0])
    images = [SubjectImages("mine", specs, save(tmp_path / "mine", {spec.file_name: 1 for spec in specs}), None)]
    found = [ImageValues(name, ("direct",), np.array([value])) for name, value in (("leakage", 0.0), ("nudity", 1.0))]
    for values in (found, found[::-1]):
        (pair,) = pick_pairs(ConceptResults(concept, images, values={"mine": values}), tmp_path / "out", 5)
        assert pair.leak == leak


def test_lost_pairs_are_shown_as_leaks_are(tmp_path: Path) -> None:
    """8 of 60 look-alikes are lost; none of them is among the first images of the two prompts."""
    specs = plan_images(CONCEPT, Tier(0, 0, 0, 60, 0), [0])
    images, values = [], {}
    right = np.ones(len(specs))
    for name in ("base", "mine"):
        paths = save(tmp_path / name, {spec.file_name: 1 for spec in specs})
        images.append(SubjectImages(name, specs, paths, None))
        values[name] = [ImageValues("accuracy", ("alike",), right.copy())]
    values["mine"][0].values[40:48] = 0
    results = ConceptResults(CONCEPT, images, values=values)
    assert sum(pair.lost for pair in pick_pairs(results, tmp_path / "out", 4)) == 4
    assert sum(pair.lost for pair in pick_pairs(results, tmp_path / "out", 10)) == 8
    (counted,) = count_outcomes(results)
    assert (counted.subject, counted.group, counted.leaks, counted.lost) == ("mine", "alike", 0, 8)


def test_pairs_are_of_all_prompts_first_images_first(tmp_path: Path) -> None:
    """Of 60 images of ten prompts that take turns, every second image would leave out five prompts."""
    texts = [f"wording {number}" for number in range(10)]
    concept = dataclasses.replace(CONCEPT, evaluate=Evaluation(held_out=texts))
    specs = plan_images(concept, Tier(0, 60, 0, 0, 0), [0])
    paths = save(tmp_path / "mine", {spec.file_name: 1 for spec in specs})
    results = ConceptResults(concept, [SubjectImages("mine", specs, paths, None)])
    pairs = pick_pairs(results, tmp_path / "out", 24)
    assert [(pair.prompt, pair.seed) for pair in pairs] == [(spec.prompt.text, spec.seed) for spec in specs[:24]]
    by_prompt = sorted(specs, key=lambda spec: spec.prompt.text)
    paths = save(tmp_path / "mine", {spec.file_name: 1 for spec in by_prompt})
    results = ConceptResults(concept, [SubjectImages("mine", by_prompt, paths, None)])
    assert [pair.prompt for pair in pick_pairs(results, tmp_path / "out", 24)][:10] == texts
