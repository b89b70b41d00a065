"""A quick training on the tiny base."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from conftest import CONCEPT_FILE

from sd_unlearn import cli
from sd_unlearn.config.base import RenderConfig
from sd_unlearn.config.train import TrainConfig
from sd_unlearn.data import render
from sd_unlearn.io.reading import read_jsonl
from sd_unlearn.io.run_folder import METRICS
from sd_unlearn.objectives.registry import RISKS
from sd_unlearn.training.metrics_log import COST

ADAPTER = "adapter/adapter_model.safetensors"
Config = Callable[..., TrainConfig]
# enough images of each kind for a probe to hold some out
FILE = CONCEPT_FILE.replace(
    "{positive: 4, unlabeled: 4, mixed_in: 1, keep: 4}", "{positive: 6, unlabeled: 6, mixed_in: 2, keep: 4}"
)


def rendered(folder: Path, tiny_base: Path, concept: str = FILE) -> Path:
    """A folder with a concept file and its rendered images."""
    (folder / "brad.yaml").write_text(concept)
    render.run(
        RenderConfig(
            concept=str(folder / "brad.yaml"),
            pretrained_model_name_or_path=str(tiny_base),
            data_dir=folder / "data",
            num_inference_steps=2,
        )
    )
    return folder


def settings(place: Path, tiny_base: Path) -> dict[str, object]:
    """The options of a run with all kinds of state: dropout, a moving average, two micro-batches."""
    return {
        "concept": str(place / "brad.yaml"),
        "pretrained_model_name_or_path": str(tiny_base),
        "data_dir": str(place / "data"),
        "num_inference_steps": 2,
        "rank": 2,
        "lora_targets": "attention",
        "lora_dropout": 0.2,
        "ema_decay": 0.8,
        "max_train_steps": 24,
        "lr_warmup_steps": 2,
        "effective_batch_size": 16,
        "train_batch_size": 8,
        "learning_rate": 1e-2,
        "validation_steps": 0,
        "checkpointing_steps": 1,
        "report_to": "none",
    }


def few_layers(changes: Mapping[str, object]) -> dict[str, object]:
    """A quarter of the default's layers, so that tests are quicker, unless `changes` do not allow the choice."""
    choice = "method" not in changes and changes.get("objective", "pu") in RISKS
    targets = {"lora_targets": "attention" if choice else None}
    return targets | ({"rank": TrainConfig.rank} if changes.get("method") == "full" else {})


def make(place: Path, tiny_base: Path, output: Path | str, **changes: object) -> TrainConfig:
    places = {"output_dir": Path(output), "data_dir": place / "data"}
    options = settings(place, tiny_base) | places | few_layers(changes) | changes
    return TrainConfig(**options)  # type: ignore[arg-type]


def logged(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what differs between equal runs: speed, memory, seconds."""
    lines = read_jsonl(run / METRICS)
    return [{k: v for k, v in line.items() if k not in (*COST, "seconds")} for line in lines]


def flags(options: dict[str, object]) -> list[str]:
    """The options as a command line."""
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def train_twice(options: list[str]) -> int:
    """Two trainings in one program, in the folders first and second; returns the exit code."""
    return max(cli.main(["train", *options, "--output_dir", name]) for name in ("first", "second"))
