"""Run all checks and print them. The result holds no names of users, computers or folders."""

from __future__ import annotations

import contextlib
import getpass
import json
import re
import socket
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from sd_unlearn import __version__
from sd_unlearn.doctor.check import Check
from sd_unlearn.doctor.machine import devices, disk, hub, system
from sd_unlearn.doctor.packages import extras, packages
from sd_unlearn.doctor.smoke import smoke_check


def run(smoke_run: bool = True) -> list[Check]:
    """All checks, the smoke run last."""
    checks = [*system(), *packages(), *devices(), *extras(), *hub(), *disk()]
    broken = any(check.status == "broken" and check.needed for check in checks)
    if smoke_run and not broken:
        checks.append(smoke_check())
    return [anonymous(check) for check in checks]


def failures(checks: Sequence[Check]) -> list[str]:
    """Names of what is needed and does not work."""
    return [check.name for check in checks if check.needed and check.status in ("missing", "broken")]


def as_json(checks: Sequence[Check]) -> str:
    entries = [asdict(check) for check in checks]
    return json.dumps({"version": __version__, "ok": not failures(checks), "checks": entries}, indent=2)


def as_text(checks: Sequence[Check]) -> str:
    """Aligned lines, a block per section."""
    lines = [f"sd-unlearn {__version__}"]
    width = max(len(check.name) for check in checks)
    for number, check in enumerate(checks):
        if not number or checks[number - 1].section != check.section:
            lines += ["", check.section]
        mark = "" if check.status == "info" else check.status
        lines.append(f"  {mark:7}  {check.name:{width}}  {check.detail}")
    failed = failures(checks)
    return "\n".join([*lines, "", f"Broken: {', '.join(failed)}." if failed else "Everything needed works."])


# A path in quotes may contain spaces; elsewhere it ends at one. At least one folder, and the last part, which is kept.
_QUOTED = re.compile(r"""(['"])(?:[A-Za-z]:)?[~.]*[/\\][^'"]*[/\\]([^'"/\\]*)\1""")
_PATH = re.compile(r"""(?<![\w.'"-])(?:[A-Za-z]:)?[~.]*[/\\](?:[^\s/\\:'"()]+[/\\])+([^\s/\\:'"()]*)""")


def anonymous(check: Check) -> Check:
    """The check without folders, user name and machine name."""
    text = check.detail
    names: list[Callable[[], str]] = [getpass.getuser, socket.gethostname, lambda: Path.home().name]
    for name in names:
        with contextlib.suppress(Exception):
            if len(found := name()) > 2:
                text = re.sub(rf"(?<!\w){re.escape(found)}(?!\w)", "...", text)
    text = _PATH.sub(r".../\1", _QUOTED.sub(r"\1.../\2\1", text))
    return replace(check, detail=text)
