"""scripts/many_concepts.py: which things are erased together, and the table from records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sd_unlearn.data.several import read_concepts

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))


def test_longer_lists_start_with_the_shorter_ones() -> None:
    from many_concepts import chosen

    assert chosen(10)[:2] == ["pistol", "knife"]
    assert chosen(100)[:10] == chosen(10)
    assert len(set(chosen(100))) == 100
    assert chosen(50) == chosen(50)


def test_a_list_file_is_what_train_takes(tmp_path: Path) -> None:
    from many_concepts import chosen, list_file

    concept = read_concepts(list_file(chosen(50), tmp_path))
    assert [part.name for part in concept.parts] == chosen(50)
    assert not any("knife" in template for part in concept.parts for template in part.keep)
    assert read_concepts(list_file(["pistol"], tmp_path)).name == "pistol"
    assert len(list(tmp_path.iterdir())) == 2


def test_the_table_has_means_over_things(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """5 of 20 and 1 of 20 images show a concept: 15 %. Closed-form methods have no steps."""
    import many_concepts

    shared = {"count": 10, "rank": 8, "bytes": 123456}
    leakage = {"pistol": [0.25, 20], "knife": [0.05, 20]}
    kept = {"base": {"pistol": [1.0, 20], "knife": [0.9, 20]}, "retention": {"pistol": [0.98, 9], "knife": [1.0, 9]}}
    ours = {**shared, **kept, "method": "pu", "seconds": 61.2, "steps": 500, "leakage": leakage}
    uce = {**ours, "method": "uce", "seconds": 0.24, "steps": None}
    for one in (uce, ours):
        (tmp_path / f"{one['method']}.json").write_text(json.dumps(one))
    monkeypatch.setattr(many_concepts, "RECORDS", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{many_concepts.START}\nold\n{many_concepts.END}\nafter\n")
    many_concepts.write_table(page)
    text = page.read_text()
    assert "| 10 | ours | 15 (7.1–29) | 25 | 95 | 99 | 500 | 61 s | 123 kB |" in text
    assert text.index("| ours |") < text.index("| UCE |")
    assert "| – | 0.2 s |" in text
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text


def test_the_points_of_the_curve(tmp_path: Path) -> None:
    """Means over things, weighted by images: 6 of 40 show a concept. One at a time, each has a record of its own."""
    from many_curve import draw, point_of, single

    leakage, kept = {"pistol": [0.25, 20], "knife": [0.05, 20]}, {"cat": [0.98, 9], "owl": [1.0, 9]}
    count, share, (low, high), retained = point_of({"count": 10, "leakage": leakage, "retention": kept})
    assert (count, share, retained) == (10, pytest.approx(0.15), pytest.approx(0.99))
    assert low < 0.15 < high
    rows = [
        {"leakage direct": {"value": value, "n": 50}, "retention kept": {"value": 1.0, "n": 9}} for value in (0, 0.1)
    ]
    alone = single([{"evaluation": {"rows": one}} for one in rows])
    assert alone is not None
    assert alone[:2] == (1, pytest.approx(0.05))
    assert single([{"training": {}}]) is None
    draw({"pu": [alone, (10, 0.15, (low, high), 0.99)]}, {"pu": "ours"}, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
