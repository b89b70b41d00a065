"""The stages of a cell of `leaderboard.py`: train, evaluate, attack. Each adds to the cell's record.

A stage of a record is repeated only if what determines it has changed: weights, concept, options, version of the
attacks. Images, detector outputs and attacks are kept in --work_dir, so an interrupted stage resumes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from leaderboard_methods import Cell, Method, chosen
from leaderboard_pictures import write_strip
from leaderboard_runs import UNWATCHED, digest, train_once, trained_files, weights_in
from leaderboard_studies import STUDIES, Budget, Study

import sd_unlearn
from sd_unlearn.attacks.registry import ATTACKS
from sd_unlearn.attacks.tasks import VERSION
from sd_unlearn.config.evaluate import EvaluateConfig
from sd_unlearn.data.concept import Concept, Prompt, concept_sha256
from sd_unlearn.data.find_concept import load_concept
from sd_unlearn.evaluation.detections import open_images
from sd_unlearn.evaluation.generate import ImageCache
from sd_unlearn.evaluation.loras import ModelVariant, open_run
from sd_unlearn.evaluation.prompts import BASE_TIERS, TIERS, ImageSpec, override_counts, plan_images
from sd_unlearn.io.files import write_json
from sd_unlearn.io.reading import read_json
from sd_unlearn.io.run_folder import RESULTS, TRAINING, weights_sha256
from sd_unlearn.metrics.factorial import factorial_rows, grid
from sd_unlearn.models.base import Base, load_base
from sd_unlearn.models.find_base import find_base
from sd_unlearn.models.sampling import BASE_SAMPLERS
from sd_unlearn.results import BASE, Results, Row
from sd_unlearn.seeds import EVALUATE_SEEDS, image_seed

METRICS = ("leakage", "clean_replacement", "retention", "drift", "fid-digits", "fid-emoji", "kid-emoji")
KEPT = ("value", "n", "low", "high")  # of a row
SHOWN = 8  # images of the caption, and of the strongest learned prompt
MODEL = "model"  # name of the images of a whole model in results.json


class NotAvailable(Exception):
    """A cell whose model is not there; the message says what is missing."""


@dataclass
class Stages:
    """What has been done for one cell.

    root: where build/ is. work: data, runs and caches. records: where the record is kept. method: the cell's, with
    other options.
    """

    cell: Cell
    budget: Budget
    root: Path
    work: Path
    records: Path
    method: Method | None = None

    @property
    def study(self) -> Study:
        """What is asked of the cell's base."""
        return STUDIES[self.cell.base]

    @cached_property
    def concept(self) -> Concept:
        """The concept file."""
        return load_concept(self.cell.concept)

    @property
    def file(self) -> Path:
        """The record."""
        return self.records / f"{self.cell.name}.json"

    @property
    def record(self) -> dict[str, Any]:
        """The content of the record."""
        names = {"method": self.cell.method, "concept": self.cell.concept, "seed": self.cell.seed}
        return read_json(self.file) if self.file.is_file() else names

    def add(self, **parts: Any) -> None:
        """Write the record with these parts."""
        write_json(self.file, {**self.record, "version": sd_unlearn.__version__, **parts})

    @cached_property
    def run(self) -> Path:
        """Where training and results are: a folder for each set of options, base and concept file."""
        content = [self.options, self.base_weights, concept_sha256(self.concept)]
        return self.work / "runs" / self.cell.base / f"{self.cell.name}-{digest(content)}"

    @property
    def data(self) -> Path:
        """The training images: a folder for each base and concept file, which the methods share."""
        content = [self.base_weights, concept_sha256(self.concept)]
        return self.work / "data" / self.cell.base / f"{self.cell.slug}-{digest(content)}"

    @property
    def options(self) -> dict[str, Any]:
        """The options of the training."""
        seed = {"seed": self.cell.seed} if self.cell.of.trained else {}
        own = self.method.options if self.method else {**self.cell.of.options, **chosen(self.cell.method)}
        return {**seed, **own}

    @property
    def model(self) -> str:
        """The model that is sampled or attacked, with or without a LoRA: the base, or the folder of the oracle."""
        if self.cell.method != "oracle":
            return self.cell.base
        label = self.concept.label or self.concept.name
        return str(self.root / "build" / f"{self.cell.base}-without-{label}" / "pipeline")

    @cached_property
    def source(self) -> Path:
        """The folder of the model.

        Raises:
            NotAvailable: it was not built.
        """
        if self.model != self.cell.base and not Path(self.model).is_dir():
            raise NotAvailable(f"{self.model} does not exist; docs/leaderboard.md says how to build it")
        return find_base(EvaluateConfig(pretrained_model_name_or_path=self.model)).place

    @cached_property
    def weights(self) -> str:
        """SHA-256 of everything that the images depend on."""
        own = weights_sha256(self.run) if self.cell.of.how == "train" else ""
        return digest([self.base_weights, own, concept_sha256(self.concept)])

    @cached_property
    def base_weights(self) -> str:
        """SHA-256 of the model without a LoRA."""
        return weights_in(self.source)

    @cached_property
    def base(self) -> Base:
        """The loaded base."""
        return load_base(find_base(EvaluateConfig(pretrained_model_name_or_path=self.model)))

    def load_base(self) -> Base:
        """The same, for what loads it only if it is needed."""
        return self.base

    @cached_property
    def cache(self) -> ImageCache:
        """Where images are kept, with the bundled base's sampler for every model."""
        return ImageCache(self.work / "evaluation", self.base.describe(), BASE_SAMPLERS[self.cell.base])

    @cached_property
    def variant(self) -> ModelVariant:
        """What is applied to the base."""
        return ModelVariant(open_run(self.run)) if self.cell.of.how == "train" else ModelVariant()

    def specs(self) -> list[ImageSpec]:
        """The images of the evaluation."""
        options = EvaluateConfig(**self.budget.evaluation)
        tier = TIERS[options.tier or BASE_TIERS[self.cell.base]]
        return plan_images(self.concept, override_counts(tier, options.num_images, options.num_keep_images, []), [0])


def train(stages: Stages) -> None:
    """Train the cell's LoRA, and record cost and size."""
    if stages.cell.of.how != "train":
        return
    options = {"pretrained_model_name_or_path": stages.cell.base, **stages.options}
    if stages.cell.of.trained:
        options |= {"data_dir": stages.data, **UNWATCHED}
    train_once(stages.cell.concept, stages.run, options)
    cost = read_json(stages.run / TRAINING)["cost"]
    size = sum(file.stat().st_size for file in trained_files(stages.run))
    kept = {key: cost.get(key) for key in ("seconds", "steps", "images_seen", "device")}
    stages.add(training={**kept, "bytes": size, "options": stages.options})


def evaluate(stages: Stages) -> None:
    """Evaluate the cell and record its metrics and UA, IRA and CRA."""
    if stages.cell.of.how == "train" and not (stages.run / TRAINING).is_file():
        raise NotAvailable("it is not trained yet")
    reader = weights_in(stages.study.classifier.reader.folder)
    images = [stages.budget.evaluation, stages.budget.grid_images, stages.budget.grid_step]
    key = digest([stages.weights, reader, *images, dict(stages.cell.of.options)])
    if stages.record.get("evaluation", {}).get("key") == key:
        return
    how = stages.cell.of.how
    options: dict[str, Any] = {"cache_dir": stages.work / "evaluation", **stages.budget.evaluation}
    if how == "train":
        results = sd_unlearn.evaluate(run=stages.run, **options)
    elif how == "sampler":
        sampler = {"concept": [stages.cell.concept], "output_dir": stages.run, **stages.cell.of.options}
        results = sd_unlearn.evaluate(**sampler, **options)
    else:
        stages.cache.generate(stages.load_base, stages.variant, stages.specs(), f"generate {stages.cell.name}")
        folder = stages.cache.folder(stages.variant)
        results = sd_unlearn.evaluate(
            images=[f"{MODEL}={folder}"], concept=[stages.cell.concept], output_dir=stages.run, **options
        )
    rows = measured(results)
    if how != "sampler":  # the grid is not part of an evaluation
        rows |= {row.metric: kept(row) for row in factorial(stages)}
    stages.add(evaluation={"key": key, "images": dict(stages.budget.evaluation), "rows": rows})


def measured(results: Results) -> dict[str, dict[str, Any]]:
    """The metrics of the table: {"metric group": value with n and interval}."""
    [subject] = [subject.id for subject in results.compared]
    rows = [row for row in results.rows if row.subject == subject and row.metric in METRICS]
    return {f"{row.metric} {row.group}": kept(row) for row in rows}


def kept(row: Row) -> dict[str, Any]:
    """What a record holds of a row; numbers with six digits."""
    values = {key: getattr(row, key) for key in KEPT}
    return {key: round(value, 6) if isinstance(value, float) else value for key, value in values.items()}


def factorial(stages: Stages) -> list[Row]:
    """UA, IRA and CRA on the grid of digits and inks, or things and styles; nothing for a background.

    All cells with the concept are taken, and of the others every `grid_step`-th.
    """
    label, study = stages.concept.label or stages.concept.name, stages.study
    if label not in {*chain(*study.axes.values()), *study.classifier.reader.categories}:
        return []
    own = set(study.classifier.reader.categories.get(label, (label,)))
    cells = [
        cell
        for index, cell in enumerate(grid(study.axes))
        if own & set(cell.values()) or index % stages.budget.grid_step == 0
    ]
    asked = [cell for cell in cells for _ in range(stages.budget.grid_images)]
    specs = []
    for number, cell in enumerate(asked):
        prompt = study.prompt_of(cell)
        seed = image_seed(EVALUATE_SEEDS, 0, prompt, number % stages.budget.grid_images)
        specs.append(ImageSpec("general", Prompt(prompt), seed))
    stages.cache.generate(stages.load_base, stages.variant, specs, f"generate the grid of {stages.cell.name}")
    images, failed = open_images(stages.cache.paths(stages.variant, specs))
    if failed:
        raise NotAvailable(f"{len(failed)} images of the grid are unreadable")
    classifier = study.classifier()
    return factorial_rows(label, asked, classifier.read(images), stages.cell.method, classifier.name)


def attack(stages: Stages) -> None:
    """Carry out the attacks that the record lacks, and record how often each succeeded."""
    if stages.cell.of.how == "sampler":
        raise NotAvailable("attacks on a changed sampler are not part of sd-unlearn attack")
    if stages.cell.of.how == "train" and not (stages.run / TRAINING).is_file():
        raise NotAvailable("it is not trained yet")
    reader = weights_in(stages.study.classifier.reader.folder)
    for name, budget in stages.budget.attacks.items():
        settings = asdict(ATTACKS[name].budgets[budget])
        key = digest([stages.weights, name, settings, VERSION])
        known = stages.record.get("attacks", {}).get(name, {})
        if known.get("key") == key and known.get("reader", reader) == reader:  # older records do not name it
            continue
        found = {"key": key, "reader": reader, **attacked(stages, name, budget)}
        attacks = {**stages.record.get("attacks", {}), name: found}
        stages.add(attacks=attacks)
    if (stages.run / RESULTS).is_file():
        pictures(stages)


def attacked(stages: Stages, name: str, budget: str) -> dict[str, Any]:
    """The result of one attack on a cell."""
    options: dict[str, Any] = {"cache_dir": stages.work / "evaluation", "attacks": [name], "budget": budget}
    if stages.cell.of.how == "train":
        options |= {"run": stages.run, "ceiling": False}
    else:
        options |= {"concept": [stages.cell.concept], "output_dir": stages.run}
        options |= {} if stages.cell.method == BASE else {"ceiling": False, "floor": str(stages.source)}
    results = sd_unlearn.attack(**options)
    [entry] = [entry for entry in results.attacks if entry.attack == name]
    [row] = [row for row in results.rows if row.metric == "attack" and row.group == name]
    tries = [[one.restart, one.step, round(one.value, 6)] for one in entry.tries]
    return {"budget": budget, **kept(row), "tries": tries, "settings": entry.settings, "seconds": entry.seconds}


def pictures(stages: Stages) -> None:
    """Keep some images of the caption, and of the attack `soft`, next to the record."""
    direct = [spec for spec in stages.specs() if spec.group == "direct"][:SHOWN]
    paths: list[Sequence[Path]] = [stages.cache.paths(stages.variant, direct)]
    entries: Sequence[Mapping[str, Any]] = read_json(stages.run / RESULTS).get("attacks", [])
    paths += [
        [stages.run / image for image in entry["images"][:SHOWN]] for entry in entries if entry["attack"] == "soft"
    ]
    write_strip(stages.file.with_suffix(".png"), paths)
