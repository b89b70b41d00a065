"""Jinja environment of the pages: HTML is escaped by Jinja, Markdown by the filter `md`."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from sd_unlearn.errors import counted
from sd_unlearn.report import formatting, metric_names
from sd_unlearn.report.verdict import STANDINGS

TEMPLATES = Path(__file__).parent / "templates"


def environment(escape: bool) -> Environment:
    """The templates of this package. escape: for HTML; Markdown templates escape every text with `md`."""
    made = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=escape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters.update(
        value=formatting.value_text,
        interval=formatting.interval_text,
        is_rate=formatting.is_rate,
        per_seed=formatting.per_seed,
        metric=metric_names.metric_name,
        group=metric_names.group_name,
        md=markdown,
        unbroken=unbroken,
        capitalized=capitalized,
        count=counted,
    )
    made.tests["finite"] = formatting.finite
    made.globals.update(GROUPS=metric_names.GROUPS, STANDINGS=STANDINGS)
    return made


def script() -> dict[str, Any]:
    """The page's only script, and its hash for the Content-Security-Policy."""
    text = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return {"text": Markup(text), "hash": f"sha256-{digest}"}  # a file of this package, without any user's text


def markdown(text: Any) -> str:
    """Escape a text for a line or table cell of Markdown, so that it formats and links nothing."""
    plain = html.escape(" ".join(str(text).split()), quote=False)
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", plain)


def unbroken(text: Any) -> Markup:
    """Keep a number on one line with its unit, and both ends of an interval together."""
    glue = r"(?<=\d) (?=%|points\b|s\b|h\b|min\b|MB\b|GB\b)|(?<=[np]) (?==|<|&lt;)|(?<==|<|;|×) (?=\d)"
    joined = re.sub(glue, "\u00a0", str(Markup.escape(text)))
    return Markup(re.sub(r"(?<=\d)–(?=\d)", "\u2060–\u2060", joined))


def capitalized(text: str) -> str:
    """Capitalize the first letter and leave the others as they are."""
    return text[:1].upper() + text[1:]
