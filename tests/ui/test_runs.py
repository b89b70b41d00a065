"""What the page lists from the working folder. No Gradio."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from export_runs import evaluated, hand_run
from safetensors.torch import save_file

from sd_unlearn.config.base import ReportConfig
from sd_unlearn.data.several import read_concepts, together, write_concepts
from sd_unlearn.errors import UsageError
from sd_unlearn.io.files import write_json
from sd_unlearn.io.run_folder import weights_sha256
from sd_unlearn.report.report import run as write_report
from sd_unlearn.ui import runs
from sd_unlearn.ui.runs import as_table, calibrated_strength, cut_note, find_finished, find_loras, report_file


@pytest.fixture
def root(tmp_path: Path) -> Path:
    hand_run(tmp_path / "runs" / "plain")
    evaluated(tmp_path / "runs" / "brad")
    for name in ("loras/mine.safetensors", ".hidden/no.safetensors", "a/b/c/d/e/f/deep.safetensors"):
        write_tensor(tmp_path / name, "lora_unet_mid_block.lora_down.weight")
    return tmp_path


def write_tensor(file: Path, name: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: torch.zeros(2, 2)}, file)


def test_bases_and_other_files_are_not_offered_as_loras(root: Path) -> None:
    loras = ["lora_A.weight", "hada_w1_a", "lokr_w1", "diff"]
    others = ["model.diffusion_model.out.2.weight", "decoder.conv_in.weight", "text_model.embeddings.weight", "diffs.0"]
    for number, name in enumerate([*loras, *others]):
        write_tensor(root / "files" / f"{number}.safetensors", f"unet.mid_block.{name}")
    (root / "files" / "damaged.safetensors").write_text("no")
    found = [name for name in find_loras(root) if name.startswith("files/")]
    assert found == [f"files/{number}.safetensors" for number in range(len(loras))]


def test_loras_are_runs_and_files_but_not_the_files_of_runs(root: Path) -> None:
    (root / "runs" / "brad" / "export").mkdir()
    (root / "runs" / "brad" / "export" / "brad-pitt.safetensors").touch()
    (root / "runs" / "broken").mkdir()
    assert find_loras(root) == ["runs/brad", "runs/plain", "loras/mine.safetensors"]


def test_the_list_shows_verdicts_and_opens_only_reports(root: Path) -> None:
    (before,) = find_finished(root)
    assert before.report is None
    write_report(ReportConfig(run=root / "runs" / "brad"))
    (found,) = find_finished(root)
    assert (found.name, found.report) == ("runs/brad", "report.html")
    assert found.verdicts == ("Brad Pitt, mine: Gone (leakage 1.0 %, retention 99.0 %)",)
    assert 'href="/reports/runs/brad/report.html"' in as_table([found])
    assert report_file(root, "runs/brad", "report.html").is_file()
    (root / "report.html").write_text("mine")
    for run, name in (
        ("runs/brad", "training.json"),
        ("runs/brad", "report.md"),
        (".", "report.html"),
        ("..", "report.html"),
        ("runs/plain", "report.html"),
    ):
        with pytest.raises(UsageError):
            report_file(root, run, name)


def test_the_comparison_of_a_job_list_is_listed(root: Path) -> None:
    comparison = root / "runs/batch/lists/jobs/comparison"
    comparison.mkdir(parents=True)
    (comparison / "results.json").write_text("{}")
    assert "runs/batch/lists/jobs/comparison" in {run.name for run in find_finished(root)}


def test_many_folders_are_reported_and_many_files_are_not_counted(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "MOST", 30)
    for number in range(40):
        (root / f"{number}.png").touch()
    assert cut_note(root) == ""
    assert find_finished(root)
    for number in range(30):
        (root / f"empty-{number}").mkdir()
    assert cut_note(root).startswith("Only the first 30 folders were searched")


def test_damaged_results_are_listed_and_names_are_escaped(root: Path) -> None:
    evil = root / "<b>x"
    evil.mkdir()
    (evil / "results.json").write_text("{")
    found = {run.name: run for run in find_finished(root)}
    assert found["<b>x"].verdicts[0].startswith("Cannot be read")
    assert "<b>" not in as_table(list(found.values()))


def test_the_slider_starts_at_the_calibrated_strength_of_these_weights_and_concepts(root: Path) -> None:
    record: dict[str, Any] = {
        **{"schema_version": 1, "concept": "brad-pitt", "leakage": 0.05, "retention": 0.95, "points": []},
        **{"smallest": 0.8, "largest": 1.3, "strength": 0.8, "message": "It works."},
    }
    run = root / "runs" / "brad"
    write_json(run / "calibration.json", record | {"sha256": weights_sha256(run)})
    assert calibrated_strength(root, ["runs/brad"]) == 0.8
    assert calibrated_strength(root, ["runs/brad", "runs/plain"]) == 1
    assert calibrated_strength(root, ["runs/plain"]) == 1
    assert calibrated_strength(root, ["../nowhere"]) == 1
    write_json(run / "calibration.json", record | {"sha256": "of other weights"})
    assert calibrated_strength(root, ["runs/brad"]) == 1
    write_json(run / "calibration.json", record | {"sha256": weights_sha256(run)})
    concept = read_concepts(run / "concept.yaml")
    other = dataclasses.replace(concept, name="Tom Cruise", caption="a photo of Tom Cruise")
    write_concepts(run / "concept.yaml", together([concept, other]))
    assert calibrated_strength(root, ["runs/brad"]) == 1  # it is of one of the two
