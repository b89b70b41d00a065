"""Open image files: the only place that decodes them."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from sd_unlearn.errors import UsageError, reason
from sd_unlearn.io.reading import check_regular
from sd_unlearn.io.run_folder import IMAGE_SUFFIXES

# Pillow's names of the formats that are decoded, whatever the file's suffix. Others may start programs (EPS).
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "TIFF", "BMP", "HEIF")
# What to install where Pillow has no decoder for files with these suffixes.
REQUIREMENTS = {".heic": "pillow-heif", ".heif": "pillow-heif", ".avif": "Pillow 11.3 or later"}


class UnreadableImage(UsageError):
    """An image file cannot be decoded. `why` is the reason without the file's name."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(f"{path} cannot be read as an image: {why}. Replace or delete it.")
        self.why = why


def open_image(path: Path) -> Image.Image:
    """Decode an image file, or the first frame of an animation, to 8-bit RGB with its EXIF orientation applied.

    16-bit greyscale is scaled to 8 bits (Pillow's own conversion clips it). Transparency is composited over white.

    Raises:
        UnreadableImage: the file is missing, empty, not a regular file, damaged, too large or of a format that is not
            in `FORMATS`.
    """
    with _errors_named(path), warnings.catch_warnings():
        check_regular(path)
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path, formats=_readable()) as image:
            return to_rgb(ImageOps.exif_transpose(image))


def verified_bytes(path: Path) -> bytes:
    """The bytes of an image file whose checksums and end are intact; its pixels are not decoded.

    Raises:
        UnreadableImage: as `open_image`.
    """
    with _errors_named(path):
        check_regular(path)
        data = path.read_bytes()
        with Image.open(io.BytesIO(data), formats=_readable()) as image:
            image.verify()
        return data


@contextmanager
def _errors_named(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise UnreadableImage(path, "it does not exist") from None
    except UnidentifiedImageError:
        empty = path.is_file() and path.stat().st_size == 0
        needed = missing_support(path)
        unknown = f"{path.suffix.lower()} needs {needed}" if needed else f"it is not one of {', '.join(FORMATS)}"
        why = "it is empty (0 bytes)" if empty else unknown
        raise UnreadableImage(path, why) from None
    except Exception as error:  # for damaged files decoders raise struct.error, KeyError, AttributeError and others
        raise UnreadableImage(path, reason(error)) from None


@cache
def _readable() -> list[str]:
    """The FORMATS that can be decoded here: what Pillow supports, and HEIF if pillow-heif is installed."""
    Image.init()
    with suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener()
    return [name for name in FORMATS if name in Image.OPEN]


def missing_support(path: Path) -> str | None:
    """What must be installed before images with this path's suffix can be opened; None if nothing is missing."""
    suffix = path.suffix.lower()
    name = "AVIF" if suffix == ".avif" else "HEIF"
    return REQUIREMENTS.get(suffix) if name not in _readable() else None


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to 8-bit RGB: 16-bit greyscale is scaled, transparency composited over white.

    Raises:
        ValueError: the range of its values is unknown (floating-point, 32-bit).
    """
    if image.mode == "F":
        raise ValueError("its values are floating-point numbers; save it with 8 or 16 bits per channel")
    if image.mode.startswith("I"):
        values = np.asarray(image, dtype=np.float64)
        is_16_bit = values.min() >= 0 and (values.max() == 0 or 255 < values.max() <= 65535)
        if image.mode == "I" and not is_16_bit:
            span = f"{values.min():.0f} to {values.max():.0f}"
            raise ValueError(f"its 32-bit values are {span}; save it with 8 or 16 bits per channel")
        scaled = np.clip(np.rint(values / 257), 0, 255).astype(np.uint8)
        return Image.fromarray(scaled, "L").convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


FLAT_RANGE = 2  # of 256 values in each channel: what compression leaves of an image of one colour


def is_flat(image: Image.Image) -> bool:
    """Whether an RGB image is of one flat colour, as the black squares of a safety filter are."""
    return all(high - low <= FLAT_RANGE for low, high in image.getextrema())  # type: ignore[misc]  # RGB: 3 pairs


def image_size(path: Path) -> tuple[int, int] | None:
    """Width and height that `open_image` gives, from the file's header alone; None if it is unreadable."""
    with suppress(UnreadableImage), _errors_named(path):
        check_regular(path)
        with Image.open(path, formats=_readable()) as image:
            is_on_its_side = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
            return (image.height, image.width) if is_on_its_side else image.size
    return None


def is_intact(path: Path) -> bool:
    """Whether a file exists and its checksums are right: not cut short or changed by a full disk or a broken copy."""
    try:
        verified_bytes(path)
    except UnreadableImage:
        return False
    return True


def png_note(path: Path, key: str) -> str | None:
    """A text in the header of a PNG file, without decoding its pixels; None if there is none or no such file."""
    with suppress(UnreadableImage), _errors_named(path):
        check_regular(path)
        with Image.open(path, formats=("PNG",)) as image:
            note = image.info.get(key)
            return note if isinstance(note, str) else None
    return None


def is_image_file(path: Path) -> bool:
    """Whether a path has the suffix of an image. Hidden files (macOS writes `._x.png` beside x.png) have not."""
    return not path.name.startswith(".") and path.suffix.lower() in IMAGE_SUFFIXES


def image_files(folder: Path, recursive: bool = False) -> list[Path]:
    """The image files of a folder by suffix, sorted; nothing hidden. What has the suffix need not be readable."""
    found = folder.rglob("*") if recursive else folder.glob("*")
    return sorted(
        path
        for path in found
        if is_image_file(path) and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
