"""The image opener: 8-bit RGB, upright, over white; anything it cannot decode is one clear error."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sd_unlearn
from sd_unlearn.errors import UsageError
from sd_unlearn.io.images import (
    UnreadableImage,
    image_files,
    image_size,
    is_flat,
    missing_support,
    open_image,
    png_note,
    to_rgb,
)

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def pixel(path: Path, x: int = 0, y: int = 0) -> tuple[int, ...]:
    image = open_image(path)
    assert image.mode == "RGB"
    color = image.getpixel((x, y))
    assert isinstance(color, tuple)
    return color


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "gif", "webp", "jpg", "avif"])
def test_every_format_by_its_content(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    Image.new("RGB", (8, 8), RED).save(path, **({"lossless": True} if suffix == "webp" else {}))
    renamed = path.rename(tmp_path / "x.png")  # the suffix does not matter
    assert np.abs(np.subtract(pixel(renamed), RED)).max() <= 2


def test_16_bit_greyscale_is_scaled(tmp_path: Path) -> None:
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "x.png")
    assert np.asarray(open_image(tmp_path / "x.png"))[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize(
    ("values", "why"),
    [
        (np.array([[0.0, 1.0]], dtype=np.float32), "floating-point numbers; save it with 8 or 16 bits"),
        (np.array([[0, 255]], dtype=np.int32), "32-bit values are 0 to 255; save it with 8 or 16 bits"),
        (np.array([[0, 70_000]], dtype=np.int32), "32-bit values are 0 to 70000"),
        (np.array([[-300, 300]], dtype=np.int32), "32-bit values are -300 to 300"),
    ],
)
def test_values_of_an_unknown_range_are_refused(tmp_path: Path, values: np.ndarray, why: str) -> None:
    Image.fromarray(values).save(tmp_path / "x.tiff")
    with pytest.raises(UnreadableImage, match=rf"x\.tiff cannot be read as an image: its .*{why}"):
        open_image(tmp_path / "x.tiff")


def test_16_bits_in_32_are_scaled(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 65535]], dtype=np.int32)).save(tmp_path / "x.tiff")
    assert (pixel(tmp_path / "x.tiff"), pixel(tmp_path / "x.tiff", 1)) == ((0, 0, 0), WHITE)


def test_transparency_is_over_white(tmp_path: Path) -> None:
    for name, color in (("clear", (*RED, 0)), ("half", (*RED, 128)), ("opaque", (*RED, 255))):
        Image.new("RGBA", (4, 4), color).save(tmp_path / f"{name}.png")
    assert pixel(tmp_path / "clear.png") == WHITE
    assert pixel(tmp_path / "half.png") == (255, 127, 127)
    assert pixel(tmp_path / "opaque.png") == RED
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([*BLUE, *RED])
    palette.save(tmp_path / "palette.png", transparency=0)
    assert pixel(tmp_path / "palette.png") == WHITE
    assert to_rgb(Image.new("LA", (1, 1), (0, 0))).getpixel((0, 0)) == WHITE


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (16, 8), BLUE)
    image.paste(RED, (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise
    image.save(tmp_path / "x.png", exif=exif)
    assert open_image(tmp_path / "x.png").size == (8, 16)
    assert (pixel(tmp_path / "x.png", 4, 0), pixel(tmp_path / "x.png", 4, 15)) == (RED, BLUE)


def test_the_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in (RED, BLUE)]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert pixel(tmp_path / "x.gif") == RED


def test_eps_is_never_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: pytest.fail("Ghostscript was started"))
    path = tmp_path / "x.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
    with pytest.raises(UnreadableImage, match="not one of PNG"):
        open_image(path)


def damaged(tmp_path: Path, kind: str) -> Path:
    path = tmp_path / "x.png"
    Image.effect_noise((64, 64), 50).save(path)
    content = path.read_bytes()
    path.write_bytes(
        {"empty": b"", "text": b"no image", "cut": content[: len(content) // 2], "head": content[:20]}[kind]
    )
    return path


@pytest.mark.parametrize("kind", ["empty", "text", "cut", "head"])
def test_an_unreadable_image_is_named_with_the_reason(tmp_path: Path, kind: str) -> None:
    path = damaged(tmp_path, kind)
    with pytest.raises(UsageError, match=r"x\.png cannot be read as an image: .+\. Replace or delete it\.$") as caught:
        open_image(path)
    assert isinstance(caught.value, UnreadableImage)
    assert caught.value.why
    assert "x.png" not in caught.value.why
    assert ("0 bytes" in caught.value.why) == (kind == "empty")


def test_a_missing_image_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UnreadableImage, match="does not exist"):
        open_image(tmp_path / "none.png")
    with pytest.raises(UnreadableImage, match="directory"):
        open_image(tmp_path)


def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("1", (100, 100)).save(tmp_path / "x.png")
    for limit in (9_000, 1_000):  # above the limit Pillow warns, above twice the limit it raises
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(UnreadableImage, match="10000 pixels"):
            open_image(tmp_path / "x.png")


def test_pipes_devices_and_odd_names_are_refused_and_do_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "dangling.png").symlink_to("nothing.png")
    for name in ("pipe.png", "loop.png", "dangling.png", "a\0b.png", "/dev/zero"):
        with pytest.raises(UnreadableImage, match=name.rpartition("/")[2]):
            open_image(tmp_path / name)
        assert image_size(tmp_path / name) is None
        assert png_note(tmp_path / name, "note") is None


def test_an_eps_in_a_png_starts_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    )
    started: list[object] = []
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **_: started.append(args))
    monkeypatch.setattr(subprocess, "check_call", lambda *args, **_: started.append(args))
    with pytest.raises(UnreadableImage, match="not one of PNG, JPEG"):
        open_image(tmp_path / "x.png")
    assert started == []


def test_only_this_module_opens_image_files() -> None:
    """Image.open without a list of formats may start Ghostscript."""
    package = Path(sd_unlearn.__file__).parent
    files = {file.relative_to(package).as_posix(): file.read_text(encoding="utf-8") for file in package.rglob("*.py")}
    opening = re.compile(r"\bImage\.open\(.*|\bimread\(|\bread_image\(|\bload_image\(|\bdefault_loader")
    calls = [(name, call) for name, text in files.items() for call in opening.findall(text)]
    assert {name for name, _ in calls} == {"io/images.py"}
    assert all("formats=" in call for _, call in calls)


def test_photos_of_phones_with_two_images_in_a_jpeg(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8), RED)
    image.save(tmp_path / "x.jpg", "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8), BLUE)])
    assert np.abs(np.subtract(pixel(tmp_path / "x.jpg"), RED)).max() <= 2


def test_what_an_unsupported_format_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sd_unlearn.io.images._readable", lambda: ["PNG"])
    for name, needed in (("x.HEIC", ".heic needs pillow-heif"), ("x.avif", ".avif needs Pillow 11.3")):
        (tmp_path / name).write_bytes(b"not decoded")
        with pytest.raises(UnreadableImage, match=needed):
            open_image(tmp_path / name)
        assert missing_support(tmp_path / name)
    assert missing_support(tmp_path / "x.jpg") is None
    monkeypatch.setattr("sd_unlearn.io.images._readable", lambda: ["AVIF", "HEIF"])
    assert missing_support(tmp_path / "x.HEIC") is None


def test_hidden_files_and_folders_are_not_images(tmp_path: Path) -> None:
    """macOS writes ._x.png beside x.png on other file systems."""
    names = ["b.png", "a.JPG", "._a.JPG", ".hidden.png", "notes.txt", "sub/c.webp", "sub/._c.webp", ".trash/d.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in image_files(tmp_path)] == ["a.JPG", "b.png"]
    assert [path.name for path in image_files(tmp_path, recursive=True)] == ["a.JPG", "b.png", "c.webp"]
    assert image_files(tmp_path / "none") == []


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_flat_images_are_of_one_colour(tmp_path: Path, suffix: str) -> None:
    image = Image.new("RGB", (16, 16), (10, 0, 200))
    image.save(tmp_path / f"flat.{suffix}", quality=60)
    assert is_flat(open_image(tmp_path / f"flat.{suffix}"))
    image.putpixel((3, 3), (40, 0, 200))
    assert not is_flat(image)


def test_the_size_in_the_header_is_that_of_the_opened_image(tmp_path: Path) -> None:
    image, exif = Image.new("RGB", (8, 4)), Image.Exif()
    exif[274] = 6  # lies on its side
    image.save(tmp_path / "a.jpg", exif=exif)
    image.save(tmp_path / "b.png")
    (tmp_path / "c.png").write_text("not an image")
    for name in ("a.jpg", "b.png"):
        assert image_size(tmp_path / name) == open_image(tmp_path / name).size
    assert image_size(tmp_path / "c.png") is None
