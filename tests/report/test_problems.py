"""A problem in results.json: no verdict is given anywhere, and every place names the reason."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from report_results import make_results, parsed, plain

from sd_unlearn.config.base import ReportConfig
from sd_unlearn.errors import UsageError
from sd_unlearn.io import files
from sd_unlearn.report.cases import cases_of
from sd_unlearn.report.compare import headline
from sd_unlearn.report.report import run
from sd_unlearn.report.terminal import format_table

GROUP_COUNTS = (("direct", 5, 0), ("alike", 0, 8))
REASON = "150 of the 200 direct images are of one flat colour."


def problem(kind: str = "flat", subject: str = "lora", **rest: Any) -> dict[str, Any]:
    return {"concept": "seven", "subject": subject, "kind": kind, "message": REASON} | rest


@pytest.mark.parametrize("subject", ["lora", "base"])
def test_cannot_tell_with_the_reason_in_every_file(tmp_path: Path, subject: str) -> None:
    assert format_table(parsed()).startswith("seven: Gone.")
    results = make_results(problems=[problem(subject=subject, group="direct", share=0.75)])
    files.write_json(tmp_path / "results.json", results)
    run(ReportConfig(run=tmp_path, certificate=True))
    for name in ("report.html", "report.md", "certificate.html"):
        text = plain((tmp_path / name).read_text())
        assert REASON in text.replace("**", ""), name
        assert "Cannot tell" in text or "cannot tell" in text
        assert 'class="standing gone"' not in text
        assert "**Gone" not in text
    assert "“seven”: cannot tell" in (tmp_path / "certificate.html").read_text()
    assert format_table(parsed(**{"problems": results["problems"]})).startswith(f"seven: Cannot tell. {REASON}")


def test_lost_abilities_are_broken_and_other_problems_come_first() -> None:
    (broken,) = cases_of(parsed(problems=[problem("retention")]))
    assert broken.verdict.startswith("Broken")
    (unknown,) = cases_of(parsed(problems=[problem("retention"), problem("unreadable")]))
    assert unknown.verdict == "Cannot tell"


def test_noise_in_its_place_is_not_gone() -> None:
    (case,) = cases_of(parsed(problems=[problem("replacement")]))
    assert case.verdict == "Unreadable: no clear images in its place"
    assert case.explanation.startswith(REASON)
    (broken,) = cases_of(parsed(problems=[problem("replacement"), problem("retention")]))
    assert broken.standing == "broken"
    there = [row | {"value": 0.96, "low": 0.93, "high": 0.98} for row in make_results()["rows"]]
    (still,) = cases_of(parsed(rows=there, problems=[problem("replacement")]))
    assert still.standing == "still"


@pytest.mark.parametrize(("kind", "subject"), [("rarely", "base"), ("few", "lora")])
def test_too_few_images_to_tell_prevent_only_good_verdicts(kind: str, subject: str) -> None:
    (case,) = cases_of(parsed(problems=[problem(kind, subject)]))
    assert case.verdict == "Cannot tell"
    assert case.explanation.startswith(REASON)
    there = [row | {"value": 0.96, "low": 0.93, "high": 0.98} for row in make_results()["rows"]]
    (still,) = cases_of(parsed(rows=there, problems=[problem(kind, subject)]))
    assert still.standing == "still"
    (broken,) = cases_of(parsed(problems=[problem(kind, subject), problem("retention")]))
    assert broken.standing == "broken"


def test_never_there_before_other_verdicts() -> None:
    (never,) = cases_of(parsed(problems=[problem("never", "base"), problem("retention")]))
    assert never.standing == "never"
    (unknown,) = cases_of(parsed(problems=[problem("never", "base"), problem("flat")]))
    assert unknown.standing == "unknown"


def test_problem_of_every_concept_and_of_another_subject() -> None:
    assert cases_of(parsed(problems=[problem(concept="")]))[0].standing == "unknown"
    other = {"id": "other", "name": "other", "what": "lora", "strength": 1.0}
    both = make_results()["subjects"] + [other]
    first, second = cases_of(parsed(subjects=both, rows=two_loras(), problems=[problem(subject="other")]))
    assert (first.standing, second.standing) == ("gone", "unknown")


def two_loras() -> list[dict[str, Any]]:
    rows = make_results()["rows"]
    lower = [row | {"subject": "other", "value": 0.0, "low": 0.0} for row in rows if row["subject"] == "lora"]
    return rows + lower


def test_several_loras_count_only_those_with_a_verdict(tmp_path: Path) -> None:
    other = {"id": "other", "name": "other", "what": "lora", "strength": 1.0, "sha256": "ef" * 32}
    results = make_results(rows=two_loras(), problems=[problem(subject="other")])
    results["subjects"].append(other)
    files.write_json(tmp_path / "results.json", results)
    run(ReportConfig(run=tmp_path))
    for name in ("report.html", "report.md"):
        text = plain((tmp_path / name).read_text())
        assert f"other on seven: {REASON}" in text, name
        assert "Cannot tell" in text
    loras = cases_of(parsed(**{k: results[k] for k in ("subjects", "rows", "problems")}))
    assert headline(loras)[0] == "Gone with 1 of 2"
    assert f"other on seven: {REASON}" in format_table(
        parsed(**{k: results[k] for k in ("subjects", "rows", "problems")})
    )
    neither = [problem(subject="other"), problem(subject="lora")]
    loras = cases_of(parsed(subjects=results["subjects"], rows=results["rows"], problems=neither))
    assert headline(loras)[0] == "Gone with 0 of 2"


def test_results_of_other_weights_are_not_reported(tmp_path: Path) -> None:
    """As after --force_resume or another training in the same folder."""
    adapter = tmp_path / "adapter" / "adapter_model.safetensors"
    adapter.parent.mkdir()
    adapter.write_bytes(b"first")
    measured = hashlib.sha256(b"first").hexdigest()
    files.write_json(tmp_path / "results.json", make_results(subject={"sha256": measured}))
    assert run(ReportConfig(run=tmp_path)).is_file()
    adapter.write_bytes(b"retrained")
    with pytest.raises(UsageError, match=f"other weights .SHA-256 {measured[:12]}.*evaluate --run .* again"):
        run(ReportConfig(run=tmp_path))


@pytest.mark.parametrize("target", ["teacher", "noise"])
def test_curves_are_explained_for_the_target_of_the_training(tmp_path: Path, target: str) -> None:
    files.write_json(tmp_path / "results.json", make_results(subject={"training": {"beta": 0.115, "target": target}}))
    log = "".join(f'{{"step": {n}, "mean_u": 1.0, "mean_s": 0.87, "ratio": 0.87}}\n' for n in range(3))
    (tmp_path / "metrics.jsonl").write_text(log)
    run(ReportConfig(run=tmp_path))
    page = (tmp_path / "report.html").read_text()
    assert ("equilibrium 1 / beta = 8.7" in page) == (target == "noise")
    assert ("at equilibrium, mean_s = mean_u / beta" in page) == (target == "noise")
    assert ("does not approach 1 / beta" in page) == (target == "teacher")


def test_curves_of_movement_replace_those_of_the_losses(tmp_path: Path) -> None:
    files.write_json(tmp_path / "results.json", make_results(subject={"training": {"beta": 0.1, "target": "teacher"}}))
    line = '{{"step": {n}, "mean_u": 1.0, "mean_s": 0.87, "ratio": 0.87, "moved": {n}.1, "spillover": 0.0{n}}}\n'
    (tmp_path / "metrics.jsonl").write_text("".join(line.format(n=n) for n in range(3)))
    run(ReportConfig(run=tmp_path))
    page = (tmp_path / "report.html").read_text()
    assert "<b>Moved.</b> Predictions on concept images" in page
    assert "<b>Spillover.</b> Change of predictions" in page
    assert "mean_s" not in page


def test_leaks_and_losses_are_shown_as_a_part_of_all(tmp_path: Path) -> None:
    counts = [{"concept": "seven", "subject": "lora", "group": g, "leaks": a, "lost": b} for g, a, b in GROUP_COUNTS]
    files.write_json(tmp_path / "results.json", make_results(pair_counts=counts))
    run(ReportConfig(run=tmp_path))
    page = (tmp_path / "report.html").read_text()
    assert "shown: 1 of 5 leaks, 1 of 8 lost" in page
    assert "lost (1 of 8)" in page
