"""The concept to remove, the prompts that must keep working, and the evaluation prompts, read from prompts/*.yaml.

Braces in a prompt list alternatives: "a photo of the digit {one,two}" stands for two prompts. The chosen word is the
label that a classifier must read in the image when the prompt belongs to a retained concept.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from sd_unlearn.config.options import MAX_IMAGES
from sd_unlearn.errors import UsageError
from sd_unlearn.io.paths import concept_slug
from sd_unlearn.io.reading import json_sha256
from sd_unlearn.io.schema import STRICT, validate

MAX_PROMPTS = 10_000  # in one list of a concept file, with all alternatives
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
