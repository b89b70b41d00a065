"""scripts/leaderboard.py: the table from records, and small cells end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))


def row(value: float, n: int = 100) -> dict[str, Any]:
    return {"value": value, "n": n, "low": max(0.0, value - 0.1), "high": min(1.0, value + 0.1)}


def write_record(
    folder: Path, method: str, seed: int = 0, leak: float = 0.2, soft: float = 0.4, concept: str = "seven"
) -> None:
    rows = {"leakage direct": row(leak), "retention kept": row(1.1), "clean_replacement direct": row(0.8)}
    weak = {name: row(0.1) for name in ("token", "prefix", "noise")}
    tries = [[0, 20, 0.0], [0, 40, 0.4], [0, 50, 0.6], [0, 100, 0.5]]
    attacks = {**weak, "soft": row(soft), "finetune": row(0.6) | {"tries": tries}}
    record = {
        "method": method,
        "concept": concept,
        "seed": seed,
        "training": {"seconds": 10.0, "bytes": 2000},
        "evaluation": {"rows": rows},
        "attacks": attacks,
    }
    folder.mkdir(exist_ok=True)
    (folder / f"{concept}-{method}-{seed}.json").write_text(json.dumps(record))


def page_of(tmp_path: Path, base: str = "digits") -> str:
    from leaderboard_page import END, START, write_page
    from leaderboard_studies import STUDIES

    page = tmp_path / "leaderboard.md"
    page.write_text(f"before\n{START}\nold\n{END}\nafter\n")
    write_page(page, STUDIES[base], tmp_path / "records", "quick")
    return page.read_text()


def lines_of(text: str, method: str) -> list[str]:
    """The lines of a method in the tables of seven."""
    return [line for line in text.partition("### three")[0].splitlines() if line.startswith(f"| {method} |")]


def test_the_score_is_the_harmonic_mean_of_four_rates(tmp_path: Path) -> None:
    """Forgotten 0.8, retained 1 (1.1 is not better), clean 0.8, not brought back 0.6: 4 / 5.1667 = 0.77."""
    write_record(tmp_path / "records", "pu")
    lines = lines_of(page_of(tmp_path), "ours")
    assert "| **0.77** |" in lines[0]
    assert "| 40 (soft) |" in lines[0]
    assert "| 20 (10–30) |" in lines[0]


def test_methods_are_ordered_by_score_whoever_wins(tmp_path: Path) -> None:
    write_record(tmp_path / "records", "pu", soft=0.9)
    write_record(tmp_path / "records", "esd-x", soft=0.3)
    text = page_of(tmp_path)
    assert text.index("| ESD-x |") < text.index("| ours |")


def test_fine_tuning_is_reported_in_steps_until_half_is_back(tmp_path: Path) -> None:
    write_record(tmp_path / "records", "pu")
    assert lines_of(page_of(tmp_path), "ours")[-1].endswith("| 50 (0 / 40 / 60 / 50) |")


def test_seeds_are_averaged_with_the_widest_interval(tmp_path: Path) -> None:
    write_record(tmp_path / "records", "pu", 0, leak=0.2)
    write_record(tmp_path / "records", "pu", 1, leak=0.4)
    [first, *_] = lines_of(page_of(tmp_path), "ours (2 seeds)")
    assert "| 30 (10–50) |" in first


def test_what_was_not_run_says_so_and_the_rest_of_the_page_stays(tmp_path: Path) -> None:
    write_record(tmp_path / "records", "pu")
    text = page_of(tmp_path)
    assert not lines_of(text, "UCE")
    assert "UCE; SPEED" in text.partition("Not run: ")[2].partition(".")[0]
    assert "### three\n\nNot run." in text
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text


def test_columns_without_a_value_and_methods_without_a_row_are_left_out(tmp_path: Path) -> None:
    write_record(tmp_path / "records", "pu")
    write_record(tmp_path / "records", "uce")
    file = tmp_path / "records" / "seven-pu-0.json"
    record = json.loads(file.read_text())
    record["evaluation"]["rows"]["ua"] = row(0.9)
    del record["attacks"]["prefix"]
    file.write_text(json.dumps(record))
    text = page_of(tmp_path)
    assert lines_of(text, "ours")[1] == "| ours | 90 (80–100) |"
    assert lines_of(text, "UCE")[1] == "| UCE | – |"  # evaluated, but the record has no such metric
    assert "| method | UA % |" in text
    assert "| not run |" in lines_of(text, "ours")[2]  # an attack
    assert "completion" not in text
    methods = text.partition("### Methods")[2]
    assert "| ours |" in methods
    assert "| ESD-x |" not in methods


def test_a_table_without_a_value_is_not_run(tmp_path: Path) -> None:
    write_record(tmp_path / "records", "pu")
    assert "**What it forgets and retains**\n\nNot run." in page_of(tmp_path)


def test_only_attacks_that_all_methods_have_count(tmp_path: Path) -> None:
    """Without `soft` on one method, the best attack of both is another."""
    write_record(tmp_path / "records", "pu")
    write_record(tmp_path / "records", "esd-x")
    file = tmp_path / "records" / "seven-pu-0.json"
    record = json.loads(file.read_text())
    del record["attacks"]["soft"]
    file.write_text(json.dumps(record))
    text = page_of(tmp_path)
    assert "best of token, prefix, noise %" in text
    assert all("| 10 (" in lines_of(text, name)[0] for name in ("ours", "ESD-x"))
    assert "| not run |" in lines_of(text, "ours")[-1]


def test_an_attack_that_nothing_withstands_does_not_count(tmp_path: Path) -> None:
    """`soft` brings the concept back from a model that never saw it, so the best attack of the others counts."""
    write_record(tmp_path / "records", "pu", soft=1.0)
    write_record(tmp_path / "records", "oracle", soft=0.95)
    text = page_of(tmp_path)
    assert "best of token, prefix, noise %" in text
    assert "| **0.87** |" in lines_of(text, "ours")[0]  # forgotten 0.8, retained 1, clean 0.8, not brought back 0.9


def test_a_page_of_many_concepts_has_their_mean_and_the_worst(tmp_path: Path) -> None:
    """Leakage of 20 and 40 %; of cat nothing is known."""
    write_record(tmp_path / "records", "pu", leak=0.2, concept="pistol")
    write_record(tmp_path / "records", "pu", leak=0.4, concept="bomb")
    text = page_of(tmp_path, "emoji")
    assert "| ours | 2 | 30 (worst 40) | 80 (worst 80) | 40 (worst 40) | 10 s | 2 kB |" in text
    assert "| pistol | 20 (10–30) / 110 (100–100) |" in text
    assert "Not run yet: knife, cigarette, beer, syringe, cat," in text
    assert "### Styles\n\nNot run." in text


def test_a_page_of_many_concepts_gives_a_single_one_with_its_interval(tmp_path: Path) -> None:
    write_record(tmp_path / "records", "pu", leak=0.2, concept="pistol")
    assert "| ours | 1 | 20 (10–30) | 80 (70–90) | 40 (30–50) | 10 s | 2 kB |" in page_of(tmp_path, "emoji")


def test_an_unknown_concept_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    import leaderboard

    with pytest.raises(SystemExit):
        leaderboard.parse(["--base", "emoji", "--concepts", "seven"])
    assert "--concepts seven: on emoji there are pistol," in capsys.readouterr().err


def test_the_grid_of_emoji_asks_for_every_thing_in_every_style() -> None:
    from leaderboard_studies import STUDIES

    from sd_unlearn.metrics.factorial import grid

    study = STUDIES["emoji"]
    prompts = [study.prompt_of(cell) for cell in grid(study.axes)]
    assert len(set(prompts)) == 145 * 6
    assert "an emoji of an axe in the Fluent flat style" in prompts
    assert "an emoji of Santa Claus in the OpenMoji style" in prompts


def test_pictures_have_a_row_for_each_method(tmp_path: Path) -> None:
    from leaderboard_pictures import GAP, SCALE, write_rows, write_strip

    files = []
    for number in range(3):
        Image.new("RGB", (32, 32), (number * 100, 0, 0)).save(tmp_path / f"{number}.png")
        files.append(tmp_path / f"{number}.png")
    write_strip(tmp_path / "one.png", [files[:2], files[2:]])
    with Image.open(tmp_path / "one.png") as strip:
        assert strip.size == (3 * 32 + GAP, 32)
    assert write_rows(tmp_path / "all.png", {"ours": tmp_path / "one.png", "not run": tmp_path / "none.png"})
    with Image.open(tmp_path / "all.png") as page:
        assert page.height == 32 * SCALE + GAP


@pytest.mark.slow
def test_cells_from_training_to_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An edit in closed form, a few images and attacks; what is recorded is not done again."""
    import leaderboard
    import leaderboard_cells
    from attack_cases import SMALL
    from leaderboard_studies import STUDIES, Budget

    from sd_unlearn.attacks import registry, runner

    small = {name: registry.ATTACKS[name] for name in ("soft", "finetune")}
    small = {name: type(a)(**{**vars(a), "budgets": {"quick": SMALL[name]}}) for name, a in small.items()}
    for module in (runner, leaderboard_cells):
        monkeypatch.setattr(module, "ATTACKS", small)
    budget = Budget({"num_images": 2, "num_keep_images": 1}, 1, dict.fromkeys(small, "quick"))
    monkeypatch.setitem(STUDIES["digits"].budgets, "quick", budget)
    monkeypatch.setattr(leaderboard, "QUICK", small)
    monkeypatch.setattr(leaderboard, "DOCS", tmp_path)
    (tmp_path / "leaderboard.md").write_text("<!-- leaderboard:start -->\n<!-- leaderboard:end -->\n")
    flags = ["--methods", "uce", "base", "oracle", "--concepts", "seven", "--seeds", "0", "--work_dir", str(tmp_path)]
    assert leaderboard.main([*flags, "--root", str(tmp_path)]) == 0
    records = tmp_path / "leaderboard-runs" / "digits" / "quick"
    assert sorted(file.name for file in records.iterdir()) == [
        *("seven-base-0.json", "seven-base-0.png", "seven-uce-0.json", "seven-uce-0.png"),
    ]  # the oracle was not built
    uce, base = (json.loads((records / f"seven-{name}-0.json").read_text()) for name in ("uce", "base"))
    assert uce["training"]["bytes"] > 0
    assert set(uce["attacks"]) == set(small)
    assert base["evaluation"]["rows"]["leakage direct"]["value"] == 1
    assert base["evaluation"]["rows"]["retention kept"]["value"] == 1
    assert base["evaluation"]["rows"]["ua"]["n"] == 5
    assert str(tmp_path) not in (records / "seven-uce-0.json").read_text()

    def fail(*_: object, **__: object) -> None:
        raise AssertionError

    for name in ("train", "evaluate", "attack"):
        monkeypatch.setattr(leaderboard_cells.sd_unlearn, name, fail)
    assert leaderboard.main([*flags, "--root", str(tmp_path)]) == 0
