"""Slugs, seeds of disjoint ranges, and reading and writing of files."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from conftest import tree

from sd_unlearn.errors import UnlearnError, UsageError
from sd_unlearn.io.files import write_json, write_jsonl, write_text
from sd_unlearn.io.paths import concept_slug, slugify
from sd_unlearn.io.reading import read_json, read_jsonl, read_yaml
from sd_unlearn.io.run_folder import ImageRecord
from sd_unlearn.seeds import EVALUATE_SEEDS, RENDER_SEEDS, TRAIN_SEEDS, image_seed

SPANS = (RENDER_SEEDS, TRAIN_SEEDS, EVALUATE_SEEDS)


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("seven", "seven"),
        ("Brad Pitt", "brad-pitt"),
        ("a/b", "a-b"),
        ("a\\b", "a-b"),
        ("../../etc", "etc"),
        ("/etc/passwd", "etc-passwd"),
        ("C:\\x", "c-x"),
        ("v1.4.", "v1-4"),
        ('"quo\'ted"', "quo-ted"),
        ("Beyoncé", "beyonce"),
        ("two\nlines\t", "two-lines"),
        ("--flag", "flag"),
        ("x" * 300, "x" * 60),
    ],
)
def test_slugs(name: str, slug: str) -> None:
    assert slugify(name) == slug


@pytest.mark.parametrize("name", ["🙂", "🙃", "...", "../..", "", " ", "/", "東京", "\0"])
def test_a_name_without_latin_letters_still_has_a_slug(name: str) -> None:
    assert re.fullmatch(r"concept-[0-9a-f]{8}", slugify(name))
    assert slugify(name) == slugify(name)


def test_names_without_latin_letters_have_different_slugs() -> None:
    assert len({slugify(name) for name in ("🙂", "🙃", "...", "", "東京")}) == 5


def test_slugs_of_concepts_differ_where_letters_have_no_latin_equivalent() -> None:
    names = [
        "ゴジラ 2",
        "鉄腕アトム 2",
        "2",
        "Pelé 東京",
        "Pelé",
        "Weiß",
        "Wei",
        "東京",
        *("x" * 80 + c for c in "東京"),
    ]
    slugs = [concept_slug(name) for name in names]
    assert len(set(slugs)) == len(names)
    assert max(map(len, slugs)) <= 60
    assert all(concept_slug(slug) == slugify(slug) == slug for slug in slugs)
    assert concept_slug("Pelé_東京 ") == concept_slug("pele\u0301 東京")
    for name in ("Brad Pitt", "Beyoncé", "C++", "a/b", "...", "東京", "🙂", "red 🙂"):
        assert concept_slug(name) == slugify(name)


def test_every_slug_is_a_plain_file_name() -> None:
    for code in range(0x3000):
        slug = slugify(f"{chr(code)}a{chr(code)}b" + "-" * (code % 80) + "c")
        assert re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,58}[a-z0-9])?", slug)


def test_seeds_of_the_three_purposes_are_disjoint() -> None:
    ordered = sorted(SPANS)
    assert all(a[0] < a[1] for a in ordered)
    assert all(a[1] <= b[0] for a, b in zip(ordered, ordered[1:], strict=False))
    for span in SPANS:
        seeds = [image_seed(span, seed, "a prompt", i) for seed in (0, 1, -5, 10**12) for i in range(200)]
        assert all(span[0] <= s < span[1] for s in seeds)
        assert len(set(seeds)) == len(seeds)


def test_seeds_are_stable_between_versions() -> None:
    """A change here changes every generated image."""
    assert image_seed(RENDER_SEEDS, 0, "a photo of Brad Pitt", 0) == 992_725_059
    assert image_seed(EVALUATE_SEEDS, 7, "eine Ziffer in grüner Tinte", 3) == 2_442_550_780


def test_a_seed_depends_on_each_of_its_parts() -> None:
    seeds = {image_seed(RENDER_SEEDS, *parts) for parts in ((0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1))}
    assert len(seeds) == 4
    assert image_seed(RENDER_SEEDS, 1, "1", 1) != image_seed(RENDER_SEEDS, 11, "", 1)


def test_write_text_replaces_and_leaves_no_other_file(tmp_path: Path) -> None:
    target = tmp_path / "new" / "x.txt"
    write_text(target, "one")
    write_text(target, "zwölf\n")
    assert target.read_text(encoding="utf-8") == "zwölf\n"
    assert tree(tmp_path) == {"new", "new/x.txt"}


def test_a_reader_never_sees_half_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "x.txt"
    write_text(target, "old")
    seen = []
    rename = Path.replace

    def watched(self: Path, to: Path) -> Path:
        seen.append((self.read_text(), to.read_text()))
        return rename(self, to)

    monkeypatch.setattr(Path, "replace", watched)
    write_text(target, "new and longer")
    assert seen == [("new and longer", "old")]


def test_a_full_disk_keeps_the_old_file_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "x.txt"
    write_text(target, "old")

    def full(self: Path, to: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(UnlearnError, match=r"x\.txt.*No space left"):
        write_text(target, "new")
    assert target.read_text() == "old"
    assert tree(tmp_path) == {"x.txt"}


@pytest.mark.parametrize("below", ["file/x.txt", "file/deeper/x.txt"])
def test_a_path_that_cannot_be_written_is_named(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UnlearnError, match=r"x\.txt"):
        write_text(tmp_path / below, "text")
    assert tree(tmp_path) == {"file"}


def test_json_round_trips(tmp_path: Path) -> None:
    data = {"a": [1, 2.5, None], "ü": "🙂"}
    write_json(tmp_path / "x.json", data)
    assert read_json(tmp_path / "x.json") == data
    records = [ImageRecord("a.png", 'a "é"\n', 1, 3.0, 25, "generic"), ImageRecord("b.png", "", 2, 3.0, 25, "keep")]
    write_jsonl(tmp_path / "x.jsonl", records)
    assert [ImageRecord(**line) for line in read_jsonl(tmp_path / "x.jsonl")] == records


@pytest.mark.parametrize("text", ["two\u2028lines", "next\x85line", "form\x0cfeed", "\n", "🙂"])
def test_any_caption_is_one_line(tmp_path: Path, text: str) -> None:
    record = ImageRecord("a.png", text, 1, 3.0, 25, "generic")
    write_jsonl(tmp_path / "x.jsonl", [record, record])
    assert [line["text"] for line in read_jsonl(tmp_path / "x.jsonl")] == [text, text]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00"])
def test_damaged_json_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UsageError, match=r"x\.json"):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize("content", [b'{"a": 1}\n{', b'{"a": 1}\n[1]\n', b'{"a": 1}\n{"b": "\xff"}\n'])
def test_damaged_jsonl_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(UsageError, match=r"x\.jsonl"):
        read_jsonl(tmp_path / "x.jsonl")


UNREADABLE = {
    "deep": b'{"a":' + 100_000 * b"[",
    "huge": b'{"a": ' + 5_000 * b"9" + b"}",
    "utf16": '{"a": 1}'.encode("utf-16"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_every_reader_names_a_file_that_it_cannot_parse(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.data"
    path.write_bytes(UNREADABLE[kind])
    for read in (read_json, read_jsonl, lambda path: read_yaml(path, "--config")):
        with pytest.raises(UsageError, match=r"x\.data"):
            read(path)


def test_every_reader_names_a_file_that_is_missing_or_a_folder(tmp_path: Path) -> None:
    for read in (read_json, read_jsonl):
        with pytest.raises(UsageError, match=r"x\.json does not exist"):
            read(tmp_path / "x.json")
    with pytest.raises(UsageError, match=r"--config .*x\.yaml: No such file"):
        read_yaml(tmp_path / "x.yaml", "--config")
    for read in (read_json, read_jsonl, lambda path: read_yaml(path, "--config")):
        with pytest.raises(UsageError, match=r"cannot be read: Is a directory"):
            read(tmp_path)


def test_a_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes('\ufeff{"a": 1}'.encode())
    assert read_json(path) == {"a": 1}
    assert read_jsonl(path) == [{"a": 1}]
    assert read_yaml(path, "--config") == {"a": 1}


ODD_JSON = {"half a surrogate pair": rb'{"a": ["\ud83d"]}', "a key of half a pair": rb'{"\ud83d": 1}'}
ODD_YAML = {
    **ODD_JSON,
    "aliases": b"a: &a [1,1,1,1,1,1,1,1,1,1]\n"
    + b"".join(b"%c: &%c [%s]\n" % (n, n, b",".join([b"*%c" % (n - 1)] * 10)) for n in range(ord("b"), ord("k"))),
    "endless": b"a: &a [*a]",
    "hexadecimal": b"a: 0x" + 10_000 * b"f",
    "empty int": b'a: !!int ""',
    "no bool": b"a: !!bool x",
    "no date": b"a: !!timestamp x",
}


@pytest.mark.parametrize("kind", ODD_JSON)
def test_text_that_cannot_be_written_again_is_named(tmp_path: Path, kind: str) -> None:
    (tmp_path / "x.data").write_bytes(ODD_JSON[kind])
    for read in (read_json, read_jsonl):
        with pytest.raises(UsageError, match=r"x\.data.*not valid Unicode"):
            read(tmp_path / "x.data")


@pytest.mark.parametrize("kind", ODD_YAML)
def test_odd_yaml_is_named(tmp_path: Path, kind: str) -> None:
    (tmp_path / "x.yaml").write_bytes(ODD_YAML[kind])
    with pytest.raises(UsageError, match=r"--config .*x\.yaml is not valid YAML"):
        read_yaml(tmp_path / "x.yaml", "--config")


def test_a_surrogate_pair_is_one_character(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(r'{"a": "\ud83d\ude00"}')
    assert read_json(tmp_path / "x.json") == {"a": "\U0001f600"}


def test_pipes_devices_and_odd_names_are_refused_and_do_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nothing")
    for path in (tmp_path / "pipe", tmp_path / "loop", tmp_path / "dangling", tmp_path / "a\0b", Path("/dev/zero")):
        for read in (read_json, read_jsonl, lambda path: read_yaml(path, "--config")):
            with pytest.raises(UsageError, match=re.escape(path.name)):
                read(path)


def test_text_that_is_not_unicode_is_refused_before_writing(tmp_path: Path) -> None:
    with pytest.raises(UnlearnError, match=r"x\.txt"):
        write_text(tmp_path / "x.txt", "\ud83d")
    assert list(tmp_path.iterdir()) == []
