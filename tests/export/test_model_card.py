"""The model card and its images: metrics with intervals, escaped texts of users, a small header."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from export_runs import SLUG, evaluated, exported, hand_run, read_header, training_record
from markdown_it import MarkdownIt
from PIL import Image

from sd_unlearn.data.concept import Concept, write_concept
from sd_unlearn.export import metadata, model_card, trained_run
from sd_unlearn.io.files import write_json
from sd_unlearn.io.reading import read_json

HUB_BASE = "stabilityai/stable-diffusion-xl-base-1.0"
EVIL = '</td>![x](http://a.b/c.png) <script>alert(1)</script> [y](javascript:z) | `k` **b** http://a.b www.a.b "q"\n# h'


def page(run: Path) -> tuple[dict[str, Any], str]:
    """The card's YAML header and its Markdown."""
    _, front, text = (run / "export" / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), text


def test_the_card_has_metrics_with_intervals_and_usage(tmp_path: Path) -> None:
    exported(evaluated(tmp_path, training=training_record(2, 3.0, name=HUB_BASE, kind="sdxl")))
    front, text = page(tmp_path)
    lines = [[" ".join(cell.split()) for cell in line.strip("|").split("|")] for line in text.splitlines()]
    plain = [[html_text(cell) for cell in line] for line in lines]
    assert ["Leakage", "by name", "96.0 %", "1.0 %", "0.2–3.0 %", "200"] in plain
    assert ["Retention", "look-alikes", "–", "99.0 %", "98.0–100.0 %", "200"] in plain
    assert front["license"] == "openrail++"
    assert front["base_model"] == HUB_BASE
    assert {"lora", "machine-unlearning", "stable-diffusion-xl"} <= set(front["tags"])
    assert f'StableDiffusionXLPipeline.from_pretrained("{HUB_BASE}"' in text
    assert 'weight_name="pytorch_lora_weights.safetensors"' in text
    assert f"<lora:{SLUG}:1>" in text
    assert "Weight 0 brings the concept back" in text
    assert "](pairs.png)" in text


@pytest.mark.parametrize("is_attacked", [True, False])
def test_the_card_says_whether_attacks_were_tried(tmp_path: Path, is_attacked: bool) -> None:
    evaluated(tmp_path)
    results = read_json(tmp_path / "results.json")
    attack = {**results["rows"][0], "metric": "attack", "group": "soft", "subject": "mine" if is_attacked else "base"}
    write_json(tmp_path / "results.json", results | {"rows": [*results["rows"], attack]})
    exported(tmp_path)
    _, text = page(tmp_path)
    assert ("prompts and attacks of the table were tested" in " ".join(text.split())) == is_attacked
    assert ("Only the prompts of the evaluation were tested" in text) != is_attacked


def html_text(cell: str) -> str:
    import html

    return html.unescape(cell)


@pytest.mark.parametrize(
    ("objective", "paper", "generic"),
    [("pu", "2503.03789", True), ("esd-x", "2303.07345", False), ("anchor", "2303.13516", True)],
)
def test_the_card_names_the_method(tmp_path: Path, objective: str, paper: str, generic: bool) -> None:
    exported(hand_run(tmp_path, training=training_record(2, 3.0) | {"objective": objective}))
    _, text = page(tmp_path)
    assert [number for number in ("2503.03789", "2303.07345", "2303.13516") if number in text] == [paper]
    assert ("generates what it generates for" in text) == generic


def test_the_card_of_a_run_without_results_says_so(tmp_path: Path) -> None:
    paths = exported(hand_run(tmp_path))
    front, text = page(tmp_path)
    assert "Not evaluated yet" in text
    assert "pairs.png" not in text
    assert not (tmp_path / "export" / "pairs.png").exists()
    assert front["license"] == "other"
    assert "base_model" not in front, "the name of a folder is not a model of the hub"
    assert len(paths) == 2


@pytest.mark.parametrize("where", ["name", "caption", "generic", "detector", "base"])
def test_texts_of_users_add_no_markup(tmp_path: Path, where: str) -> None:
    texts = {"name": "Brad Pitt", "caption": "a", "generic": "b"}
    concept = Concept(**(texts | ({where: EVIL} if where in texts else {})))
    record = training_record(2, 3.0, **({"name": EVIL} if where == "base" else {}))
    other = {"detector": EVIL} if where == "detector" else {}
    exported(evaluated(tmp_path, concept=concept, training=record, **other))
    _, text = page(tmp_path)
    shown = MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
    assert "alert(1)" in shown, "the text itself is there"
    assert "<script" not in shown
    assert "javascript:" not in shown.replace("](javascript:z)", "")
    assert shown.count("<img") == 1, "only the card's own image"
    assert "<a " not in shown
    assert "<strong>" not in shown
    clean = MarkdownIt("commonmark", {"html": True}).enable("table").render(text.replace(model_card.escaped(EVIL), "x"))
    for tag in ("<td", "<tr", "<h1", "<h2", "<p", "<code"):
        assert shown.count(tag) == clean.count(tag), tag


def test_a_chosen_licence_is_in_card_and_header(tmp_path: Path) -> None:
    _, file = exported(hand_run(tmp_path), license="openrail++")
    assert page(tmp_path)[0]["license"] == "openrail++"
    assert read_header(file)["modelspec.license"] == "openrail++"


def decoded(uri: str) -> Image.Image:
    kind, data = uri.split(",")
    assert kind == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")


def test_thumbnail_and_grid_show_the_pairs_of_the_run(tmp_path: Path) -> None:
    _, file = exported(evaluated(tmp_path))
    thumbnail = decoded(read_header(file)["modelspec.thumbnail"])
    assert max(thumbnail.size) <= 256
    left, right = thumbnail.getpixel((20, 60)), thumbnail.getpixel((thumbnail.width - 20, 60))
    assert (left[1] < 60, right[1] > 200) == (True, True), "without the LoRA on the left, with it on the right"
    grid = Image.open(tmp_path / "export" / "pairs.png")
    assert grid.size == (3 * 192 + 2 * 4, 2 * 192 + 4)
    assert [grid.getpixel((x, y)) for y in (50, 300) for x in (50, 250, 450)] == [
        (250, 0, 0),
        (200, 0, 0),
        (100, 0, 0),
        (250, 255, 0),
        (200, 255, 0),
        (100, 255, 0),
    ]
    assert int.from_bytes(file.read_bytes()[:8], "little") < 1024 * 1024


@pytest.mark.parametrize("merged", [False, True])
def test_comfyui_and_a1111_find_the_preview_in_the_header(tmp_path: Path, merged: bool) -> None:
    """They read `ssmd_cover_images`: a JSON list of images in base64, without the prefix of a data: URI."""
    run = trained_run.read_run(evaluated(tmp_path))
    header = metadata.checkpoint_header(run, "ab", 1.0) if merged else metadata.lora_header(run, "ab")
    [cover] = json.loads(header["ssmd_cover_images"])
    image = Image.open(io.BytesIO(base64.b64decode(cover, validate=True)))
    assert image.format == "JPEG"
    assert max(image.size) == 256
    assert header["modelspec.thumbnail"] == f"data:image/jpeg;base64,{cover}"
    assert sum(len(text) for text in header.values()) < 100_000


def test_without_results_the_last_preview_is_the_thumbnail(tmp_path: Path) -> None:
    run = hand_run(tmp_path)
    (run / "previews").mkdir()
    for step, red in ((2, 0), (10, 255)):
        Image.new("RGB", (600, 300), (red, 0, 0)).save(run / "previews" / f"step-{step:06d}.png")
    thumbnail = decoded(read_header(exported(run)[1])["modelspec.thumbnail"])
    assert thumbnail.size == (256, 128)
    assert thumbnail.getpixel((100, 100))[0] > 240


def test_images_of_nudity_are_not_exported(tmp_path: Path) -> None:
    concept = Concept(name="nudity", caption="a", generic="b", kind="nudity")
    _, file = exported(evaluated(tmp_path, concept=concept))
    assert not {"modelspec.thumbnail", "ssmd_cover_images"} & set(read_header(file))
    assert not (tmp_path / "export" / "pairs.png").exists()


@pytest.mark.parametrize(
    "path", ["../secret.png", "/secret.png", "images/link.png", "images/base/missing.png", "concept.yaml"]
)
def test_only_images_of_the_run_are_exported(tmp_path: Path, path: str) -> None:
    run = evaluated(tmp_path / "run")
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    (run / "images").mkdir(exist_ok=True)
    (run / "images" / "link.png").symlink_to(tmp_path / "secret.png")
    results = json.loads((run / "results.json").read_text())
    name = str(tmp_path / "secret.png") if path.startswith("/") else path
    results["pairs"] = [results["pairs"][0] | {"base": name, "image": name}]
    write_json(run / "results.json", results)
    assert "modelspec.thumbnail" not in read_header(exported(run)[1])


def test_of_a_comparison_only_the_results_of_this_run_are_exported(tmp_path: Path) -> None:
    """results.json can hold several LoRAs, strengths and concepts."""
    run = evaluated(tmp_path)
    results = json.loads((run / "results.json").read_text())
    exported(run)
    card, grid = page(run)[1], (run / "export" / "pairs.png").read_bytes()
    mine = results["subjects"][1]
    results["subjects"] += [mine | {"id": "half", "strength": 0.5}, mine | {"id": "other", "sha256": "00"}]
    results["concepts"].append(results["concepts"][0] | {"slug": "somebody-else"})
    row, pair = results["rows"][1] | {"value": 0.5}, results["pairs"][0]
    results["rows"] += [
        row | change for change in ({"subject": "half"}, {"subject": "other"}, {"concept": "somebody-else"})
    ]
    results["pairs"].append(pair | {"subject": "other", "image": pair["base"]})
    write_json(run / "results.json", results)
    header = json.loads(read_header(exported(run)[1])["sd_unlearn.results"])
    assert [(row["metric"], row["value"]) for row in header["rows"]] == [("leakage", 0.01), ("retention", 0.99)]
    assert (page(run)[1], (run / "export" / "pairs.png").read_bytes()) == (card, grid)
    mine["sha256"] = "11" * 32
    write_json(run / "results.json", results)
    assert "sd_unlearn.results" not in read_header(exported(run)[1])


def test_what_prevents_a_verdict_is_in_card_and_header(tmp_path: Path) -> None:
    """A leakage of 1 % of black images is not published without saying so."""
    run = evaluated(tmp_path)
    results = json.loads((run / "results.json").read_text())
    problem = {"concept": SLUG, "subject": "mine", "kind": "flat", "message": "Of 200 direct images 150 are flat."}
    of_base = problem | {"subject": "base", "concept": "", "message": "The base's images are flat."}
    results["subjects"].append(results["subjects"][1] | {"id": "half", "strength": 0.5})
    results["problems"] = [problem, of_base, problem | {"subject": "half", "message": "Of another strength."}]
    write_json(run / "results.json", results)
    content = json.loads(read_header(exported(run)[1])["sd_unlearn.results"])
    expected = [problem | {"subject": "lora"}, of_base]
    assert [{key: found[key] for key in problem} for found in content["problems"]] == expected
    text = html_text(page(run)[1])
    assert "does not show that the concept is gone" in text
    assert text.index("- Of 200 direct images 150 are flat.") < text.index("| metric |")
    assert "- The base's images are flat." in text
    assert "Of another strength" not in text
    results["problems"] = []
    write_json(run / "results.json", results)
    exported(run)
    assert "does not show" not in page(run)[1]


def test_a_calibrated_strength_is_in_every_exported_file(tmp_path: Path) -> None:
    run = evaluated(tmp_path)
    digest = hashlib.sha256((run / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()
    record: dict[str, Any] = {
        **{"schema_version": 1, "concept": SLUG, "sha256": digest, "leakage": 0.05, "retention": 0.95},
        **{"smallest": 0.8, "largest": 1.3, "strength": 0.8, "message": "Strength 0.8: it works.", "points": []},
    }
    write_json(run / "calibration.json", record)
    diffusers_file, kohya_file = exported(run)
    for file in (diffusers_file, kohya_file):
        header = read_header(file)
        assert header["sd_unlearn.calibrated_strength"] == "0.8"
        assert json.loads(header["sd_unlearn.calibration"])["largest"] == 1.3
    assert read_header(kohya_file)["modelspec.usage_hint"].startswith("Load at strength 0.8.")
    text = html_text(page(run)[1])
    assert "Strength 0.8: it works." in text
    assert f"<lora:{SLUG}:0.8>" in text
    assert f'set_adapters("{SLUG}", 0.8)' in text
    loader = json.loads((run / "export" / "comfyui-workflow.json").read_text())["2"]["inputs"]
    assert (loader["strength_model"], loader["strength_clip"]) == (0.8, 0.8)
    write_json(run / "calibration.json", record | {"strength": None, "message": "No strength does both."})
    header = read_header(exported(run)[1])
    assert "sd_unlearn.calibrated_strength" not in header
    assert json.loads(header["sd_unlearn.calibration"])["message"] == "No strength does both."
    assert "<lora:brad-pitt:1>" in page(run)[1]
    for other in ({"sha256": "11" * 32}, {"concept": "somebody-else"}):  # calibrated before another training
        write_json(run / "calibration.json", record | other)
        assert "sd_unlearn.calibration" not in read_header(exported(run)[1])


def test_the_header_holds_the_hash_of_the_concept(tmp_path: Path) -> None:
    one, same, other = (tmp_path / name for name in "abc")
    for run in (one, same, other):
        hand_run(run)
    write_concept(other / "concept.yaml", Concept(name="Brad Pitt", caption="a portrait of Brad Pitt", generic="b"))
    hashes = [read_header(exported(run)[1])["sd_unlearn.prompts_sha256"] for run in (one, same, other)]
    assert hashes[0] == hashes[1] != hashes[2]
