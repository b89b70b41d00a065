"""Images of a prompt and seed with and without LoRAs, and what the concept's classifier says. Needs no Gradio."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import Any

from PIL import Image, ImageDraw

from sd_unlearn.config.evaluate import EvaluateConfig
from sd_unlearn.data.concept import Concept
from sd_unlearn.errors import UnlearnError, UsageError
from sd_unlearn.evaluation.loras import Lora, open_lora
from sd_unlearn.evaluation.prompts import ImageSpec, to_prompted_images
from sd_unlearn.metrics.base import Metric
from sd_unlearn.metrics.registry import OPTIONAL, MetricContext, choose_metrics, make_metrics
from sd_unlearn.models.base import Base, load_base
from sd_unlearn.models.recorded_base import recorded_source
from sd_unlearn.models.sampling import Sampler, default_sampler, generate_images
from sd_unlearn.models.source import BUNDLED, DIGITS, Source
from sd_unlearn.models.zero_terminal_snr import use_zero_terminal_snr
from sd_unlearn.ui.runs import inside

AS_TRAINED = "as the LoRA was trained"
KEPT_IMAGES = 200  # images in memory, so that a slider can go back
SMALLEST_SIDE = 256  # pixels; smaller images are shown enlarged
GRID = tuple(0.25 * n for n in range(7))  # strengths of the grid: 0 to 1.5
GRID_SEEDS = 3


@dataclass(frozen=True)
class Request:
    """What the page asks for. Steps and guidance: None takes the base's default."""

    loras: tuple[str, ...]  # paths relative to the working folder
    prompt: str
    seed: int
    strength: float  # of every LoRA; 0 is the base itself
    base: str = AS_TRAINED
    steps: int | None = None
    guidance: float | None = None


@dataclass(frozen=True)
class Picture:
    """A generated image and what the classifiers of the LoRAs' concepts say about it."""

    image: Image.Image
    reading: str


class Generator:
    """Generates on one base at a time, which stays loaded. One call at a time."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.lock = RLock()
        self.base: Base | None = None
        self.base_key: Any = None
        self.opened: dict[tuple[str, float], Lora] = {}
        self.metrics: dict[str, list[Metric] | str] = {}  # concept -> its metrics, or why none is available
        self.images: OrderedDict[Any, Image.Image] = OrderedDict()

    def picture(self, request: Request) -> Picture:
        """Generate an image, and read it.

        Raises:
            UsageError: no prompt, an unknown base, or a LoRA that is not in the working folder or not a LoRA.
            UnlearnError: the base cannot be loaded, or the LoRA does not fit it.
        """
        with self.lock:
            loras = self._open(request)
            image = self._image(request, loras)
            return Picture(image, self._read(image, request.prompt, loras))

    def grid(self, request: Request) -> Image.Image:
        """A row for each of GRID_SEEDS seeds from the request's on, a column for each strength of GRID.

        Raises:
            UsageError, UnlearnError: as `picture`.
        """
        from dataclasses import replace

        with self.lock:
            loras = self._open(request)
            rows = [
                [self._image(replace(request, seed=request.seed + row, strength=s), loras) for s in GRID]
                for row in range(GRID_SEEDS)
            ]
        return _labelled(rows, [f"{strength:g}" for strength in GRID], request.prompt)

    def _open(self, request: Request) -> list[Lora]:
        if not request.prompt.strip():
            raise UsageError("The prompt is empty. Write what to generate.")
        loras = []
        for name in request.loras:
            path = inside(self.root, name)
            key = (str(path), path.stat().st_mtime)
            if key not in self.opened:
                self.opened[key] = open_lora(str(path))
            loras.append(self.opened[key])
        return loras

    def _image(self, request: Request, loras: Sequence[Lora]) -> Image.Image:
        base = self._base(request.base, loras)
        default = default_sampler(base.source)
        guidance = default.guidance_scale if request.guidance is None else request.guidance
        sampler = Sampler(request.steps or default.steps, guidance, 1)
        active = tuple(loras) if request.strength else ()
        of_loras = tuple(lora.change_sha256 for lora in active), request.strength if active else 0
        key = (self.base_key, of_loras, request.prompt, request.seed, sampler)
        if key not in self.images:
            with ExitStack() as stack:
                for lora in active:
                    lora.check_fits(base)
                    stack.enter_context(lora.applied_to(base, request.strength))
                (self.images[key],) = generate_images(base, [request.prompt], [request.seed], sampler)
            while len(self.images) > KEPT_IMAGES:
                self.images.popitem(last=False)
        return self.images[key]

    def _base(self, name: str, loras: Sequence[Lora]) -> Base:
        """The base that is chosen or recorded, loaded if it is another one than before."""
        source = self._source(name, loras)
        zero_snr = any(lora.zero_terminal_snr for lora in loras)
        if self.base is None or self.base_key != (source, zero_snr):
            self.base = None  # frees the memory of the former one first
            base = load_base(source)
            if zero_snr:
                use_zero_terminal_snr(base)
            self.base, self.base_key = base, (source, zero_snr)
        return self.base

    def _source(self, name: str, loras: Sequence[Lora]) -> Source:
        if name and name != AS_TRAINED:
            is_path = name not in BUNDLED and (name.startswith((".", "/", "~")) or (self.root / name).exists())
            return Source(str(inside(self.root, name)) if is_path else name)
        recorded = [lora.training["base"] for lora in loras if lora.is_run]
        if recorded:
            return recorded_source(recorded[0])
        known = next((lora.base_name for lora in loras if lora.base_name), None)
        if known is None:
            if loras:
                raise UsageError(f"{loras[0].path.name} does not record its base. Choose the base.")
            known = DIGITS
        return Source(known)

    def _read(self, image: Image.Image, prompt: str, loras: Sequence[Lora]) -> str:
        concepts = {concept.slug: concept for lora in loras for concept in lora.concepts}
        lines = dict.fromkeys(line for concept in concepts.values() for line in self._read_for(image, prompt, concept))
        return "\n".join(lines) or "No classifier: the chosen LoRAs do not record their concept."

    def _read_for(self, image: Image.Image, prompt: str, concept: Concept) -> list[str]:
        """What the metrics of a concept say: whether it is shown, and what else they saw."""
        if concept.slug not in self.metrics:
            self.metrics[concept.slug] = _metrics_of(concept)
        metrics, lines = self.metrics[concept.slug], []
        if isinstance(metrics, str):
            return [metrics]
        from sd_unlearn.data.concept import Prompt

        prompted = to_prompted_images(concept, [ImageSpec("direct", Prompt(prompt), 0)])
        for metric in metrics:
            output = metric.read([image])
            values = {found.metric: float(found.values[0]) for found in metric.count(prompted, output)}
            shown = values.get("leakage", values.get("nudity"))
            words = metric.words(output, 0)
            verdict = "" if shown is None else f"{'shows' if shown else 'does not show'} {concept.name}"
            lines.append(", ".join(filter(None, [verdict, f"read as {words}" if words else ""])))
        return [line for line in lines if line]


def _metrics_of(concept: Concept) -> list[Metric] | str:
    """The metrics that detect a concept, or the message that none is installed."""
    context = MetricContext(concept, EvaluateConfig(), None, "quick")
    try:
        names = [name for name in choose_metrics(context) if name not in OPTIONAL]
        return make_metrics(names, context)[0]
    except UnlearnError as error:
        return f"No classifier for {concept.name}: {error}"


def enlarged(image: Image.Image) -> Image.Image:
    """A small image with every pixel repeated, so that it can be seen."""
    times = -(-SMALLEST_SIDE // min(image.size))
    return image if times < 2 else image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)


def _labelled(rows: Sequence[Sequence[Image.Image]], titles: Sequence[str], prompt: str) -> Image.Image:
    """A table of images of one size with a title above each column, and the prompt above all."""
    times = max(1, 96 // min(rows[0][0].size))
    width, height = (side * times for side in rows[0][0].size)
    gap, head = 4, 36
    table = Image.new("RGB", (len(titles) * (width + gap) + gap, head + len(rows) * (height + gap)), "white")
    draw = ImageDraw.Draw(table)
    draw.text((gap, 4), " ".join(prompt.split())[:120].encode("ascii", "replace").decode(), "black")
    for column, title in enumerate(titles):
        left = gap + column * (width + gap)
        draw.text((left, 20), f"strength {title}" if width >= 80 else title, "black")
        for number, row in enumerate(rows):
            image = row[column].resize((width, height), Image.Resampling.NEAREST)
            table.paste(image, (left, head + number * (height + gap)))
    return table
