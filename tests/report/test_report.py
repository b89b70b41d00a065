"""The report of one LoRA: its values, escaped texts, nothing loaded from outside, errors that name what is missing."""

from __future__ import annotations

import base64
import csv
import dataclasses
import hashlib
import html
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from report_results import EVIL, Page, make_pair, make_results, make_row, parsed, plain, rows

from sd_unlearn.config.base import ReportConfig
from sd_unlearn.data.find_concept import read_concept
from sd_unlearn.errors import UsageError
from sd_unlearn.io import files
from sd_unlearn.io.own_files import REPORT, check_own_reports, is_own_report
from sd_unlearn.report import formatting, images, jinja, reproduce
from sd_unlearn.report.axes import ticks
from sd_unlearn.report.cases import Case, cases_of
from sd_unlearn.report.examples import choose
from sd_unlearn.report.lines import lines_of
from sd_unlearn.report.preview import preview
from sd_unlearn.report.report import run
from sd_unlearn.report.terminal import format_table
from sd_unlearn.report.training_curves import AREA, line_chart
from sd_unlearn.results import AttackEntry, Row

SCRIPT = jinja.script()


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


def test_files_of_the_user_with_the_names_of_a_report_stay(folder: Path) -> None:
    run(ReportConfig(run=folder, certificate=True))
    assert all(is_own_report(folder / name) for name in REPORT)
    (folder / "report.md").write_text("# My thesis on sd-unlearn\n")
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with pytest.raises(UsageError, match=r"--run .* holds report\.md, which sd-unlearn did not write"):
        run(ReportConfig(run=folder))
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    for name in REPORT:
        (folder / name).write_text("leakage,retention: my own notes on sd-unlearn reports and certificates")
        with pytest.raises(UsageError, match=name):
            check_own_reports(folder, [name])


def test_html_and_markdown_print_the_values_of_results_json(folder):
    _, page = page_of(folder)
    markdown = (folder / "report.md").read_text(encoding="utf-8")
    for value in (
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
        assert value in plain(page.text), value
        assert value in markdown, value
    assert "sharpness" in page.text  # an unknown metric and group keep their names
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


def test_settings_hide_the_folders_of_all_loras_of_a_fused_one(folder):
    loras = ["/home/jane/runs/seven", "/home/jane/a=b/four", "red=/home/jane/red", "runs/three", "owner/name"]
    (folder / "config.yaml").write_text(json.dumps({"lora": loras, "rank": 8}))
    source, _ = page_of(folder)
    assert "jane" not in source
    settings = source[source.index("<caption>config.yaml</caption>") :]
    for name in ("seven", "four", "red=red", "runs/three", "owner/name"):
        assert f"&#39;{name}&#39;" in settings


def test_hostile_texts_are_escaped_everywhere(folder):
    bad = f'"{EVIL}'
    (folder / "concept.yaml").write_text(
        json.dumps({"name": EVIL, "caption": EVIL, "generic": bad, "keep": [f"another {EVIL}"]})
    )
    (folder / "config.yaml").write_text(json.dumps({EVIL: EVIL}))
    row = make_row(EVIL, EVIL, "lora", 0.5, note=EVIL, interval=EVIL, detector=EVIL, concept=EVIL)
    pair = make_pair(EVIL, 1, EVIL, prompt=bad, image_read=bad, base_read=bad, concept=EVIL)
    card = {"detector": EVIL, "metrics": [EVIL], "about": EVIL, "limits": EVIL, "extra": {EVIL: EVIL}}
    source, page = page_of(
        folder,
        concept={"slug": EVIL, "name": EVIL, "caption": bad, "generic": EVIL, "sha256": EVIL},
        subject={"name": EVIL, "sha256": EVIL, "cost": {"device": EVIL, "seconds": 1}, "training": {"beta": EVIL}},
        cards=[card],
        created=EVIL,
        version=EVIL,
        rows=[row],
        pairs=[pair],
        base={"name": EVIL, "sha256": bad},
        skipped=[{"path": EVIL, "why": EVIL, "subject": EVIL}],
        sampler={"name": EVIL, EVIL: 1},
    )
    assert [tag for tag, _ in page.tags].count("script") == 1  # the page's own
    assert not [a for _, attributes in page.tags for a in attributes if a.startswith("on")]
    assert EVIL not in source.replace(SCRIPT["text"], "")
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
        f"script-src '{SCRIPT['hash']}'"
    )
    inside = source[source.index("<script>") + len("<script>") : source.index("</script>")]
    digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
    assert SCRIPT["hash"] == f"sha256-{digest}"  # else the browser would refuse it
    anchors = {a["href"][1:] for tag, a in page.tags if tag == "a" and a["href"]}
    assert anchors <= {a.get("id") for _, a in page.tags}


def test_images_are_embedded_leaks_first_and_missing_or_outside_ones_named(folder):
    source, page = page_of(folder)
    embedded = [a for tag, a in page.tags if tag == "img"]
    assert len(embedded) == 10  # two pairs, once more as examples, and two rows of the preview
    assert all(a["alt"] for a in embedded)
    assert source.count("image missing") == 4  # one absent, one outside the run folder; of an example and a pair
    assert source.index("seed 12") < source.index("seed 11")
    assert page.text.count("Leak:") == 2
    assert page.text.count("Lost:") == 2
    big = next(a for a in embedded if a["src"] and a["src"].startswith("data:image/webp"))
    assert big["width"] == str(images.THUMBNAIL)
    assert "Preview after step 20" in page.text


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


def test_chart_stays_in_its_area_and_skips_missing_values():
    # of step 1, which a resumed run repeated, the second line counts
    log = [
        {"step": 1, "a": 2.0},
        {"step": 2, "a": None},
        {"step": 3, "a": float("nan")},
        {"step": 1, "a": 4.0},
        {"step": 5, "a": 8.0},
    ]
    drawn = line_chart(log, ("a", "absent"), target=(10.0, "ten"))
    assert drawn is not None
    left, right, top, bottom = AREA
    [line] = drawn["series"]
    points = [tuple(map(float, p.split(","))) for p in line["points"].split()]
    assert points[0][0] == left
    assert points[-1][0] == right
    assert all(top <= y <= bottom for _, y in points)
    assert points[0][1] - points[-1][1] == pytest.approx((8 - 4) / 10.5 * (bottom - top), abs=0.2)
    assert line_chart(log[:1], ("a",)) is None


def test_ticks_are_round_numbers_inside_the_range():
    assert ticks(0, 400) == [0, 100, 200, 300, 400]
    assert ticks(0.03, 0.97) == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert ticks(7, 7) == [7]


@pytest.mark.parametrize(
    ("value", "n", "metric", "text"),
    [
        (0.01, 200, "leakage", "1.0 %"),
        (0.5, 20, "leakage", "50 %"),
        (0.0, 200, "leakage", "0.0 %"),
        (0.9996, 5000, "accuracy", "99.96 %"),
        (0.0002, 5000, "leakage", "0.02 %"),
        (0.050287, 200, "leakage", "5.03 %"),  # above the limit of "gone"
        (0.05, 200, "leakage", "5.0 %"),
        (0.046, 50, "leakage", "4.6 %"),
        (1.023, 900, "retention", "102.3 %"),
        (None, 5, "leakage", "–"),
        (float("nan"), 5, "drift", "–"),
        (0.08341, 900, "drift", "0.0834"),
        (12345.6, 9, "sharpness", "12,346"),
    ],
)
def test_numbers_have_their_unit_and_as_many_digits_as_n_supports(value, n, metric, text):
    assert formatting.number(value, Row(metric, "direct", "lora", value, n)) == text


@pytest.mark.parametrize(
    ("lora", "base", "word"),
    [
        ((0.01, 0.002, 0.036), (0.97, 0.95, 0.99), "Gone"),
        ((0.0, 0.0, 0.16), (1.0, 0.84, 1.0), "Nearly gone, but too few images to be sure"),
        ((0.4, 0.3, 0.5), (0.97, 0.95, 0.99), "Weaker, but still there"),
        ((0.96, 0.93, 0.98), (0.97, 0.95, 0.99), "Still there"),
        ((0.01, 0.0, 0.03), (0.02, 0.01, 0.05), "Never there: the base hardly generates it"),
        ((0.0, 0.0, 0.037), (0.02, 0.006, 0.07), "Cannot tell"),  # 0 of 100, and 2 of the base's 100
        ((0.015, 0.005, 0.043), (0.03, 0.014, 0.064), "Cannot tell"),
        ((0.01, 0.002, 0.054), (0.03, 0.014, 0.064), "Cannot tell"),
        ((0.2, 0.13, 0.29), (0.03, 0.014, 0.064), "Still there"),
    ],
)
def test_verdict_follows_the_interval(lora, base, word):
    found = [make_row("leakage", "direct", s, v[0], low=v[1], high=v[2]) for s, v in (("lora", lora), ("base", base))]
    assert verdict_of(found) == word


def verdict_of(found: list[dict[str, Any]]) -> str:
    [case] = cases_of(parsed(rows=found))
    return case.verdict


def test_verdict_considers_other_wordings_and_missing_values():
    other = make_row("leakage", "held_out", "lora", 0.3, low=0.2, high=0.4)
    assert verdict_of([*make_results()["rows"], other]) == "Gone when asked for by name, but not in other wordings"
    few = make_row("leakage", "held_out", "lora", 0.0, 40, low=0.0, high=0.088)
    unsure = "Gone when asked for by name, but too few images of other wordings to be sure"
    assert verdict_of([*make_results()["rows"], few]) == unsure
    assert verdict_of([]) == "Not measured"


def test_wordings_that_bring_the_concept_only_with_the_lora_are_considered():
    wordings = [
        make_row("leakage", "held_out", "base", 0.01, low=0.003, high=0.036),
        make_row("leakage", "held_out", "lora", 0.6, low=0.53, high=0.67),
    ]
    assert verdict_of([*make_results()["rows"], *wordings]) == "Gone when asked for by name, but not in other wordings"
    for high in (0.036, 0.06):
        wordings[1] |= {"value": 0.01, "low": 0.003, "high": high}
        assert verdict_of([*make_results()["rows"], *wordings]) == "Gone"
    wordings[0] |= {"value": 0.02, "low": 0.006, "high": 0.07}  # the base may hardly show it: neither for nor against
    assert verdict_of([*make_results()["rows"], *wordings]) == "Gone"


@pytest.mark.parametrize(
    ("other", "word"),
    [
        ((0.9, 0.85, 0.93), "Weaker, but still there"),
        ((0.98, 0.95, 0.99), "Still there"),
        ((0.0, 0.0, 0.02), "Nearly gone, but too few images to be sure"),
        ((0.03, 0.01, 0.07), "Nearly gone, but too few images to be sure"),
    ],
)
def test_few_direct_images_do_not_hide_other_wordings(other, word):
    values = {("direct", "base"): (1.0, 0.98, 1.0), ("direct", "lora"): (0.045, 0.024, 0.083)}
    values |= {("held_out", "base"): (0.98, 0.95, 0.99), ("held_out", "lora"): other}
    assert verdict_of([make_row("leakage", g, s, v[0], low=v[1], high=v[2]) for (g, s), v in values.items()]) == word


@pytest.mark.parametrize(
    ("direct", "asked"),
    [
        ([], "“a photo of the digit seven”"),
        (["a three"], "“a three”"),
        (["a seven", "7", "VII"], "“a seven” (and 2 other prompts)"),
    ],
)
def test_the_sentence_names_the_prompts_that_were_evaluated(direct, asked):
    [case] = cases_of(parsed(concept={"prompts": {"direct": direct}}))
    assert case.explanation.startswith(f"{asked} still shows the concept in")


def seen_by_clip_and_nudenet(kind: str, reverse: bool = False) -> Case:
    """A LoRA after which CLIP finds no image of the concept, and NudeNet most of them."""
    found = [
        make_row("leakage", "direct", "base", 0.9, low=0.85, high=0.94, detector="clip"),
        make_row("leakage", "direct", "lora", 0.0, low=0.0, high=0.02, detector="clip"),
        make_row("nudity", "direct", "base", 0.95, low=0.9, high=0.98, detector="nudenet"),
        make_row("nudity", "direct", "lora", 0.9, low=0.85, high=0.94, detector="nudenet"),
        make_row("retention", "kept", "lora", 1.0, low=0.97, high=1.01, detector="clip"),
    ]
    [case] = cases_of(parsed(concept={"kind": kind}, rows=found[::-1] if reverse else found))
    return case


@pytest.mark.parametrize("reverse", [False, True])
def test_nudenet_decides_on_nudity_and_clip_is_quoted(reverse):
    case = seen_by_clip_and_nudenet("nudity", reverse)
    assert case.verdict == "Still there"
    assert "90.0 %" in case.explanation
    assert "Another detector, clip, finds it in 0.0 %" in case.explanation
    assert [line.main.detector for line in case.lines[:2]] == ["nudenet", "clip"]


def test_nudenet_does_not_decide_on_other_concepts():
    case = seen_by_clip_and_nudenet("digit")
    assert case.verdict == "Gone"
    assert "nudenet" not in case.explanation


def test_nudenet_decides_on_other_concepts_that_nothing_else_looked_for():
    rows = [make_row("nudity", "direct", s, v, low=v, high=v) for s, v in (("base", 0.9), ("lora", 0.0))]
    verdicts = {k: cases_of(parsed(concept={"kind": k}, rows=rows))[0].verdict for k in ("nudity", "other", "person")}
    assert verdicts == {"nudity": "Gone", "other": "Gone", "person": "Not measured"}


def test_terminal_table_is_aligned_and_starts_with_the_verdict():
    first, blank, head, rule, *body = format_table(parsed()).splitlines()
    assert first.startswith("seven: Gone. ")
    assert "1.0 % (95 % interval 0.3–3.6 %)" in first
    assert blank == ""
    assert {len(line) for line in (head, rule, *body)} == {len(rule)}
    assert re.split(r"  +", body[0]) == ["leakage", "direct", "96.5 %", "1.0 %", "0.3–3.6 %", "200"]
    assert "–" in body[1].split()
    assert any(line.startswith("sharpness") for line in body)


def test_a_distance_without_a_scale_is_left_to_the_report(folder):
    found = [make_row("kid-digits", "kept", "lora", 22263, 900), make_row("fid-digits", "kept", "lora", 5.4, 900)]
    text = format_table(parsed(rows=found))
    assert "fid-digits" in text
    assert "kid-digits" not in text
    page_of(folder, rows=found)
    markdown = (folder / "report.md").read_text(encoding="utf-8")
    assert "22,263" in markdown
    assert "its size has no meaning by itself" in markdown


def test_a_second_detector_of_the_same_metric_gets_its_own_line():
    lines = lines_of(
        rows(
            make_row("leakage", "direct", "lora", 0.1),
            make_row("leakage", "direct", "lora", 0.2, detector="other"),
            make_row("leakage", "direct", "lora", 0.3, detector="third"),
        )
    )
    assert [line.lora.value for line in lines if line.lora] == [0.1, 0.2, 0.3]


@pytest.mark.parametrize(
    ("metric", "name", "column"),
    [
        ("cmmd-ViT-L-14-336", "CMMD (ViT-L-14-336)", "CMMD"),
        ("cmmd-ViT-L-14-336-real", "CMMD, real (ViT-L-14-336)", None),
        ("kid-inception", "KID", "KID"),
        ("fid-inception-real", "FID, real", None),
    ],
)
def test_a_metric_with_a_model_in_its_name_is_in_every_file(tmp_path, metric, name, column):
    loras = [{"id": key, "name": key, "what": "lora"} for key in ("a", "b")]
    found = [make_row(metric, "kept", lora["id"], 0.1234, 900) for lora in loras]
    results = make_results(subjects=loras, rows=found, pairs=[])
    files.write_json(tmp_path / "results.json", results)
    source = plain(run(ReportConfig(run=tmp_path)).read_text(encoding="utf-8"))
    assert f'<th scope="row">{name}</th>' in source  # the table of all metrics
    assert f"<dt>{name}</dt>" in source  # its explanation
    assert source.count(">0.123<") == (4 if column else 2)
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert f"- {name}: " in markdown
    if column:
        assert f'data-label="{column}">0.123' in source  # the comparison
        assert f"| is it gone? | {column} |" in markdown
    with (tmp_path / "results.csv").open(newline="") as file:
        assert [(x["metric"], x["value"]) for x in csv.DictReader(file)] == [(metric, "0.1234")] * 2


def test_bare_results_are_enough(tmp_path):
    bare = {k: make_results(subject={"cost": None})[k] for k in ("schema_version", "concepts", "subjects", "rows")}
    files.write_json(tmp_path / "results.json", bare)
    page = Page(run(ReportConfig(run=tmp_path)).read_text(encoding="utf-8"))
    assert "Before and after" not in page.text
    assert "not measured" in page.text  # the cost
    assert "97.4 %" in plain(page.text)


def test_a_second_report_is_the_same_and_replaces_whole_files(folder):
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
    files.write_json(folder / "results.json", make_results(concept={"slug": "eight"}, rows=[], pairs=[]))
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


def test_markdown_tables_keep_their_columns_with_any_text(folder):
    page_of(folder, rows=[make_row("a|b", "c\nd", "lora", 0.5, note="`*|")])
    text = (folder / "report.md").read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(text) if line.startswith("| metric |"))
    columns = {len(re.findall(r"(?<!\\)\|", line)) for line in text[start : start + 3]}
    assert columns == {11}


def test_commands_quote_the_folder(folder):
    odd = folder.with_name("se ven; rm")
    folder.rename(odd)
    source, _ = page_of(odd)
    assert f"sd-unlearn report --run '{odd.name}-again'" in html.unescape(source)


def test_the_working_folder_can_be_reported(folder, monkeypatch):
    monkeypatch.chdir(folder)
    source, _ = page_of(Path("."))
    assert "--output_dir ../seven-again" in source


def test_commands_repeat_the_options_of_the_evaluation(folder):
    (folder / "evaluate.yaml").write_text("run: runs/seven\nseed: [0, 1]\nguidance_scale: 5\n")
    source, _ = page_of(folder)
    again = "seven-again"  # of an absolute path the page shows the name only
    assert f"evaluate --config seven/evaluate.yaml --run {again} --output_dir {again}" in source
    (folder / "config.yaml").unlink()  # one LoRA by --lora: this folder is no run
    source, _ = page_of(folder)
    assert f"evaluate --config seven/evaluate.yaml --output_dir {again}" in source
    assert "evaluate --run" not in source


def test_only_commands_that_were_carried_out_are_listed(folder, monkeypatch):
    """After `attack` alone there is no evaluation to repeat."""
    monkeypatch.chdir(folder.parent)
    (folder / "config.yaml").write_text("seed: 0\n")
    ran = (
        ("soft", "quick", "lora"),
        ("ring", "standard", "lora"),
        ("token", "quick", "lora"),
        ("hard", "full", "base"),
    )
    attacks = [AttackEntry("seven", subject, name, budget, "d", {}, ()) for name, budget, subject in ran]
    attacks.append(dataclasses.replace(attacks[0], subject="base", attack="hard"))
    assert reproduce.commands(Path(folder.name), attacks) == [
        "sd-unlearn train --config seven/config.yaml --output_dir seven-again",
        "sd-unlearn attack --run seven-again --attacks soft token --budget quick --seed 0",
        "sd-unlearn attack --run seven-again --attacks ring --budget standard --seed 0",
        "sd-unlearn report --run seven-again",
    ]


def test_a_page_of_several_concepts_repeats_their_training(folder):
    (folder / "evaluate.yaml").write_text("run: runs/seven\n")
    results = make_results()
    other = {**results["concepts"][0], "slug": "three", "name": "three"}
    rows = [{**row, "concept": "three"} for row in results["rows"]]
    source, _ = page_of(folder, concepts=[*results["concepts"], other], rows=[*results["rows"], *rows])
    assert "sd-unlearn train --config seven/config.yaml --output_dir seven-again" in source
    assert "evaluate --config seven/evaluate.yaml --run seven-again" in source


def test_a_run_evaluated_on_another_concept_is_titled_after_that(folder):
    source, _ = page_of(folder, concept={"slug": "red-ink", "name": "red ink", "caption": "a digit in red ink"})
    assert "Forgetting “red ink”" in source
    assert "Forgetting “seven”" not in source


def test_unknown_and_huge_values_do_not_break_a_chart(folder):
    values = {"kept": None, "alike": 1e300, "general": -1e300}
    rows = [make_row("retention", group, "lora", value, low=value, high=None) for group, value in values.items()]
    source, page = page_of(folder, rows=rows)
    values = [v for tag, a in page.tags if tag in ("circle", "line", "svg") for v in a.values() if v]
    assert values
    assert not any(re.search("nan|inf|e\\+", v) for v in values)
    assert "–" in page.text


def test_report_needs_no_torch():
    code = "import sys, sd_unlearn.report.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_link_that_leaves_the_folder_is_not_embedded(folder: Path) -> None:
    inside, outside = folder / "images" / "a.png", folder.parent.parent / "secret.png"
    (folder / "images" / "inside.png").symlink_to(inside)
    (folder / "images" / "outside.png").symlink_to(outside)
    (folder / "linked").symlink_to(outside.parent)
    (folder / "images" / "loop.png").symlink_to("loop.png")
    assert images.embed(folder, "images/inside.png")
    link = folder.parent / "link"
    link.symlink_to(folder)  # a run folder may itself be reached by a link
    assert images.embed(link, "images/a.png")
    for place in (
        "images/outside.png",
        "linked/secret.png",
        "images/loop.png",
        "../../secret.png",
        "a\0b",
    ):
        assert images.embed(folder, place) is None
    assert images.embed(folder, str(outside)) is None


def asked_and_kept(leaks: tuple[int, ...] = ()) -> list[dict[str, Any]]:
    """Five pairs of the concept, and of two prompts to keep; those with the seeds `leaks` still show the concept."""
    asked = [make_pair("direct", seed, "images/b.png", leak=seed in leaks) for seed in range(5)]
    keep = [("alike", f"a photo of the digit {name}") for name in ("one", "one", "two")]
    return asked + [make_pair(group, 10 + i, "images/b.png", prompt=text) for i, (group, text) in enumerate(keep)]


@pytest.mark.parametrize(
    ("standing", "leaks", "seeds"),
    [("gone", (4,), [0, 1, 10, 12]), ("weaker", (4,), [4, 0, 10, 12]), ("weaker", (), [0, 1, 10, 12])],
)
def test_the_examples_are_the_first_pairs_unless_that_would_hide_a_leak(standing, leaks, seeds):
    results = parsed(pairs=asked_and_kept(leaks))
    [case] = cases_of(results)
    chosen = choose(results, [dataclasses.replace(case, standing=standing)])
    assert [pair.seed for pair, _ in chosen] == seeds


def test_a_leak_in_other_wordings_is_an_example_if_only_those_leak():
    other = make_pair("held_out", 20, "images/b.png", prompt="a seven", leak=True)
    results = parsed(pairs=[*asked_and_kept(), other])
    [case] = cases_of(results)
    chosen = choose(results, [dataclasses.replace(case, standing="partly")])
    assert [(pair.seed, outcome) for pair, outcome in chosen][:2] == [(20, "leak"), (0, "good")]


def test_verdict_and_examples_come_before_everything_else(folder):
    source, page = page_of(folder, pairs=asked_and_kept())
    summary, examples, about = (source.index(text) for text in ('id="summary"', "pairs examples", 'id="about"'))
    assert summary < source.index(">Gone.<") < examples < source.index("Is it gone?") < about
    assert source.index("To forget</dt>") > about  # what was evaluated on which base
    assert page.text.count("To forget\n") >= 2


def test_a_ratio_above_one_is_put_in_words(folder):
    rest = {"low": 0.983, "high": 1.16, "interval": "bootstrap"}
    page_of(folder, rows=[make_row("clean_replacement", "direct", "lora", 1.066, **rest)])
    summary, metrics = (folder / "report.md").read_text(encoding="utf-8").split("## All metrics")
    assert "106.6 %" in metrics
    assert "106.6 %" not in summary
    assert "| 100 % | or more of the base's usual number of clear images, but of something else |" in summary


def test_what_was_kept_is_a_share_of_images(folder):
    kept = [make_row("accuracy", "kept", s, value, 900) for s, value in (("base", 0.9), ("lora", 0.94))]
    page_of(folder, rows=[*kept, make_row("retention", "kept", "lora", 1.044, 900)])
    summary = (folder / "report.md").read_text(encoding="utf-8").split("## All metrics")[0]
    assert "| 94.0 % | of the images of other things are as requested |" in summary
    assert "104.4 %" not in summary


def test_the_preview_shows_each_prompt_beside_the_base(folder):
    for step, red in ((0, 10), (20, 200), (100, 250)):
        grid = Image.new("RGB", (64, 32), (red, 0, 0))
        grid.paste((red, 255, 0), (0, 16, 64, 32))  # the row of the generic prompt
        grid.save(folder / "previews" / f"step-{step:06d}.png")
    concept = read_concept(folder / "concept.yaml")
    found = preview(folder, concept)
    assert found
    assert (found.step, [row.prompt for row in found.rows]) == (100, [concept.caption, concept.generic])
    colours = [[colour_of(image) for image in (row.base, row.trained)] for row in found.rows]
    assert colours == [[(10, 0, 0), (250, 0, 0)], [(10, 255, 0), (250, 255, 0)]]
    _, page = page_of(folder)
    alts = [a["alt"] for tag, a in page.tags if tag == "img"]
    assert "“a photo of a digit”, without LoRA: a row of images" in alts
    assert "“a photo of a digit”, after step 100: a row of images" in alts


def colour_of(image: images.Embedded | None) -> Any:
    assert image
    data = base64.b64decode(image.uri.split(",")[1])
    return Image.open(io.BytesIO(data)).convert("RGB").getpixel((30, 8))


def test_a_preview_without_a_base_or_with_other_rows_is_shown_as_it_is(folder):
    found = preview(folder, read_concept(folder / "concept.yaml"))
    assert found
    assert [row.base for row in found.rows] == [None, None]  # step-000020.png alone
    Image.new("RGB", (64, 33)).save(folder / "previews" / "step-000030.png")
    found = preview(folder, read_concept(folder / "concept.yaml"))
    assert found
    assert [row.prompt for row in found.rows] == [""]
    assert preview(folder / "images", None) is None


def test_the_place_of_the_certificate_is_printed(folder, capsys):
    run(ReportConfig(run=folder, certificate=True))
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"Certificate: {folder / 'certificate.html'}\n")
