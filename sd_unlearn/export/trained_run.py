"""Read a finished run for export and check it before anything heavy loads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sd_unlearn.calibration import Calibration, read_calibration
from sd_unlearn.data.concept import Concept
from sd_unlearn.data.several import read_concepts
from sd_unlearn.errors import UnlearnError
from sd_unlearn.export.kohya import Adapter, read_adapter
from sd_unlearn.io.paths import public_name
from sd_unlearn.io.reading import read_json
from sd_unlearn.io.run_folder import (
    ADAPTER_DIR,
    CONCEPT,
    RESULTS,
    TEXT_ADAPTER_DIR,
    TRAINING,
    UNET_DIR,
    check_trained,
    weights_sha256,
)
from sd_unlearn.io.schema import OPEN, validate
from sd_unlearn.models.kinds import KINDS
from sd_unlearn.models.ldm_keys import SDXL_BLOCKS, UNetBlocks, blocks_of
from sd_unlearn.models.lora_file import read_tensors
from sd_unlearn.models.recorded_base import different_hash
from sd_unlearn.results import ATTACK_METRIC, Pair, Problem, Results, Row, Seeds, read_results

TEXT_ADAPTER_2_DIR = "text_encoder_2_adapter"  # SDXL's second text encoder
RETRAIN = "Train again with --overwrite."


@dataclass(frozen=True)
class UNetRecord:
    """The numbers of a UNet's blocks, recorded for SDXL."""

    __pydantic_config__ = OPEN

    layers_per_block: int | list[int]
    up_block_types: list[str]


@dataclass(frozen=True)
class BaseRecord:
    """The base in training.json."""

    __pydantic_config__ = OPEN

    name: str
    kind: str
    sha256: str
    vae_sha256: str | None = None
    text_encoder_sha256: str | None = None
    prediction_type: str | None = None
    resolution: int | None = None
    unet: UNetRecord | None = None


@dataclass(frozen=True)
class TrainingRecord:
    """The keys of training.json that export needs. Values of type Any are only copied into headers."""

    __pydantic_config__ = OPEN

    base: BaseRecord
    rank: int
    lora_alpha: float | None  # None: all weights were trained
    version: Any
    config_sha256: Any
    beta: Any = None  # closed-form objectives have none of these three
    correction: Any = None
    caption_mode: Any = None
    zero_terminal_snr: bool | None = None
    versions: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Architecture:
    """The names of a base's architecture: ModelSpec's `architecture` and kohya's `ss_base_model_version`."""

    modelspec: str
    kohya: str

    @property
    def is_v2(self) -> bool:
        return self.kohya.startswith("sd_v2")


ARCHITECTURES = {
    "sd1": Architecture("stable-diffusion-v1", "sd_v1"),
    "sd2": Architecture("stable-diffusion-v2-512", "sd_v2"),
    "sdxl": Architecture("stable-diffusion-xl-v1-base", "sdxl_base_v1-0"),
    "sd3": Architecture("stable-diffusion-3", "sd3"),
    "flux": Architecture("flux-1", "flux1"),
    "flux2": Architecture("Flux.2-dev", "flux2"),
    "flux2-klein": Architecture("Flux.2-klein", "flux2-klein"),
    "z-image": Architecture("Z-Image", "zimage"),
    "qwen-image": Architecture("Qwen-Image", "qwen_image"),
}


# objectives that replace the concept with the generic caption
TO_GENERIC = ("pu", "anchor", "uce", "speed", "rece")


@dataclass(frozen=True)
class OwnResults:
    """The part of results.json that measured the run's weights at strength 1, on its own concept and base."""

    subject: str  # id of the run's LoRA in rows and pairs; the other subject is the base
    sampler: dict[str, Any]
    seeds: Seeds
    rows: list[Row]
    pairs: list[Pair]
    problems: list[Problem] = field(default_factory=list)  # why no verdict may be given

    @property
    def detector(self) -> str:
        """The names of all detectors, comma-separated."""
        return ", ".join(dict.fromkeys(row.detector for row in self.rows if row.detector))

    @property
    def is_attacked(self) -> bool:
        """Whether the run's LoRA was attacked."""
        return any((row.metric, row.subject) == (ATTACK_METRIC, self.subject) for row in self.rows)


@dataclass(frozen=True)
class TrainedRun:
    """A finished run on disk."""

    folder: Path
    concept: Concept
    training: dict[str, Any]  # training.json as written, valid as TrainingRecord
    adapters: list[Adapter]  # the UNet's or transformer's first; empty for --method full
    results: OwnResults | None  # None if these weights were not evaluated on their base
    calibration: Calibration | None = None  # of these weights and their concept

    @property
    def base(self) -> dict[str, Any]:
        return self.training["base"]

    @property
    def kind(self) -> str:
        return self.base["kind"]

    @property
    def network(self) -> str:
        """The trained network: unet or transformer."""
        return KINDS[self.kind].network

    @property
    def strength(self) -> float:
        """The strength to load the LoRA at: the calibrated one; as trained (1) without one."""
        calibrated = self.calibration.strength if self.calibration else None
        return 1.0 if calibrated is None else calibrated

    @property
    def blocks(self) -> UNetBlocks:
        """The block sizes of an SDXL UNet; the published model's if training.json does not hold them."""
        return blocks_of(self.base["unet"]) if self.base.get("unet") else SDXL_BLOCKS

    @property
    def to_generic(self) -> bool:
        """Whether it, or each LoRA that it fuses, was made to generate what the generic prompt gives."""
        parts = self.training.get("fused") or [self.training]
        return all(part.get("objective", "pu") in TO_GENERIC for part in parts)

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether it was trained, and is to be sampled, with a schedule that ends in pure noise."""
        return bool(self.training.get("zero_terminal_snr"))

    @property
    def shows_nudity(self) -> bool:
        """Whether images of a concept must not be published."""
        return any(part.kind == "nudity" for part in self.concept.parts)

    @property
    def is_full(self) -> bool:
        """Whether the whole UNet was trained, so that there is no LoRA."""
        return not self.adapters

    @property
    def is_dora(self) -> bool:
        return any(adapter.is_dora for adapter in self.adapters)

    @property
    def base_name(self) -> str:
        """The base's name. Of a local path only the last part, to keep the user's folders private."""
        return public_name(self.base["name"])


def read_run(folder: Path) -> TrainedRun:
    """Read and check the files of a run folder.

    Raises:
        UsageError: the folder or one of its files is missing or invalid.
        UnlearnError: the kind of the base or adapter cannot be exported, or the adapter belongs to another training.
    """
    check_trained(folder)
    training = read_json(folder / TRAINING)
    validate(TrainingRecord, training, str(folder / TRAINING), RETRAIN)
    architecture(training["base"])
    for file in sorted((folder / UNET_DIR).glob("*.safetensors")):
        read_tensors(file, "--run")  # refuses weights that are not finite
    adapters = [] if (folder / UNET_DIR).is_dir() else _adapters(folder, training)
    concept = read_concepts(folder / CONCEPT)
    results, sha256 = None, weights_sha256(folder)
    if (folder / RESULTS).is_file():
        results = own_results(read_results(folder), sha256, [part.slug for part in concept.parts], training["base"])
    calibration = read_calibration(folder, sha256, concept.slug)
    return TrainedRun(folder, concept, training, adapters, results, calibration)


def architecture(base: Mapping[str, Any]) -> Architecture:
    """The architecture names of a base, given its entry in training.json.

    Raises:
        UnlearnError: the exported formats do not support this kind of base.
    """
    if base["kind"] == "sd2" and base.get("prediction_type") == "v_prediction":
        return Architecture("stable-diffusion-v2-768-v", "sd_v2_v")
    if known := ARCHITECTURES.get(base["kind"]):
        return known
    raise UnlearnError(
        f'{TRAINING} of --run names a base of kind "{base["kind"]}", which export does not support. '
        "Choose a run on an SD 1, SD 2, SDXL, SD 3, FLUX.1, FLUX.2, Z-Image or Qwen-Image base."
    )


def own_results(results: Results, sha256: str, slugs: Sequence[str], base: Mapping[str, Any]) -> OwnResults | None:
    """Select the rows, pairs and problems of these weights at strength 1 on the concepts `slugs`.

    None if the file holds other weights only, or if the evaluation used another base than the training.
    """
    if different_hash(base, results.base):
        return None
    ids = [subject.id for subject in results.compared if subject.sha256 == sha256 and subject.strength in (1, None)]
    if not ids:
        return None
    pairs = [pair for pair in results.pairs if pair.subject == ids[0] and pair.concept in slugs]
    rows = [row for slug in slugs for row in results.rows_of(slug, ids[0])]
    problems = dict.fromkeys(problem for slug in slugs for problem in results.problems_of(slug, ids[0]))
    return OwnResults(ids[0], results.sampler, results.seeds, rows, pairs, list(problems))


def _adapters(folder: Path, training: dict[str, Any]) -> list[Adapter]:
    adapter = read_adapter(folder / ADAPTER_DIR, KINDS[training["base"]["kind"]].network)
    for key, value in (("rank", adapter.settings.r), ("lora_alpha", adapter.settings.lora_alpha)):
        if training[key] != value:
            raise UnlearnError(
                f"--run {folder} mixes two trainings: {key} is {training[key]} in {TRAINING} but {value} in the "
                f"adapter. {RETRAIN}"
            )
    texts = ((TEXT_ADAPTER_DIR, "text_encoder"), (TEXT_ADAPTER_2_DIR, "text_encoder_2"))
    return [adapter, *(read_adapter(folder / name, network) for name, network in texts if (folder / name).is_dir())]
