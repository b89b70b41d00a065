"""Job lists of quick tasks on the tiny base, and an engine that runs them in the process of the test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from conftest import CONCEPT_FILE

from sd_unlearn.batch.engines.engine import Ended
from sd_unlearn.batch.execute import execute
from sd_unlearn.batch.job_list import read_job_list
from sd_unlearn.batch.plan import Plan, make_plan
from sd_unlearn.choices import CLOSED_FORM
from sd_unlearn.config.batch import BatchConfig

# What a concept file of evaluation_runs.DIGIT_FILE lacks to be trained on.
IMAGES = "images: {positive: 4, unlabeled: 6, mixed_in: 2, keep: 1}\nkeep: ['a photo']\n"
QUICK = {
    **{"num_inference_steps": 2, "rank": 2, "max_train_steps": 2, "lr_warmup_steps": 1, "effective_batch_size": 8},
    **{"validation_steps": 0, "gradient_share_steps": 0, "report_to": "none"},
}


def write_list(path: Path, tiny_base: Path, **content: Any) -> Path:
    """A job list on the tiny base, of one concept unless `content` says otherwise."""
    options = content.pop("options", {})
    quick = {} if options.get("objective") in CLOSED_FORM else QUICK  # no steps, no images
    options = {"pretrained_model_name_or_path": str(tiny_base), **quick, **options}
    defaults = {"concepts": [write_concept_file(path.parent, "Brad Pitt")], "stages": ["train"]}
    path.write_text(yaml.safe_dump({**defaults, **content, "options": options}))
    return path


def write_concept_file(folder: Path, name: str) -> str:
    file = folder / f"{name.lower().replace(' ', '-')}.yaml"
    file.write_text(CONCEPT_FILE.replace("Brad Pitt", name))
    return str(file)


def plan_of(path: Path, **options: Any) -> Plan:
    return make_plan(read_job_list(BatchConfig(path, **options)))


class InThisProcess:
    """Runs each task when it is started: the same code as the engines, without their processes."""

    def __init__(self, workers: int = 1) -> None:
        self.workers = workers
        self.started: list[str] = []
        self.ended: list[Ended] = []

    def start(self, folders: list[Path]) -> None:
        for folder in folders:
            self.started.append(folder.name)
            execute(folder, threads=1)
            self.ended.append(Ended(folder))

    def wait(self, seconds: float) -> list[Ended]:
        ended, self.ended = self.ended, []
        return ended

    def stop(self) -> None: ...

    def close(self) -> None: ...
