"""sd-unlearn concepts [show | new]: list, print and write concept files. Imports nothing heavy until a command runs."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import yaml
from cyclopts import App, Parameter

from sd_unlearn.choices import TemplateKind
from sd_unlearn.config.base import DEFAULT_BASE
from sd_unlearn.errors import UnlearnError, UsageError, suggest
from sd_unlearn.io.files import write_text
from sd_unlearn.io.paths import concept_slug
from sd_unlearn.io.reading import read_text

HELP = """List the concepts that have a file, print a file, or write a new one.

--concept finds files in prompts/ of the working folder and the bundled ones.

  sd-unlearn concepts                       list all concepts
  sd-unlearn concepts show "Brad Pitt"      print a concept file
  sd-unlearn concepts new "Jane Example"    write prompts/jane-example.yaml
"""  # no line is longer than 80 characters

if TYPE_CHECKING:
    from sd_unlearn.data.concept import Concept

GROUPS = ("direct", "held_out", "alike", "general")
FOLDER = Path("prompts")  # of the working folder, where --concept finds files by name

app = App(name="concepts", help=HELP, help_format="plaintext")
AsJson = Annotated[bool, Parameter(name="--json", help="Print JSON.", negative=())]
Name = Annotated[str, Parameter(help="Name of the concept, or path of a concept file.")]


@app.default
def list_(*, as_json: AsJson = False) -> None:
    """List the concepts that have a file."""
    from sd_unlearn.data.find_concept import concept_files

    entries = [_entry(slug, path) for slug, path in sorted(concept_files().items())]
    print(json.dumps(entries, indent=2, ensure_ascii=False) if as_json else _table(entries))


@app.command
def show(name: Name, /, *, as_json: AsJson = False) -> None:
    """Print a concept file, e.g. as the start of your own; with --json, what is read from it."""
    from sd_unlearn.data.find_concept import find_concept
    from sd_unlearn.data.several import concept_data, read_concepts

    _check_has_file(name)
    path = find_concept(name)
    concept = read_concepts(path, option="")
    print(f"{path}:", file=sys.stderr)
    print(json.dumps(concept_data(concept), indent=2, ensure_ascii=False) if as_json else read_text(path).rstrip())


@app.command
def new(
    name: Annotated[str, Parameter(help='Name of the concept as prompts use it, e.g. "Jane Example".')],
    /,
    *,
    kind: Annotated[
        TemplateKind | None,
        Parameter(help="Kind of concept: chooses prompts and what is retained. Default: other; asked on a terminal."),
    ] = None,
    anchor: Annotated[
        str | None,
        Parameter(help='What to generate instead, e.g. "a middle aged woman". Asked on a terminal.'),
    ] = None,
    keep: Annotated[
        list[str] | None,
        Parameter(
            help="Similar concepts to retain and measure, e.g. people with the same first name. Asked on a terminal.",
            consume_multiple=True,
            negative=(),
        ),
    ] = None,
    base: Annotated[
        str | None, Parameter(help=f"Base model unless a command names one. Default: {DEFAULT_BASE}.")
    ] = None,
    output: Annotated[
        Path | None,
        Parameter(help="File to write, .yaml. Existing files are never overwritten. Default: prompts/<name>.yaml."),
    ] = None,
) -> None:
    """Write a commented concept file, which can be used as it is and refined."""
    from sd_unlearn.data.concept import parse_concept
    from sd_unlearn.data.concept_kinds import TEMPLATES
    from sd_unlearn.data.concept_template import concept_text

    path = _new_file(name, output)
    kind, anchor, keep = _ask(name, kind, anchor, keep) if sys.stdin.isatty() else (kind or "other", anchor, keep)
    if anchor is None:
        raise UsageError(f'--anchor is missing: what to generate instead, e.g. --anchor "{TEMPLATES[kind].anchor}".')
    found_by_name = output is None
    text = concept_text(name, anchor, kind, keep or [], base, None if found_by_name else str(path))
    concept = parse_concept(yaml.safe_load(text), str(path))
    write_text(path, text)
    print(path)
    _print_next(concept, name if found_by_name else str(path))


def _check_has_file(name: str) -> None:
    """Refuse the name of a concept without a file, in words that fit `concepts show`.

    Raises:
        UsageError
    """
    from sd_unlearn.data.find_concept import concept_files

    files, slug = concept_files(), concept_slug(name)
    if slug not in files and not name.endswith((".yaml", ".yml")):
        raise UsageError(
            f'"{name}" has no concept file.{suggest(slug, files)} sd-unlearn concepts lists all, and sd-unlearn '
            f'concepts new "{name}" writes one.'
        )


def _new_file(name: str, output: Path | None) -> Path:
    """The file to write.

    Raises:
        UsageError: it exists, the concept has another file, or it is not called .yaml.
    """
    from sd_unlearn.data.find_concept import concept_files

    path = output or FOLDER / f"{concept_slug(name)}.yaml"
    if path.suffix not in (".yaml", ".yml"):
        raise UsageError(f"--output {path} must end in .yaml.")
    if os.path.lexists(path):
        raise UsageError(f"--output {path} exists and is not overwritten. Edit it, or choose another name.")
    if output is None and (known := concept_files().get(concept_slug(name))):
        raise UsageError(
            f'"{name}" has a concept file: {known}. Use it with --concept {known.stem}, or write another with --output.'
        )
    return path


def _ask(
    name: str, kind: TemplateKind | None, anchor: str | None, keep: list[str] | None
) -> tuple[TemplateKind, str, list[str]]:
    """Ask on the terminal for what the command line does not say."""
    from sd_unlearn.data.concept_kinds import TEMPLATES

    kinds = get_args(TemplateKind)
    while kind is None:
        answer = _question(f"What is {name}? {', '.join(kinds)} [other]: ") or "other"
        kind = answer if answer in kinds else None  # type: ignore[assignment]
    template = TEMPLATES[kind]
    while not anchor:
        anchor = _question(f'What to generate instead of {name}, e.g. "{template.anchor}": ').strip('"')
    if keep is None:
        answer = _question(f"Retain above all ({template.similar}; separated by commas, may be empty): ")
        keep = [part.strip() for part in answer.split(",") if part.strip()]
    return kind, anchor, keep


def _question(text: str) -> str:
    """The answer to a question on the terminal, which is printed to stderr.

    Raises:
        UsageError: the input ends.
    """
    print(text, end="", file=sys.stderr, flush=True)
    try:
        return input().strip()
    except EOFError:
        raise UsageError("No answer: give --kind, --anchor and --keep as options instead.") from None


def _print_next(concept: Concept, name: str) -> None:
    kept, measured = len(concept.keep_prompts), sum(len(concept.prompts(group)) for group in GROUPS)
    print(
        f"{kept} prompts are retained in training and {measured} are measured. Check the file, add look-alikes and "
        f"wordings without the name, then: sd-unlearn train --concept {shlex.quote(name)}",
        file=sys.stderr,
    )


def _entry(slug: str, path: Path) -> dict[str, Any]:
    """What the list says about a concept file or a list of concepts; about a file that is not valid, why."""
    from sd_unlearn.data.several import read_concepts

    try:
        concept = read_concepts(path, option="")
    except UnlearnError as error:
        return {"slug": slug, "name": slug, "kind": None, "base": None, "file": str(path), "error": str(error)}
    parts = concept.parts
    prompts = {"keep": len(concept.keep_prompts)}
    prompts |= {group: sum(len(part.prompts(group)) for part in parts) for group in GROUPS}
    base = concept.base or DEFAULT_BASE
    return {
        "slug": slug,
        "name": concept.name if len(parts) == 1 else slug,
        "kind": concept.kind,
        "base": base,
        "prompts": prompts,
        "file": str(path),
    }


def _table(entries: Sequence[dict[str, Any]]) -> str:
    """The list as aligned columns; a file that is not valid has its error in place of the last ones."""
    rows = [("NAME", "KIND", "BASE", "KEEP PROMPTS", "EVALUATION PROMPTS")]
    for entry in entries:
        if "error" in entry:
            rows.append((entry["name"], "-", entry["error"], "", ""))
            continue
        prompts = dict(entry["prompts"])
        keep = prompts.pop("keep")
        rows.append((entry["name"], entry["kind"], entry["base"], str(keep), str(sum(prompts.values()))))
    valid = [row for row in rows if row[3]]
    widths = [max(len(row[i]) for row in (rows if i < 2 else valid)) for i in range(5)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
