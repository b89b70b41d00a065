"""The file of a new concept: loads as it is, retains and measures others, and never the concept itself."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml

from sd_unlearn.choices import TemplateKind
from sd_unlearn.data.concept import Concept, Evaluation, Images, concept_sha256, parse_concept
from sd_unlearn.data.concept_kinds import TEMPLATES
from sd_unlearn.data.concept_template import concept_text, misspell, with_article
from sd_unlearn.data.find_concept import describe_anchored, from_anchor, read_concept
from sd_unlearn.errors import UsageError

PAGE = Path(__file__).parents[2] / "docs" / "concept-files.md"
BUNDLED = "\n".join(path.read_text() for path in (PAGE.parents[1] / "prompts").glob("*.yaml"))
KINDS: tuple[TemplateKind, ...] = get_args(TemplateKind)
ODD = [
    '🙂 "x"/y: #1',
    "a {curly} name",
    "yes",
    "1e3",
    "- a",
    "'",
    "Ωmega\\n",
    "O'Hara, Anna",
    "x" * 300,
    "a\n b",
    "null",
]


def parse(text: str) -> Concept:
    return parse_concept(yaml.safe_load(text), "file")


def texts(concept: Concept, group: str) -> list[str]:
    return [prompt.text for prompt in concept.prompts(group)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["Jane Example", *ODD])
def test_the_file_loads_and_is_what_an_anchor_stands_for(kind: TemplateKind, name: str, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(concept_text(name, "a, {b}: #c", kind), encoding="utf-8")
    concept = read_concept(path)
    assert (concept.name, concept.kind) == (" ".join(name.split()), kind)
    assert concept_sha256(concept) == concept_sha256(from_anchor(name, "a, {b}: #c", kind))
    assert "a, {b}: #c" in concept.generic


@pytest.mark.parametrize("kind", KINDS)
def test_others_are_retained_and_measured_and_wordings_held_out(kind: TemplateKind) -> None:
    concept = parse(concept_text("Jane Example", TEMPLATES[kind].anchor, kind, ["Jane Austen", "a b, c"]))
    kept, labels = (
        {prompt.text for prompt in concept.keep_prompts},
        {concept.label or concept.name, *concept.alternatives},
    )
    assert len(kept) >= 10
    measured = [prompt for group in ("alike", "general") for prompt in concept.prompts(group)]
    assert kept < {prompt.text for prompt in measured}  # some are only measured
    assert all(word in labels for prompt in (*concept.keep_prompts, *measured) for word in prompt.expect)
    assert sum(bool(prompt.expect) for prompt in concept.prompts("alike")) >= 2
    for similar in ("Jane Austen", "a b c"):
        assert any(similar in text for text in kept)
        assert any(similar in text for text in texts(concept, "alike"))
    held_out = texts(concept, "held_out")
    assert len(set(held_out)) == len(held_out) >= 8
    assert not {concept.caption, concept.generic, *kept} & set(held_out)
    assert not any("Example" in text for text in (concept.generic, *kept, *(prompt.text for prompt in measured)))
    assert sum("Jane Example" in text for text in held_out) == len(held_out) - 1  # one is misspelt


@pytest.mark.parametrize(
    ("kind", "name", "anchor", "absent"),
    [
        ("person", "Barack Obama", "a man", "Obama"),
        ("person", "Obama", "a man", "Obama"),
        ("person", "a chef", "a young man", "chef"),
        ("person", "Jane", "a young man", "a young man"),
        ("style", "Monet", "a painting", "Monet"),
        ("object", "dogs", "a wolf", "a dog"),
        ("object", "city street", "a village", "city street"),
        ("other", "ship", "a boat", "ship"),
    ],
)
def test_neither_the_concept_nor_the_anchor_is_retained(
    kind: TemplateKind, name: str, anchor: str, absent: str
) -> None:
    concept = parse(concept_text(name, anchor, kind))
    assert not any(absent in text for text in (*texts(concept, "general"), *(p.text for p in concept.keep_prompts)))
    assert absent == anchor or not any(absent in text for text in texts(concept, "alike"))


@pytest.mark.parametrize("similar", ["PISTOL", "A Pistol", " pistol "])
def test_the_concept_is_never_a_similar_one(similar: str) -> None:
    assert concept_text("pistol", "a water gun", "object", [similar]) == concept_text("pistol", "a water gun", "object")
    with pytest.raises(UsageError, match="is the concept itself"):
        concept_text("pistol", similar, "object")


def test_names_in_templates_occur_in_the_bundled_files() -> None:
    for kind in KINDS:
        for retained in TEMPLATES[kind].retained:
            for word in retained.words:
                assert not re.search(r"[A-Z]{2}|[A-Z][a-z]", word) or word in BUNDLED
                assert not re.search(r"\b(girl|boy|child|teen)", word)


@pytest.mark.parametrize("anchor", ["", " ", "jane example"])
def test_an_anchor_that_says_nothing_is_refused(anchor: str) -> None:
    with pytest.raises(UsageError, match="--anchor"):
        concept_text("Jane Example", anchor, "person")


@pytest.mark.parametrize("character", ["\0", "\x07", "\x7f", "\x9b", "\udc80", "\uffff"])
def test_control_characters_are_refused(character: str) -> None:
    for name, anchor, file in (
        (f"a{character}b", "c", None),
        ("a", f"c{character}", None),
        ("a", "c", f"{character}x"),
    ):
        with pytest.raises(UsageError, match="control character"):
            concept_text(name, anchor, file=file)
    assert from_anchor("👨\u200d👩\u200d👧", "a cat").name == "👨\u200d👩\u200d👧"


def test_small_words() -> None:
    assert [misspell(name) for name in ("Brad Pitt", "Jane Example", "a", "aaa")] == [
        "Brda Pitt",
        "Jane Exapmle",
        "a",
        "aaa",
    ]
    named = ["owl", "cup", "a cup", "Eiffel Tower", "dogs", "glass", "bus", "some cheese"]
    assert [with_article(name) for name in named] == [
        *("an owl", "a cup", "a cup", "Eiffel Tower", "dogs", "a glass", "a bus", "some cheese")
    ]


@pytest.mark.parametrize(
    "named",
    ["a unicorn", "a uniform", "a utensil", "a used car", "a one-way sign", "a ewe", "a horse", "a hotel"]
    + ["an hourglass", "an heirloom", "an umbrella", "an uninhabited island", "an onion", "an ostrich", "an urn"],
)
def test_the_article_follows_the_sound(named: str) -> None:
    assert with_article(named.split(" ", 1)[1]) == named


def test_wordings_of_an_object_in_other_languages_have_no_english_article() -> None:
    held_out = texts(from_anchor("unicorn", "a horse", "object"), "held_out")
    assert {"ein Foto von unicorn", "une photo de unicorn", "a photo of a uniocrn", "a unicorn in the rain"} <= set(
        held_out
    )


@pytest.mark.parametrize("name", ["Bo", "龙", "ox"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_name_that_is_too_short_to_misspell_has_no_misspelling(name: str, kind: TemplateKind) -> None:
    concept = from_anchor(name, "something else", kind)
    assert concept.caption not in texts(concept, "held_out")
    assert len(texts(concept, "held_out")) == len(TEMPLATES[kind].held_out) - 1


def test_what_is_retained_is_said() -> None:
    concept = from_anchor("Jane Example", "a middle aged woman", "person")
    text = describe_anchored(concept)
    assert '"a photo of a middle aged woman" replaces "a photo of Jane Example"' in text
    assert f"{len(concept.keep_prompts)} prompts (Barack Obama, Angela Merkel" in text
    assert "sd-unlearn concepts new 'Jane Example' --kind person --anchor 'a middle aged woman'" in text
    assert "Barack" not in describe_anchored(concept, own_images=True)


# -- the page --


def _keys() -> dict[str, Any]:
    """Key of a concept file -> default, as the dataclasses define them."""
    found: dict[str, Any] = {}
    for prefix, kind in (("", Concept), ("images.", Images), ("evaluate.", Evaluation)):
        for each in dataclasses.fields(kind):
            factory = each.default_factory
            found[prefix + each.name] = factory() if factory is not dataclasses.MISSING else each.default
    return {key: value for key, value in found.items() if key not in ("images", "evaluate")}


def test_the_page_lists_every_key_with_its_default() -> None:
    rows = re.findall(r"^\| `([\w.]+)` \| (.*?) \| (.*?) \| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    keys = _keys()
    listed = {key: (types, default) for key, types, default, _ in rows if key not in KINDS}
    assert set(listed) == set(keys)
    words = {"label": "the name", "base": "[Stable Diffusion 1.4](bases.md)", "evaluate.direct": "the caption"}
    for key, default in keys.items():
        expected = words.get(key) or ("required" if default is dataclasses.MISSING else f"`{default}`")
        assert listed[key][1] == expected, key
    kinds = get_args(get_type_hints(Concept)["kind"])
    assert tuple(re.findall(r"`(\w+)`", listed["kind"][0])) == kinds


def test_the_page_lists_the_kinds_of_templates() -> None:
    assert set(re.findall(r"^\| `(\w+)`(?: \(default\))? \| an? ", PAGE.read_text(), re.MULTILINE)) == set(KINDS)


def test_the_example_of_the_page_is_valid() -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    concept = parse(example)
    assert {word for p in concept.prompts("alike") for word in p.expect} <= set(concept.alternatives)


def test_a_style_is_also_trained_beside_subjects() -> None:
    """A style that goes under its own caption only comes back beside a subject (docs/tuning.md, 2026-11-30)."""
    style = parse(concept_text("Jane Example", "a painting by an unknown artist", "style"))
    assert style.captions[0] == "an artwork in the style of Jane Example"
    assert "a picture of a ship in the style of Jane Example" in style.captions
    assert not {*style.captions[1:]} & {*texts(style, "held_out"), *texts(style, "direct"), *style.keep}
    assert parse(concept_text("Jane Example", "a woman", "person")).captions == ["a photo of Jane Example"]
