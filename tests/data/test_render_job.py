"""The base of a rendering: concept files of the bundled bases are for these."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from sd_unlearn.config.base import RenderConfig
from sd_unlearn.config.evaluate import EvaluateConfig
from sd_unlearn.config.train import TrainConfig
from sd_unlearn.data import render
from sd_unlearn.data.concept import Concept
from sd_unlearn.data.render_job import find_base_of
from sd_unlearn.data.several import load_concepts
from sd_unlearn.errors import UsageError
from sd_unlearn.evaluation.job import resolve_job
from sd_unlearn.models.source import BUNDLED
from sd_unlearn.training.preflight import check_inputs

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"


def base_of(concepts: str | list[str], base: str | None, **options: str) -> str:
    concept = load_concepts(concepts, **options)  # type: ignore[arg-type]
    return find_base_of(concept, RenderConfig(pretrained_model_name_or_path=base)).name


@pytest.mark.parametrize(
    ("concept", "command"),
    [
        ("cat", "use --concept cat --kind object --anchor 'a barn' "),
        ("santa-claus", "use --concept 'Santa Claus' --kind person --anchor 'a middle aged woman' "),
        ("openmoji-style", "use --concept 'OpenMoji style' --kind style --anchor 'a painting by an unknown artist' "),
        ("red-ink", "use --concept 'red ink' --kind other --anchor 'a cat' "),
    ],
)
def test_a_concept_of_a_bundled_base_is_refused_for_a_hub_id(concept: str, command: str) -> None:
    with pytest.raises(UsageError) as caught:
        base_of(concept, SD15)
    assert command in str(caught.value)
    assert SD15 in str(caught.value)


def test_several_concepts_need_files() -> None:
    with pytest.raises(UsageError, match="after sd-unlearn concepts new cat .* --output my-cat.yaml, and the like"):
        base_of(["cat", "guitar"], SD15)


def test_without_its_file_a_concept_is_for_any_base() -> None:
    assert base_of("cat", SD15, anchor="a dog", kind="object") == SD15


def test_bundled_bases_and_folders_are_used(tmp_path: Path) -> None:
    assert base_of("cat", None) == "emoji"
    assert base_of("seven", "digits-sd3") == "digits-sd3"
    copy = shutil.copytree(BUNDLED["digits"], tmp_path / "digits")
    assert base_of("seven", str(copy)) == str(copy)
    assert base_of("brad-pitt", SD15) == SD15


def test_train_and_render_refuse_it_before_anything_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    concept: Concept = load_concepts("cat")
    with pytest.raises(UsageError, match="is for the base emoji"):
        check_inputs(TrainConfig(concept="cat", pretrained_model_name_or_path=SD15), concept)
    with pytest.raises(UsageError, match="is for the base emoji"):
        render.run(RenderConfig(concept="cat", pretrained_model_name_or_path=SD15))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [{"images": ["mine"]}, {"sld": ["max"]}])
def test_evaluate_refuses_it_too(options: dict[str, Any]) -> None:
    config = EvaluateConfig(concept=["cat"], pretrained_model_name_or_path=SD15, **options)
    with pytest.raises(UsageError, match=r"use --concept my-cat.yaml after sd-unlearn concepts new cat --kind object"):
        resolve_job(config)
