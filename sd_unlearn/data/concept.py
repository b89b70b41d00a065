"""Concept: what to forget, what must stay and how to ask for both; read from prompts/*.yaml with strict keys.

Braces in a prompt list alternatives: "a photo of the digit {one,two}" is two prompts, and the chosen word
is what the image must be read as when the prompt belongs to something that must stay.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sd_unlearn.errors import UsageError, suggest
from sd_unlearn.io.files import check_keys, read_yaml, slugify, write_text

KINDS = ("digit", "ink", "person", "style", "object", "nudity", "other")
HOME = Path(__file__).parent.parent
_BRACES = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True)
class Prompt:
    """A prompt of the evaluation and the words its image should be read as (none: not judged)."""

    text: str
    expect: tuple[str, ...] = ()


@dataclass(frozen=True)
class Images:
    """How many images `render` draws: of the concept, the generic prompt, hidden positives, each keep line."""

    positive: int = 20
    unlabeled: int = 64
    mixed_in: int = 16
    keep: int = 12  # of each keep line, shared out over its alternatives


@dataclass(frozen=True)
class Evaluation:
    """Prompt groups (see docs/results.md): direct, held_out, alike, general."""

    direct: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)
    alike: list[str] = field(default_factory=list)
    general: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Concept:
    """One concept file."""

    name: str
    caption: str  # how the concept is asked for
    generic: str  # what 0_unlabeled shows, and what shall be drawn instead
    kind: str = "other"
    label: str = ""  # the word a judge reads; default: the name
    base: str | None = None  # the base model when the command names none
    generic_share: float = 0.0  # share of the concept among the images the base draws for `generic` by itself
    alternatives: list[str] = field(default_factory=list)  # other labels of the zero-shot judge
    keep: list[str] = field(default_factory=list)  # rendered into 0_unlabeled under their own captions
    paraphrases: list[str] = field(default_factory=list)  # other ways to ask for it, for training: a bracket each
    betas: dict[str, float] = field(default_factory=dict)  # of each 1_positive* folder, where there are several
    images: Images = Images()
    evaluate: Evaluation = Evaluation()

    @property
    def slug(self) -> str:
        return slugify(self.name)

    @property
    def keep_prompts(self) -> list[Prompt]:
        return expand(self.keep)

    @property
    def wordings(self) -> list[str]:
        """Every way to ask for the concept in training: its caption, then the paraphrases."""
        return [self.caption, *(p.text for p in expand(self.paraphrases))]

    def prompts(self, group: str) -> list[Prompt]:
        """The expanded prompts of an evaluation group; direct falls back to the caption itself."""
        found = expand(getattr(self.evaluate, group))
        return found or ([Prompt(self.caption)] if group == "direct" else [])


def expand(templates: list[str]) -> list[Prompt]:
    """Every combination of the alternatives in braces."""
    prompts = []
    for template in templates:
        options = [[word.strip() for word in group.split(",")] for group in _BRACES.findall(template)]
        for words in itertools.product(*options):
            text = template
            for word in words:
                text = _BRACES.sub(word.replace("\\", r"\\"), text, count=1)
            prompts.append(Prompt(text, tuple(words)))
    return prompts


def prompt_dirs() -> list[Path]:
    """Where concept files are looked for: the working folder's prompts/, the checkout's, the installed ones."""
    found = [Path("prompts"), HOME.parent / "prompts", HOME / "prompts"]
    return [p for p in dict.fromkeys(found) if p.is_dir()]


def available() -> dict[str, Path]:
    """Slug -> concept file, nearest folder first."""
    files = [f for folder in reversed(prompt_dirs()) for f in sorted(folder.glob("*.yaml"))]
    return {f.stem: f for f in files}


def load_concept(name: str | None, anchor: str | None = None) -> Concept:
    """The concept of a name, a path to a YAML file, or (with an anchor) one built on the spot.

    Raises:
        UsageError: no name, no such file, unknown keys, wrong types.
    """
    files = available()
    if not name or not name.strip():
        raise UsageError(f"--concept is missing: name what to forget. Files exist for: {', '.join(sorted(files))}.")
    if anchor is not None:
        return from_anchor(name, anchor)
    if name.endswith((".yaml", ".yml")):
        return read_concept(Path(name))
    slug = slugify(name)
    if slug not in files:
        raise UsageError(
            f'--concept "{name}" has no file prompts/{slug}.yaml.{suggest(slug, files)} '
            f'Files exist for: {", ".join(sorted(files))}. Or build one on the spot: --anchor "what to draw instead".'
        )
    return read_concept(files[slug])


def from_anchor(name: str, anchor: str) -> Concept:
    """A concept without a file: the anchor is what shall be drawn instead, and the alternative of the judge.

    Raises:
        UsageError: an empty anchor.
    """
    if not anchor.strip():
        raise UsageError('--anchor "" is empty: say what shall be drawn instead, e.g. "a middle aged man".')
    return Concept(
        name=name,
        caption=f"a photo of {name}",
        generic=f"a photo of {anchor.strip()}",
        alternatives=[anchor.strip()],
        evaluate=Evaluation(held_out=[_literal(f"a portrait of {name}"), _literal(name)]),
    )


def _literal(prompt: str) -> str:
    """A prompt without braces, so that a name that has some is not taken for alternatives."""
    return prompt.replace("{", "(").replace("}", ")")


def read_concept(path: Path) -> Concept:
    """A concept file, every key checked.

    Raises:
        UsageError: naming the file, the key and what was expected.
    """
    data = read_yaml(path, "--concept")
    check_keys(data, {f.name for f in dataclasses.fields(Concept)}, str(path))
    _check_fields(data, path)
    data["images"] = _nested(Images, data.get("images", {}), f"{path}: images")
    for name, count in dataclasses.asdict(data["images"]).items():
        if not isinstance(count, int) or count < 0:
            raise UsageError(f"{path}: images.{name} is {count!r}; it must be a number of images, 0 or more.")
    data["evaluate"] = _nested(Evaluation, data.get("evaluate", {}), f"{path}: evaluate")
    for group, prompts in dataclasses.asdict(data["evaluate"]).items():
        _check_strings(prompts, f"{path}: evaluate.{group}")
    concept = Concept(**data)
    _check_paraphrases(concept, path)
    return concept


def write_concept(path: Path, concept: Concept) -> None:
    """Write a concept so that read_concept returns an equal one."""
    write_text(path, yaml.safe_dump(dataclasses.asdict(concept), sort_keys=False, allow_unicode=True))


def _check_fields(data: dict[str, Any], path: Path) -> None:
    for key in ("name", "caption", "generic"):
        if not isinstance(data.get(key), str) or not data[key].strip():
            raise UsageError(f'{path}: "{key}" is missing or empty; every concept needs name, caption and generic.')
    if data.get("kind", "other") not in KINDS:
        raise UsageError(f'{path}: kind "{data["kind"]}" is unknown; choose one of {", ".join(KINDS)}.')
    for key in ("label", "base"):
        if not isinstance(data.get(key, ""), str | None):
            raise UsageError(f"{path}: {key} is {data[key]!r}; it must be text (put it in quotes).")
    share = data.get("generic_share", 0.0)
    if not isinstance(share, int | float) or not 0 <= share < 1:
        raise UsageError(f"{path}: generic_share is {share!r}; it is a share in [0, 1).")
    betas = data.get("betas", {})
    if not isinstance(betas, dict) or not all(isinstance(b, float) and 0 < b < 1 for b in betas.values()):
        raise UsageError(f"{path}: betas is {betas!r}; it gives folders their shares in (0, 1), e.g. 1_positive: 0.1.")
    if sum(betas.values()) >= 1:
        raise UsageError(f"{path}: betas add up to {sum(betas.values()):g}; together they must be less than 1.")
    for key in ("keep", "alternatives", "paraphrases"):
        _check_strings(data.get(key, []), f"{path}: {key}")


def _check_paraphrases(concept: Concept, path: Path) -> None:
    """A paraphrase that is tested would make a held-out prompt a trained one; one that is kept contradicts itself."""
    taken = {"generic": [concept.generic], "keep": [p.text for p in concept.keep_prompts], "caption": [concept.caption]}
    taken |= {
        f"evaluate.{group}": [p.text for p in concept.prompts(group)] for group in ("held_out", "alike", "general")
    }
    seen: set[str] = set()
    for text in concept.wordings[1:]:
        where = next((key for key, prompts in taken.items() if _plain(text) in map(_plain, prompts)), None)
        if where or not text.strip() or _plain(text) in seen:
            why = f"also in {where}" if where else "there twice" if text.strip() else "empty"
            raise UsageError(f'{path}: paraphrases: "{text}" is {why}. Take it out, or word it otherwise.')
        seen.add(_plain(text))


def _plain(prompt: str) -> str:
    """What two spellings of one prompt have in common."""
    return " ".join(prompt.casefold().split())


def _nested(kind: type, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise UsageError(f"{where} must hold keys and values, not {type(data).__name__}.")
    check_keys(data, {f.name for f in dataclasses.fields(kind)}, where)
    return kind(**data)


def _check_strings(value: Any, where: str) -> None:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise UsageError(f"{where} must be a list of prompts (strings).")
