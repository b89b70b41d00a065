"""A stdout that is closed early, full or not UTF-8, and similar troubles: one line at most, no traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from report_results import make_results

from sd_unlearn.cli import BROKEN_PIPE

HELP = [sys.executable, "-m", "sd_unlearn", "train", "--help_all"]
EVALUATE = """
import json, sys
from sd_unlearn import cli
from sd_unlearn.evaluation import evaluate
evaluate.run = lambda config: json.load(open(sys.argv[1]))
sys.exit(cli.main(["evaluate", *sys.argv[2:]]))
"""


def evaluated(tmp_path: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """`evaluate` of finished results, in a process of its own."""
    (tmp_path / "results.json").write_text(
        json.dumps(make_results(concept={"name": "Beyoncé"}, conditions=[], failed=[]))
    )
    command = [sys.executable, "-c", EVALUATE, str(tmp_path / "results.json"), *options]
    return subprocess.run(command, capture_output=True, env=os.environ | environment, check=False)


def test_a_reader_of_stdout_may_stop_early(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps(make_results(conditions=[], failed=[])))
    command = [sys.executable, "-c", EVALUATE, str(tmp_path / "results.json")]
    for arguments, codes in ((command, {BROKEN_PIPE}), (HELP, {1, BROKEN_PIPE})):  # Rich, which prints help, exits by 1
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout
            assert process.stderr
            process.stdout.close()  # as head does
            assert process.stderr.read() == b""
            assert process.wait() in codes


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_stdout_is_one_line() -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(HELP, stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 1
    assert done.stderr.count(b"\n") == 1
    assert done.stderr.startswith(b"Error: Cannot read or write: No space left on device. Free some space")


def test_a_closed_stdout_is_no_error() -> None:
    done = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *HELP], stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_stdout_that_is_not_utf8_gets_question_marks(tmp_path: Path) -> None:
    utf8, ascii_only = (evaluated(tmp_path, PYTHONIOENCODING=encoding) for encoding in ("utf-8", "ascii"))
    assert (utf8.returncode, ascii_only.returncode) == (0, 0), ascii_only.stderr
    text = utf8.stdout.decode()
    assert "–" in text
    assert ascii_only.stdout.decode("ascii") == "".join(c if c.isascii() else "?" for c in text)


def test_json_on_a_stdout_that_is_not_utf8_stays_whole(tmp_path: Path) -> None:
    outputs: list[Any] = [
        json.loads(evaluated(tmp_path, "--json", PYTHONIOENCODING=encoding).stdout) for encoding in ("utf-8", "ascii")
    ]
    assert outputs[0] == outputs[1]
    assert outputs[0]["concepts"][0]["name"] == "Beyoncé"


def test_an_argument_that_is_not_utf8_is_refused() -> None:
    command = [sys.executable, "-m", "sd_unlearn", "train", b"--output_dir=\xff"]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(b"Error: the argument '--output_dir=\\udcff' is not UTF-8 text.")


def test_a_cache_folder_that_is_a_file_is_refused_before_anything_loads(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "direct").mkdir()
    (tmp_path / "images" / "direct" / "0.png").touch()
    options = ["--concept", "seven", "--images", str(tmp_path / "images"), "--cache_dir", str(tmp_path / "file")]
    command = [sys.executable, "-m", "sd_unlearn", "evaluate", *options, "--output_dir", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(b"Error: --cache_dir ")
