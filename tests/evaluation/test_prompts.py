"""The image plan: counts, seeds, file names."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from sd_unlearn.data.concept import Concept, Evaluation, Prompt
from sd_unlearn.errors import UsageError
from sd_unlearn.evaluation.prompts import (
    GROUPS,
    TIERS,
    Tier,
    count_used,
    override_counts,
    plan_images,
    to_prompted_images,
    write_plan,
)
from sd_unlearn.io.reading import read_jsonl
from sd_unlearn.seeds import EVALUATE_SEEDS

CONCEPT = Concept(
    "seven",
    "a seven",
    "a digit",
    evaluate=Evaluation(direct=["a seven"], held_out=["une sept", "ein Sieben"], alike=["a {one,two,three}"]),
)


def count(specs: list, group: str) -> int:
    return sum(spec.group == group for spec in specs)


def test_images_of_a_group_are_shared_between_its_prompts() -> None:
    specs = plan_images(CONCEPT, Tier(5, 5, 4, 7, 9), [0])
    assert {group: count(specs, group) for group in GROUPS} == {
        "direct": 5,
        "held_out": 5,
        "generic": 4,
        "alike": 7,
        "general": 0,  # the file has no general prompts
    }
    of = [spec.prompt.text for spec in specs if spec.group == "alike"]
    assert sorted(of.count(text) for text in set(of)) == [2, 2, 3]
    assert all(spec.prompt.expect for spec in specs if spec.group == "alike")


def test_images_of_each_prompt() -> None:
    specs = plan_images(CONCEPT, override_counts(TIERS["digits"], 2, 4, []), [0])
    assert [count(specs, group) for group in GROUPS] == [2, 2, 2, 12, 0]


def test_larger_plan_contains_the_smaller_one() -> None:
    """So that a higher count generates only the missing images."""
    small, large = plan_images(CONCEPT, Tier(5, 5, 4, 7, 9), [0]), plan_images(CONCEPT, Tier(50, 20, 10, 30, 9), [0, 1])
    assert {spec.file_name for spec in small} < {spec.file_name for spec in large}
    each = plan_images(CONCEPT, Tier(5, 5, 4, 3, 3, of_each_prompt=True), [0])
    assert {s.file_name for s in small if s.group == "alike"} <= {s.file_name for s in each if s.group == "alike"}


def test_seeds_are_unique_and_in_the_evaluation_range() -> None:
    specs = plan_images(CONCEPT, Tier(20, 20, 20, 20, 20), [0, 1])
    assert len({(spec.prompt.text, spec.seed) for spec in specs}) == len(specs)
    assert all(EVALUATE_SEEDS[0] <= spec.seed < EVALUATE_SEEDS[1] for spec in specs)
    assert {spec.number for spec in specs} == {0, 1}
    assert to_prompted_images(CONCEPT, specs).seeds.sum() == len(specs) / 2


def test_a_plan_of_too_many_images_is_refused_before_it_is_made() -> None:
    tier = override_counts(TIERS["quick"], 10**11, None, [])
    with pytest.raises(UsageError, match="100,000,000,000 or more images, but at most 1,000,000"):
        plan_images(CONCEPT, tier, [0])


def test_groups_option() -> None:
    only = override_counts(TIERS["quick"], None, None, ["held_out", "alike"])
    assert (only.direct, only.held_out, only.generic, only.alike, only.general) == (0, 100, 0, 100, 0)
    with pytest.raises(UsageError, match='"held-out".*held_out'):
        override_counts(TIERS["quick"], None, None, ["held-out"])


def test_extra_prompts_are_direct_prompts() -> None:
    specs = plan_images(CONCEPT, Tier(6, 0, 0, 0, 0), [0], [Prompt("seven of them")])
    assert [spec.prompt.text for spec in specs].count("seven of them") == 3


def test_every_prompt_of_a_set_is_used_unless_a_number_of_images_is_given() -> None:
    extra = [Prompt(f"{n} of them") for n in range(20)] * 2
    for tier, every, used in (
        (Tier(6, 3, 0, 3, 0), True, 20),
        (Tier(6, 3, 0, 3, 0), False, 5),
        (Tier(0, 3, 0, 3, 0), True, 0),
    ):
        plans = {"seven": plan_images(CONCEPT, tier, [0, 1], extra, every)}
        assert count_used(plans, extra) == (used, 20)
        counts = Counter(spec.group for spec in plans["seven"])
        assert counts["direct"] == 2 * (tier.direct and max(6, used + 1))
        assert (counts["held_out"], counts["alike"]) == (2 * tier.held_out, 2 * tier.alike)


def test_equal_prompts_are_one() -> None:
    """Their images would be the same files, each counted twice."""
    evaluation = Evaluation(
        direct=["a seven"],
        held_out=["a seven"],
        alike=["a {one,two}", "a one"],
        general=["a two", "a {three}", "a three"],
    )
    concept = Concept("seven", "a seven", "a digit", evaluate=evaluation)
    extra = [Prompt(text) for text in ("a seven", "sevens", "sevens")]
    for tier in (Tier(6, 6, 0, 6, 6), Tier(6, 6, 0, 6, 6, of_each_prompt=True)):
        specs = plan_images(concept, tier, [0, 1], extra)
        for groups in (["direct"], ["held_out"], ["alike", "general"]):
            names = [spec.file_name for spec in specs if spec.group in groups]
            assert len(set(names)) == len(names)
        texts = {group: sorted({s.prompt.text for s in specs if s.group == group}) for group in GROUPS}
        assert texts == {
            "direct": ["a seven", "sevens"],
            "held_out": ["a seven"],
            "generic": [],
            "alike": ["a one", "a two"],
            "general": ["a three"],
        }
        assert all(
            spec.prompt.expect for spec in specs if spec.group in ("alike", "general")
        )  # the first of equal ones


def test_written_plan_lists_every_file_once(tmp_path: Path) -> None:
    specs = plan_images(CONCEPT, Tier(3, 3, 0, 3, 0), [0])
    write_plan(tmp_path / "plan.jsonl", {"seven": specs, "again": specs})
    lines = read_jsonl(tmp_path / "plan.jsonl")
    assert [line["file_name"] for line in lines] == [spec.file_name for spec in specs]
    assert lines[0] == {
        "file_name": specs[0].file_name,
        "text": "a seven",
        "seed": specs[0].seed,
        "group": "direct",
        "concept": "seven",
    }


@pytest.mark.parametrize("content", ["my plan\n", '{"file_name": "a.png"}\n', '{"a": 1}'])
def test_a_plan_never_replaces_another_file(tmp_path: Path, content: str) -> None:
    plans = {"seven": plan_images(CONCEPT, Tier(1, 0, 0, 0, 0), [0])}
    path = tmp_path / "plan.txt"
    path.write_text(content)
    with pytest.raises(UsageError, match="--write_plan .* exists and is not a plan"):
        write_plan(path, plans)
    assert path.read_text() == content
    path.unlink()
    path.mkdir()
    with pytest.raises(UsageError, match="--write_plan .* exists and is not a plan"):
        write_plan(path, plans)
    write_plan(tmp_path / "new.txt", plans)
    write_plan(tmp_path / "new.txt", {"seven": plan_images(CONCEPT, Tier(3, 0, 0, 0, 0), [0])})
    assert len(read_jsonl(tmp_path / "new.txt")) == 3
