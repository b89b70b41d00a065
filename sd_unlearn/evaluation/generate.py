"""Generate the images of an evaluation that do not exist yet.

The name of an image folder contains everything that determines its images: the base's weights, prediction type and
noise schedule, the sampler, what the LoRA changes in the base and its strength, or the safety guidance.
So all LoRAs share the base's images, a second evaluation generates only what is missing, and an interrupted evaluation
resumes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from sd_unlearn.errors import OutOfMemory, UnlearnError
from sd_unlearn.evaluation.job import EvaluationJob
from sd_unlearn.evaluation.loras import ModelVariant
from sd_unlearn.evaluation.prompts import ImageSpec
from sd_unlearn.io.lock import locked, remove_leftovers
from sd_unlearn.io.paths import slugify
from sd_unlearn.launch import process_rank
from sd_unlearn.models.base import HASHES, Base, load_base
from sd_unlearn.models.checkpoint_header import PICKLES
from sd_unlearn.models.recorded_base import check_recorded
from sd_unlearn.models.sampling import ImageRequest, Sampler, generate_missing, resolve_sampler, wait_for_images
from sd_unlearn.models.source import BUNDLED, DIGITS, DIGITS_SD3, Source
from sd_unlearn.models.zero_terminal_snr import use_zero_terminal_snr

TIMEOUT = 3600  # seconds to wait for an image of another process


@dataclass(frozen=True)
class ImageCache:
    """The images of one base and sampler under --cache_dir."""

    root: Path
    base: Mapping[str, Any]  # the base's record, as in training.json
    sampler: Sampler
    suffix: str = ""  # other settings that change the images: noise schedule, precision
    share: int | None = None  # see generate_missing

    @property
    def base_folder(self) -> Path:
        hashes = "".join(str(self.base.get(key, "")) for key in HASHES)
        base = f"{slugify(Path(self.base['name']).name)}-{hashlib.sha256(hashes.encode()).hexdigest()[:12]}"
        base += _prediction_in_name(self.base) + _schedule_in_name(self.base)
        size = f"-{self.sampler.resolution}px" if self.sampler.resolution else ""
        sampler = f"{self.sampler.steps}-steps-guidance-{self.sampler.guidance_scale:g}{size}{self.suffix}"
        return self.root / base / sampler

    def folder(self, variant: ModelVariant) -> Path:
        return self.base_folder / variant.folder

    def paths(self, variant: ModelVariant, specs: Sequence[ImageSpec]) -> list[Path]:
        return [self.folder(variant) / spec.file_name for spec in specs]

    def generate(
        self, get_base: Callable[[], Base], variant: ModelVariant, specs: Iterable[ImageSpec], title: str
    ) -> int:
        """Generate a variant's missing images and return their number.

        Several processes share the work; each returns when all images exist.
        """
        unique = {spec.file_name: spec for spec in specs}
        ordered = sorted(unique.values(), key=lambda spec: spec.prompt.text)
        requests = [ImageRequest(self.folder(variant) / s.file_name, s.prompt.text, s.seed) for s in ordered]
        with ExitStack() as stack:

            def get_variant() -> Base:
                base = get_base()
                stack.enter_context(variant.applied_to(base))
                return base

            if not all(request.path.is_file() for request in requests):
                stack.enter_context(_exclusive(self.folder(variant)))
            count = generate_missing(get_variant, requests, self.sampler, title, self.share)
        wait_for_images(requests, timeout=TIMEOUT)
        return count


def _prediction_in_name(base: Mapping[str, Any]) -> str:
    """The prediction type of a single file, in the name of its images' folder unless it is the usual one.

    The same weights give other images with another --prediction_type. All other bases come with their configuration,
    which the option may not contradict.
    """
    is_file = Path(base["name"]).suffix.lower() in (".safetensors", *PICKLES)
    predicted = base.get("prediction_type", "epsilon")
    return f"-{predicted}" if is_file and predicted == "v_prediction" else ""


def _schedule_in_name(base: Mapping[str, Any]) -> str:
    """The schedule of a folder's scheduler_config.json, unless it is that of the bundled bases of digits."""
    schedule = base.get("schedule", "")
    return f"-schedule-{schedule}" if schedule and schedule not in _usual_schedules() else ""


@lru_cache
def _usual_schedules() -> set[str]:
    """Of copies of the bundled bases, e.g. without a concept: one for diffusion, one for flow matching."""
    return {Source(name).schedule for name in (DIGITS, DIGITS_SD3)}


@contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Wait for another evaluation that generates the same images, and remove what a killed one left."""
    with locked(folder, "--cache_dir", wait=-1):
        if process_rank() == 0:
            remove_leftovers(folder)
        yield


def generate_images(job: EvaluationJob) -> ImageCache | None:
    """Generate the missing images: the base's once, then those of each LoRA at each strength.

    Returns:
        Where the images are; None if the job needs no base, because all its images are given.

    Raises:
        UsageError: the base is not the one the LoRAs were trained on.
        UnlearnError: the base cannot be loaded, or a LoRA does not fit it.
    """
    if not job.needs_base:
        return None
    loader = BaseLoader(job)
    cache = planned_cache(job, loader)
    all_specs = [spec for specs in job.plans.values() for spec in specs]
    cache.generate(loader.load, ModelVariant(), all_specs, "generate base")
    for subject in list(job.subjects):
        if subject.variant is None:
            continue
        specs = [spec for slug in subject.concepts for spec in job.plans[slug]]
        try:
            cache.generate(loader.load, subject.variant, specs, f"generate {subject.id}")
        except OutOfMemory:  # it is not the LoRA's fault
            raise
        except UnlearnError as error:
            if subject.variant.lora is None:
                raise
            job.give_up(subject.variant.lora, error)
    return cache


def planned_cache(job: EvaluationJob, loader: BaseLoader) -> ImageCache:
    """`image_cache` with as many images at once as memory allows."""
    from sd_unlearn.data.plan import planned_sampler
    from sd_unlearn.models.meta import BaseNotFound

    cache = image_cache(job, loader)
    try:
        return replace(cache, sampler=planned_sampler(job.source, cache.sampler, job.config))
    except BaseNotFound:  # all images may exist already
        return cache


def image_cache(job: EvaluationJob, loader: BaseLoader) -> ImageCache:
    """Where the images of a job are; loads the base unless a run records it."""
    config = job.config
    recorded = [lora.training["base"] for lora in job.loras if lora.is_run] if not job.base_named else []
    record = recorded[0] if recorded else loader.load().describe()
    if job.source.name not in BUNDLED and (schedule := job.source.schedule):
        record = {**record, "schedule": schedule}  # of today: it may have been corrected since the training
    suffix = "-zero-snr" if job.zero_terminal_snr else ""
    suffix += f"-{job.precision}" if job.precision != "no" else ""
    sampler = resolve_sampler(config, job.source)
    return ImageCache(config.cache_dir, record, sampler, suffix, share=sampler.batch_size)


class BaseLoader:
    """Loads the job's base when it is first needed: not at all if every image exists."""

    def __init__(self, job: EvaluationJob) -> None:
        self.job = job
        self.base: Base | None = None

    def load(self) -> Base:
        """The base; unless it is named in the command, checked to be the one the runs were trained on."""
        if self.base is None:
            job = self.job
            base = load_base(job.source, job.precision)
            for lora in job.loras if not job.base_named else []:
                if lora.is_run:
                    check_recorded(base, lora.training["base"])
            for lora in job.loras:
                try:
                    lora.check_fits(base)
                except UnlearnError as error:
                    job.give_up(lora, error)
            if job.zero_terminal_snr:
                use_zero_terminal_snr(base)
            self.base = base
        return self.base
