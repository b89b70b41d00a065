"""The tables of bench.py and its reading of run folders. Nothing is timed here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))


def probe(leakage: float, retention: float, seconds: float, clean: float = 1.0) -> dict[str, float]:
    rates = {"probe_leakage": leakage, "probe_retention": retention, "probe_clean": clean}
    return {**rates, "seconds": seconds, "images": 40 * seconds}


def make_run(folder: Path, lines: list[dict[str, Any]], stopped: str | None = None, tail: str = "") -> Path:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    if stopped:
        (folder / "training.json").write_text(json.dumps({"cost": {"seconds": 99, "stopped": stopped}}))
    return folder


def test_the_first_of_two_consecutive_probes_that_meet_the_goal_is_reported() -> None:
    from bench_forget import read_outcome

    lines = [
        {"step": 10, "loss": 1.0},
        probe(0, 1, 4),
        probe(0.9, 1.0, 5),
        probe(0.02, 0.97, 10),
        probe(0, 1, 11, clean=0.7),
        probe(0, 1, 12, clean=0.79),
        probe(0.02, 0.98, 15),
        probe(0, 1, 20),
    ]
    found = read_outcome(make_run(Path("run"), lines, "forgotten"))
    assert (found.reached, found.seconds, found.images, found.leakage, found.retention) == (True, 15, 600, 0.02, 0.98)
    assert (found.clean, found.probes, found.last_seconds, found.stopped) == (1.0, 7, 20, "forgotten")


def test_a_killed_run_shows_its_best_probe() -> None:
    from bench_forget import read_outcome

    lines = [probe(0.9, 1.0, 5), probe(0.5, 0.9, 10), probe(0.6, 0.4, 15)]
    run = make_run(Path("run"), lines, tail='{"probe_leakage": 0.0, "probe_ret')
    found = read_outcome(run)
    assert (found.reached, found.seconds, found.leakage, found.last_seconds) == (False, 10, 0.5, 15)
    assert found.stopped == "cut off"
    assert {p.name for p in run.iterdir()} == {"metrics.jsonl"}


def test_a_run_without_a_probe() -> None:
    from bench_forget import read_outcome

    assert read_outcome(Path("nowhere")).probes == 0
    assert not read_outcome(make_run(Path("run"), [{"step": 1}], "max_train_steps")).reached


def test_the_forget_table_compares_only_settings_that_reached_the_goal() -> None:
    import bench
    from bench_forget import read_outcome

    runs = {
        "ours": make_run(Path("a"), [probe(0.01, 0.99, 20), probe(0, 1, 30)], "forgotten"),
        "slow": make_run(Path("b"), [probe(0.01, 0.99, 900), probe(0, 1, 999)], "forgotten"),
        "never": make_run(Path("c"), [probe(0.8, 0.99, 1700)]),
        "silent": Path("d"),
    }
    settings = {name: vars(read_outcome(run)) for name, run in runs.items()}
    table = bench.forget_table({"minutes": 30, "concept": "seven", "settings": settings}).splitlines()
    assert table[3].startswith("| slow | 900 s | 36000 | 1.0% | 99.0% | 100% | 45.0 |")
    assert table[4].startswith("| never | not in 1700 s (best probe shown) |")
    assert table[5].startswith("| silent | no probe in 30 min |")


def test_the_train_command_accepts_every_setting() -> None:
    from bench_forget import SETTINGS

    from sd_unlearn.config.checks import check_train
    from sd_unlearn.config.train import TrainConfig

    for setting in SETTINGS.values():
        check_train(TrainConfig(**setting))


def test_a_slow_training_is_ended_and_a_failed_one_raises() -> None:
    from bench_forget import train

    train([sys.executable, "-c", "open('began', 'w'); import time; time.sleep(600)"], 3.0)
    assert Path("began").exists()
    with pytest.raises(subprocess.CalledProcessError):
        train([sys.executable, "-c", "raise SystemExit(2)"], 60)


def test_the_step_table_with_known_values() -> None:
    import bench

    def run(seconds: list[float], memory: int, forward: float) -> dict[str, Any]:
        return {
            "seconds": seconds,
            "cpu_seconds": [2 * s for s in seconds],
            "peak_memory_mb": memory,
            "rows": 4,
            "forward_rows": forward,
            "device": "cpu",
            "threads": 2,
        }

    variants = {
        "floor": bench.summary([run([1.0, 1.2], 1000, 4), run([0.8, 0.9], 1000, 4)]),
        "teacher": bench.summary([run([2.0, 2.2], 1100, 10), run([1.8, 1.9], 1100, 10)]),
    }
    assert variants["floor"]["seconds"] == pytest.approx(0.975)
    table = bench.step_table({"base": "digits", "steps": 2, "rounds": 2, "variants": variants}).splitlines()
    assert table[2] == "| floor | 0.975 | 1.00 | 1.950 | 1.00 | 1000 | 1.00 | 4 | 4 |"
    assert table[3] == "| teacher | 1.975 | 2.03 | 3.950 | 2.03 | 1100 | 1.10 | 4 | 10 (6 more than images) |"


def test_a_variant_counts_its_steps_and_rows(tiny_base: Path) -> None:
    """On the tiny base; the seconds themselves are not checked."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "bench_step.py"), "noise", str(tiny_base), "3", "work"],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["seconds"]) == len(found["cpu_seconds"]) == 3
    assert found["rows"] == found["forward_rows"] == 5
    assert found["peak_memory_mb"] > 0


def test_the_efficiency_of_two_workers_is_shown_with_the_time_of_each_stage() -> None:
    from bench_batch import batch_table

    result = {"engine": "ray", "steps": 40, "seconds": {1: 190.0, 2: 100.0}, "efficiency": 0.95}
    table = batch_table(result | {"tasks": {"render": 5.0, "train": 10.04}})
    assert "| ray | 190 s | 100 s | 0.95 |" in table
    assert "render 5.0 s, train 10.0 s (40 steps)" in table
