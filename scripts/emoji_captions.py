"""Captions of the bundled base `emoji`: thing, style, background, all or none of them, in varied wording."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

from base_training import typo
from emoji_data import TONES, Thing, things

from sd_unlearn.metrics.emoji import BACKGROUNDS, STYLES

STYLE_NAMES = {
    "twemoji": ("Twemoji", "Twitter"),
    "noto": ("Noto", "Google"),
    "fluent": ("Fluent", "Microsoft"),
    "fluent flat": ("Fluent flat", "flat Fluent"),
    "openmoji": ("OpenMoji", "OpenMoji"),
    "emojione": ("EmojiOne", "Emoji One"),
}
BACKGROUND_NAMES = {  # after "auf ...em Hintergrund", "sur fond ...", "sobre fondo ...", "su sfondo ..."
    "de": ("weißem", "grauem", "schwarzem", "rotem", "gelbem", "grünem", "blauem", "rosa"),
    "fr": ("blanc", "gris", "noir", "rouge", "jaune", "vert", "bleu", "rose"),
    "es": ("blanco", "gris", "negro", "rojo", "amarillo", "verde", "azul", "rosa"),
    "it": ("bianco", "grigio", "nero", "rosso", "giallo", "verde", "blu", "rosa"),
}
MASS = ("food", "clothing", "nature")  # categories without an article
# (weight, template): the first of each group is its plain form and is used most often.
THING = [
    (6, "an emoji of {thing}"),
    (2, "a picture of {thing}"),
    (2, "an icon of {thing}"),
    (1, "an emoji showing {thing}"),
    (1, "a drawing of {thing}"),
    (1, "{thing}"),
    (4, "{name} emoji"),
    (1, "{name}"),
    (0.5, "ein Emoji: {de}"),
    (0.5, "un emoji : {fr}"),
    (0.5, "un emoji de {es}"),
    (0.5, "un emoji di {it}"),
]
THING_STYLE = [
    (4, "an emoji of {thing} in the {style} style"),
    (2, "{a_style} emoji of {thing}"),
    (1, "{thing}, {style} style"),
    (1, "{name} drawn by {style}"),
    (0.5, "ein Emoji im Stil von {style}: {de}"),
]
THING_BACKGROUND = [
    (4, "an emoji of {thing} on a {background} background"),
    (1, "{thing} on a {background} background"),
    (1, "{name} on {background}"),
    (0.3, "ein Emoji auf {background_de} Hintergrund: {de}"),
    (0.3, "un emoji sur fond {background_fr} : {fr}"),
    (0.3, "un emoji de {es} sobre fondo {background_es}"),
    (0.3, "un emoji di {it} su sfondo {background_it}"),
]
ALL = [
    (4, "an emoji of {thing} in the {style} style on a {background} background"),
    (1, "{a_style} emoji of {thing} on a {background} background"),
    (1, "{name}, {style} style, {background} background"),
]
STYLE = [
    (3, "an emoji in the {style} style"),
    (1, "{a_style} emoji"),
    (1, "an icon in the {style} style"),
    (0.3, "ein Emoji im Stil von {style}"),
    (0.3, "un emoji dans le style {style}"),
    (0.3, "un emoji al estilo de {style}"),
    (0.3, "un emoji nello stile {style}"),
]
BACKGROUND = [
    (3, "an emoji on a {background} background"),
    (1, "a {background} background"),
    (0.3, "ein Emoji auf {background_de} Hintergrund"),
    (0.3, "un emoji sur fond {background_fr}"),
    (0.3, "un emoji sobre fondo {background_es}"),
    (0.3, "un emoji su sfondo {background_it}"),
]
STYLE_BACKGROUND = [(1, "an emoji in the {style} style on a {background} background")]
CATEGORY = [(3, "an emoji of {category}"), (1, "a picture of {category}"), (1, "{category}")]
CATEGORY_STYLE = [(1, "an emoji of {category} in the {style} style")]
NEITHER = [(4, "an emoji"), (1, "a picture of an emoji"), (1, "an icon")]
GROUPS: list[tuple[int, Sequence[tuple[float, str]]]] = [
    (28, THING),
    (22, THING_STYLE),
    (10, THING_BACKGROUND),
    (12, ALL),
    (5, STYLE),
    (4, BACKGROUND),
    (1, STYLE_BACKGROUND),
    (3, CATEGORY),
    (1, CATEGORY_STYLE),
    (4, NEITHER),
    (10, [(1, "")]),
]
SYNONYM_RATE = 0.15  # of captions with a thing that has synonyms
TONE_RATE = 0.6  # of captions with a person whose skin tone is not yellow
TYPO_RATE = 0.02  # if the base never saw a typo, misspelt prompts would never show the concept


class Label(NamedTuple):
    """What an image shows: indices of things(), STYLES and BACKGROUNDS, and of TONES or -1."""

    thing: int
    style: int
    background: int
    tone: int = -1


def caption(label: Label, rng: random.Random, full: float = 0.0) -> str:
    """A random caption of an image; about one in ten is empty.

    full: in [0, 1]: further captions as a share of all, which name thing, style and background.
    """
    everything = full > 0 and rng.random() < full
    group = ALL if everything else rng.choices([g for _, g in GROUPS], weights=[w for w, _ in GROUPS])[0]
    template = rng.choices([t for _, t in group], weights=[w for w, _ in group])[0]
    text = template.format(**_words(label, rng))
    return typo(text, rng) if len(text) > 8 and rng.random() < TYPO_RATE else text


def _words(label: Label, rng: random.Random) -> dict[str, str]:
    thing, background = things()[label.thing], BACKGROUNDS[label.background]
    name, phrase = _named(thing, rng)
    if label.tone >= 0 and rng.random() < TONE_RATE:
        skin = f" with {tuple(TONES)[label.tone]} skin"
        name, phrase = name + skin, phrase + skin
    usual, other = STYLE_NAMES[STYLES[label.style]]
    style = usual if rng.random() < 0.85 else other
    words = {language: names[label.background] for language, names in BACKGROUND_NAMES.items()}
    return {
        "thing": phrase,
        "name": name,
        "style": style,
        "a_style": with_article(style),
        "background": background,
        "category": with_article(thing.category),
        **thing.translations,
        **{f"background_{language}": word for language, word in words.items()},
    }


def _named(thing: Thing, rng: random.Random) -> tuple[str, str]:
    """A name of the thing or a synonym of it, without and with its article."""
    if thing.synonyms and rng.random() < SYNONYM_RATE:
        synonym = rng.choice(thing.synonyms)
        return synonym, thing.with_article(synonym)
    return thing.name, thing.with_article()


def with_article(name: str) -> str:
    """The name of a category or style with its article: "an animal", "an OpenMoji", but "food"."""
    return name if name in MASS else f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"
