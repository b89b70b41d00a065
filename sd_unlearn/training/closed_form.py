"""`train` with a closed-form objective (uce, speed, rece): an exact edit of cross-attention, written as a LoRA.

No images, no steps. The run folder is that of a training without its log, so every later command reads it as one.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sd_unlearn.choices import ObjectiveName
from sd_unlearn.config.checks import CLOSED_FORM_OPTIONS, unused_options
from sd_unlearn.config.paths import recorded
from sd_unlearn.config.train import TrainConfig
from sd_unlearn.data.concept import Concept
from sd_unlearn.errors import UnlearnError, UsageError, reason
from sd_unlearn.io.files import write_json
from sd_unlearn.io.lock import locked, remove_leftovers
from sd_unlearn.io.run_folder import TRAINING
from sd_unlearn.launch import process_rank
from sd_unlearn.models import lora
from sd_unlearn.models.base import Base, load_base
from sd_unlearn.models.student import Student
from sd_unlearn.objectives.closed_form import Edit, null_space, rece, speed, uce
from sd_unlearn.training.cross_attention import LAYERS, Embeddings, embed, read_weights
from sd_unlearn.training.preflight import Inputs, check_kind, check_output
from sd_unlearn.training.provenance import basic_record, device_name, open_run, peak_memory_mb, reset_peak_memory

SETTINGS = ("erase_weight", "null_space_threshold")  # options of the edits that the record names


def run(config: TrainConfig, inputs: Inputs, output: Path) -> Path:
    """Edit the base and write the run folder, once the options are checked. Only the first process does.

    Raises:
        UsageError: the base cannot be loaded with these options, or another process finished the run.
        UnlearnError: the base cannot be loaded, or the run folder cannot be written.
    """
    if process_rank() > 0:
        return output
    if config.dry_run:
        print(_plan(config, inputs, output))
        return output
    with locked(output, "--output_dir"):
        check_output(config, output)  # again: another process may have finished since
        remove_leftovers(output)
        base = load_base(inputs.source)
        check_kind(config, base.kind, base.name)
        try:
            _edit(config, inputs.concept, base, output)
        except OSError as error:
            raise UnlearnError(
                f"Cannot write to {output}: {reason(error)}. Free some disk space and repeat."
            ) from error
    return output


def _plan(config: TrainConfig, inputs: Inputs, output: Path) -> str:
    concept, layers = inputs.concept, " and ".join(LAYERS[config.objective])
    return (
        f"Plan: edit {layers} of {inputs.source.name} with --objective {config.objective}, "
        f"so that {_edited(concept)}, into {output}.\n"
        f"Preserved: {len(concept.keep_prompts)} keep prompts. No images are generated and no steps are trained. "
        "This takes about as much time and memory as loading the base in full precision."
    )


def _edit(config: TrainConfig, concept: Concept, base: Base, output: Path) -> None:
    """Compute the edit, and write the run folder: the record that marks it as finished last."""
    reset_peak_memory()
    started = time.monotonic()
    layers = read_weights(base, config.objective)
    embeddings = embed(base, concept)
    free: dict[str, int] = {}
    if config.objective == "speed":
        free = {"free_directions": free_directions(embeddings, config.null_space_threshold)}
    used = CLOSED_FORM_OPTIONS - unused_options(config.objective)
    settings: dict[str, Any] = {name: getattr(config, name) for name in SETTINGS if name in used}
    if config.objective == "rece":
        settings["rece_epochs"] = rece_epochs(config, concept)
    edits = _edits(config.objective, settings, list(layers.values()), embeddings)
    rank = max(min(*edit.up.shape, *edit.down.shape) for edit in edits)
    factors = dict(zip(layers, (edit.of_rank(rank) for edit in edits), strict=True))
    seconds = time.monotonic() - started

    student = Student(lora.attach_factors(base.network, {n: (e.down, e.up) for n, e in factors.items()}))
    filled_in = {"pretrained_model_name_or_path": base.name, "output_dir": output, "overwrite": False}
    given = recorded(dataclasses.replace(config, **filled_in))  # type: ignore[arg-type]
    open_run(output, concept, {key: value for key, value in given.items() if key in used})
    student.save(output)
    record = basic_record(config, concept, base) | {
        "objective": config.objective,
        "method": "lora",
        "rank": rank,
        "lora_alpha": float(rank),
        "edited_layers": len(layers),
        "edited_tokens": len(embeddings.concepts),
        "preserved_tokens": len(embeddings.preserved),
        **free,
        **settings,
        **storage_errors(edits, list(factors.values())),
    }
    device = device_name(base.device)
    cost = {"seconds": round(seconds, 1), "steps": 0, "peak_memory_mb": peak_memory_mb(), "device": device}
    write_json(output / TRAINING, record | {"cost": cost})
    print(
        f"Edited {len(layers)} layers of {base.name} in {seconds:.1f} s (rank {rank}), so that "
        f"{_edited(concept)}: {output}.",
        file=sys.stderr,
    )


def _edits(
    objective: ObjectiveName, settings: Mapping[str, Any], weights: Sequence[Tensor], embeddings: Embeddings
) -> list[Edit]:
    given = (weights, embeddings.concepts, embeddings.anchors, embeddings.preserved)
    if objective == "speed":
        return speed(*given, settings["null_space_threshold"])
    if objective == "uce":
        return uce(*given, settings["erase_weight"])
    return rece(*given, settings["erase_weight"], settings["rece_epochs"])


def rece_epochs(config: TrainConfig, concept: Concept) -> int:
    """--rece_epochs, else what the authors of RECE use for nudity, and for objects and styles."""
    return config.rece_epochs or (3 if any(part.kind == "nudity" for part in concept.parts) else 1)


def free_directions(embeddings: Embeddings, threshold: float) -> int:
    """The number of directions of the text embeddings in which SPEED may act: those that nothing preserved uses.

    Raises:
        UsageError: there are none, so the edit would change nothing.
    """
    preserved = embeddings.preserved
    free, width = round(float(null_space(preserved, threshold).trace())), preserved.shape[1]
    if free == 0:
        raise UsageError(
            f"--objective speed changes only directions that the keep prompts do not use, and their {len(preserved):,} "
            f"embeddings use all {width}. Use fewer keep prompts, a --null_space_threshold above {threshold:g}, or "
            "--objective uce or rece."
        )
    print(f"The keep prompts leave {free} of {width} directions for the edit.", file=sys.stderr)
    return free


def _edited(concept: Concept) -> str:
    edits = [f'"{part.caption}" is projected as "{part.generic}"' for part in concept.parts]
    return edits[0] if len(edits) == 1 else f"{edits[0]}, and so on for {len(edits)} concepts"


def storage_errors(edits: Sequence[Edit], stored: Sequence[Edit]) -> dict[str, float]:
    """For the record: the error of the factors of lower rank, and with their rounding in fp32 and fp16."""
    dtypes = {
        "truncation_error": torch.float64,
        "rounding_error_fp32": torch.float32,
        "rounding_error_fp16": torch.float16,
    }
    return {name: largest_error(edits, stored, dtype) for name, dtype in dtypes.items()}


def largest_error(edits: Sequence[Edit], stored: Sequence[Edit], dtype: torch.dtype) -> float:
    """The largest relative error (Frobenius norm) of a layer's change when its factors are stored in a dtype."""
    errors = []
    for edit, factors in zip(edits, stored, strict=True):
        exact = edit.up @ edit.down
        kept = factors.up.to(dtype).double() @ factors.down.to(dtype).double()
        errors.append(float((kept - exact).norm() / exact.norm().clamp_min(torch.finfo(torch.float64).tiny)))
    return max(errors)
