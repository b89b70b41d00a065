"""settings.json of a rendered data folder: what its images depend on, and how another rendering would differ."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sd_unlearn.config.paths import local_path
from sd_unlearn.errors import UsageError
from sd_unlearn.io.reading import read_json
from sd_unlearn.io.schema import validate

SETTINGS = "settings.json"
WEIGHTS = "base_weights"  # key of settings.json: hashes of the base that generates the images
# Recorded but not compared: every image has its own noise, so the batch size only changes rounding.
BATCH_SIZE = "batch_size"

OPTIONS = {
    "concept": "--concept",
    "base": "--pretrained_model_name_or_path",
    "seed": "--seed",
    "steps": "--num_inference_steps",
    "guidance_scale": "--guidance_scale",
    "resolution": "--resolution",
    "vae": "--vae",
    "prediction_type": "--prediction_type",
    "drop_t5": "--drop_t5",
}
GROUPS = {
    "generic": "--num_unlabeled",
    "mixed_in": "--num_mixed_in",
    "keep": "keep images (--num_keep)",
    "positive": "--num_positive",
}


class ImageGroup(NamedTuple):
    """How many images to render of one prompt. `name` is generic, mixed_in, keep or positive."""

    name: str
    prompt: str
    images: int


def read_settings(file: Path) -> dict[str, Any]:
    """The content of a settings.json or manifest.json.

    Raises:
        UsageError: not a JSON object.
    """
    return validate(dict[str, Any], read_json(file), str(file), "Delete the folder and render again.")


def settings_in(folder: Path) -> dict[str, Any]:
    """The settings that a folder was rendered with, as RenderJob.settings."""
    settings = {key: value for key, value in read_settings(folder / SETTINGS).items() if key != WEIGHTS}
    paths = {key: settings[key] for key in ("base", "vae") if isinstance(settings.get(key), str)}
    return settings | {key: local_path(path) for key, path in paths.items()}  # relative in older folders


def seed_in(folder: Path) -> int | None:
    """The --seed that a folder was rendered with; None if it was not rendered yet."""
    seed = settings_in(folder).get("seed") if (folder / SETTINGS).is_file() else None
    return seed if isinstance(seed, int) else None


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Each setting that differs, with its value then and now; empty if the images would be the same."""
    keys = [key for key in dict.fromkeys((*OPTIONS, *before, *now)) if key not in ("plan", BATCH_SIZE)]
    found = [
        f"{OPTIONS.get(key, key)} {_text(before.get(key))} then, {_text(now.get(key))} now"
        for key in keys
        if before.get(key) != now.get(key)
    ]
    if before.get("plan") != now.get("plan"):
        found += _plan_differences(before.get("plan"), now.get("plan"))
    return found


def _plan_differences(before: Any, now: Any) -> list[str]:
    """What differs between two plans, [group, prompt, images] per prompt: numbers of images, and prompts."""
    try:
        plans = [validate(list[ImageGroup], plan, "plan") for plan in (before, now)]
    except UsageError:
        return ["the images to generate differ"]
    (count, prompts), (count_now, prompts_now) = map(_totals, plans)
    names = dict.fromkeys((*GROUPS, *count, *count_now))
    found = [
        f"{GROUPS.get(name, name)} {count[name]} then, {count_now[name]} now"
        for name in names
        if count[name] != count_now[name]
    ]
    for name in names:
        gone = [prompt for prompt in prompts[name] if prompt not in prompts_now[name]]
        new = [prompt for prompt in prompts_now[name] if prompt not in prompts[name]]
        if gone or new:
            found.append(f"{name} prompts {_prompts(gone)} then, {_prompts(new)} now")
    return found or ["the keep images are divided differently among their prompts"]


def _totals(plan: list[ImageGroup]) -> tuple[dict[str, int], dict[str, list[str]]]:
    """Number of images and prompts of each group."""
    counts: dict[str, int] = defaultdict(int)
    prompts: dict[str, list[str]] = defaultdict(list)
    for group in plan:
        counts[group.name] += group.images
        prompts[group.name].append(group.prompt)
    return counts, prompts


def _text(value: Any) -> str:
    return "default" if value is None else str(value)


def _prompts(prompts: list[str]) -> str:
    """The first of some prompts in quotes, and how many more there are."""
    if not prompts:
        return "not used"
    return f'"{prompts[0]}"' + (f" and {len(prompts) - 1} more" if prompts[1:] else "")
