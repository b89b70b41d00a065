"""results.json, the record that `evaluate` writes and later stages read (docs/results.md). Imports no torch."""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from sd_unlearn.errors import UsageError, counted
from sd_unlearn.io.paths import public_name
from sd_unlearn.io.reading import read_json
from sd_unlearn.io.run_folder import RESULTS
from sd_unlearn.io.schema import OPEN, validate
from sd_unlearn.result_faults import first_fault

SCHEMA_VERSION = 2
BASE = "base"  # id of the subject without any LoRA
FLOOR = "floor"  # id of a model that never saw the concept, to compare attacks with
MAX_FACES = 8  # boxes of faces that a pair has of each image; there may be more faces
ATTACK_METRIC = "attack"  # metric of the rows of attacks; their group is the attack's name
Box = Annotated[tuple[float, ...], Field(min_length=4, max_length=4)]  # x0, y0, x1, y1 as shares of width and height


class _Open:
    """Later versions may add keys."""

    __pydantic_config__ = OPEN


@dataclass(frozen=True)
class Row(_Open):
    """One value of a metric. A rate states what was counted, n and a 95 % interval."""

    metric: str
    group: str  # of prompts: direct, held_out, generic, alike, general, kept
    subject: str  # base, or the id of a LoRA or image folder
    value: float | None  # None: unknown, e.g. a ratio with a zero denominator
    n: int
    low: float | None = None
    high: float | None = None
    detector: str = ""
    interval: str = ""  # wilson | bonett-price | mover | bootstrap | poisson | half-sampling | bootstrap-width | none
    note: str = ""
    concept: str = ""
    seeds: tuple[float | None, ...] | None = None  # the value for each seed, if there are several


@dataclass(frozen=True)
class Difference(_Open):
    """Difference between two subjects, compared image by image: value = subject - against."""

    concept: str
    metric: str
    group: str
    subject: str
    against: str
    value: float | None
    n: int
    low: float | None = None
    high: float | None = None
    p: float | None = None  # two-sided, of this difference alone
    p_holm: float | None = None  # for all of one concept, metric, group and detector (Holm 1979)
    detector: str = ""
    interval: str = "paired-bootstrap"  # bonett-price for rates; none


@dataclass(frozen=True)
class Pair(_Open):
    """One prompt and seed without and with a LoRA. Image paths are relative to the folder of results.json."""

    concept: str
    subject: str
    group: str
    prompt: str
    seed: int
    base: str  # "" if there is no image of the base
    image: str
    expected: str = ""
    base_read: str = ""  # what the detector read on the image
    image_read: str = ""
    leak: bool = False  # shows the concept although the LoRA should have removed it
    lost: bool = False  # matched its prompt without the LoRA, and no longer does
    faces: tuple[Box, ...] = ()
    base_faces: tuple[Box, ...] = ()


@dataclass(frozen=True)
class PairCount(_Open):
    """How many images of a subject and prompt group leak or are lost; `pairs` holds some of them."""

    concept: str
    subject: str
    group: str
    leaks: int
    lost: int


@dataclass(frozen=True)
class Card(_Open):
    """What a reader must know to cite a detector's metrics; the report prints it with them."""

    detector: str  # Metric.name
    metrics: tuple[str, ...] = ()
    about: str = ""  # what it is and what it looks at, one sentence
    version: str = ""  # of the package
    weights: str = ""  # name or SHA-256
    threshold: str = ""  # the value and its source
    limits: str = ""  # known errors, one or two sentences
    extra: dict[str, str] = field(default_factory=dict)  # e.g. the people a threshold was calibrated on


@dataclass(frozen=True)
class ConceptEntry(_Open):
    """A concept that was evaluated."""

    slug: str
    name: str
    caption: str  # names the concept
    generic: str  # what should be generated instead
    kind: str = ""
    sha256: str = ""  # of the concept file's content
    prompts: dict[str, tuple[str, ...]] = field(default_factory=dict)  # by prompt group

    @property
    def asked(self) -> str:
        """The direct prompts in words."""
        first, *others = self.prompts.get("direct") or (self.caption,)
        more = f" (and {counted(len(others), 'other prompt')})" if others else ""
        return f"“{first}”{more}"


@dataclass(frozen=True)
class SubjectEntry(_Open):
    """What was evaluated: the base, a LoRA at one strength, or a folder of images."""

    id: str
    name: str
    what: Literal["base", "lora", "images"]
    strength: float | None = None
    sha256: str = ""  # of the LoRA's weights
    forgets: str | None = None  # slug of the concept it was trained on, if known
    forgets_together: tuple[str, ...] = ()  # slugs, if it was trained on several concepts
    training: dict[str, Any] | None = None
    cost: dict[str, Any] | None = None
    sld: dict[str, Any] | None = None  # the settings of safe latent diffusion (--sld), whose images are no given ones

    @property
    def method(self) -> str:
        """What makes its images differ from the base's: LoRA, or safe latent diffusion; "" for given images."""
        return "LoRA" if self.what == "lora" else "safe latent diffusion" if self.sld else ""

    def should_forget(self, concept: str) -> bool:
        """Whether it was trained to forget a concept (slug), or may have been."""
        known = self.forgets_together or ((self.forgets,) if self.forgets else ())
        return not known or concept in known


@dataclass(frozen=True)
class Skipped(_Open):
    """An image that could not be read."""

    path: str
    why: str = ""
    subject: str = ""


@dataclass(frozen=True)
class Problem(_Open):
    """A reason why no verdict may be given on a subject (docs/results.md lists the kinds)."""

    concept: str  # slug; "": every concept
    subject: str  # id; of the base, it concerns every subject
    kind: str
    message: str  # a sentence for the reader of the verdict
    group: str = ""  # prompt group, if the problem is of one
    share: float | None = None  # of the group's images, or the value that is too low

    def concerns(self, concept: str, subject: str) -> bool:
        """Whether the verdict on a subject and concept must not be given."""
        return self.concept in ("", concept) and self.subject in (BASE, subject)


@dataclass(frozen=True)
class Outcome(_Open):
    """A --fail_if condition."""

    condition: str
    holds: bool
    reasons: tuple[str, ...] = ()  # the subjects, concepts and values for which it holds


@dataclass(frozen=True)
class Failed(_Open):
    """A LoRA that could not be evaluated (--keep_going)."""

    lora: str  # as given, or its path
    message: str


@dataclass(frozen=True)
class FailedAttack(_Open):
    """An attack that could not be carried out, and has no other entry: memory ran out."""

    concept: str  # slug
    subject: str
    attack: str
    message: str


@dataclass(frozen=True)
class AttackTry(_Open):
    """The images that one restart of an attack gave after a number of steps."""

    restart: int
    step: int
    value: float  # share of the trials in which the detector found the concept
    n: int  # trials
    found: str = ""  # what the attack found, e.g. a prompt


@dataclass(frozen=True)
class AttackEntry(_Open):
    """An attack on a subject, with every try; its row (metric `attack`) has the best one."""

    concept: str
    subject: str
    attack: str  # name, also the group of its row
    budget: str  # quick, standard, full
    detector: str
    settings: dict[str, Any]
    tries: tuple[AttackTry, ...]
    title: str = ""
    source: str = ""  # the paper
    access: str = ""  # what the attacker must have
    seconds: float = 0.0  # of all restarts
    seed: int = 0
    images: tuple[str, ...] = ()  # some of the best try's, relative to the folder of results.json


@dataclass(frozen=True)
class Seeds(_Open):
    """Seeds of the images."""

    evaluate: tuple[int, int] | None = None  # half-open range of all evaluation seeds
    seeds: tuple[int, ...] = ()  # --seed


@dataclass(frozen=True)
class Results(_Open):
    """The content of a results.json."""

    schema_version: Literal[2]
    concepts: tuple[ConceptEntry, ...]
    subjects: tuple[SubjectEntry, ...]
    rows: tuple[Row, ...]
    created: str = ""
    version: str = ""
    tier: str = ""
    base: dict[str, Any] = field(default_factory=dict)
    sampler: dict[str, Any] = field(default_factory=dict)
    seeds: Seeds = Seeds()
    prompt_set: str | None = None  # name of the extra prompts
    prompt_category: str | None = None  # the one of their categories that was taken
    cards: tuple[Card, ...] = ()
    differences: tuple[Difference, ...] = ()
    pairs: tuple[Pair, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    problems: tuple[Problem, ...] = ()
    conditions: tuple[Outcome, ...] = ()
    failed: tuple[Failed, ...] = ()
    pair_counts: tuple[PairCount, ...] = ()
    attacks: tuple[AttackEntry, ...] = ()
    failed_attacks: tuple[FailedAttack, ...] = ()

    @property
    def compared(self) -> list[SubjectEntry]:
        """All subjects except the base, in file order."""
        return [subject for subject in self.subjects if subject.what != BASE]

    @property
    def evaluated(self) -> list[tuple[ConceptEntry, SubjectEntry]]:
        """(concept, subject) of every subject except the base on every concept it has a row for, subjects in order."""
        measured = {(row.concept, row.subject) for row in self.rows}
        return [(c, s) for s in self.compared for c in self.concepts if (c.slug, s.id) in measured]

    def rows_of(self, concept: str, subject: str) -> list[Row]:
        """The rows of one subject and of the base on one concept (slug).

        Without attacks on the base that were carried out on the subject with other settings: they do not compare.
        """
        rows = [row for row in self.rows if row.concept == concept and row.subject in (BASE, subject)]
        own = {(row.group, row.detector): row for row in rows if (row.metric, row.subject) == (ATTACK_METRIC, subject)}

        def compares(row: Row) -> bool:
            same = own.get((row.group, row.detector))
            return row.metric != ATTACK_METRIC or same is None or self.is_same_attack(row, same)

        return list(filter(compares, rows))

    def is_same_attack(self, row: Row, other: Row) -> bool:
        """Whether two rows of one attack, of different subjects, have the same budget, settings and seed."""
        one, two = (self._efforts.get((r.concept, r.subject, r.group, r.detector)) for r in (row, other))
        return one == two

    @cached_property
    def _efforts(self) -> dict[tuple[str, ...], tuple[Any, ...]]:
        """Budget, settings and seed by concept, subject, attack and detector."""
        return {(e.concept, e.subject, e.attack, e.detector): (e.budget, e.settings, e.seed) for e in self.attacks}

    def problems_of(self, concept: str, subject: str) -> list[Problem]:
        """Why no verdict may be given on one subject and concept; empty if one may."""
        return [problem for problem in self.problems if problem.concerns(concept, subject)]


def read_results(path: Path) -> Results:
    """Read and validate a results.json, given the file or its folder.

    Raises:
        UsageError: the file is missing, not JSON or has a missing or invalid key; names the key.
    """
    file = path if path.name == RESULTS else path / RESULTS
    evaluate = f"sd-unlearn evaluate --run {shlex.quote(str(file.parent))}"
    if not file.parent.is_dir():
        raise UsageError(f"--run {file.parent} does not exist. Give the run folder of a finished evaluation.")
    if not file.is_file():
        raise UsageError(f"--run {file.parent} has no {RESULTS}. Run {evaluate} first.")
    return parse_results(read_json(file), str(file), f"Run {evaluate} again.")


def parse_results(data: Any, where: str = RESULTS, hint: str = "") -> Results:
    """Validate the parsed JSON of a results.json; `where` and `hint` begin and end the error, see `validate`.

    Raises:
        UsageError: a missing or invalid key, a value that is not finite or out of order, an entry that is listed twice,
            or a row, difference, pair or problem of a concept or subject that is not listed.
    """
    results = _without_folders(validate(Results, data, where, hint))
    if fault := first_fault(results):
        raise UsageError(f"{where}: {fault}. {hint}")
    return results


def _without_folders(results: Results) -> Results:
    """The results without the paths of the machine that older versions recorded."""
    base = {k: public_name(v) if isinstance(v, str) else v for k, v in results.base.items()}
    subjects = tuple(dataclasses.replace(subject, name=public_name(subject.name)) for subject in results.subjects)
    skipped = tuple(dataclasses.replace(item, path=public_name(item.path)) for item in results.skipped)
    return dataclasses.replace(results, base=base, subjects=subjects, skipped=skipped)


def as_json(item: Any) -> dict[str, Any]:
    """A row, difference, pair, card or other dataclass as JSON holds it."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(item).items()}
