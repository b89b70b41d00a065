"""Which concept a name means: a file of the user's, a bundled one, or one built from an anchor."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import yaml

from sd_unlearn.data.find_concept import concept_files, describe_anchored, from_anchor, load_concept
from sd_unlearn.errors import UsageError
from sd_unlearn.io.paths import concept_slug


def write(path: Path, **changes: object) -> None:
    path.write_text(yaml.safe_dump({"name": "x", "caption": "a photo of x", "generic": "a photo"} | changes))


def test_working_folder_overrides_bundled_file(tmp_path: Path) -> None:
    (tmp_path / "prompts").mkdir()
    write(tmp_path / "prompts" / "seven.yaml", name="seven", caption="my own seven")
    assert load_concept("seven").caption == "my own seven"
    assert "eight" in concept_files()


@pytest.mark.parametrize("file", ["Jane_Q.yaml", "jane q.yml"])
@pytest.mark.parametrize("name", ["Jane Q", "Jane_Q", "jane-q"])
def test_a_file_is_found_however_its_name_is_written(tmp_path: Path, file: str, name: str) -> None:
    (tmp_path / "prompts").mkdir()
    write(tmp_path / "prompts" / file, name="Jane Q")
    assert load_concept(name).name == "Jane Q"


def test_anchor_builds_a_concept() -> None:
    concept = load_concept("Grumpy Cat", " a cat ")
    assert (concept.name, concept.slug, concept.kind) == ("Grumpy Cat", "grumpy-cat", "other")
    assert (concept.caption, concept.generic) == ("a photo of Grumpy Cat", "a photo of a cat")
    assert [prompt.text for prompt in concept.prompts("direct")] == ["a photo of Grumpy Cat"]
    assert load_concept("Jane", "a woman", "person").kind == "person"
    with pytest.raises(UsageError, match="--anchor"):
        load_concept("Grumpy Cat", " ")
    with pytest.raises(UsageError, match="--kind person needs --anchor"):
        load_concept("Grumpy Cat", kind="person")


@pytest.mark.parametrize(("name", "options"), [("Grumpy Cat", ""), ("Cat", " --output my-cat.yaml")])
def test_a_concept_with_an_anchor_can_be_written(name: str, options: str) -> None:
    """concepts new refuses a name that has a file, unless it writes to another file."""
    text = describe_anchored(from_anchor(name, "a dog", "object"))
    assert ("cat.yaml is not used: leave out --anchor to use it" in text) == (name == "Cat")
    assert text.startswith(f"{name} is used without a file, as kind object: ")
    assert text.endswith(f"concepts new {shlex.quote(name)} --kind object --anchor 'a dog'{options}")


@pytest.mark.parametrize("name", ["a {curly} name", "{", "}{", "{a,b}"])
def test_braces_in_a_name_are_not_alternatives(name: str) -> None:
    concept = from_anchor(name, "a man")
    assert [prompt.text for prompt in concept.prompts("direct")] == [concept.caption]


def test_unknown_concept_lists_the_files_and_suggests_anchor() -> None:
    with pytest.raises(UsageError) as caught:
        load_concept("sevn")
    message = str(caught.value)
    assert 'Did you mean "seven"?' in message
    assert "--concept" in message
    assert "--anchor" in message
    assert all(path.stem in message for path in concept_files().values())
    for nothing in (None, "", "  "):
        with pytest.raises(UsageError, match="--concept is missing"):
            load_concept(nothing)


def test_missing_file_is_named() -> None:
    with pytest.raises(UsageError, match=r"--concept nowhere\.yaml: No such file"):
        load_concept("nowhere.yaml")


def test_without_any_concept_file_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sd_unlearn.data.find_concept.concept_files", dict)
    for name in (None, "seven"):
        with pytest.raises(UsageError, match=r"There is no folder prompts/ with concept files\."):
            load_concept(name)


def test_the_file_of_another_concept_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts").mkdir()
    write(Path("prompts/c.yaml"), name="C++")
    for name in ("C++", "c++", "c", "C"):
        assert load_concept(name).name == "C++"
    for name in ("C#", "C'"):
        with pytest.raises(UsageError, match=r'"C.*" has no concept file: prompts/c\.yaml is for another concept'):
            load_concept(name)
    write(Path(f"prompts/{concept_slug('ゴジラ 2')}.yaml"), name="ゴジラ 2")
    assert load_concept("ゴジラ_2").name == "ゴジラ 2"
    with pytest.raises(UsageError, match="has no file prompts/2-"):
        load_concept("鉄腕アトム 2")
