"""`sd-unlearn ui`: serve the page and the reports of the working folder, by default on this computer only."""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sd_unlearn.errors import UsageError, reason
from sd_unlearn.io.noise import SHOW
from sd_unlearn.ui.page import CSS, TITLE, build, import_gradio, theme
from sd_unlearn.ui.runs import report_file
from sd_unlearn.ui.training import Training

LOCAL, EVERYWHERE = "127.0.0.1", "0.0.0.0"
STOP_SECONDS = 60  # for a training to save its checkpoint when the page is closed
# Reports embed all they show. They run in an origin of their own, so that a foreign one cannot use the page.
REPORT_HEADERS = {
    "Content-Security-Policy": "sandbox allow-scripts allow-popups allow-downloads; default-src 'unsafe-inline' data:",
    "X-Content-Type-Options": "nosniff",
}


def run(port: int, listen: bool = False) -> None:
    """Serve the page until Ctrl-C, SIGTERM or SIGHUP; a training that runs is then stopped with a checkpoint.

    Raises:
        UnlearnError: Gradio is not installed.
        UsageError: the port is in use.
    """
    root = Path.cwd()
    host = EVERYWHERE if listen else LOCAL
    with tempfile.TemporaryDirectory(prefix="sd-unlearn-ui-") as cache:
        if Path(cache).resolve().is_relative_to(root):
            raise UsageError(
                f"The folder for temporary files, {Path(cache).parent}, lies in {root}, whose files the page must not "
                "show. Start sd-unlearn ui in another folder, or set TMPDIR to a folder outside."
            )
        os.environ["GRADIO_TEMP_DIR"] = cache  # images that the page shows
        training = Training(root)
        app = make_app(root, training, listen)
        _check_port(host, port)
        print(f"sd-unlearn ui: http://{LOCAL}:{port}  (Ctrl-C to stop)", file=sys.stderr)
        if listen:
            print(
                f"--listen: everyone who reaches port {port} of this computer can generate images, start and stop "
                f"trainings, and read reports and previews in {root}. There is no password and no encryption.",
                file=sys.stderr,
            )
        import uvicorn

        _end_as_ctrl_c()
        # An open page holds its connection: without a limit, Ctrl-C would wait for it to be closed. uvicorn then logs a
        # traceback for it.
        level = "warning" if os.environ.get(SHOW) else "critical"
        try:
            uvicorn.run(app, host=host, port=port, log_level=level, timeout_graceful_shutdown=1)
        finally:
            training.stop(wait=STOP_SECONDS)


class SameOrigin:
    """Middleware that refuses what other websites send to the page, e.g. uploads that fill the disk."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        headers = dict(scope.get("headers") or [])
        origin = headers.get(b"origin")
        if origin is not None and urlsplit(origin).netloc != headers.get(b"host"):
            from starlette.responses import PlainTextResponse

            await PlainTextResponse("This page answers only to itself.", 403)(scope, receive, send)
        else:
            await self.app(scope, receive, send)


def make_app(root: Path, training: Training, listen: bool = False) -> Any:
    """The web application (FastAPI): the page at /, reports at /reports/.

    Raises:
        UnlearnError: Gradio is not installed.
    """
    gradio = import_gradio()
    from fastapi import FastAPI
    from fastapi.responses import FileResponse, PlainTextResponse
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    app = FastAPI(title=TITLE, docs_url=None, redoc_url=None, openapi_url=None)
    if not listen:  # a website whose name leads here must not reach the page (DNS rebinding)
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[LOCAL, "localhost"])
        app.add_middleware(SameOrigin)

    @app.get("/reports/{path:path}")
    def report(path: str) -> Any:
        folder, _, name = path.rpartition("/")
        try:
            return FileResponse(report_file(root, folder or ".", name), headers=REPORT_HEADERS)
        except UsageError as error:
            return PlainTextResponse(str(error), status_code=404)

    page = build(root, training)
    return gradio.mount_gradio_app(
        app,
        page,
        path="/",
        theme=theme(gradio),
        css=CSS,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
        blocked_paths=[str(root)],  # the page shows copies of images, never files of the folder
    )


def _end_as_ctrl_c() -> None:
    """Let SIGTERM and a closed terminal (SIGHUP) end the page as Ctrl-C does, so that a training is stopped."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)  # uvicorn shuts down first, then raises the signal again
    hangup = getattr(signal, "SIGHUP", None)  # Windows has none
    if hangup and signal.getsignal(hangup) is not signal.SIG_IGN:  # nohup ignores it
        signal.signal(hangup, lambda *_: signal.raise_signal(signal.SIGTERM))


def _check_port(host: str, port: int) -> None:
    try:
        with socket.socket() as test:
            test.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            test.bind((host, port))
    except OSError as error:
        raise UsageError(f"--port {port} cannot be opened: {reason(error)}. Choose another.") from None
