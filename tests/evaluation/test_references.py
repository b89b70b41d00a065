"""Options that belong to one concept of several: --reference and --label."""

from __future__ import annotations

from pathlib import Path

import pytest

from sd_unlearn.config.evaluate import EvaluateConfig
from sd_unlearn.data.concept import Concept
from sd_unlearn.errors import UsageError
from sd_unlearn.evaluation.job import resolve_job
from sd_unlearn.evaluation.references import check_label, reference_folders

BRAD = Concept("Brad Pitt", "a photo of Brad Pitt", "a photo of a man", kind="person")
ANGELINA = Concept("Angelina Jolie", "a photo of Angelina Jolie", "a photo of a woman", kind="person")
CHURCH = Concept("church", "a photo of a church", "a photo of a barn", kind="object")


@pytest.fixture(autouse=True)
def photos(_in_a_folder_of_its_own: None) -> None:
    for name in ("brad", "angelina"):
        (Path("photos") / name).mkdir(parents=True)


def folders(*given: str, of: tuple[Concept, ...] = (BRAD, ANGELINA)) -> dict[str, Path]:
    return reference_folders(given, {concept.slug: concept for concept in of})


def test_a_folder_without_a_name_is_of_the_only_concept_or_person() -> None:
    assert folders("photos/brad", of=(BRAD,)) == {"brad-pitt": Path("photos/brad")}
    assert folders("photos/brad", of=(CHURCH,)) == {"church": Path("photos/brad")}
    assert folders("photos/brad", of=(CHURCH, BRAD)) == {"brad-pitt": Path("photos/brad")}
    assert folders() == {}


def test_folders_with_names() -> None:
    both = {"brad-pitt": Path("photos/brad"), "angelina-jolie": Path("photos/angelina")}
    assert folders("Brad Pitt=photos/brad", "angelina-jolie=photos/angelina") == both


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["photos/brad"], r"whose photos these are, .*\(Brad Pitt, Angelina Jolie\).* as in brad-pitt=photos/brad"),
        (["brad pit=photos/brad"], r'no concept brad pit is evaluated\. Did you mean "brad-pitt"\?'),
        (["brad-pitt=photos/brad", "Brad Pitt=photos"], "Brad Pitt already has the folder photos/brad"),
        (["brad-pitt=photos/bard"], "photos/bard is not a folder"),
    ],
)
def test_folders_that_cannot_be_assigned_are_refused(given: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        folders(*given)


def test_one_label_for_several_concepts_is_refused() -> None:
    check_label("church", {"church": CHURCH})
    check_label(None, {"church": CHURCH, "brad-pitt": BRAD})
    with pytest.raises(UsageError, match=r"--label church .* all 2 concepts \(church, Brad Pitt\).*label: into each"):
        check_label("church", {"church": CHURCH, "brad-pitt": BRAD})


def test_evaluate_refuses_them_before_anything_loads() -> None:
    asked = {"concept": ["brad-pitt", "jackie-chan"], "images": ["mine"]}
    with pytest.raises(UsageError, match="--reference photos/brad does not say whose"):
        resolve_job(EvaluateConfig(**asked, reference=["photos/brad"]))
    with pytest.raises(UsageError, match="--label church"):
        resolve_job(EvaluateConfig(**asked, label="church"))
