"""Carry out attacks and write their results: read `attack_all` from top to bottom."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from sd_unlearn.attacks.base import Samples, Target
from sd_unlearn.attacks.files import attacker_files
from sd_unlearn.attacks.images import concept_samples, unrelated_samples
from sd_unlearn.attacks.judge import Judged, detects_concept, judge
from sd_unlearn.attacks.registry import ATTACKS
from sd_unlearn.attacks.tasks import Task, carry_out, task_folder, wait_for_tasks
from sd_unlearn.config.attack import AttackConfig
from sd_unlearn.data.concept import Concept
from sd_unlearn.errors import UsageError
from sd_unlearn.evaluation.evaluate import assemble
from sd_unlearn.evaluation.fail_if import Condition, outcomes
from sd_unlearn.evaluation.generate import TIMEOUT, BaseLoader, ImageCache, image_cache
from sd_unlearn.evaluation.job import EvaluationJob
from sd_unlearn.evaluation.loras import ModelVariant
from sd_unlearn.io.files import atomic_path, full_disk_explained, write_json
from sd_unlearn.io.lock import locked
from sd_unlearn.io.own_files import is_run, kind_of, mark
from sd_unlearn.io.progress import Progress
from sd_unlearn.io.reading import read_json
from sd_unlearn.io.run_folder import IMAGE_DIR, RESULTS
from sd_unlearn.launch import process_count, process_rank
from sd_unlearn.metrics.registry import make_metrics, merge_cards, metric_cards
from sd_unlearn.models.base import Base
from sd_unlearn.results import BASE, as_json, carry_attacks, parse_results

SHOWN = 8  # images of the best try that are kept beside results.json
DEFAULT_POSITIVES = 25


def attack_all(
    config: AttackConfig, job: EvaluationJob, names: Sequence[str], conditions: Sequence[Condition]
) -> dict[str, Any]:
    """Carry out the attacks with these names that are missing, and write results.json.

    Returns:
        Its content; {} in all processes but the first.
    """
    with full_disk_explained(), locked(job.output, "--output_dir"):
        loader = BaseLoader(job)
        cache = image_cache(job, loader)
        tasks = _plan(config, job, cache, names)
        _carry_out_missing(config, job, loader, cache, tasks)
        if process_rank() > 0:
            return {}
        wait_for_tasks(tasks, TIMEOUT)
        results = _results(config, job, cache, tasks)
        results["conditions"] = outcomes(conditions, results)
        parse_results(results)
        if not kind_of(job.output) and not is_run(job.output):
            mark(job.output, "evaluation")
        write_json(job.output / RESULTS, results)
        return results


def _plan(config: AttackConfig, job: EvaluationJob, cache: ImageCache, names: Sequence[str]) -> list[Task]:
    """Every restart of every attack on every model, the base first."""
    attacked = [(BASE, ModelVariant(), tuple(job.concepts))] if config.ceiling else []
    attacked += [(s.id, s.variant, s.concepts) for s in job.subjects if s.variant is not None]
    images = _digest(config.attacker_images) if config.attacker_images else ""
    tasks = []
    for subject, variant, slugs in attacked:
        for concept in (job.concepts[slug] for slug in slugs):
            for attack in (ATTACKS[name] for name in names):
                if subject == BASE and attack.applies_lora:
                    continue  # nothing to change the strength of
                settings = attack.budgets[config.budget]
                for restart in range(settings.restarts):
                    where = (cache.folder(variant), concept, attack, settings, config.seed, images, restart)
                    tasks.append(Task(subject, variant, concept, attack, settings, restart, task_folder(*where)))
    return tasks


def _digest(folder: Path) -> str:
    """Identifies the images of a folder by their content."""
    digest = hashlib.sha256()
    for file in attacker_files(folder):
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _carry_out_missing(
    config: AttackConfig, job: EvaluationJob, loader: BaseLoader, cache: ImageCache, tasks: Sequence[Task]
) -> None:
    """Do this process's share of the tasks that are not done."""
    missing = [task for task in tasks[process_rank() :: process_count()] if not task.done]
    if not missing:
        return
    base = loader.load()
    samples = {
        slug: _samples(config, base, cache, concept, [t for t in missing if t.concept is concept])
        for slug, concept in job.concepts.items()
        if any(task.concept is concept for task in missing)
    }
    with Progress(len(missing), "attack", "try", shown=process_rank() == 0) as progress:
        for task in missing:
            progress.show(now=f"{task.attack.name} on {task.subject}")
            target = _target(task, base, cache, samples[task.concept.slug], config.seed)
            with nullcontext() if task.attack.applies_lora else target.applied(1.0):
                carry_out(task, target)
            progress.advance()


def _samples(
    config: AttackConfig, base: Base, cache: ImageCache, concept: Concept, tasks: Sequence[Task]
) -> tuple[Samples, Samples]:
    """The attacker's images of the concept and of other prompts, as many as the tasks need."""
    folder, sampler = cache.base_folder / "attacker", cache.sampler
    count = max(_needed(task.settings) for task in tasks)
    positives = concept_samples(base, concept, count, config.attacker_images, folder, sampler, config.seed)
    return positives, unrelated_samples(base, concept, count, folder, sampler, config.seed)


def _needed(settings: Any) -> int:
    """How many of the attacker's images an attack uses."""
    for name in ("positives", "samples"):
        if hasattr(settings, name):
            return int(getattr(settings, name))
    return max(DEFAULT_POSITIVES, int(settings.images))


def _target(task: Task, base: Base, cache: ImageCache, samples: tuple[Samples, Samples], seed: int) -> Target:
    lora = task.variant.lora

    def applied(strength: float) -> Any:
        return nullcontext() if lora is None else lora.applied_to(base, strength)

    return Target(base, task.concept, cache.sampler, seed, *samples, applied)


def _results(config: AttackConfig, job: EvaluationJob, cache: ImageCache, tasks: Sequence[Task]) -> dict[str, Any]:
    """The content of results.json: what it held, if that was of the same weights, with the new attacks."""
    judged, cards = list[Judged](), []
    grouped: dict[tuple[str, str, str], list[Task]] = defaultdict(list)
    for task in tasks:
        grouped[task.concept.slug, task.subject, task.attack.name].append(task)
    for slug, concept in job.concepts.items():
        metrics, _ = make_metrics(job.metric_context(concept, _device()))
        detectors = [metric for metric in metrics if detects_concept(metric)]
        for (of_concept, _, _), restarts in grouped.items():
            for metric in detectors if of_concept == slug else []:
                judged.append(judge(restarts, metric, config.budget, config.seed))
        cards += metric_cards(detectors)
    entries = [as_json(_with_images(one, job.output)) for one in judged]
    new = assemble(job, cache, [], merge_cards(cards))
    new |= {"rows": [as_json(one.row) for one in judged], "attacks": entries, "tier": ""}
    return _added(new, job.output / RESULTS)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _with_images(judged: Judged, output: Path) -> Any:
    """The entry, with some images of the best try copied into the output folder."""
    entry, names = judged.entry, []
    folder = Path(IMAGE_DIR) / "attacks" / f"{entry.subject}-{entry.concept}-{entry.attack}"
    for path in judged.best.paths[:SHOWN]:
        name = folder / path.name
        with atomic_path(output / name) as temporary:
            shutil.copyfile(path, temporary)
        names.append(str(name))
    return dataclasses.replace(entry, images=tuple(names))


def _added(new: dict[str, Any], file: Path) -> dict[str, Any]:
    """The results in a file with the new attacks, if they are of the same weights; else the new ones alone.

    Raises:
        UsageError: the file holds other subjects of these names.
    """
    if not file.is_file():
        return new
    old = read_json(file)
    parse_results(old, str(file))
    weights = {s["id"]: (s.get("sha256"), s.get("strength")) for s in old["subjects"]}
    for subject in new["subjects"]:
        if weights.get(subject["id"]) != (subject.get("sha256"), subject.get("strength")):
            raise UsageError(
                f"{file} holds results of other weights than {subject['name']} has now. Run sd-unlearn evaluate again, "
                "or choose another --output_dir."
            )
    kept_rows = [row for row in old["rows"] if row["metric"] != "attack"]
    merged = old | {"rows": kept_rows + new["rows"], "attacks": new["attacks"]}
    known = {card["detector"] for card in old.get("cards", ())}
    merged["cards"] = [*old.get("cards", ()), *(c for c in new["cards"] if c["detector"] not in known)]
    return carry_attacks(merged, old)
