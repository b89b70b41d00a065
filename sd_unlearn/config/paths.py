"""Paths among the options: `~` is expanded in every command, and records name what was read by absolute paths."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

_HOME = re.compile(r"(?P<name>(?:[^/~=]+=)?)(?P<path>~(?:/.*)?)", re.DOTALL)  # [name=]~/folder
# Options that take a local file or folder, some of them as name=folder, or a Hub id.
PLACES = ("pretrained_model_name_or_path", "vae", "single_file_config", "lora", "images", "reference")
# Options that take a path or a plain name, which has neither a slash nor a full stop.
NAMES = ("concept", "prompt_set", "clip_pretrained", "classifier", "resume_from_checkpoint")
# Where a repeated command writes: recorded as given, so that it can be repeated on another machine.
OUTPUTS = ("output_dir", "cache_dir", "config")


class PathOptions:
    """Base class of the options of a command: expands `~` however they are given (flag, YAML or Python)."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]  # the subclasses are dataclasses
            setattr(self, field.name, expanded(getattr(self, field.name)))


def expanded(value: Any) -> Any:
    """A value of an option with `~` replaced by the home folder, also in lists and in name=~/folder."""
    if isinstance(value, Path):
        return Path(os.path.expanduser(value))  # unlike Path.expanduser no error without a home folder
    if isinstance(value, str) and (match := _HOME.fullmatch(value)):
        return match["name"] + os.path.expanduser(match["path"])
    return [expanded(item) for item in value] if isinstance(value, list) else value


def local_path(place: str | None) -> str | None:
    """The absolute path of a local file or folder, also in name=folder; a Hub id or a bundled base as it is."""
    if not place or place in ("digits", "digits-sd3", "emoji"):  # the bundled bases, also if there is such a folder
        return place
    name, equals, rest = place.rpartition("=")
    for start, path in (("", place), (name + equals, rest)):
        if os.path.exists(path):
            return start + os.path.abspath(path)
    return place


def as_dict(config: Any) -> dict[str, Any]:
    """A config as plain YAML or JSON values."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(config).items()}


def recorded(config: Any) -> dict[str, Any]:
    """A config for config.yaml and evaluate.yaml: `--config` with the file works from every folder."""
    return {key: _recorded(key, value) for key, value in dataclasses.asdict(config).items()}


def _recorded(key: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_recorded(key, item) for item in value]
    if isinstance(value, Path):
        return str(value if key in OUTPUTS else value.absolute())
    if not isinstance(value, str) or not (key in PLACES or (key in NAMES and re.search(r"[/.]", value))):
        return value
    return local_path(value)
