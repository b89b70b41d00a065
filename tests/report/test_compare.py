"""The report of several LoRAs: comparison, charts, embedded images, blurred faces, certificate."""

from __future__ import annotations

import base64
import csv
import io
import os
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageStat
from report_files import CONCEPTS, FACE, STRENGTHS, make_many, paint
from report_results import EVIL, Page, plain

from sd_unlearn.config.base import ReportConfig
from sd_unlearn.errors import UsageError
from sd_unlearn.io.files import write_json
from sd_unlearn.report import compare, images
from sd_unlearn.report.axes import Area, spread_labels
from sd_unlearn.report.before_after import before_after, with_known_faces
from sd_unlearn.report.cases import Case, cases_of, labels
from sd_unlearn.report.certificate import remaining
from sd_unlearn.report.charts import compare_loras, strength_chart, strength_charts
from sd_unlearn.report.report import run
from sd_unlearn.report.terminal import format_table
from sd_unlearn.results import Difference, SubjectEntry, parse_results


@pytest.fixture
def results(tmp_path: Path) -> dict[str, Any]:
    return make_many(tmp_path, side=32, each=2)


def cases_in(results: dict[str, Any], **changes: Any) -> list[Case]:
    return cases_of(parse_results(results | changes))


def page_of(folder: Path, **options: Any) -> tuple[str, Page]:
    source = run(ReportConfig(run=folder, **options)).read_text(encoding="utf-8")
    return source, Page(source)


def rewrite(folder: Path, results: dict[str, Any], **changes: Any) -> None:
    write_json(folder / "results.json", results | changes)


def difference(
    value: float | None, p: float | None, metric: str = "leakage", p_holm: float | None = None
) -> Difference:
    return Difference("seven", metric, "direct", "a", "base", value, 200, p=p, p_holm=p if p_holm is None else p_holm)


# -- comparison --


def test_page_markdown_and_csv_have_every_lora_with_the_same_values(tmp_path, results):
    _, page = page_of(tmp_path)
    text, markdown = plain(page.text), (tmp_path / "report.md").read_text(encoding="utf-8")
    for label in {case.label for case in cases_in(results)}:
        assert label in text
        assert label in markdown
    for value in ("3.5 %", "1.7–7.0 %", "97.4 %", "−93.0 points", "p < 0.001", "not shown to differ", "by seed"):
        assert value in text, value
        assert value.replace("<", "&lt;") in markdown, value
    with (tmp_path / "results.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(x["concept"], x["subject"], float(x["value"])) for x in lines] == [
        (r["concept"], r["subject"], r["value"]) for r in results["rows"]
    ]
    assert lines[4]["seeds"] == "0.035 0.04"


def test_the_summary_comes_first_and_picks_the_highest_retention_among_those_gone(tmp_path, results):
    source, page = page_of(tmp_path)
    assert source.index('id="summary"') < source.index('id="comparison"') < source.index('id="metrics"')
    rows = compare.summary(cases_in(results))
    assert [(r.concept.slug, r.gone, r.of) for r in rows] == [(slug, 2, 6) for slug, _ in CONCEPTS]
    assert [r.best and r.best.label for r in rows] == [
        f"{slug}-teacher × 1" for slug, _ in CONCEPTS
    ]  # × 1.5 harms more
    assert "Each is gone with some LoRA" in page.text
    worse = [r for r in results["rows"] if r["metric"] != "leakage" or r["value"] > 0]
    first = compare.summary(cases_in(results, rows=worse))[0]
    assert first.gone == 0
    assert first.best
    assert first.best.label == "seven-noise × 1.5"  # none is gone: the one with the least leakage


def test_a_lora_gets_no_verdict_on_a_concept_it_was_not_trained_on(results):
    stranger = "brad-pitt-noise@0.5"
    moved = [r | {"concept": "seven"} for r in results["rows"] if r["subject"] == stranger]
    cases = cases_in(results, rows=results["rows"] + moved)
    [case] = [c for c in cases if c.subject.id == stranger and c.concept.slug == "seven"]
    assert case.standing == "other"
    assert compare.summary(cases)[0].of == 6  # not the seventh


def test_at_strength_0_there_is_no_verdict(tmp_path, results):
    [off] = [s for s in results["subjects"] if s["id"] == "seven-noise@0.5"]
    off["strength"] = 0
    leaks = sum(p["leak"] for p in results["pairs"] if p["subject"] != "seven-noise@0.5")
    assert leaks < sum(p["leak"] for p in results["pairs"])
    assert before_after(parse_results(results), tmp_path, 1000, False)["leaks"] == leaks  # its images are not leaks
    cases = cases_in(results)
    assert [case.verdict for case in cases if case.subject.id == off["id"]] == ["Switched off: strength 0"]
    assert compare.summary(cases)[0].of == 5
    rewrite(tmp_path, results)
    run(ReportConfig(run=tmp_path, certificate=True))
    assert (tmp_path / "certificate.html").read_text(encoding="utf-8").count("<article") == 17


def test_the_first_detector_decides_and_the_others_are_quoted(results):
    def case_of(rows: list[dict[str, Any]]) -> Case:
        return next(c for c in cases_in(results, rows=rows) if c.label == "seven-teacher × 1")

    case = case_of(results["rows"])
    assert (case.standing, "Another detector" in case.explanation) == ("gone", False)
    [row] = [
        r
        for r in results["rows"]
        if (r["subject"], r["metric"], r["group"]) == ("seven-teacher@1", "leakage", "direct")
    ]
    other = row | {"value": 0.5, "low": 0.4, "high": 0.6, "detector": "clip"}
    case = case_of([*results["rows"], other])
    assert case.standing == "gone"
    assert "Another detector, clip, finds it in 50.0 % (95 % interval 40.0–60.0 %)." in case.explanation
    assert case_of([other, *results["rows"]]).standing != "gone"


def test_labels_distinguish_strengths_and_equal_names():
    subjects = [
        SubjectEntry("base", "b", "base"),
        SubjectEntry("1", "a", "lora", 1.0, "x"),
        SubjectEntry("2", "a", "lora", 0.5, "x"),
        SubjectEntry("3", "c", "lora", 1.0, "y"),
        SubjectEntry("4", "c", "lora", 1.0, "z"),
    ]
    assert labels(subjects) == {"base": "b", "1": "a × 1", "2": "a × 0.5", "3": "c (3)", "4": "c (4)"}


@pytest.mark.parametrize(
    ("value", "p", "metric", "text"),
    [
        (-0.955, 1e-9, "leakage", "−95.5 points, p < 0.001"),
        (0.02, 0.012, "leakage", "+2.0 points, p = 0.012"),
        (-0.003, 0.6, "leakage", "−0.3 points, not shown to differ, p = 0.60"),
        (0.01, None, "leakage", "+1.0 points"),
        (0.0, 1.0, "leakage", "not shown to differ"),
        (0.0412, 0.001, "drift", "+0.0412, p = 0.001"),
        (None, None, "leakage", ""),
    ],
)
def test_differences_in_words(value, p, metric, text):
    assert compare.in_words(difference(value, p, metric)) == text


def test_differences_in_words_use_the_corrected_p():
    assert "not shown" in compare.in_words(difference(-0.1, 0.01, p_holm=0.06))


def test_terminal_table_of_many_is_aligned(results):
    first, _, head, rule, *body, skipped = format_table(parse_results(results)).splitlines()
    assert first.startswith("Each is gone with some LoRA. 3 of 3 concepts")
    assert {len(line) for line in (head, rule, *body)} == {len(rule)}
    assert len(body) == 18
    assert "1 image(s) could not be read" in skipped


def test_an_evaluation_of_only_the_base_is_refused(tmp_path, results):
    rewrite(
        tmp_path,
        results,
        subjects=results["subjects"][:1],
        differences=[],
        pairs=[],
        rows=[r for r in results["rows"] if r["subject"] == "base"],
    )
    with pytest.raises(UsageError, match="evaluates only the base"):
        run(ReportConfig(run=tmp_path))


def test_image_folders_without_a_base_have_a_page(tmp_path, results):
    subject = {"id": "mace", "name": "MACE pictures", "what": "images"}
    rows = [r | {"subject": "mace"} for r in results["rows"] if r["subject"] == "seven-teacher@1"]
    pair = results["pairs"][0] | {"subject": "mace", "base": ""}
    rewrite(tmp_path, results, subjects=[subject], rows=rows, pairs=[pair], differences=[], base={}, skipped=[])
    _, page = page_of(tmp_path, certificate=True)
    assert "MACE pictures" in page.text
    assert "Given images" in page.text
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    certified = Page((tmp_path / "certificate.html").read_text(encoding="utf-8")).text
    for text in map(plain, (page.text, markdown, certified)):
        assert "How they were generated" in text
        assert not re.search("The LoRA does the forgetting|this LoRA file|loaded together", text)
    assert "| base | 95 % interval | given images |" in markdown
    assert sum("frame" in (a.get("class") or "") for _, a in page.tags) == 2  # as an example and as a pair


# -- charts --


def test_charts_need_something_to_compare(results):
    cases = cases_in(results)
    assert compare_loras(cases[:1]) is None
    assert strength_charts(cases[:1]) == []
    both = strength_charts([c for c in cases if c.concept.slug == "seven"])
    assert [chart["title"] for chart in both] == ["Leakage", "Retention"]
    for chart in both:
        assert [s["name"] for s in chart["series"]] == ["seven-teacher", "seven-noise"]
        assert all(len(s["dots"]) == len(STRENGTHS) + 1 for s in chart["series"])  # and the base, at 0
    assert "at strength 0: 96.5 %" in both[0]["series"][0]["dots"][0][2]
    assert "at strength 0: 100" in both[1]["series"][0]["dots"][0][2]
    assert strength_chart([]) is None


def test_bands_contain_their_lines_and_stay_in_the_area(results):
    for chart in strength_charts([c for c in cases_in(results) if c.concept.slug == "seven"]):
        left, right, top, bottom = chart["area"]
        for series in chart["series"]:
            edge = [tuple(map(float, p.split(","))) for p in series["band"].split()]
            line = [tuple(map(float, p.split(","))) for p in series["points"].split()]
            upper, lower = edge[: len(line)], edge[len(line) :][::-1]
            for (x, y), (_, high), (_, low) in zip(line, upper, lower, strict=True):
                assert high - 0.2 <= y <= low + 0.2
                assert left <= x <= right
                assert top <= high <= low <= bottom + 0.2


@pytest.mark.parametrize("wanted", [(200.0, 199.0, 201.0, 20.0), (18.0, 17.0, 19.0), (216.0, 216.0, 16.0, 16.0)])
def test_end_labels_do_not_overlap_and_stay_inside(wanted):
    placed = [{"y": y} for y in wanted]
    spread_labels(placed, Area(0, 100, 16, 216))
    found = sorted(label["y"] for label in placed)
    assert all(b - a >= 16 for a, b in zip(found, found[1:], strict=False))
    assert found[0] >= 16
    assert found[-1] <= 216


def test_every_point_has_its_values(results):
    drawn = compare_loras([c for c in cases_in(results) if c.concept.slug == "seven"])
    assert drawn
    assert len(drawn["points"]) == 6
    assert all("leakage" in p["details"] and "retention" in p["details"] for p in drawn["points"])
    assert [style for style, _ in drawn["paths"]] == [0, 1]  # one path per LoRA


@pytest.mark.parametrize("value", [10**400, float("inf"), float("nan")])
def test_values_that_are_not_finite_are_refused(tmp_path, results, value):
    results["rows"][4] |= {"value": value}
    rewrite(tmp_path, results)
    with pytest.raises(UsageError, match=r"rows\[4\]"):
        page_of(tmp_path)


@pytest.mark.parametrize("value", [1e308, -1e308])
def test_odd_numbers_do_not_break_the_page(tmp_path, results, value):
    for row in results["rows"][4:12]:
        if row["interval"] != "wilson":
            row |= {"value": value, "low": value, "high": value, "seeds": [value, value]}
    results["differences"][0] |= {"value": value, "low": value, "high": value, "p_holm": value}
    results["subjects"][1] |= {"strength": value, "cost": {"seconds": value, "steps": value, "device": value}}
    rewrite(tmp_path, results)
    _, page = page_of(tmp_path, certificate=True)
    svg = [
        v for tag, a in page.tags if tag in ("circle", "line", "polyline", "polygon", "rect") for v in a.values() if v
    ]
    assert svg
    assert not any(re.search("nan|inf|e\\+", v) for v in svg)


# -- images --


def test_the_image_of_the_base_appears_once_for_all_loras(tmp_path, results):
    source, page = page_of(tmp_path)
    images = [a for tag, a in page.tags if tag == "img"]
    bases = {p["base"] for p in results["pairs"]}
    examples = 2 * 4  # of the best LoRAs
    assert len(images) == len(results["pairs"]) + len(bases) + examples
    assert all(a["decoding"] == "async" and a["alt"] for a in images)


def test_leaks_and_losses_are_kept_under_max_pairs(tmp_path, results):
    marked = sum(p["leak"] or p["lost"] for p in results["pairs"])
    content = before_after(parse_results(results), tmp_path, max_pairs=marked, blur_faces=False)
    assert content["total"] == content["leaks"] + content["lost"] == marked
    assert content["left_out"] == len(results["pairs"]) - marked
    _, page = page_of(tmp_path, max_pairs=marked)
    assert f"{len(results['pairs']) - marked} further pairs of results.json are not in this file" in page.text
    with pytest.raises(UsageError, match="--max_pairs 0"):
        run(ReportConfig(run=tmp_path, max_pairs=0))


def test_images_shrink_until_they_fit(tmp_path, monkeypatch):
    uses = {paint(tmp_path / f"{i}.png", 400, i).name: 1 for i in range(6)}
    full = images.embed_all(tmp_path, uses)
    size = sum(len(p.uri) for p in full.values() if p)
    assert {p.width for p in full.values() if p} == {images.THUMBNAIL}
    monkeypatch.setattr(images, "BUDGET", size // 4)
    less = images.embed_all(tmp_path, uses)
    assert sum(len(p.uri) for p in less.values() if p) <= size // 4
    assert {p.width for p in less.values() if p} < {width for width, _ in images.LEVELS[1:]}
    twice = images.embed_all(tmp_path, dict.fromkeys(uses, 2))  # an image that is shown twice counts twice
    assert 2 * sum(len(p.uri) for p in twice.values() if p) <= size // 4


def test_tiny_images_of_noise_stay_within_the_budget(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "BUDGET", 240_000)
    Image.effect_noise((128, 128), 200).save(tmp_path / "a.png")
    names = [f"{i}.png" for i in range(30)]
    for name in names:
        os.link(tmp_path / "a.png", tmp_path / name)
    made = images.embed_all(tmp_path, dict.fromkeys(names, 1))
    assert sum(len(p.uri) for p in made.values() if p) <= images.BUDGET


def opened(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")


def test_a_blurred_face_is_removed_from_the_image_itself(tmp_path):
    Image.effect_noise((96, 96), 200).convert("RGB").save(tmp_path / "a.png")
    plainly, blurred = (images.embed(tmp_path, "a.png", boxes=boxes) for boxes in ((), (FACE,)))
    assert plainly
    assert blurred
    box = [round(96 * v) for v in FACE]

    def detail(image: images.Embedded) -> float:
        """Difference between neighbouring pixels inside the face."""
        face = opened(image.uri).crop(tuple(box)).convert("L")
        moved = Image.new("L", face.size)
        moved.paste(face, (1, 0))
        return ImageStat.Stat(Image.blend(face, moved, -1.0).crop((1, 0, *face.size))).stddev[0]

    assert detail(blurred) < 0.25 * detail(plainly)
    corner = (0, 0, 20, 20)
    assert opened(blurred.uri).crop(corner).tobytes() == opened(plainly.uri).crop(corner).tobytes()


def test_blur_faces_changes_every_image_with_a_face_and_says_so(tmp_path, results):
    def uris(source: str) -> set[str]:
        return set(re.findall(r"data:image/[^\"]+", source))

    before, _ = page_of(tmp_path)
    of_people = [p for p in results["pairs"] if p["concept"] == "brad-pitt"]
    faceless = of_people[0] | {"faces": []}
    rewrite(tmp_path, results, pairs=[faceless, *(p for p in results["pairs"] if p is not of_people[0])])
    after, page = page_of(tmp_path, blur_faces=True)
    faces = {p[k] for p in of_people for k in ("base", "image")} - {faceless["image"]}
    shown = {name: images.embed(tmp_path, name) for name in faces}
    assert all(p and p.uri in before and p.uri not in after for p in shown.values())
    assert uris(before) & uris(after) == {images.embed(tmp_path, faceless["image"]).uri}  # no face: as it was
    assert "blurred in the images themselves" in page.text
    assert 'id="blur"' not in after


def test_blur_faces_is_refused_without_a_face_detector(tmp_path, results):
    rewrite(tmp_path, results, rows=[r for r in results["rows"] if r["metric"] != "face_rate"])
    source, _ = page_of(tmp_path)
    assert "box detections" in source  # the boxes are of something else
    with pytest.raises(UsageError, match="--blur_faces: results.json has no faces"):
        run(ReportConfig(run=tmp_path, blur_faces=True))


def test_images_on_which_no_face_detector_was_run_are_left_out(tmp_path, results, capsys):
    """Nobody knows whether there are faces: the detector ran for one of three concepts."""
    others = [name for slug, name in CONCEPTS if slug != "brad-pitt"]
    _, page = page_of(tmp_path, blur_faces=True)
    content = before_after(with_known_faces(parse_results(results))[0], tmp_path, 1000, blur_faces=True)
    assert {group.concept.slug for group in content["groups"]} == {"brad-pitt"}
    assert f"The images of {', '.join(others)} were left out" in plain(page.text)
    assert f"--blur_faces left out the images of {', '.join(others)}: no face detector" in capsys.readouterr().err


def test_an_image_with_more_faces_than_boxes_is_blurred_as_a_whole(tmp_path, results):
    corner = [[n / 100, 0.0, (n + 1) / 100, 0.01] for n in range(8)]
    crowd = next(p for p in results["pairs"] if p["concept"] == "brad-pitt") | {
        "faces": corner,
        "base_faces": corner[:7],
    }
    before, after = (
        before_after(parse_results(results | {"pairs": [crowd]}), tmp_path, 9, blur_faces)["groups"][0].cards[0].shots
        for blur_faces in (False, True)
    )
    lower_half = (0, 16, 32, 32)
    same = [
        opened(a.image.uri).crop(lower_half).tobytes() == opened(b.image.uri).crop(lower_half).tobytes()
        for a, b in zip(before, after, strict=True)
    ]
    assert same == [True, False]  # of the base's seven faces only the boxes


def test_the_preview_is_left_out_with_blur_faces(tmp_path, results):
    paint(tmp_path / "previews" / "step-000010.png", 64, 1)
    subjects = [s for s in results["subjects"] if s["id"] in ("base", "brad-pitt-teacher@1")]
    keep = {"rows": [], "pairs": [], "differences": []}
    for key in keep:
        keep[key] = [
            x for x in results[key] if x["concept"] == "brad-pitt" and x["subject"] in ("base", "brad-pitt-teacher@1")
        ]
    rewrite(tmp_path, results, subjects=subjects, **keep)
    assert "Preview after" in page_of(tmp_path)[1].text
    assert "Preview after" not in page_of(tmp_path, blur_faces=True)[1].text


def test_boxes_are_cut_to_the_image_and_empty_ones_dropped(tmp_path, results):
    boxes = [[0.5, 0.5, 0.1, 0.1], [1.2, 0, 1.4, 1], [0.2, 0.2, 7, 0.8]]
    results["pairs"] = [results["pairs"][0] | {"faces": boxes}]
    content = before_after(parse_results(results), tmp_path, 9, False)
    shot = content["groups"][0].cards[0].shots[1]
    assert shot.faces == [[0.2, 0.2, 1.0, 0.8]]


# -- cards, certificate --


def test_every_metric_links_to_the_card_of_its_detector(tmp_path, results):
    source, page = page_of(tmp_path)
    anchors = {a["href"] for tag, a in page.tags if tag == "a" and (a.get("href") or "").startswith("#card-")}
    assert anchors == {"#card-1", "#card-2"}
    assert 'id="card-1"' in source
    for text in ("the likeliest class", "Reads every picture as some digit", "n = 200 to 900", "sha256:abcdef"):
        assert text in plain(page.text), text


def test_certificate_states_what_remains_and_nothing_unmeasured(tmp_path, results):
    run(ReportConfig(run=tmp_path, certificate=True))
    source = (tmp_path / "certificate.html").read_text(encoding="utf-8")
    page = Page(source)
    text = plain(page.text)
    assert "Of 200 images asked for by name, 0.0 % still show it: at most 1.9 % at 95 % confidence" in text
    assert "Not tried" not in text
    for piece in ("ab" * 32, "cd" * 32, "2026-11-22", "the likeliest class", "DDIM"):
        assert piece in text
    assert sum(tag == "article" for tag, _ in page.tags) == 18
    assert "script" not in {tag for tag, _ in page.tags}


def test_certificate_states_the_upper_end_with_any_verdict(results):
    cases = {case.label: case for case in cases_in(results)}
    assert "22.0 % still show it: at most 28.2 % at 95 % confidence" in remaining(cases["seven-noise × 0.5"])[0]
    rows = [r for r in results["rows"] if r["metric"] != "leakage"]
    assert remaining(cases_in(results, rows=rows)[0]) == [
        "Images asked for by name were not evaluated.",
        "Images asked for in wordings that were not used in training were not evaluated.",
    ]


def test_certificate_lists_groups_that_were_not_tried(tmp_path, results):
    direct = [r for r in results["rows"] if r["group"] == "direct"]
    lora = next(r for r in direct if r["subject"] != "base")
    lpips, accuracy = (lora | {"metric": m, "group": g} for m, g in (("lpips", "kept"), ("accuracy", "general")))
    for kept, missing in (
        ([], "other wordings, look-alikes, anything else"),
        ([lpips], "other wordings"),  # of one of the two groups of retained prompts, or of both
        ([lpips, accuracy], "other wordings, look-alikes"),
    ):
        rewrite(tmp_path, results, rows=direct + kept)
        run(ReportConfig(run=tmp_path, certificate=True))
        pages = plain(Page((tmp_path / "certificate.html").read_text(encoding="utf-8")).text)
        assert f"Not tried: {missing}." in pages


def test_no_certificate_without_the_option(tmp_path, results):
    page_of(tmp_path)
    assert not (tmp_path / "certificate.html").exists()


def test_hostile_names_are_escaped_in_all_files(tmp_path, results):
    bad = f'{EVIL}</script><img src=x onerror="a()">'
    for item in (*results["concepts"], *results["subjects"]):
        item["name"] = bad
    rewrite(tmp_path, results)
    source, page = page_of(tmp_path, certificate=True)
    assert source.count("</script") == 1
    for text in (source, (tmp_path / "certificate.html").read_text(encoding="utf-8")):
        parsed = Page(text)
        assert not [a for _, attributes in parsed.tags for a in attributes if a.startswith("on")]
        assert bad in parsed.text
    assert "<script" not in (tmp_path / "report.md").read_text(encoding="utf-8")
