"""sd-unlearn batch jobs.yaml | batch status jobs.yaml. Imports nothing heavy until a command runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from sd_unlearn.config.batch import BatchConfig

HELP = """Run a job list: concepts x settings x stages, on this machine or a cluster.

docs/scale.md describes the job list; examples/jobs.yaml is one.

  sd-unlearn batch jobs.yaml             do what is missing, then compare
  sd-unlearn batch jobs.yaml --dry_run   list the tasks: done or missing
  sd-unlearn batch status jobs.yaml      progress, from another terminal
"""  # no line is longer than 80 characters

app = App(name="batch", help=HELP, help_format="plaintext")


@app.default
def batch(config: Annotated[BatchConfig, Parameter(name="*")] = BatchConfig()) -> None:
    """Do what is missing of a job list. Prints the path of its table, jobs.csv."""
    from sd_unlearn.batch.batch import run

    if table := run(config):
        print(table)


@app.command
def status(jobs: Annotated[Path, Parameter(help="The job list.")], /) -> None:
    """Show the running tasks of a job list, its failures and the time left."""
    from sd_unlearn.batch.batch import show_status

    print(show_status(BatchConfig(jobs)))
