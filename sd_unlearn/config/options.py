"""How an option of a command is declared: help text, group and allowed range. Imports no torch."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

from cyclopts import CoercionError, Group, Parameter, Token, convert

from sd_unlearn.errors import UsageError

START = Group("Start here", sort_key=0)  # what `--help` shows; `--help_all` shows the other groups, too
GENERAL = Group("General", sort_key=99)


@dataclass(frozen=True, kw_only=True)
class Range:
    """Validator of an option that is a finite number, or a list of them. Other values (None, words) pass.

    cyclopts calls it for values from the command line and --config, `check_ranges` for configs made in Python.
    """

    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None
    multiple_of: int | None = None
    note: str = ""  # what the number is, or an example; ends the error message

    def __call__(self, type_: Any, value: Any) -> None:
        """Check a value of an option, of the type `type_`.

        Raises:
            ValueError: a number is out of range; says which, and the range.
        """
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and not self.contains(number):
                text = f"{number:g}" if isinstance(number, float) else str(number)
                allowed = self.describe() if math.isfinite(number) else "a finite number"
                raise ValueError(f"{text} must be {allowed}{': ' if self.note else ''}{self.note}.")

    def contains(self, number: float) -> bool:
        return (
            math.isfinite(number)
            and (self.above is None or number > self.above)
            and (self.at_least is None or number >= self.at_least)
            and (self.below is None or number < self.below)
            and (self.at_most is None or number <= self.at_most)
            and (self.multiple_of is None or number % self.multiple_of == 0)
        )

    def describe(self) -> str:
        """The range in words, e.g. "above 0 and at most 1"."""
        bounds = {
            "above": self.above,
            "at least": self.at_least,
            "below": self.below,
            "at most": self.at_most,
            "a multiple of": self.multiple_of,
        }
        *first, last = [f"{words} {bound}" for words, bound in bounds.items() if bound is not None]
        return f"{', '.join(first)} and {last}" if first else last


POSITIVE, NOT_NEGATIVE = Range(above=0), Range(at_least=0)
# Bounds of whole numbers: more is a typing error, which would end in hours of work or without memory.
Count, CountOrNever = Range(above=0, at_most=10_000_000), Range(at_least=0, at_most=10_000_000)
BatchSize = Range(above=0, at_most=10_000)
InferenceSteps = Range(above=0, at_most=1000, note="the noise schedule has 1,000 timesteps")
MAX_IMAGES = 1_000_000  # of one prompt; more is a typing error, and would be planned in memory
NumImages, SomeImages = Range(at_least=0, at_most=MAX_IMAGES), Range(above=0, at_most=MAX_IMAGES)


Validator = Callable[[Any, Any], None]  # (type, value); raises ValueError


def option(text: str, group: Group | None = None, valid: Validator | None = None, negative: str = "") -> Parameter:
    """An option with its help text. `negative` is the flag that turns it off."""
    known: dict[str, Any] = {"group": group} if group else {}  # group=None would hide the option
    return Parameter(help=text, negative=negative or (), validator=valid, converter=_convert, **known)


def several(text: str, group: Group, valid: Range | None = None) -> Parameter:
    """An option that takes one or more values."""
    return Parameter(
        help=text,
        group=group,
        validator=valid,
        converter=_convert,
        negative=(),
        consume_multiple=True,
        show_default=False,
    )


def _convert(type_: Any, tokens: Sequence[Token]) -> Any:
    """cyclopts' conversion, which would round 7.5 for a whole number."""
    types = {type_, *get_args(type_)}
    for token in tokens:
        if int in types and float not in types and re.fullmatch(r"[-+]?\d*\.\d*[1-9]\d*", token.value):
            raise CoercionError(token=token, target_type=int)
    return convert(type_, tokens)


def many() -> Any:
    """Default of an option that takes several values: none."""
    return field(default_factory=list)


ConfigFile = Annotated[
    Path | None, option("YAML file with options as keys; flags on the command line take precedence.", GENERAL)
]
Debug = Annotated[bool, option("Show a traceback when the command fails, and the messages of libraries.", GENERAL)]


def check_ranges(config: Any) -> None:
    """Check every value of a config against the `Range` of its option.

    Raises:
        UsageError: naming the option, its value and the allowed range.
    """
    for name, hint in get_type_hints(type(config), include_extras=True).items():
        for parameter in getattr(hint, "__metadata__", ()):
            for validator in parameter.validator:
                try:
                    validator(hint, getattr(config, name))
                except ValueError as error:
                    raise UsageError(f"--{name} {error}") from None
