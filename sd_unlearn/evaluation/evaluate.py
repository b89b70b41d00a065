"""The same seeds with and without LoRAs -> results.json: what is gone, what stayed, how sure (docs/results.md)."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Sequence
from typing import Any

import yaml

from sd_unlearn import __version__
from sd_unlearn.config.base import as_dict
from sd_unlearn.config.evaluate import EvaluateConfig
from sd_unlearn.data.concept import Concept, concept_sha256
from sd_unlearn.errors import UnlearnError
from sd_unlearn.evaluation import fail_if, pairs
from sd_unlearn.evaluation.generate import Drawn, Gallery
from sd_unlearn.evaluation.job import Task, asking_of, prepare
from sd_unlearn.evaluation.prompts import GROUPS, prompts_of, write_plan
from sd_unlearn.evaluation.score import Judged, Pictures, judge
from sd_unlearn.io.files import write_json, write_text
from sd_unlearn.io.run_folder import EVALUATION, RESULTS
from sd_unlearn.launch import process_rank
from sd_unlearn.metrics.registry import cards_of, make_questions, merged
from sd_unlearn.models.base import Base, check_recorded, choose_precision, load_base, use_zero_terminal_snr
from sd_unlearn.models.sampling import resolve_sampler
from sd_unlearn.results import BASE, SCHEMA_VERSION, as_json
from sd_unlearn.seeds import EVALUATE_SEEDS


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Draw, judge and write results.json; returns it. What was drawn or read before is not done again.

    Of several processes all draw, and the first judges; the others return {}.

    Raises:
        UsageError: nothing to judge, LoRAs of different bases, values that cannot be meant.
        UnlearnError: a model or detector cannot be had.
    """
    task = prepare(config)
    if config.write_plan is not None:
        write_plan(config.write_plan, task.plans)
        return {}
    loaded: list[Base] = []
    gallery = _gallery(task, loaded) if task.draws else None
    if gallery is not None:
        _draw(task, gallery, loaded)
    if process_rank() > 0:
        return {}
    loaded.clear()  # the detectors need the memory
    found, cards = _judge(task, gallery)
    results = _results(task, gallery, found, cards)
    write_text(task.output / EVALUATION, yaml.safe_dump(as_dict(config), sort_keys=False, allow_unicode=True))
    write_json(task.output / RESULTS, results)
    return results


def check_conditions(config: EvaluateConfig, results: dict[str, Any]) -> None:
    """Raise what --fail_if asks to fail on.

    Raises:
        UnlearnError: naming every condition that is met, with its figure.
    """
    met = fail_if.met([fail_if.parse(text) for text in config.fail_if], results)
    if met:
        raise UnlearnError(f"--fail_if: {'; '.join(met)}.")


def _gallery(task: Task, loaded: list[Base]) -> Gallery:
    config = task.config
    sampler = resolve_sampler(config, task.source.name)
    record = None if task.base_named else next((lora.training["base"] for lora in task.loras if lora.is_run), None)
    setting, precision = "-zero-snr" * task.zero_terminal_snr, config.mixed_precision
    setting += f"-{precision}" * (precision != "no")
    return Gallery(config.cache_dir, record or _load(task, loaded).describe(), sampler, setting)


def _load(task: Task, loaded: list[Base]) -> Base:
    """The base, loaded once, and, unless the command names it, checked to be the one the runs were trained on."""
    if not loaded:
        base = load_base(task.source, choose_precision(task.config.mixed_precision))
        for lora in task.loras if not task.base_named else []:
            if lora.is_run:
                check_recorded(base, lora.training["base"])
        if task.zero_terminal_snr:
            use_zero_terminal_snr(base)
        loaded.append(base)
    return loaded[0]


def _draw(task: Task, gallery: Gallery, loaded: list[Base]) -> None:
    """What is missing: the base's pictures once for all, then each LoRA's at each strength."""
    every = [shot for shots in task.plans.values() for shot in shots]
    gallery.draw(lambda: _load(task, loaded), Drawn(), every, "draw base")
    for subject in task.subjects:
        if subject.drawn is not None:
            shots = [shot for slug in subject.concepts for shot in task.plans[slug]]
            gallery.draw(lambda: _load(task, loaded), subject.drawn, shots, f"draw {subject.id}")


def _judge(task: Task, gallery: Gallery | None) -> tuple[list[tuple[Judged, list[Pictures]]], list[dict[str, Any]]]:
    found, cards = [], []
    for slug, concept in task.concepts.items():
        asking = asking_of(task.config, concept, task.loras, task.tier)
        questions, pair_questions = make_questions(dataclasses.replace(asking, device=_device()))
        pictures = _pictures(task, gallery, slug)
        if not pictures:
            continue
        drawn = {s.drawn.strength for s in task.subjects if s.drawn}
        usual = 1.0 if 1.0 in drawn else max(drawn, default=1.0)
        main = [s.id for s in task.subjects if slug in s.concepts and (s.drawn is None or s.drawn.strength == usual)]
        found.append((judge(concept, questions, pair_questions, pictures, main), pictures))
        cards += cards_of([*questions, *pair_questions])
    return found, merged(cards)


def _pictures(task: Task, gallery: Gallery | None, slug: str) -> list[Pictures]:
    shots, pictures = task.plans[slug], []
    mine = [subject for subject in task.subjects if slug in subject.concepts]
    if gallery is not None and mine:
        pictures.append(Pictures(BASE, shots, gallery.paths(Drawn(), shots), gallery.folder(Drawn())))
    for subject in mine:
        if subject.drawn is not None and gallery is not None:
            paths = gallery.paths(subject.drawn, shots)
            pictures.append(Pictures(subject.id, shots, paths, gallery.folder(subject.drawn)))
        elif subject.ready:
            ready = subject.ready[slug]
            place = hashlib.sha256(str(ready.folder.absolute()).encode()).hexdigest()[:12]
            cache = task.config.cache_dir / f"images-{place}"
            pictures.append(Pictures(subject.id, ready.shots, ready.paths, cache, ready.planned))
    return pictures


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _results(
    task: Task, gallery: Gallery | None, found: Sequence[tuple[Judged, list[Pictures]]], cards: list[dict[str, Any]]
) -> dict[str, Any]:
    config = task.config
    subjects_of = sum(len(pictures) for _, pictures in found)
    each = min(pairs.PER_GROUP, max(2, pairs.BUDGET // max(1, subjects_of * len(GROUPS))))
    shown = [pair for judged, pictures in found for pair in pairs.pick(judged, pictures, task.output, each)]
    base = [{"id": BASE, "name": task.source.name, "what": "base"}] if gallery else []
    return {
        "schema_version": SCHEMA_VERSION,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
        "version": __version__,
        "tier": "" if _counted(config) else task.tier,
        "base": dict(gallery.base) if gallery else {},
        "sampler": _sampler_record(task, gallery),
        "seeds": {"evaluate": list(EVALUATE_SEEDS), "seeds": list(config.seed)},
        "prompt_set": config.prompt_set,
        "concepts": [_concept_record(concept) for concept in task.concepts.values()],
        "subjects": base + [subject.describe() for subject in task.subjects],
        "cards": cards,
        "rows": [as_json(row) for judged, _ in found for row in judged.rows],
        "differences": [as_json(one) for judged, _ in found for one in judged.differences],
        "pairs": [as_json(pair) for pair in shown],
        "skipped": [
            {"subject": subject, "path": str(path), "why": why}
            for judged, _ in found
            for path, (subject, why) in judged.skipped.items()
        ],
    }


def _counted(config: EvaluateConfig) -> bool:
    """Whether counts or groups were given in place of the tier's."""
    return config.num_images is not None or config.num_keep_images is not None or bool(config.groups)


def _sampler_record(task: Task, gallery: Gallery | None) -> dict[str, Any]:
    if gallery is None:
        return {}
    sampler = gallery.sampler
    return {
        "name": "DDIM",
        "steps": sampler.steps,
        "guidance_scale": sampler.guidance_scale,
        "resolution": sampler.resolution,
        "zero_terminal_snr": task.zero_terminal_snr,
        "mixed_precision": task.config.mixed_precision,
    }


def _concept_record(concept: Concept) -> dict[str, Any]:
    return {
        "slug": concept.slug,
        "name": concept.name,
        "kind": concept.kind,
        "caption": concept.caption,
        "generic": concept.generic,
        "sha256": concept_sha256(concept),
        "prompts": {group: [p.text for p in prompts_of(concept, group)] for group in GROUPS},
    }
