"""Atomic writes of files and folders: complete or absent, also when a block raises or the process is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tree
from safetensors.torch import save_file

from sd_unlearn.errors import UnlearnError, UsageError
from sd_unlearn.io.files import atomic_path, check_writable, host_id, write_bytes
from sd_unlearn.io.lock import remove_leftovers

ROOT = str(Path(__file__).parent.parent.parent)


def fill(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def test_a_new_file_and_its_parent_folders(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "a" / "b.bin") as temporary:
        assert temporary.parent == tmp_path / "a"
        temporary.write_bytes(b"content")
    assert (tmp_path / "a" / "b.bin").read_bytes() == b"content"
    assert tree(tmp_path) == {"a", "a/b.bin"}


def test_a_folder_replaces_a_folder_completely(tmp_path: Path) -> None:
    fill(tmp_path / "run", "old", "both")
    with atomic_path(tmp_path / "run") as temporary:
        fill(temporary, "both", "deep/new")
        assert tree(tmp_path / "run") == {"old", "both"}
    assert tree(tmp_path) == {"run", "run/both", "run/deep", "run/deep/new"}


def test_a_file_and_a_folder_never_replace_each_other(tmp_path: Path) -> None:
    """A file written to the name of a folder would delete everything in the folder."""
    fill(tmp_path, "file", "folder/inside")
    with pytest.raises(NotADirectoryError), atomic_path(tmp_path / "file") as temporary:
        fill(temporary, "new")
    with pytest.raises(UnlearnError, match=r"Cannot write .*folder: .*folder is a folder"):
        write_bytes(tmp_path / "folder", b"new")
    assert tree(tmp_path) == {"file", "folder", "folder/inside"}


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_follow_the_umask(tmp_path: Path, mask: int) -> None:
    """Whatever the writer set: safetensors and PEFT write files that only their owner may read."""
    before = os.umask(mask)
    try:
        with atomic_path(tmp_path / "folder") as temporary:
            fill(temporary, "deep/file")
            (temporary / "deep").chmod(0o700)
            (temporary / "deep" / "file").chmod(0o600)
        save_file({"x": torch.zeros(1)}, tmp_path / "plain.safetensors")
        with atomic_path(tmp_path / "x.safetensors") as temporary:
            save_file({"x": torch.zeros(1)}, temporary)
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    modes = {name: (tmp_path / name).stat().st_mode & 0o777 for name in tree(tmp_path)}
    del modes["plain.safetensors"]
    files = {"folder/deep/file": 0o666 & ~mask, "x.safetensors": 0o666 & ~mask}
    assert modes == {"folder": 0o777 & ~mask, "folder/deep": 0o777 & ~mask, **files}


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    dead, alive = dead_pid(), os.getppid()
    here = f"{dead}@{host_id()}"
    own = f".x.png.{os.getpid()}@{host_id()}.tmp"  # of an earlier process with the same id
    names = [f".adapter.{here}.tmp/half", own, f".config.yaml.{here}.old", "config.yaml"]
    of_others = [f".x.png.{alive}@{host_id()}.tmp", f".x.png.{dead}@0123abcd.tmp"]  # the second on another machine
    kept = [
        *of_others,
        ".x.tmp",
        f".draft.{dead}.tmp",
        f".x.{dead}.swp",
        "x.png",
        f"deep/.x.png.{here}.tmp",
        f"y.{dead}.tmp",
    ]
    fill(tmp_path, *names, *kept)
    remove_leftovers(tmp_path, ["other"])
    assert len(tree(tmp_path)) == len(names) + len(kept) + 2
    remove_leftovers(tmp_path)
    assert tree(tmp_path) == {*kept, "deep", "config.yaml"}
    remove_leftovers(tmp_path / "missing")


def test_a_folder_moved_aside_by_a_killed_process_returns(tmp_path: Path) -> None:
    """The kill came between the two renames that replace a folder."""
    here = f"{dead_pid()}@{host_id()}"
    fill(tmp_path, f".adapter.{here}.old/weights", f".adapter.{here}.tmp/new")
    remove_leftovers(tmp_path)
    assert tree(tmp_path) == {"adapter", "adapter/weights"}


@pytest.mark.parametrize("end", ["tmp", "old"])
def test_a_killed_process_with_the_same_id_does_not_disturb(tmp_path: Path, end: str) -> None:
    """As in a container that was restarted: each first process has the same id."""
    left = f".step-100.{os.getpid()}@{host_id()}.{end}"
    fill(tmp_path, f"{left}/half", *(["step-100/whole"] if end == "tmp" else []))
    with atomic_path(tmp_path / "step-100") as temporary:
        assert (tmp_path / "step-100").is_dir()  # moved aside by the killed process, it has its name back
        temporary.mkdir()
        fill(temporary, "new")
    assert tree(tmp_path) == {"step-100", "step-100/new"}


def test_containers_of_one_host_name_are_different_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    stat, namespace = os.stat, os.stat_result((0, 4026531836, *[0] * 8))
    monkeypatch.setattr(os, "stat", lambda path, *a, **k: namespace if "ns/pid" in str(path) else stat(path, *a, **k))
    assert (first := host_id()) == host_id()
    namespace = os.stat_result((0, 4026532617, *[0] * 8))
    assert host_id() != first


@pytest.mark.parametrize(("error", "times"), [(KeyboardInterrupt, 1), (OSError, 1), (OSError, 2)])
def test_a_folder_survives_if_its_replacement_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], times: int
) -> None:
    """Ctrl-C between the two renames, or a disk that fails; times: so often, so that it cannot be put back at once."""
    fill(tmp_path / "run", "old")
    replace, failed = Path.replace, []

    def interrupted(self: Path, to: Path) -> Path:
        if to == tmp_path / "run" and len(failed) < times:
            failed.append(self)
            raise error
        return replace(self, to)

    def write() -> None:
        with atomic_path(tmp_path / "run") as temporary:
            fill(temporary, "new")

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(error):
        write()
    monkeypatch.undo()
    remove_leftovers(tmp_path)
    assert tree(tmp_path) == {"run", "run/old"}


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_failing_block_keeps_the_old_content(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "x"
    fill(target if kind == "folder" else tmp_path, "x")
    before = tree(tmp_path)

    def fail() -> None:
        with atomic_path(target) as temporary:
            fill(temporary, "half") if kind == "folder" else temporary.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert tree(tmp_path) == before
    assert (target / "x" if kind == "folder" else target).read_text() == "x"


def test_a_block_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("old")
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "x"):
        pass
    assert (tmp_path / "x").read_text() == "old"


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_killed_process_leaves_the_old_content(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "x"
    fill(target if kind == "folder" else tmp_path, "x")
    write = "(t.mkdir(), (t / 'new').write_text('new'))" if kind == "folder" else "t.write_text('new')"
    code = f"""
import os, signal, sys
from pathlib import Path
from sd_unlearn.io.files import atomic_path
with atomic_path(Path(sys.argv[1])) as t:
    {write}
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code, str(target)], env={**os.environ, "PYTHONPATH": ROOT})
    assert done.returncode == -signal.SIGKILL
    assert (target / "x" if kind == "folder" else target).read_text() == "x"
    with atomic_path(target) as temporary:  # what the killed process left does not disturb the next one
        fill(temporary, "after") if kind == "folder" else temporary.write_text("after")
    assert (target / "after" if kind == "folder" else target).read_text() == "after"


def test_content_is_synced_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def synced(descriptor: int) -> None:
        events.append("sync")
        fsync(descriptor)

    def replaced(self: Path, to: Path) -> Path:
        events.append("replace")
        return replace(self, to)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    with atomic_path(tmp_path / "run") as temporary:
        fill(temporary, "a", "deep/b")
    assert events == ["sync", "sync", "replace", "sync"]  # two files, the rename, the parent folder


def test_a_folder_that_cannot_be_created_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UnlearnError, match=r"Cannot write .*x\.bin: .+\. Choose another folder\."):
        write_bytes(tmp_path / "file" / "x.bin", b"")
    with pytest.raises(UsageError, match=r"--output_dir .* cannot be written: .*file is not a writable folder"):
        check_writable(tmp_path / "file" / "deeper", "--output_dir")
    check_writable(tmp_path / "new" / "deeper", "--output_dir")
    assert tree(tmp_path) == {"file"}


@pytest.mark.parametrize("folder", ["/proc/x", "/proc/x/deeper", "x\0y", "n" * 300, "broken"])
def test_a_folder_is_checked_by_writing_to_it(tmp_path: Path, folder: str) -> None:
    """Permissions do not tell: root may do anything, but nothing can be created in /proc."""
    (tmp_path / "broken").symlink_to("missing")
    with pytest.raises(UsageError, match="--output_dir .* cannot be written"):
        check_writable(tmp_path / folder, "--output_dir")
    assert tree(tmp_path) == {"broken"}


def test_a_symlink_to_a_folder_is_writable(tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()
    (tmp_path / "link").symlink_to("big")
    check_writable(tmp_path / "link" / "run", "--output_dir")
    assert tree(tmp_path) == {"big", "link"}
