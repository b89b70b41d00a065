"""Small packages of emoji as npm serves them, so that the scripts of the base `emoji` run without a network."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

CAT, DETECTIVE, PISTOL = "1f431", "1f575", "1f52b"
CHARS = {CAT: "cat-face", f"{DETECTIVE}-fe0f": "detective", f"{DETECTIVE}-1f3ff": "dark-detective", PISTOL: "toy"}
BODY = '<rect x="4" width="8" height="8" fill="#f00"/>'  # a red square of half the width, at the top


def write_packages(folder: Path, packages: dict[str, str], without_chars: tuple[str, ...]) -> None:
    """The archive of each package: a cat, a detective (also with dark skin) and a pistol, 16 x 8 in size."""
    folder.mkdir(parents=True)
    for style, package in packages.items():
        icons: dict[str, Any] = {"width": 16, "height": 8, "icons": {n: {"body": BODY} for n in ("cat-face", "pistol")}}
        icons["icons"] |= {"detective": {"body": BODY}, "dark-detective": {"body": BODY.replace("#f00", "#000")}}
        icons["aliases"] = {"toy": {"parent": "pistol"}} if style != "emojione" else {}
        with tarfile.open(folder / f"iconify-json-{package.replace('@', '-')}.tgz", "w:gz") as archive:
            _add(archive, "icons", icons)
            if style not in without_chars:
                _add(archive, "chars", CHARS)


def _add(archive: tarfile.TarFile, name: str, content: object) -> None:
    data = json.dumps(content).encode()
    info = tarfile.TarInfo(f"package/{name}.json")
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))
