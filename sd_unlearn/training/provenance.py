"""The record of a training: options, base, data, versions and commit, for later stages and for auditors."""

from __future__ import annotations

import dataclasses
import math
import resource
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from sd_unlearn import __version__
from sd_unlearn.config.batching import CUT
from sd_unlearn.config.checks import unused_options
from sd_unlearn.config.paths import as_dict, local_path
from sd_unlearn.config.train import TrainConfig
from sd_unlearn.data.concept import Concept, concept_sha256
from sd_unlearn.data.prior import Prior
from sd_unlearn.data.several import read_concepts, write_concepts
from sd_unlearn.errors import UsageError
from sd_unlearn.io.files import timestamp, write_text
from sd_unlearn.io.own_files import RUN, delete_own, mark
from sd_unlearn.io.reading import json_sha256, read_yaml
from sd_unlearn.io.run_folder import BEST_DIR, CONCEPT, CONFIG, TRAINING
from sd_unlearn.models.base import Base
from sd_unlearn.seeds import TRAIN_SEEDS

if TYPE_CHECKING:
    import torch

PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate")
# Options copied into training.json.
RECORDED = (
    *("objective", "rank", "lora_alpha", "beta", "correction", "caption_mode", "target", "push", "method"),
    *(
        "unconditional",
        "timestep_bias",
        "snr_gamma",
        "zero_terminal_snr",
        "reduction",
        "eta",
        "seed",
    ),
    *("timestep_sampling", "lora_targets", "erase_guidance", "forget_weight", "retain", "quantize_base"),
)
# Options that do not change the trained weights, or are compared by content (concept, base, data).
NOT_COMPARED = {
    *(
        "concept",
        "anchor",
        "kind",
        "pretrained_model_name_or_path",
        "vae",
        "prediction_type",
        "variant",
        "single_file_config",
        "drop_t5",  # changes the hash of the text encoders
    ),
    *(
        "allow_pickle",
        "offload",
        "data_dir",
        "positives",
        "output_dir",
        "config",
        "debug",
        "overwrite",
        "beta_sweep",
        "report_to",
    ),
    *("dry_run", "vram"),
    *("num_unlabeled", "num_positive", "num_mixed_in", "num_keep", "num_inference_steps", "render_batch_size"),
    *("validation_steps", "gradient_share_steps", "checkpointing_steps"),
    *("checkpoints_total_limit", "resume_from_checkpoint", "force_resume", "torch_compile"),
    *CUT,
}


def training_record(
    config: TrainConfig, concept: Concept, base: Base, prior: Prior, betas: dict[str, float], cost: dict[str, Any]
) -> dict[str, Any]:
    """The content of training.json. betas: of each set of positives; cost: steps, time, memory and device."""
    settings = as_dict(config)
    return basic_record(config, concept, base) | {
        **{k: settings[k] for k in RECORDED if k not in unused_options(config.objective)},
        "beta_source": prior.source,
        "beta_estimates": [dataclasses.asdict(e) for e in prior.estimates],
        "cost": cost,
        "seeds": {"train": list(TRAIN_SEEDS)},
        "betas": betas,
    }


def basic_record(config: Any, concept: Concept, base: Base) -> dict[str, Any]:
    """The part of training.json that every objective has."""
    return {
        "schema_version": 1,
        "concept": concept.slug,
        **({"concepts": [part.slug for part in concept.parts]} if len(concept.parts) > 1 else {}),
        "base": base.describe(),
        "config_sha256": json_sha256(as_dict(config)),
        "created": timestamp(),
        "version": __version__,
        "versions": {p: version(p) for p in PACKAGES},
        "commit": commit(),
    }


def open_run(output: Path, concept: Concept, settings: dict[str, Any], best: bool = False, keep: bool = False) -> None:
    """Create a run folder. The files of an earlier run are deleted only here, when everything has been checked.

    settings: for config.yaml. best: also create the folder of the best weights. keep: the earlier run is resumed.
    """
    mark(output, "run")  # first: check_output recognizes a run by it
    if not keep:
        delete_own(output, RUN)
    (output / TRAINING).unlink(missing_ok=True)
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    for folder in (output, output / BEST_DIR) if best else (output,):
        write_concepts(folder / CONCEPT, concept)
        write_text(folder / CONFIG, text)


def identity_of(config: TrainConfig, concept: Concept, base: Base, data_sha256: str, processes: int) -> dict[str, Any]:
    """What a resumed run must have in common with its checkpoint, by name."""
    options = {f"--{key}": value for key, value in as_dict(config).items() if key not in NOT_COMPARED}
    if config.lora_dropout:  # its random numbers depend on the cut
        options |= {f"--{key}": getattr(config, key) for key in ("train_batch_size", "gradient_accumulation_steps")}
    return options | {
        "--concept (content)": concept_sha256(concept),
        "base": base.sha256,
        "--vae (content)": base.vae_sha256,
        "text encoder": base.text_encoder_sha256,
        "--prediction_type": base.prediction_type,
        "data": data_sha256,
        "processes": processes,
    }


def check_same_run(output: Path, config: TrainConfig, concept: Concept, base: str) -> None:
    """Refuse to take a finished run without checkpoints for one of another concept or base, or with other options.

    Options that are neither given nor have a default are not compared, nor those that are resolved later.

    Raises:
        UsageError: names what differs, with both values.
    """
    before = read_yaml(output / CONFIG, "--output_dir")
    now = as_dict(config) | {"pretrained_model_name_or_path": local_path(base)}
    skipped = NOT_COMPARED - {"pretrained_model_name_or_path"} | {"mixed_precision"}
    differences = [
        f"--{key} was {before[key]} and is {value}"
        for key, value in now.items()
        if key in before and key not in skipped and value not in (None, "estimate") and not _same(value, before[key])
    ]
    former = read_concepts(output / CONCEPT)
    if concept_sha256(former) != concept_sha256(concept):
        differences.insert(0, f"the concept was {former.name} and is {concept.name}, or its file has changed")
    if differences:
        raise UsageError(
            f"--output_dir {output} is a finished run without checkpoints, and this training differs: "
            f"{'; '.join(differences)}. Choose another --output_dir, or start over with --overwrite."
        )


def _same(first: Any, second: Any) -> bool:
    """Whether two values of an option are equal; a beta that is the sum of several may be rounded."""
    numbers = isinstance(first, float) and isinstance(second, float)
    return first == second or (numbers and math.isclose(first, second))


def peak_memory_mb() -> int:
    """Peak memory in MiB: of the GPU if there is one, else of this process."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated() / 2**20)
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)


def reset_peak_memory() -> None:
    """Let the GPU's peak start from what is allocated now, so that it does not include the rendering of images."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def device_name(device: torch.device) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def commit() -> str | None:
    """The commit of this package's own checkout.

    None when the package is not under version control, e.g. when it is installed in a virtual environment that lies
    inside another repository.
    """
    init = Path(__file__).parents[1] / "__init__.py"
    git = ["git", "-C", str(init.parent)]
    try:
        for command in (["ls-files", "--error-unmatch", init.name], ["rev-parse", "HEAD"]):
            output = subprocess.run([*git, *command], capture_output=True, text=True, check=True).stdout
        return output.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
