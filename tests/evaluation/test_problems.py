"""No verdict from broken images: flat, missing and unreadable ones, and lost abilities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sd_unlearn.config.evaluate import EvaluateConfig
from sd_unlearn.data.concept import Prompt
from sd_unlearn.evaluation import evaluate
from sd_unlearn.evaluation.problems import image_problems, retention_problems
from sd_unlearn.evaluation.prompts import ImageSpec
from sd_unlearn.report.cases import cases_of
from sd_unlearn.results import Problem, Row, parse_results

pytestmark = pytest.mark.usefixtures("one_thread")


def found(faults: dict[int, str], count: int = 200, subject: str = "mine") -> list[Problem]:
    specs = [ImageSpec("direct", Prompt("a seven"), n) for n in range(count)]
    paths = [Path(f"{n}.png") for n in range(count)]
    return image_problems("seven", subject, specs, paths, {paths[n]: kind for n, kind in faults.items()})


def test_one_percent_of_a_group_may_be_unusable() -> None:
    assert found({}) == []
    assert found(dict.fromkeys(range(2), "flat")) == []
    (problem,) = found({0: "flat", 1: "unreadable", 2: "missing", 3: "missing"})
    assert (problem.kind, problem.group, problem.share) == ("missing", "direct", 0.02)
    message = "Of 200 direct images 4 cannot be used (2 missing, 1 unreadable, 1 of one flat colour)."
    assert problem.message == message
    assert "the base's 200" in found(dict.fromkeys(range(3), "flat"), subject="base")[0].message


def retention(*rows: tuple[str, float | None]) -> list[Problem]:
    return retention_problems(
        "seven", [Row("retention", g, "lora", v, 100, detector=str(i)) for i, (g, v) in enumerate(rows)]
    )


def test_retention_below_80_percent_is_broken() -> None:
    assert retention(("kept", 0.8), ("alike", 0.5)) == []
    assert retention(("kept", None)) == []
    (problem,) = retention(("kept", 0.99), ("kept", 0.79))  # two detectors: the lower one counts
    assert (problem.kind, problem.share) == ("retention", 0.79)
    assert problem.message == "Retention on kept prompts is 79 %, below 80 %."
    assert retention(("general", 0.5))[0].group == "general"


def picture(path: Path) -> None:
    """Not the digit seven, and not flat."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.linear_gradient("L").resize((32, 32)).convert("RGB").save(path)


def evaluated(folder: Path, **options: Any) -> Any:
    config = EvaluateConfig(images=[str(folder)], concept=["seven"], output_dir=Path("out"), **options)
    return parse_results(evaluate.run(config))


def test_black_squares_of_a_safety_filter_are_counted(tmp_path: Path) -> None:
    for n in range(3):
        picture(tmp_path / "mine" / "direct" / f"{n}.png")
    assert evaluated(tmp_path / "mine").problems == ()
    Image.new("RGB", (32, 32)).save(tmp_path / "mine" / "direct" / "black.png")
    for _ in range(2):  # also from the cache
        results = evaluated(tmp_path / "mine")
        (problem,) = results.problems
        assert (problem.kind, problem.share) == ("flat", 0.25)
        assert cases_of(results)[0].verdict == "Cannot tell"


def test_hidden_files_change_nothing_and_text_files_are_unreadable(tmp_path: Path) -> None:
    direct = tmp_path / "mine" / "direct"
    for n in range(3):
        picture(direct / f"{n}.png")
    first = evaluated(tmp_path / "mine")
    for n in range(3):
        (direct / f"._{n}.png").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X        ")
    assert evaluated(tmp_path / "mine").rows == first.rows
    for n in range(3):
        (direct / f"text{n}.png").write_text("not an image")
    results = evaluated(tmp_path / "mine")
    (row,) = [row for row in results.rows if row.metric == "leakage"]
    assert (row.value, row.n) == (first.rows[0].value, 6)
    assert row.high is not None
    assert row.high > 0.7  # all three may show the concept
    assert [problem.kind for problem in results.problems] == ["unreadable"]
    assert cases_of(results)[0].standing == "unknown"
