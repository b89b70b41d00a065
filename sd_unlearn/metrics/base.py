"""What a metric is: it reads every picture once, says what each one counts for, and compares whole sets of them.

A reading (Columns) depends on the picture and the detector alone, so it is cached under both and shared by everything
that is asked of it later. Intervals and differences between subjects are made from what is counted, in one place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sd_unlearn.data.concept import Concept, Prompt
from sd_unlearn.results import Card, Row

ASKED = ("direct", "held_out", "generic")  # the groups in which the concept shows up unless it is forgotten
KEPT = ("alike", "general")

Columns = dict[str, NDArray]  # what was read of N pictures; the first axis of every array is N


@dataclass(frozen=True)
class Shots:
    """What the N pictures of a reading were drawn for."""

    concept: Concept
    groups: NDArray[np.str_]  # [N] direct | held_out | generic | alike | general
    prompts: tuple[Prompt, ...]  # [N]
    seeds: NDArray[np.int64]  # [N] which of the evaluation's seeds each is of: 0, 1, ...

    def __len__(self) -> int:
        return len(self.groups)

    def of(self, *groups: str) -> NDArray[np.bool_]:
        """[N] whether each picture is of one of these groups."""
        return np.isin(self.groups, groups)


@dataclass(frozen=True)
class Counted:
    """One number a picture; a row of results.json for each group is their mean, with its interval."""

    metric: str  # leakage, accuracy, face_rate, clip_score, ...
    groups: tuple[str, ...]  # the prompt groups it is asked of
    values: NDArray[np.float64]  # [N] in the order of the shots; nan: not asked of this picture
    is_rate: bool = True  # values are 0 or 1: Wilson's interval; else a bootstrap's
    note: str = ""


class Question(Protocol):
    """A metric over single pictures and sets of them."""

    name: str  # the detector with version or hash and every setting that changes a reading

    def card(self) -> Card: ...

    def read(self, images: Sequence[Image.Image]) -> Columns:
        """What is seen on each of N >= 0 RGB pictures, whatever order or batches they come in."""

    def count(self, shots: Shots, columns: Columns) -> list[Counted]:
        """What each picture counts for; also of one subject alone, without a base."""

    def compare(self, shots: Shots, base: Columns, columns: Columns) -> list[Row]:
        """Figures of whole sets (a Frechet distance) or of pairs beyond the ones made of what is counted.

        base and columns are of the same shots, drawn without and with the LoRA. `subject` of the rows is left "".
        """

    def words(self, columns: Columns, index: int) -> str:
        """What one picture was read as, for people; "" when there is nothing to say."""


class PairQuestion(Protocol):
    """A metric that must see both pictures of a pair at once."""

    name: str
    metric: str

    def card(self) -> Card: ...

    def distance(self, base: Sequence[Image.Image], other: Sequence[Image.Image]) -> NDArray[np.float64]:
        """[N] the distance of each pair, zero for equals."""
