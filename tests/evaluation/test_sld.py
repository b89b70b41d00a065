"""`evaluate --sld`: safe latent diffusion as a model beside a LoRA."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from evaluation_runs import make_run

from sd_unlearn.config.base import ReportConfig
from sd_unlearn.config.evaluate import EvaluateConfig
from sd_unlearn.errors import UsageError
from sd_unlearn.evaluation import evaluate
from sd_unlearn.evaluation.job import resolve_job
from sd_unlearn.models import sampling
from sd_unlearn.report import report
from sd_unlearn.results import read_results

pytestmark = pytest.mark.usefixtures("one_thread")
FEW: dict[str, Any] = {"num_images": 2, "num_keep_images": 1, "num_inference_steps": 2, "render_batch_size": 8}


def test_it_is_compared_like_a_lora_and_cached(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "mine", tiny_base)
    config = EvaluateConfig(**FEW, run=run, sld=["max"], cache_dir=tmp_path / "cache", output_dir=tmp_path / "out")
    evaluate.run(config)
    results = read_results(tmp_path / "out")
    assert [(s.id, s.what) for s in results.subjects] == [("base", "base"), ("mine", "lora"), ("sld-max", "images")]
    assert results.subjects[2].forgets == "seven"
    entry = evaluate.run(config)["subjects"][2]
    assert entry["sld"]["text"] == "seven"
    assert entry["sld"]["settings"]["scale"] == 5000
    measured = {(row.subject, row.metric, row.group) for row in results.rows}
    for metric in (("leakage", "direct"), ("retention", "kept"), ("drift", "kept")):
        assert {("mine", *metric), ("sld-max", *metric)} <= measured
    compared = {(d.subject, d.against) for d in results.differences}
    assert ("sld-max", "base") in compared
    assert {("sld-max", "mine"), ("mine", "sld-max")} & compared
    (base,) = (tmp_path / "cache").glob("*/*/base")
    (guided,) = base.parent.glob("sld-max-*")
    names = sorted(path.name for path in base.glob("*.png"))
    assert names == sorted(path.name for path in guided.glob("*.png"))
    assert any((base / name).read_bytes() != (guided / name).read_bytes() for name in names)
    monkeypatch.setattr(sampling, "generate_images", pytest.fail)
    evaluate.run(config)
    report.run(ReportConfig(run=tmp_path / "out"))
    page = (tmp_path / "out" / "report.html").read_text()
    assert "sld-max" in page
    assert "The LoRA does the forgetting." in page
    assert "Safe latent diffusion only guides the sampling." in page


def test_a_report_on_it_alone_names_it(tiny_base: Path, tmp_path: Path) -> None:
    config = EvaluateConfig(**FEW, sld=["max"], concept=["seven"], pretrained_model_name_or_path=str(tiny_base))
    evaluate.run(dataclasses.replace(config, cache_dir=tmp_path / "cache", output_dir=tmp_path / "out"))
    assert read_results(tmp_path / "out").subjects[1].method == "safe latent diffusion"
    report.run(ReportConfig(run=tmp_path / "out", certificate=True))
    for name in ("report.html", "report.md", "certificate.html"):
        page = (tmp_path / "out" / name).read_text()
        assert "given images" not in page.lower(), name
        assert "afe latent diffusion" in page, name
        assert "The LoRA does the forgetting" not in page, name
        assert "for this LoRA file" not in page, name


def test_a_subject_for_each_preset_and_concept(tiny_base: Path) -> None:
    config = EvaluateConfig(
        sld=["weak", "strong"], concept=["seven", "three"], pretrained_model_name_or_path=str(tiny_base)
    )
    subjects = resolve_job(config).subjects
    assert [subject.id for subject in subjects] == [
        *("sld-weak seven", "sld-weak three", "sld-strong seven", "sld-strong three"),
    ]
    assert [subject.concepts for subject in subjects[:2]] == [("seven",), ("three",)]
    assert len({subject.variant.folder for subject in subjects if subject.variant}) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"--sld medium needs --concept"),
        ({"concept": ["seven"], "guidance_scale": 1.0}, r"--sld medium needs --guidance_scale above 1; it is 1\."),
        ({"concept": ["seven"], "num_inference_steps": 10}, "--sld medium only acts after 10 sampling steps"),
    ],
)
def test_what_it_needs(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve_job(EvaluateConfig(sld=["medium"], **options))


def test_a_lora_of_that_name_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "sld-medium", tiny_base)
    with pytest.raises(UsageError, match="--sld: a LoRA is called sld-medium, too"):
        resolve_job(EvaluateConfig(run=run, sld=["medium"]))
