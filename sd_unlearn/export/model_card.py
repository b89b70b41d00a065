"""The model card: README.md beside the LoRA, with the header the Hugging Face hub reads. Texts of users are inert."""

from __future__ import annotations

import re
import string
from pathlib import Path
from typing import Any

import yaml

from sd_unlearn.export.lora_files import DIFFUSERS_FILE
from sd_unlearn.export.trained_run import Run, figures_of
from sd_unlearn.report.formatting import interval_text, value_text
from sd_unlearn.report.jinja import environment
from sd_unlearn.report.metric_names import group_name, metric_name
from sd_unlearn.results import Row

FILE, PICTURES = "README.md", "pairs.png"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
_FAMILY = {"sd1": "stable-diffusion", "sd2": "stable-diffusion", "sdxl": "stable-diffusion-xl"}
_SETTINGS = (
    "objective",
    "method",
    "rank",
    "lora_alpha",
    "beta",
    "beta_source",
    "correction",
    "caption_mode",
    "target",
    "push",
    "reduction",
    "config_sha256",
)
# A mark as a numeric entity is read as itself and starts nothing: no link, markup, table cell or HTML.
_INERT = {ord(mark): f"&#{ord(mark)};" for mark in string.punctuation if mark not in ",'%"}


def render(run: Run, licence: str | None, hub_id: str | None, *, has_pictures: bool) -> str:
    """The card of a run's LoRA. hub_id: where it will lie; licence: as the hub spells it, None if not known."""
    results, name = run.results or {"rows": []}, run.base_name
    made = environment(escape=False)
    made.filters["md"] = inert
    return made.get_template("card.md.j2").render(
        front=front_matter(run, licence),
        title=title(run.concept.name),
        concept=run.concept,
        slug=run.concept.slug,
        base=name,
        base_id=name if _is_hub_id(run) else None,
        hub_id=hub_id,
        has_pictures=has_pictures,
        lines=table(figures_of(results)),
        detector=results.get("detector") or "not named",
        sampler=_sampler(results.get("sampler")),
        training=run.training,
        is_dora=run.is_dora,
        licence=licence,
        settings=[(key, run.training[key]) for key in _SETTINGS if run.training.get(key) is not None],
        pipeline_class="StableDiffusionXLPipeline" if run.kind == "sdxl" else "StableDiffusionPipeline",
        diffusers_file=DIFFUSERS_FILE,
        kohya_file=f"{run.concept.slug}.safetensors",
    )


def title(name: str) -> str:
    """A card's first line, by the name of what was forgotten."""
    return f"# Forget “{inert(name)}”"


def front_matter(run: Run, licence: str | None) -> str:
    """The YAML header: a licence the hub does not list must be `other` with a name."""
    family = _FAMILY[run.kind]
    fields: dict[str, Any] = {"license": licence} if licence else {"license": "other", "license_name": "as-the-base"}
    if _is_hub_id(run):
        fields |= {"base_model": run.base_name, "base_model_relation": "adapter"}
    fields |= {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "inference": False,
        "tags": [
            family,
            f"{family}-diffusers",
            "text-to-image",
            "diffusers",
            "lora",
            "machine-unlearning",
            "concept-erasure",
            "sd-unlearn",
        ],
    }
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=False, width=10_000)


def table(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Figures as lines of the card: those with the LoRA, each with that of the base beside it, in their own units."""
    found = [Row.from_dict(row) for row in _complete(rows)]
    before = {(row.metric, row.group, row.detector): row for row in found if row.subject == "base"}
    return [
        {
            "metric": metric_name(row.metric),
            "group": group_name(row.group),
            "without": value_text(before.get((row.metric, row.group, row.detector))),
            "value": value_text(row),
            "interval": interval_text(row),
            "n": f"{row.n:,}",
        }
        for row in found
        if row.subject == "lora"
    ]


def inert(text: Any) -> str:
    """Any text as one piece of a Markdown line or table cell that says itself and does nothing."""
    marked = " ".join(str(text).split()).translate(_INERT)
    return re.sub(r"(?<=\d)&#46;(?=\d)", ".", marked)  # a decimal point


def _complete(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that say what they count: a file from elsewhere may lack a key."""
    return [{"n": 0} | row for row in rows if {"metric", "group", "subject", "value"} <= row.keys()]


def _is_hub_id(run: Run) -> bool:
    return bool(HUB_ID.fullmatch(run.base_name)) and not Path(run.base_name).exists()


def _sampler(sampler: Any) -> str:
    if not isinstance(sampler, dict) or "steps" not in sampler:
        return ""
    name, guidance = sampler.get("name", "a sampler"), sampler.get("guidance_scale")
    return f"{name}, {sampler['steps']} steps" + (f", guidance {guidance}" if guidance is not None else "")
