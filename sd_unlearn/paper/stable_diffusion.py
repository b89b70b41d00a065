"""The Stable Diffusion experiment of the paper (Takahashi et al. 2025, section 5), run through `train` and `evaluate`.

sd-brad-pitt: Stable Diffusion 1.4, 64 images of "a photo of a middle aged man", 16 images of Brad Pitt mixed in, and 20
of Brad Pitt as positives; the whole UNet, 7,000 steps. digits-seven is the same on the bundled base and takes minutes
on a CPU.

The leakage is measured on the generic caption. Therefore all images are trained under that caption, in one bracket
(caption_mode shared), and the paper's non-sensitive rate is the share of images of the generic prompt that do not show
the concept. Choices that the paper leaves open, or that differ from it:

- beta: the true share, which is known for rendered images (0.2 for sd-brad-pitt). The paper uses 0.1 if unknown.
- reduction: sum, as for the DDPMs. With the mean, the sensitive term dominates and images degrade (docs/paper.md). Over
  the 16,384 elements of a latent that term has no gradient, so supervised equals unsupervised.
- effective_batch_size: images of a step, a quarter of them positives. Noise and timesteps are sampled for each image.
- method lora: has its own learning rate, which was not tuned on Stable Diffusion.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd_unlearn.choices import Risk
from sd_unlearn.config.batching import CUT
from sd_unlearn.config.checks import check_evaluate
from sd_unlearn.config.evaluate import EvaluateConfig
from sd_unlearn.config.objective import Method
from sd_unlearn.config.paths import as_dict
from sd_unlearn.config.train import TrainConfig
from sd_unlearn.errors import UsageError, suggest
from sd_unlearn.evaluation import evaluate
from sd_unlearn.io.files import write_json
from sd_unlearn.io.paths import public_name, slugify
from sd_unlearn.io.reading import read_json
from sd_unlearn.launch import process_rank
from sd_unlearn.paper.experiments import DIGITS_SEVEN, SD_BRAD_PITT, Size
from sd_unlearn.paper.options import RunOptions
from sd_unlearn.paper.printing import kept_after_interruption
from sd_unlearn.paper.stable_diffusion_record import record_of
from sd_unlearn.results import parse_results
from sd_unlearn.training import trainer

PAPER = "paper.json"  # next to the results.json of `evaluate`
GROUPS = ("generic", "direct", "alike")  # evaluated groups of prompts


@dataclass(frozen=True)
class TextExperiment:
    """An experiment on a text-to-image model; the concept file defines its base and prompts."""

    concept: str
    size: Size
    lora_learning_rate: float
    options: Mapping[str, Any]  # of TrainConfig


_SHARED: dict[str, Any] = {
    "target": "noise",
    "caption_mode": "shared",
    "reduction": "sum",
    "share_timesteps": False,
    "eta": 0.0,
    "num_keep": 0,
    "lr_scheduler": "cosine",
    "checkpoints_total_limit": 1,
}
_BRAD_PITT: dict[str, Any] = {
    "num_unlabeled": 64,
    "num_mixed_in": 16,
    "num_positive": 20,
    "effective_batch_size": 16,
    "max_train_steps": 7000,
    "learning_rate": 1e-5,
    "lr_warmup_steps": 500,
    "validation_steps": 1000,
    "checkpointing_steps": 1000,
}
_SEVEN: dict[str, Any] = {
    "num_unlabeled": 256,
    "num_mixed_in": 64,
    "num_positive": 80,
    "effective_batch_size": 32,
    "max_train_steps": 300,
    "learning_rate": 1e-4,
    "lr_warmup_steps": 30,
    "validation_steps": 0,
    "checkpointing_steps": 300,
}
EXPERIMENTS = {
    SD_BRAD_PITT: TextExperiment("brad-pitt", "paper", 1e-4, _SHARED | _BRAD_PITT),
    DIGITS_SEVEN: TextExperiment("seven", "tiny", 7e-4, _SHARED | _SEVEN),
}


def train_config(
    experiment: str, objective: Risk, method: Method = "full", beta: float | None = None, seed: int = 42, **options: Any
) -> TrainConfig:
    """The training options of an experiment.

    Its images are rendered into data/paper/<experiment>-<seed>, those of another base into <experiment>-<seed>-<base>.

    Args:
        beta: In (0, 1); None: the true share.
        options: Other options of `train`, which replace those of the experiment.

    Raises:
        UsageError: an unknown experiment or option.
    """
    definition = _find(experiment)
    _check_known(options, TrainConfig, "train")
    base = options.get("pretrained_model_name_or_path")
    images = f"{experiment}-{seed}" + (f"-{slugify(public_name(base))}" if base else "")
    defaults = {
        "concept": definition.concept,
        "objective": objective,
        "method": method,
        "beta": beta,
        "seed": seed,
        "output_dir": Path("runs/paper") / experiment / variant_of(objective, method, beta, seed),
        "data_dir": Path("data/paper") / images,
        **definition.options,
    }
    if method == "lora":
        defaults["learning_rate"] = definition.lora_learning_rate
    return TrainConfig(**(defaults | options))


def run(experiment: str, config: TrainConfig, evaluation: Mapping[str, Any] | None = None) -> Path:
    """Train and evaluate, and write paper.json into the run folder, which is returned.

    An interrupted run resumes from its last checkpoint, and a finished one is not repeated. The last checkpoint is
    kept; that of a fully trained Stable Diffusion takes 10 GB.

    Args:
        config: As `train_config` returns it.
        evaluation: Options of `evaluate`, e.g. num_images.

    Raises:
        UsageError: the folder holds another run; and as `train` and `evaluate`.
    """
    assert config.output_dir is not None
    folder, options = config.output_dir, dict(evaluation or {})
    evaluate_config = _evaluate_config(folder, config, options)
    digest = _digest({"train": _identity(config), "evaluate": options})
    if (folder / PAPER).is_file() and not config.overwrite:
        if read_json(folder / PAPER).get("asked_sha256") != digest:
            raise UsageError(f"--output_dir {folder} holds a finished run with other options. Choose another folder.")
        print(f"{folder} is finished.", file=sys.stderr)
        return folder
    trainer.run(dataclasses.replace(config, resume_from_checkpoint=None if config.overwrite else "latest"))
    started = time.monotonic()
    with kept_after_interruption(folder):
        results = evaluate.run(evaluate_config)
    if process_rank() == 0:
        seconds = time.monotonic() - started
        record = record_of(experiment, _find(experiment).size, folder, parse_results(results), seconds)
        write_json(folder / PAPER, record | {"asked_sha256": digest})
    return folder


# Options of `paper run` that `train` and `evaluate` have too; the rest apply to DDPMs only.
_TRAIN_OPTIONS = (
    *("correction", "reduction", "max_train_steps", "learning_rate", "checkpointing_steps"),
    *("overwrite", "pretrained_model_name_or_path", "mixed_precision"),
)
_EVALUATE_OPTIONS = ("num_images", "num_inference_steps")
_HANDLED = ("train_batch_size", "objective", "beta", "seed", "method", "output_dir", "json", "config", "debug")


def run_with_options(experiment: str, options: RunOptions) -> Path:
    """`run` with the options of `paper run`.

    Raises:
        UsageError: an option that applies to DDPMs only; and as run.
    """
    for field in dataclasses.fields(options):
        applies = field.name in (*_TRAIN_OPTIONS, *_EVALUATE_OPTIONS, *_HANDLED)
        if not applies and getattr(options, field.name) != field.default:
            raise UsageError(f"--{field.name} is for the DDPMs; {experiment} is a text-to-image model. Remove it.")
    if options.objective == "pnu" or options.beta == "estimate":
        option = "--objective pnu" if options.objective == "pnu" else "--beta estimate"
        raise UsageError(f"{option} of paper run is for the DDPMs. For text-to-image models use `sd-unlearn train`.")
    given = {name: value for name in _TRAIN_OPTIONS if (value := getattr(options, name)) is not None}
    if options.train_batch_size is not None:
        given["effective_batch_size"] = options.train_batch_size
    if options.checkpointing_steps == RunOptions.checkpointing_steps:
        del given["checkpointing_steps"]  # a checkpoint of a whole UNet is 10 GB
    beta = options.beta if isinstance(options.beta, float) else None
    variant = variant_of(options.objective, options.method, options.beta, options.seed)
    given["output_dir"] = options.output_dir / experiment / variant
    config = train_config(experiment, options.objective, options.method, beta, options.seed, **given)
    evaluation = {name: value for name in _EVALUATE_OPTIONS if (value := getattr(options, name)) is not None}
    return run(experiment, config, evaluation)


def variant_of(objective: str, method: str, beta: object, seed: int) -> str:
    """Name of a run folder."""
    share = f"beta{beta:g}" if isinstance(beta, float) else "beta-known"
    return "-".join([objective, *([] if objective == "unsupervised" else [share]), method, f"seed{seed}"])


def _find(experiment: str) -> TextExperiment:
    if experiment not in EXPERIMENTS:
        known = ", ".join(EXPERIMENTS)
        raise UsageError(f'Experiment "{experiment}" is unknown.{suggest(experiment, EXPERIMENTS)} Known: {known}.')
    return EXPERIMENTS[experiment]


def _check_known(options: Mapping[str, Any], kind: type, command: str) -> None:
    known = {field.name for field in dataclasses.fields(kind)}
    for name in options:
        if name not in known:
            raise UsageError(f'{command} has no option "{name}".{suggest(name, known)}')


def _evaluate_config(folder: Path, config: TrainConfig, options: dict[str, Any]) -> EvaluateConfig:
    """The options of the evaluation, checked before training starts."""
    _check_known(options, EvaluateConfig, "evaluate")
    defaults: dict[str, Any] = {"run": folder, "groups": list(GROUPS), "allow_pickle": config.allow_pickle}
    evaluation = EvaluateConfig(**(defaults | options))
    if "generic" not in evaluation.groups:
        raise UsageError(f"--groups {' '.join(evaluation.groups)} must include generic: the rate is measured on it.")
    check_evaluate(evaluation)
    return evaluation


def _identity(config: TrainConfig) -> dict[str, Any]:
    """The options that affect the result."""
    ignored = ("output_dir", "overwrite", "resume_from_checkpoint", "force_resume", "config", "debug", *CUT)
    return {key: value for key, value in as_dict(config).items() if key not in ignored}


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()
