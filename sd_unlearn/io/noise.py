"""Keep the messages of libraries off stderr: loading bars, deprecations, advice to developers. --debug shows them."""

from __future__ import annotations

import logging
import os
import sys
import warnings

SHOW = "SD_UNLEARN_DEBUG"  # environment variable; set by --debug, and inherited by the processes of a launch
LIBRARIES = ("accelerate", "bitsandbytes", "diffusers", "huggingface_hub", "open_clip", "peft", "timm", "transformers")


def silence_warnings() -> None:
    """Hide Python warnings that users cannot act on. For commands only: it changes the whole process.

    Other warnings of torch stay, e.g. about a GPU driver that is too old. Downloads show a bar on a terminal only.
    """
    if os.environ.get(SHOW):
        return
    for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category)
    warnings.filterwarnings("ignore", module=rf"({'|'.join(LIBRARIES)})(\.|$)")
    silence_bitsandbytes()
    if sys.stderr is None or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def silence_bitsandbytes() -> None:
    """Hide what bitsandbytes says when it is imported: that it lacks kernels for CPUs, which are not used here."""
    if not os.environ.get(SHOW):
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def silence_libraries() -> None:
    """Hide the log messages and loading bars of transformers and diffusers, which this imports (seconds)."""
    if os.environ.get(SHOW):
        return
    from transformers.utils import logging as transformers_logging

    # Before importing diffusers, which otherwise warns about optional packages that are not needed here.
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
