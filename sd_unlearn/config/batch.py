"""Options of `batch`. What a job list says itself is in batch/job_list.py. Imports no torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from sd_unlearn.config.options import CountOrNever, Debug, Range, option
from sd_unlearn.config.paths import PathOptions

EngineName = Literal["local", "ray", "slurm"]
Workers = Range(above=0, at_most=10_000)


@dataclass(kw_only=True)
class BatchConfig(PathOptions):
    """Run a job list: concepts x settings x stages. Only what is missing is done."""

    jobs: Annotated[Path | None, option("YAML file with the job list (docs/scale.md).")] = field(
        default=None, kw_only=False
    )
    engine: Annotated[
        EngineName | None,
        option(
            "Where tasks run. local: processes on this machine. ray: a Ray cluster (extra ray). slurm: a SLURM "
            "cluster, through submitit (extra slurm). Default: the job list's, else local."
        ),
    ] = None
    workers: Annotated[
        int | None,
        option(
            "Tasks that run at the same time. Default: the job list's, else one per GPU, or 1 on a CPU; with slurm "
            "1000.",
            None,
            Workers,
        ),
    ] = None
    address: Annotated[
        str | None,
        option(
            "Ray cluster to connect to: auto, or the address of its head node. Default: the job list's, else Ray is "
            "started on this machine."
        ),
    ] = None
    max_failures: Annotated[
        int | None,
        option(
            "Start no further tasks once more than N tasks have failed. Default: the job list's, else no limit.",
            None,
            CountOrNever,
        ),
    ] = None
    dry_run: Annotated[bool, option("List the tasks, which are done and which are missing, and exit.")] = False
    debug: Debug = False
