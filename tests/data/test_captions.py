"""Own captions: metadata.jsonl, .csv and .parquet, and text files next to images."""

from __future__ import annotations

import json
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from sd_unlearn.data.captions import Caption, read_captions
from sd_unlearn.data.concept import Concept
from sd_unlearn.data.dataset import describe_images, fingerprint, scan, scan_positives
from sd_unlearn.data.encoding import describe_long_captions, encode_captions
from sd_unlearn.errors import UsageError
from sd_unlearn.io.images import open_image
from sd_unlearn.io.run_folder import METADATA, NEGATIVE, POSITIVE, UNLABELED
from sd_unlearn.models.base import Base

pytestmark = pytest.mark.usefixtures("one_thread")
Photos = Callable[..., Path]
GENERIC = "a photo of a man"


def captions(folder: Path, concept: Concept) -> dict[str, str]:
    """File name -> caption of the unlabeled images."""
    return {e.path.name: e.caption for e in scan(folder, concept) if e.path.parent.name == UNLABELED}


def refusal(folder: Path, concept: Concept) -> str:
    with pytest.raises(UsageError) as caught:
        scan(folder, concept)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("--data_dir")
    return str(caught.value)


def write_lines(folder: Path, *lines: dict[str, object]) -> None:
    (folder / METADATA).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def test_metadata_with_a_byte_order_mark(photos: Photos, concept: Concept) -> None:
    """As Windows' Notepad saves it."""
    folder = photos()
    line = '{"file_name": "1.png", "text": "a dog"}\n'
    (folder / UNLABELED / METADATA).write_bytes(b"\xef\xbb\xbf" + line.encode())
    assert captions(folder, concept) == {"0.png": GENERIC, "1.png": "a dog", "2.png": GENERIC}


def test_csv(photos: Photos, concept: Concept) -> None:
    folder = photos()
    text = '\ufefffile_name,width,text,group\r\n0.png,40,"a dog, ""Rex"", sleeping",keep\r\n./2.png,40,an umbrella,\r\n'
    (folder / UNLABELED / "metadata.csv").write_text(text, encoding="utf-8", newline="")
    assert captions(folder, concept) == {"0.png": 'a dog, "Rex", sleeping', "1.png": GENERIC, "2.png": "an umbrella"}
    assert [e.group for e in scan(folder, concept)[:3]] == ["keep", "generic", "generic"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file_name,text\n0.png,a dog, asleep\n", "line 2 has more than the 2 columns"),  # would be cut at the comma
        ("file_name;text\n0.png;a dog\n", "columns file_name;text. It needs file_name and text"),
        ("0.png,a dog\n", "It needs file_name and text"),
        ("", r"the columns (none)"),
        ("file_name,caption\n0.png,a dog\n", "text"),
        ("file_name,text\n0.png\n", "line 2"),
        ('file_name,text\n0.png,"a dog\n1.png,a cat\n', "is not valid CSV"),
        ("file_name,text\n9.png,a dog\n", "line 2 names 9.png"),
    ],
)
def test_invalid_csv_is_refused(photos: Photos, concept: Concept, text: str, message: str) -> None:
    folder = photos()
    (folder / UNLABELED / "metadata.csv").write_text(text, encoding="utf-8")
    assert message in refusal(folder, concept)


def test_parquet(photos: Photos, concept: Concept) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    folder, columns = photos(), {"file_name": ["0.png", "1.png"], "text": ["a dog", "a cat"], "size": [b"x", None]}
    path = folder / UNLABELED / "metadata.parquet"
    parquet.write_table(pyarrow.table(columns), path)
    assert captions(folder, concept) == {"0.png": "a dog", "1.png": "a cat", "2.png": GENERIC}
    parquet.write_table(pyarrow.table(columns | {"file_name": ["0.png", "9.png"]}), path)
    assert "metadata.parquet row 2 names 9.png" in refusal(folder, concept)
    whole = path.read_bytes()
    for damaged in (b"", b"PAR1", whole[:-5], whole[:40] + whole[60:], b"text,file_name\n"):
        path.write_bytes(damaged)
        assert "metadata.parquet is not valid Parquet" in refusal(folder, concept)


def test_parquet_without_pyarrow(photos: Photos, concept: Concept, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    folder = photos()
    (folder / UNLABELED / "metadata.parquet").write_bytes(b"PAR1")
    assert "needs pyarrow: pip install -e '.[parquet]'" in refusal(folder, concept)


def test_several_metadata_files_are_refused(photos: Photos, concept: Concept) -> None:
    folder = photos()
    for name in (METADATA, "metadata.csv"):
        (folder / POSITIVE / name).write_text("file_name,text\n")
    assert "several metadata files: metadata.jsonl, metadata.csv" in refusal(folder, concept)


def test_text_files_as_in_kohyas_scripts(photos: Photos, concept: Concept) -> None:
    folder = photos(unlabeled=4)
    (folder / UNLABELED / "0.txt").write_bytes(b"\xef\xbb\xbfa dog in the snow \r\nsecond line\r\n")
    (folder / UNLABELED / "1.png.txt").write_text("a cat")
    (folder / UNLABELED / "notes.txt").write_text("of no image")
    (folder / UNLABELED / "2.txt").write_text("from the text file")
    write_lines(folder / UNLABELED, {"file_name": "2.png", "text": "from metadata"})
    (folder / POSITIVE / "1.txt").write_text("Brad, smiling")
    assert captions(folder, concept) == {
        "0.png": "a dog in the snow",
        "1.png": "a cat",
        "2.png": "from metadata",
        "3.png": GENERIC,
    }
    assert [e.caption for e in scan(folder, concept) if e.is_positive] == [concept.caption, "Brad, smiling"]
    assert [e.own_caption for e in scan(folder, concept)] == [True, True, True, False, False, True]
    (folder / UNLABELED / "0.txt").write_bytes(b"\xff\xfe\x00d")
    assert f"{folder / UNLABELED / '0.txt'} is not UTF-8" in refusal(folder, concept)


def test_caption_files_of_any_case_and_suffix(photos: Photos, concept: Concept) -> None:
    folder = photos(unlabeled=4)
    for name in ("0.TXT", "1.png.caption", "2.Caption", "3.caption", "3.txt", "notes.CAPTION"):
        (folder / UNLABELED / name).write_text(f"of {name}")
    assert list(captions(folder, concept).values()) == ["of 0.TXT", "of 1.png.caption", "of 2.Caption", "of 3.txt"]
    assert "4 with own captions, notes.CAPTION without an image" in describe_images(folder, scan(folder, concept))


def test_errors_about_captions_of_positives_name_the_option(photos: Photos, concept: Concept) -> None:
    positives = photos(unlabeled=4) / POSITIVE
    (positives / "1.txt").write_bytes(b"\xff\xfe\x00d")
    lines: list[dict[str, object]] = [{"file_name": "x.png", "text": ""}, {"file_name": "0.png"}]
    for content in (None, *lines):
        if content:
            write_lines(positives, content)
        with pytest.raises(UsageError, match="^--positives") as caught:
            scan_positives(positives, concept)
        assert "--data_dir" not in str(caught.value)


def test_metadata_of_the_whole_data_folder(photos: Photos, concept: Concept) -> None:
    """As in Hugging Face's imagefolder format, a file may name images of folders inside its own."""
    folder = photos()
    (folder / NEGATIVE).mkdir()
    Image.new("RGB", (8, 8)).save(folder / NEGATIVE / "n.png")
    write_lines(
        folder,
        {"file_name": f"{UNLABELED}/../{UNLABELED}/0.png", "text": "outer"},
        {"file_name": f"{UNLABELED}\\1.png", "text": "outer"},
        {"file_name": f"{NEGATIVE}/n.png", "text": "outer"},  # its folder is not read here
    )
    write_lines(folder / UNLABELED, {"file_name": "1.png", "text": "inner"})
    read = read_captions(folder)
    assert [read(folder / UNLABELED / f"{i}.png") for i in range(3)] == [Caption("outer"), Caption("inner"), None]


@pytest.mark.parametrize("name", ["./1.png", ".\\1.png", "x/../1.png", "é.png", "e\u0301.png", "a\\b.png"])
def test_file_names_are_normalized(photos: Photos, concept: Concept, name: str) -> None:
    folder = photos()
    target = {"é.png": "e\u0301.png", "e\u0301.png": "é.png", "a\\b.png": "a\\b.png"}.get(name, "1.png")
    (folder / UNLABELED / "1.png").rename(folder / UNLABELED / target)
    write_lines(folder / UNLABELED, {"file_name": name, "text": "a dog"})
    found = {unicodedata.normalize("NFC", key): text for key, text in captions(folder, concept).items()}
    assert found[unicodedata.normalize("NFC", target)] == "a dog"
    assert list(found.values()).count(GENERIC) == 2


@pytest.mark.parametrize(
    "name", ["../1_positive/0.png", "/etc/x.png", "", ".", "notes.txt", "._0.png", "0.PNG", "a\0b"]
)
def test_lines_that_match_no_image_are_named(photos: Photos, concept: Concept, name: str) -> None:
    folder = photos()
    for other in ("notes.txt", "._0.png"):
        (folder / UNLABELED / other).write_text("no image")
    lines = [{"file_name": file, "text": "x"} for file in ("0.png", name, "gone.png")]
    write_lines(folder / UNLABELED, *lines)
    message = refusal(folder, concept)
    assert f"{METADATA} line 2 names {name}, which is missing; 2 of 3 lines match no image" in message
    assert ('Did you mean "0.png"?' in message) == (name == "._0.png")


def test_two_captions_of_one_image_are_refused(photos: Photos, concept: Concept) -> None:
    folder = photos()
    write_lines(folder / POSITIVE, {"file_name": "0.png", "text": "x"}, {"file_name": "./0.png", "text": "y"})
    assert "line 2 names ./0.png again, after line 1" in refusal(folder, concept)


@pytest.mark.parametrize("sub", [UNLABELED, POSITIVE])
def test_unknown_groups_are_refused(photos: Photos, concept: Concept, sub: str) -> None:
    folder = photos()
    write_lines(folder / sub, {"file_name": "0.png", "text": "x", "group": "kept"})
    message = refusal(folder, concept)
    assert 'line 1: unknown group "kept". Did you mean "keep"? Known: generic, mixed_in, keep' in message
    for empty in (None, ""):
        write_lines(folder / sub, {"file_name": "0.png", "text": "x", "group": empty})
        assert {e.group for e in scan(folder, concept)} == {"generic", "positive"}


@pytest.mark.parametrize("text", ["", "  ", "\t\n"])
def test_blank_captions_are_the_empty_caption(loaded_base: Base, photos: Photos, concept: Concept, text: str) -> None:
    folder = photos()
    write_lines(folder / UNLABELED, {"file_name": "0.png", "text": text})
    (folder / UNLABELED / "1.txt").write_text(text)
    assert captions(folder, concept) == {"0.png": "", "1.png": "", "2.png": GENERIC}
    assert describe_images(folder, scan(folder, concept)).endswith(": 5 images, 2 with own captions (2 empty).")
    empty, blank = encode_captions(loaded_base, ["", text])
    assert empty.equal(blank)


def test_long_captions_are_counted(loaded_base: Base) -> None:
    limit = loaded_base.pipeline.tokenizer.model_max_length
    long = "a photo of a man " * limit
    assert describe_long_captions(loaded_base, ["a photo", ""]) == ""
    line = describe_long_captions(loaded_base, ["a photo", long, long + "b", long])
    assert line.startswith(f"3 images have captions longer than the {limit} tokens")
    assert line.endswith(f'"{long[:60]}..."')
    assert describe_long_captions(loaded_base, [long]).startswith("1 image has a caption longer")


def test_what_was_found_is_one_line(photos: Photos, concept: Concept, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sd_unlearn.io.images._readable", lambda: ["PNG"])  # pillow-heif is not installed
    folder = photos(unlabeled=4, positive=3)
    assert describe_images(folder, scan(folder, concept)) == f"{folder}: 7 images, 0 with own captions."
    for name in ("x.HEIC", "y.heic", "raw.CR2", "._y.png", ".DS_Store", "notes.txt"):
        (folder / POSITIVE / name).write_bytes(b"\0")
    write_lines(folder / POSITIVE, {"file_name": "x.HEIC", "text": "of a skipped image"})
    (folder / UNLABELED / "2.txt").write_text("own")
    found = describe_images(folder, scan(folder, concept))
    assert found == (
        f"{folder}: 7 images, 1 with own captions, notes.txt without an image of that name, "
        "3 skipped (.cr2 is not supported, .heic needs pillow-heif)."
    )
    for i in (0, 1):
        (folder / POSITIVE / f"{i}.png").unlink()
    assert "holds 1 images, 2 skipped (.heic needs pillow-heif). At least 2" in refusal(folder, concept)


def test_heic_is_read_with_pillow_heif(photos: Photos, concept: Concept) -> None:
    heif = pytest.importorskip("pillow_heif")
    folder = photos()
    image = Image.new("RGB", (64, 32), (250, 0, 0))
    image.paste((0, 0, 250), (0, 16, 64, 32))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    heif.from_pillow(image).save(folder / UNLABELED / "phone.HEIC", exif=exif.tobytes())
    assert len(scan(folder, concept)) == 6
    upright = open_image(folder / UNLABELED / "phone.HEIC")
    assert upright.size == (32, 64)
    assert upright.getpixel((28, 30))[0] > 200  # type: ignore[index]


def test_own_captions_do_not_change_the_fingerprint_of_rendered_folders(photos: Photos, concept: Concept) -> None:
    folder = photos()
    plain = fingerprint(scan(folder, concept))
    write_lines(folder / UNLABELED, *({"file_name": f"{i}.png", "text": GENERIC} for i in range(3)))
    assert fingerprint(scan(folder, concept)) == plain
