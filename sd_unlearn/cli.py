"""The commands of sd-unlearn. Imports nothing heavy until a command runs."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import cyclopts
from cyclopts import App, Parameter

from sd_unlearn import __version__, concepts
from sd_unlearn.batch import commands as batch
from sd_unlearn.config.attack import AttackConfig
from sd_unlearn.config.base import ExportConfig, RenderConfig, ReportConfig
from sd_unlearn.config.calibrate import CalibrateConfig
from sd_unlearn.config.evaluate import EvaluateConfig
from sd_unlearn.config.fuse import FuseConfig
from sd_unlearn.config.help import Help, ShortHelp
from sd_unlearn.config.options import Range
from sd_unlearn.config.paths import expanded
from sd_unlearn.config.train import TrainConfig
from sd_unlearn.errors import UnlearnError, UsageError, reason
from sd_unlearn.io.noise import SHOW, silence_warnings
from sd_unlearn.io.reading import read_options
from sd_unlearn.launch import prepare_processes, process_rank, share_cores
from sd_unlearn.paper import commands as paper

HELP = """Make Stable Diffusion forget a concept and measure how well it worked.

On the bundled base model (no GPU, no download):

  sd-unlearn train seven                  generate images, train a LoRA
  sd-unlearn evaluate --run runs/seven    measure what is erased and retained
  sd-unlearn attack --run runs/seven      try to bring it back
  sd-unlearn report --run runs/seven      write report.html
  sd-unlearn export --run runs/seven      write LoRA files for other programs

Compare several LoRAs:

  sd-unlearn evaluate --lora A B --strengths 0.5 1
  sd-unlearn report --run runs/evaluation
  sd-unlearn fuse A B                     make one LoRA of several

Many concepts or settings, on one machine or a cluster:

  sd-unlearn batch jobs.yaml              run a job list (docs/scale.md)
  sd-unlearn batch status jobs.yaml       how far it is

Your own concept:

  sd-unlearn concepts                     list the bundled concepts
  sd-unlearn concepts new "Jane Example"  write a concept file

If something does not work, run sd-unlearn doctor.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 a --fail_if condition holds,
130 interrupted, 141 the reader of stdout stopped early (as head does).
"""  # no line is longer than 80 characters

BROKEN_PIPE = 141  # exit code, as that of a program that SIGPIPE ends

COMMANDS = {
    "render": RenderConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "attack": AttackConfig,
    "calibrate": CalibrateConfig,
    "fuse": FuseConfig,
    "export": ExportConfig,
    "report": ReportConfig,
}


def versions() -> str:
    """The text of --version, one package a line."""
    lines = [f"sd-unlearn {__version__}"]
    for package in ("torch", "diffusers", "peft"):
        try:
            lines.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            lines.append(f"{package} not installed")
    return "\n".join(lines)


app = App(
    name="sd-unlearn",
    help=HELP,
    help_format="plaintext",
    help_formatter=Help(),
    version=versions,
    default_parameter=Parameter(negative=(), name_transform=lambda name: name),
    result_action="return_value",
    suppress_keyboard_interrupt=False,
)
app.command(paper.app)
app.command(concepts.app)
app.command(batch.app)


@app.command(help_formatter=ShortHelp("number of images, sampler, loading of the base model"))
def render(config: Annotated[RenderConfig, Parameter(name="*")] = RenderConfig()) -> None:
    """Generate the training images of a concept; only those that are missing."""
    from sd_unlearn.data.render import run

    folder = run(config)
    if not config.dry_run:
        print(folder)


@app.command(help_formatter=ShortHelp("memory, beta, resuming, previews"))
def train(config: Annotated[TrainConfig, Parameter(name="*")] = TrainConfig()) -> None:
    """Train a LoRA that erases a concept; missing training images are generated first."""
    prepare_processes()
    if config.beta_sweep is not None and not config.dry_run:
        from sd_unlearn import sweep

        print(sweep.run(config))
        return
    from sd_unlearn.training import trainer

    folder = trainer.run(config)
    if process_rank() == 0 and not config.dry_run:
        print(f"Next: sd-unlearn evaluate --run {shlex.quote(str(folder))}", file=sys.stderr)
        print(folder)


@app.command(help_formatter=ShortHelp("prompts, strengths, sampler, detectors, conditions"))
def evaluate(config: Annotated[EvaluateConfig, Parameter(name="*")] = EvaluateConfig()) -> None:
    """Measure erasure and retention of one or many LoRAs, with intervals; writes results.json."""
    prepare_processes()
    from sd_unlearn.evaluation.evaluate import check_conditions, pass_or_fail, run
    from sd_unlearn.report.terminal import format_table
    from sd_unlearn.results import parse_results

    results = run(config)
    if results:  # empty in all processes but the first
        utf8 = not sys.stdout or "utf" in (sys.stdout.encoding or "utf-8").lower()
        as_json = json.dumps(results, indent=2, ensure_ascii=not utf8)
        print(as_json if config.json else format_table(parse_results(results)))
        notes = sys.stderr if config.json else sys.stdout
        for line in pass_or_fail(config, results):
            print(line, file=notes)
        if passed := check_conditions(results):
            print(passed, file=notes)


@app.command(help_formatter=ShortHelp("the attacker's images, sampler, detectors"))
def attack(config: Annotated[AttackConfig, Parameter(name="*")] = AttackConfig()) -> None:
    """Try to bring a removed concept back, and record how often that succeeds; adds to results.json."""
    prepare_processes()
    from sd_unlearn.attacks.attack import run
    from sd_unlearn.evaluation.evaluate import check_conditions
    from sd_unlearn.report.terminal import format_attacks
    from sd_unlearn.results import parse_results

    results = run(config)
    if results:  # empty in all processes but the first
        print(json.dumps(results, indent=2) if config.json else format_attacks(parse_results(results)))
        if passed := check_conditions(results):
            print(passed, file=sys.stderr if config.json else sys.stdout)


@app.command(help_formatter=ShortHelp("search, prompts, sampler, detectors"))
def calibrate(config: Annotated[CalibrateConfig, Parameter(name="*")] = CalibrateConfig()) -> None:
    """Find the smallest LoRA strength that erases enough and the largest that retains enough."""
    prepare_processes()
    from sd_unlearn.calibration import describe
    from sd_unlearn.evaluation.calibrate import run
    from sd_unlearn.results import as_json

    found = run(config)
    print(json.dumps(as_json(found), indent=2) if config.json else "\n".join(describe(found)))
    if found.strength is None:
        raise UnlearnError(found.message)
    lora = f"--run {shlex.quote(str(config.run))}" if config.run else f"--lora {shlex.quote(str(config.lora))}"
    print(
        f"The images that chose the strength cannot confirm it. Next, on other seeds: sd-unlearn evaluate {lora} "
        f"--strengths {found.strength:g} --seed {max(config.seed) + 1}",
        file=sys.stderr,
    )


@app.command
def fuse(config: Annotated[FuseConfig, Parameter(name="*")] = FuseConfig()) -> None:
    """Fuse LoRAs that were trained apart into one that erases all of their concepts."""
    from sd_unlearn.fusion import run

    folder = run(config)
    print(f"Next: sd-unlearn evaluate --run {shlex.quote(str(folder))}", file=sys.stderr)
    print(folder)


@app.command
def export(config: Annotated[ExportConfig, Parameter(name="*")] = ExportConfig()) -> None:
    """Write the LoRA for Diffusers, ComfyUI and A1111 with a model card, or merge it into a checkpoint."""
    from sd_unlearn.export.export import run

    for path in run(config):
        print(path)


@app.command
def report(config: Annotated[ReportConfig, Parameter(name="*")] = ReportConfig()) -> None:
    """Write report.html, report.md and results.csv of an evaluation."""
    from sd_unlearn.report.report import run

    print(run(config))


@app.command
def ui(
    *,
    port: Annotated[int, Parameter(help="Port of the page.", validator=Range(at_least=1, at_most=65535))] = 7860,
    listen: Annotated[
        bool,
        Parameter(
            help="Also accept other computers, without password or encryption: they can generate images, start and "
            "stop trainings, and read reports. Default: only this computer.",
            negative=(),
        ),
    ] = False,
) -> None:
    """Open a local page to try LoRAs, read reports and start trainings in the working folder (extra: ui)."""
    from sd_unlearn.ui.server import run

    run(port, listen)


@app.command
def doctor(
    *,
    as_json: Annotated[bool, Parameter(name="--json", help="Print JSON.", negative=())] = False,
    skip_smoke_run: Annotated[
        bool, Parameter(help="Only check the installation: train nothing and generate no images.", negative=())
    ] = False,
) -> None:
    """Check installation, GPU, extras and hub, with a smoke run; paste the output into an issue."""
    from sd_unlearn.doctor import doctor

    checks = doctor.run(smoke_run=not skip_smoke_run)
    print(doctor.as_json(checks) if as_json else doctor.as_text(checks))
    if broken := doctor.failures(checks):
        raise UnlearnError(f"Needed but broken or missing: {', '.join(broken)}.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    0 success, 1 failed, 2 wrong usage, 3 a --fail_if condition holds, 130 interrupted, 141 stdout was closed (as by
    `| head -1`).
    """
    tokens = [_underscored(t) for t in (sys.argv[1:] if arguments is None else arguments)]
    debug = "--debug" in tokens
    if debug:
        os.environ[SHOW] = "1"
    silence_warnings()
    share_cores()
    ShortHelp.show_all = "--help_all" in tokens
    tokens = ["--help" if token == "--help_all" else token for token in tokens]
    _replace_unprintable()
    try:
        _check_unicode(tokens)
        app.config = _config_file(tokens)
        app(tokens, exit_on_error=False, print_error=False)
        if sys.stdout:  # None if it is closed
            sys.stdout.flush()
    except cyclopts.CycloptsError as error:
        return _fail(UsageError(_usage_message(error)), debug)
    except UnlearnError as error:
        return _fail(_out_of_memory(error) or error, debug)
    except KeyboardInterrupt as interrupt:
        print(f"\nInterrupted. {_how_to_resume(tokens, str(interrupt))}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of stdout, e.g. head, has enough
        _discard_stdout()
        return BROKEN_PIPE
    except OSError as error:
        _discard_stdout()
        place = f" ({error.filename})" if error.filename else ""
        hint = "Free some space, or check the disk and its permissions."
        return _fail(UnlearnError(f"Cannot read or write{place}: {reason(error)}. {hint}"), debug)
    except Exception as error:
        hint = (
            "This is a bug in sd-unlearn. Run again with --debug, and report it with the output of sd-unlearn doctor."
        )
        bug = UnlearnError(f"{type(error).__name__}: {error}. {hint}")
        return _fail(_out_of_memory(error) or bug, debug)
    return 0


def _out_of_memory(error: Exception) -> UnlearnError | None:
    from sd_unlearn.models.memory_errors import shortage_behind

    return shortage_behind(error)


def _replace_unprintable() -> None:
    """Print "?" for what the terminal's encoding lacks, e.g. the dash of an interval in ASCII, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _discard_stdout() -> None:
    """Without this Python would try to write the rest of a broken stdout when it exits, and fail again."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _check_unicode(tokens: Sequence[str]) -> None:
    """Refuse arguments whose bytes are not UTF-8: they could not be written into the files of a run.

    Raises:
        UsageError: names the argument.
    """
    for token in tokens:
        if any("\ud800" <= character <= "\udfff" for character in token):
            raise UsageError(f"the argument {token!r} is not UTF-8 text. Rename the file or folder.")


def _underscored(token: str) -> str:
    """--train-batch-size -> --train_batch_size; values stay as they are."""
    if not token.startswith("--"):
        return token
    name, equals, value = token.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def _config_file(tokens: Sequence[str]) -> tuple[Any, ...]:
    """The options in the command's --config file, for cyclopts. Flags take precedence over them.

    Raises:
        UsageError: the file cannot be read, or has an unknown key.
    """
    known: dict[str, Any] = paper.COMMANDS if tokens[:1] == ["paper"] else COMMANDS
    command = next((t for t in tokens if t in known), None)
    path = next((t.partition("=")[2] for t in tokens if t.startswith("--config=")), None)
    if "--config" in tokens[:-1]:
        path = tokens[tokens.index("--config") + 1]
    if command is None or path is None:
        return ()
    given = read_options(Path(expanded(path)), [f.name for f in fields(known[command])])
    return (cyclopts.config.Dict(given, use_commands_as_keys=False, source=path),)


def _usage_message(error: cyclopts.CycloptsError) -> str:
    """One line; a value out of range reads as when `check_ranges` refuses it."""
    if isinstance(error, cyclopts.ValidationError) and error.argument is not None:
        return f"{error.argument.name} {error.exception_message}"
    if isinstance(error, cyclopts.UnusedCliTokensError):
        return f"unexpected argument: {' '.join(error.unused_tokens or [])}"
    return " ".join(str(error).split())


def _how_to_resume(tokens: Sequence[str], saved: str) -> str:
    """What to do after Ctrl-C; `saved` says what a training has saved, if it was one."""
    if tokens[:1] == ["batch"]:
        return "Run the same command again to continue."
    if not saved:
        return "Run the same command again to generate the missing images."
    resume = "Run the same command again" if tokens[:1] == ["paper"] else "Add --resume_from_checkpoint latest"
    return f"{saved} {resume} to continue."


def _fail(error: UnlearnError, debug: bool) -> int:
    """Print the error in one line on stderr; returns its exit code."""
    if debug and not isinstance(error.__context__, cyclopts.CycloptsError):
        import traceback

        traceback.print_exc()
    with contextlib.suppress(OSError):  # stderr may be full or closed, too
        print(f"Error: {' '.join(str(error).split())}", file=sys.stderr)
    return error.exit_code


def entry() -> None:
    """The console script `sd-unlearn`."""
    sys.exit(main())


if __name__ == "__main__":
    entry()
