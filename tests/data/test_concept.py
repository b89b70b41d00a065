"""Concept files: braces, strict keys, the bundled files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from sd_unlearn.data.concept import Concept, Images, Prompt, concept_sha256, expand_braces
from sd_unlearn.data.find_concept import (
    PACKAGE,
    from_anchor,
    load_concept,
    read_concept,
)
from sd_unlearn.data.several import write_concepts
from sd_unlearn.errors import UsageError
from sd_unlearn.evaluation.evaluate import _concept_entry

SHIPPED = sorted((PACKAGE.parent / "prompts").glob("*.yaml"))
DIGITS = {"zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"}
INKS = {"white", "red", "green", "blue", "yellow"}
PEOPLE = {"Brad Pitt", "Barack Obama", "Angela Merkel", "Serena Williams", "Jackie Chan"}
EMOJI_OBJECTS = ("pistol", "knife", "bomb", "cigarette", "beer", "syringe", "cat", "guitar", "weapon")
FOREIGN = {  # how a prompt of a language begins
    "de": "ein Foto|ein Gemälde|eine Ziffer|ein Emoji",
    "fr": r"une photo|une peinture|un chiffre|un emoji : \w+|un emoji sur fond|un emoji dans",
    "es": "una foto del?|una pintura|un dígito|un emoji de|un emoji sobre|un emoji al",
    "it": "una foto di|una foto della|un dipinto|una cifra|un emoji di|un emoji su|un emoji nello",
}
ON_DIGITS = [path for path in SHIPPED if read_concept(path).base == "digits"]
ON_SD = [path for path in SHIPPED if read_concept(path).base not in ("digits", "emoji")]
MINIMAL = {"name": "x", "caption": "a photo of x", "generic": "a photo"}


def write(path: Path, **changes: object) -> Path:
    path.write_text(yaml.safe_dump(MINIMAL | changes))
    return path


def texts(prompts: list[Prompt]) -> list[str]:
    return [prompt.text for prompt in prompts]


def test_braces_list_alternatives_and_expected_labels() -> None:
    assert expand_braces(["plain"]) == [Prompt("plain", ())]
    assert expand_braces(["a {red, blue} {one,two}!"]) == [
        Prompt("a red one!", ("red", "one")),
        Prompt("a red two!", ("red", "two")),
        Prompt("a blue one!", ("blue", "one")),
        Prompt("a blue two!", ("blue", "two")),
    ]
    assert texts(expand_braces(["{a,b} {a,b}"])) == ["a a", "a b", "b a", "b b"]
    assert texts(expand_braces([r"{\1,\g<0>}"])) == [r"\1", r"\g<0>"]  # alternatives are words, not patterns
    assert expand_braces([]) == []


def test_all_concept_files_and_their_kinds() -> None:
    kinds = {concept.name: concept.kind for concept in map(read_concept, SHIPPED)}
    assert kinds == (
        dict.fromkeys(DIGITS, "digit")
        | {f"{ink} ink": "ink" for ink in INKS}
        | dict.fromkeys(PEOPLE, "person")
        | dict.fromkeys(EMOJI_OBJECTS, "object")
        | {"Santa Claus": "person", "detective": "person", "red background": "other"}
        | dict.fromkeys(("OpenMoji style", "Noto style", "EmojiOne style"), "style")
        | {"Van Gogh": "style", "church": "object", "tench": "object", "nudity": "nudity"}
    )


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_bundled_file_is_consistent(path: Path) -> None:
    concept = read_concept(path)
    assert concept.slug == path.stem
    assert load_concept(concept.name) == concept
    direct, keep = texts(concept.prompts("direct")), texts(concept.keep_prompts)
    assert direct
    assert concept.caption in direct
    for kept in keep + texts(concept.prompts("alike")) + texts(concept.prompts("general")):
        assert not any(prompt in kept for prompt in direct)
        assert not re.search(rf"\b{re.escape(concept.label or concept.name)}\b", kept, re.IGNORECASE)
    assert keep
    trained = {concept.caption, concept.generic, *keep}
    held_out = texts(concept.prompts("held_out"))
    assert len(held_out) >= 5
    assert not trained & set(held_out)
    assert not set(direct) & set(held_out)
    for group in (direct, held_out, keep):
        assert len(set(group)) == len(group)
    assert concept.generic not in direct
    assert "train" in path.read_text().splitlines()[0]  # its header is the command


def plain(prompt: str) -> str:
    return " ".join(prompt.casefold().split())


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_held_out_prompts_are_not_trained(path: Path) -> None:
    concept = read_concept(path)
    groups = {g: texts(concept.prompts(g)) for g in ("direct", "held_out", "alike", "general")}
    assert all(groups.values())
    assert concept.evaluate.direct
    assert len(set(map(plain, groups["held_out"]))) == len(groups["held_out"]) >= 8
    trained = {*concept.captions, concept.generic, *texts(concept.keep_prompts), *groups["direct"]}
    assert not set(map(plain, groups["held_out"])) & set(map(plain, trained))


@pytest.mark.parametrize("opening", FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_held_out_includes_other_languages(path: Path, opening: str) -> None:
    assert any(re.match(rf"({opening})\b", prompt) for prompt in texts(read_concept(path).prompts("held_out")))


@pytest.mark.parametrize("path", ON_SD, ids=lambda p: p.stem)
def test_expected_labels_are_among_the_zero_shot_labels(path: Path) -> None:
    concept = read_concept(path)
    label = concept.label or concept.name
    judged = {word for group in ("alike", "general") for p in concept.prompts(group) for word in p.expect}
    assert concept.base == "CompVis/stable-diffusion-v1-4"
    assert judged <= set(concept.alternatives)
    assert any(p.expect for p in concept.prompts("alike"))
    assert label not in concept.alternatives
    assert len({plain(a) for a in concept.alternatives}) == len(concept.alternatives)


@pytest.mark.parametrize("path", [p for p in ON_SD if p.stem != "brad-pitt"], ids=lambda p: p.stem)
def test_some_similar_concept_is_tested_but_not_kept(path: Path) -> None:
    concept = read_concept(path)
    assert set(texts(concept.prompts("alike"))) - set(texts(concept.keep_prompts))
    assert set(texts(concept.prompts("alike"))) & set(texts(concept.keep_prompts))


@pytest.mark.parametrize("name", ["church", "tench"])
def test_object_labels_are_words_of_imagenet_classes(name: str) -> None:
    timm = find_spec("timm")  # its table is read without importing it, which would load torchvision
    if timm is None or not timm.origin:
        pytest.skip("timm, whose table of classes this reads, is not installed")
    tables = Path(timm.origin).parent / "data" / "_info"
    lemmas = dict(row.split("\t", 1) for row in (tables / "imagenet_synset_to_lemma.txt").read_text().splitlines())
    classes = (tables / "imagenet_synsets.txt").read_text().split()
    words = [word.strip() for synset in classes for word in lemmas[synset].split(",")]
    assert len(classes) == 1000
    concept = load_concept(name)
    for label in (concept.label, *concept.alternatives):
        assert words.count(label) == 1


@pytest.mark.parametrize("path", ON_DIGITS, ids=lambda p: p.stem)
def test_bundled_base_keeps_everything_else(path: Path) -> None:
    concept = read_concept(path)
    label = concept.label or concept.name
    kept = {word for prompt in concept.keep_prompts for word in prompt.expect}
    judged = {word for group in ("alike", "general") for p in concept.prompts(group) for word in p.expect}
    assert concept.base == "digits"
    assert concept.kind == ("digit" if label in DIGITS else "ink")
    assert kept == judged == (DIGITS | INKS) - {label}


def test_the_papers_setting_is_brad_pitts_default() -> None:
    concept = load_concept("Brad Pitt")
    assert (concept.images.unlabeled, concept.images.mixed_in, concept.images.positive) == (64, 16, 20)
    assert concept.base == "CompVis/stable-diffusion-v1-4"
    assert concept == load_concept("brad-pitt") == load_concept("BRAD PITT")


def test_round_trip(tmp_path: Path) -> None:
    for number, concept in enumerate([*map(read_concept, SHIPPED), from_anchor('🙂 "x"/y: #1', "a man")]):
        write_concepts(tmp_path / f"{number}.yaml", concept)
        assert read_concept(tmp_path / f"{number}.yaml") == concept


def test_defaults(tmp_path: Path) -> None:
    concept = read_concept(write(tmp_path / "x.yaml"))
    assert concept == Concept("x", "a photo of x", "a photo")
    assert concept.prompts("direct") == [Prompt("a photo of x")]
    assert concept.prompts("held_out") == []
    assert concept.images == Images()


def test_paraphrases_are_training_captions(tmp_path: Path) -> None:
    path = write(tmp_path / "x.yaml", paraphrases=["{an,the} x", "x, please"], evaluate={"held_out": ["some x"]})
    concept = read_concept(path)
    assert concept.captions == ["a photo of x", "an x", "the x", "x, please"]
    assert read_concept(write(tmp_path / "y.yaml")).captions == ["a photo of x"]
    write_concepts(tmp_path / "again.yaml", concept)
    assert read_concept(tmp_path / "again.yaml") == concept


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"captoin": "y"}, 'unknown key "captoin".*Did you mean "caption"'),
        ({1: "y"}, 'unknown key "1"'),
        ({"images": {"postive": 3}}, 'unknown key "postive" in images.*Did you mean "positive".*keep'),
        ({"evaluate": {"heldout": []}}, 'unknown key "heldout" in evaluate.*Did you mean "held_out"'),
        ({"caption": ""}, "caption must not be empty"),
        ({"generic": None}, "generic must be text.*, not None"),
        ({"name": 7}, "name must be text.*, not 7"),
        ({"kind": "animal"}, "kind must be .*'person'.*, not 'animal'"),
        ({"generic_share": 1.0}, r"generic_share must be less than 1, not 1\.0"),
        ({"generic_share": "half"}, "generic_share must be a valid number, not 'half'"),
        ({"images": [1]}, r"images must hold keys and values, not \[1\]"),
        ({"images": {"keep": -1}}, r"images\.keep must be greater than or equal to 0, not -1"),
        ({"images": {"keep": 1.5}}, r"images\.keep must be a valid integer, not 1\.5"),
        ({"keep": "one prompt"}, "keep must be a list, not 'one prompt'"),
        ({"alternatives": [1]}, r"alternatives\[0\] must be text.*, not 1"),
        ({"evaluate": {"direct": "one"}}, r"evaluate\.direct must be a list"),
        ({"evaluate": {"direct": None}}, r"evaluate\.direct must be a list"),
        ({"label": True}, "label must be text.*, not True"),
        ({"base": 14}, "base must be text.*, not 14"),
        ({"paraphrases": "one"}, "paraphrases must be a list"),
        ({"paraphrases": ["an x", "A  photo of X"]}, r'paraphrases: "A  photo of X" is also in caption'),
        ({"paraphrases": ["a photo"]}, '"a photo" is also in generic'),
        ({"paraphrases": ["an x", "An X "]}, '"An X " is listed twice'),
        ({"paraphrases": [" "]}, "paraphrases must not hold an empty prompt"),
        ({"evaluate": {"alike": ["a cat", ""]}}, r"evaluate\.alike must not hold an empty prompt"),
        ({"keep": ["a {cat,,dog}"]}, 'keep holds an empty alternative: "a {cat,,dog}"'),
        ({"keep": ["a {}"]}, 'keep holds an empty alternative: "a {}"'),
        ({"paraphrases": ["an x"], "evaluate": {"held_out": ["AN x"]}}, r'"an x" is also in evaluate\.held_out'),
        (
            {"paraphrases": ["{an,the} x"], "evaluate": {"held_out": ["the x"]}},
            r'"the x" is also in evaluate\.held_out',
        ),
        ({"paraphrases": ["a y"], "keep": ["a {y,z}"]}, '"a y" is also in keep'),
        ({"betas": {"1_positive": 1.5}}, r"betas\.1_positive must be less than 1, not 1\.5"),
        ({"betas": {"1_positive": "much"}}, r"betas\.1_positive must be a valid number, not 'much'"),
        ({"betas": [0.1]}, "betas must hold keys and values"),
        ({"betas": {"1_positive": 0.6, "1_positive_2": 0.4}}, "betas add up to 1;"),
    ],
)
def test_invalid_file_is_refused_with_file_and_key(tmp_path: Path, changes: dict[str, object], expected: str) -> None:
    path = write(tmp_path / "mine.yaml", **{str(k): v for k, v in changes.items()})
    if 1 in changes:
        path.write_text(yaml.safe_dump(MINIMAL | changes))
    with pytest.raises(UsageError, match=f"mine.yaml.*{expected}"):
        load_concept(str(path))


@pytest.mark.parametrize("content", [b"- a\n", b"", b"a: [", b"\xff\xfe\xff", b"name: !!python/object:os.system x"])
def test_file_without_keys_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "mine.yaml").write_bytes(content)
    with pytest.raises(UsageError, match=r"--concept .*mine\.yaml") as caught:
        load_concept(str(tmp_path / "mine.yaml"))
    assert "\n" not in str(caught.value)


def test_a_key_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.yaml")
    path.write_text(path.read_text() + "keep: [a cat]\nimages: {}\nkeep: [a dog]\n")
    with pytest.raises(UsageError, match=r'mine\.yaml.* the key "keep" is in line 4 and again in line 6; keep one'):
        load_concept(str(path))


@pytest.mark.parametrize(
    "odd",
    [
        "keep: &list [*list]",
        f"keep: {'[' * 3000}{']' * 3000}",
        "keep: 2020-13-45",
        "keep: !!set {a, b}",
        "label: 2020-01-02",
        "label: !!binary aGk=",
        "label: !!int x",
        "images: {1: 2}",
        "images: {keep: 1e400}",
        "betas: {1_positive: .nan}",
        "evaluate: {direct: [[a]]}",
        "? [a]\n: b",
    ],
)
def test_odd_yaml_is_refused_in_one_line(tmp_path: Path, odd: str) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text(f"{yaml.safe_dump(MINIMAL)}{odd}\n")
    with pytest.raises(UsageError, match=r"odd\.yaml") as caught:
        read_concept(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_results_and_lora_header_record_the_same_hash(path: Path) -> None:
    """The value is that of the LoRA header's sd_unlearn.prompts_sha256; most files hold text that is not ASCII."""
    concept = read_concept(path)
    content = json.dumps(dataclasses.asdict(concept), sort_keys=True)
    assert content.isascii()
    assert concept_sha256(concept) == hashlib.sha256(content.encode()).hexdigest()
    assert _concept_entry(concept)["sha256"] == concept_sha256(concept)


BILLION = "a {" + "},{".join([",".join("abcdefghij")] * 9) + "}"


@pytest.mark.parametrize("key", ["keep", "paraphrases", "evaluate"])
def test_too_many_alternatives_are_refused_with_their_number(tmp_path: Path, key: str) -> None:
    content = {"name": "x", "caption": "a", "generic": "b", key: [BILLION]}
    if key == "evaluate":
        content[key] = {"alike": [BILLION]}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(UsageError, match=rf"x\.yaml: {key}.* stands for 1,000,000,000 prompts; up to 10,000"):
        read_concept(tmp_path / "x.yaml")


def test_too_many_images_are_refused(tmp_path: Path) -> None:
    content = {"name": "x", "caption": "a", "generic": "b", "images": {"positive": 10**11}}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(UsageError, match=r"images\.positive must be less than or equal to 1000000, not 100000000000"):
        read_concept(tmp_path / "x.yaml")


# -- names --


# -- what is erased and what is retained --


@pytest.mark.parametrize("key", ["keep", "alike", "general"])
def test_the_caption_cannot_be_retained(tmp_path: Path, key: str) -> None:
    prompts = {key: ["a photo of {y,X }"]}
    changes = prompts if key == "keep" else {"evaluate": prompts}
    with pytest.raises(UsageError, match=rf'x\.yaml: (evaluate\.)?{key}: "a photo of X" is the caption'):
        read_concept(write(tmp_path / "x.yaml", **changes))
