"""What is judged: the LoRA of a run, of a file in either format or of a hub repository, at a strength."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sd_unlearn.data.concept import Concept, concept_files, read_concept
from sd_unlearn.errors import UnlearnError, UsageError, suggest
from sd_unlearn.io.files import file_sha256, read_json, slugify
from sd_unlearn.io.run_folder import CONCEPT, TRAINING, weights_sha256
from sd_unlearn.models.base import Base

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
_ADAPTER = "judged"


@dataclass(frozen=True)
class Lora:
    """What somebody named, found and hashed; nothing of it is loaded yet."""

    name: str
    path: Path  # a run folder, or a .safetensors file
    sha256: str
    concept: Concept | None = None  # the one it was trained to forget, with its prompts; None: not known
    training: dict[str, Any] = field(default_factory=dict)  # training.json of a run, else empty
    header: dict[str, str] = field(default_factory=dict)  # of a file

    @property
    def is_run(self) -> bool:
        return self.path.is_dir()

    @property
    def base_name(self) -> str | None:
        return self.training["base"]["name"] if self.training else self.header.get("sd_unlearn.base")

    @property
    def base_sha256(self) -> str | None:
        return self.training["base"]["sha256"] if self.training else self.header.get("sd_unlearn.base_sha256")

    @property
    def zero_terminal_snr(self) -> bool | None:
        """Whether it was trained on a schedule of zero terminal SNR; None: a file that does not say."""
        if self.training:
            return bool(self.training.get("zero_terminal_snr", False))
        said = self.header.get("sd_unlearn.zero_terminal_snr")
        return said == "True" if said is not None else None

    @contextmanager
    def on(self, base: Base, strength: float) -> Iterator[None]:
        """The base with this LoRA at a strength (1: as trained), and as it was afterwards.

        Raises:
            UnlearnError: the file does not fit the base, or nothing in it does.
        """
        from sd_unlearn.models.student import apply_run

        with apply_run(base, self.path, strength) if self.is_run else _file_applied(base, self, strength):
            yield


def open_lora(given: str, option: str = "--lora") -> Lora:
    """A LoRA by run folder, exported folder, .safetensors file or hub id (owner/name).

    Raises:
        UsageError: nothing of that name, or what is there is no LoRA.
        UnlearnError: a hub repository cannot be had.
    """
    path = Path(given)
    if (path / TRAINING).is_file():
        return _of_run(path)
    if path.is_dir():
        return _of_file(_file_in(path, option), path.resolve().name, option)
    if path.is_file():
        return _of_file(path, path.stem, option)
    if given.count("/") == 1 and not given.startswith((".", "/", "~")) and not path.parent.is_dir():
        return _of_file(_download(given, option), given.rpartition("/")[2], option)
    near = suggest(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""
    raise UsageError(
        f"{option} {given} is no run folder, no .safetensors file and no hub id (owner/name).{near} Train a LoRA "
        "first: sd-unlearn train --concept NAME."
    )


def open_run(folder: Path) -> Lora:
    """The LoRA of --run.

    Raises:
        UsageError: no folder, or one without a finished training.
    """
    if not folder.is_dir():
        raise UsageError(f"--run {folder} is no folder. Train first: sd-unlearn train --concept NAME.")
    if not (folder / TRAINING).is_file():
        raise UsageError(
            f"--run {folder} holds no finished training ({TRAINING} is missing). Run sd-unlearn train first."
        )
    return _of_run(folder)


def names_of(loras: Sequence[Lora]) -> list[str]:
    """A name of its own for each: its own, with its parent folder's or a number where that is taken; never "base"."""
    names: list[str] = []
    for lora in loras:
        parent = lora.path.resolve().parent.name
        tries = [lora.name, f"{parent}-{lora.name}", *(f"{lora.name}-{n}" for n in range(2, len(loras) + 3))]
        names.append(next(name for name in tries if name not in names and name != "base"))
    return names


def _of_run(folder: Path) -> Lora:
    training = read_json(folder / TRAINING)
    if not isinstance(training, dict) or not isinstance(training.get("base"), dict):
        raise UsageError(f'{folder / TRAINING} holds no "base": it is no record of a training. Train again.')
    concept = read_concept(folder / CONCEPT)
    return Lora(folder.resolve().name, folder, weights_sha256(folder), concept, training)


def _of_file(file: Path, name: str, option: str) -> Lora:
    from safetensors import SafetensorError, safe_open

    if file.suffix != ".safetensors":
        raise UsageError(f"{option} {file} is no .safetensors file. Other formats can run code when they are read.")
    try:
        with safe_open(str(file), "pt") as opened:
            header, keys = opened.metadata() or {}, list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{option} {file} is damaged or no safetensors file ({error}).") from None
    if not any("lora" in key.lower() for key in keys):
        raise UsageError(f"{option} {file} holds no LoRA: none of its {len(keys)} weights is named so.")
    forgets = concept_files().get(slugify(header.get("sd_unlearn.concept", "")))
    return Lora(name, file, file_sha256(file), read_concept(forgets) if forgets else None, {}, header)


def _file_in(folder: Path, option: str) -> Path:
    if (folder / DIFFUSERS_FILE).is_file():
        return folder / DIFFUSERS_FILE
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    why = f"{len(files)} .safetensors files: name one of them" if files else "no LoRA and no finished training"
    raise UsageError(f"{option} {folder} holds {why}.")


def _download(repository: str, option: str) -> Path:
    from huggingface_hub import hf_hub_download, list_repo_files

    try:
        files = [name for name in list_repo_files(repository) if name.endswith(".safetensors")]
        wanted = DIFFUSERS_FILE if DIFFUSERS_FILE in files else files[0] if len(files) == 1 else None
        if wanted:
            return Path(hf_hub_download(repository, wanted))
    except Exception as error:  # the hub's client raises a dozen kinds
        reason = " ".join(str(error).split())[:200]
        raise UnlearnError(
            f"{option} {repository} is nothing here and could not be had from the hub: {reason}"
        ) from error
    raise UsageError(f"{option} {repository} has {len(files)} .safetensors files; download one and give its path.")


@contextmanager
def _file_applied(base: Base, lora: Lora, strength: float) -> Iterator[None]:
    from sd_unlearn.models.lora import set_strength

    pipeline = base.pipeline
    try:
        pipeline.load_lora_weights(str(lora.path.parent), weight_name=lora.path.name, adapter_name=_ADAPTER)
    except (RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UnlearnError(f"--lora {lora.path} does not fit {base.name}: {reason}") from error
    loaded = [part for part, names in pipeline.get_list_adapters().items() if _ADAPTER in names]
    if not loaded:
        raise UnlearnError(
            f"--lora {lora.path} changes nothing on {base.name}: none of its weights belongs to a module of it. "
            "Is it for another base?"
        )
    try:
        set_strength([getattr(pipeline, part) for part in loaded], strength)
        yield
    finally:
        pipeline.unload_lora_weights()
