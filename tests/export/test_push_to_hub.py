"""--push_to_hub against a local server that speaks the hub's protocol; the token goes nowhere else."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from export_runs import SLUG, evaluated, exported, hand_run

from sd_unlearn.cli import main
from sd_unlearn.errors import UnlearnError, UsageError

TOKEN = "hf_aVerySecretTokenOfThisTest1234567"
REPO = "somebody/forget-brad"


class Hub(BaseHTTPRequestHandler):
    """Enough of the hub: make a repository, tell about it, ask how to upload, commit. Large files go inline, too."""

    def do_POST(self) -> None:
        server: Any = self.server
        body = self._body()
        server.seen.append((self.path, self.headers.get("Authorization")))
        if server.refuse and server.refuse in self.path:
            return self._answer({"error": f"Invalid credentials {self.headers.get('Authorization')}"}, 400)
        if self.path == "/api/repos/create":
            server.created.append(json.loads(body))
            return self._answer({"url": f"{server.url}/{REPO}"})
        if "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            return self._answer({"files": [{"uploadMode": "regular", "shouldIgnore": False} | f for f in asked]})
        if self.path == "/api/validate-yaml":
            return self._answer({"warnings": [], "errors": []})
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                server.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        return self._answer({"commitUrl": f"{server.url}/{REPO}/commit/1", "commitOid": "1", "success": True})

    def do_GET(self) -> None:
        server: Any = self.server
        self._answer({"id": REPO, "private": server.private, "siblings": [], "tags": []})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, data: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    made: Any = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    made.url = f"http://127.0.0.1:{made.server_port}"
    made.seen, made.created, made.files, made.private, made.refuse = [], [], {}, True, ""
    threading.Thread(target=made.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", made.url)
    monkeypatch.setattr(huggingface_hub.hf_api, "ENDPOINT", made.url, raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield made
    made.shutdown()
    made.server_close()


def test_lora_card_and_report_arrive_in_one_commit(server: Any, tmp_path: Path) -> None:
    run = evaluated(tmp_path / "run")
    (run / "report.html").write_text("<p>figures</p>")
    exported(run, push_to_hub=REPO, private=True)
    sent = {f.name: f.read_bytes() for f in (run / "export").iterdir()}
    assert server.files == sent | {"report.html": b"<p>figures</p>"}
    assert {"README.md", "pairs.png", f"{SLUG}.safetensors", "pytorch_lora_weights.safetensors"} <= server.files.keys()
    (made,) = server.created
    assert made["name"] == "forget-brad"
    assert made.get("visibility") == "private" or made.get("private") is True  # by release of huggingface_hub
    assert all(authorization == f"Bearer {TOKEN}" for _, authorization in server.seen)
    assert sum("/commit/" in path for path, _ in server.seen) == 1
    assert f'load_lora_weights("{REPO}"' in server.files["README.md"].decode()


def test_a_report_of_earlier_figures_stays_at_home(server: Any, tmp_path: Path) -> None:
    import os

    run = evaluated(tmp_path / "run")
    (run / "report.md").write_text("old")
    os.utime(run / "report.md", (1, 1))
    exported(run, push_to_hub=REPO)
    assert "report.md" not in server.files
    hand_run(tmp_path / "other")
    (tmp_path / "other" / "report.md").write_text("of nothing")
    server.files.clear()
    exported(tmp_path / "other", push_to_hub=REPO)
    assert "report.md" not in server.files


def test_a_public_repository_is_not_taken_for_a_private_one(server: Any, tmp_path: Path) -> None:
    server.private = False
    with pytest.raises(UnlearnError, match=f"{REPO} already exists and is public"):
        exported(hand_run(tmp_path / "run"), push_to_hub=REPO, private=True)
    assert not server.files


@pytest.mark.parametrize("refuse", ["", "/create", "/preupload/", "/commit/"])
@pytest.mark.parametrize("debug", [True, False])
def test_the_token_is_nowhere_but_in_the_requests(
    server: Any,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    refuse: str,
    debug: bool,
) -> None:
    """Also where the hub's answer repeats it, and in a traceback."""
    caplog.set_level("DEBUG")
    server.refuse = refuse
    run = evaluated(tmp_path / "run")
    code = main(["export", "--run", str(run), "--push_to_hub", REPO, *(["--debug"] * debug)])
    said = capfd.readouterr()
    assert code == (1 if refuse else 0)
    assert server.seen, "it was asked"
    if refuse:
        assert f"--push_to_hub {REPO} failed" in said.err
    logged = "\n".join(record.getMessage() for record in caplog.records)
    assert TOKEN not in said.out + said.err + logged
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert files
    assert not [file for file in files if TOKEN.encode() in file.read_bytes()]
    assert hashlib.sha256(TOKEN.encode()).hexdigest() not in said.out + said.err


@pytest.mark.parametrize("name", ["no-owner", "a/b/c", "-x/y", "https://huggingface.co/a/b", "a/b c"])
def test_what_is_no_repository_is_refused_before_anything_is_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="--push_to_hub .*owner/name"):
        exported(hand_run(tmp_path / "run"), push_to_hub=name)
    assert not (tmp_path / "run" / "export").exists()


def test_a_missing_token_is_named_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UsageError, match="HF_TOKEN"):
        exported(hand_run(tmp_path / "run"), push_to_hub=REPO)
    assert not (tmp_path / "run" / "export").exists()


def test_a_hub_that_does_not_answer_is_named(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def down(*_: Any, **__: Any) -> None:
        raise ConnectionError(f"no route to host {TOKEN}")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", down)
    with pytest.raises(UnlearnError, match=r"failed: no route to host \*\*\*\. The files are written") as caught:
        exported(hand_run(tmp_path / "run"), push_to_hub=REPO)
    assert caught.value.__suppress_context__
