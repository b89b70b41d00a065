"""The plan of a training: how it fits into the memory of the device, what it generates and writes, how long it takes.

Made before anything loads, from the base's configuration. `train --dry_run` prints it and stops; a real training
prints one line of it and uses the batches that it chose.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from sd_unlearn.choices import Precision
from sd_unlearn.config.batching import Batching, effective_batch_size, share_of, with_options
from sd_unlearn.config.train import TrainConfig, resolve_steps, resolve_teacher_reuse
from sd_unlearn.data.plan import (
    check_fits,
    choose_device,
    choose_precision_for,
    count_missing,
    describe_images,
    describe_memory,
    gigabytes,
    megabytes,
)
from sd_unlearn.data.render_job import image_requests, make_job, plan_images
from sd_unlearn.data.repeated import REPEATED_STEPS
from sd_unlearn.errors import UnlearnError, UsageError
from sd_unlearn.io.reading import read_json, read_yaml
from sd_unlearn.io.run_folder import CONFIG, TRAINING
from sd_unlearn.launch import print_once, process_count, process_rank
from sd_unlearn.models.fit import Device, Phase, Training, balanced
from sd_unlearn.models.footprint import StepOptions, count_inference, count_training
from sd_unlearn.models.kinds import KINDS
from sd_unlearn.models.meta import BaseNotFound, read_configs
from sd_unlearn.models.sampling import resolve_sampler
from sd_unlearn.models.source import Source
from sd_unlearn.training.memory import remedies
from sd_unlearn.training.preflight import Inputs

CAPTIONS_AT_ONCE = 256  # at most


@dataclass(frozen=True)
class MemoryPlan:
    """The batches of a training and what its phases keep in memory with them."""

    kind: str  # of the base, a key of KINDS
    device: Device
    precision: Precision
    training: Training
    batching: Batching
    phases: tuple[Phase, ...]
    images_per_step: int  # of each process
    notes: tuple[str, ...]

    @property
    def peak(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)

    def line(self) -> str:
        """The plan in one line, printed before a training."""
        b, peak = self.batching, self.peak
        parts = math.ceil(self.images_per_step / b.micro_batch_size)
        cut = f"{self.images_per_step} images a step" + (f" in {parts} micro-batches" if parts > 1 else "")
        checkpointing = " with gradient checkpointing" if b.gradient_checkpointing else ""
        return (
            f"Plan: {cut} of at most {b.micro_batch_size}{checkpointing}; predicted peak {gigabytes(peak.total)} "
            f"({peak.name}) of {gigabytes(self.device.free)} free on {self.device.name}."
        )


def plan_memory(config: TrainConfig, source: Source, captions: int, rendering: bool = True) -> MemoryPlan:
    """Choose the batches of a training for the memory of its device; options that are given win.

    captions: number of different captions. rendering: whether images may have to be generated.

    Raises:
        UsageError: options that contradict each other, or a damaged configuration of the base.
        UnlearnError: the configuration of a Hub id is not found.
    """
    device, processes = choose_device(config.vram), process_count()
    precision = choose_precision_for(device, config.mixed_precision)
    configs = read_configs(source)
    frozen: Precision = "no" if config.method == "full" else precision  # a UNet that is trained is in full precision
    share = share_of(effective_batch_size(config, processes), processes)
    training = Training(
        count_inference(configs, frozen, config.resolution),
        device,
        count_training(configs, StepOptions.of(config), precision, config.resolution),
        repeated=REPEATED_STEPS * share,
    )
    sampler = resolve_sampler(config, source)
    captions = min(captions, training.footprint.captions_at_once)
    times = config.gradient_accumulation_steps
    size = config.train_batch_size or (share_of(share, times) if times else None)
    batching = training.choose(share, sampler.batch_size, captions, size, config.gradient_checkpointing)
    batching = with_options(batching, config, processes)
    previews = bool(config.validation_steps or (config.probe_steps and config.probe == "leakage"))
    phases = training.phases(batching, captions, rendering, config.target == "teacher", previews)
    notes = _notes(training, config, batching, share)
    return MemoryPlan(configs.kind, device, precision, training, batching, tuple(phases), share, tuple(notes))


def _notes(training: Training, config: TrainConfig, batching: Batching, share: int) -> list[str]:
    """Why the batches of a step are not larger."""
    size, on, notes = batching.micro_batch_size, batching.gradient_checkpointing, []
    if size < share and not (config.train_batch_size or config.gradient_accumulation_steps):
        larger = training.step(min(n for n in balanced(share) if n > size), on)
        notes.append(f"Micro-batches of {size}: {larger.at_once} would take {gigabytes(larger.total)}.")
    if on and config.gradient_checkpointing is None:
        one = training.step(1, False)
        notes.append(f"Gradient checkpointing: without it one image would take {gigabytes(one.total)}.")
    return notes


def captions_of(config: TrainConfig, inputs: Inputs) -> int:
    """About how many different captions a training has."""
    if inputs.own_images:
        return CAPTIONS_AT_ONCE  # each image may have its own
    return len({group.prompt for group in plan_images(inputs.concept, config)}) + 1  # and the empty caption


def check_plan(config: TrainConfig, plan: MemoryPlan) -> None:
    """Refuse a training that cannot fit.

    Raises:
        UnlearnError: says what is left to try.
    """
    resolution, on_gpu = plan.training.footprint.resolution, plan.device.kind == "cuda"
    found = _smaller_batches(config, plan) + remedies(config, plan.kind, resolution, plan.precision, on_gpu)
    check_fits(plan.phases, plan.device, f"Try {', '.join(found)}.")


def _smaller_batches(config: TrainConfig, plan: MemoryPlan) -> list[str]:
    """Options on batches and previews that would need less memory than those of a planned training."""
    found = {
        "a smaller --train_batch_size": (config.train_batch_size or 1) > 1,
        "a smaller --render_batch_size": (config.render_batch_size or 1) > 1,
        "--gradient_checkpointing": config.gradient_checkpointing is False,
        "--validation_steps 0 (no previews)": plan.peak.name == "preview" and config.validation_steps > 0,
    }
    return [words for words, applies in found.items() if applies]


def plan_run(config: TrainConfig, inputs: Inputs) -> MemoryPlan | None:
    """The plan of a training that is about to start, printed in one line.

    None if the base's configuration cannot be read: loading the base then says why.

    Raises:
        UsageError: options that contradict each other.
        UnlearnError: the training cannot fit, and no option says how large its batches are; the base is not found.
    """
    try:
        read_configs(inputs.source)
    except BaseNotFound:
        raise
    except UnlearnError:
        return None
    plan = plan_memory(config, inputs.source, captions_of(config, inputs), not inputs.own_images)
    print_once(plan.line())
    given = (config.train_batch_size, config.gradient_accumulation_steps, config.render_batch_size)
    if not any(given) and config.gradient_checkpointing is None:
        check_plan(config, plan)
    return plan


def describe_plan(config: TrainConfig, inputs: Inputs, output: Path, plan: MemoryPlan) -> str:
    """The whole plan of a training, for --dry_run."""
    resolution, job = plan.training.footprint.resolution, make_job(inputs.concept, config, inputs.source)
    title = f"Plan: erase {inputs.concept.name!r} from {inputs.source.name}, precision {plan.precision}, into {output}."
    lines = [title, "", *describe_memory(plan.phases, plan.device), *plan.notes, plan.line(), ""]
    if inputs.own_images:
        lines.append(f"Images to generate: 0. {inputs.data_dir} holds your own.")
    else:
        paths = [request.path for request in image_requests(job)]
        lines += describe_images(count_missing(paths), len(paths), resolution, job.sampler)
    return "\n".join([*lines, _disk(config, inputs, plan), _time(config, inputs, plan, output)])


def show_plan(config: TrainConfig, inputs: Inputs, output: Path) -> None:
    """Print the whole plan of a training.

    Raises:
        UnlearnError: not even one image fits; says what is left to try.
    """
    plan = plan_memory(config, inputs.source, captions_of(config, inputs), not inputs.own_images)
    if process_rank() == 0:
        print(describe_plan(config, inputs, output, plan))
    check_plan(config, plan)


def _disk(config: TrainConfig, inputs: Inputs, plan: MemoryPlan) -> str:
    """Disk space of a run: final weights and checkpoints, which hold weights, optimizer, moving average and offsets."""
    t = plan.training.trained
    kept = config.checkpoints_total_limit if config.checkpointing_steps else 0
    checkpoints = kept * (t.gradients + t.optimizer + t.average + _offsets(config, inputs, plan))
    return (
        f"Disk space of the run: about {megabytes(t.gradients + checkpoints)}, of which checkpoints take "
        f"{megabytes(checkpoints)}."
    )


def _offsets(config: TrainConfig, inputs: Inputs, plan: MemoryPlan) -> int:
    """Bytes of the offsets in a checkpoint (`Teacher.offset`): of all repeated rows, if there is guidance."""
    scale = resolve_sampler(config, inputs.source).guidance_scale
    if KINDS[plan.kind].guidance_of(scale) == 1 or resolve_teacher_reuse(config, len(inputs.concept.parts)) == 1:
        return 0
    offset = plan.training.trained.predictions // 3  # what is stored of a row: two predictions of the base, the offset
    return plan.training.repeated * offset * process_count()


def _time(config: TrainConfig, inputs: Inputs, plan: MemoryPlan, output: Path) -> str:
    """How long the training takes, by the speed of an earlier one of the same base on the same device."""
    speed = None if config.vram else known_speed(output.parent, inputs.source, config, plan)
    if not speed:
        return "Time: unknown, no earlier training of this base on this device is recorded."
    is_flow = inputs.source.kind is not None and KINDS[inputs.source.kind].is_flow
    images = resolve_steps(config, len(inputs.concept.parts), is_flow) * plan.images_per_step * process_count()
    return (
        f"Time of the training, without rendering: about {images / speed / 60:,.0f} minutes, at the {speed:.1f} images "
        "a second of an earlier one."
    )


def known_speed(runs: Path, source: Source, config: TrainConfig, plan: MemoryPlan) -> float | None:
    """Images a second, of all processes together, of the latest finished run in a folder with the same base, device,
    number of processes and options that matter.
    """
    speeds = []
    for record in sorted(runs.glob(f"*/{TRAINING}")):
        try:
            training, options = read_json(record), read_yaml(record.parent / CONFIG, "")
            cost = training["cost"]
            ran = (training["base"]["name"], cost["device"], cost["mixed_precision"])
            same = ran == (source.name, "cpu" if plan.device.kind == "cpu" else plan.device.name, plan.precision)
            same &= all(options.get(name) == getattr(config, name) for name in ("resolution", "quantize_base"))
            same &= cost.get("processes", 1) == process_count()
            if same and cost["seconds"] > 0:
                speeds.append((training["created"], cost["images_seen"] / cost["seconds"]))
        except (UsageError, KeyError, TypeError):  # another program's file, or an old record
            continue
    return max(speeds)[1] if speeds else None
