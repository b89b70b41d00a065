"""docs/architecture.md names every module and nothing that does not exist; the navigation lists every page."""

import ast
import re
from pathlib import Path

import pytest

from sd_unlearn import cli, commands
from sd_unlearn.errors import ConditionError, UnlearnError, UsageError

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "sd_unlearn"
PAGE = (ROOT / "docs" / "architecture.md").read_text()
PATHS = re.findall(r"`([\w/]+/\w+\.py)`", PAGE + (ROOT / "CONTRIBUTING.md").read_text())
FUNCTIONS = re.findall(r"`([\w/]+\.py)`, `(\w+)`", PAGE)
PARAGRAPHS = dict(re.findall(r"^\*\*(\w+)\*\* (.*?)\n\n", PAGE, re.MULTILINE | re.DOTALL))
PACKAGES = [folder.name for folder in PACKAGE.iterdir() if (folder / "__init__.py").is_file()]


@pytest.mark.parametrize("path", sorted(set(PATHS)))
def test_every_path_on_the_pages_exists(path: str) -> None:
    assert (PACKAGE / path).is_file() or (ROOT / path).is_file()


@pytest.mark.parametrize("package", [name for name in PACKAGES if name != "paper"])
def test_the_paragraph_of_a_package_names_all_its_modules(package: str) -> None:
    named = set(re.findall(r"`(\w+\.py)`", PARAGRAPHS[package]))
    assert named == {path.name for path in (PACKAGE / package).glob("*.py")} - {"__init__.py"}


@pytest.mark.parametrize(("path", "function"), FUNCTIONS)
def test_every_name_on_the_page_is_defined_in_the_module_before_it(path: str, function: str) -> None:
    statements = ast.parse((PACKAGE / path).read_text()).body
    defined = {statement.name for statement in statements if isinstance(statement, ast.FunctionDef | ast.ClassDef)}
    assigned = [s.targets[0] if isinstance(s, ast.Assign) else getattr(s, "target", None) for s in statements]
    defined |= {target.id for target in assigned if isinstance(target, ast.Name)}
    assert function in defined


def test_the_navigation_lists_every_page() -> None:
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").glob("*.md")}
    assert set(re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)) == pages


def test_the_exit_codes_are_those_of_the_commands() -> None:
    documented = re.findall(r"^\| (\d+) \| ", (ROOT / "docs" / "evaluating.md").read_text(), re.MULTILINE)
    assert documented == re.findall(r"(\d+) [a-z]+", commands.HELP.partition("Exit codes:")[2])
    codes = {0, UnlearnError.exit_code, UsageError.exit_code, ConditionError.exit_code, 130, cli.BROKEN_PIPE}
    assert {int(code) for code in documented} == codes


def test_the_readme_identifies_people_with_more_than_clip() -> None:
    page = (ROOT / "README.md").read_text()
    assert re.search(r"pip install -e '\.\[[^\]]*faces", page)
    assert re.search(r"evaluate --run runs/brad-pitt --others ", page)
