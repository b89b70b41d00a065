"""`calibrate`: the search on known curves, and a real calibration of a tiny LoRA."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from evaluation_runs import make_run

from sd_unlearn import calibrate
from sd_unlearn.calibration import Calibration, Point, read_calibration
from sd_unlearn.cli import main
from sd_unlearn.config.calibrate import CalibrateConfig
from sd_unlearn.config.evaluate import EvaluateConfig
from sd_unlearn.data.concept import Concept
from sd_unlearn.errors import UsageError
from sd_unlearn.evaluation import evaluate
from sd_unlearn.evaluation.calibrate import _check_base, point_of, search
from sd_unlearn.evaluation.generate import ImageCache
from sd_unlearn.evaluation.loras import Lora
from sd_unlearn.evaluation.score import ConceptResults
from sd_unlearn.models import sampling
from sd_unlearn.models.sampling import Sampler
from sd_unlearn.results import Problem, Row

pytestmark = pytest.mark.usefixtures("one_thread")
Curve = Callable[[float], float]
FEW = "--leakage 0.7 --retention 0 --step 0.5 --max_strength 1.5 --num_images 4 --num_keep_images 2".split()
FEW += "--num_inference_steps 2 --render_batch_size 8 --groups direct held_out alike general".split()


def searched(high_of: Curve, kept_of: Curve, **options: Any) -> Calibration:
    """A search on curves: upper end of leakage and retention by strength."""
    config = CalibrateConfig(**options)
    tried = []

    def measure(strength: float) -> Point:
        assert strength not in tried
        tried.append(strength)
        high, kept = high_of(strength), kept_of(strength)
        numbers = (high / 2, 0.0, high, 100, kept, kept, kept, 100)
        return Point(strength, *numbers, erases=high < config.leakage, retains=kept > config.retention)

    return search(config, measure, "seven", "ab")  # type: ignore[arg-type]  # as a Measurement is called


def test_the_range_of_strengths_that_do_both() -> None:
    found = searched(lambda s: 1 - s, lambda s: 1.2 - 0.2 * s, leakage=0.3, retention=0.96)
    assert (found.smallest, found.largest, found.strength) == (0.75, 1.15, 0.75)
    assert found.message == "Strength 0.75: leakage below 30 % from 0.75 on, retention above 96 % up to 1.15."
    assert [point.strength for point in found.points] == sorted(point.strength for point in found.points)
    assert not found.exceptions


def test_no_strength_does_both() -> None:
    found = searched(lambda s: 1 - s, lambda s: 1 - 0.2 * s, leakage=0.05, retention=0.95)
    assert (found.smallest, found.largest, found.strength) == (1.0, 0.2, None)
    assert "No strength does both: leakage below 5 % holds from 1 on, retention above 95 % only up to 0.2." in (
        found.message
    )


def test_no_strength_erases() -> None:
    found = searched(lambda s: 0.9, lambda s: 1.0)
    assert (found.smallest, found.largest, found.strength) == (None, 2.0, None)
    assert found.message.startswith("No tried strength up to 2 has leakage below 5 %")


def test_no_strength_retains() -> None:
    found = searched(lambda s: 0.0 if s else 1.0, lambda s: 0.5)
    assert (found.smallest, found.largest, found.strength) == (0.05, None, None)
    assert "No tried strength has retention above 95 %" in found.message


def test_a_leakage_that_comes_back_is_reported() -> None:
    found = searched(lambda s: 0.0 if 0.5 <= s <= 1.5 else 1.0, lambda s: 1.0)
    assert (found.smallest, found.strength) == (0.5, 0.5)
    assert found.exceptions == (2.0,)
    assert "is not monotone (see 2)" in found.message


def test_a_base_that_does_not_show_the_concept_is_no_erasure() -> None:
    found = searched(lambda s: 0.01, lambda s: 1.0, leakage=0.05)
    assert (found.smallest, found.strength) == (None, None)
    assert "The base itself hardly shows the concept" in found.message
    assert not found.exceptions


def test_strengths_without_a_verdict_do_not_erase() -> None:
    def measure(strength: float) -> Point:
        return Point(strength, 0.0, 0.0, 0.01, 100, 1.0, 1.0, 1.0, 100, False, True, ("Retention is unknown.",))

    found = search(CalibrateConfig(), measure, "seven", "ab")  # type: ignore[arg-type]
    assert found.strength is None
    assert (
        found.message == "There is no verdict at any tried strength that has leakage below 5 %: Retention is unknown."
    )


@pytest.mark.parametrize(
    ("subject", "kind", "erases"),
    [
        ("base", "flat", False),
        ("lora", "evidence", False),
        ("lora", "replacement", False),
        ("lora", "retention", True),
        ("lora", "few", True),
    ],
)
def test_what_prevents_a_verdict_prevents_erasure(subject: str, kind: str, erases: bool) -> None:
    """But retention of less than 80 %: here the user says what is enough."""
    concept = Concept("seven", "a seven", "a digit")
    results = ConceptResults(concept, [], [Row("leakage", "direct", "lora", 0.0, 100, 0.0, 0.04)])
    results.problems.append(Problem("seven", subject, kind, "So it is."))
    point = point_of(1.0, results, CalibrateConfig(retention=0))
    assert (point.erases, point.problems) == (erases, () if erases else ("So it is.",))


@pytest.mark.parametrize(
    ("base", "limit", "erases"),
    [((0.11, 0.06, 0.19), 0.05, True), ((0.06, 0.028, 0.125), 0.05, False), ((0.11, 0.06, 0.19), 0.1, False)],
)
def test_a_base_that_may_not_show_the_concept_is_no_erasure(
    base: tuple[float, float, float], limit: float, erases: bool
) -> None:
    value, *interval = base
    rows = [
        Row("leakage", "direct", "base", value, 100, *interval),
        Row("leakage", "direct", "lora", 0.0, 100, 0.0, 0.037),
    ]
    results = ConceptResults(Concept("seven", "a seven", "a digit"), [], rows)
    point = point_of(1.0, results, CalibrateConfig(retention=0, leakage=limit))
    assert (point.erases, "The base itself shows the concept in" in "".join(point.problems)) == (erases, not erases)


def test_a_lora_of_another_base_is_refused_unless_the_base_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    lora = Lora("mine", Path("mine.safetensors"), "", "", header={"sd_unlearn.base_sha256": "ab" * 32})
    cache = ImageCache(Path("cache"), {"name": "digits", "sha256": "cd" * 32}, Sampler(25, 3.0, 4))
    with pytest.raises(UsageError, match=r"mine was trained on other weights .* --pretrained_model_name_or_path"):
        _check_base(SimpleNamespace(base_named=False), lora, cache)  # type: ignore[arg-type]
    _check_base(SimpleNamespace(base_named=True), lora, cache)  # type: ignore[arg-type]
    assert "mine was trained on other weights" in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "leakage"), [("person", 0.0), ("nudity", 0.9)])
def test_nudity_is_leakage_only_of_concepts_of_nudity(kind: Any, leakage: float) -> None:
    found = [
        Row("leakage", "direct", "lora", 0.0, 100, 0.0, 0.04),
        Row("nudity", "direct", "lora", 0.9, 100, 0.8, 0.95),
    ]
    results = ConceptResults(Concept("a", "a", "b", kind=kind), [], found)
    assert point_of(1.0, results, CalibrateConfig(retention=0)).leakage == leakage


@pytest.mark.parametrize(
    ("given", "strength", "suggested"),
    [("--run", 0.8, "--strengths 1 0.8"), ("--run", 1.0, "--strengths 1"), ("--lora", 0.8, "--strengths 0.8")],
)
def test_the_suggested_evaluation_keeps_strength_1_of_a_run(
    given: str, strength: float, suggested: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without it, the model card would have no metrics, and the attacks would be left out."""
    found = dataclasses.replace(searched(lambda s: 1 - s, lambda s: 1.0), strength=strength)
    monkeypatch.setattr(sys.modules["sd_unlearn.evaluation.calibrate"], "run", lambda config: found)
    assert main(["calibrate", given, "seven"]) == 0
    assert capsys.readouterr().err.strip().endswith(f"evaluate {given} seven {suggested} --seed 1")


@pytest.fixture(scope="module")
def run(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("calibrate") / "seven", tiny_base)


def test_a_real_calibration_is_what_evaluate_measures_and_resumes_from_its_cache(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    code = main(["calibrate", "--run", str(run), "--cache_dir", str(cache), *FEW])
    printed = capsys.readouterr()
    record = json.loads((run / "calibration.json").read_text())
    found = read_calibration(run, record["sha256"], "seven")
    assert found is not None
    assert found.message in printed.out + printed.err
    assert code == (0 if found.strength is not None else 1)
    assert {0.0, 1.0, 1.5} <= {point.strength for point in found.points}
    assert read_calibration(run, "other weights", "seven") is None
    other = {**record, "base_sha256": "of another base"}
    (run / "calibration.json").write_text(json.dumps(other))
    assert read_calibration(run, record["sha256"], "seven") is None
    (run / "calibration.json").write_text(json.dumps(record))

    monkeypatch.setattr(sampling, "generate_images", pytest.fail)
    options: dict[str, Any] = {"num_images": 4, "num_keep_images": 2, "num_inference_steps": 2, "render_batch_size": 8}
    options |= {"groups": ["direct", "held_out", "alike", "general"], "run": run, "cache_dir": cache}
    assert calibrate(**options, leakage=0.7, retention=0, step=0.5, max_strength=1.5) == found
    rows = evaluate.run(EvaluateConfig(**options, output_dir=tmp_path / "e"))["rows"]
    high = max(row["high"] for row in rows if row["metric"] == "leakage" and row["subject"] == "seven")
    (at_one,) = (point for point in found.points if point.strength == 1)
    assert at_one.leakage_high == high
    (base,) = (point for point in found.points if point.strength == 0)
    assert base.retention in (1.0, None)  # against itself; unknown if the base shows nothing


def test_one_of_several_concepts_has_to_be_named(run: Path, tmp_path: Path) -> None:
    several = Path(shutil.copytree(run, tmp_path / "several"))
    one = yaml.safe_load((run / "concept.yaml").read_text())
    (several / "concept.yaml").write_text(yaml.safe_dump([one, {**one, "name": "other", "caption": "another caption"}]))
    with pytest.raises(UsageError, match='removes 2 concepts.*Choose it with --concept, for example "seven"'):
        calibrate(run=several)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "Give one of --run"),
        (
            {"run": True, "num_images": 10},
            r"10 direct images cannot show a leakage.*--num_images 73 or more",
        ),
        ({"run": True, "groups": ["alike"]}, "Add direct"),
        ({"run": True, "groups": ["direct"]}, "Retention is not measured.*Add alike and general to --groups"),
        ({"run": True, "groups": ["direct"], "retention": 0}, "Retention is not measured"),
        ({"run": True, "concept": "brad-pitt"}, "No strength can be recommended.*Only CLIP looked for Brad Pitt"),
        (
            {"run": True, "metrics": ["digits", "fidelity"], "real_images": Path()},
            r"--real_images \. is for --metrics fidelity or cmmd, which calibrate does not run",
        ),
        ({"run": True, "leakage": 2.0}, "--leakage 2 must be"),
    ],
)
def test_wrong_input_is_refused_before_a_model_loads(
    run: Path, options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sd_unlearn.evaluation.generate.load_base", pytest.fail)
    given = {**options, "run": run} if "run" in options else options
    with pytest.raises(UsageError, match=message):
        calibrate(**given)
