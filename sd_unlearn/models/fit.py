"""Which batches fit into the memory of a device: the phases of a command, what each takes, and the choice.

A phase is predicted from the counted footprint (footprint.py). What no configuration tells is added: the workspace of
the device's kernels and, on a CPU, the freed blocks that the C library keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from sd_unlearn.config.batching import Batching
from sd_unlearn.models.footprint import InferenceFootprint, TrainingFootprint
from sd_unlearn.models.memory_errors import free_memory

MIB, GIB = 2**20, 2**30
MARGIN = 0.1  # share of the free memory that is left free: for fragmentation, and because a prediction may be 15 % off
CONTEXT = GIB // 2  # of a GPU's memory, taken by CUDA itself and by the desktop
# Bytes that kernels take beside tensors. On a CPU measured (scripts/bench_memory.py); on a GPU not measured yet.
WORKSPACE = {"cuda": 256 * MIB, "cpu": 48 * MIB}
# On a CPU, glibc keeps freed blocks: about this many times the temporary tensors of a pass (measured on SD 1.5).
KEPT_BLOCKS = {"cuda": 0, "cpu": 6}
ENCODED = {True: 64, False: 4}  # images encoded at once at most: of up to 64 pixels, and larger ones
TILE_SHARE = 4  # tiles of half the side take a quarter of the VAE's memory


@dataclass(frozen=True)
class Device:
    """The memory that networks run in; in bytes."""

    kind: Literal["cuda", "cpu"]
    name: str
    free: int

    @property
    def usable(self) -> int:
        return int((1 - MARGIN) * self.free)


@dataclass(frozen=True)
class Phase:
    """What a part of a command keeps in memory at its peak, in bytes by part."""

    name: str
    at_once: int  # images (of teacher: rows)
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def free_in_container(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes left under the memory limit of this container (cgroup v2, else v1); None without a limit.

    psutil reports the memory of the whole machine. Cached files count as used, but can be dropped.
    """
    for folder, limit, used, cache in (
        (root, "memory.max", "memory.current", "inactive_file"),
        (root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            total, taken = (int((folder / name).read_text()) for name in (limit, used))
            dropped = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())[cache]
            return max(0, total - taken + int(dropped))
        except (OSError, ValueError, KeyError):  # another version, or "max", i.e. no limit
            continue
    return None


def this_device(processes: int = 1) -> Device:
    """The GPU of this process with its free memory, else the CPU with a share of the free memory.

    Of several processes on GPUs, each assumes that its whole GPU is free, so that equal GPUs get the same batches.
    """
    import psutil
    import torch

    if torch.cuda.is_available():
        if torch.cuda.is_initialized():  # what an earlier stage of this program has left counts as taken
            free_memory()
        free, total = torch.cuda.mem_get_info()
        return Device("cuda", torch.cuda.get_device_name(), free if processes == 1 else max(0, total - CONTEXT))
    free, limit = psutil.virtual_memory().available, free_in_container()
    return Device("cpu", "the CPU", (free if limit is None else min(free, limit)) // processes)


def other_device(vram: int) -> Device:
    """A GPU with this much memory, in bytes (--vram)."""
    return Device("cuda", f"a GPU with {vram / GIB:g} GB", max(0, vram - CONTEXT))


def balanced(images: int) -> list[int]:
    """The sizes of micro-batches that cut `images` evenly, largest first: of 40 images 40, 20, 14, 10, 8, 7, ..., 1."""
    return sorted({-(-images // parts) for parts in range(1, images + 1)}, reverse=True)


def divisors(images: int) -> list[int]:
    """The sizes that divide `images`, largest first: batches of a smaller size are then parts of the larger ones."""
    return [size for size in range(images, 0, -1) if images % size == 0]


@dataclass(frozen=True)
class Inference:
    """The phases that run the frozen base on a device."""

    footprint: InferenceFootprint
    device: Device

    def render(self, at_once: int, tiles: bool = False, training: int = 0) -> Phase:
        """Generate images. tiles: the VAE decodes a single image in tiles. training: bytes of what is trained; then
        previews are generated, from cached captions."""
        f = self.footprint
        sample = at_once * f.sample * (1 + KEPT_BLOCKS[self.device.kind])
        decode = self._in_vae(at_once) * f.decode // (TILE_SHARE if tiles else 1)
        parts = {f.title: f.network, "VAE": f.vae + f.upcast} | ({} if training else {"text encoder": f.text_encoders})
        parts |= {"trained weights, optimizer": training} if training else {}
        work = {"generated images": max(sample, decode), "workspace": self.workspace}
        return Phase("preview" if training else "render", at_once, parts | work)

    def encode(self, at_once: int, captions: int, tiles: bool = False) -> Phase:
        """Encode images and captions. captions: encoded at once. tiles: as in render."""
        f = self.footprint
        images = self._in_vae(at_once) * f.encode // (TILE_SHARE if tiles else 1)
        weights = {f.title: f.network, "VAE": f.vae + f.upcast, "text encoder": f.text_encoders}
        work = {"encoded images": max(images, captions * f.caption), "workspace": self.workspace}
        return Phase("encode", at_once, weights | work)

    def _in_vae(self, at_once: int) -> int:
        """How many images of a batch the VAE works on at once."""
        return 1 if self.footprint.slices else at_once

    @property
    def workspace(self) -> int:
        """Of the kernels: a copy of the largest weight, which convolutions rearrange, and what WORKSPACE says."""
        return self.footprint.largest_weight + WORKSPACE[self.device.kind]

    def render_batch_size(self, default: int, training: int = 0) -> tuple[int, bool]:
        """(images generated at once: at most the default, whether the VAE needs tiles)."""
        size = self.largest(divisors(default), lambda n: self.render(n, training=training))
        return (size, False) if size else (1, True)

    def needs_tiles(self, images: int, training: int = 0) -> bool:
        """Whether the VAE decodes the only image of a batch in tiles, because it does not fit otherwise."""
        return images == 1 and self.render(1, training=training).total > self.device.usable

    def encode_batch_size(self, default: int, captions: int) -> int:
        return self.largest(divisors(default), lambda n: self.encode(n, captions)) or 1

    def largest(self, sizes: Sequence[int], phase: Callable[[int], Phase]) -> int:
        """The first of the sizes whose phase fits; 0 if none does."""
        return next((size for size in sizes if phase(size).total <= self.device.usable), 0)


@dataclass(frozen=True)
class Training(Inference):
    """The phases of a training."""

    trained: TrainingFootprint
    repeated: int = 0  # images of the steps that --teacher_reuse repeats

    def teacher(self, rows: int) -> Phase:
        """Predictions of the frozen base, before a micro-batch's own."""
        forward = self.trained.forward * (1 + KEPT_BLOCKS[self.device.kind])
        return Phase("teacher", rows, self._weights() | {"teacher's predictions": rows * forward} | self._rest())

    def step(self, images: int, checkpointing: bool) -> Phase:
        """Forward and backward pass of a micro-batch."""
        t = self.trained
        each = (t.checkpointed if checkpointing else t.activations) + KEPT_BLOCKS[self.device.kind] * t.forward
        return Phase("step", images, self._weights() | {"activations": images * each} | self._rest())

    def step_sizes(self, sizes: Sequence[int], checkpointing: bool | None) -> Iterator[tuple[int, bool]]:
        """(micro-batch, checkpointing) that fit, best first: without checkpointing if a single image fits so."""
        for on in (False, True) if checkpointing is None else (checkpointing,):
            if size := self.largest(sizes, lambda n, on=on: self.step(n, on)):  # type: ignore[misc]
                yield size, on

    def teacher_batch_size(self, micro_batch_size: int) -> int:
        """Rows at once: a micro-batch has up to twice its images."""
        return self.largest(balanced(2 * micro_batch_size), self.teacher) or 1

    def choose(
        self, images: int, render: int, captions: int, size: int | None = None, checkpointing: bool | None = None
    ) -> Batching:
        """The batches of a training that fit; the smallest ones if nothing fits.

        images: of a training step in this process. render: images generated at once at most. captions: encoded at
        once. size: of a micro-batch, and checkpointing; None to choose them.
        """
        sizes = [size] if size else balanced(images)
        size, on = next(self.step_sizes(sizes, checkpointing), (sizes[-1], checkpointing is not False))
        return Batching(
            micro_batch_size=size,
            gradient_checkpointing=on,
            teacher_batch_size=self.teacher_batch_size(size),
            encode_batch_size=self.encode_batch_size(ENCODED[self.footprint.resolution <= 64], captions),
            render_batch_size=self.render_batch_size(render)[0],
            preview_batch_size=self._previews().render_batch_size(render, self._kept())[0],
        )

    def phases(self, batching: Batching, captions: int, rendering: bool, teacher: bool, previews: bool) -> list[Phase]:
        """The phases of a training with these batches, in their order, without those that it does not have."""
        render, encode, preview = batching.render_batch_size, batching.encode_batch_size, batching.preview_batch_size
        student, trained = self._previews(), self._kept()
        found = [
            (rendering, self.render(render, self.needs_tiles(render))),
            (True, self.encode(encode, captions, encode == 1 and self.encode(1, captions).total > self.device.usable)),
            (teacher, self.teacher(batching.teacher_batch_size)),
            (True, self.step(batching.micro_batch_size, batching.gradient_checkpointing)),
            (previews, student.render(preview, student.needs_tiles(preview, trained), trained)),
        ]
        return [phase for exists, phase in found if exists]

    def _previews(self) -> Inference:
        """The network that generates previews: the one that is trained, perhaps quantized."""
        return Inference(replace(self.footprint, network=self.trained.network), self.device)

    def _kept(self) -> int:
        """Bytes that a training keeps while previews are generated."""
        return self.trained.constant - self.trained.gradients + self.repeated * self.trained.predictions

    def _weights(self) -> dict[str, int]:
        stored = self.repeated * self.trained.predictions
        weights = {self.footprint.title: self.trained.network, "trained weights, optimizer": self.trained.constant}
        return weights | ({"stored predictions": stored} if stored else {})

    def _rest(self) -> dict[str, int]:
        """On a CPU the VAE stays in the same memory."""
        vae = {"VAE": self.footprint.vae} if self.device.kind == "cpu" else {}
        return vae | {"workspace": self.workspace}
