"""Open a LoRA (run folder, .safetensors file or Hub repository) and apply it to a base at a strength."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sd_unlearn.data.concept import Concept
from sd_unlearn.data.find_concept import concept_files, read_concept
from sd_unlearn.data.several import read_concepts, together
from sd_unlearn.errors import UnlearnError, UsageError, reason, suggest
from sd_unlearn.io.paths import concept_slug, folded
from sd_unlearn.io.reading import file_sha256, read_json
from sd_unlearn.io.run_folder import CONCEPT, DIFFUSERS_FILE, TRAINING, UNET_DIR, weights_sha256
from sd_unlearn.io.schema import OPEN, validate
from sd_unlearn.models.base import HASHES, Base
from sd_unlearn.models.recorded_base import different_hash
from sd_unlearn.models.safe_guidance import Safety, safe_guidance
from sd_unlearn.results import BASE, FLOOR


@dataclass(frozen=True)
class _BaseRecord:
    """What an evaluation reads of `base` in training.json."""

    __pydantic_config__ = OPEN

    name: str
    sha256: str | None = None
    vae_sha256: str | None = None
    text_encoder_sha256: str | None = None
    vae: str | None = None
    variant: str | None = None
    single_file_config: str | None = None
    prediction_type: str | None = None


@dataclass(frozen=True)
class _TrainingRecord:
    """What an evaluation reads of training.json."""

    __pydantic_config__ = OPEN

    base: _BaseRecord
    zero_terminal_snr: bool | None = None
    cost: dict[str, Any] | None = None


@dataclass(frozen=True)
class Lora:
    """A LoRA on disk; its weights are not loaded yet."""

    name: str
    path: Path  # a run folder, or a .safetensors file
    sha256: str  # of the weights as they are on disk
    change_sha256: str  # of what it changes in a base, at which scale (lora_change.changes_sha256)
    concept: Concept | None = None  # what it was trained to unlearn, one or several; None: unknown
    training: dict[str, Any] = field(default_factory=dict)  # training.json of a run; empty for files
    header: dict[str, str] = field(default_factory=dict)  # metadata of a .safetensors file; empty for runs

    @property
    def is_run(self) -> bool:
        return self.path.is_dir()

    @property
    def concepts(self) -> tuple[Concept, ...]:
        """The concepts that it was trained to unlearn; empty: unknown."""
        return self.concept.parts if self.concept else ()

    @property
    def base_name(self) -> str | None:
        return self.training["base"]["name"] if self.training else self.header.get("sd_unlearn.base")

    @property
    def base_hashes(self) -> dict[str, str]:
        """The hashes of the base it was trained on, with the keys of models.base.HASHES, as far as they are known."""
        record: Mapping[str, Any] = self.training["base"] if self.training else _header_hashes(self.header)
        return {key: record[key] for key in HASHES if record.get(key)}

    @property
    def zero_terminal_snr(self) -> bool | None:
        """Whether it was trained with zero terminal SNR; None: unknown (a file without our metadata)."""
        if self.training:
            return bool(self.training.get("zero_terminal_snr", False))
        value = self.header.get("sd_unlearn.zero_terminal_snr")
        return value == "True" if value is not None else None

    @contextmanager
    def applied_to(self, base: Base, strength: float) -> Iterator[None]:
        """Apply the LoRA to the base at a strength (1: as trained); the base is restored when the block ends.

        Raises:
            UnlearnError: the LoRA does not fit the base.
        """
        from sd_unlearn.models.lora_change import apply_changes
        from sd_unlearn.models.student import apply_run

        if self.is_run:
            with apply_run(base, self.path, strength):
                yield
            return
        with apply_changes(self._targets(base), strength, f"--lora {self.path}"):
            yield

    def check_fits(self, base: Base) -> None:
        """Refuse a LoRA that changes modules which the base lacks or has in other shapes, before images are generated.

        Raises:
            UnlearnError: names the module.
        """
        from sd_unlearn.models import lora
        from sd_unlearn.models.lora_change import find_modules

        if not self.is_run:
            self._targets(base)
        elif not (self.path / UNET_DIR).is_dir():
            for file in lora.read_run(self.path):
                find_modules(base.pipeline, file.changes, f"--run {self.path}", base.name)

    def _targets(self, base: Base) -> list[Any]:
        from sd_unlearn.models.lora_change import find_modules
        from sd_unlearn.models.lora_file import read_lora_file

        file = read_lora_file(self.path, "--lora")
        return find_modules(base.pipeline, file.changes, f"--lora {self.path}", base.name)

    def other_base(self, base: Mapping[str, Any]) -> str | None:
        """Says so if the LoRA was trained on other weights than a base's. base: as in training.json.

        The VAE is not compared: it does not change what a LoRA does.
        """
        own = {key: value for key, value in self.base_hashes.items() if key != "vae_sha256"}
        key = different_hash(own, base)
        if key is None:
            return None
        part = f"a {HASHES[key]} with other weights" if key != "sha256" else "other weights"
        return (
            f"{self.name} was trained on {part} ({Path(self.base_name or 'unknown').name}, SHA-256 {own[key][:12]}) "
            f"than those of this base ({Path(base['name']).name}, {base[key][:12]})."
        )


@dataclass(frozen=True)
class ModelVariant:
    """The base with a LoRA at a strength, or sampled with safety guidance.

    Without either, or at strength 0, it is the base itself.
    """

    lora: Lora | None = None
    strength: float = 1.0
    safety: Safety | None = None

    @contextmanager
    def applied_to(self, base: Base) -> Iterator[None]:
        """Apply it to the base; the base is restored when the block ends.

        Raises:
            UnlearnError: the LoRA does not fit the base.
        """
        with ExitStack() as stack:
            if self.lora is not None and not self.is_base:
                stack.enter_context(self.lora.applied_to(base, self.strength))
            if self.safety is not None:
                stack.enter_context(safe_guidance(base, self.safety))
            yield

    @property
    def is_base(self) -> bool:
        return self.safety is None and (self.lora is None or self.strength == 0)

    @property
    def folder(self) -> str:
        """Name of the folder of its images: unique for the LoRA's change and strength, or for the safety guidance."""
        if self.safety is not None:
            return f"sld-{self.safety.name}-{self.safety.digest}"
        if self.lora is None or self.strength == 0:
            return "base"
        return f"lora-{self.lora.change_sha256[:12]}" + (f"-at-{self.strength:g}" if self.strength != 1 else "")


def _header_hashes(header: Mapping[str, str]) -> dict[str, str | None]:
    return {key: header.get(f"sd_unlearn.base_{key}") for key in HASHES}


def open_lora(given: str, option: str = "--lora") -> Lora:
    """Open a run folder, exported folder, .safetensors file or Hub id (owner/name).

    Raises:
        UsageError: not found, or not a LoRA.
        UnlearnError: the Hub repository cannot be downloaded.
    """
    path = Path(given)
    if (path / TRAINING).is_file():
        return _of_run(path)
    if path.is_dir():
        return _of_file(_file_in(path, option), path.resolve().name, option)
    if path.is_file():
        return _of_file(path, path.stem, option)
    is_hub_id = given.count("/") == 1 and not given.startswith((".", "/", "~", "runs/"))  # runs: of our run folders
    if is_hub_id and not path.parent.is_dir():
        return _of_file(_download(given, option), given.rpartition("/")[2], option)
    suggestion = suggest(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""
    raise UsageError(
        f"{option} {given} is not a run folder, a .safetensors file or a Hub id (owner/name).{suggestion} Train a LoRA "
        "first: sd-unlearn train --concept NAME."
    )


def open_run(folder: Path) -> Lora:
    """Open the LoRA of --run.

    Raises:
        UsageError: not a folder, or the training is not finished.
    """
    if not folder.is_dir():
        raise UsageError(f"--run {folder} is not a folder. Train first: sd-unlearn train --concept NAME.")
    if not (folder / TRAINING).is_file():
        raise UsageError(
            f"--run {folder} has no finished training ({TRAINING} is missing). Run sd-unlearn train first."
        )
    return _of_run(folder)


def unique_names(loras: Sequence[Lora]) -> list[str]:
    """A unique name for each LoRA, never "base" or "floor": its own, else with the parent folder or a number."""
    names: list[str] = []
    for lora in loras:
        parent = lora.path.resolve().parent.name
        candidates = [lora.name, f"{parent}-{lora.name}", *(f"{lora.name}-{n}" for n in range(2, len(loras) + 3))]
        names.append(next(name for name in candidates if name not in (*names, BASE, FLOOR)))
    return names


def _of_run(folder: Path) -> Lora:
    training = read_json(folder / TRAINING)
    validate(_TrainingRecord, training, str(folder / TRAINING), "Train again.")
    concept = read_concepts(folder / CONCEPT)
    sha256 = weights_sha256(folder)
    return Lora(folder.resolve().name, folder, sha256, _change_of_run(folder) or sha256, concept, training)


def _change_of_run(run: Path) -> str | None:
    """The hash of a run's changes; None for a whole UNet.

    Raises:
        UnlearnError: a weight is not finite: the images would count as forgotten.
    """
    from sd_unlearn.models import lora
    from sd_unlearn.models.lora_change import changes_sha256
    from sd_unlearn.models.lora_file import read_tensors

    if not (run / UNET_DIR).is_dir():
        return changes_sha256(*(file.changes for file in lora.read_run(run)))
    for file in sorted((run / UNET_DIR).glob("*.safetensors")):
        read_tensors(file, "--run")
    return None


def _of_file(file: Path, name: str, option: str) -> Lora:
    from sd_unlearn.models.lora_change import changes_sha256
    from sd_unlearn.models.lora_file import read_lora_file

    read = read_lora_file(file, option)
    header = read.header
    return Lora(name, file, file_sha256(file), changes_sha256(read.changes), _concept_in(header), header=header)


def _concept_in(header: Mapping[str, str]) -> Concept | None:
    """The concepts that our header names, if all of them have files here that are for the same names."""
    try:
        names = json.loads(header.get("sd_unlearn.concepts", "null")) or [header.get("sd_unlearn.concept", "")]
        files = [concept_files().get(concept_slug(name)) for name in names]
    except (ValueError, TypeError, AttributeError):  # another program's
        return None
    concepts = [read_concept(file) for file in files if file]
    is_found = [folded(concept.name) for concept in concepts] == list(map(folded, names))
    return together(concepts) if is_found else None


def _file_in(folder: Path, option: str) -> Path:
    if (folder / DIFFUSERS_FILE).is_file():
        return folder / DIFFUSERS_FILE
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() == ".safetensors" and not f.name.startswith("."))
    if len(files) == 1:
        return files[0]
    content = f"{len(files)} .safetensors files; give the path of one" if files else "no LoRA and no finished training"
    raise UsageError(f"{option} {folder} has {content}.")


def _download(repository: str, option: str) -> Path:
    from huggingface_hub import hf_hub_download, list_repo_files
    from huggingface_hub.errors import EntryNotFoundError

    try:
        try:  # without asking for the list, which needs the network even if the file is downloaded already
            return Path(hf_hub_download(repository, DIFFUSERS_FILE))
        except EntryNotFoundError:
            files = [name for name in list_repo_files(repository) if name.endswith(".safetensors")]
        if len(files) == 1:
            return Path(hf_hub_download(repository, files[0]))
    except Exception as error:  # the Hub's client raises many types
        raise UnlearnError(f"{option} {repository} was not found locally or on the Hub: {reason(error)}.") from error
    raise UsageError(f"{option} {repository} has {len(files)} .safetensors files. Download one and give its path.")
