"""Two concepts in one LoRA, from their files to the exported header, on the tiny base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CONCEPT_FILE
from export_runs import exported, read_header

from sd_unlearn.config.base import RenderConfig
from sd_unlearn.config.evaluate import EvaluateConfig
from sd_unlearn.config.train import TrainConfig
from sd_unlearn.data import render
from sd_unlearn.data.dataset import Example
from sd_unlearn.data.prior import ImageEmbeddings
from sd_unlearn.data.several import load_concepts
from sd_unlearn.errors import UsageError
from sd_unlearn.evaluation.job import resolve_job
from sd_unlearn.evaluation.loras import open_lora
from sd_unlearn.io.reading import read_json, read_jsonl, read_yaml
from sd_unlearn.training import betas, learned_captions, trainer
from sd_unlearn.training.betas import resolve_betas
from sd_unlearn.training.learned_captions import LearnedCaption

pytestmark = pytest.mark.usefixtures("one_thread")
PITT = CONCEPT_FILE + "  alike: ['a photo of {Tom Hanks,Jackie Chan}']\n"
CHAN = PITT.replace("name: Brad Pitt", "name: Jackie Chan").replace("a photo of Brad Pitt", "a photo of Jackie Chan")
CHAN = CHAN.replace("{Tom Hanks,Jackie Chan}", "{Tom Hanks,Brad Pitt}")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("several")
    (folder / "pitt.yaml").write_text(PITT)
    (folder / "chan.yaml").write_text(CHAN)
    return folder


def options(place: Path, base: Path, **changes: object) -> TrainConfig:
    given = {
        "concept": [str(place / "pitt.yaml"), str(place / "chan.yaml")],
        "pretrained_model_name_or_path": str(base),
        "data_dir": place / "data",
        "output_dir": place / "run",
        "num_inference_steps": 2,
        "rank": 2,
        "max_train_steps": 4,
        "effective_batch_size": 16,
        "train_batch_size": 6,
        "validation_steps": 2,
        "checkpointing_steps": 3,
        "report_to": "none",
    }
    return TrainConfig(**given | changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def run(place: Path, tiny_base: Path) -> Path:
    return trainer.run(options(place, tiny_base))


def test_the_data_folder_has_a_set_of_positives_for_each(run: Path, place: Path) -> None:
    data = place / "data"
    assert sorted(path.name for path in data.iterdir() if path.is_dir()) == [
        *("0_unlabeled", "1_positive_brad-pitt", "1_positive_jackie-chan", "cache")
    ]
    manifest = read_json(data / "manifest.json")
    assert manifest["counts"] == {"generic": 4, "mixed_in": 2, "keep": 4, "positive": 8}  # shared images once
    captions = [line["text"] for line in read_jsonl(data / "1_positive_jackie-chan" / "metadata.jsonl")]
    assert captions == ["a photo of Jackie Chan"] * 4


def test_the_run_names_both(run: Path) -> None:
    record = read_json(run / "training.json")
    assert record["concepts"] == ["brad-pitt", "jackie-chan"]
    assert record["betas"] == {"brad-pitt": 0.2, "jackie-chan": 0.2}  # of 4 generic images and one mixed in
    assert record["cost"]["images_seen"] == 4 * 16
    lora = open_lora(str(run))
    assert [concept.name for concept in lora.concepts] == ["Brad Pitt", "Jackie Chan"]
    assert len(read_yaml(run / "config.yaml", "")["concept"]) == 2


def test_it_is_evaluated_on_each_without_the_other(run: Path) -> None:
    job = resolve_job(EvaluateConfig(run=run, num_images=1, num_keep_images=1))
    assert list(job.concepts) == ["brad-pitt", "jackie-chan"]
    assert [subject.concepts for subject in job.subjects] == [("brad-pitt", "jackie-chan")]
    assert job.subjects[0].describe()["forgets_together"] == ["brad-pitt", "jackie-chan"]
    kept = {spec.prompt.text for spec in job.plans["brad-pitt"] if spec.group == "alike"}
    assert kept == {"a photo of Tom Hanks"}


def test_the_exported_header_lists_both(run: Path, tmp_path: Path) -> None:
    files = exported(run, output_dir=tmp_path / "export")
    for file in files:
        header = read_header(file)
        assert json.loads(header["sd_unlearn.concepts"]) == ["Brad Pitt", "Jackie Chan"]
        assert header["sd_unlearn.concept"] == "Brad Pitt, Jackie Chan"
    found = open_lora(str(files[1]))  # both have files among the bundled concepts
    assert [concept.slug for concept in found.concepts] == ["brad-pitt", "jackie-chan"]
    assert "For the prompt “a photo of Jackie Chan”" in (tmp_path / "export" / "README.md").read_text(encoding="utf-8")


def test_an_interrupted_training_ends_with_the_same_weights(
    run: Path, place: Path, tiny_base: Path, tmp_path: Path
) -> None:
    """The order of the concepts is part of a checkpoint."""
    shutil.copytree(run, tmp_path / "cut", ignore=shutil.ignore_patterns("step-000004", "training.json"))
    again = options(place, tiny_base, output_dir=tmp_path / "cut", resume_from_checkpoint="latest")
    assert open_lora(str(trainer.run(again))).sha256 == open_lora(str(run)).sha256


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"positives": Path("photos")}, "--positives photos is for one concept"),
        ({"beta_sweep": "0.5,1"}, "--beta_sweep 0.5,1 is for one concept"),
        ({"anchor": "a man"}, "--anchor and --kind are for one concept"),
        ({"probe_steps": 2}, "--probe ratio is for one concept"),
    ],
)
def test_options_for_one_concept(place: Path, tiny_base: Path, changes: dict[str, object], fault: str) -> None:
    with pytest.raises(UsageError, match=fault):
        trainer.run(options(place, tiny_base, output_dir=Path("refused"), **changes))


def test_every_source_of_beta_is_named(place: Path) -> None:
    """beta is unknown for a concept that none or all of its unlabeled images show."""
    both = load_concepts([str(place / "pitt.yaml"), str(place / "chan.yaml")])
    shown = Example(Path("0.png"), "a photo of Brad Pitt", "mixed_in", own_caption=True)
    others = [Example(Path(f"{number}.png"), "a photo of a man", "generic", own_caption=True) for number in range(4)]
    Path("manifest.json").touch()
    unused: Any = None
    betas, prior = resolve_betas(TrainConfig(data_dir=Path()), both, unused, [shown, *others], unused)
    assert betas == {"brad-pitt": 0.2, "jackie-chan": 0.1}
    assert prior.source == "known, assumed"


def test_one_encoder_embeds_the_images_of_all_concepts(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []

    class Embedder:
        def __init__(self, *arguments: object) -> None:
            made.append(arguments)

        def embed(self, examples: list[Example]) -> ImageEmbeddings:
            random = np.random.default_rng(0)
            return ImageEmbeddings("CLIP", "", random.normal(1, 0.1, (20, 2)), random.normal(0, 1, (40, 2)))

    monkeypatch.setattr(betas, "Embedder", Embedder)
    both = load_concepts([str(place / "pitt.yaml"), str(place / "chan.yaml")])
    unused: Any = None
    found, prior = resolve_betas(TrainConfig(data_dir=Path(), beta="estimate"), both, unused, [], unused)
    assert (len(found), prior.source, len(made)) == (2, "estimated", 1)


@pytest.fixture
def own_photos(photos: Callable[..., Path]) -> Path:
    """Photos without captions, in the folders of both concepts."""
    folder = photos(unlabeled=4, positive=3)
    (folder / "1_positive").rename(folder / "1_positive_brad-pitt")
    shutil.copytree(folder / "1_positive_brad-pitt", folder / "1_positive_jackie-chan")
    return folder


def test_own_photos_without_captions_are_for_each(place: Path, tiny_base: Path, own_photos: Path) -> None:
    (place / "woman.yaml").write_text(CHAN.replace("generic: a photo of a man", "generic: a photo of a woman"))
    concepts = [str(place / "pitt.yaml"), str(place / "woman.yaml")]
    changes = {"concept": concepts, "data_dir": own_photos, "output_dir": Path("run"), "validation_steps": 0}
    trainer.run(options(place, tiny_base, **changes))
    assert read_json(Path("run/training.json"))["cost"]["steps"] == 4  # two for each
    lines = [json.dumps({"file_name": f"{i}.png", "text": "a photo of a man"}) for i in range(4)]
    (own_photos / "0_unlabeled" / "metadata.jsonl").write_text("\n".join(lines))
    with pytest.raises(UsageError, match=r"none for Jackie Chan. Add images of 'a photo of a woman'"):
        trainer.run(options(place, tiny_base, **changes, overwrite=True))
    assert Path("run/training.json").is_file()


def test_other_images_are_not_mixed_with_those_of_one(run: Path, place: Path, tiny_base: Path) -> None:
    one = RenderConfig(
        concept=str(place / "pitt.yaml"), pretrained_model_name_or_path=str(tiny_base), data_dir=place / "data"
    )
    with pytest.raises(UsageError, match="rendered with other settings: --concept Brad Pitt, Jackie Chan then"):
        render.run(one)


def test_robust_training_learns_a_caption_for_each(
    place: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"START": 0, "EVERY": 1, "POOL": 1, "SEARCH_STEPS": 1, "ROWS": 2}.items():
        monkeypatch.setattr(learned_captions, name, value)
    captions: dict[str, list[LearnedCaption]] = {}
    update = LearnedCaption.update

    def watched(self: LearnedCaption, step: int) -> None:
        captions.setdefault(self.name, []).append(self)
        update(self, step)

    monkeypatch.setattr(LearnedCaption, "update", watched)
    trainer.run(options(place, tiny_base, output_dir=tmp_path / "run", robust=True, validation_steps=0))
    assert [len(updates) for updates in captions.values()] == [2, 2]
    searched = [updates[0].positives for updates in captions.values()]
    assert [len(positives) for positives in searched] == [4, 4]
    assert not set(searched[0]) & set(searched[1])
