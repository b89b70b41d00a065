"""The report of a sweep: values of sweep.json, a point with bars for each run, nothing loaded from outside."""

from __future__ import annotations

import csv
import itertools
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from report_results import EVIL, Page, make_row, plain, rows

from sd_unlearn.errors import UsageError
from sd_unlearn.io.own_files import SWEEP_REPORT, check_own_reports
from sd_unlearn.report import sweep
from sd_unlearn.report.factors import Outcome, advise
from sd_unlearn.report.lines import lines_of
from sd_unlearn.report.scatter import AREA, LETTER, LINE, WIDTH, Mark, scatter_chart
from sd_unlearn.results import Problem, Row


def make_run(factor: float, leaks: float, kept: float | None, **changes: Any) -> dict[str, Any]:
    rows = [
        make_row("leakage", "direct", "base", 0.965, low=0.93, high=0.983, interval="wilson"),
        make_row("leakage", "direct", "lora", leaks, low=leaks / 2, high=leaks + 0.0123, interval="wilson"),
        make_row("clean_replacement", "direct", "lora", 1.071, interval="bootstrap"),
        make_row("retention", "alike", "lora", 0.987, 900, low=0.98, high=0.99, interval="paired-bootstrap"),
        make_row("retention", "kept", "lora", kept, 1400, low=kept and kept - 0.01, high=kept and kept + 0.01),
        make_row("drift", "kept", "lora", 0.0432, 1400, low=0.04, high=0.05),
    ]
    run = {"factor": factor, "beta": 0.115 * factor, "push": 2 * factor, "folder": f"factor-{factor:g}", "rows": rows}
    return run | changes


def make_record(**changes: Any) -> dict[str, Any]:
    runs = [make_run(0.25, 0.4, 1.0), make_run(1, 0.005, 0.996), make_run(4, 0.0, 0.91)]
    return {
        "schema_version": 1,
        "concept": "seven",
        "name": "seven",
        "caption": "a photo of the digit seven",
        "generic": "a photo of a handwritten digit",
        "base": {"name": "digits", "sha256": "ab" * 32},
        "target": "teacher",
        "factors": [0.25, 1, 4],
        "beta": 0.115,
        "beta_source": "manifest",
        "push": 2.0,
        "created": "2026-11-22T10:00:00+00:00",
        "version": "0.1.0",
        "runs": runs,
    } | changes


def page_of(tmp_path: Path, **changes: Any) -> tuple[str, Page]:
    path = sweep.write(tmp_path, make_record(**changes))
    assert path == tmp_path / "sweep.html"
    source = path.read_text(encoding="utf-8")
    return source, Page(source)


def test_files_of_the_user_with_the_names_of_a_report_are_recognized(tmp_path: Path) -> None:
    page_of(tmp_path)
    check_own_reports(tmp_path, SWEEP_REPORT, "--output_dir")
    for name in SWEEP_REPORT:
        (tmp_path / name).write_text("factor,beta: my notes on the sd-unlearn sweep")
        with pytest.raises(UsageError, match=f"--output_dir .* holds {name}, which sd-unlearn did not write"):
            check_own_reports(tmp_path, [name], "--output_dir")


def test_page_and_markdown_print_the_values(tmp_path: Path) -> None:
    _, page = page_of(tmp_path)
    text, markdown = plain(page.text), (tmp_path / "sweep.md").read_text(encoding="utf-8")
    for value in ("96.5 %", "40.0 %", "20.0–41.2 %", "0.5 %", "107.1 %", "98.7 %", "0.0432", "0.02875", "0.46", "8"):
        assert value in text, value
        assert value in markdown, value
    for label in ("× 0.25", "× 1", "× 4"):
        assert text.count(label) >= 2  # in the chart and in the table


def test_the_csv_holds_every_row_of_every_run_unrounded(tmp_path: Path) -> None:
    page_of(tmp_path)
    with (tmp_path / "sweep.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == ["factor", "beta", "push", *Row.__dataclass_fields__]
    assert [float(x["factor"]) for x in lines] == [f for f in (0.25, 1, 4) for _ in range(6)]
    assert float(lines[1]["high"]) == 0.4 + 0.0123


@pytest.mark.parametrize(
    ("target", "expected", "absent"),
    [("teacher", "and the push, 2.", "alone determines how"), ("noise", "alone", "push")],
)
def test_the_caption_says_what_the_factors_multiply(tmp_path: Path, target: str, expected: str, absent: str) -> None:
    source, _ = page_of(tmp_path, target=target)
    caption = re.search(r"<figcaption>(.*?)</figcaption>", source, re.DOTALL)
    assert caption
    assert "A factor multiplies beta, 0.115 (manifest)" in caption[1]
    assert expected in caption[1]
    assert absent not in caption[1]
    assert "Without a LoRA, leakage is 96.5" in caption[1]


def test_hostile_texts_are_escaped_and_nothing_is_loaded(tmp_path: Path) -> None:
    source, page = page_of(tmp_path, name=EVIL, caption=EVIL, base={"name": EVIL}, generic=f'"{EVIL}')
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "img", "object"}
    assert not [a for _, a in page.tags if {"src", "href"} & set(a)]
    assert "default-src 'none'" in source
    assert "<script" not in (tmp_path / "sweep.md").read_text(encoding="utf-8")


def test_a_run_without_a_value_is_named_and_has_no_point(tmp_path: Path) -> None:
    gone = make_run(4, 0.0, 0.9, rows=[])
    source, page = page_of(tmp_path, runs=[make_run(1, 0.01, 0.99), gone, make_run(8, 0.0, None)])
    assert sum(tag == "circle" for tag, _ in page.tags) == 1
    assert "Not in the chart because a value is missing: × 4, × 8." in page.text
    source, page = page_of(tmp_path, runs=[gone])
    assert "<circle" not in source
    assert "No run has both" in page.text


def mark(label: str, x: float | None, y: float | None, spread: float = 0.01) -> Mark:
    def row(metric: str, value: float | None) -> Row:
        around = (None, None) if value is None else (value - spread, value + spread)
        return Row(metric, "direct", "lora", value, 200, *around)

    return Mark(label, row("retention", x), row("leakage", y))


def test_points_and_bars_are_placed_by_their_values() -> None:
    drawn = scatter_chart([mark("a", 0.9, 0.4), mark("b", 0.95, 0.2), mark("c", 1.0, 0.0, 0.0)])
    assert drawn
    a, b, c = drawn["points"]
    assert a["x"] < b["x"] < c["x"]
    assert a["y"] < b["y"] < c["y"]  # svg's y grows downwards
    assert b["x"] == pytest.approx((a["x"] + c["x"]) / 2, abs=0.2)
    assert b["y"] == pytest.approx((a["y"] + c["y"]) / 2, abs=0.2)
    for p in (a, b):
        assert p["bar_x"][0] < p["x"] < p["bar_x"][1]
        assert p["bar_y"][1] < p["y"] < p["bar_y"][0]
    assert c["bar_x"] == [c["x"], c["x"]]
    at_zero = next(y for y, label in drawn["y"] if label == "0 %")
    assert c["y"] == at_zero
    for p in drawn["points"]:
        assert AREA.left <= min(p["bar_x"])
        assert max(p["bar_x"]) <= AREA.right
        assert AREA.top <= min(p["bar_y"])
        assert max(p["bar_y"]) <= AREA.bottom


@pytest.mark.parametrize("count", [1, 2, 4, 6])
def test_labels_of_crowded_points_do_not_overlap(count: int) -> None:
    crowd = [mark(f"× 0.{i}25", 0.999 + 0.0002 * i, 0.001 * i, 0.002) for i in range(count)]
    drawn = scatter_chart([mark("× 9", 0.7, 0.9), *crowd])
    assert drawn
    boxes = []
    for p in drawn["points"]:
        x, base = p["text"]
        boxes.append((x, base - LINE + 4, x + LETTER * len(p["label"]), base + 4))
        assert AREA.left <= x
        assert boxes[-1][2] <= WIDTH
    for one, other in itertools.combinations(boxes, 2):
        apart = one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
        assert apart, (one, other)


def test_points_need_finite_values() -> None:
    assert scatter_chart([]) is None
    assert scatter_chart([mark("a", None, 0.1), mark("b", 0.5, None), mark("c", float("nan"), 0.1)]) is None
    alone = scatter_chart([mark("a", None, 0.1), mark("b", 1.0, 0.0, 0.0)])
    assert alone
    assert [p["label"] for p in alone["points"]] == ["b"]
    assert len({x for x, _ in alone["x"]}) > 1  # a single value without an interval still gets axes


def test_the_sweep_report_needs_no_torch() -> None:
    code = "import sys, sd_unlearn.report.sweep; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_on_nudity_the_table_has_the_share_of_nude_images() -> None:
    found = [make_row("leakage", "direct", "lora", 0.0), make_row("nudity", "direct", "lora", 0.9, detector="nudenet")]
    record = make_record(kind="nudity", runs=[make_run(1, 0.0, 1.0, rows=found)])
    content = sweep.context(record, [rows(*found)])
    [(_, [cell, *_])] = content["table"]
    assert cell.lora.value == 0.9
    assert content["outcomes"][0].standing == "still"


def outcome(factor: float, leaks: float, kept: float = 0.99, problem: str = "", held_out: float = 0.0) -> Outcome:
    """What a run achieved whose leakage has an interval of 0.02 to both sides, of an evaluation of 400 images."""
    values = (("leakage", "direct", "base", 0.96), ("leakage", "direct", "lora", leaks))
    values += (("leakage", "held_out", "base", 0.9), ("leakage", "held_out", "lora", held_out))
    values += (("retention", "kept", "lora", kept),)
    found = [make_row(*x, 400, low=max(0.0, x[3] - 0.02), high=x[3] + 0.02) for x in values]
    problems = [Problem("seven", "lora", problem, f"Because of {problem}.")] if problem else []
    return Outcome(factor, lines_of(rows(*found)), problems)


@pytest.mark.parametrize(
    ("outcomes", "factor"),
    [
        ([outcome(0.5, 0.3), outcome(1, 0.01, 0.99), outcome(2, 0.0, 0.93)], 1),
        ([outcome(0.5, 0.01, 0.97), outcome(1, 0.0, 0.98), outcome(2, 0.0, 0.99, "retention")], 1),
        ([outcome(4, 0.0, 0.98), outcome(2, 0.0, 0.98), outcome(1, 0.9)], 2),  # as good: the smallest
        ([outcome(1, 0.0, 0.99, held_out=0.5), outcome(2, 0.01, 0.9)], 2),  # other wordings must be gone too
    ],
)
def test_the_recommended_factor_forgets_and_keeps_the_most(outcomes: list[Outcome], factor: float) -> None:
    advice = advise(outcomes)
    assert (advice.factor, advice.title) == (factor, f"Use × {factor:g}")
    assert "The concept is gone. Leakage is" in advice.text
    assert "Retention is 9" in advice.text


@pytest.mark.parametrize(
    ("outcomes", "texts"),
    [
        ([outcome(1, 0.9), outcome(2, 0.5)], ["still there with × 2. Try larger factors"]),
        ([outcome(1, 0.5), outcome(4, 0.0, 0.5, "retention")], ["With × 4 the model lost", "between 1 and 4"]),
        ([outcome(2, 0.0, 0.5, "retention"), outcome(1, 0.0, 0.6, "retention")], ["Try factors below 1."]),
        ([outcome(1, 0.0, held_out=0.5)], ["With × 1 it is gone when asked for by name", "Try larger factors"]),
        ([Outcome(1, [])], ["The concept was not measured."]),
    ],
)
def test_the_page_says_that_no_factor_is_good_and_what_to_try(outcomes: list[Outcome], texts: list[str]) -> None:
    advice = advise(outcomes)
    assert (advice.factor, advice.title) == (None, "None of these factors is good")
    for text in texts:
        assert text in advice.text


@pytest.mark.parametrize("problem", ["evidence", "unreadable"])
def test_factors_without_a_verdict_are_not_called_bad(problem: str) -> None:
    advice = advise([outcome(factor, 0.0, problem=problem) for factor in (1, 2)])
    assert (advice.factor, advice.title) == (None, "No verdict on any of these factors")
    assert advice.text == f"Because of {problem}."


@pytest.mark.parametrize(
    "outcomes",
    [
        [outcome(1, 0.04), outcome(2, 0.5)],
        [outcome(0.5, 0.0, held_out=0.045), outcome(1, 0.0, held_out=0.04)],  # one leak in other wordings
        [outcome(0.5, 0.04, 0.9), outcome(1, 0.04, 0.95), outcome(2, 0.04, 0.95)],
    ],
)
def test_with_too_few_images_to_be_sure_the_best_guess_is_named(outcomes: list[Outcome]) -> None:
    advice = advise(outcomes)
    assert (advice.factor, advice.title) == (None, "Too few images to be sure; × 1 looks best")
    assert "larger --num_images" in advice.text


def test_the_recommendation_is_on_every_page(tmp_path: Path) -> None:
    source, page = page_of(tmp_path)
    assert "Use × 1." in plain(page.text)
    assert "folder factor-1" in page.text
    assert source.count(">recommended<") == 1
    assert "**Use × 1.** The concept is gone." in (tmp_path / "sweep.md").read_text(encoding="utf-8")
    _, page = page_of(tmp_path, runs=[make_run(1, 0.3, 0.99)])
    assert "None of these factors is good." in page.text
    assert "recommended" not in page.text


def test_images_are_shown_by_factor(tmp_path: Path) -> None:
    for name, red in (("base.png", 1), ("factor-0.25/a.png", 2), ("factor-1/a.png", 3)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (32, 32), (red, 0, 0)).save(tmp_path / name)
    shots = [
        {"factor": factor, "image": f"factor-{factor:g}/a.png", "read": EVIL, "leak": factor < 1, "lost": False}
        for factor in (0.25, 1)
    ]
    picture = {"group": "direct", "prompt": EVIL, "seed": 7, "base": "base.png", "base_read": "seven", "shots": shots}
    source, page = page_of(tmp_path, pictures=[picture, picture | {"base": "../outside.png"}])
    alts = [a["alt"] for tag, a in page.tags if tag == "img"]
    assert len(alts) == 5
    assert source.count("image missing") == 1
    assert alts[0] == f"without the LoRA, prompt “{EVIL}”: read as seven"
    assert alts[1] == f"with × 0.25, prompt “{EVIL}”: read as {EVIL}"
    assert page.text.count("⚠ Leak") == 2
    assert EVIL not in source
