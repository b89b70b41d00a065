"""Find the concept that --concept names: in a concept file, or built from --anchor without one."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path

import yaml

from sd_unlearn.choices import TemplateKind
from sd_unlearn.data.concept import Concept, parse_concept
from sd_unlearn.data.concept_template import concept_text
from sd_unlearn.errors import UsageError, suggest
from sd_unlearn.io.paths import concept_slug, folded, public_name
from sd_unlearn.io.reading import read_yaml, read_yaml_value

PACKAGE = Path(__file__).parent.parent
SUFFIXES = (".yaml", ".yml")  # of concept files


def concept_files() -> dict[str, Path]:
    """Slug -> concept file. A file in the working folder's prompts/ overrides a bundled one."""
    folders = (PACKAGE / "prompts", PACKAGE.parent / "prompts", Path("prompts"))
    files = (file for folder in folders for file in sorted(folder.glob("*.y*ml")) if file.suffix in SUFFIXES)
    return {concept_slug(file.stem): file for file in files}


def load_concept(name: str | None, anchor: str | None = None, kind: TemplateKind | None = None) -> Concept:
    """The concept with this name or in this file; with an anchor, a concept built without a file.

    kind: of the concept built from an anchor; default: other.

    Raises:
        UsageError: `name` is missing, has no file, or the file is not valid; a kind without an anchor.
    """
    if name and name.strip():  # else find_concept says what is missing
        if anchor is not None:
            return from_anchor(name, anchor, kind or "other")
        if kind is not None:
            raise UsageError(
                f'--kind {kind} needs --anchor "WHAT TO GENERATE INSTEAD". Leave --kind out for a concept with a file, '
                "which says its kind."
            )
    return read_concept(find_concept(name))


def find_concept(name: str | None) -> Path:
    """The file of a concept: its path if the name ends in .yaml or .yml, else the file with this name.

    Raises:
        UsageError: no name, or no such file; suggests similar names.
    """
    if not name or not name.strip():
        raise UsageError(f"--concept is missing. {_known(concept_files())}")
    if name.endswith(SUFFIXES):
        return Path(name)
    files, slug = concept_files(), concept_slug(name)
    if slug in files and not _is_called(files[slug], name):
        raise UsageError(
            f'"{name}" has no concept file: {files[slug]} is for another concept. Write one with sd-unlearn concepts '
            f'new "{name}" --output FILE.yaml, and name the concept by its path.'
        )
    if slug not in files:
        parts = [known for known in files if slug in known.split("-") or known in slug.split("-")]
        hint = suggest(slug, files) or suggest(slug, parts, cutoff=0)
        raise UsageError(
            f'--concept "{name}" has no file prompts/{slug}.yaml.{hint} {_known(files)} '
            f'Write one with sd-unlearn concepts new "{name}", or add --anchor "WHAT TO GENERATE INSTEAD" and --kind '
            "person, style or object."
        )
    return files[slug]


def _is_called(file: Path, name: str) -> bool:
    """Whether a concept file or the concept in it has this name: slugs of different names may be the same."""
    if folded(file.stem) == folded(name):
        return True
    data = read_yaml_value(file, "--concept")
    return isinstance(data, dict) and folded(str(data.get("name"))) == folded(name)


def _known(files: Iterable[str]) -> str:
    names = ", ".join(sorted(files))
    return f"Concepts with a file: {names}." if names else "There is no folder prompts/ with concept files."


def from_anchor(name: str, anchor: str, kind: TemplateKind = "other") -> Concept:
    """A concept without a file: what `concepts new` would write.

    Args:
        anchor: What to generate instead, e.g. "a middle aged man".

    Raises:
        UsageError: the anchor is empty.
    """
    return parse_concept(yaml.safe_load(concept_text(name, anchor, kind)), f'--concept "{name}"')


def describe_anchored(concept: Concept, own_images: bool = False) -> str:
    """What a concept without a file replaces, retains and measures, and how to refine it: lines for the terminal.

    own_images: the user's own, among which are no images of the keep prompts.
    """
    keep, alike, general, held_out = (
        len(prompts)
        for prompts in (concept.keep_prompts, *(concept.prompts(group) for group in ("alike", "general", "held_out")))
    )
    names = ", ".join(word for prompt in concept.keep_prompts[:4] for word in prompt.expect)
    retained = f"Retained in training: {keep} prompts ({names}, ...)."
    if own_images:
        retained = "Retained in training: only what your own images show."
    anchor = concept.generic.removeprefix("a photo of ")
    options, unused = ["--kind", concept.kind, "--anchor", anchor], ""
    if file := concept_files().get(concept.slug):
        unused = f"{public_name(str(file))} is not used: leave out --anchor to use it.\n"
        options += ["--output", f"my-{concept.slug}.yaml"]
    command = shlex.join(["sd-unlearn", "concepts", "new", concept.name, *options])
    return (
        f'{concept.name} is used without a file, as kind {concept.kind}: "{concept.generic}" replaces '
        f'"{concept.caption}".\n{unused}{retained} Measured by evaluate: {alike + general} prompts that must be '
        f"retained, {held_out} other wordings.\nTo name look-alikes and change prompts, write a file: {command}"
    )


def read_concept(path: Path, option: str = "--concept") -> Concept:
    """Read and validate a concept file.

    option: begins the error messages about the file; "" outside of commands that have --concept.

    Raises:
        UsageError: names the file, the key, the value and what is allowed.
    """
    return parse_concept(read_yaml(path, option), str(path))
