"""The commands of sd-unlearn and their options. Imports nothing heavy until a command runs."""

from __future__ import annotations

import json
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

from cyclopts import App, Parameter

from sd_unlearn import __version__, concepts
from sd_unlearn.batch import commands as batch
from sd_unlearn.config.attack import AttackConfig
from sd_unlearn.config.base import ExportConfig, RenderConfig, ReportConfig
from sd_unlearn.config.calibrate import CalibrateConfig
from sd_unlearn.config.evaluate import EvaluateConfig
from sd_unlearn.config.fuse import FuseConfig
from sd_unlearn.config.help import Help, ShortHelp
from sd_unlearn.config.options import Range, option
from sd_unlearn.config.train import TrainConfig
from sd_unlearn.errors import UnlearnError
from sd_unlearn.launch import prepare_processes, process_rank
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
  sd-unlearn batch status jobs.yaml       show its progress

Your own concept:

  sd-unlearn concepts                     list the bundled concepts
  sd-unlearn concepts new "Jane Example"  write a concept file

If something does not work, run sd-unlearn doctor. --debug, after any command,
shows tracebacks and the messages of libraries.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 a --fail_if condition holds,
130 interrupted, 141 the reader of stdout stopped early (as head does).
"""  # no line is longer than 80 characters

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
    prepare_processes()
    from sd_unlearn.data.render import run

    folder = run(config)
    if not config.dry_run:
        print(folder)


@app.command(help_formatter=ShortHelp("memory, beta, checkpoints, previews"))
def train(config: Annotated[TrainConfig, Parameter(name="*")] = TrainConfig()) -> None:
    """Train a LoRA that erases a concept; missing training images are generated first."""
    prepare_processes()
    if config.beta_sweep is not None:
        from sd_unlearn import sweep

        page = sweep.run(config)
        if not config.dry_run:
            print(page)
        return
    from sd_unlearn.training import trainer

    folder = trainer.run(config)
    if process_rank() == 0 and not config.dry_run:
        print(f"Next: sd-unlearn evaluate --run {shlex.quote(str(folder))}", file=sys.stderr)
        print(folder)


@app.command(help_formatter=ShortHelp("prompts, strengths, sampler, detectors"))
def evaluate(config: Annotated[EvaluateConfig, Parameter(name="*")] = EvaluateConfig()) -> None:
    """Measure erasure and retention of one or many LoRAs, with intervals; writes results.json."""
    prepare_processes()
    from sd_unlearn.evaluation.evaluate import check_conditions, check_evaluated, pass_or_fail, run
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
        passed = check_conditions(results, config.fail_if)
        check_evaluated(results)
        if passed:
            print(passed, file=notes)


@app.command(help_formatter=ShortHelp("the attacker's images, sampler, detectors"))
def attack(config: Annotated[AttackConfig, Parameter(name="*")] = AttackConfig()) -> None:
    """Try to bring a removed concept back, and record how often that succeeds; adds to results.json."""
    prepare_processes()
    from sd_unlearn.attacks.attack import run
    from sd_unlearn.evaluation.evaluate import check_attacked, check_conditions
    from sd_unlearn.report.terminal import format_attacks
    from sd_unlearn.results import parse_results

    results = run(config)
    if results:  # empty in all processes but the first
        print(json.dumps(results, indent=2) if config.json else format_attacks(parse_results(results)))
        passed = check_conditions(results, config.fail_if)
        check_attacked(results)
        if passed:
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
    # also at 1, of which the run's attacks and its model card are
    strengths = f"1 {found.strength:g}" if config.run and found.strength != 1 else f"{found.strength:g}"
    print(
        f"The images that chose the strength cannot confirm it. Next, on other seeds: sd-unlearn evaluate {lora} "
        f"--strengths {strengths} --seed {max(config.seed) + 1}",
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
    port: Annotated[int, option("Port of the page.", None, Range(at_least=1, at_most=65535))] = 7860,
    listen: Annotated[
        bool,
        option(
            "Also accept other computers, without password or encryption: they can generate images, start and stop "
            "trainings, and read reports. Default: only this computer."
        ),
    ] = False,
) -> None:
    """Serve a local page to try LoRAs, read reports and start trainings in the working folder (extra: ui)."""
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
