"""The commands as functions: `from sd_unlearn import train`. Their keyword arguments are the options of the command.

A function builds the same options as the command and calls the same code. Its signature is taken from the options'
dataclass, so that type checkers and `help(train)` know every option.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar, get_type_hints

from sd_unlearn.calibration import Calibration
from sd_unlearn.config.attack import AttackConfig
from sd_unlearn.config.base import ExportConfig, RenderConfig, ReportConfig
from sd_unlearn.config.calibrate import CalibrateConfig
from sd_unlearn.config.evaluate import EvaluateConfig
from sd_unlearn.config.fuse import FuseConfig
from sd_unlearn.config.paths import expanded
from sd_unlearn.config.train import TrainConfig
from sd_unlearn.data.concept import Concept, parse_concept
from sd_unlearn.data.several import together
from sd_unlearn.errors import UsageError
from sd_unlearn.io.noise import silence_bitsandbytes
from sd_unlearn.io.reading import check_keys, read_options
from sd_unlearn.io.schema import convert
from sd_unlearn.launch import prepare_processes, process_count
from sd_unlearn.results import Results, parse_results

warnings.filterwarnings("ignore", "IProgress not found")  # in notebooks: progress here is lines of text, not a widget
silence_bitsandbytes()

Options = ParamSpec("Options")
Config = TypeVar("Config")
Result = TypeVar("Result")
ConceptLike = Concept | str | os.PathLike[str]  # built in code, or by name, or a .yaml file


def _command(
    options: Callable[Options, Config],
) -> Callable[[Callable[[Config, list[Concept]], Result]], Callable[Options, Result]]:
    """Make a function of a config one of the config's options. It also gets the concepts that were built in code."""

    def decorate(function: Callable[[Config, list[Concept]], Result]) -> Callable[Options, Result]:
        @functools.wraps(function)
        def command(*args: Options.args, **kwargs: Options.kwargs) -> Result:
            given = {**inspect.signature(options).bind_partial(*args).arguments, **kwargs}
            concepts, plain = _without_concepts(given, f"{function.__name__}()")
            return function(_config(options, plain, f"{function.__name__}()"), concepts)

        command.__signature__ = _signature(options, function)  # type: ignore[attr-defined]  # for help()
        return command

    return decorate


def _signature(options: Callable[..., Any], function: Callable[..., Any]) -> inspect.Signature:
    """The options' signature without the declarations of flags, and with the function's result."""
    hints, signature = get_type_hints(options), inspect.signature(options)
    parameters = [p.replace(annotation=hints[p.name]) for p in signature.parameters.values()]
    return signature.replace(parameters=parameters, return_annotation=get_type_hints(function)["return"])


def _of_concept(
    options: Callable[Concatenate[list[str] | str | None, Options], Config],
) -> Callable[
    [Callable[[Config, list[Concept]], Result]],
    Callable[Concatenate[ConceptLike | Sequence[ConceptLike] | None, Options], Result],
]:
    """`_command` of a command whose first argument is one concept, or several that are erased together."""
    decorator: Any = _command(options)  # type checkers see the first argument's wider type only here
    return decorator


def _without_concepts(options: Mapping[str, Any], where: str) -> tuple[list[Concept], dict[str, Any]]:
    """The concepts that were built in code, checked, and the options with their names instead.

    Raises:
        UsageError: a concept is not valid, or is given beside names, files, an anchor or a kind.
    """
    given = options.get("concept")
    several = list(given) if isinstance(given, list | tuple) else [given]
    concepts = [item for item in several if isinstance(item, Concept)]
    if not concepts:
        return [], dict(options)
    if len(concepts) < len(several):
        raise UsageError(f"{where}: concept mixes Concept objects with names or files. Load the others: load_concept.")
    for key in ("anchor", "kind"):
        if options.get(key) is not None:
            raise UsageError(f"{where}: {key} is for a concept given by its name; this one is a Concept. Leave it out.")
    checked = [parse_concept(dataclasses.asdict(concept), f'Concept "{concept.name}"') for concept in concepts]
    names = [concept.name for concept in checked]
    return checked, {**options, "concept": names if isinstance(given, list | tuple) else names[0]}


def _config(kind: Callable[..., Config], options: Mapping[str, Any], where: str) -> Config:
    """The config of a command, from keyword arguments and the file of the option `config`.

    Raises:
        UsageError: an unknown option, or a value of the wrong type.
    """
    assert isinstance(kind, type)
    hints = get_type_hints(kind)
    check_keys(dict(options), set(hints), where)
    in_file = read_options(expanded(Path(options["config"])), hints) if options.get("config") is not None else {}
    values = {key: _plain(value, hints[key]) for key, value in {**in_file, **options}.items()}
    return convert(kind, values, where)


def _plain(value: Any, hint: Any) -> Any:
    """An option's value: paths as text, and one value for an option that takes several as a list."""
    if isinstance(value, list | tuple):
        return [_plain(item, None) for item in value]
    plain = os.fspath(value) if isinstance(value, os.PathLike) else value
    return [plain] if getattr(hint, "__origin__", None) is list else plain


@_of_concept(RenderConfig)
def render(config: RenderConfig, concepts: list[Concept]) -> Path:
    """Generate the training images of a concept; only those that are missing. Returns the data folder.

    Raises:
        UsageError, UnlearnError
    """
    from sd_unlearn.data import render as command

    return command.run(config, *_one(concepts))


@_of_concept(TrainConfig)
def train(config: TrainConfig, concepts: list[Concept]) -> Path:
    """Train a LoRA that erases a concept; missing training images are generated first.

    Returns:
        The run folder; with beta_sweep the page of the sweep; with dry_run the folder that there would be.

    Raises:
        UsageError, UnlearnError
        KeyboardInterrupt: Ctrl-C; a checkpoint was saved.
    """
    prepare_processes()
    if config.beta_sweep is not None:
        from sd_unlearn import sweep

        return sweep.run(config, *_one(concepts))
    from sd_unlearn.training import trainer

    return trainer.run(config, *_one(concepts))


@_command(EvaluateConfig)
def evaluate(config: EvaluateConfig, concepts: list[Concept]) -> Results:
    """Measure erasure and retention of one or many LoRAs, with intervals; writes results.json and returns it.

    Raises:
        UsageError, UnlearnError
        ConditionError: a condition of fail_if holds. results.json was written.
    """
    from sd_unlearn.evaluation import evaluate as command

    _check_single_process("evaluate")
    for name in ("write_plan", "dry_run"):
        if getattr(config, name):
            raise UsageError(f"evaluate(): {name} evaluates nothing. Use the command: sd-unlearn evaluate --{name}.")
    results = command.run(config, concepts)
    command.check_conditions(results, config.fail_if)
    command.check_evaluated(results)
    return parse_results(results)


@_command(AttackConfig)
def attack(config: AttackConfig, concepts: list[Concept]) -> Results:
    """Try to bring a removed concept back, and record how often that succeeds; adds to results.json and returns it.

    Raises:
        UsageError, UnlearnError
        ConditionError: a condition of fail_if holds. results.json was written.
    """
    from sd_unlearn.attacks import attack as command
    from sd_unlearn.evaluation.evaluate import check_conditions

    _check_single_process("attack")
    results = command.run(config, concepts)
    check_conditions(results, config.fail_if)
    return parse_results(results)


@_command(CalibrateConfig)
def calibrate(config: CalibrateConfig, concepts: list[Concept]) -> Calibration:
    """Find the smallest LoRA strength that erases enough and the largest that retains enough.

    Writes calibration.json. `strength` is None if no strength does both.

    Raises:
        UsageError, UnlearnError
    """
    from sd_unlearn.evaluation import calibrate as command

    return command.run(config, concepts)


@_command(FuseConfig)
def fuse(config: FuseConfig, concepts: list[Concept]) -> Path:
    """Fuse LoRAs that were trained apart into one that erases all of their concepts. Returns the run folder.

    Raises:
        UsageError, UnlearnError
    """
    from sd_unlearn.fusion import run

    return run(config)


@_command(ExportConfig)
def export(config: ExportConfig, concepts: list[Concept]) -> list[Path]:
    """Write the LoRA for Diffusers, ComfyUI and A1111 with a model card, or merge it into a checkpoint.

    Returns:
        The paths written: LoRA for Diffusers, LoRA for ComfyUI, card, images of the card, checkpoint.

    Raises:
        UsageError, UnlearnError
    """
    from sd_unlearn.export import export as command

    return command.run(config)


@_command(ReportConfig)
def report(config: ReportConfig, concepts: list[Concept]) -> Path:
    """Write report.html, report.md and results.csv of an evaluation. Returns the path of report.html.

    Raises:
        UsageError, UnlearnError
    """
    from sd_unlearn.report import report as command

    return command.run(config)


def _one(concepts: Sequence[Concept]) -> list[Concept]:
    """The concepts built in code as one, if there are any."""
    return [together(concepts)] if concepts else []


def _check_single_process(name: str) -> None:
    if process_count() > 1:
        raise UsageError(f"{name}() returns its results in one process. Use the command: sd-unlearn {name}.")
