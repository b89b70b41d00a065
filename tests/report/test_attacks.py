"""The report's section on attacks."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sd_unlearn.cli import main
from sd_unlearn.report.cases import cases_of
from sd_unlearn.report.metric_names import group_name
from sd_unlearn.report.terminal import format_attacks
from sd_unlearn.results import read_results


def tries(*values: tuple[int, float]) -> list[dict[str, Any]]:
    return [{"restart": 0, "step": step, "value": value, "n": 10, "found": ""} for step, value in values]


def entry(
    attack: str, found: list[dict[str, Any]], images: tuple[str, ...] = (), subject: str = "lora", **changes: Any
) -> dict[str, Any]:
    return {
        "concept": "seven",
        "subject": subject,
        "attack": attack,
        "budget": "quick",
        "detector": "reader",
        "settings": {},
        "tries": found,
        "access": "weights",
        "source": "Somebody <et al.> 2024",
        "images": list(images),
        **changes,
    }


def row(metric: str, group: str, subject: str, value: float, **changes: Any) -> dict[str, Any]:
    interval = {"low": max(0.0, value - 0.05), "high": min(1.0, value + 0.05), "interval": "wilson"}
    names = {"metric": metric, "group": group, "subject": subject, "concept": "seven", "detector": "reader"}
    return {**names, "value": value, "n": 100, **interval, **changes}


def write(folder: Path, attacks: list[dict[str, Any]], rows: list[dict[str, Any]]) -> None:
    concept = {"slug": "seven", "name": "seven", "caption": "a seven", "generic": "a digit"}
    subjects = [
        {"id": "base", "name": "digits", "what": "base"},
        {"id": "lora", "name": "lora", "what": "lora", "strength": 1.0, "sha256": "0" * 64, "forgets": "seven"},
    ]
    if any(one["subject"] == "floor" for one in rows):
        subjects.append({"id": "floor", "name": "never", "what": "base"})
    leakage = [row("leakage", "direct", "base", 0.9), row("leakage", "direct", "lora", 0.0)]
    content = {"schema_version": 2, "concepts": [concept], "subjects": subjects, "rows": leakage + rows}
    (folder / "results.json").write_text(json.dumps(content | {"attacks": attacks}))


def report(folder: Path, *flags: str) -> tuple[str, str]:
    assert main(["report", "--run", str(folder), *flags]) == 0
    return (folder / "report.html").read_text(), (folder / "report.md").read_text()


def test_the_most_successful_attack_comes_first(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "worst.png")
    attacks = [
        entry("token", tries((200, 0.1))),
        entry("soft", tries((200, 0.8)), ("worst.png", "missing.png")),
        entry("finetune", tries((5, 0.2), (10, 0.6))),
    ]
    attacks += [entry(name, tries((200, 1.0)), subject="base") for name in ("token", "soft", "finetune")]
    attacks.append(entry("soft", tries((200, 0.25)), subject="floor"))
    values = {"token": 0.1, "soft": 0.8, "finetune": 0.6}
    rows = [row("attack", name, "lora", value) for name, value in values.items()]
    rows += [row("attack", name, "base", 1.0) for name in values] + [row("attack", "soft", "floor", 0.25)]
    write(tmp_path, attacks, rows)
    page, markdown = report(tmp_path)
    section = page[page.index('id="attacks"') : page.index('id="metrics"')]
    assert (
        section.index("Learned prompt") < section.index("Fine-tuning on the concept") < section.index("Learned token")
    )
    assert section.count("<img ") == 1
    assert "half of the base's 100.0 % is reached after 10 steps" in html.unescape(section)
    assert "Somebody &lt;et al.&gt; 2024" in section
    assert "25.0" in section
    note = (
        "Of 3 attacks, the most successful (learned prompt) brings it back in 80.0 %; from a model that never saw it, "
    )
    note += "25.0 %."
    assert note in page.replace("\u00a0", " ")
    assert note in markdown.replace("\\", "")
    assert "Does it stay gone?" in markdown
    assert "| learned prompt | weights | 80.0 % |" in markdown
    for text in (section, markdown):
        assert "interval is that of the best try alone" in text.replace("&nbsp;", " ")


def test_an_attack_that_failed_is_named(tmp_path: Path) -> None:
    """It may be the one that brings the concept back."""
    write(tmp_path, [entry("soft", tries((200, 0.0)))], [row("attack", "soft", "lora", 0.0)])
    results = json.loads((tmp_path / "results.json").read_text())
    failed = {"concept": "seven", "subject": "lora", "attack": "finetune", "message": "out of memory."}
    for attacks in (results["attacks"], []):
        changes = {"attacks": attacks, "failed_attacks": [failed]}
        (tmp_path / "results.json").write_text(json.dumps(results | changes))
        for page in report(tmp_path):
            assert "Fine-tuning on the concept failed on lora: out of memory." in page.replace("\\", "")
            assert page.count("Does it stay gone?") >= 1


@pytest.mark.parametrize("other", [{"budget": "full"}, {"seed": 7}, {"settings": {"steps": 5000}}])
def test_an_attack_with_other_settings_is_not_shown_next_to_it(tmp_path: Path, other: dict[str, Any]) -> None:
    attacks = [entry("soft", tries((200, 0.8)))]
    attacks += [entry("soft", tries((200, 0.33)), subject=subject, **other) for subject in ("base", "floor")]
    rows = [
        row("attack", "soft", subject, value) for subject, value in (("lora", 0.8), ("base", 0.33), ("floor", 0.33))
    ]
    write(tmp_path, attacks, rows)
    for page in (*report(tmp_path, "--certificate"), (tmp_path / "certificate.html").read_text()):
        assert "80.0" in page
        assert "33.0" not in page
    assert "33.0" not in format_attacks(read_results(tmp_path))
    for one in attacks:
        one |= other
    write(tmp_path, attacks, rows)
    page, _ = report(tmp_path, "--certificate")
    assert "33.0" in page
    assert "33.0" in (tmp_path / "certificate.html").read_text()
    assert format_attacks(read_results(tmp_path)).count("33.0 %") == 2


@pytest.mark.parametrize(("lora", "text"), [(0.45, "is reached after 10 steps"), (0.2, "is not reached in 10 steps")])
def test_fine_tuning_is_half_back_at_half_of_what_the_base_shows(tmp_path: Path, lora: float, text: str) -> None:
    values = (("base", 0.45), ("lora", lora))
    attacks = [entry("finetune", tries((5, 0.1), (10, value)), subject=name) for name, value in values]
    write(tmp_path, attacks, [row("attack", "finetune", name, value) for name, value in values])
    for page in report(tmp_path):
        assert f"quick, 1 restart, 2 tries; half of the base's 45.0 % {text}" in html.unescape(page)


def test_with_two_detectors_the_headline_is_about_the_one_that_gives_the_verdict(tmp_path: Path) -> None:
    values = {("token", "reader"): 0.1, ("soft", "reader"): 0.3, ("token", "clip"): 0.9, ("soft", "clip"): 0.2}
    names = [f"{attack}-{detector}.png" for attack, detector in values]
    for name in names:
        Image.new("RGB", (8, 8), "red").save(tmp_path / name)
    attacks = [
        entry(attack, tries((200, value)), (name,), detector=detector)
        for name, ((attack, detector), value) in zip(names, values.items(), strict=True)
    ]
    rows = [row("attack", name, "lora", value, detector=detector) for (name, detector), value in values.items()]
    write(tmp_path, attacks, rows)
    page, markdown = report(tmp_path)
    assert "Of 2 attacks, the most successful (learned prompt) brings it back in 30.0 %." in page.replace("\u00a0", " ")
    assert "Images of the most successful attack: learned prompt." in page
    section = page[page.index('id="attacks"') : page.index('id="metrics"')]
    assert (section.count(">clip</td>"), section.count(">reader</td>")) == (2, 2)
    assert "| learned token | weights | 90.0 % |" in markdown
    assert markdown.count("| clip | quick, 1 restart, 1 try |") == 2
    head, _, *lines = format_attacks(read_results(tmp_path)).splitlines()
    assert head.endswith("detector")
    assert {line.split()[-1] for line in lines} == {"reader", "clip"}
    [case] = cases_of(read_results(tmp_path))
    assert [(line.group, line.main.value) for line in case.attacks] == [("soft", 0.3), ("token", 0.1)]


def test_one_detector_is_not_named_in_the_tables(tmp_path: Path) -> None:
    write(tmp_path, [entry("soft", tries((200, 0.8)))], [row("attack", "soft", "lora", 0.8)])
    page, markdown = report(tmp_path)
    assert ">Detector</th>" not in page[page.index('id="attacks"') : page.index('id="metrics"')]
    assert "| n | effort |" in markdown
    assert "detector" not in format_attacks(read_results(tmp_path))


def test_without_attacks_there_is_no_section(tmp_path: Path) -> None:
    write(tmp_path, [], [])
    page, markdown = report(tmp_path)
    assert 'id="attacks"' not in page
    assert "Does it stay gone?" not in markdown
    assert "sd-unlearn attack tries" in page


def test_without_a_floor_no_column_for_it(tmp_path: Path) -> None:
    write(tmp_path, [entry("benign", tries((20, 0.0)))], [row("attack", "benign", "lora", 0.0)])
    page, _ = report(tmp_path)
    section = page[page.index('id="attacks"') : page.index('id="metrics"')]
    assert "From the floor</th>" not in section
    assert "50 % is not reached in 20 steps" in section


def test_the_certificate_lists_attacks_before_other_metrics(tmp_path: Path) -> None:
    rows = [row("retention", "kept", "lora", 0.9), row("attack", "soft", "lora", 0.8)]
    write(tmp_path, [entry("soft", tries((200, 0.8)))], rows)
    report(tmp_path, "--certificate")
    page = (tmp_path / "certificate.html").read_text()
    assert page.index("learned prompt") < page.index("Retention")


def test_the_certificate_has_retention_and_the_most_successful_of_many_attacks(tmp_path: Path) -> None:
    names = ["prefix", "hard", "token", "soft", "ring", "noise", "inversion", "completion", "finetune", "benign"]
    names += ["strength", "quantisation"]
    values = {name: (i + 1) / 20 for i, name in enumerate(names)}
    attacks = [entry(name, tries((200, value))) for name, value in values.items()]
    rows = [row("attack", name, "lora", value) for name, value in values.items()]
    rows += [row("retention", "kept", "lora", 0.9), row("clean_replacement", "direct", "lora", 0.95)]
    write(tmp_path, attacks, [*rows, row("drift", "kept", "lora", 0.1)])
    report(tmp_path, "--certificate")
    page = (tmp_path / "certificate.html").read_text()
    table = page[page.index("<tbody>") : page.index("</tbody>")]
    shown = [group_name(name) for name in reversed(names)][:9]
    assert [table.index(name) for name in shown] == sorted(table.index(name) for name in shown)
    assert table.count("<tr>") == 12
    assert table.count("Retention") == table.count("Clean replacement") == 1
    assert group_name("prefix") not in table
    assert "3 further attacks and 1 further line are in the report." in page
    assert "Only the prompts and attacks counted here were tried." in page


def test_a_certificate_without_attacks_says_that_only_prompts_were_tried(tmp_path: Path) -> None:
    write(tmp_path, [], [])
    report(tmp_path, "--certificate")
    page = (tmp_path / "certificate.html").read_text()
    assert "Only the prompts counted here were tried." in page
    assert "further" not in page[page.index("What was measured") :]
