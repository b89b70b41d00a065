"""The report says what results.json says, shows it inertly, loads nothing, and names what is missing."""

from __future__ import annotations

import base64
import csv
import hashlib
import html
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from report_results import EVIL, Page, make_results, make_row, plain

from sd_unlearn.config.base import ReportConfig
from sd_unlearn.errors import UsageError
from sd_unlearn.io import files
from sd_unlearn.report import formatting, jinja, training_curves
from sd_unlearn.report.report import format_table, run
from sd_unlearn.results import Row, read_results, upgrade

FILLED = jinja.script()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished run folder named seven, with everything a report can show."""
    place = tmp_path / "runs" / "seven"
    for name, side in (
        ("images/a.png", 32),
        ("images/b.png", 32),
        ("images/big.png", 640),
        ("previews/step-000020.png", 64),
    ):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (side, side), (200, 30, side % 256)).save(place / name)
    Image.new("RGB", (32, 32), (1, 2, 3)).save(tmp_path / "secret.png")
    files.write_json(place / "results.json", make_results())
    files.write_json(
        place / "training.json", {"commit": "0f3c", "versions": {"torch": "9.9"}, "seeds": {"train": [5, 6]}}
    )
    log = [{"step": s, "mean_u": 20.0, "mean_s": 20.0 + s, "ratio": 1 + s / 20} for s in range(10, 50, 10)]
    (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    (place / "concept.yaml").write_text(
        "name: seven\ncaption: a photo of the digit seven\ngeneric: a photo of a digit\n"
    )
    (place / "config.yaml").write_text("concept: seven\nrank: 8\n")
    return place


def page_of(folder: Path, **changes: Any) -> tuple[str, Page]:
    if changes:
        files.write_json(folder / "results.json", make_results(**changes))
    path = run(ReportConfig(run=folder))
    assert path == folder / "report.html"
    source = path.read_text(encoding="utf-8")
    return source, Page(source)


def test_html_and_markdown_print_the_figures_of_results_json(folder):
    _, page = page_of(folder)
    markdown = (folder / "report.md").read_text(encoding="utf-8")
    for figure in (
        "96.5 %",
        "1.0 %",
        "0.3–3.6 %",
        "97.4 %",
        "102.3 %",
        "99.1–104.1 %",
        "5.38",
        "12.3",
        "12,800",
        "912 MB",
        "41 s",
    ):
        assert figure in plain(page.text), figure
        assert figure in markdown, figure
    assert "sharpness" in page.text  # an unknown metric and group are shown under their own names
    assert "elsewhere" in markdown


def test_csv_holds_every_field_of_every_row_unrounded(folder):
    page_of(folder)
    with (folder / "results.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == list(Row.__dataclass_fields__)
    expected = make_results()["rows"]
    assert [float(x["value"]) for x in lines] == [x["value"] for x in expected]
    assert [int(x["n"]) for x in lines] == [x["n"] for x in expected]
    assert float(lines[1]["high"]) == 0.0357
    assert lines[2]["low"] == ""


def test_a_hostile_text_is_inert_everywhere(folder):
    bad = f'"{EVIL}'
    (folder / "concept.yaml").write_text(json.dumps({"name": EVIL, "caption": EVIL, "generic": bad, "keep": [EVIL]}))
    (folder / "config.yaml").write_text(json.dumps({EVIL: EVIL}))
    row = make_row(EVIL, EVIL, "lora", 0.5, note=EVIL, interval=EVIL, detector=EVIL)
    pair = {
        "prompt": bad,
        "group": EVIL,
        "seed": EVIL,
        "base": "images/a.png",
        "lora": EVIL,
        "lora_read": bad,
        "base_read": bad,
    }
    source, page = page_of(
        folder,
        concept=EVIL,
        caption=bad,
        generic=EVIL,
        run=EVIL,
        created=EVIL,
        version=EVIL,
        rows=[row],
        pairs=[pair],
        base={"name": EVIL, "sha256": bad},
        skipped=[{"path": EVIL, "why": EVIL}],
        cost={"device": EVIL, "seconds": 1},
        training={EVIL: 1},
        sampler={"name": EVIL},
        detector=EVIL,
    )
    assert [tag for tag, _ in page.tags].count("script") == 1  # the page's own
    assert not [a for _, attributes in page.tags for a in attributes if a.startswith("on")]
    assert EVIL not in source.replace(FILLED["text"], "")
    assert source.count("</script") == 1
    assert EVIL in page.text  # shown as text, not dropped
    assert "<script" not in (folder / "report.md").read_text(encoding="utf-8")


def test_the_page_loads_nothing_from_outside(folder):
    source, page = page_of(folder)
    for _, attributes in page.tags:
        for key in ("src", "href", "srcset", "data", "poster", "action"):
            assert re.match(r"data:image/|#", attributes.get(key) or "#")
    assert not re.search(r"@import|url\(|<link|<iframe|fetch\(|XMLHttp|import\(", source)
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
        f"script-src '{FILLED['hash']}'"
    )
    inside = source[source.index("<script>") + len("<script>") : source.index("</script>")]
    digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
    assert FILLED["hash"] == f"sha256-{digest}"  # else the browser would refuse it
    anchors = {a["href"][1:] for tag, a in page.tags if tag == "a" and a["href"]}
    assert anchors <= {a.get("id") for _, a in page.tags}


def test_pictures_are_inside_leaks_first_and_missing_or_outside_ones_named(folder):
    source, page = page_of(folder)
    images = [a for tag, a in page.tags if tag == "img"]
    assert len(images) == 5  # two pairs and the preview
    assert all(a["alt"] for a in images)
    assert source.count("picture missing") == 2  # one absent, one outside the run folder
    assert source.index("seed 12") < source.index("seed 11")
    assert page.text.count("Leak:") == 1
    assert page.text.count("Lost:") == 1
    big = next(a for a in images if a["src"] and a["src"].startswith("data:image/webp"))
    assert big["width"] == str(images.THUMBNAIL)
    assert "Preview drawn after step 20" in page.text


def test_page_is_navigable(folder):
    _, page = page_of(folder)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("h1") == 1
    assert tags.count("table") == tags.count("caption")
    assert ("html", {"lang": "en"}) in page.tags
    assert tags.index("h2") < tags.index("table")
    assert "color-scheme: light dark" in page.text
    assert "@media print" in page.text


def test_curve_has_lines_axes_and_the_equilibrium(folder):
    _, page = page_of(folder)
    assert sum(tag == "polyline" for tag, _ in page.tags) == 3
    assert "equilibrium 1 / beta = 10" in page.text
    assert "optimizer step" in page.text


def test_chart_keeps_to_its_box_and_skips_what_is_not_a_number():
    # the second line of step 1, of a resumed run, is the one that counts
    log = [
        {"step": 1, "a": 2.0},
        {"step": 2, "a": None},
        {"step": 3, "a": float("nan")},
        {"step": 1, "a": 4.0},
        {"step": 5, "a": 8.0},
    ]
    drawn = training_curves.chart(log, ("a", "absent"), target=10.0)
    assert drawn is not None
    left, right, top, bottom = drawn["box"]
    [line] = drawn["series"]
    points = [tuple(map(float, p.split(","))) for p in line["points"].split()]
    assert points[0][0] == left
    assert points[-1][0] == right
    assert all(top <= y <= bottom for _, y in points)
    assert points[0][1] - points[-1][1] == pytest.approx((8 - 4) / 10.5 * (bottom - top), abs=0.2)
    assert training_curves.chart(log[:1], ("a",)) is None


def test_ticks_are_round_and_inside():
    assert training_curves.ticks(0, 400) == [0, 100, 200, 300, 400]
    assert training_curves.ticks(0.03, 0.97) == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert training_curves.ticks(7, 7) == [7]


@pytest.mark.parametrize(
    ("value", "n", "metric", "text"),
    [
        (0.01, 200, "leakage", "1.0 %"),
        (0.5, 20, "leakage", "50 %"),
        (0.0, 200, "leakage", "0.0 %"),
        (0.9996, 5000, "accuracy", "99.96 %"),
        (0.0002, 5000, "leakage", "0.02 %"),
        (1.023, 900, "retention", "102.3 %"),
        (None, 5, "leakage", "–"),
        (float("nan"), 5, "drift", "–"),
        (0.08341, 900, "drift", "0.0834"),
        (12345.6, 9, "sharpness", "12,346"),
    ],
)
def test_numbers_have_their_unit_and_sensible_digits(value, n, metric, text):
    assert formatting.number(value, Row(metric, "direct", "lora", value, n)) == text


@pytest.mark.parametrize(
    ("lora", "base", "word"),
    [
        ((0.01, 0.002, 0.036), (0.97, 0.95, 0.99), "Gone"),
        ((0.0, 0.0, 0.16), (1.0, 0.84, 1.0), "Nearly gone, with too few pictures to be sure"),
        ((0.4, 0.3, 0.5), (0.97, 0.95, 0.99), "Weaker, but still there"),
        ((0.96, 0.93, 0.98), (0.97, 0.95, 0.99), "Still there"),
        ((0.01, 0.0, 0.03), (0.02, 0.01, 0.05), "Never there: the base hardly draws it"),
    ],
)
def test_verdict_follows_the_interval(lora, base, word):
    rows = [make_row("leakage", "direct", s, v[0], low=v[1], high=v[2]) for s, v in (("lora", lora), ("base", base))]
    assert formatting.verdict(make_results(rows=rows))[0] == word


def test_verdict_weighs_other_wordings_and_the_lack_of_figures():
    rows = make_results()["rows"] + [make_row("leakage", "held_out", "lora", 0.3, low=0.2, high=0.4)]
    assert formatting.verdict(make_results(rows=rows))[0] == "Gone as asked for, less so in other words"
    assert formatting.verdict(make_results(rows=[]))[0] == "Not measured"


def test_terminal_table_is_aligned_with_the_verdict_first():
    first, blank, head, rule, *body = format_table(upgrade(make_results())).splitlines()
    assert first.startswith("seven: Gone. ")
    assert "1.0 % (95 % interval 0.3–3.6 %)" in first
    assert blank == ""
    assert {len(line) for line in (head, rule, *body)} == {len(rule)}
    assert re.split(r"  +", body[0]) == ["leakage", "direct", "96.5 %", "1.0 %", "0.3–3.6 %", "200"]
    assert "–" in body[1].split()
    assert any(line.startswith("sharpness") for line in body)


def test_a_second_judge_of_the_same_metric_gets_its_own_line():
    rows = [
        make_row("leakage", "direct", "lora", 0.1),
        make_row("leakage", "direct", "lora", 0.2, detector="other"),
        make_row("leakage", "direct", "lora", 0.3),
    ]
    assert [x.lora.value for x in formatting.lines(make_results(rows=rows)) if x.lora] == [0.1, 0.2, 0.3]


def test_bare_results_are_enough(tmp_path):
    bare = {k: make_results()[k] for k in ("schema_version", "concept", "caption", "generic", "rows")} | {"base": {}}
    files.write_json(tmp_path / "results.json", bare)
    page = Page(run(ReportConfig(run=tmp_path)).read_text(encoding="utf-8"))
    assert "Before and after" not in page.text
    assert "not measured" in page.text  # the cost
    assert "97.4 %" in plain(page.text)


def test_rerunning_replaces_whole_files_and_says_the_same(folder):
    first, _ = page_of(folder)
    before = {name: (folder / name).read_bytes() for name in ("report.html", "report.md", "results.csv")}
    inode = (folder / "report.html").stat().st_ino
    again, _ = page_of(folder)
    assert again == first
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert (folder / "report.html").stat().st_ino != inode  # renamed into place, never written into
    assert not list(folder.glob(".*tmp"))


def test_a_damaged_side_file_leaves_the_old_report_alone(folder):
    first, _ = page_of(folder)
    files.write_json(folder / "results.json", make_results(concept="eight"))
    (folder / "metrics.jsonl").write_text('{"step": 1}\n{"st')
    with pytest.raises(UsageError, match=r"metrics\.jsonl line 2"):
        run(ReportConfig(run=folder))
    assert (folder / "report.html").read_text(encoding="utf-8") == first


def test_missing_run_folder_or_results_is_named(tmp_path):
    with pytest.raises(UsageError, match="--run is missing"):
        run(ReportConfig())
    with pytest.raises(UsageError, match="--run .*nowhere does not exist"):
        run(ReportConfig(run=tmp_path / "nowhere"))
    message = f"--run {tmp_path} has no results.json. Run sd-unlearn evaluate --run {tmp_path} first."
    with pytest.raises(UsageError, match=f"^{re.escape(message)}$"):
        run(ReportConfig(run=tmp_path))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"schema_version": 3}, "schema_version is 3, this version reads 1 and 2"),
        ({"schema_version": None}, "schema_version is None"),
        ({"rows": {}}, '"rows" is missing or not a list'),
        ({"caption": None}, '"caption" is missing or not a str'),
        ({"pairs": 3}, '"pairs" is missing or not a list'),
        ({"rows": [{"metric": "leakage"}]}, r"rows\[0\] needs metric, group, subject as text"),
        ({"rows": [make_row("leakage", "direct", "teacher", 1)]}, 'subject "teacher"'),
        ({"rows": [make_row("leakage", "direct", "lora", "1 %")]}, r"rows\[0\] needs a number as value"),
        ({"rows": [make_row("leakage", "direct", "lora", 0.1, n=None)]}, r"rows\[0\] needs a whole number as n"),  # type: ignore[arg-type]
        ({"pairs": [{"prompt": "x"}]}, r"pairs\[0\] needs prompt, group, base, lora as text"),
    ],
)
def test_wrong_results_are_refused_by_name(tmp_path, change, match):
    files.write_json(tmp_path / "results.json", make_results(**change))
    with pytest.raises(UsageError, match=match) as caught:
        read_results(tmp_path)
    assert str(tmp_path / "results.json") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damaged_results_json_is_named(tmp_path):
    (tmp_path / "results.json").write_text('{"schema_version": 1, "ro')
    with pytest.raises(UsageError, match=r"results\.json is not valid JSON"):
        read_results(tmp_path)
    (tmp_path / "results.json").write_text("[1]")
    with pytest.raises(UsageError, match="schema_version"):
        read_results(tmp_path / "results.json")


def test_markdown_tables_keep_their_columns_whatever_the_text(folder):
    page_of(folder, rows=[make_row("a|b", "c\nd", "lora", 0.5, note="`*|")])
    text = (folder / "report.md").read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(text) if line.startswith("| metric |"))
    columns = {len(re.findall(r"(?<!\\)\|", line)) for line in text[start : start + 3]}
    assert columns == {11}


def test_repro_commands_quote_the_folder(folder):
    odd = folder.with_name("se ven; rm")
    folder.rename(odd)
    source, _ = page_of(odd)
    assert f"sd-unlearn report --run '{odd.as_posix()}-again'" in html.unescape(source)
    assert "--num_images 200 --seed 0" in source


def test_the_folder_one_stands_in_can_be_reported(folder, monkeypatch):
    monkeypatch.chdir(folder)
    source, _ = page_of(Path("."))
    assert "--output_dir ../seven-again" in source


def test_repro_counts_the_pictures_of_what_must_stay(folder):
    with (folder / "concept.yaml").open("a") as file:
        file.write('evaluate: {alike: ["a {one,two}"], general: ["a {red,blue,green} one"]}\n')
    rows = [make_row("leakage", "direct", "lora", 0.1, 60), make_row("drift", "kept", "lora", 0.1, 5 * 40)]
    source, _ = page_of(folder, rows=rows)
    assert "--num_images 60 --num_keep_images 40 --seed 0" in source


def test_repro_repeats_what_the_evaluation_was_asked(folder):
    (folder / "evaluate.yaml").write_text("run: runs/seven\nseed: [0, 1]\nguidance_scale: 5\n")
    source, _ = page_of(folder)
    again = f"{folder.as_posix()}-again"
    assert f"evaluate --config {folder.as_posix()}/evaluate.yaml --run {again} --output_dir {again}" in source
    (folder / "config.yaml").unlink()  # one LoRA by --lora: this folder is no run
    source, _ = page_of(folder)
    assert f"evaluate --config {folder.as_posix()}/evaluate.yaml --output_dir {again}" in source
    assert "evaluate --run" not in source


def test_a_run_judged_on_another_concept_is_titled_after_that(folder):
    source, _ = page_of(folder, concept="red-ink", caption="a digit in red ink")
    assert "Forgetting “red-ink”" in source
    assert "Forgetting “seven”" not in source


def test_what_is_not_a_number_breaks_no_picture(folder):
    rows = [make_row("retention", "kept", "lora", float(x), low=float(x), high=None) for x in ("nan", "inf")]
    source, page = page_of(folder, rows=rows)
    values = [v for tag, a in page.tags if tag in ("circle", "line", "svg") for v in a.values() if v]
    assert values
    assert not any(re.search("nan|inf", v) for v in values)
    assert "–" in page.text


def test_a_word_the_judge_never_reads_is_no_loss(folder):
    pair = {"prompt": "a cat", "group": "general", "base": "x.png", "lora": "y.png", "expected": "cat"}
    _, page = page_of(folder, pairs=[{**pair, "base_read": "dog", "lora_read": "dog"}])
    assert "Lost:" not in page.text


def test_report_needs_no_torch():
    code = "import sys, sd_unlearn.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
