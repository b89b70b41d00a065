"""Where a base comes from (Hub id, diffusers folder or single file) and what is known of it before it loads."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sd_unlearn.errors import UsageError
from sd_unlearn.io.reading import json_sha256, read_json
from sd_unlearn.models.checkpoint_header import (
    CheckpointHeader,
    kind_of_file,
    prediction_of_file,
    read_checkpoint_header,
)
from sd_unlearn.models.kinds import COMPONENTS, KINDS, NETWORKS, kind_of

OPTION = "--pretrained_model_name_or_path"
ASSETS = Path(__file__).parent.parent / "assets"
DIGITS, DIGITS_SD3, EMOJI = "digits", "digits-sd3", "emoji"
FLOW = "flow"  # the prediction type of flow matching: the velocity
DIGITS_DIR = ASSETS / DIGITS
BUNDLED = {name: ASSETS / name for name in (DIGITS, DIGITS_SD3, EMOJI)}
SINGLE_FILE_DIR = ASSETS / "single_file"  # one folder of configurations per kind
WEIGHTS = re.compile(r"(?:diffusion_pytorch_model|model|pytorch_model)(?:\.(\w+))?(?:-\d+-of-\d+)?\.(safetensors|bin)")


@dataclass(frozen=True)
class Source:
    """The name of a base and the options that say how to load it."""

    name: str
    vae: str | None = None
    prediction_type: str | None = None
    variant: str | None = None
    allow_pickle: bool = False
    single_file_config: str | None = None
    drop_t5: bool = False  # load SD 3 without its third text encoder
    offload: bool = False  # keep large layers in the computer's memory (offload.py)

    @property
    def place(self) -> Path:
        """The path of the base if it is local."""
        return BUNDLED.get(self.name) or Path(self.name).expanduser()

    @property
    def is_file(self) -> bool:
        return self.place.is_file()

    @cached_property
    def header(self) -> CheckpointHeader:
        """The header of a single file."""
        return read_checkpoint_header(self.place, OPTION, self.allow_pickle)

    @property
    def configs(self) -> Path | None:
        """The folder with the configurations of the base; None for a Hub id."""
        if self.is_file:
            return Path(self.single_file_config or SINGLE_FILE_DIR / kind_of_file(self.header))
        return self.place if self.place.is_dir() else None

    def config_of(self, component: str, file: str = "config.json") -> dict[str, Any]:
        """A component's local configuration; empty if there is none.

        Raises:
            UsageError: the configuration is damaged, or the single file is not a base model.
        """
        folder = self.configs
        try:
            path = folder / component / file if folder else None
            content = read_json(path) if path and path.exists() else {}
        except (UsageError, OSError):
            content = None
        if not isinstance(content, dict):
            raise UsageError(f"{OPTION} {self.name}: {component}/{file} is damaged. Restore it or use another model.")
        return content

    @property
    def network_config(self) -> dict[str, Any]:
        """The local configuration of the UNet or transformer; empty if there is none."""
        return next(filter(None, map(self.config_of, NETWORKS)), {})

    @property
    def kind(self) -> str | None:
        """A key of KINDS; None for a Hub id, of which nothing is local yet."""
        config = self.network_config
        return kind_of(config) if config else None

    @property
    def known_prediction_type(self) -> str | None:
        """The prediction type; None if it is not known before loading."""
        if (kind := self.kind) and KINDS[kind].is_flow:
            return FLOW
        if self.is_file and not self.single_file_config:
            return self.prediction_type or prediction_of_file(self.header, kind_of_file(self.header))
        schedule = self.config_of("scheduler", "scheduler_config.json")
        return schedule.get("prediction_type", "epsilon") if schedule else None

    @property
    def schedule(self) -> str:
        """A short hash of the local scheduler configuration, which changes images as weights do; "" if there is none.

        Single files come with their configuration, unless they are given one.
        """
        if self.is_file and not self.single_file_config:
            return ""
        config = self.config_of("scheduler", "scheduler_config.json")
        settings = {key: value for key, value in config.items() if not key.startswith("_")}  # without class and version
        return json_sha256(settings)[:8] if settings else ""


def weights_in(folder: Path) -> set[tuple[str | None, str]]:
    """(variant or None, safetensors or bin) of the weights in a component's folder."""
    matches = (WEIGHTS.fullmatch(path.name) for path in folder.glob("*"))
    return {(match[1], match[2]) for match in matches if match}


def variant_of(source: Source) -> str | None:
    """The variant of a folder's weights to load: --variant, else the default weights, else fp16 if it has no others."""
    if source.variant or not source.place.is_dir():
        return source.variant
    for component in COMPONENTS:
        variants = {variant for variant, _ in weights_in(source.place / component)}
        if variants and None not in variants:
            return "fp16" if "fp16" in variants else sorted(filter(None, variants))[0]
    return None
