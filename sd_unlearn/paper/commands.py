"""sd-unlearn paper run | sweep | table | list. Imports nothing heavy until a command runs."""

from __future__ import annotations

import json
from typing import Annotated

from cyclopts import App, Parameter

from sd_unlearn.launch import prepare_processes
from sd_unlearn.paper.options import RunOptions, SweepOptions, TableOptions

HELP = """The experiments of the paper, and the same on 5,000 real digits.

The latter need no network and no GPU.

sd-unlearn paper list                          every experiment, its settings
sd-unlearn paper run mnist5k-even --seed 42    one model: trained, drawn, judged
sd-unlearn paper sweep mnist5k-even --objective unsupervised,supervised,pu
sd-unlearn paper table                         finished runs as tables and plots

Each run is a folder of runs/paper. What is finished is not done again; what was
killed goes on.
"""

app = App(name="paper", help=HELP, help_format="plaintext")
COMMANDS = {"run": RunOptions, "sweep": SweepOptions, "table": TableOptions}
Name = Annotated[str, Parameter(help="The experiment's name, see paper list.")]


@app.command
def run(name: Name, /, config: Annotated[RunOptions, Parameter(name="*")] = RunOptions()) -> None:
    """Train, draw and judge one model -> runs/paper/<experiment>/<variant>/results.json."""
    prepare_processes()
    from sd_unlearn.io.files import read_json
    from sd_unlearn.paper.one import run_any
    from sd_unlearn.paper.printing import told

    record = run_any(name, config)
    found, folder = read_json(record), record.parent
    print(json.dumps(found, indent=2, ensure_ascii=False) if config.json else told(found, folder))


@app.command
def sweep(name: Name, /, config: Annotated[SweepOptions, Parameter(name="*")] = SweepOptions()) -> None:
    """Several objectives, betas or seeds; then their table, and leakage and FID against beta."""
    from sd_unlearn.paper import sweep as room

    print(room.run(name, config))


@app.command
def table(config: Annotated[TableOptions, Parameter(name="*")] = TableOptions()) -> None:
    """Finished runs as the paper's tables: mean and standard deviation over seeds."""
    from sd_unlearn.paper.tables.build import build_tables

    print(build_tables(config.runs, config.output_dir, config.update, config.collect))


@app.command(name="list")
def list_(*, as_json: Annotated[bool, Parameter(name="--json", help="As JSON.", negative=())] = False) -> None:
    """Every experiment with its settings."""
    from sd_unlearn.paper.printing import listed

    print(listed(as_json))
