"""sd-unlearn render | train | evaluate | export | report | paper. Imports nothing heavy until a command runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import cyclopts
from cyclopts import App, Parameter

from sd_unlearn import __version__
from sd_unlearn.config.base import ExportConfig, RenderConfig, ReportConfig
from sd_unlearn.config.evaluate import EvaluateConfig
from sd_unlearn.config.train import TrainConfig
from sd_unlearn.errors import UnlearnError, UsageError
from sd_unlearn.io.files import check_keys, read_yaml
from sd_unlearn.launch import prepare_processes, process_rank
from sd_unlearn.paper import commands as paper

HELP = """Make Stable Diffusion forget a concept, and show that it did.

The street, on the bundled base (no GPU, no download):

    sd-unlearn train    --concept seven      renders data/seven first, then trains runs/seven
    sd-unlearn evaluate --run runs/seven     same seeds with and without the LoRA -> results.json
    sd-unlearn export   --run runs/seven     LoRA files for Diffusers, ComfyUI, A1111
    sd-unlearn report   --run runs/seven     report.html with pictures and intervals

Several LoRAs on one page: evaluate --lora A B --strengths 0.5 1, then report --run runs/evaluation.
The paper's own experiments: sd-unlearn paper --help.
"""

app = App(
    name="sd-unlearn",
    help=HELP,
    help_format="plaintext",
    version=__version__,
    default_parameter=Parameter(negative=(), name_transform=lambda name: name),
    result_action="return_value",
    suppress_keyboard_interrupt=False,
)

COMMANDS = {
    "render": RenderConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
    "report": ReportConfig,
}
app.command(paper.app)


@app.command
def render(config: Annotated[RenderConfig, Parameter(name="*")] = RenderConfig()) -> None:
    """Render 0_unlabeled and 1_positive of a concept from its prompts; only what is missing."""
    from sd_unlearn.data import render as room

    print(room.run(config))


@app.command
def train(config: Annotated[TrainConfig, Parameter(name="*")] = TrainConfig()) -> None:
    """Train a LoRA that forgets the concept; renders its folders first if they are missing."""
    prepare_processes()
    if config.beta_sweep is not None:
        from sd_unlearn import sweep

        print(sweep.run(config))
        return
    from sd_unlearn.training import trainer

    folder = trainer.run(config)
    if process_rank() == 0:
        print(folder)


@app.command
def evaluate(config: Annotated[EvaluateConfig, Parameter(name="*")] = EvaluateConfig()) -> None:
    """Measure what is gone and what stayed, with intervals -> results.json; one LoRA or many."""
    prepare_processes()
    from sd_unlearn.evaluation import evaluate as room
    from sd_unlearn.report.terminal import format_table
    from sd_unlearn.results import parse_results

    results = room.run(config)
    if results:  # the first of several processes has them
        as_json = json.dumps(results, indent=2, ensure_ascii=False)
        print(as_json if config.json else format_table(parse_results(results)))
        room.check_conditions(config, results)


@app.command
def export(config: Annotated[ExportConfig, Parameter(name="*")] = ExportConfig()) -> None:
    """Write the LoRA for Diffusers and for ComfyUI / A1111, with a card; --merge: a whole checkpoint."""
    from sd_unlearn.export import export as room

    for path in room.run(config):
        print(path)


@app.command
def report(config: Annotated[ReportConfig, Parameter(name="*")] = ReportConfig()) -> None:
    """Write report.html, report.md and results.csv of an evaluated run."""
    from sd_unlearn.report import report as room

    print(room.run(config))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    tokens = [_underscored(t) for t in (sys.argv[1:] if arguments is None else arguments)]
    debug = "--debug" in tokens
    try:
        app.config = _config_file(tokens)
        app(tokens, exit_on_error=False, print_error=False)
    except cyclopts.CycloptsError as error:
        return _fail(UsageError(" ".join(str(error).split())), debug)
    except UnlearnError as error:
        return _fail(error, debug)
    except KeyboardInterrupt as interrupt:
        way_on = "The same command goes on with the images that are missing."
        if str(interrupt):
            by = "the same command" if tokens[:1] == ["paper"] else "--resume_from_checkpoint latest"
            way_on = f"{interrupt} Go on with {by}."
        print(f"\nInterrupted. {way_on}", file=sys.stderr)
        return 130
    except Exception as error:
        hint = "This is a fault of sd-unlearn: run again with --debug and report it."
        return _fail(UnlearnError(f"{type(error).__name__}: {error}. {hint}"), debug)
    return 0


def _underscored(token: str) -> str:
    """--train-batch-size as well as --train_batch_size."""
    if not token.startswith("--"):
        return token
    name, equals, value = token.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def _config_file(tokens: Sequence[str]) -> tuple[Any, ...]:
    """The --config file of a command as cyclopts values under the command's flags, its keys checked.

    Raises:
        UsageError: a missing or damaged file, an unknown key.
    """
    known: dict[str, Any] = paper.COMMANDS if tokens[:1] == ["paper"] else COMMANDS
    command = next((t for t in tokens if t in known), None)
    path = next((t.partition("=")[2] for t in tokens if t.startswith("--config=")), None)
    if "--config" in tokens[:-1]:
        path = tokens[tokens.index("--config") + 1]
    if command is None or path is None:
        return ()
    data = read_yaml(Path(path), "--config")
    check_keys(data, {f.name for f in fields(known[command])}, f"--config {path}")
    given = {key: value for key, value in data.items() if value is not None and key != "config"}
    return (cyclopts.config.Dict(given, use_commands_as_keys=False, source=path),)


def _fail(error: UnlearnError, debug: bool) -> int:
    if debug and not isinstance(error.__context__, cyclopts.CycloptsError):
        import traceback

        traceback.print_exc()
    print(f"Error: {' '.join(str(error).split())}", file=sys.stderr)
    return error.exit_code


def entry() -> None:
    """The console script."""
    sys.exit(main())


if __name__ == "__main__":
    entry()
