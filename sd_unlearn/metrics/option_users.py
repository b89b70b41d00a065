"""Which metrics use which options of `evaluate`, so that an option without effect is refused."""

from __future__ import annotations

from collections.abc import Collection

from sd_unlearn.config.evaluate import Detectors
from sd_unlearn.errors import UsageError

USED_BY: dict[str, tuple[str, ...]] = {
    "clip_model": ("clip", "cmmd"),
    "clip_pretrained": ("clip", "cmmd"),
    **dict.fromkeys(("reference", "others", "false_accept_rate", "face_model", "face_weights"), ("identity",)),
    **dict.fromkeys(("nudity_preset", "nudity_classes", "nudity_threshold"), ("nudity",)),
    **dict.fromkeys(("classifier", "label"), ("classifier",)),
    "inception_weights": ("fidelity",),
    "real_images": ("fidelity", "cmmd"),
}


def unused_options(options: Detectors, names: Collection[str]) -> list[str]:
    """The options that were given although none of these metrics uses them."""
    default = Detectors()
    unused = [option for option, users in USED_BY.items() if not set(users) & set(names)]
    return [option for option in unused if getattr(options, option) != getattr(default, option)]


def check_used(options: Detectors, names: Collection[str]) -> None:
    """Refuse an option that none of the chosen metrics uses.

    Raises:
        UsageError
    """
    for option in unused_options(options, names):
        raise UsageError(
            f"{_is_for(options, option)}; the metrics of this command are {' '.join(names)}. Add one to --metrics, or "
            "leave the option out."
        )


def check_used_by_command(options: Detectors, names: Collection[str], command: str) -> None:
    """Refuse an option of metrics that the command never runs. names: those that it runs.

    Raises:
        UsageError
    """
    for option in unused_options(options, names):
        raise UsageError(f"{_is_for(options, option)}, which {command} does not run. Leave the option out.")


def _is_for(options: Detectors, option: str) -> str:
    value = getattr(options, option)
    text = " ".join(value) if isinstance(value, list) else value
    return f"--{option} {text} is for --metrics {' or '.join(USED_BY[option])}"
