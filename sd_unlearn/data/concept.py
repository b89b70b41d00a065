"""The concept to remove, the prompts that must keep working, and the evaluation prompts, read from prompts/*.yaml.

Braces in a prompt list alternatives: "a photo of the digit {one,two}" stands for two prompts. The chosen word is the
label that a classifier must read in the image when the prompt belongs to a retained concept.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Field

from sd_unlearn.choices import TemplateKind
from sd_unlearn.config.options import MAX_IMAGES
from sd_unlearn.data.concept_template import concept_text
from sd_unlearn.errors import UsageError, suggest
from sd_unlearn.io.paths import concept_slug, folded, public_name
from sd_unlearn.io.reading import json_sha256, read_yaml, read_yaml_value
from sd_unlearn.io.schema import STRICT, validate

MAX_PROMPTS = 10_000  # in one list of a concept file, with all alternatives
PACKAGE = Path(__file__).parent.parent
SUFFIXES = (".yaml", ".yml")  # of concept files
BRACES = re.compile(r"\{([^{}]*)\}")  # group 1: the alternatives, separated by commas


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be empty")
    return text


def _expandable(templates: list[str]) -> list[str]:
    for template in templates:
        if not template.strip():
            raise ValueError("must not hold an empty prompt")
        if not all(word.strip() for inside in BRACES.findall(template) for word in inside.split(",")):
            raise ValueError(f'holds an empty alternative: "{template[:60]}"')
    expand_braces(templates)
    return templates


def _below_one_together(betas: dict[str, float]) -> dict[str, float]:
    if sum(betas.values()) >= 1:
        raise ValueError(f"add up to {sum(betas.values()):g}; together they must be less than 1")
    return betas


Text = Annotated[str, AfterValidator(_not_blank)]
Count = Annotated[int, Field(ge=0, le=MAX_IMAGES)]
Prompts = Annotated[list[str], AfterValidator(_expandable)]  # braces list alternatives
Beta = Annotated[float, Field(gt=0, lt=1)]


@dataclass(frozen=True)
class Prompt:
    """An evaluation prompt and the labels that its image should be classified as (empty: not classified)."""

    text: str
    expect: tuple[str, ...] = ()


@dataclass(frozen=True)
class Images:
    """How many images `render` generates."""

    __pydantic_config__ = STRICT

    positive: Count = 20  # of the caption, for 1_positive
    unlabeled: Count = 64  # of the generic prompt, for 0_unlabeled
    mixed_in: Count = 16  # of the caption, hidden in 0_unlabeled
    keep: Count = 12  # of each keep line, split evenly over its alternatives, for 0_unlabeled


@dataclass(frozen=True)
class Evaluation:
    """Prompt groups of the evaluation (docs/results.md)."""

    __pydantic_config__ = STRICT

    direct: Prompts = field(default_factory=list)
    held_out: Prompts = field(default_factory=list)
    alike: Prompts = field(default_factory=list)
    general: Prompts = field(default_factory=list)


@dataclass(frozen=True)
class Concept:
    """The content of one concept file."""

    __pydantic_config__ = STRICT

    name: Text
    caption: Text  # the prompt for the concept
    generic: Text  # the prompt for the images in 0_unlabeled, and what the model should generate instead
    kind: Literal["digit", "ink", "person", "style", "object", "nudity", "other"] = "other"
    label: str = ""  # the concept's label for classifiers; default: the name
    base: str | None = None  # the base model unless the command names one
    generic_share: Annotated[float, Field(ge=0, lt=1)] = 0.0  # share of the concept in images of the generic prompt
    alternatives: list[str] = field(default_factory=list)  # the other labels of the zero-shot classifier
    keep: Prompts = field(default_factory=list)  # prompts of retained concepts, rendered into 0_unlabeled
    paraphrases: Prompts = field(default_factory=list)  # more training prompts for the concept, each with a bracket
    betas: Annotated[dict[str, Beta], AfterValidator(_below_one_together)] = field(default_factory=dict)  # by folder
    images: Images = Images()
    evaluate: Evaluation = Evaluation()

    @property
    def parts(self) -> tuple[Concept, ...]:
        """The concepts that are erased together: itself alone, or several (several.py)."""
        return (self,)

    @property
    def slug(self) -> str:
        return concept_slug(self.name)

    @property
    def is_replaced_with_itself(self) -> bool:
        """Whether caption and generic prompt are the same, so that most trainings would erase nothing."""
        return normalized(self.caption) == normalized(self.generic)

    @property
    def keep_prompts(self) -> list[Prompt]:
        return expand_braces(self.keep)

    @property
    def preview_prompts(self) -> list[str]:
        """The prompts of the preview's rows: the caption, the generic prompt and two keep prompts."""
        return [self.caption, self.generic, *(p.text for p in self.keep_prompts[:2])]

    @property
    def captions(self) -> list[str]:
        """All training prompts for the concept: the caption, then the paraphrases."""
        return [self.caption, *(p.text for p in expand_braces(self.paraphrases))]

    def prompts(self, group: str) -> list[Prompt]:
        """The expanded prompts of an evaluation group; `direct` defaults to the caption."""
        prompts = expand_braces(getattr(self.evaluate, group))
        return prompts or ([Prompt(self.caption)] if group == "direct" else [])


def concept_sha256(concept: Concept) -> str:
    """SHA-256 of everything a concept file says. results.json, LoRA headers and checkpoints record this value."""
    return json_sha256(dataclasses.asdict(concept))


def expand_braces(templates: list[str]) -> list[Prompt]:
    """One prompt for every combination of the alternatives in braces.

    Raises:
        ValueError: they stand for more than MAX_PROMPTS prompts.
    """
    prompts: list[Prompt] = []
    for template in templates:
        start, *pieces = BRACES.split(template)  # of each braces: what is inside, then the text up to the next
        options = [[word.strip() for word in group.split(",")] for group in pieces[::2]]
        count = math.prod(map(len, options))
        if len(prompts) + count > MAX_PROMPTS:
            raise ValueError(f'"{template[:60]}" stands for {count:,} prompts; up to {MAX_PROMPTS:,} are possible')
        for words in itertools.product(*options):
            text = start + "".join(word + after for word, after in zip(words, pieces[1::2], strict=True))
            prompts.append(Prompt(text, tuple(words)))
    return prompts


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


def parse_concept(data: Any, where: str) -> Concept:
    """The concept in the content of a concept file; `where` begins the error messages.

    Raises:
        UsageError: names the key, the value and what is allowed.
    """
    concept = validate(Concept, data, where)
    _check_retained(concept, where)
    _check_paraphrases(concept, where)
    return concept


def _check_retained(concept: Concept, where: str) -> None:
    """Refuse to retain the caption, which is erased."""
    groups = {"keep": concept.keep_prompts} | {f"evaluate.{g}": concept.prompts(g) for g in ("alike", "general")}
    for key, prompts in groups.items():
        for prompt in prompts:
            if normalized(prompt.text) == normalized(concept.caption):
                raise UsageError(
                    f'{where}: {key}: "{prompt.text}" is the caption, which is erased. Remove or change it.'
                )


def _check_paraphrases(concept: Concept, where: str) -> None:
    """Refuse a paraphrase that is also a held-out prompt (it would no longer be held out) or a prompt to keep."""
    others = {
        "generic": [concept.generic],
        "keep": [p.text for p in concept.keep_prompts],
        "caption": [concept.caption],
        **{f"evaluate.{group}": [p.text for p in concept.prompts(group)] for group in ("held_out", "alike", "general")},
    }
    known = {normalized(text): f"also in {key}" for key, texts in others.items() for text in texts}
    for text in concept.captions[1:]:
        if fault := known.get(normalized(text)):
            raise UsageError(f'{where}: paraphrases: "{text}" is {fault}. Remove or change it.')
        known[normalized(text)] = "listed twice"


def normalized(prompt: str) -> str:
    """The prompt without differences in case and white space."""
    return " ".join(prompt.casefold().split())
