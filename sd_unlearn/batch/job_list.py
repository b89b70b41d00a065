"""Read a job list (jobs.yaml): concepts x settings, the stages, and where they run. The format is in docs/scale.md."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from sd_unlearn.choices import TemplateKind
from sd_unlearn.config.batch import BatchConfig, EngineName
from sd_unlearn.data.concept import Concept
from sd_unlearn.data.find_concept import load_concept
from sd_unlearn.errors import UsageError
from sd_unlearn.io.paths import slugify
from sd_unlearn.io.reading import check_keys, read_csv_lines, read_yaml
from sd_unlearn.io.schema import STRICT, validate

Stage = Literal["render", "train", "evaluate", "attack", "export", "report"]
Options = dict[str, Any]


@dataclass(frozen=True)
class ConceptOptions:
    """A concept of the list, as a mapping in the YAML file or a line of a CSV file."""

    __pydantic_config__ = STRICT

    name: str  # a bundled concept, a .yaml file, or any name with an anchor
    anchor: str | None = None
    kind: TemplateKind | None = None
    positives: str | None = None  # folder of own photos
    data_dir: str | None = None  # folder of own images


@dataclass(frozen=True)
class RayOptions:
    """What a worker takes of a Ray cluster."""

    __pydantic_config__ = STRICT

    address: str | None = None
    num_cpus: float | None = None  # of a worker; default: threads
    num_gpus: float | None = None  # of a worker, e.g. 0.5; default: 1 if the cluster has GPUs


@dataclass(frozen=True)
class JobList:
    """The content of a jobs.yaml."""

    __pydantic_config__ = STRICT

    concepts: list[str | ConceptOptions]  # a text that ends in .csv is a file with one concept a line
    options: Options = field(default_factory=dict)  # of render and train, for all jobs
    settings: list[Options] = field(default_factory=list)  # each adds options of train; `name` is its name
    grid: dict[str, list[Any]] = field(default_factory=dict)  # options of train: every combination
    stages: list[Stage] = field(default_factory=lambda: ["train", "evaluate", "report"])
    evaluate: Options = field(default_factory=dict)
    attack: Options = field(default_factory=dict)
    export: Options = field(default_factory=dict)
    report: Options = field(default_factory=dict)
    name: str | None = None  # default: that of the file
    output_dir: str = "runs/batch"
    copy_to: str | None = None  # folder or fsspec URL to which finished runs are copied
    engine: EngineName = "local"
    workers: Annotated[int, Field(gt=0)] | None = None
    threads: Annotated[int, Field(gt=0)] = 1  # of the CPU, for each task
    retries: Annotated[int, Field(ge=0)] = 2  # of a task whose process or worker was lost
    max_failures: Annotated[int, Field(ge=0)] | None = None
    ray: RayOptions = RayOptions()
    slurm: Options = field(default_factory=dict)  # parameters of submitit


@dataclass(frozen=True)
class ListedConcept:
    """A concept of the list, read."""

    concept: Concept
    positives: str | None = None
    data_dir: str | None = None


@dataclass(frozen=True)
class Setting:
    """A setting of the list: a short name, and options of train that differ from the list's `options`."""

    name: str  # "" if the list has a single one
    options: Options


def read_job_list(config: BatchConfig) -> JobList:
    """The job list of a command; its flags take precedence over the file.

    Raises:
        UsageError: the file cannot be read, or has an unknown key or a value that is not valid.
    """
    if config.jobs is None:
        raise UsageError("jobs is missing. Give the job list, e.g. sd-unlearn batch jobs.yaml (docs/scale.md).")
    path = config.jobs
    jobs = validate(JobList, read_yaml(path, "job list"), str(path))
    if not jobs.concepts or not jobs.stages:
        raise UsageError(f"{path}: {'stages' if jobs.concepts else 'concepts'} is empty. List at least one.")
    given: dict[str, Any] = {"engine": config.engine, "workers": config.workers, "max_failures": config.max_failures}
    jobs = dataclasses.replace(jobs, **{key: value for key, value in given.items() if value is not None})
    if config.address is not None:
        if jobs.engine != "ray":
            raise UsageError(f"--address {config.address} is for --engine ray; the engine is {jobs.engine}.")
        jobs = dataclasses.replace(jobs, ray=dataclasses.replace(jobs.ray, address=config.address))
    return dataclasses.replace(jobs, name=slugify(jobs.name or path.stem))


def concepts_of(jobs: JobList) -> list[ListedConcept]:
    """The concepts of a job list, each once.

    Raises:
        UsageError: a concept or CSV file cannot be read, or two different concepts have the same name.
    """
    found: dict[str, ListedConcept] = {}
    for entry in jobs.concepts:
        for options in _entries(entry):
            concept = load_concept(options.name, options.anchor, options.kind)
            listed = ListedConcept(concept, options.positives, options.data_dir)
            if found.setdefault(concept.slug, listed) != listed:
                raise UsageError(f'concepts: "{concept.name}" is listed twice, with different content. Rename one.')
    return list(found.values())


def _entries(entry: str | ConceptOptions) -> list[ConceptOptions]:
    if isinstance(entry, ConceptOptions):
        return [entry]
    return _read_csv(Path(entry).expanduser()) if entry.endswith(".csv") else [ConceptOptions(entry)]


def _read_csv(path: Path) -> list[ConceptOptions]:
    """The concepts in a CSV file with the columns of ConceptOptions; empty cells are left out.

    Raises:
        UsageError: names the file and the line.
    """
    columns, rows = read_csv_lines(path, "concepts:", skip_spaces=True)
    check_keys(dict.fromkeys(columns), {f.name for f in dataclasses.fields(ConceptOptions)}, f"concepts: {path}")
    if not rows:
        raise UsageError(f"concepts: {path} lists no concept. Its first line names the columns, e.g. name,anchor,kind.")
    found = []
    for number, row in rows.items():
        filled = {key: cell.strip() for key, cell in row.items() if cell and cell.strip()}
        found.append(validate(ConceptOptions, filled, f"concepts: {path} line {number}"))
    return found


def settings_of(jobs: JobList) -> list[Setting]:
    """Every setting of a job list: each of `settings` with every combination of `grid`.

    Raises:
        UsageError: an option without values, one that is in both, or two settings that are equal.
    """
    for key, values in jobs.grid.items():
        if not values:
            raise UsageError(f"grid: {key} has no values. List at least one, or leave it out.")
    found: dict[str, Setting] = {}
    for given in jobs.settings or [{}]:
        options = {key: value for key, value in given.items() if key != "name"}
        if both := sorted(options.keys() & jobs.grid.keys()):
            raise UsageError(f"{both[0]} is both in settings and in grid. Leave it out of one.")
        for chosen in itertools.product(*jobs.grid.values()):
            combination = dict(zip(jobs.grid, chosen, strict=True))
            words = [str(given["name"])] if "name" in given else _words(options)
            name = ", ".join([*words, *_words(combination)])
            if name in found:
                raise UsageError(f'settings: "{name}" is there twice. Change or remove one.')
            found[name] = Setting(name, options | combination)
    return list(found.values())


def _words(options: Options) -> list[str]:
    return [f"{key} {value}" for key, value in options.items()]
