"""What a training refuses about its concepts before anything is rendered or loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sd_unlearn.config.train import TrainConfig
from sd_unlearn.data.concept import Concept, Images
from sd_unlearn.data.several import together
from sd_unlearn.errors import UsageError
from sd_unlearn.training import trainer
from sd_unlearn.training.concept_checks import check_concept, check_counts, check_several, describe_few_steps
from sd_unlearn.training.preflight import check_inputs

SAME = Concept("Brad Pitt", "a photo of Brad Pitt", "A photo of  Brad Pitt")
THREE = together([Concept(name, f"a {name}", "it", keep=["a house"]) for name in ("cat", "dog", "cow")])


@pytest.mark.parametrize(
    ("options", "hint"),
    [({}, "--target noise"), ({"objective": "anchor"}, ""), ({"objective": "uce"}, ""), ({"objective": "rece"}, "")],
)
def test_a_concept_that_is_replaced_with_itself_is_refused(options: dict[str, Any], hint: str) -> None:
    with pytest.raises(UsageError, match='both "a photo of Brad Pitt", so nothing would be erased') as refused:
        trainer.run(TrainConfig(concept="Brad Pitt", output_dir=Path("run"), **options), SAME)
    assert ("--target noise" in str(refused.value)) == bool(hint)
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    "options", [{"target": "noise"}, {"objective": "esd-x"}, {"objective": "supervised", "target": "noise"}]
)
def test_where_the_generic_prompt_is_no_target_it_may_be_the_caption(options: dict[str, Any]) -> None:
    check_concept(TrainConfig(**options), SAME)


def test_each_concept_needs_steps() -> None:
    with pytest.raises(UsageError, match="--max_train_steps 2 is less than the 3 concepts.* at least 75"):
        check_several(TrainConfig(max_train_steps=2), THREE)
    check_several(TrainConfig(max_train_steps=3), THREE)
    check_several(TrainConfig(objective="uce", max_train_steps=2), THREE)  # without steps


def test_a_few_steps_of_each_concept_are_warned_of_if_they_were_asked_for() -> None:
    (line,) = describe_few_steps(TrainConfig(max_train_steps=74), THREE)
    assert line.startswith("Warning: --max_train_steps 74 gives each of 3 concepts about 24 steps.")
    assert not describe_few_steps(TrainConfig(max_train_steps=75), THREE)
    assert not describe_few_steps(TrainConfig(max_train_steps=10), THREE.parts[0])
    many = together([Concept(f"thing {n}", f"a thing {n}", "it") for n in range(30)])
    assert not describe_few_steps(TrainConfig(), many)  # the default grows
    assert line in check_inputs(TrainConfig(max_train_steps=74, pretrained_model_name_or_path="digits"), THREE).notes


@pytest.mark.parametrize(
    ("images", "folder", "option"),
    [
        (Images(positive=1), "1_positive", "--num_positive"),
        (Images(unlabeled=1, mixed_in=0, keep=0), "0_unlabeled", "--num_unlabeled"),
    ],
)
def test_a_folder_of_one_image_is_refused_before_it_is_rendered(images: Images, folder: str, option: str) -> None:
    concept = Concept("cat", "a cat", "an animal", keep=["a house"], images=images)
    options = TrainConfig(pretrained_model_name_or_path="digits", data_dir=Path("data"), output_dir=Path("run"))
    with pytest.raises(UsageError, match=f"data/{folder} would hold 1 image.* Raise {option}"):
        trainer.run(options, concept)
    assert not list(Path().iterdir())


def test_folders_of_enough_images() -> None:
    concept = Concept("cat", "a cat", "an animal", images=Images(positive=1, unlabeled=1, mixed_in=1))
    check_counts(TrainConfig(positives=Path("photos")), concept, Path("data"))
    check_counts(TrainConfig(num_positive=2), concept, Path("data"))
    both = together([concept, Concept("dog", "a dog", "an animal")])
    with pytest.raises(UsageError, match="data/1_positive_cat would hold 1 image"):
        check_counts(TrainConfig(), both, Path("data"))
