"""The page: three tabs of Gradio components, connected to `generate.py`, `runs.py` and `training.py`."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

from sd_unlearn.data.find_concept import concept_files
from sd_unlearn.errors import UnlearnError, UsageError, install_command
from sd_unlearn.io.images import open_image
from sd_unlearn.io.paths import concept_slug
from sd_unlearn.models.source import BUNDLED
from sd_unlearn.seeds import SEED_SPAN
from sd_unlearn.ui.generate import AS_TRAINED, Generator, Request, enlarged
from sd_unlearn.ui.runs import as_table, calibrated_strength, cut_note, find_finished, find_loras
from sd_unlearn.ui.training import Job, Training, make_plan

TITLE = "sd-unlearn"
LARGEST = 1.5  # end of the strength slider, unless the calibrated strength is higher
WIDE = 280  # pixels; on a phone such a field gets a row of its own
BUTTONS = ["download", "fullscreen"]  # of an image; none that shares it
TICK = 1.0  # seconds between two looks at a training
CSS = """
.runs table { width: 100%; border-collapse: collapse; } .runs { overflow-x: auto; }
.runs td, .runs th { text-align: left; vertical-align: top; padding: 4px 12px 4px 0; }
.reading textarea { min-height: 3em; }
progress { width: 100%; height: 8px; appearance: none; }
progress::-webkit-progress-bar { background: #8884; } progress::-webkit-progress-value { background: #f97316; }
"""


def import_gradio() -> Any:
    """The package gradio, without its telemetry.

    Raises:
        UnlearnError: it is not installed.
    """
    import os

    os.environ["GRADIO_ANALYTICS_ENABLED"] = "0"  # read on import
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        import gradio
    except ImportError as error:
        raise UnlearnError(f"sd-unlearn ui needs Gradio: {install_command('ui')}.") from error
    return gradio


def theme(gradio: Any) -> Any:
    """Gradio's default look with the fonts of the system: nothing is fetched from the internet."""
    return gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


def build(root: Path, training: Training) -> Any:
    """The page of a working folder, as gradio.Blocks.

    Raises:
        UnlearnError: Gradio is not installed.
    """
    gradio = import_gradio()
    with gradio.Blocks(title=TITLE, analytics_enabled=False) as page:
        heading = gradio.Markdown(_heading(root))
        page.load(lambda: _heading(root), None, heading, **_PRIVATE)
        with gradio.Tab("Try"):
            _try_tab(gradio, page, root)
        with gradio.Tab("Results") as results:
            table = gradio.HTML(as_table(find_finished(root)))
            results.select(lambda: as_table(find_finished(root)), None, table, **_PRIVATE)
        with gradio.Tab("Train"):
            _train_tab(gradio, page, root, training)
    return page


def _heading(root: Path) -> str:
    return "\n\n".join(filter(None, [f"# {TITLE}\nWorking folder: `{root.name}`", cut_note(root)]))


_PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "minimal"}


def _try_tab(gradio: Any, page: Any, root: Path) -> None:
    generator, found = Generator(root), find_loras(root)
    first = found[:1]
    with gradio.Row():
        loras = gradio.Dropdown(
            found, value=first, multiselect=True, label="LoRAs (runs or files)", elem_id="loras", min_width=WIDE
        )
        base = gradio.Dropdown(
            [AS_TRAINED, *BUNDLED],
            value=AS_TRAINED,
            allow_custom_value=True,
            label="Base (or a folder, file, Hub id)",
            min_width=WIDE,
        )
    prompt = gradio.Textbox(_prompt_of(root, first), label="Prompt", elem_id="prompt")
    with gradio.Row():
        start = calibrated_strength(root, first)
        strength = gradio.Slider(
            0, max(LARGEST, start), start, step=0.05, label="Strength", elem_id="strength", min_width=WIDE
        )
        seed = gradio.Number(0, label="Seed", precision=0, minimum=0, maximum=SEED_SPAN - 1, elem_id="seed")
        steps = gradio.Number(0, label="Steps (0: default)", precision=0, minimum=0, maximum=1000)
        guidance = gradio.Number(0, label="Guidance (0: default)", minimum=0)
    button = gradio.Button("Generate", variant="primary", elem_id="generate")
    with gradio.Row():
        sides = [_side(gradio, label, name) for label, name in (("Base", "base"), ("With the LoRAs", "with"))]
    grid_button = gradio.Button("Strength grid: strengths 0 to 1.5, three seeds")
    grid = gradio.Image(show_label=False, format="png", interactive=False, buttons=BUTTONS, elem_id="grid")

    inputs = [loras, prompt, seed, strength, base, steps, guidance]

    def request(names: list[str], text: str, number: Any, value: float, source: str, *sampler: Any) -> Request:
        count, scale = sampler
        return Request(
            tuple(names or ()), text, int(number or 0), value, source or AS_TRAINED, count or None, scale or None
        )

    def with_loras(*values: Any) -> tuple[Any, str]:
        picture = generator.picture(request(*values))
        return enlarged(picture.image), picture.reading

    def without(names: list[str], text: str, number: Any, _: float, *rest: Any) -> tuple[Any, str]:
        return with_loras(names, text, number, 0.0, *rest)

    def both(*values: Any) -> tuple[Any, ...]:
        return (*without(*values), *with_loras(*values))

    def choose(names: list[str]) -> tuple[Any, Any]:
        value = calibrated_strength(root, names or [])
        return gradio.update(maximum=max(LARGEST, value), value=value), _prompt_of(root, names or [])

    generate = _shown(gradio, both)
    gradio.on([button.click, prompt.submit], generate, inputs, [*sides[0], *sides[1]], **_PRIVATE)
    strength.release(_shown(gradio, with_loras), inputs, sides[1], **_PRIVATE)
    loras.input(choose, loras, [strength, prompt], **_PRIVATE).then(
        generate, inputs, [*sides[0], *sides[1]], **_PRIVATE
    )
    grid_button.click(_shown(gradio, lambda *values: generator.grid(request(*values))), inputs, grid, **_PRIVATE)
    page.load(lambda: gradio.update(choices=find_loras(root)), None, loras, **_PRIVATE)


def _side(gradio: Any, label: str, name: str) -> list[Any]:
    with gradio.Column():
        image = gradio.Image(label=label, format="png", interactive=False, buttons=BUTTONS, elem_id=f"{name}-image")
        reading = gradio.Textbox(label="Classifier", interactive=False, lines=2, elem_id=f"{name}-reading")
    return [image, reading]


def _prompt_of(root: Path, names: list[str]) -> str:
    """The caption of the concept that the first LoRA erases."""
    from sd_unlearn.evaluation.loras import open_lora

    try:
        concept = open_lora(str(root / names[0])).concept if names else None
    except UnlearnError:
        return ""
    return concept.caption if concept else ""


def _train_tab(gradio: Any, page: Any, root: Path, training: Training) -> None:
    planned = gradio.State(None)
    with gradio.Row():
        concept = gradio.Dropdown(
            sorted(concept_files()), value="seven", allow_custom_value=True, label="Concept", elem_id="concept"
        )
        name = gradio.Textbox("seven", label="Run folder, in runs/", elem_id="run-name")
        base = gradio.Textbox("", label="Base (empty: the concept's)")
    with gradio.Row():
        steps = gradio.Number(None, label="Steps (empty: the default)", precision=0, minimum=1, elem_id="steps")
        seed = gradio.Number(0, label="Seed", precision=0, minimum=0, maximum=SEED_SPAN - 1)
    with gradio.Row():
        plan_button = gradio.Button("Show the plan", variant="primary", elem_id="plan")
        start = gradio.Button("Start", interactive=False, elem_id="start")
        stop = gradio.Button("Stop", interactive=False, variant="stop", elem_id="stop")
    plan_text = gradio.Code(
        label="Plan", language=None, interactive=False, show_line_numbers=False, elem_id="plan-text"
    )
    bar = gradio.HTML(elem_id="progress")
    with gradio.Row():
        preview = gradio.Image(label="Preview", format="png", interactive=False, buttons=BUTTONS, elem_id="preview")
        output = gradio.Code(label="Output", language=None, interactive=False, wrap_lines=True, elem_id="output")

    def plan(*values: Any) -> tuple[Any, ...]:
        job = _job(*values)
        return make_plan(root, job), job, gradio.update(interactive=not training.running)

    def begin(job: Job | None) -> Any:
        if job is None:
            raise UsageError("Show the plan first.")
        training.start(job)
        return gradio.update(interactive=False)

    fields = [concept, name, base, steps, seed]
    plan_button.click(_shown(gradio, plan), fields, [plan_text, planned, start], **_PRIVATE)
    for field in fields:  # what is started is what was planned
        field.input(lambda: (None, gradio.update(interactive=False)), None, [planned, start], **_PRIVATE)
    concept.input(lambda given: concept_slug(given or ""), concept, name, **_PRIVATE)
    start.click(_shown(gradio, begin), planned, start, **_PRIVATE)
    stop.click(training.stop, None, None, **_PRIVATE)

    def look() -> tuple[Any, ...]:
        found = training.progress()
        image = enlarged(open_image(found.preview)) if found.preview else None
        return _bar(found.state, found.step, found.steps), image, found.output, gradio.update(interactive=found.running)

    ticking: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    gradio.Timer(TICK).tick(look, None, [bar, preview, output, stop], **ticking)


def _job(concept: str, name: str, base: str, steps: Any, seed: Any) -> Job:
    number = int(steps) if steps else None
    return Job((concept or "").strip(), (name or "").strip(), number, (base or "").strip() or None, int(seed or 0))


def _bar(state: str, step: int, steps: int) -> str:
    if not steps:
        return f"<p>{escape(state)}</p>"
    return f'<p>{escape(state)} Step {step:,} of {steps:,}.</p><progress value="{step}" max="{steps}"></progress>'


def _shown(gradio: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with our errors shown on the page instead of "Error"."""

    def call(*values: Any) -> Any:
        try:
            return function(*values)
        except UnlearnError as error:
            raise gradio.Error(escape(str(error)), print_exception=False) from None

    return call
