"""Where the pictures of an evaluation lie, and how missing ones get there.

A folder is named by all that determines its pictures: base, sampler, and the LoRA's hash and strength. So the base's
are drawn once for all LoRAs, a second evaluation draws what is missing, and an interrupted one goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd_unlearn.evaluation.loras import Lora
from sd_unlearn.evaluation.prompts import Shot
from sd_unlearn.io.files import slugify
from sd_unlearn.models.base import Base
from sd_unlearn.models.sampling import ImageRequest, Sampler, generate_missing, wait_for_images


@dataclass(frozen=True)
class Drawn:
    """A LoRA at a strength. lora None: the base itself, and so is every LoRA at strength 0."""

    lora: Lora | None = None
    strength: float = 1.0

    @property
    def folder(self) -> str:
        if self.lora is None or self.strength == 0:
            return "base"
        return f"lora-{self.lora.sha256[:12]}" + (f"-at-{self.strength:g}" if self.strength != 1 else "")


@dataclass(frozen=True)
class Gallery:
    """The pictures of one base and sampler. setting: what else changes them, e.g. the schedule."""

    cache: Path
    base: Mapping[str, Any]  # its record, as training.json has it
    sampler: Sampler
    setting: str = ""

    @property
    def place(self) -> Path:
        size = f"-{self.sampler.resolution}px" if self.sampler.resolution else ""
        sampler = f"{self.sampler.steps}-steps-guidance-{self.sampler.guidance_scale:g}{size}{self.setting}"
        vae = f"-vae-{self.base['vae_sha256'][:8]}" if self.base.get("vae") else ""  # another than its own
        return self.cache / f"{slugify(Path(self.base['name']).name)}-{self.base['sha256'][:12]}{vae}" / sampler

    def folder(self, drawn: Drawn) -> Path:
        return self.place / drawn.folder

    def paths(self, drawn: Drawn, shots: Sequence[Shot]) -> list[Path]:
        return [self.folder(drawn) / shot.file_name for shot in shots]

    def draw(self, get_base: Callable[[], Base], drawn: Drawn, shots: Iterable[Shot], title: str) -> int:
        """Draw what is missing of one subject's pictures; returns how many. Several processes share the work and each
        comes back when all are there."""
        unique = {shot.file_name: shot for shot in shots}
        ordered = sorted(unique.values(), key=lambda shot: shot.prompt.text)
        requests = [ImageRequest(self.folder(drawn) / s.file_name, s.prompt.text, s.seed) for s in ordered]
        with ExitStack() as stack:

            def loaded() -> Base:
                base = get_base()
                if drawn.lora is not None and drawn.strength != 0:
                    stack.enter_context(drawn.lora.on(base, drawn.strength))
                return base

            count = generate_missing(loaded, requests, self.sampler, title)
        wait_for_images(requests, timeout=3600)
        return count
