"""Carry out attacks and write their results: read `attack_all` from top to bottom."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from sd_unlearn.attacks.base import Samples, Target
from sd_unlearn.attacks.earlier import added, check_same_settings, read_earlier
from sd_unlearn.attacks.files import attacker_files
from sd_unlearn.attacks.images import ImageSource
from sd_unlearn.attacks.judge import Judged, attack_problems, detectors_of, judge
from sd_unlearn.attacks.registry import ATTACKS
from sd_unlearn.attacks.tasks import Model, Task, carry_out, take_failures, task_folder
from sd_unlearn.config.attack import AttackConfig
from sd_unlearn.errors import OutOfMemory, UsageError
from sd_unlearn.evaluation.evaluate import assemble
from sd_unlearn.evaluation.fail_if import Condition, outcomes, parse_condition
from sd_unlearn.evaluation.generate import TIMEOUT, BaseLoader, ImageCache, image_cache
from sd_unlearn.evaluation.job import EvaluationJob
from sd_unlearn.evaluation.loras import ModelVariant
from sd_unlearn.io.files import atomic_path, full_disk_explained, write_json, write_text
from sd_unlearn.io.lock import locked
from sd_unlearn.io.own_files import mark_evaluation
from sd_unlearn.io.paths import public_name
from sd_unlearn.io.progress import Progress, say
from sd_unlearn.io.run_folder import IMAGE_DIR, RESULTS
from sd_unlearn.launch import heartbeat, last_beat, process_count, process_rank, wait_for_others
from sd_unlearn.metrics.base import Metric
from sd_unlearn.metrics.registry import make_metrics, merge_cards, metric_cards
from sd_unlearn.models.base import HASHES, load_base
from sd_unlearn.models.device import default_device
from sd_unlearn.models.find_base import find_base
from sd_unlearn.models.memory_errors import free_memory, shortage_behind
from sd_unlearn.models.zero_terminal_snr import use_zero_terminal_snr
from sd_unlearn.results import BASE, FLOOR, as_json, parse_results

SHOWN = 8  # images of the best try that are kept beside results.json


def attack_all(
    config: AttackConfig,
    job: EvaluationJob,
    names: Sequence[str],
    metrics: Mapping[str, Sequence[str]],
    conditions: Sequence[Condition],
) -> dict[str, Any]:
    """Carry out the attacks with these names that are missing, and write results.json.

    metrics: the names of the metrics of each concept (find_detectors).

    Returns:
        Its content; {} in all processes but the first.
    """
    file = job.output / RESULTS
    with full_disk_explained(), locked(job.output, "--output_dir"):
        earlier = read_earlier(job, file)
        kept = [parse_condition(found["condition"]) for found in earlier.get("conditions", ())]
        loader = BaseLoader(job)
        cache = image_cache(job, loader)
        if earlier:
            cards = [card for _, detectors in _detectors(job, metrics) for card in metric_cards(detectors)]
            check_same_settings(earlier, assemble(job, cache, [], cards), file)
        names = _supported(config, cache.base, names)
        models = _models(config, job, loader, cache)
        tasks = _plan(config, job, models, names, cache.base)
        _carry_out_missing(config, loader, cache, tasks)
        if process_rank() > 0:
            return {}
        _wait_for_others(cache, tasks)
        failed = take_failures(tasks)
        floor = next((model.cache.base for model in models if model.id == FLOOR), None)
        names_of_failed = {(one.concept, one.subject, one.attack) for one in failed}
        done = [task for task in tasks if task.of_attack not in names_of_failed]
        results = _results(config, job, cache, done, metrics, floor)
        results = added(results, earlier) if earlier else results
        results["failed_attacks"] = [as_json(one) for one in failed]
        all_conditions = list(dict.fromkeys([*kept, *conditions]))
        results["conditions"] = [as_json(found) for found in outcomes(all_conditions, parse_results(results))]
        mark_evaluation(job.output)
        write_json(file, results)
        return results


def _supported(config: AttackConfig, base: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """The attacks that work on the base. base: its record.

    Raises:
        UsageError: one of those that --attacks names does not.
    """
    faults = {name: fault for name in names if (fault := ATTACKS[name].unsupported(base))}
    for name, fault in faults.items():
        if config.attacks:
            raise UsageError(f"--attacks {name} does not work on {public_name(base['name'])}: {fault}. Leave it out.")
        say(f"Left out: the attack {name}, because {fault}.")
    return [name for name in names if name not in faults]


def _models(config: AttackConfig, job: EvaluationJob, loader: BaseLoader, cache: ImageCache) -> list[Model]:
    """The base as the ceiling, the floor, and each LoRA."""
    every = tuple(job.concepts)
    models = [Model(BASE, ModelVariant(), every, loader.load, cache)] if config.ceiling else []
    if config.floor:
        floor = load_base(
            find_base(dataclasses.replace(config, pretrained_model_name_or_path=config.floor)),
            job.precision,
        )
        _check_same_kind(config, floor.describe(), cache.base)
        if job.zero_terminal_snr:
            use_zero_terminal_snr(floor)
        of_floor = dataclasses.replace(cache, base=floor.describe())
        models.append(Model(FLOOR, ModelVariant(), every, lambda: floor, of_floor))
    return models + [
        Model(subject.id, subject.variant, subject.concepts, loader.load, cache)
        for subject in job.subjects
        if subject.variant is not None
    ]


def _check_same_kind(config: AttackConfig, floor: Mapping[str, Any], base: Mapping[str, Any]) -> None:
    """Refuse a floor of another kind. floor, base: their records."""
    if floor["kind"] != base["kind"]:
        raise UsageError(
            f"--floor {config.floor} is of the kind {floor['kind']}, the base of {base['kind']}, so attacks on them do "
            "not compare. Give a model like the base that never saw the concept."
        )


def _plan(
    config: AttackConfig, job: EvaluationJob, models: Sequence[Model], names: Sequence[str], base: Mapping[str, Any]
) -> list[Task]:
    """Every restart of every attack on every model. base: the record of the base that generates attackers' images."""
    given = _digest(config.attacker_images) if config.attacker_images else ""
    tasks = []
    for model in models:
        images = given or ("" if model.cache.base == base else str(sorted((key, base.get(key)) for key in HASHES)))
        for concept in (job.concepts[slug] for slug in model.concepts):
            for attack in (ATTACKS[name] for name in names):
                if model.variant.lora is None and attack.applies_lora:
                    continue  # nothing to change the strength of
                settings = attack.budgets[config.budget]
                for restart in range(settings.restarts):
                    place = task_folder(model, concept, attack, settings, config.seed, images, restart)
                    tasks.append(Task(model, concept, attack, settings, restart, place))
    return tasks


def _digest(folder: Path) -> str:
    """Identifies the images of a folder by their content."""
    digest = hashlib.sha256()
    for file in attacker_files(folder):
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _carry_out_missing(config: AttackConfig, loader: BaseLoader, cache: ImageCache, tasks: Sequence[Task]) -> None:
    """Do this process's share of the tasks that are not done. One that runs out of memory does not end the others."""
    missing = [task for task in tasks[process_rank() :: process_count()] if not task.done]
    if not missing:
        return
    for task in missing:
        task.failure.unlink(missing_ok=True)  # of a command that was killed
    samples: dict[tuple[str, ...], Samples] = {}
    beating = heartbeat(_heartbeats(cache)[process_rank()]) if process_count() > 1 else nullcontext()
    with beating, Progress(len(missing), "attack", "attempt", shown=process_rank() == 0) as progress:
        folder = cache.base_folder / "attacker"
        source = ImageSource(loader.load(), cache.sampler, config.seed, folder, config.attacker_images)
        for task in missing:
            progress.show(now=f"{task.attack.name} on {task.model.id}")
            if why := _attempt(task, lambda task: _target(task, source, samples, config.seed)):
                say(f"Failed: the attack {task.attack.name} on {task.model.id}. {why}")
                write_text(task.failure, why)
            progress.advance()


def _attempt(task: Task, make_target: Callable[[Task], Target]) -> str:
    """Carry out a task; says why it ran out of memory, else nothing."""
    why = ""
    try:
        target = make_target(task)
        with nullcontext() if task.attack.applies_lora else target.applied(1.0):
            carry_out(task, target)
    except (OutOfMemory, RuntimeError, MemoryError) as error:
        shortage = error if isinstance(error, OutOfMemory) else shortage_behind(error)
        if shortage is None:
            raise
        why = str(shortage)
    if why:
        free_memory()  # only here, after the except block has released the tensors in its frames
    return why


def _heartbeats(cache: ImageCache) -> list[Path]:
    """A file for each process."""
    return [cache.base_folder / "attacker" / f"process-{rank}.alive" for rank in range(process_count())]


def _wait_for_others(cache: ImageCache, tasks: Sequence[Task]) -> None:
    """Wait until the other processes have carried out their tasks, each of which may take hours.

    Raises:
        UnlearnError: one of them must have stopped.
    """

    def missing() -> int:
        return sum(not (task.done or task.failed) for task in tasks)

    def signs() -> list[int]:
        return [last_beat(file) for file in _heartbeats(cache)]

    wait_for_others(missing, "attacks", TIMEOUT, poll=1.0, signs=signs)


def _target(task: Task, source: ImageSource, known: dict[tuple[str, ...], Samples], seed: int) -> Target:
    """The attacked model with the attacker's images that the attack uses. known: images that were made before."""
    base, concept, lora = task.model.load(), task.concept, task.model.variant.lora

    def images(kind: str, count: int) -> Samples:
        key = (kind, concept.slug, str(count), base.vae_sha256)
        if count and key not in known:
            make = source.positives if kind == "positives" else source.unrelated
            known[key] = make(concept, count, base)
        return known[key] if count else Samples.none()

    def applied(strength: float) -> Any:
        return nullcontext() if lora is None else lora.applied_to(base, strength)

    sampler, attack, settings = task.model.cache.sampler, task.attack, task.settings
    positives = images("positives", attack.positives(settings))
    unrelated = images("unrelated", attack.unrelated(settings))
    return Target(base, concept, sampler, seed, positives, unrelated, applied)


def _detectors(job: EvaluationJob, names: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, list[Metric]]]:
    """(slug, the metrics that detect it) of one concept after the other, so that few networks are in memory.

    names: of the metrics of each concept.
    """
    for slug, concept in job.concepts.items():
        metrics, _ = make_metrics(names[slug], job.metric_context(concept, default_device()))
        yield slug, detectors_of(concept, metrics)


def _results(
    config: AttackConfig,
    job: EvaluationJob,
    cache: ImageCache,
    tasks: Sequence[Task],
    names: Mapping[str, Sequence[str]],
    floor: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The content of results.json with these attacks alone. floor: the record of the floor."""
    judged, cards = list[Judged](), []
    grouped: dict[tuple[str, str, str], list[Task]] = defaultdict(list)
    for task in tasks:
        grouped[task.of_attack].append(task)
    for slug, detectors in _detectors(job, names):
        for (of_concept, _, _), restarts in grouped.items():
            for metric in detectors if of_concept == slug else []:
                judged.append(judge(restarts, metric, config.budget, config.seed))
        cards += metric_cards(detectors)
    entries = [as_json(_with_images(one, job.output)) for one in judged]
    results = assemble(job, cache, [], merge_cards(cards))
    if floor:
        name = public_name(str(config.floor))
        results["subjects"].append({"id": FLOOR, "name": name, "what": "base", "sha256": floor["sha256"]})
    for problem in (found for restarts in grouped.values() for found in attack_problems(restarts)):
        say(f"No verdict will be given on {problem.subject}. {problem.message}")
        results["problems"].append(as_json(problem))
    return results | {"rows": [as_json(one.row) for one in judged], "attacks": entries, "tier": ""}


def _with_images(judged: Judged, output: Path) -> Any:
    """The entry, with some images of the best try copied into the output folder. Detectors may differ on the best."""
    entry, names = judged.entry, []
    folder = Path(IMAGE_DIR) / "attacks" / f"{entry.subject}-{entry.concept}-{entry.attack}-{judged.best.restart}"
    for path in (path for path in judged.best.paths[:SHOWN] if path.is_file()):
        name = folder / path.name
        with atomic_path(output / name) as temporary:
            shutil.copyfile(path, temporary)
        names.append(str(name))
    return dataclasses.replace(entry, images=tuple(names))
