"""The page of Gradio components and the web application around it, without a browser."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from export_runs import evaluated

from sd_unlearn import cli
from sd_unlearn.cli import main
from sd_unlearn.config.base import ReportConfig
from sd_unlearn.report.report import run as write_report
from sd_unlearn.seeds import SEED_SPAN
from sd_unlearn.ui.server import make_app
from sd_unlearn.ui.training import Training


def test_without_gradio_the_error_names_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["ui"]) == 1
    assert "pip install -e '.[ui]'" in capsys.readouterr().err


def test_a_wrong_port_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ui", "--port", "0"]) == 2
    assert "--port 0 must be at least 1 and at most 65535" in capsys.readouterr().err


def test_the_page_names_no_other_host_and_serves_only_reports(tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="Gradio is not installed (pip install -e '.[ui]')")
    from starlette.testclient import TestClient

    run = evaluated(tmp_path / "runs" / "brad")
    write_report(ReportConfig(run=run))
    client = TestClient(make_app(tmp_path, Training(tmp_path)), base_url="http://127.0.0.1")
    html = client.get("/").text
    assert "runs/brad" in html
    config = client.get("/config").json()
    assert config["analytics_enabled"] is False
    seeds = [part["props"] for part in config["components"] if part["props"].get("label") == "Seed"]
    assert [seed["maximum"] for seed in seeds] == [SEED_SPAN - 1] * 2
    assert not re.search(r"fonts\.googleapis|gradio\.live", html)
    report = client.get("/reports/runs/brad/report.html")
    assert report.status_code == 200
    assert report.headers["content-security-policy"].startswith("sandbox")
    for path in ("runs/brad/training.json", "%2e%2e/report.html", "runs/nowhere/report.html"):
        assert client.get(f"/reports/{path}").status_code == 404
    for path in (run / "training.json", run / "report.html", Path("/etc/hostname")):
        assert client.get(f"/gradio_api/file={path}").status_code in (403, 404)
    assert client.get("/", headers={"Host": "evil.example"}).status_code == 400
    upload = {"url": "/gradio_api/upload", "files": {"files": ("a.txt", b"a")}}
    assert client.post(**upload, headers={"Origin": "http://127.0.0.1"}).status_code == 200
    for origin in ("http://evil.example", "null"):
        assert client.post(**upload, headers={"Origin": origin}).status_code == 403


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_the_page_ends_without_a_traceback_while_it_is_open(number: int) -> None:
    pytest.importorskip("gradio", reason="Gradio is not installed (pip install -e '.[ui]')")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "sd_unlearn", "ui", "--port", str(port)]
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1]), "SD_UNLEARN_DEBUG": ""}
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        heartbeat = open_page(f"http://127.0.0.1:{port}/gradio_api/heartbeat/x", server)
        heartbeat.readline()
        server.send_signal(number)
        _, said = server.communicate(timeout=60)
    finally:
        server.kill()
    assert server.returncode == 0
    assert said.splitlines() == [f"sd-unlearn ui: http://127.0.0.1:{port}  (Ctrl-C to stop)"]


def open_page(url: str, server: subprocess.Popen[str]) -> Any:
    for _ in range(1200):
        assert server.poll() is None, server.communicate()[1]
        try:
            return urllib.request.urlopen(url)
        except urllib.error.URLError:  # not yet
            time.sleep(0.1)
    raise AssertionError("the page was not served within two minutes")
