"""From a job list to tasks: a task is a stage with its options, addressed by everything that determines what it makes.

Job lists with the same output folder share the tasks that are equal. All options are checked here, before anything
runs; nothing is loaded or written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sd_unlearn.batch.identity import base_identity, digest_of, images_identity
from sd_unlearn.batch.job_list import JobList, ListedConcept, Setting, Stage, concepts_of, settings_of
from sd_unlearn.batch.options import (
    LATER,
    check_export_of,
    check_metrics_of,
    config_of,
    identifying,
    later_config,
    metrics_of,
    of_concepts,
    task_options,
    uses_rendered_photos,
    with_names,
)
from sd_unlearn.batch.record import CONCEPT, MERGED, Order
from sd_unlearn.choices import CLOSED_FORM
from sd_unlearn.config.base import RenderConfig
from sd_unlearn.config.evaluate import Detectors
from sd_unlearn.config.paths import as_dict
from sd_unlearn.config.train import TrainConfig
from sd_unlearn.data.concept import Concept, concept_sha256
from sd_unlearn.data.render_job import make_job
from sd_unlearn.errors import UsageError
from sd_unlearn.io.paths import slugify
from sd_unlearn.io.run_folder import DATA_MANIFEST, EXPORT_DIR, RESULTS, TRAINING
from sd_unlearn.metrics.option_users import check_used
from sd_unlearn.models.source import Source
from sd_unlearn.report.report import HTML
from sd_unlearn.training.preflight import check_inputs
from sd_unlearn.training.provenance import NOT_COMPARED

PRODUCTS = {"evaluate": RESULTS, "attack": RESULTS, "export": f"{EXPORT_DIR}/README.md", "report": HTML}
# A stage cannot be without these.
REQUIRES: dict[Stage, tuple[Stage, ...]] = {
    "render": (),
    "train": (),
    "evaluate": ("train",),
    "attack": ("train",),
    "export": ("train",),
    "report": ("train", "evaluate"),
}
# The tasks of the same job that must be done before, if the list has them.
AFTER: dict[Stage, tuple[Stage, ...]] = {
    "render": (),
    "train": ("render",),
    "evaluate": ("train",),
    "attack": ("train", "evaluate"),  # both write results.json
    "export": ("train", "evaluate", "attack"),  # the model card has the results
    "report": ("train", "evaluate", "attack"),
}


@dataclass(frozen=True)
class Task:
    """A stage of one or several jobs."""

    id: str  # stage and address, the name of its folder
    order: Order
    concept: Concept
    options: dict[str, Any] = field(repr=False)
    needs: tuple[str, ...] = ()  # ids of the tasks that must be done before


@dataclass(frozen=True)
class Job:
    """A concept with a setting: one line of the results."""

    concept: Concept
    setting: str
    base: str  # identity
    run: Path | None  # the run folder; None if nothing is trained
    tasks: dict[Stage, str]  # ids


@dataclass
class Plan:
    """All jobs and tasks of a list, in order: needs come first."""

    jobs: JobList
    folder: Path  # output_dir, absolute
    lines: list[Job] = field(default_factory=list)
    tasks: dict[str, Task] = field(default_factory=dict)
    later: dict[Stage, Any] = field(default_factory=dict)  # the config of each stage after the training

    def folder_of(self, task: str) -> Path:
        return self.folder / "tasks" / task

    def cache_of(self, concept: Concept) -> Path:
        """Where evaluations of a concept cache images.

        Evaluations of different concepts do not wait for each other, and no image of the base is generated in one
        batch with images of another concept, which would change its rounding.
        """
        return self.folder / "evaluation" / f"{concept.slug}-{concept_sha256(concept)[:12]}"

    @property
    def own_folder(self) -> Path:
        """Of what belongs to this list alone: its table and its comparison."""
        return self.folder / "lists" / str(self.jobs.name)


def make_plan(jobs: JobList) -> Plan:
    """The tasks of a job list.

    Raises:
        UsageError: an option is unknown, has a wrong value or does not fit; names the job.
    """
    plan = Plan(jobs, Path(jobs.output_dir).expanduser().absolute())
    names = _Names(plan.folder)
    stages = closed(jobs.stages)
    listed_concepts = concepts_of(jobs)
    by_slug = {listed.concept.slug: listed.concept for listed in listed_concepts}
    for stage in stages:
        if stage in LATER:
            plan.later[stage] = with_names(later_config(stage, getattr(jobs, stage)), by_slug)
    detecting = [config for config in plan.later.values() if isinstance(config, Detectors)]
    for config in detecting:
        check_used(config, metrics_of(config, by_slug.values()))
    for listed in listed_concepts:
        for config in detecting:
            check_metrics_of(of_concepts(config, [listed.concept]), listed.concept)
        for setting in settings_of(jobs):
            where = f"{listed.concept.name}, {setting.name}" if setting.name else listed.concept.name
            try:
                plan.lines.append(_Planner(plan, names, listed, setting).job(stages))
            except UsageError as error:
                raise UsageError(f"Job {where}: {error}") from None
    return plan


def closed(stages: list[Stage]) -> list[Stage]:
    """The stages with those that they require, in order."""
    wanted = {needed for stage in stages for needed in (*REQUIRES[stage], stage)}
    return [stage for stage in REQUIRES if stage in wanted]


class _Names:
    """Folders in the output folder: a readable name and the address. A folder that exists keeps its name."""

    def __init__(self, root: Path) -> None:
        self.known: dict[Path, dict[str, Path]] = {}
        for folder in (root, root / "data"):
            paths = folder.iterdir() if folder.is_dir() else ()
            self.known[folder] = {path.name.rpartition("-")[2]: path for path in paths}

    def folder(self, root: Path, name: str, address: str) -> Path:
        return self.known[root].setdefault(address, root / f"{slugify(name)}-{address}")


class _Planner:
    """Adds the tasks of one job to a plan."""

    def __init__(self, plan: Plan, names: _Names, listed: ListedConcept, setting: Setting) -> None:
        self.plan, self.names, self.listed, self.setting = plan, names, listed, setting
        self.concept = listed.concept
        self.title = f"{self.concept.name} ({setting.name})" if setting.name else self.concept.name

    def job(self, stages: list[Stage]) -> Job:
        """Add the job's tasks to the plan."""
        shared = self.plan.jobs.options
        own = {k: v for k in ("positives", "data_dir") if (v := getattr(self.listed, k)) is not None}
        own.setdefault("data_dir", str(self.plan.folder / "data" / self.concept.slug))  # never exists: no address
        config = config_of(TrainConfig, {**shared, **self.setting.options}, "options", own)
        source = check_inputs(config, self.concept).source
        base = base_identity(source)
        tasks: dict[Stage, str] = {}
        if self.listed.data_dir:
            data, images = Path(self.listed.data_dir).expanduser().absolute(), images_identity(self.listed.data_dir)
        elif self._uses_images(config, stages):  # with the list's seed, so that trainings with several seeds share them
            rendering = dataclasses.replace(config, seed=shared.get("seed", TrainConfig.seed))
            data, images = self._render(tasks, rendering, source, base)
        else:
            data, images = Path(own["data_dir"]), ""
        run = self._train(tasks, config, data, base, images) if "train" in stages else None
        for stage in stages:
            if run and stage in self.plan.later:
                self._later(tasks, stage, run, config)
        return Job(self.concept, self.setting.name, base, run, tasks)

    def _uses_images(self, config: TrainConfig, stages: list[Stage]) -> bool:
        """Whether images are rendered: for training steps, on request, or as the photos by which a person is known."""
        detecting = [c for stage in stages if isinstance(c := self.plan.later.get(stage), Detectors)]
        recognized = any(uses_rendered_photos(c, self.concept) for c in detecting)
        return config.objective not in CLOSED_FORM or "render" in stages or recognized

    def _render(self, tasks: dict[Stage, str], config: TrainConfig, source: Source, base: str) -> tuple[Path, str]:
        """Add the rendering of the training images. Returns their folder and address."""
        names = {f.name for f in dataclasses.fields(RenderConfig)}
        render = RenderConfig(**{k: v for k, v in vars(config).items() if k in names})
        job = make_job(self.concept, render, source)
        sampler = {k: v for k, v in dataclasses.asdict(job.sampler).items() if k != "batch_size"}
        groups = [list(group) for group in job.groups]
        address = digest_of("render", self.concept.name, base, job.seed, sampler, groups, render.mixed_precision)
        data = self.names.folder(self.plan.folder / "data", self.concept.slug, address)
        order = Order("render", str(data), str(data / DATA_MANIFEST), f"render {self.concept.name}")
        self._add(tasks, address, order, render, {"data_dir": data})
        return data, address

    def _train(self, tasks: dict[Stage, str], config: TrainConfig, data: Path, base: str, images: str) -> Path:
        """Add the training. Returns the run folder."""
        options = {k: v for k, v in as_dict(config).items() if k not in NOT_COMPARED}
        photos = images_identity(self.listed.positives) if self.listed.positives else ""
        address = digest_of("train", concept_sha256(self.concept), base, images, photos, options)
        run = self.names.folder(self.plan.folder, f"{self.concept.slug} {self.setting.name}", address)
        order = Order("train", str(run), str(run / TRAINING), f"train {self.title}")
        self._add(tasks, address, order, config, {"data_dir": data, "output_dir": run})
        return run

    def _later(self, tasks: dict[Stage, str], stage: Stage, run: Path, training: TrainConfig) -> None:
        """Add a stage after the training."""
        config = of_concepts(self.plan.later[stage], [self.concept])
        address = digest_of(stage, identifying(config), [tasks[s] for s in AFTER[stage] if s in tasks])
        product, places = run / PRODUCTS[stage], {"run": run}
        if stage in ("evaluate", "attack"):
            places["cache_dir"] = self.plan.cache_of(self.concept)
        elif stage == "export":
            has_files = check_export_of(config, training)
            if config.merge is not None:
                places["merge"] = run / f"{MERGED}{address}" / config.merge.name
                product = product if has_files else places["merge"]
        order = Order(stage, str(run), str(product), f"{stage} {self.title}")
        self._add(tasks, address, order, config, places)

    def _add(
        self, tasks: dict[Stage, str], address: str, order: Order, config: Any, places: Mapping[str, Path]
    ) -> None:
        """Add a task to the plan, unless another job has it, and to the job."""
        stage = order.stage
        task = f"{stage}-{address}"
        if task not in self.plan.tasks:
            own = {"concept": self.plan.folder_of(task) / CONCEPT} if stage in ("render", "train") else {}
            needs = tuple(tasks[s] for s in AFTER[stage] if s in tasks)
            self.plan.tasks[task] = Task(task, order, self.concept, task_options(config, {**own, **places}), needs)
        tasks[stage] = task


def missing_tasks(plan: Plan, done: Mapping[str, bool]) -> list[Task]:
    """The tasks that must run, needs first. Images that no training needs any more are not rendered again."""
    wanted: list[Task] = []
    needed: set[str] = set()
    for task in reversed(plan.tasks.values()):
        if (task.order.stage in plan.jobs.stages or task.id in needed) and not done[task.id]:
            wanted.append(task)
            needed.update(task.needs)
    return wanted[::-1]
