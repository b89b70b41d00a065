"""sd-unlearn concepts: the list, a printed file, and a new file from options or from answers on a terminal."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sd_unlearn import cli
from sd_unlearn.data.concept_template import concept_text
from sd_unlearn.data.find_concept import concept_files, load_concept, read_concept

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """call("new", "Jane", answers="person\\n...") -> exit code, stdout, stderr; answers: typed on a terminal."""

    def run(*arguments: str, answers: str | None = None) -> tuple[int, str, str]:
        stdin = io.StringIO(answers or "")
        stdin.isatty = lambda: answers is not None  # type: ignore[method-assign]
        monkeypatch.setattr("sys.stdin", stdin)
        code = cli.main(["concepts", *arguments])
        return (code, *capsys.readouterr())

    return run


def test_the_list(call: Call) -> None:
    code, out, _ = call()
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    assert lines[0][:3] == ["NAME", "KIND", "BASE"]
    assert len(lines) == 1 + len(concept_files())
    assert ["Brad", "Pitt", "person", "CompVis/stable-diffusion-v1-4", "6", "17"] in lines


def test_the_list_as_json_includes_own_files_and_names_broken_ones(call: Call) -> None:
    folder = Path("prompts")
    folder.mkdir()
    (folder / "jane.yaml").write_text(concept_text("Jane", "a woman", "person"))
    (folder / "broken.yaml").write_text("name: x\nkid: person\n")
    entries = {entry["slug"]: entry for entry in json.loads(call("--json")[1])}
    seven = load_concept("seven")
    prompts = {group: len(seven.prompts(group)) for group in ("direct", "held_out", "alike", "general")}
    assert entries["seven"]["prompts"] == {"keep": len(seven.keep_prompts), **prompts}
    assert (entries["seven"]["kind"], entries["seven"]["base"]) == ("digit", "digits")
    assert (entries["jane"]["kind"], entries["jane"]["file"]) == ("person", "prompts/jane.yaml")
    assert 'unknown key "kid"' in entries["broken"]["error"]
    code, out, _ = call()
    assert (code, out.count('unknown key "kid"')) == (0, 1)


def test_a_file_is_printed(call: Call) -> None:
    code, out, _ = call("show", "Brad Pitt")
    assert (code, out) == (0, concept_files()["brad-pitt"].read_text())
    assert json.loads(call("show", "seven", "--json")[1])["images"]["mixed_in"] == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "mine.yaml does not exist."),
        ("a: [", "mine.yaml is not valid YAML"),
        ("[]", "mine.yaml lists no concepts."),
        ("7", "mine.yaml must hold keys and values, not int."),
        ("- seven\n- seven\n", 'mine.yaml: the concept "seven" is listed twice.'),
    ],
)
def test_errors_of_a_file_do_not_name_an_option_of_other_commands(
    call: Call, content: str | None, message: str
) -> None:
    if content is not None:
        Path("mine.yaml").write_text(content)
    code, _, err = call("show", "mine.yaml")
    assert (code, message in err, "--concept" in err) == (2, True, False)


def test_a_list_of_concepts_is_listed_and_printed(call: Call) -> None:
    Path("prompts").mkdir()
    Path("prompts/ll.yaml").write_text("- seven\n- zero\n")
    parts = [load_concept("seven"), load_concept("zero")]
    entry = next(entry for entry in json.loads(call("--json")[1]) if entry["slug"] == "ll")
    assert (entry["name"], entry["kind"], entry["base"]) == ("ll", "digit", "digits")
    assert entry["prompts"]["held_out"] == sum(len(part.prompts("held_out")) for part in parts)
    assert call("show", "ll")[:2] == (0, "- seven\n- zero\n")
    assert [each["name"] for each in json.loads(call("show", "ll", "--json")[1])] == ["seven", "zero"]


@pytest.mark.parametrize(
    ("name", "found"),
    [("brad pit", "brad-pitt"), ("Pitt", "brad-pitt"), ("vangogh", "van-gogh"), ("Merkel", "angela-merkel")],
)
def test_a_typing_error_gets_a_suggestion(call: Call, name: str, found: str) -> None:
    code, _, err = call("show", name)
    assert code == 2
    assert f'Did you mean "{found}"?' in err
    assert f'sd-unlearn concepts new "{name}"' in err


def test_a_new_file_is_found_by_its_name(call: Call) -> None:
    options = ("--kind", "person", "--anchor", "a woman", "--keep", "Jane Austen", "Jane Goodall", "--base", "digits")
    code, out, err = call("new", "Jane Example", *options)
    assert (code, out) == (0, "prompts/jane-example.yaml\n")
    assert "sd-unlearn train --concept 'Jane Example'" in err
    concept = load_concept("Jane Example")
    assert (concept.kind, concept.generic, concept.base) == ("person", "a photo of a woman", "digits")
    assert {"Jane Austen", "Jane Goodall"} <= {word for prompt in concept.keep_prompts for word in prompt.expect}
    assert Path(out.strip()).read_text().splitlines()[0] == "# sd-unlearn train --concept 'Jane Example'"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["Jane"], "--anchor is missing"),
        (["Jane", "--anchor", ""], '--anchor "" is empty'),
        (["Jane", "--anchor", "x", "--kind", "persn"], "persn"),
        (["Jane", "--anchor", "x", "--output", "jane.txt"], "must end in .yaml"),
        (["Jane", "--anchor", "x", "--output", "mine.yaml"], "exists and is not overwritten"),
        (["seven", "--anchor", "x"], "Use it with --concept seven"),
        ([" ", "--anchor", "x"], "needs a name"),
    ],
)
def test_what_cannot_be_written_is_refused(call: Call, arguments: list[str], message: str) -> None:
    Path("mine.yaml").write_text("mine")
    code, out, err = call("new", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert [str(path) for path in Path().iterdir()] == ["mine.yaml"]
    assert Path("mine.yaml").read_text() == "mine"


def test_on_a_terminal_it_asks(call: Call) -> None:
    code, out, err = call(
        "new", "Jane", "--output", "jane.yaml", answers='what?\nperson\n\n"a woman"\nJane Austen, Ann\n'
    )
    assert (code, out) == (0, "jane.yaml\n")
    assert err.count("What is Jane?") == 2
    assert err.count("What to generate instead of Jane") == 2
    concept = read_concept(Path("jane.yaml"))
    assert (concept.kind, concept.generic) == ("person", "a photo of a woman")
    assert {"Jane Austen", "Ann"} <= {word for prompt in concept.keep_prompts for word in prompt.expect}
    code, _, err = call("new", "Bob", "--kind", "person", "--anchor", "a man", "--keep", "Ann", answers="")
    assert (code, "What" in err) == (0, False)
    code, _, err = call("new", "Eve", answers="person\n")
    assert code == 2
    assert "--anchor" in err
