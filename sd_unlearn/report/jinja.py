"""Jinja with the pages' filters: every text is escaped, in HTML by Jinja and in Markdown by `md`."""

from __future__ import annotations

import base64
import hashlib
import html
import math
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from sd_unlearn.report import formatting

TEMPLATES = Path(__file__).parent / "templates"


def environment(escape: bool) -> Environment:
    """Templates of this folder; in HTML every text is escaped, in Markdown the templates do it with `md`."""
    made = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=escape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters.update(
        shown=formatting.shown,
        span=formatting.span,
        is_rate=formatting.is_rate,
        per_seed=formatting.per_seed,
        md=markdown,
        unbroken=unbroken,
        opened=opened,
        count=counted,
    )
    made.tests["finite"] = lambda value: value is not None and math.isfinite(value)
    made.globals.update(METRICS=formatting.METRICS, GROUPS=formatting.GROUPS, STANDINGS=formatting.STANDINGS)
    return made


def script() -> dict[str, Any]:
    """The page's one script, as it stands between its tags, and the hash by which its policy knows it."""
    text = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return {"text": Markup(text), "hash": f"sha256-{digest}"}  # our own file, no user's text in it


def markdown(text: Any) -> str:
    """Any text as one inert piece of a Markdown line or table cell."""
    plain = html.escape(" ".join(str(text).split()), quote=False)
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", plain)


def unbroken(text: Any) -> Markup:
    """A number stays on one line with its unit, and an interval with both its ends."""
    glue = r"(?<=\d) (?=%|points\b|s\b|h\b|min\b|MB\b|GB\b)|(?<=[np]) (?==|<|&lt;)|(?<==|<|;) (?=\d)"
    joined = re.sub(glue, "\u00a0", str(Markup.escape(text)))
    return Markup(re.sub(r"(?<=\d)–(?=\d)", "\u2060–\u2060", joined))


def opened(text: str) -> str:
    """A sentence with its first letter large and every other one as it was."""
    return text[:1].upper() + text[1:]


def counted(number: int, word: str) -> str:
    """'1 pair', '12 pairs'."""
    return f"{number:,} {word}{'' if number == 1 else 's'}"
