"""Several concepts that one LoRA erases: a list of names, a list file, and what the concepts mean together.

Everything that takes a Concept also takes SeveralConcepts: its `parts` are the concepts, and a concept alone is its own
only part.
"""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from sd_unlearn.choices import TemplateKind
from sd_unlearn.data.concept import BRACES, Concept, expand_braces, normalized, parse_concept
from sd_unlearn.data.emoji_things import CATEGORIES
from sd_unlearn.data.find_concept import SUFFIXES, concept_files, find_concept, load_concept, read_concept
from sd_unlearn.errors import UsageError
from sd_unlearn.io.files import write_text
from sd_unlearn.io.paths import concept_slug
from sd_unlearn.io.reading import read_yaml_value
from sd_unlearn.models.source import EMOJI

PREVIEWED = 6  # concepts in a preview
LONGEST = 50  # characters of a slug that names every concept


@dataclass(frozen=True)
class SeveralConcepts(Concept):
    """Concepts that are erased together. `caption` and `generic` are the first one's, `keep` is everyone's.

    The parts are as `together` leaves them: what one of them asks to retain does not name another.
    """

    several: tuple[Concept, ...] = ()

    @property
    def parts(self) -> tuple[Concept, ...]:
        return self.several

    @property
    def slug(self) -> str:
        """All names, or the first one and a hash of all if they are many."""
        whole = concept_slug(self.name)
        if len(whole) <= LONGEST:
            return whole
        return f"{self.several[0].slug[:30]}-and-{len(self.several) - 1}-more-{zlib.crc32(self.name.encode()):08x}"

    @property
    def captions(self) -> list[str]:
        """The training prompts of all parts."""
        return [caption for part in self.several for caption in part.captions]

    @property
    def preview_prompts(self) -> list[str]:
        """The captions of the first parts, the generic prompt and two keep prompts."""
        return [p.caption for p in self.several[:PREVIEWED]] + [self.generic, *(p.text for p in self.keep_prompts[:2])]


def together(concepts: Sequence[Concept], option: str = "--concept") -> Concept:
    """The concepts as one; a single concept is itself. option: in errors.

    What a concept retains (keep prompts) and what its retention is measured on (alike, general) loses the prompts, and
    the alternatives in braces, that name another of the concepts: by its name or label (also across braces), a thing of
    its category on the base emoji, or as one of its own prompts.

    Raises:
        UsageError: a concept is listed twice, two have the same caption, or they do not go together.
    """
    if len(concepts) == 1:
        return concepts[0]
    _check_different(concepts, option)
    bases = {concept.base for concept in concepts} - {None}
    if len(bases) > 1:
        raise UsageError(f"{option}: the concepts are for different bases ({', '.join(sorted(map(str, bases)))}).")
    kinds = {concept.kind for concept in concepts}
    parts = tuple(without_others(c, [o for o in concepts if o is not c]) for c in concepts)
    return SeveralConcepts(
        name=", ".join(part.name for part in parts),
        caption=parts[0].caption,
        generic=parts[0].generic,
        kind=kinds.pop() if len(kinds) == 1 else "other",
        base=next(iter(bases), None),
        keep=list(dict.fromkeys(template for part in parts for template in part.keep)),
        several=parts,
    )


def _check_different(concepts: Sequence[Concept], option: str) -> None:
    for what, values in (
        ("concept", [concept.slug for concept in concepts]),
        ("caption", [normalized(caption) for concept in concepts for caption in concept.captions]),
    ):
        twice = next((value for value, count in Counter(values).items() if count > 1), None)
        if twice is not None:
            raise UsageError(f'{option}: the {what} "{twice}" is listed twice. Name each concept once.')
    generics = {normalized(concept.generic): concept.name for concept in concepts}
    for concept in concepts:
        for caption in concept.captions:
            if normalized(caption) == normalized(concept.generic):
                raise UsageError(
                    f'{option}: caption and generic prompt of {concept.name} are both "{caption}", so nothing would be '
                    "erased. Change the generic prompt (generic in its file)."
                )
            if other := generics.get(normalized(caption)):
                raise UsageError(
                    f'{option}: "{caption}" of {concept.name} is what {other} is replaced with (generic). Erase them '
                    "separately, or change the generic prompt."
                )
        if concept.betas:
            raise UsageError(
                f"{option}: {concept.name} has several folders of positives (betas in its file), which is for a "
                "concept that is erased alone."
            )


def without_others(concept: Concept, others: Sequence[Concept]) -> Concept:
    """The concept without the prompts to retain that name another one."""
    names = dict.fromkeys(name for other in others for name in _names(other))
    pattern = re.compile(rf"(?<!\w)({'|'.join(re.escape(n) for n in names)})(?!\w)", re.IGNORECASE)
    asked = {
        normalized(text)
        for other in others
        for text in (*other.captions, *(p.text for group in ("direct", "held_out") for p in other.prompts(group)))
    }

    @cache
    def is_other(prompt: str) -> bool:
        return bool(pattern.search(prompt)) or normalized(prompt) in asked

    def kept(templates: Sequence[str]) -> list[str]:
        return _filtered(templates, is_other)

    evaluate = dataclasses.replace(
        concept.evaluate, alike=kept(concept.evaluate.alike), general=kept(concept.evaluate.general)
    )
    return dataclasses.replace(concept, keep=kept(concept.keep), evaluate=evaluate)


def _names(concept: Concept) -> list[str]:
    """What the concept is called; of a category of the base emoji also its things."""
    names = [name for name in (concept.name, concept.label) if name]
    members = CATEGORIES.get(concept.label or concept.name, ()) if concept.base == EMOJI else ()
    return [*names, *members]


def _filtered(templates: Sequence[str], is_other: Callable[[str], bool]) -> list[str]:
    """The templates without the prompts that name another concept or are one of its own (`is_other`).

    An alternative in braces is left out if all prompts with it are such; then, from the last braces on, if any are.
    """
    found = []
    for template in templates:
        for enough in (all, any):
            template = _without_alternatives(template, is_other, enough)
        if "{}" not in template and not any(is_other(prompt.text) for prompt in expand_braces([template])):
            found.append(template)
    return found


def _without_alternatives(
    template: str, is_other: Callable[[str], bool], enough: Callable[[Iterable[bool]], bool]
) -> str:
    """The template without the alternatives in braces of which all, or any, prompts are of another concept."""
    prompts = {prompt.expect: is_other(prompt.text) for prompt in expand_braces([template])}
    for number, braces in reversed(list(enumerate(BRACES.finditer(template)))):
        having = defaultdict(list)
        for words, other in prompts.items():
            having[words[number]].append(other)
        left = [word for word in braces[1].split(",") if not enough(having[word.strip()])]
        kept = {word.strip() for word in left}
        prompts = {words: other for words, other in prompts.items() if words[number] in kept}
        template = f"{template[: braces.start()]}{{{','.join(left)}}}{template[braces.end() :]}"
    return template


def load_concepts(
    names: str | Sequence[str] | None, anchor: str | None = None, kind: TemplateKind | None = None
) -> Concept:
    """The concepts of --concept, each the name or path of a concept file or list; see `load_concept` and `together`.

    Raises:
        UsageError: as load_concept and together; an anchor for several concepts.
    """
    given: Sequence[str | None] = [names] if isinstance(names, str) else names or [None]
    if anchor is not None or kind is not None:
        if len(given) > 1:
            raise UsageError(
                "--anchor and --kind are for one concept without a file. Write files: sd-unlearn concepts new. If "
                f'"{_joined(given)}" is one name, put it in quotes.'
            )
        return load_concept(given[0], anchor, kind)
    _check_quoted(given)
    return together([part for name in given for part in read_concepts(find_concept(name)).parts])


def _joined(names: Sequence[str | None]) -> str:
    return " ".join(filter(None, names))


def _check_quoted(names: Sequence[str | None]) -> None:
    """Refuse the words of one concept's name, given as if they were names of several.

    Raises:
        UsageError: says how to quote it.
    """
    files, whole = concept_files(), _joined(names)
    if concept_slug(whole) in files and any(concept_slug(name or "") not in files for name in names):
        raise UsageError(f'--concept {whole}: a name of several words must be in quotes: --concept "{whole}".')


def read_concepts(path: Path, option: str = "--concept") -> Concept:
    """Read a concept file, or a list of concepts: names, concept files, or the content of concept files.

    option: as for read_concept.

    Raises:
        UsageError: names the file, the key, the value and what is allowed.
    """
    data = read_yaml_value(path, option)
    if not isinstance(data, list):
        return read_concept(path, option)
    if not data:
        raise UsageError(f"{option} {path} lists no concepts. Name one a line: - seven.".lstrip())
    return together([_listed(item, path, number) for number, item in enumerate(data, 1)], option or str(path))


def _listed(item: Any, path: Path, number: int) -> Concept:
    """A concept of a list file. Paths are relative to the list's folder, else to the working folder."""
    where = f"{path}, concept {number}"
    if not isinstance(item, str):
        return parse_concept(item, where)
    beside = path.parent / item
    try:
        return load_concept(str(beside) if item.endswith(SUFFIXES) and beside.is_file() else item)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None


def concept_data(concept: Concept) -> Any:
    """One or several concepts as the content of a file that read_concepts reads."""
    data = [dataclasses.asdict(part) for part in concept.parts]
    return data if len(data) > 1 else data[0]


def write_concepts(path: Path, concept: Concept) -> None:
    """Write one or several concepts so that read_concepts returns the same."""
    write_text(path, yaml.safe_dump(concept_data(concept), sort_keys=False, allow_unicode=True))
