"""What the concept files of each kind have in common: captions, retained concepts, wordings that are held out.

Retained concepts are adults of several ages and jobs, well-known people and painters that also occur in the bundled
files, and everyday things and places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from sd_unlearn.choices import TemplateKind


class Retained(NamedTuple):
    """Concepts to retain: trained on as one keep line, and measured in one prompt group of the evaluation."""

    prompt: str  # {} stands for the words
    words: Sequence[str]
    group: Literal["alike", "general"]
    only_measured: int = 0  # how many of the words, the last ones, are not in the keep line


@dataclass(frozen=True)
class Template:
    """What the concept files of one kind have in common. {name}, {bare} (no article) and {anchor} are filled in."""

    about: str
    caption: str
    generic: str
    anchor: str  # an example
    similar: str  # whom or what to retain above all, for questions and comments
    retained: tuple[Retained, ...]
    held_out: tuple[str, ...]
    general: tuple[str, ...]  # further prompts, not classified
    label: str = ""
    paraphrases: tuple[str, ...] = ()


PHOTO, CAPTION, GENERIC = "a photo of {}", "a photo of {name}", "a photo of {anchor}"
FOREIGN = ("ein Foto von {bare}", "une photo de {bare}", "una foto de {bare}", "una foto di {bare}")
PLACES = Retained(PHOTO, ("a dog", "a city street", "a bowl of fruit", "a living room"), "general")
THINGS = (
    Retained(PHOTO, ("a dog", "a cat", "a horse", "a bird"), "general"),
    Retained(PHOTO, ("a car", "a bicycle", "a chair", "a cup"), "general"),
    Retained(PHOTO, ("a tree", "a mountain", "a city street", "a kitchen"), "general"),
    Retained(PHOTO, ("a woman", "a man"), "general"),
)
_THING = {
    "caption": CAPTION,
    "generic": GENERIC,
    "similar": "similar things, e.g. a mosque and a castle for a church",
    "held_out": (
        "a close-up of {name}",
        "{name} in the rain",
        "a pencil drawing of {name}",
        "a photo of {misspelt}",
        *FOREIGN,
    ),
    "general": ("a painting of a ship at sea", "people waiting at a bus stop"),
}

TEMPLATES: dict[TemplateKind, Template] = {
    "person": Template(
        about="A person. Other people are retained, above all people who look or sound similar.",
        caption=CAPTION,
        generic=GENERIC,
        anchor="a middle aged woman",
        similar="people who look similar, do the same or share a name",
        retained=(
            Retained(
                PHOTO,
                ("Barack Obama", "Angela Merkel", "Serena Williams", "Jackie Chan", "Tom Hanks"),
                "alike",
                only_measured=1,
            ),
            Retained(PHOTO, ("a young woman", "an elderly woman", "a young man", "an elderly man"), "alike"),
            Retained(PHOTO, ("a nurse", "a farmer", "a chef", "a firefighter"), "general"),
            PLACES,
        ),
        held_out=(
            "a portrait of {name} in a garden",
            "{name} laughing in an interview",
            "a close-up of {name} in the rain",
            "a photo of {misspelt}",
            *FOREIGN,
        ),
        general=("a photo of a woman reading in a cafe", "a crowd at a concert"),
    ),
    "style": Template(
        about="A style: how something is made, not what it shows. Other styles are retained.",
        caption="an artwork in the style of {name}",
        generic="{anchor}",
        anchor="a painting by an unknown artist",
        similar="similar styles, as whole phrases, e.g. a Claude Monet painting",
        label="an artwork in the style of {name}",
        paraphrases=(
            "a picture of {{a woman,a child,a crowd,a house,a city street,a ship}} in the style of {name}",
            "a picture of {{a horse,a dog,a vase of flowers,a table,mountains,a forest}} in the style of {name}",
        ),
        retained=(
            Retained(
                "{}",
                (
                    *("a Claude Monet painting", "a Pablo Picasso painting", "a Rembrandt painting"),
                    *("an Edvard Munch painting", "a Paul Cezanne painting"),
                ),
                "alike",
                only_measured=1,
            ),
            Retained("{} of a house", ("a pencil drawing", "a watercolour", "a cartoon", "a 3D render"), "alike"),
            PLACES,
        ),
        held_out=(
            "a steam train crossing a viaduct, in the style of {name}",
            "a lighthouse in a storm, in the manner of {name}",
            "a portrait of a man in the style of {misspelt}",
            "a bowl of lemons, {name} style",
            "ein Bild im Stil von {name}",
            "une image dans le style de {name}",
            "una imagen al estilo de {name}",
            "un'immagine nello stile di {name}",
        ),
        general=("a photo of sunflowers in a field", "a photo of the night sky over a village"),
    ),
    "object": Template(
        about="An object. Other things are retained, above all similar ones.",
        anchor="a barn",
        retained=(Retained(PHOTO, ("{anchor}",), "alike", only_measured=1), *THINGS),
        **_THING,  # type: ignore[arg-type]
    ),
    "other": Template(
        about="A concept of no particular kind. Animals, things, places and people are retained.",
        anchor="a cat",
        retained=(Retained(PHOTO, ("{anchor}",), "alike", only_measured=1), *THINGS),
        **_THING,  # type: ignore[arg-type]
    ),
}
