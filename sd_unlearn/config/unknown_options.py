"""What may have been meant by an option that a command does not have."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

# What other programs call an option -> our names, the most likely first. A command may have none of them.
ELSEWHERE = {
    "batch_size": ("effective_batch_size", "render_batch_size", "sample_batch_size"),
    "cfg": ("guidance_scale",),
    "ckpt": ("pretrained_model_name_or_path",),
    "dtype": ("mixed_precision",),
    "epochs": ("max_train_steps",),
    "fp16": ("mixed_precision",),
    "instance_data_dir": ("positives",),
    "iterations": ("max_train_steps",),
    "lr": ("learning_rate",),
    "model": ("pretrained_model_name_or_path",),
    "name": ("output_dir",),
    "out": ("output_dir",),
    "output": ("output_dir",),
    "precision": ("mixed_precision",),
    "prompt": ("concept",),
    "run_name": ("output_dir",),
    "scale": ("strengths", "strength", "guidance_scale"),
    "steps": ("max_train_steps", "num_inference_steps"),
    "verbose": ("debug",),
}
SIMILAR = 0.7  # of difflib; at 0.6 "stesp" suggests "positives"
SAME = 0.9  # strength and strengths


def explain_unknown(option: str, known: Iterable[str], command: str, owners: Sequence[str] = ()) -> str:
    """The message for an unknown option.

    Args:
        option: As typed, e.g. --lr or --lr=3.
        known: The command's options, e.g. --learning_rate.
        command: e.g. train; "" without one.
        owners: Other commands that have an option of exactly this name.
    """
    typed = option.partition("=")[0]
    name, help_all = typed.lstrip("-"), f"All options: {' '.join(['sd-unlearn', *command.split()])} --help_all"
    ours = {word.lstrip("-"): word for word in known if word.startswith("--")}
    nearly = difflib.get_close_matches(name, ours, n=1, cutoff=SAME)
    if owners and not nearly:
        return f"unknown option: {typed}. It is an option of {', '.join(owners)}. {help_all}"
    theirs = {word: names[0] for word, usual in ELSEWHERE.items() if (names := [n for n in usual if n in ours])}
    similar = difflib.get_close_matches(name, [*ours, *theirs], n=1, cutoff=SIMILAR)  # itself first, if it is one
    if close := similar or _with_word_like(name, ours):
        return f"unknown option: {typed}. Did you mean {ours[theirs.get(close[0], close[0])]}?"
    return f"unknown option: {typed}. {help_all}"


def _with_word_like(name: str, names: Iterable[str]) -> list[str]:
    """The only option with such a word, e.g. guidance_scale for guidance."""
    found = [known for known in names if difflib.get_close_matches(name, known.split("_"), cutoff=SIMILAR)]
    return found if len(found) == 1 else []
