"""The Python interface: the commands as functions, and the example of docs/api.md."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sd_unlearn
from sd_unlearn import Concept, ConditionError, UnlearnError, UsageError, api, commands, read_results
from sd_unlearn.data import render
from sd_unlearn.data.find_concept import read_concept
from sd_unlearn.evaluation import evaluate
from sd_unlearn.models import sampling
from sd_unlearn.models.sampling import Sampler
from sd_unlearn.training import trainer

ROOT = Path(__file__).parent.parent
SEVEN = Concept(name="Lucky Seven", caption="a photo of the digit seven", generic="a photo of a digit", base="digits")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Commands only record their config and concepts."""
    calls: list[tuple[Any, ...]] = []
    for module in (trainer, render):
        monkeypatch.setattr(module, "run", lambda *given: calls.append(given) or Path("done"))
    return calls


def test_importing_and_wrong_input_need_no_torch() -> None:
    code = """
import sys
sys.modules["torch"] = None
import sd_unlearn
for name in sd_unlearn.__all__:
    getattr(sd_unlearn, name)
from sd_unlearn import UsageError, evaluate, export, report, train
for call in (lambda: train("sevn"), lambda: evaluate(run="no"), lambda: export(run="no"), lambda: report(run="no")):
    try:
        call()
    except UsageError:
        continue
    sys.exit("not refused")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_stub_declares_what_the_package_exports() -> None:
    stub = ast.parse((ROOT / "sd_unlearn" / "__init__.pyi").read_text())
    declared = [alias.asname for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert sorted([*declared, "__version__"]) == dir(sd_unlearn)
    assert (ROOT / "sd_unlearn" / "py.typed").is_file()
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = sd_unlearn.trian


@pytest.mark.parametrize("command", list(commands.COMMANDS))
def test_keyword_arguments_are_the_options_of_the_command(command: str) -> None:
    options = [field.name for field in dataclasses.fields(commands.COMMANDS[command])]
    assert set(inspect.signature(getattr(api, command)).parameters) == set(options)


def test_packages_named_as_functions_are_called_as_these() -> None:
    import sd_unlearn.export.export  # from now on sd_unlearn.export is the package
    import sd_unlearn.report.report

    for function in (sd_unlearn.export, sd_unlearn.report):
        of_api = getattr(api, function.__name__.rpartition(".")[2])
        assert (inspect.signature(function), function.__doc__) == (inspect.signature(of_api), of_api.__doc__)
        with pytest.raises(UsageError, match="--run nowhere does not exist"):
            function(run="nowhere")


def test_options_reach_the_command(calls: list[tuple[Any, ...]], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("rank: 4\nseed: 3\ndata_dir: photos\n")
    assert sd_unlearn.train("seven", rank=2, config="run.yaml", output_dir="out") == Path("done")
    ((config,),) = calls
    assert (config.concept, config.rank, config.seed) == ("seven", 2, 3)
    assert (config.data_dir, config.output_dir) == (Path("photos"), Path("out"))
    sd_unlearn.render(concept=Path("seven.yaml"))
    assert calls[1][0].concept == "seven.yaml"


def test_one_value_for_an_option_that_takes_several(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def stop(config: Any, concepts: Any) -> None:
        calls.append((config, concepts))
        raise UnlearnError("enough")

    monkeypatch.setattr(evaluate, "run", stop)
    with pytest.raises(UnlearnError, match="enough"):
        sd_unlearn.evaluate(lora=Path("a.safetensors"), strengths=1, concept=[SEVEN])  # type: ignore[arg-type,list-item]
    config, concepts = calls[0]
    assert (config.lora, config.strengths, config.concept) == (["a.safetensors"], [1.0], ["Lucky Seven"])
    assert concepts == [SEVEN]


def test_several_concepts_built_in_code_are_one_training(calls: list[tuple[Any, ...]]) -> None:
    three = dataclasses.replace(SEVEN, name="three", caption="a photo of the digit three")
    sd_unlearn.train([SEVEN, three])
    assert calls[0][0].concept == ["Lucky Seven", "three"]
    assert [part.name for part in calls[0][1].parts] == ["Lucky Seven", "three"]


def test_a_concept_built_in_code_is_checked_and_handed_on(calls: list[tuple[Any, ...]]) -> None:
    sd_unlearn.train(SEVEN)
    assert calls[0][0].concept == "Lucky Seven"
    assert calls[0][1] == SEVEN
    wrong = dataclasses.replace(SEVEN, caption=" ")
    for call, message in (
        (lambda: sd_unlearn.train(wrong), 'Concept "Lucky Seven": caption must not be empty'),
        (lambda: sd_unlearn.train(SEVEN, anchor="a digit"), "anchor is for a concept given by its name"),
    ):
        with pytest.raises(UsageError, match=message):
            call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sd_unlearn.train("seven", rnak=8), r'train\(\): unknown key "rnak"\. Did you mean "rank"\?'),
        (lambda: sd_unlearn.train("seven", rank="many"), r"train\(\): rank must be int, not 'many'\."),
        (
            lambda: sd_unlearn.train("seven", lora_targets="all"),
            "lora_targets must be .*Literal.*'attention'.*not 'all'",
        ),
        (lambda: sd_unlearn.train("seven", rank=0), "--rank 0 must be above 0"),
        (lambda: sd_unlearn.train("sevn"), 'Did you mean "seven"'),
        (lambda: sd_unlearn.train(), "--concept is missing"),
        (lambda: sd_unlearn.evaluate(), "Nothing to evaluate"),
        (lambda: sd_unlearn.evaluate(run="x", write_plan="plan.jsonl"), "write_plan evaluates nothing"),
        (lambda: sd_unlearn.evaluate(run="x", dry_run=True), "dry_run evaluates nothing"),
        (lambda: sd_unlearn.attack(run="nowhere"), "--run nowhere is not a folder"),
    ],
)
def test_wrong_input_is_a_usage_error(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call()


def test_the_example_of_the_documentation_runs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sampling.BASE_SAMPLERS, "digits", Sampler(2, 3.0, 100))  # nobody looks at its images
    example = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "api.md").read_text(), re.DOTALL)[0]
    names: dict[str, Any] = {}
    exec(example, names)
    out = capsys.readouterr().out
    assert "leakage direct base" in out
    run = names["run"]
    assert (names["data"], run) == (Path("data/seven"), Path("runs/seven"))
    assert read_concept(run / "concept.yaml") == names["concept"]
    assert names["results"] == read_results(run)
    assert names["page"].is_file()
    assert names["lora"] == run / "export" / "pytorch_lora_weights.safetensors"
    assert all(path.is_file() for path in (names["lora"], *names["others"]))
    # The images are there already: only the conditions are new.
    with pytest.raises(ConditionError, match="leakage>=0"):
        sd_unlearn.evaluate(run=run, num_images=4, num_keep_images=2, fail_if="leakage>=0")  # type: ignore[arg-type]
