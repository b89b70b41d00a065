"""The images that an attacker brings. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from sd_unlearn.errors import UsageError
from sd_unlearn.io.images import image_files


def attacker_files(folder: Path) -> list[Path]:
    """The images of --attacker_images.

    Raises:
        UsageError: not a folder, or without images.
    """
    if not folder.is_dir():
        raise UsageError(f"--attacker_images {folder} is not a folder.")
    if not (files := image_files(folder)):
        raise UsageError(f"--attacker_images {folder} holds no images.")
    return files
