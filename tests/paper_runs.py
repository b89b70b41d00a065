"""Records of runs of the paper's experiments, with chosen metrics and without any training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from sd_unlearn.io.files import write_json
from sd_unlearn.io.schema import validate
from sd_unlearn.paper.experiments import DIGITS, EXPERIMENTS
from sd_unlearn.paper.settings import WITH_BRACKET
from sd_unlearn.paper.tables.records import FinishedRun, RunRecord

Z = 1.959964


def wilson(value: float, n: int) -> tuple[float, float]:
    middle, wide = value + Z * Z / (2 * n), Z * math.sqrt(value * (1 - value) / n + Z * Z / (4 * n * n))
    return max(0.0, (middle - wide) / (1 + Z * Z / n)), min(1.0, (middle + wide) / (1 + Z * Z / n))


def make_row(metric: str, value: float | None, n: int = 1000, group: str = "all") -> dict[str, Any]:
    is_share = metric in ("non_sensitive_rate", "share") and value is not None
    low, high = wilson(value, n) if is_share and value is not None else (None, None)
    return {
        "metric": metric,
        "group": group,
        "subject": "run",
        "value": value,
        "n": n,
        "low": low,
        "high": high,
        "detector": "resnet-mnist5k",
        "interval": "wilson" if is_share else "none",
    }


def make_record(
    objective: str = "pu",
    rate: float | None = 0.98,
    fid: float | None = 12.0,
    *,
    experiment: str = "mnist5k-even",
    size: str = "tiny",
    seed: int = 42,
    fid_name: str = "fid-digits",
    shares: dict[str, float] | None = None,
    seconds: float = 180.0,
    **settings: Any,
) -> dict[str, Any]:
    """The content of a results.json; settings: those that differ from the main table's."""
    beta = None if objective == "unsupervised" else 0.1
    known = EXPERIMENTS.get(experiment)
    bound = known.recipe_of(size).max_ratio if known and objective in WITH_BRACKET else None  # type: ignore[arg-type]
    rows = [make_row("non_sensitive_rate", rate)] + ([make_row(fid_name, fid)] if fid is not None else [])
    rows += [make_row("share", (shares or {}).get(digit, 0.1), group=digit) for digit in DIGITS if shares]
    return {
        "schema_version": 1,
        "kind": "paper",
        "experiment": experiment,
        "size": size,
        "seed": seed,
        "settings": {
            "objective": objective,
            "correction": "abs",
            "beta": beta,
            "beta_source": "fixed",
            "eta": 0.0,
            "conditional": False,
            "missing": [],
            "contamination": known.counts.contamination if known else None,
            "num_negative": 0,
            "reduction": "mean",
            "train_batch_size": 64,
            "max_train_steps": 1050,
            "learning_rate": 0.002,
            "ema_decay": 0.995,
            "sampler": "ddim",
            "num_inference_steps": 50,
            "num_images": 1000,
            "max_ratio": bound,
        }
        | settings,
        "counts": {"normal": 2000, "mixed_in": 200, "positive": 200, "negative": 0},
        "classifier": {"name": "resnet-mnist5k", "sha256": "ab" * 32, "accuracy": 0.987, "n": 500},
        "rows": rows,
        "cost": {"seconds": seconds, "steps": 1050, "device": "cpu"},
        "data_sha256": "cd" * 32,
        "weights_sha256": "ef" * 32,
        "version": "0.2.0",
        "commit": "abc",
        "created": "2026-11-22T10:00:00+00:00",
    }


def make_results(runs: Path, *args: Any, variant: str = "", **changes: Any) -> Path:
    """Write a run's results.json (see make_record) into its folder under `runs`. Returns its path."""
    record = make_record(*args, **changes)
    words = [record["settings"]["objective"], *(f"{k}-{v}" for k, v in changes.items() if k not in ("shares",))]
    name = variant or "-".join(map(str, words)).replace("[", "").replace("]", "").replace("'", "")
    file = runs / record["experiment"] / name / "results.json"
    write_json(file, record)
    return file


def make_many(runs: Path) -> None:
    """The runs of main tables of three experiments and of each kind of variant."""
    for experiment, name, rate, fid in (
        ("mnist5k-even", "fid-digits", 0.905, 11.8),
        ("mnist5k-odd", "fid-digits", 0.913, 12.9),
        ("cifar10-vehicles-ft", "fid-inception", 0.921, 24.1),
    ):
        size = "paper" if experiment.endswith("ft") else "tiny"
        for seed in (1, 2, 3):
            off = 0.004 * (seed - 2)
            where: dict[str, Any] = {"experiment": experiment, "size": size, "seed": seed, "fid_name": name}
            make_results(runs, "unsupervised", rate + off, fid + 10 * off, **where, reduction=None)
            make_results(runs, "supervised", 0.95 + off, fid * 1.3 + 10 * off, **where)
            make_results(runs, "pu", 0.984 + off, fid * 1.03 + 10 * off, **where)
            for beta in (0.01, 0.05, 0.2, 0.3, 0.5):
                if experiment == "mnist5k-even":
                    rate_at = 0.985 - 0.5 * (beta - 0.12) ** 2 if beta > 0.05 else 0.93 + beta
                    make_results(runs, "pu", rate_at + off, fid * (1 + beta**2 * 4) + 10 * off, **where, beta=beta)
    make_results(runs, "pu", 0.983, 12.2, beta=0.093, beta_source="estimated")
    make_results(runs, "pu", 0.975, 12.6, correction="nn")
    make_results(runs, "pu", 0.955, 15.6, correction="none")
    for missing, share in (([], 0.004), (["9"], 0.021)):
        make_results(runs, "pu", 0.97, 12.1, seed=7, missing=missing, shares={"9": share})
    make_results(runs, "pu", 0.99, 12.0, num_negative=200, eta=0.5)
    for objective, rate in (("unsupervised", 0.91), ("supervised", 0.95), ("pu", 0.98)):
        make_results(runs, objective, rate, 10.0, conditional=True)
    for contamination in (0.0476, 0.1667):
        for objective, extra in (("unsupervised", {}), ("pu", {}), ("pu", {"beta": 0.15, "beta_source": "estimated"})):
            make_results(
                runs,
                objective,
                1 - contamination / (1 + 4 * (objective == "pu")),
                12.0,
                contamination=contamination,
                max_train_steps=1100,
                **extra,
            )
    make_results(runs, "pu", 0.9, 14.0, correction="nn", beta=0.2)


def make_run(*args: Any, path: str = "a", **changes: Any) -> FinishedRun:
    raw = make_record(*args, **changes)
    return FinishedRun(Path(path), raw, validate(RunRecord, raw, path))
