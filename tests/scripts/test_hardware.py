"""docs/hardware.md shows what its scripts print."""

from __future__ import annotations

from pathlib import Path

import pytest

from sd_unlearn.io.reading import read_json

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "hardware.md").read_text()


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))


def test_the_page_is_what_the_command_prints() -> None:
    from hardware_table import CARDS, table

    printed = table()
    assert printed in PAGE
    cells = {tuple(line.split(" | ")[:2]): line.split(" | ") for line in printed.splitlines()[2:]}
    assert cells["| 6 GB", "SD 1.5, 512"][2] != "does not fit"
    assert cells["| 12 GB", "SDXL, 1024"][2] != "does not fit"
    for base in ("SD 1.5, 512", "SD 2.1, 768"):  # a larger card does without checkpointing, or takes no smaller batches
        rows = [cells[f"| {card} GB", base] for card in CARDS]
        choices = [(row[3] == "no", int(row[2])) for row in rows]
        assert choices == sorted(choices)


@pytest.mark.slow
def test_the_table_of_flow_matching_bases_is_what_the_command_prints() -> None:
    from hardware_table import flow_table

    assert flow_table() in PAGE


def test_the_predictions_on_the_page_are_those_of_today() -> None:
    from bench_memory import CELLS, predict

    rows = [line.split(" | ") for line in PAGE.splitlines() if line.startswith(("| 128 |", "| 256 |"))]
    assert len(rows) == len(CELLS) == 16
    for (pixels, on, images), row in zip(CELLS, rows, strict=True):
        assert row[0] == f"| {pixels}"
        assert row[3] == f"{predict(pixels, on, images)['peak']:,.0f} MB"
        assert abs(float(row[5]) - 1) <= 0.15
        assert abs(float(row[6].rstrip(" |")) - 1) <= 0.15


@pytest.mark.usefixtures("one_thread")
def test_memory_is_measured_for_what_is_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a network of the right layout without weights."""
    import bench_memory

    small = {"block_out_channels": [32, 64, 64, 64], "layers_per_block": 1, "norm_num_groups": 32}
    monkeypatch.setattr(bench_memory, "read_json", lambda file: {**read_json(file), **small})
    monkeypatch.setattr(bench_memory, "status", lambda name: 2**20 * len(name))
    found = bench_memory.measure(64, False, 1)
    assert set(found) == {"weights", "peak"}
