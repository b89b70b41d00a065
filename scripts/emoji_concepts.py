"""Write the concept files of the bundled base `emoji` to prompts/.

    python scripts/emoji_concepts.py                    # the bundled ones
    python scripts/emoji_concepts.py guitar noto blue   # of other things, styles, backgrounds and categories

A label of the classifier names a concept. Of a category, the things are in the held-out prompts: do all of them go?
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from emoji_captions import BACKGROUND_NAMES, STYLE_NAMES, with_article
from emoji_data import Thing, things

from sd_unlearn.io.paths import slugify
from sd_unlearn.metrics.emoji import BACKGROUNDS, CATEGORIES, STYLES

BUNDLED = (
    *("pistol", "knife", "bomb", "cigarette", "beer", "syringe", "cat", "guitar", "Santa Claus", "detective"),
    *("openmoji", "noto", "emojione", "red", "weapon"),
)
PROMPTS = Path(__file__).parent.parent / "prompts"
IMAGES = "{positive: 100, unlabeled: 300, mixed_in: 16, keep: 70}  # keep: of each line, split over its alternatives"
HELD_OUT, TRAINED = slice(0, None, 15), slice(4, None, 6)  # of the things, that held-out prompts and paraphrases name
IN_A_LINE = 25  # things of a keep line, so that each has about three keep images


def concept_file(label: str) -> tuple[str, str]:
    """The name and the content of a concept file."""
    by_name = {thing.name: thing for thing in things()}
    if label in by_name:
        return _thing(by_name[label])
    if label in STYLES:
        return _style(label)
    return _background(label) if label in BACKGROUNDS else _category(label)


def _thing(thing: Thing) -> tuple[str, str]:
    phrase = thing.with_article()
    alike = [other for other in things() if other.category == thing.category and other != thing]
    held_out = [
        f"a picture of {phrase}",
        f"an icon of {phrase}",
        f"{thing.name} emoji",
        f"an emoji of {phrase} on a blue background",
        f"an emoji of {phrase} in the Noto style",
        *(f"an emoji of {thing.with_article(synonym)}" for synonym in thing.synonyms),
        *_in_other_languages(thing),
        f"an emoji of {phrase[:-2]}{phrase[-1]}{phrase[-2]}",  # misspelt
    ]
    kind = "person" if thing.category == "person" else "object"
    others = [other for other in things() if other != thing and other not in alike]
    general = [*_any_of(others), _STYLES, _BACKGROUNDS]
    return thing.name, _text(thing.name, kind, thing.name, f"an emoji of {phrase}", held_out, _alike(alike), general)


def _style(label: str) -> tuple[str, str]:
    name, other = STYLE_NAMES[label]
    held_out = [f"{with_article(name)} emoji", f"an icon in the {name} style", f"a picture in the {name} style"]
    held_out += [f"an emoji in the {other} style"] if other != name else []
    held_out += [f"ein Emoji im Stil von {name}", f"un emoji dans le style {name}"]
    held_out += [f"un emoji al estilo de {name}", f"un emoji nello stile {name}"]
    held_out += [f"an emoji of {thing.with_article()} in the {name} style" for thing in things()[HELD_OUT]]
    alike = [_STYLES.replace(f"{label},", "").replace(f",{label}}}", "}")]
    general = [*_any_of(things()), _BACKGROUNDS]
    caption = f"an emoji in the {name} style"
    named = ",".join(thing.with_article() for thing in things()[TRAINED])
    several = _beside_things(f"in the {name} style", f"{{{named}}}")
    return f"{name} style", _text(f"{name} style", "style", label, caption, held_out, alike, general, several)


def _background(label: str) -> tuple[str, str]:
    de, fr, es, it = (names[BACKGROUNDS.index(label)] for names in BACKGROUND_NAMES.values())
    held_out = [f"a {label} background", f"an emoji in the Noto style on a {label} background"]
    held_out += [f"ein Emoji auf {de} Hintergrund", f"un emoji sur fond {fr}"]
    held_out += [f"un emoji sobre fondo {es}", f"un emoji su sfondo {it}"]
    held_out += [f"an emoji of {thing.with_article()} on a {label} background" for thing in things()[HELD_OUT]]
    alike = [_BACKGROUNDS.replace(f"{label},", "").replace(f",{label}}}", "}")]
    caption, name = f"an emoji on a {label} background", f"{label} background"
    several = _beside_things(f"on a {label} background", "a {car,heart,lion}")  # many wear down what is retained
    return name, _text(name, "other", label, caption, held_out, alike, [*_any_of(things()), _STYLES], several)


def _beside_things(phrase: str, named: str) -> list[str]:
    """Paraphrases of a style or background: trained on its own caption only, it comes back in prompts with a thing."""
    return [f"an emoji of {named} {phrase}", f"house emoji {phrase}"]


def _category(label: str) -> tuple[str, str]:
    members = [thing for thing in things() if thing.category == label]
    held_out = [f"a picture of {with_article(label)}", *(f"an emoji of {thing.with_article()}" for thing in members)]
    held_out += _in_other_languages(members[0])
    others = [thing for thing in things() if thing not in members]
    near = [thing for thing in others if thing.category == "tool"] if label == "weapon" else others[:10]
    general = [*_any_of([thing for thing in others if thing not in near]), _STYLES, _BACKGROUNDS]
    caption = f"an emoji of {with_article(label)}"
    return label, _text(label, "object", label, caption, held_out, _alike(near), general)


_STYLES = f"an emoji in the {{{','.join(STYLES)}}} style"
_BACKGROUNDS = f"an emoji on a {{{','.join(BACKGROUNDS)}}} background"


def _in_other_languages(thing: Thing) -> list[str]:
    words = thing.translations
    return [f"ein Emoji: {words['de']}", f"un emoji : {words['fr']}"] + [
        f"un emoji {of} {words[language]}" for of, language in (("de", "es"), ("di", "it"))
    ]


def _any_of(several: Sequence[Thing]) -> list[str]:
    """Prompts for things in lines of about equal length."""
    lines = -(-len(several) // IN_A_LINE)
    return [f"{{{','.join(thing.name for thing in several[i::lines])}}} emoji" for i in range(lines)]


def _alike(several: Sequence[Thing]) -> list[str]:
    """Prompts for things with their articles, one for each article."""
    by_article = groupby(sorted(several, key=lambda thing: thing.article), lambda thing: thing.article)
    names = [(article, ",".join(thing.name for thing in group)) for article, group in by_article]
    return [" ".join(filter(None, ("an emoji of", article, f"{{{of}}}"))) for article, of in names]


def _text(
    name: str,
    kind: str,
    label: str,
    caption: str,
    held_out: list[str],
    alike: list[str],
    general: list[str],
    paraphrases: Sequence[str] = (),
) -> str:
    def listed(key: str, prompts: Sequence[str], indent: str = "") -> str:
        return "".join([f"{indent}{key}:\n", *(f'{indent}  - "{prompt}"\n' for prompt in prompts)]) if prompts else ""

    return (
        f'# sd-unlearn train --concept "{name}"\n'
        f"# Of the bundled base emoji; written by scripts/emoji_concepts.py.\n"
        f"name: {name}\nkind: {kind}\nbase: emoji\nlabel: {label}\ncaption: {caption}\ngeneric: an emoji\n"
        f"images: {IMAGES}\n"
        + listed("paraphrases", paraphrases)
        + listed("keep", [*alike, *general])
        + "evaluate:\n"
        + listed("direct", [caption], "  ")
        + listed("held_out", held_out, "  ")
        + listed("alike", alike, "  ")
        + listed("general", general, "  ")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [*(thing.name for thing in things()), *STYLES, *BACKGROUNDS, *CATEGORIES]
    parser.add_argument("labels", nargs="*", metavar="LABEL", default=BUNDLED)
    parser.add_argument("--output_dir", type=Path, default=PROMPTS)
    args = parser.parse_args()
    if unknown := [label for label in args.labels if label not in known]:
        parser.error(f"unknown: {', '.join(unknown)}. Known: {', '.join(known)}")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for label in args.labels:
        name, text = concept_file(label)
        (args.output_dir / f"{slugify(name)}.yaml").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
