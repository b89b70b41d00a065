"""Weights that metrics download once, into torch's hub folder."""

from __future__ import annotations

from pathlib import Path

from sd_unlearn.errors import UnlearnError, reason


def downloaded(url: str, what: str, advice: str) -> Path:
    """The file of a URL in torch's hub folder, downloaded if it is not there.

    what, advice: begin and end the error message: whose weights they are, and which option takes the file instead.

    Raises:
        UnlearnError: it cannot be downloaded.
    """
    from torch import hub

    path = Path(hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            hub.download_url_to_file(url, str(path), progress=False)  # writes a temporary file, then renames it
        except OSError as error:  # URLError is one
            raise UnlearnError(f"{what} could not be downloaded from {url} ({reason(error)}). {advice}") from error
    return path
