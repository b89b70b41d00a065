"""The paper's setting on Stable Diffusion (Takahashi et al. 2025, section 5), by way of `train` and `evaluate`.

sd-brad-pitt: Stable Diffusion 1.4, 64 images of "a photo of a middle aged man" with 16 of Brad Pitt hidden among them,
20 of Brad Pitt as positives; the whole UNet, 7,000 steps. digits-seven is the same on the bundled base, in minutes on a
CPU: a text-conditional model, the generic caption, sevens hidden among its digits.

What leaks is the concept under the generic caption. So all images are seen under that caption, in one bracket
(caption_mode shared), and the paper's non-sensitive rate is the share of pictures of the generic prompt that do not
show the concept. Not said by the paper, or ours:

- beta: the true share, which the rendered folder knows (0.2 for sd-brad-pitt), in place of the 0.1 that the paper has
  where the share is taken to be unknown.
- reduction sum, as for the DDPMs: with the mean the sensitive term outweighs all else and pictures fall apart
  (docs/paper.md). Over the 16,384 elements of a latent it has no gradient, so supervised is unsupervised.
- train_batch_size is that of a step, a quarter of it positives. Noise and timesteps are drawn for each image.
- lora: the same with a LoRA, and the learning rate that such a one needs; unmeasured on Stable Diffusion.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd_unlearn.config.base import as_dict
from sd_unlearn.config.checks import check_evaluate
from sd_unlearn.config.evaluate import EvaluateConfig
from sd_unlearn.config.train import Method, Risk, TrainConfig
from sd_unlearn.data.concept import read_concept
from sd_unlearn.data.dataset import fingerprint, scan
from sd_unlearn.errors import UsageError, suggest
from sd_unlearn.evaluation import evaluate
from sd_unlearn.io.files import read_json, read_yaml, write_json
from sd_unlearn.io.run_folder import CONCEPT, CONFIG, DATA_MANIFEST, TRAINING, weights_sha256
from sd_unlearn.launch import process_rank
from sd_unlearn.paper.experiments import DIGITS_SEVEN, SD_BRAD_PITT, Size
from sd_unlearn.paper.options import RunOptions
from sd_unlearn.results import Card, Results, Row, parse_results
from sd_unlearn.training import trainer

PAPER = "paper.json"  # beside the results.json of `evaluate`, whose form is another
DISTANCES = ("fid-inception", "kid-inception", "fid-digits", "kid-digits")
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class TextExperiment:
    """An experiment on a text-to-image model: the concept file names its base and its prompts."""

    concept: str
    size: Size
    options: Mapping[str, Any]  # of TrainConfig
    lora_learning_rate: float
    groups: tuple[str, ...]  # of prompts that are judged: generic, and what a distance is measured on


_SHARED: dict[str, Any] = {
    "target": "noise",
    "caption_mode": "shared",
    "reduction": "sum",
    "share_timesteps": False,
    "eta": 0.0,
    "num_keep": 0,
    "lr_scheduler": "cosine",
    "checkpointing_steps": 1000,
    "checkpoints_total_limit": 1,
}
EXPERIMENTS = {
    SD_BRAD_PITT: TextExperiment(
        "brad-pitt",
        "paper",
        _SHARED
        | {
            "num_unlabeled": 64,
            "num_mixed_in": 16,
            "num_positive": 20,
            "train_batch_size": 16,
            "max_train_steps": 7000,
            "learning_rate": 1e-5,
            "lr_warmup_steps": 500,
            "validation_steps": 1000,
        },
        1e-4,
        ("generic", "direct", "alike"),
    ),
    DIGITS_SEVEN: TextExperiment(
        "seven",
        "tiny",
        _SHARED
        | {
            "num_unlabeled": 256,
            "num_mixed_in": 64,
            "num_positive": 80,
            "train_batch_size": 32,
            "max_train_steps": 300,
            "learning_rate": 1e-4,
            "lr_warmup_steps": 30,
            "validation_steps": 0,
            "checkpointing_steps": 300,
        },
        7e-4,
        ("generic", "direct", "alike"),
    ),
}


def settings(
    objective: Risk,
    method: Method = "full",
    beta: float | None = None,
    seed: int = 42,
    output_dir: Path | None = None,
    base: str | None = None,
    *,
    experiment: str = SD_BRAD_PITT,
    **overrides: Any,
) -> TrainConfig:
    """The training of an experiment's variant, its images rendered into data/paper/<experiment>-<seed>.

    beta: in (0, 1); None: the true one. base: hub id, folder or file in place of the concept file's. overrides: any
    option of `train`.

    Raises:
        UsageError: no such experiment, or an option that `train` does not have.
    """
    found = _find(experiment)
    _check_known(overrides, TrainConfig, "train")
    options = {
        "concept": found.concept,
        "objective": objective,
        "method": method,
        "beta": beta,
        "seed": seed,
        "output_dir": output_dir or Path("runs/paper") / experiment / variant_of(objective, method, beta, seed),
        "data_dir": Path("data/paper") / f"{experiment}-{seed}",
        "pretrained_model_name_or_path": base,
        **found.options,
    }
    if method == "lora":
        options["learning_rate"] = found.lora_learning_rate
    return TrainConfig(**(options | overrides))


def run(
    objective: Risk,
    method: Method = "full",
    beta: float | None = None,
    seed: int = 42,
    output_dir: Path | None = None,
    base: str | None = None,
    *,
    experiment: str = SD_BRAD_PITT,
    evaluation: Mapping[str, Any] | None = None,
    **overrides: Any,
) -> Path:
    """Train and evaluate a variant, and write paper.json into its folder, which is returned.

    A run that was cut short goes on from its last checkpoint, and one that is finished is left as it is. evaluation:
    options of `evaluate`, e.g. num_images; the rest as `settings`. The last checkpoint stays in the folder; of a fully
    trained Stable Diffusion it takes 10 GB.

    Raises:
        UsageError: the folder holds another run; and as settings, `train` and `evaluate`.
    """
    config = settings(objective, method, beta, seed, output_dir, base, experiment=experiment, **overrides)
    assert config.output_dir is not None
    place = config.output_dir
    judging = _judging(experiment, place, config, evaluation or {})
    asked = _digest({"train": _lasting(config), "evaluate": dict(evaluation or {})})
    if (place / PAPER).is_file() and not config.overwrite:
        if read_json(place / PAPER).get("asked_sha256") != asked:
            raise UsageError(f"--output_dir {place} holds a finished run with other options. Name another folder.")
        print(f"{place} is finished already.", file=sys.stderr)
        return place
    trainer.run(dataclasses.replace(config, resume_from_checkpoint=None if config.overwrite else "latest"))
    started = time.monotonic()
    results = evaluate.run(judging)
    if process_rank() == 0:
        found = _record(experiment, place, parse_results(results), time.monotonic() - started)
        write_json(place / PAPER, found | {"asked_sha256": asked})
    return place


# Options of `paper run` that mean the same here, by whose they are; the others say something about DDPMs.
_OF_TRAIN = (
    "correction",
    "reduction",
    "train_batch_size",
    "max_train_steps",
    "learning_rate",
    "checkpointing_steps",
    "overwrite",
)
_OF_EVALUATE = ("num_images", "num_inference_steps")
_ELSEWHERE = (
    "objective",
    "beta",
    "seed",
    "method",
    "pretrained_model_name_or_path",
    "mixed_precision",
    "output_dir",
    "json",
    "config",
    "debug",
)


def run_options(experiment: str, options: RunOptions) -> Path:
    """`run` as `paper run` asks for it.

    Raises:
        UsageError: an option that is for DDPMs; as run.
    """
    for field in dataclasses.fields(options):
        known = field.name in (*_OF_TRAIN, *_OF_EVALUATE, *_ELSEWHERE)
        if not known and getattr(options, field.name) != field.default:
            raise UsageError(f"--{field.name} is for the DDPMs; {experiment} is a text-to-image model. Leave it out.")
    if options.objective == "pnu" or options.beta == "estimate":
        told = "--objective pnu" if options.objective == "pnu" else "--beta estimate"
        raise UsageError(f"{told} is for the DDPMs here; `sd-unlearn train` has it for any folder of images.")
    asked = {name: getattr(options, name) for name in _OF_TRAIN if getattr(options, name) is not None}
    if options.checkpointing_steps == RunOptions.checkpointing_steps:
        del asked["checkpointing_steps"]  # a whole UNet is 10 GB
    evaluation = {name: getattr(options, name) for name in _OF_EVALUATE if getattr(options, name) is not None}
    variant = variant_of(options.objective, options.method, options.beta, options.seed)
    return run(
        options.objective,
        options.method,
        options.beta if isinstance(options.beta, float) else None,
        options.seed,
        options.output_dir / experiment / variant,
        options.pretrained_model_name_or_path,
        experiment=experiment,
        evaluation=evaluation,
        mixed_precision=options.mixed_precision,
        **asked,
    )


def variant_of(objective: str, method: str, beta: object, seed: int) -> str:
    """The name of a run's folder."""
    told = f"beta{beta:g}" if isinstance(beta, float) else "beta-known"
    return "-".join([objective, *([] if objective == "unsupervised" else [told]), method, f"seed{seed}"])


def _find(experiment: str) -> TextExperiment:
    if experiment not in EXPERIMENTS:
        known = ", ".join(EXPERIMENTS)
        raise UsageError(f'Experiment "{experiment}" is unknown.{suggest(experiment, EXPERIMENTS)} Known: {known}.')
    return EXPERIMENTS[experiment]


def _check_known(options: Mapping[str, Any], kind: type, command: str) -> None:
    known = {field.name for field in dataclasses.fields(kind)}
    for name in options:
        if name not in known:
            raise UsageError(f'Option "{name}" is unknown to {command}.{suggest(name, known)}')


def _judging(experiment: str, place: Path, config: TrainConfig, options: Mapping[str, Any]) -> EvaluateConfig:
    """How a run will be evaluated, checked before it is trained."""
    _check_known(options, EvaluateConfig, "evaluate")
    usual: dict[str, Any] = {
        "run": place,
        "groups": list(_find(experiment).groups),
        "allow_pickle": config.allow_pickle,
    }
    judging = EvaluateConfig(**(usual | dict(options)))
    if "generic" not in judging.groups:
        raise UsageError(f"--groups {' '.join(judging.groups)} lacks generic, the prompt that the paper's rate is of.")
    check_evaluate(judging)
    return judging


def _lasting(config: TrainConfig) -> dict[str, Any]:
    """The options without where the run lies and how it is begun."""
    passing = ("output_dir", "overwrite", "resume_from_checkpoint", "force_resume", "config", "debug")
    return {key: value for key, value in as_dict(config).items() if key not in passing}


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def _record(experiment: str, place: Path, results: Results, judging_seconds: float) -> dict[str, Any]:
    """What paper.json says: the record of a run of the paper's experiments, as the DDPMs' results.json."""
    training, options = read_json(place / TRAINING), read_yaml(place / CONFIG, "--output_dir")
    rate, *distances = _rows([row for row in results.rows if row.subject == results.subjects[-1].id])
    data_dir = Path(options["data_dir"])
    manifest = read_json(data_dir / DATA_MANIFEST) if (data_dir / DATA_MANIFEST).is_file() else {}
    counts = manifest.get("counts", {})
    unsupervised = options["objective"] == "unsupervised"
    kept = (
        "objective",
        "correction",
        "eta",
        "reduction",
        "train_batch_size",
        "max_train_steps",
        "learning_rate",
        "lr_warmup_steps",
        "ema_decay",
        "method",
        "rank",
        "caption_mode",
        "target",
    )
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "paper",
        "experiment": experiment,
        "size": _find(experiment).size,
        "seed": options["seed"],
        "settings": {
            **{name: options[name] for name in kept},
            "beta": None if unsupervised else training["beta"],
            "beta_source": None if unsupervised else training["beta_source"],
            "conditional": True,
            "missing": [],
            "contamination": manifest.get("beta"),
            "num_negative": 0,
            "sampler": "ddim",
            "num_inference_steps": results.sampler["steps"],
            "guidance_scale": results.sampler["guidance_scale"],
            "num_images": rate.n,
            "base": training["base"],
        },
        "counts": {
            "normal": counts.get("generic"),
            "mixed_in": counts.get("mixed_in", 0),
            "positive": counts.get("positive"),
            "negative": 0,
        },
        "classifier": _classifier(results.cards, rate.detector),
        "rows": [dataclasses.asdict(row) for row in (rate, *distances)],
        "cost": training["cost"] | {"sampling_seconds": round(judging_seconds, 1)},
        "data_sha256": fingerprint(scan(data_dir, read_concept(place / CONCEPT), 0.0)),
        "weights_sha256": weights_sha256(place),
        **{name: training[name] for name in ("version", "versions", "commit")},
        "created": results.created,
    }


def _rows(evaluated: Sequence[Row]) -> list[Row]:
    """The non-sensitive rate first, then the distances on retained prompts, each with its prompt group in the note.

    The rate is one minus the leakage on the generic prompt by the first detector; its interval is mirrored. Rows of
    this kind of record have no prompt groups, so all are of the group "all".

    Args:
        evaluated: The rows of the trained model.

    Raises:
        UsageError: no detector measured leakage.
    """
    leak = next((row for row in evaluated if (row.metric, row.group) == ("leakage", "generic")), None)
    if leak is None:
        raise UsageError("No detector measured leakage on the generic prompt. Add one that does to --metrics.")
    common: dict[str, Any] = {"group": "all", "subject": "", "seeds": None}
    value, low, high = (None if end is None else 1 - end for end in (leak.value, leak.high, leak.low))
    rate = dataclasses.replace(leak, metric="non_sensitive_rate", value=value, low=low, high=high, **common)
    distances: dict[str, Row] = {}
    for row in evaluated:
        if row.metric in DISTANCES and row.value is not None:
            note = f"of the {row.group} prompts: {row.note}"
            distances.setdefault(row.metric, dataclasses.replace(row, note=note, **common))
    return [rate, *distances.values()]


def _classifier(cards: Sequence[Card], detector: str) -> dict[str, Any]:
    """Who judged the rate. Its accuracy was not measured here."""
    card = next((card for card in cards if card.detector == detector), Card(detector))
    _, _, digest = card.weights.partition("sha256:")
    return {"name": detector, "sha256": digest or None, "accuracy": None, "n": None}
