"""The concept file of a new concept, as commented YAML: written by `concepts new`, used unwritten by `--anchor`."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

import yaml

from sd_unlearn.choices import TemplateKind
from sd_unlearn.data.concept_kinds import TEMPLATES, Retained, Template
from sd_unlearn.errors import UsageError

_AN = re.compile(r"(?!eu|ewe|one|uf|uni(?![dmn])|us[aeu]|ut[ei])[aeiou]|hour|heir|honest|honou?r")  # "an" before it
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")  # which YAML refuses
_IGNORED = {"a", "an", "the", "of", "in", "and", "painting", "photo"}  # words that name nothing by themselves


def concept_text(
    name: str,
    anchor: str,
    kind: TemplateKind = "other",
    similar: Sequence[str] = (),
    base: str | None = None,
    file: str | None = None,
) -> str:
    """The concept file of a new concept.

    Args:
        anchor: What to generate instead.
        similar: Concepts to retain and measure besides those of the kind, e.g. people who look similar.
        base: The base model unless a command names one.
        file: How --concept finds the file; default: by the concept's name.

    Raises:
        UsageError: the name or the anchor is empty or holds control characters, or they are the same.
    """
    template = TEMPLATES[kind]
    name, anchor = " ".join(name.split()), " ".join(anchor.split())
    _check_names(name, anchor, file or "", template)
    retained = _retained(template, name, anchor, similar)
    words = [word for each in retained for word in each.words]
    keep = [_line(each, training=True) for each in retained if len(each.words) > each.only_measured]
    alike, general = (
        [_line(each, training=False) for each in retained if each.group == group] for group in ("alike", "general")
    )
    called = with_article(name) if kind == "object" else name
    misspelt = called.removesuffix(name) + misspell(name)
    filled = {"name": _plain(called), "bare": _plain(name), "misspelt": _plain(misspelt)}
    held_out = [text for text in template.held_out if "{misspelt}" not in text or misspelt != called]
    general += [text for text in template.general if not _overlap(name, text)]
    parts = [
        f"# sd-unlearn train --concept {shlex.quote(file or name)}",
        f"# {template.about}",
        "# docs/concept-files.md explains every key.",
        f"name: {_yaml(name)}",
        f"kind: {kind}",
        f"base: {_yaml(base)}" if base else "",
        f"caption: {_yaml(template.caption.format(name=called))}   # the prompt for the concept",
        f"generic: {_yaml(template.generic.format(anchor=anchor))}   # what to generate instead",
        f"label: {_yaml(template.label.format(name=name))}   # what CLIP compares an image with"
        if template.label
        else "",
        "generic_share: 0.0   # share of the concept in images of the generic prompt: look at some",
        IMAGES,
        _list("alternatives", "what else CLIP may recognize: one word or phrase each", [*words, anchor]),
        _list(
            "paraphrases", "also trained on: the style is erased with any subject", _fill(template.paraphrases, filled)
        )
        if template.paraphrases
        else "",
        _list("keep", f"retained in training; add {template.similar}", keep),
        "evaluate:",
        _list("  held_out", "not used in training; add wordings without the name", _fill(held_out, filled)),
        _list("  alike", "must be retained, and is measured; braces hold labels of alternatives", alike),
        _list("  general", "everything else that is measured", general),
    ]
    return "\n".join(filter(None, parts)) + "\n"


def _check_names(name: str, anchor: str, file: str, template: Template) -> None:
    if not name:
        raise UsageError("The concept needs a name.")
    if _UNPRINTABLE.search(name + anchor + file):
        raise UsageError(f"{ascii(name)}, --anchor or --output holds a control character. Leave it out.")
    if not anchor:
        raise UsageError(f'--anchor "" is empty. Say what to generate instead, e.g. "{template.anchor}".')
    if anchor.casefold() in _spellings(name):
        raise UsageError(f'--anchor "{anchor}" is the concept itself. Say what to generate instead of it.')


IMAGES = """\
images:                # how many images to generate; not used with images of your own
  positive: 20         # of the caption
  unlabeled: 64        # of the generic prompt
  mixed_in: 16         # of the caption, hidden among the unlabeled ones; beta is then 16 / 80 = 0.2
  keep: 16             # of each keep line, split evenly over its alternatives"""


def misspell(name: str) -> str:
    """The name with two letters in the middle of its longest word swapped; a name that is too short as it is."""
    words = name.split(" ")
    longest = max(range(len(words)), key=lambda i: len(words[i]))
    word = words[longest]
    middle = len(word) // 2
    swaps = [i for i in (*range(middle, len(word) - 1), *range(middle - 1, 0, -1)) if word[i] != word[i + 1]]
    if swaps:
        i = swaps[0]
        words[longest] = word[:i] + word[i + 1] + word[i] + word[i + 2 :]
    return " ".join(words)


def with_article(name: str) -> str:
    """The name of a thing as prompts use it: with "a" or "an" if it is a common noun in the singular."""
    first = name.split(" ")[0]
    is_plural = name.endswith("s") and not name.endswith(("ss", "us", "is"))
    if is_plural or first != first.lower() or first in ("a", "an", "the", "some", "my"):
        return name
    return f"{'an' if _AN.match(first) else 'a'} {name}"


def _spellings(name: str) -> set[str]:
    """The name without and with an article, in lower case."""
    return {name.casefold(), with_article(name).casefold()}


def _retained(template: Template, name: str, anchor: str, similar: Sequence[str]) -> list[Retained]:
    """The template's concepts to retain without the concept itself and the anchor, after the similar ones."""
    prompt = template.retained[0].prompt
    given = [
        word
        for word in dict.fromkeys(_word(text) for text in similar)
        if word and word.casefold() not in _spellings(name)
    ]
    found = [Retained(prompt, given, "alike")] if given else []
    known = {word.casefold() for word in given}
    for each in template.retained:
        if each.words == ("{anchor}",):
            words = [_word(anchor)]
        else:
            words = [word for word in each.words if not _overlap(name, word) and word.casefold() != anchor.casefold()]
        words = [word for word in words if word.casefold() not in known]
        known |= {word.casefold() for word in words}
        only_measured = each.only_measured if len(words) == len(each.words) else 0
        if words:
            found.append(each._replace(words=words, only_measured=only_measured))
    return found


def _line(retained: Retained, training: bool) -> str:
    words = retained.words[: len(retained.words) - retained.only_measured] if training else retained.words
    return retained.prompt.replace("{}", "{" + ",".join(words) + "}")


def _overlap(name: str, other: str) -> bool:
    """Whether all words of one text, apart from articles and plurals, occur in the other."""
    ours, theirs = (
        {word.rstrip("s") for word in re.findall(r"\w+", text.casefold())} - _IGNORED for text in (name, other)
    )
    return bool(ours and theirs) and (ours <= theirs or theirs <= ours)


def _word(text: str) -> str:
    """A text as one alternative in braces, in which commas and braces have a meaning."""
    return _plain(" ".join(text.replace(",", " ").split()))


def _plain(text: str) -> str:
    """Braces in a name must not be read as alternatives."""
    return text.replace("{", "(").replace("}", ")")


def _fill(templates: Sequence[str], values: dict[str, str]) -> list[str]:
    """The prompts with their placeholders filled in, each once."""
    return list(dict.fromkeys(text.format(**values) for text in templates))


def _list(key: str, comment: str, items: Sequence[str]) -> str:
    indent = " " * (len(key) - len(key.lstrip()) + 2)
    lines = [f"{indent}- {_yaml(item)}" for item in dict.fromkeys(items)]
    return "\n".join([f"{key}:   # {comment}", *lines]) if lines else f"{key}: []   # {comment}"


def _yaml(text: str) -> str:
    """A text without line breaks as a YAML value, in quotes if it needs them."""
    return yaml.safe_dump({"x": text}, allow_unicode=True, width=float("inf"))[3:].rstrip("\n")
