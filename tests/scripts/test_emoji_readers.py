"""scripts/emoji_readers.py: how often classifiers agree, and its table."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sd_unlearn.metrics.emoji import BACKGROUNDS, STYLES, THINGS

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))


class Fixed(nn.Module):
    """Predicts these things of as many images."""

    def __init__(self, *things: int) -> None:
        super().__init__()
        self.things = torch.tensor(things)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shape = len(images)
        thing = nn.functional.one_hot(self.things, len(THINGS)).float()
        return thing, torch.zeros(shape, len(STYLES)), torch.zeros(shape, len(BACKGROUNDS))


def test_rates_and_agreement_of_two_classifiers() -> None:
    from emoji_readers import compared, table

    readers = {"bundled": Fixed(3, 3, 5, 7), "other": Fixed(3, 4, 5, 3)}
    images = torch.zeros(4, 3, 64, 64)
    row = compared(readers, images, 3)
    assert row == {"n": 4, "wanted": {"bundled": 0.5, "other": 0.5}, "agree": {"bundled": 1.0, "other": 0.5}}
    each = compared(readers, images, torch.tensor([3, 3, 5, 7]))
    assert each["wanted"] == {"bundled": 1.0, "other": 0.5}
    lines = table({"own": row, "each": each}).splitlines()
    assert lines[0] == "| images | n | bundled | other |"
    assert lines[2:] == ["| own | 4 | 50 | 50 (50) |", "| each | 4 | 100 | 50 (50) |"]


def test_classifiers_are_found_with_what_they_have_not_seen(tmp_path: Path) -> None:
    from emoji_readers import other_readers
    from safetensors.torch import save_file

    from sd_unlearn.metrics.emoji import EmojiReader

    reader = EmojiReader((8, 8, 16, 24)).eval()
    save_file(reader.state_dict(), tmp_path / "reader-1.safetensors", {"without": ""})
    save_file(reader.state_dict(), tmp_path / "reader-2.safetensors", {"without": "noto"})
    save_file(reader.state_dict(), tmp_path / "reader.safetensors")  # the bundled one
    found = other_readers(tmp_path)
    assert list(found) == ["reader-1", "without noto"]
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(found["without noto"](images)[0], reader(images)[0])


def test_backgrounds_can_be_colours() -> None:
    from emoji_data import BACKGROUND_RGB, compose

    nothing = torch.zeros(2, 4, 8, 8)
    numbered = compose(nothing, torch.tensor([3, 0]), jitter=0)
    coloured = compose(nothing, torch.tensor([BACKGROUND_RGB[BACKGROUNDS[n]] for n in (3, 0)]), jitter=0)
    assert torch.equal(numbered, coloured)
    assert not torch.equal(numbered[0], numbered[1])
