"""The plan of a command as text: what it keeps in memory, which images it generates, what it writes.

`render --dry_run` prints one; training/plan.py and evaluation/plan.py add their own parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from sd_unlearn.choices import Precision
from sd_unlearn.config.base import RenderConfig
from sd_unlearn.config.planning import parse_vram
from sd_unlearn.data.render_job import RenderJob, image_requests
from sd_unlearn.errors import UnlearnError
from sd_unlearn.launch import process_count, process_rank
from sd_unlearn.models.device import wanted_precision
from sd_unlearn.models.fit import GIB, MIB, Device, Inference, Phase, other_device, this_device
from sd_unlearn.models.footprint import count_inference
from sd_unlearn.models.meta import BaseNotFound, read_configs
from sd_unlearn.models.sampling import Sampler
from sd_unlearn.models.source import Source

PNG_SHARE = 0.6  # bytes of a PNG file, relative to its pixels: of photographs; images of digits are smaller
SMALLER = "Try a lower --resolution, or another base."


class ImageOptions(Protocol):
    """The options of a command on which the number of images at once depends."""

    render_batch_size: int | None
    vram: str | None

    @property
    def mixed_precision(self) -> Precision | None: ...


def choose_device(vram: str | None) -> Device:
    """The device that a command plans for: a GPU of --vram, else the one that it runs on."""
    return other_device(parse_vram(vram)) if vram else this_device(process_count())


def choose_precision_for(device: Device, option: Precision | None) -> Precision:
    """The precision in which the command would run on the device: without a GPU always full."""
    return wanted_precision(option) if device.kind == "cuda" else "no"


def plan_inference(source: Source, device: Device, precision: Precision, resolution: int | None) -> Inference:
    """The phases of generating images with a base.

    Raises:
        UsageError, UnlearnError: its configuration is damaged, or not found.
    """
    return Inference(count_inference(read_configs(source), precision, resolution), device)


def fit_sampler(inference: Inference, sampler: Sampler, given: int | None) -> tuple[Phase, list[str]]:
    """The phase of generating images, and lines about it. given: --render_batch_size, which wins."""
    size, tiles = (given, False) if given else inference.render_batch_size(sampler.batch_size)
    notes = []
    if tiles:
        notes.append("One image at once is too much for the VAE: it will work in tiles, which changes pixels slightly.")
    elif size < sampler.batch_size:
        notes.append(f"{size} images at once instead of {sampler.batch_size}, which do not fit.")
    return inference.render(size, tiles), notes


def planned_sampler(source: Source, sampler: Sampler, options: ImageOptions) -> Sampler:
    """The sampler with as many images at once as fit, at most its own number; --render_batch_size wins.

    Raises:
        BaseNotFound: the base is neither local nor found on the Hub.
    """
    if options.render_batch_size:
        return sampler
    device = choose_device(options.vram)
    precision = choose_precision_for(device, options.mixed_precision)
    try:
        inference = plan_inference(source, device, precision, sampler.resolution)
    except BaseNotFound:
        raise
    except UnlearnError:  # loading the base says what is wrong with it
        return sampler
    return replace(sampler, batch_size=inference.render_batch_size(sampler.batch_size)[0])


def describe_memory(phases: Sequence[Phase], device: Device) -> list[str]:
    """A table with a column per phase and a row per part, in GB, and what is free."""
    parts = dict.fromkeys(part for phase in phases for part in phase.parts)
    rows = sorted(parts, key=lambda part: part == "workspace")  # last; else in the order of the phases
    width = max(map(len, (*rows, "predicted peak")))
    lines = ["Predicted memory in GB (2^30 bytes):", ""]
    lines.append(" " * width + "".join(f"{phase.name:>10}" for phase in phases))
    lines.append(f"{'at once':<{width}}" + "".join(f"{phase.at_once:>10}" for phase in phases))
    for part in rows:
        values = (f"{phase.parts[part] / GIB:.2f}" if part in phase.parts else "-" for phase in phases)
        lines.append(f"{part:<{width}}" + "".join(f"{value:>10}" for value in values))
    lines.append(f"{'predicted peak':<{width}}" + "".join(f"{phase.total / GIB:>10.2f}" for phase in phases))
    peak = max(phase.total for phase in phases)
    fits = "fits" if peak <= device.usable else "may not fit" if peak <= device.free else "does not fit"
    lines += [
        "",
        f"The peak of {gigabytes(peak)} {fits} on {device.name}: {gigabytes(device.usable)} usable, 90 % of the",
    ]
    lines[-1] += f" {gigabytes(device.free)} that are free."
    return lines


def describe_images(missing: int, total: int, resolution: int, sampler: Sampler) -> list[str]:
    """How many images are generated, and their disk space."""
    size = missing * resolution**2 * 3 * PNG_SHARE
    return [
        f"Images to generate: {missing:,} of {total:,}, {resolution} pixels, {sampler.steps} sampling steps.",
        f"Disk space for them: about {megabytes(size)}.",
    ]


def count_missing(paths: Sequence[Path]) -> int:
    return sum(not path.is_file() for path in paths)


def check_fits(phases: Sequence[Phase], device: Device, hint: str) -> None:
    """Refuse what cannot fit at all.

    Raises:
        UnlearnError: says what is missing and what is left to try.
    """
    worst = max(phases, key=lambda phase: phase.total)
    if worst.total > device.free:
        raise UnlearnError(
            f"Not enough memory: the phase {worst.name} would take {gigabytes(worst.total)} with {worst.at_once} at "
            f"once, and {device.name} has {gigabytes(device.free)} free. {hint}"
        )


def show_plan(job: RenderJob, config: RenderConfig) -> None:
    """Print the plan of the `render` command.

    Raises:
        UnlearnError: not even one image fits.
    """
    device = choose_device(config.vram)
    precision = choose_precision_for(device, config.mixed_precision)
    inference = plan_inference(job.source, device, precision, job.sampler.resolution)
    phase, notes = fit_sampler(inference, job.sampler, config.render_batch_size)
    paths = [request.path for request in image_requests(job)]
    resolution = job.sampler.resolution or inference.footprint.resolution
    lines = [f"Plan: render {job.concept.name!r} with {job.source.name} into {job.folder}, precision {precision}.", ""]
    lines += [
        *describe_memory([phase], device),
        *notes,
        "",
        *describe_images(count_missing(paths), len(paths), resolution, job.sampler),
    ]
    lines.append("Time: unknown, no earlier rendering is recorded.")
    if process_rank() == 0:
        print("\n".join(lines))
    check_fits([phase], device, SMALLER)


def gigabytes(size: float) -> str:
    return f"{size / GIB:.1f} GB"


def megabytes(size: float) -> str:
    return gigabytes(size) if size >= GIB else f"{size / MIB:.0f} MB"
