"""Several concepts at once: what they retain together, which images they need, and what a step of one of them holds."""

from __future__ import annotations

import dataclasses
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch

from sd_unlearn.config.base import RenderConfig
from sd_unlearn.config.train import TrainConfig
from sd_unlearn.data.batch import NO_GROUP
from sd_unlearn.data.batches import EncodedImages, NoiseSampling, StratifiedBatches
from sd_unlearn.data.concept import Concept, Evaluation, Images, expand_braces
from sd_unlearn.data.dataset import Example, members_of_sets
from sd_unlearn.data.emoji_things import CATEGORIES
from sd_unlearn.data.find_concept import read_concept
from sd_unlearn.data.layout import compose_step
from sd_unlearn.data.render_job import plan_images
from sd_unlearn.data.several import load_concepts, read_concepts, together, write_concepts
from sd_unlearn.data.turns import SEED_STEP, UNUSED, InTurn, Turn, make_turns
from sd_unlearn.errors import UsageError
from sd_unlearn.models.diffusion import Diffusion
from sd_unlearn.objectives.pu import PUObjective

pytestmark = pytest.mark.usefixtures("one_thread")
GENERIC = "an animal"
DIFFUSION = Diffusion(torch.empty(1000))
NAMES = ("cat", "dog", "cow", "pig", "hen", "fox", "ape", "bee", "elk", "owl")


def animal(name: str, share: float = 0.08, **changes: object) -> Concept:
    others = ",".join(other for other in (*NAMES, "ant") if other != name)
    concept = Concept(
        name=name,
        caption=f"a {name}",
        generic=GENERIC,
        kind="object",
        generic_share=share,
        keep=[f"a {{{others}}}", "a house"],
        images=Images(positive=4, unlabeled=6, mixed_in=0, keep=20),
        evaluate=Evaluation(alike=[f"a {{{others}}}"], general=["a house and a tree"]),
    )
    return dataclasses.replace(concept, **changes)  # type: ignore[arg-type]


def animals(count: int) -> Concept:
    return together([animal(name) for name in NAMES[:count]])


def test_a_concept_alone_is_itself() -> None:
    concept = animal("cat")
    assert together([concept]) is concept
    assert concept.parts == (concept,)


def test_what_names_another_concept_is_not_retained() -> None:
    cat, dog = together(
        [animal("cat", keep=["a {dog, ant} in a {house,kennel}", "a DOG", "a dogma"]), animal("dog")]
    ).parts
    assert cat.keep == ["a { ant} in a {house,kennel}", "a dogma"]
    assert [p.expect for p in cat.prompts("alike")] == [(name,) for name in (*NAMES[2:], "ant")]
    assert [p.text for p in dog.keep_prompts] == [*(f"a {name}" for name in (*NAMES[2:], "ant")), "a house"]


def test_a_label_and_the_prompts_of_another_concept_count_too() -> None:
    red = animal("red ink", label="red", evaluate=Evaluation(held_out=["something crimson"]))
    other = animal("cat", keep=["a {red,blue} cat", "Something  crimson", "a {crimson,something crimson}"])
    assert together([other, red]).parts[0].keep == ["a {blue} cat", "a {crimson,something crimson}"]


@pytest.mark.parametrize(
    ("template", "kept"),
    [
        ("one {red,blue} background", ["one {blue} background"]),
        ("a {red background,blue} wall", ["a {blue} wall"]),
        ("a cat on a {red,Red} background", []),
        ("a {red,blue} {house,tree}", ["a {red,blue} {house,tree}"]),
        ("a {red,blue} {car,background}", ["a {red,blue} {car}"]),
    ],
)
def test_a_concept_named_across_braces_is_not_retained(template: str, kept: list[str]) -> None:
    cat, _ = together([animal("cat", keep=[template]), animal("red background")]).parts
    assert cat.keep == kept


def test_things_of_an_erased_category_are_not_retained() -> None:
    alone = load_concepts("cat")
    weapon, cat = load_concepts(["weapon", "cat"]).parts
    assert {"pistol", "axe"} < retained(alone)
    assert retained(cat) == retained(alone) - set(CATEGORIES["weapon"])
    assert retained(weapon) == retained(load_concepts("weapon")) - {"cat"}
    _, cat = together([dataclasses.replace(part, base=None) for part in (weapon, alone)]).parts
    assert {"pistol", "axe"} < retained(cat)  # categories are of the base emoji only


def retained(concept: Concept) -> set[str]:
    """What the retained prompts ask for."""
    templates = [*concept.keep, *concept.evaluate.alike, *concept.evaluate.general]
    return {word for prompt in expand_braces(templates) for word in prompt.expect or ()}


def test_names_and_folders() -> None:
    few, many = animals(3), animals(10)
    assert (few.name, few.slug) == ("cat, dog, cow", "cat-dog-cow")
    assert (len(many.slug) <= 60, many.name.count(",")) == (True, 9)
    long = together([animal(f"a rather long name {name}") for name in NAMES])
    other = together([animal(f"a rather long name {name}") for name in NAMES[:9]])
    assert long.slug != other.slug  # cut names would be equal
    assert max(len(long.slug), len(other.slug)) <= 60


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"name": "cat"}, '"cat" is listed twice'),
        ({"caption": "A  cat"}, '"a cat" is listed twice'),
        ({"generic": "a cat"}, '"a cat" of cat is what dog is replaced with'),
        ({"generic": "A  dog"}, 'caption and generic prompt of dog are both "a dog", so nothing would be erased'),
        ({"base": "other"}, "different bases"),
        ({"betas": {"1_positive": 0.1}}, "several folders of positives"),
    ],
)
def test_concepts_that_do_not_go_together(changes: dict[str, object], fault: str) -> None:
    with pytest.raises(UsageError, match=fault):
        together([animal("cat", base="digits"), dataclasses.replace(animal("dog"), **changes)])  # type: ignore[arg-type]


def test_a_name_of_several_words_without_quotes() -> None:
    with pytest.raises(UsageError, match='must be in quotes: --concept "Van Gogh"'):
        load_concepts(["Van", "Gogh"])
    with pytest.raises(UsageError, match='If "Jane Example" is one name, put it in quotes'):
        load_concepts(["Jane", "Example"], "a woman", "person")
    assert load_concepts(["three", "two"]).name == "three, two"


def test_a_list_file_holds_names_files_and_whole_concepts(tmp_path: Path) -> None:
    write_concepts(tmp_path / "cat.yaml", animal("cat"))
    assert read_concept(tmp_path / "cat.yaml") == animal("cat")  # one concept has an ordinary file
    Path("list.yaml").write_text(f"- seven\n- {tmp_path / 'cat.yaml'}\n- {{name: elk, caption: an elk, generic: it}}\n")
    found = load_concepts("list.yaml")
    assert [part.name for part in found.parts] == ["seven", "cat", "elk"]
    write_concepts(Path("again.yaml"), found)
    assert read_concepts(Path("again.yaml")) == found
    with pytest.raises(UsageError, match="one concept without a file"):
        load_concepts(["seven", "three"], anchor="it")
    Path("empty.yaml").write_text("[]")
    with pytest.raises(UsageError, match="lists no concepts"):
        load_concepts("empty.yaml")


def test_a_list_file_is_found_by_name_and_its_paths_are_relative_to_it(tmp_path: Path) -> None:
    (tmp_path / "prompts" / "animals").mkdir(parents=True)
    write_concepts(tmp_path / "prompts" / "animals" / "cat.yaml", animal("cat"))
    Path("prompts/two.yml").write_text("- animals/cat.yaml\n- seven\n")
    assert [part.name for part in load_concepts("two").parts] == ["cat", "seven"]
    Path("prompts/two.yml").write_text("- seven\n- sevn\n")
    with pytest.raises(UsageError, match=r'prompts/two\.yml, concept 2: --concept "sevn" has no file .*"seven"'):
        load_concepts("two")


def test_shared_images_are_planned_once() -> None:
    concept = together([animal("cat"), animal("dog", images=Images(positive=3, unlabeled=10, mixed_in=2, keep=30))])
    plan = plan_images(concept, RenderConfig())
    counts = Counter({(g.name, g.prompt): 0 for g in plan})
    for group in plan:
        counts[group.name, group.prompt] += group.images
    assert counts["generic", GENERIC] == 10  # as many as the dog needs
    assert counts["keep", "a house"] == 30
    assert {p for name, p in counts if name == "keep"} == {*(f"a {n}" for n in (*NAMES[2:], "ant")), "a house"}
    assert (counts["positive", "a cat"], counts["positive", "a dog"]) == (4, 3)


def test_the_same_prompt_in_another_spelling_is_planned_once() -> None:
    """And the steps of both concepts take the images of both spellings."""
    other = animal("dog", generic="An  animal", keep=["A house"], images=Images(positive=4, unlabeled=10, mixed_in=2))
    concept = together([animal("cat", keep=["a house"]), other])
    plan = plan_images(concept, RenderConfig())
    generics = [(group.prompt, group.images) for group in plan if group.name == "generic"]
    assert generics == [(GENERIC, 6), ("An  animal", 4)]
    assert [group.images for group in plan if group.name == "keep"] == [20]
    examples = [Example(Path("0"), g.prompt, g.name, own_caption=True) for g in plan if g.name == "generic"]
    assert all(e.group == "generic" for turn in make_turns(concept, examples, [0.1, 0.1]) for e in turn.examples)


VALUES = {"cat": 3.0, "dog": 5.0, "cow": 11.0}  # losses of positives
SHARES = {"cat": 0.1, "dog": 0.3, "cow": 0.2}


def of_three() -> tuple[Concept, list[Example], list[float]]:
    """Concepts with different shares and numbers of images; the examples and their losses."""
    concept = together([animal(name, SHARES[name]) for name in VALUES])
    kinds = [("generic", GENERIC, 0, 12, 7.0), ("keep", "a house", 0, 4, 1.0)]
    kinds += [("positive", f"a {name}", n, 2 + 2 * n, VALUES[name]) for n, name in enumerate(VALUES)]
    examples, losses = [], []
    for group, text, number, count, loss in kinds:
        examples += [Example(Path(f"{i}"), text, group, number) for i in range(count)]
        losses += [loss + (i - (count - 1) / 2) for i in range(count)]  # the mean is the loss of the kind
    return concept, examples, losses


def samplers(concept: Concept, examples: list[Example], losses: list[float], turns: list[Turn]) -> InTurn:
    mean = torch.tensor(losses).view(-1, 1, 1, 1)
    text = {caption: torch.zeros(1, 1) for caption in (GENERIC, "", *concept.captions, *(e.caption for e in examples))}
    images = EncodedImages(examples, mean, torch.zeros_like(mean), text)
    config = TrainConfig(effective_batch_size=40)
    made = []
    for number, turn in enumerate(turns):
        sets = len(members_of_sets(turn.examples))
        groups, layout = compose_step(config, turn.concept, 1, True, sets, False)
        own = dataclasses.replace(images, examples=turn.examples)
        made.append(
            StratifiedBatches(own, groups, layout, NoiseSampling(DIFFUSION), SEED_STEP * number, unconditional=0.0)
        )
    return InTurn(made, 0)


def test_the_brackets_of_a_concept_hold_the_identity_of_the_risk() -> None:
    """p_U = beta p_S + (1 - beta) p_N of each concept, with its own beta and positives, in both brackets of its steps:
    on average over the images a bracket is mean_U[l] - beta mean_S[l]."""
    concept, examples, losses = of_three()
    turns = make_turns(concept, examples, list(SHARES.values()))
    steps = samplers(concept, examples, losses, turns)
    objectives = [PUObjective([turn.betas] * 2) for turn in turns]
    found: dict[int, list[torch.Tensor]] = {}
    for batch in islice(steps, 3 * 480):
        brackets = objectives[batch.turn].terms(batch.latents.flatten(), batch).brackets
        found.setdefault(batch.turn, []).append(brackets)
    for turn, name in enumerate(VALUES):
        average = torch.stack(found[turn]).mean(0)  # [groups]: under the generic and under the concept's caption
        assert average.tolist() == pytest.approx([7.0 - SHARES[name] * VALUES[name]] * 2, abs=0.05)


def test_the_images_of_a_step_are_those_of_its_concept() -> None:
    concept, examples, _ = of_three()
    examples[0] = dataclasses.replace(examples[0], group="mixed_in", caption="a dog")
    turns = make_turns(concept, examples, list(SHARES.values()))
    for number, turn in enumerate(turns):
        assert {e.caption for e in turn.examples if e.is_positive} == {turn.concept.caption}
        assert {e.positive_set for e in turn.examples} == {0}
        assert (turn.examples[0].group == UNUSED) == (number != 1)  # mixed in for the dog only
        assert turn.betas == (SHARES[turn.concept.name],)


def test_images_without_captions_are_for_every_concept() -> None:
    """With each concept's own generic prompt as the caption; an own caption that is one's generic prompt is for it."""
    concept = together([animal("cat"), animal("dog", generic="a pet")])
    examples = [
        Example(Path("0"), GENERIC, "generic"),
        Example(Path("1"), GENERIC, "negative"),
        Example(Path("2"), "a pet", "generic", own_caption=True),
        Example(Path("3"), "a sunset", "generic", own_caption=True),
        Example(Path("4"), "a house", "keep", own_caption=True),
    ]
    cat, dog = (turn.examples for turn in make_turns(concept, examples, [0.1, 0.1]))
    assert [e.caption for e in cat] == [GENERIC, GENERIC, "a pet", "a sunset", "a house"]
    assert [e.caption for e in dog] == ["a pet", "a pet", "a pet", "a sunset", "a house"]
    assert [e.group for e in cat] == ["generic", "negative", UNUSED, "generic", "keep"]
    assert [e.group for e in dog] == ["generic", "negative", "generic", "generic", "keep"]


@pytest.mark.parametrize("count", [2, 5, 10])
def test_a_step_does_not_grow_with_the_number_of_concepts(count: int) -> None:
    concept = animals(count)
    examples = [Example(Path(f"{i}"), GENERIC, "generic") for i in range(9)]
    examples += [Example(Path(f"k{i}"), "a house", "keep") for i in range(9)]
    examples += [Example(Path(f"{n}-{i}"), c, "positive", n) for n, c in enumerate(concept.captions) for i in range(4)]
    turns = make_turns(concept, examples, [0.08] * count)
    steps = samplers(concept, examples, [1.0] * len(examples), turns)
    rounds = [list(islice(steps, count)) for _ in range(3)]
    assert {len(batch.label) for batches in rounds for batch in batches} == {40}
    assert all(sorted(batch.turn for batch in batches) == list(range(count)) for batches in rounds)
    for batch in rounds[0]:  # every bracket is whole: unlabeled images and positives
        kinds = Counter(zip(batch.caption_group.tolist(), batch.label.tolist(), strict=True))
        assert {key[0] for key in kinds} == {NO_GROUP, 0, 1}
        assert all(kinds[group, label] >= 2 for group in (0, 1) for label in (-1, 0))
    if count == 10:
        assert len({tuple(batch.turn for batch in batches) for batches in rounds}) > 1  # another order every time


def test_saved_turns_continue() -> None:
    concept, examples, losses = of_three()
    turns = make_turns(concept, examples, list(SHARES.values()))
    first, second = (samplers(concept, examples, losses, turns) for _ in range(2))
    list(islice(first, 4))
    second.load_state_dict(first.state_dict())
    for one, other in zip(islice(first, 7), islice(second, 7), strict=True):
        assert one.turn == other.turn
        assert torch.equal(one.latents, other.latents)
        assert torch.equal(one.noise, other.noise)
