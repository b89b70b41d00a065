"""metadata.jsonl: the captions of a folder's images, as in Hugging Face's imagefolder format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sd_unlearn.errors import UsageError
from sd_unlearn.io.files import read_jsonl_lines
from sd_unlearn.io.run_folder import METADATA
from sd_unlearn.io.schema import OPEN, validate


@dataclass(frozen=True)
class ImageCaption:
    """One line of metadata.jsonl; other keys are ignored."""

    __pydantic_config__ = OPEN

    file_name: str
    text: str  # the caption
    group: str = "generic"


def read_metadata(folder: Path) -> dict[int, ImageCaption]:
    """Line number -> line of a folder's metadata.jsonl; empty if there is no such file.

    Raises:
        UsageError: a line is not valid JSON, or lacks the file name or the caption; names --data_dir, file and line.
    """
    path = folder / METADATA
    if not path.is_file():
        return {}
    try:
        lines = read_jsonl_lines(path)
    except UsageError as error:
        raise UsageError(f"--data_dir: {error}") from None
    return {number: validate(ImageCaption, line, f"--data_dir: {path} line {number}") for number, line in lines.items()}
