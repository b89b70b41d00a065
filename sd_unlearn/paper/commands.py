"""sd-unlearn paper run | sweep | table | list. Imports nothing heavy until a command runs."""

from __future__ import annotations

import json
from typing import Annotated

from cyclopts import App, Parameter

from sd_unlearn.launch import prepare_processes, process_rank
from sd_unlearn.paper.options import RunOptions, SweepOptions, TableOptions

HELP = """Repeat the experiments of the paper (Takahashi et al., ICLR 2025).

Small versions, mnist5k-*, run on a CPU without a download.

  sd-unlearn paper list                        show all experiments
  sd-unlearn paper run mnist5k-even            train and evaluate one model
  sd-unlearn paper sweep mnist5k-even --objective unsupervised,supervised,pu
  sd-unlearn paper table                       tables of all finished runs

Each run has a folder in runs/paper. Running a command again skips finished runs
and resumes interrupted ones.
"""  # no line is longer than 80 characters

app = App(name="paper", help=HELP, help_format="plaintext")
COMMANDS = {"run": RunOptions, "sweep": SweepOptions, "table": TableOptions}
Name = Annotated[str, Parameter(help="Name of the experiment; see `paper list`.")]


@app.command
def run(name: Name, /, config: Annotated[RunOptions, Parameter(name="*")] = RunOptions()) -> None:
    """Train and evaluate one model. Writes runs/paper/<experiment>/<variant>/results.json."""
    prepare_processes()
    from sd_unlearn.io.reading import read_json
    from sd_unlearn.paper.printing import summary_of
    from sd_unlearn.paper.run import run_experiment

    record = run_experiment(name, config)
    if process_rank() > 0:  # the first process writes the record
        return
    results = read_json(record)
    print(json.dumps(results, indent=2, ensure_ascii=False) if config.json else summary_of(results, record.parent))


@app.command
def sweep(name: Name, /, config: Annotated[SweepOptions, Parameter(name="*")] = SweepOptions()) -> None:
    """Run all combinations of objectives, betas and seeds, then build their tables and plots."""
    from sd_unlearn.paper.sweep import run_sweep

    print(run_sweep(name, config))


@app.command
def table(config: Annotated[TableOptions, Parameter(name="*")] = TableOptions()) -> None:
    """Build the tables of all finished runs: mean and standard deviation over seeds."""
    from sd_unlearn.paper.tables.build import build_tables

    print(build_tables(config.runs, config.output_dir, config.update, config.collect))


@app.command(name="list")
def list_(*, as_json: Annotated[bool, Parameter(name="--json", help="Print JSON.", negative=())] = False) -> None:
    """Show all experiments and their settings."""
    from sd_unlearn.paper.printing import list_experiments

    print(list_experiments(as_json))
