"""A finished run as export needs it: read from its folder and checked before anything heavy loads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd_unlearn.data.concept import Concept, read_concept
from sd_unlearn.errors import UnlearnError, UsageError
from sd_unlearn.export.kohya import Adapter, read_adapter
from sd_unlearn.export.ldm_keys import SDXL, Layout, layout_of
from sd_unlearn.io.files import read_json
from sd_unlearn.io.run_folder import ADAPTER_DIR, CONCEPT, RESULTS, TEXT_ADAPTER_DIR, TRAINING, UNET_DIR, weights_sha256
from sd_unlearn.models.checkpoint_header import PICKLES

TEXT_ADAPTER_2_DIR = "text_encoder_2_adapter"  # SDXL's second text encoder
REQUIRED = ("rank", "lora_alpha", "beta", "correction", "caption_mode", "version", "config_sha256")


@dataclass(frozen=True)
class Run:
    """A finished run as it lies on disk. `results` is None before evaluation, or when they judge other weights
    or were drawn with another base."""

    folder: Path
    concept: Concept
    training: dict[str, Any]
    adapters: list[Adapter]  # the UNet's first; none after --method full
    results: dict[str, Any] | None

    @property
    def base(self) -> dict[str, Any]:
        return self.training["base"]

    @property
    def kind(self) -> str:
        return self.base["kind"]

    @property
    def layout(self) -> Layout:
        """How an SDXL's blocks are counted; runs of before that was recorded are on one like the published."""
        return layout_of(self.base["unet"]) if self.base.get("unet") else SDXL

    @property
    def is_full(self) -> bool:
        """Whether the whole UNet was trained, so that there is no LoRA."""
        return not self.adapters

    @property
    def is_dora(self) -> bool:
        return any(adapter.is_dora for adapter in self.adapters)

    @property
    def base_name(self) -> str:
        """The base's name; of a place on this machine only the last part, the rest is nobody's business."""
        name = str(self.base["name"])
        here = Path(name).is_absolute() or name.startswith("..") or Path(name).suffix in (".safetensors", *PICKLES)
        return Path(name).name if here else name


@dataclass(frozen=True)
class Architecture:
    """How the user interfaces name a base: ModelSpec's architecture and kohya's ss_base_model_version."""

    modelspec: str
    kohya: str

    @property
    def is_v2(self) -> bool:
        return self.kohya.startswith("sd_v2")


def read_run(folder: Path) -> Run:
    """Everything export needs of a run folder, checked.

    Raises:
        UsageError: the folder or one of its files is missing or not readable as what it should be.
        UnlearnError: the base or the adapter is of a kind that cannot be exported, or the adapter is another run's.
    """
    if not folder.is_dir():
        raise UsageError(f"--run {folder} does not exist. Name the run folder of a finished training.")
    for name in (TRAINING, CONCEPT):
        if not (folder / name).is_file():
            raise UsageError(f"--run {folder} holds no finished training ({folder / name}). Train first.")
    training = read_json(folder / TRAINING)
    _check_training(training, folder / TRAINING)
    architecture(training["base"])
    adapters = [] if (folder / UNET_DIR).is_dir() else _adapters(folder, training)
    concept = read_concept(folder / CONCEPT)
    return Run(folder, concept, training, adapters, _results(folder, concept.slug, training["base"]))


def architecture(base: dict[str, Any]) -> Architecture:
    """The names of a base (training.json's entry) by its kind and prediction type.

    Raises:
        UnlearnError: a kind that the exported formats do not cover.
    """
    v_prediction = base.get("prediction_type") == "v_prediction"
    if base["kind"] == "sd1":
        return Architecture("stable-diffusion-v1", "sd_v1")
    if base["kind"] == "sd2" and v_prediction:
        return Architecture("stable-diffusion-v2-768-v", "sd_v2_v")
    if base["kind"] == "sd2":
        return Architecture("stable-diffusion-v2-512", "sd_v2")
    if base["kind"] == "sdxl":
        return Architecture("stable-diffusion-xl-v1-base", "sdxl_base_v1-0")
    raise UnlearnError(
        f'--run was trained on a base of kind "{base["kind"]}", which export cannot write. '
        "Choose a run on an SD 1, SD 2 or SDXL base."
    )


def figures_of(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows on the base (subject "base") and on what was trained ("lora"); a row has the keys of records.Row."""
    return [row for row in results["rows"] if row.get("subject") in ("base", "lora")]


def pairs_of(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The pairs that name their group and both pictures, `base` and `lora`."""
    pairs = results.get("pairs")
    found = [pair for pair in pairs if isinstance(pair, dict)] if isinstance(pairs, list) else []
    return [pair for pair in found if all(isinstance(pair.get(key), str) for key in ("base", "lora", "group"))]


def evaluation_of(results: dict[str, Any], sha256: str, slug: str) -> dict[str, Any] | None:
    """What results.json says of weights, as version 1 said it: detector, sampler, seeds, rows and pairs.

    None where it judges other weights. Of version 2, which compares many, only figures of these weights at strength 1
    on the run's own concept are taken.
    """
    if results.get("schema_version", 1) == 1:
        return results if results.get("adapter_sha256") == sha256 else None
    ids = [
        s["id"] for s in results.get("subjects", []) if s.get("sha256") == sha256 and s.get("strength", 1) in (1, None)
    ]
    if not ids:
        return None
    names = {"base": "base", ids[0]: "lora"}
    own = [row for row in results["rows"] if row.get("subject") in names and row.get("concept") in (slug, "")]
    pairs = [p for p in results.get("pairs", []) if p.get("subject") == ids[0] and p.get("concept") == slug]
    return {
        "detector": ", ".join(dict.fromkeys(row["detector"] for row in own if row.get("detector"))),
        "sampler": results.get("sampler"),
        "seeds": results.get("seeds"),
        "rows": [row | {"subject": names[row["subject"]]} for row in own],
        "pairs": [pair | {"lora": pair.get("image")} for pair in pairs],
    }


def _adapters(folder: Path, training: dict[str, Any]) -> list[Adapter]:
    adapter = read_adapter(folder / ADAPTER_DIR)
    for key, ours in (("rank", "r"), ("lora_alpha", "lora_alpha")):
        if training[key] != adapter.config[ours]:
            raise UnlearnError(
                f"--run {folder} mixes two trainings: {TRAINING} says {key} {training[key]}, the adapter "
                f"{adapter.config[ours]}. Train it again with --overwrite."
            )
    beside = ((TEXT_ADAPTER_DIR, "text_encoder"), (TEXT_ADAPTER_2_DIR, "text_encoder_2"))
    return [adapter, *(read_adapter(folder / name, network) for name, network in beside if (folder / name).is_dir())]


def _check_training(training: Any, path: Path) -> None:
    base = training.get("base") if isinstance(training, dict) else None
    if not isinstance(base, dict):
        raise UsageError(f'{path} holds no "base": it is no record of a training. Train again with --overwrite.')
    missing = [key for key in REQUIRED if key not in training]
    missing += [f"base.{key}" for key in ("name", "kind", "sha256") if key not in base]
    if missing:
        raise UsageError(f'{path} lacks "{missing[0]}", which every training writes. Train again with --overwrite.')


def _results(folder: Path, slug: str, base: dict[str, Any]) -> dict[str, Any] | None:
    """The evaluation of exactly these weights on their own base, if there is one: any other figures would be a lie."""
    if not (folder / RESULTS).is_file():
        return None
    results = read_json(folder / RESULTS)
    if not isinstance(results, dict) or not isinstance(results.get("rows"), list):
        raise UsageError(f'{folder / RESULTS} holds no "rows". Run sd-unlearn evaluate again, or delete it.')
    judged = results.get("base") or {}
    if any(judged.get(key, base.get(key)) != base.get(key, judged.get(key)) for key in ("sha256", "vae_sha256")):
        return None  # an evaluation can be given another base
    return evaluation_of(results, weights_sha256(folder), slug)
