"""scripts/unseen.py: what the bases have never seen is found in its images and not in others, and the records."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from sd_unlearn.data.find_concept import load_concept
from sd_unlearn.io.reading import read_json
from sd_unlearn.metrics.digits import DIGITS
from sd_unlearn.metrics.emoji import THINGS

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))


@pytest.mark.parametrize("name", ["mirrored three", "mirrored seven"])
def test_it_is_found_in_its_own_images_only(name: str, tmp_path: Path) -> None:
    from unseen_kinds import UNSEEN

    unseen = UNSEEN[name](name, tmp_path)
    assert unseen.finds(unseen.images(100, seed=3)).mean() > 0.95
    assert unseen.false_rate < 0.1


def test_a_thing_is_found_by_its_outline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two things, squares and frames, both in any colour on a grey background."""
    import unseen_kinds
    from emoji_data import Drawings

    square = torch.zeros(6, 4, 128, 128, dtype=torch.uint8)
    square[:, 3, 20:108, 20:108] = 255
    frame = square.clone()
    frame[:, 3, 40:88, 40:88] = 0
    labels = torch.zeros(6, dtype=torch.long)
    monkeypatch.setattr(unseen_kinds, "load_drawings", lambda work: Drawings(frame, labels, labels, labels))
    monkeypatch.setattr(unseen_kinds.Thing, "drawings", square)
    unseen = unseen_kinds.Thing("square", tmp_path)
    images = torch.full((4, 3, 64, 64), 0.1)
    images[0, 0, 12:52, 12:52] = images[1, 2, 10:50, 10:50] = images[2, 1, 12:52, 12:52] = -0.6
    images[2, 1, 20:44, 20:44] = 0.1
    assert unseen.finds(images)[:3].tolist() == [True, True, False]
    assert unseen_kinds.Thing(THINGS[0], tmp_path).others.pixels.shape == (0, 4, 128, 128)
    assert unseen.others.pixels.shape == (6, 4, 128, 128)


def test_names_are_not_known_to_the_bases_and_their_concept_files_are_valid(tmp_path: Path) -> None:
    from unseen import concept_file
    from unseen_kinds import UNSEEN

    for name, kind in UNSEEN.items():
        assert name not in (*THINGS, *DIGITS)
        unseen = kind(name, tmp_path)
        concept = load_concept(str(concept_file(unseen, tmp_path / "unseen.yaml")))
        assert (concept.name, concept.base) == (name, kind.base)
        assert [prompt.text for prompt in concept.prompts("direct")] == [unseen.caption]


def test_an_attack_that_a_record_has_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the attack's images, every second one shows it."""
    import unseen
    from unseen_kinds import UNSEEN

    calls = []

    def attacked(kind: unseen.Unseen, attack: str, work: Path, run: Path | None) -> list[Path]:
        calls.append(attack)
        images: Tensor = torch.stack([kind.images(10, seed=5), torch.zeros(10, 3, 32, 32)], 1).flatten(0, 1)
        files = [work / f"{number}.png" for number in range(20)]
        for image, file in zip(unseen.as_images(images), files, strict=True):
            image.save(file)
        return files

    monkeypatch.setattr(unseen, "attacked", attacked)
    monkeypatch.setattr(unseen, "RECORDS", tmp_path)
    three = UNSEEN["mirrored three"]("mirrored three", tmp_path)
    unseen.measure(three, ["soft"], tmp_path)
    unseen.measure(three, ["soft", "token"], tmp_path)
    assert calls == ["soft", "token"]
    assert (tmp_path / "mirrored-three.png").is_file()
    assert read_json(tmp_path / "mirrored-three.json")["soft"] == {"n": 20, "value": 0.5, "low": 0.2993, "high": 0.7007}
    assert "| mirrored three | digits | 50 (30–70) | 50 (30–70) |" in unseen.table()
