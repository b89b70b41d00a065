"""Where the images of an evaluation are cached."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import scheduled
from evaluation_runs import make_run

from sd_unlearn.config.evaluate import EvaluateConfig
from sd_unlearn.data import plan
from sd_unlearn.evaluation import generate
from sd_unlearn.evaluation.evaluate import assemble
from sd_unlearn.evaluation.generate import BaseLoader, ImageCache, image_cache
from sd_unlearn.evaluation.job import resolve_job
from sd_unlearn.evaluation.loras import ModelVariant
from sd_unlearn.io.files import write_json
from sd_unlearn.io.reading import read_json
from sd_unlearn.models.sampling import Sampler
from sd_unlearn.models.source import BUNDLED, Source


def folder(name: str, **record: Any) -> str:
    base = {"name": name, "sha256": "ab", "vae_sha256": "cd", "text_encoder_sha256": "ef", **record}
    return str(ImageCache(Path("cache"), base, Sampler(25, 3.0, 4)).base_folder)


@pytest.mark.parametrize("name", ["models/theirs.safetensors", "models/theirs.CKPT"])
def test_images_of_another_prediction_type_are_not_reused(name: str) -> None:
    """--prediction_type says what a single file predicts; its weights, and so their hash, stay the same."""
    wrong, right = (folder(name, prediction_type=predicted) for predicted in ("epsilon", "v_prediction"))
    assert wrong != right
    assert folder(name) == wrong  # as folders were called before


def test_the_configuration_of_other_bases_says_what_they_predict() -> None:
    assert len({folder("owner/sd2", prediction_type=predicted) for predicted in ("epsilon", "v_prediction")}) == 1


def test_images_of_another_schedule_are_not_reused(tiny_base: Path, tmp_path: Path) -> None:
    """A corrected scheduler_config.json of a folder changes all images, but no weights."""
    base, folders = scheduled(tiny_base, tmp_path / "base"), list[Path]()
    run, file = make_run(tmp_path / "run", base), base / "scheduler" / "scheduler_config.json"
    for settings in ({}, {"prediction_type": "v_prediction"}, {"beta_schedule": "linear"}):
        write_json(file, read_json(file) | settings)
        for named in (None, str(base)):  # known from the run's record, or loaded
            job = resolve_job(EvaluateConfig(lora=[str(run)], pretrained_model_name_or_path=named, num_images=1))
            folders.append(image_cache(job, BaseLoader(job)).base_folder)
    assert len(set(folders[0::2])) == len(set(folders[1::2])) == 3


def test_processes_share_images_whatever_fits_into_their_memory(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = resolve_job(EvaluateConfig(lora=[str(make_run(tmp_path / "run", tiny_base))], num_images=1))
    shares = []
    monkeypatch.setattr(generate, "generate_missing", lambda *given: shares.append(given[2:]) or 0)
    for size in (4, 1):
        monkeypatch.setattr(plan, "planned_sampler", lambda _, sampler, __, n=size: replace(sampler, batch_size=n))
        cache = generate.planned_cache(job, BaseLoader(job))
        cache.generate(pytest.fail, ModelVariant(), [], "generate base")
    assert [(sampler.batch_size, share) for sampler, _, share in shares] == [(4, 4), (1, 4)]


@pytest.mark.parametrize("name", ["digits", "digits-sd3"])
def test_images_of_copies_of_bundled_bases_keep_their_folders(name: str) -> None:
    assert folder("copies/digits", schedule=Source(str(BUNDLED[name])).schedule) == folder("copies/digits")


def test_images_from_a_cpu_are_in_full_precision_whatever_was_asked_for(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run = str(make_run(tmp_path / "run", tiny_base))
    jobs = [resolve_job(EvaluateConfig(lora=[run], mixed_precision=precision)) for precision in ("no", "fp16")]
    plain, asked = (image_cache(job, BaseLoader(job)) for job in jobs)
    assert asked.base_folder == plain.base_folder
    assert assemble(jobs[1], asked, [], [])["sampler"]["mixed_precision"] == "no"
    said = "No CUDA device: computing in full precision on the CPU instead of fp16."
    assert capsys.readouterr().err.count(said) == 1
