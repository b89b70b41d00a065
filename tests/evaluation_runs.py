"""Run folders of the tiny base without training: a LoRA of random weights and its record."""

from __future__ import annotations

from pathlib import Path

import torch

from sd_unlearn.config.objective import Weights
from sd_unlearn.data.find_concept import read_concept
from sd_unlearn.data.several import write_concepts
from sd_unlearn.io.files import write_json
from sd_unlearn.models.base import load_base
from sd_unlearn.models.student import make_student

DIGIT_FILE = """\
name: {name}
kind: digit
caption: a photo of the digit {name}
generic: a photo of a digit
evaluate:
  direct: ["a photo of the digit {name}"]
  held_out: ["{name}", "ein {name}"]
  alike: ["a photo of the digit {{one,two}}"]
  general: ["a digit in {{red,blue}} ink"]
"""


def make_run(
    folder: Path, base_folder: Path, name: str = "seven", seed: int = 0, use_dora: bool = False, **training: object
) -> Path:
    """A run folder as `train` leaves it: concept.yaml, adapter/, training.json."""
    base = load_base(str(base_folder), device="cpu")
    record = {
        "name": str(base_folder),
        "sha256": base.sha256,
        "kind": "sd1",
        "prediction_type": base.prediction_type,
        "resolution": base.resolution,
    }
    student = make_student(base, Weights(rank=2, use_dora=use_dora), seed, needs_teacher=False)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in student.trainable():
            parameter.add_(torch.randn_like(parameter) * 0.5)
    student.save(folder)
    (folder / "source.yaml").write_text(DIGIT_FILE.format(name=name))
    write_concepts(folder / "concept.yaml", read_concept(folder / "source.yaml"))
    (folder / "source.yaml").unlink()
    cost = {"seconds": 1.0, "steps": 3, "images_seen": 12, "peak_memory_mb": 1.0, "device": "cpu"}
    write_json(folder / "training.json", {"base": record, "cost": cost, "beta": 0.1, "rank": 2, **training})
    return folder
