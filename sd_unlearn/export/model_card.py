"""Write the model card: README.md next to the LoRA, with the YAML header of the Hugging Face hub.

Texts of users (names, prompts) are escaped, so that they cannot add links, HTML or table cells.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from jinja2 import FileSystemLoader

from sd_unlearn.export.trained_run import OwnResults, TrainedRun
from sd_unlearn.io.own_files import sealed
from sd_unlearn.io.run_folder import DIFFUSERS_FILE
from sd_unlearn.models.kinds import KINDS
from sd_unlearn.report.formatting import interval_text, value_text
from sd_unlearn.report.jinja import environment
from sd_unlearn.report.metric_names import group_name, metric_name
from sd_unlearn.results import BASE

TEMPLATES = Path(__file__).parent / "templates"
GRID = "pairs.png"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
_FAMILY = {
    "sd1": "stable-diffusion",
    "sd2": "stable-diffusion",
    "sdxl": "stable-diffusion-xl",
    "sd3": "stable-diffusion-3",
    "flux": "flux",
    "flux2": "flux2",
    "flux2-klein": "flux2-klein",
    "z-image": "z-image",
    "qwen-image": "qwen-image",
}
PU = "positive-unlabeled learning (Takahashi et al., ICLR 2025, arXiv 2503.03789)"
OUR_PU = f"the default of sd-unlearn, a variant of {PU}"
_ESD = "ESD (Gandikota et al. 2023, arXiv 2303.07345, equation 7)"
_METHODS = {  # by objective; the differences to the papers are in docs/training.md
    "pu": PU,
    "supervised": f"the supervised baseline of {PU}",
    "unsupervised": f"the unsupervised baseline of {PU}",
    "esd-x": f"the objective of {_ESD}, on cross-attention layers",
    "esd-u": f"the objective of {_ESD}, on all layers but cross-attention",
    "anchor": "the objective of concept ablation (Kumari et al. 2023, arXiv 2303.13516, equation 5)",
    "neggrad": "gradient ascent on the concept and ordinary training on other images (NegGrad+, arXiv 2302.09880)",
    "uce": "the closed-form edit UCE (Gandikota et al. 2024, arXiv 2308.14761, equation 7)",
    "speed": "the closed-form edit SPEED (Li et al. 2025, arXiv 2503.07392)",
    "rece": "the closed-form edit RECE (Gong et al. 2024, arXiv 2407.12383)",
    "fuse": "fusing LoRAs that were trained apart",
}
_SETTINGS = (
    "objective",
    "fuse_method",
    "method",
    "lora_targets",
    "rank",
    "lora_alpha",
    "beta",
    "beta_source",
    "correction",
    "caption_mode",
    "target",
    "push",
    "erase_guidance",
    "forget_weight",
    "erase_weight",
    "null_space_threshold",
    "retain",
    "reduction",
    "quantize_base",
    "config_sha256",
)
# Markdown shows a numeric entity as the character itself, but never reads it as markup.
_ENTITIES = {ord(mark): f"&#{ord(mark)};" for mark in string.punctuation if mark not in ",'%"}


def render(run: TrainedRun, licence: str | None, hub_id: str | None, *, has_grid: bool) -> str:
    """The Markdown of a run's model card.

    Args:
        licence: In the hub's spelling; None if unknown.
        hub_id: The repository that the card will be uploaded to, if any.
        has_grid: Whether the image file GRID will be written next to the card.
    """
    name = run.base_name
    jinja = environment(escape=False)
    jinja.loader = FileSystemLoader(TEMPLATES)
    jinja.filters["md"] = escaped
    card = jinja.get_template("card.md.j2").render(
        front=front_matter(run, licence),
        title=title(run.concept.name),
        concept=run.concept,
        slug=run.concept.slug,
        base=name,
        base_id=name if _is_hub_id(run) else None,
        hub_id=hub_id,
        has_grid=has_grid,
        problems=list(dict.fromkeys(problem.message for problem in run.results.problems)) if run.results else [],
        lines=metrics_table(run.results) if run.results else [],
        is_attacked=bool(run.results and run.results.is_attacked),
        detector=(run.results and run.results.detector) or "not named",
        sampler=_sampler(run.results.sampler) if run.results else "",
        strength=f"{run.strength:g}",
        calibration=run.calibration,
        training=run.training,
        method=_method(run.training),
        to_generic=run.to_generic,
        is_dora=run.is_dora,
        zero_terminal_snr=run.zero_terminal_snr,
        licence=licence,
        settings=_settings(run.training),
        pipeline_class=KINDS[run.kind].pipeline,
        is_flow=KINDS[run.kind].is_flow,
        diffusers_file=DIFFUSERS_FILE,
        kohya_file=f"{run.concept.slug}.safetensors",
    )
    return sealed(card)


def _method(training: Mapping[str, Any]) -> str:
    """How the LoRA was made, in words."""
    if (training.get("objective"), training.get("target")) == ("pu", "teacher"):
        return OUR_PU
    return _METHODS.get(str(training.get("objective")), PU)


def _settings(training: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The settings that the card lists; without the source of beta if the objective does not use it."""
    keys = [key for key in _SETTINGS if key != "beta_source" or training.get("beta") is not None]
    return [(key, training[key]) for key in keys if training.get(key) is not None]


def title(name: str) -> str:
    """The first line of the card of a concept."""
    return f"# Forget “{escaped(name)}”"


def front_matter(run: TrainedRun, licence: str | None) -> str:
    """The YAML header. The hub requires `other` and a name for a licence that it does not list."""
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


def metrics_table(results: OwnResults) -> list[dict[str, str]]:
    """The lines of the card's table: each metric with the LoRA, next to the value of the base."""
    before = {(row.concept, row.metric, row.group, row.detector): row for row in results.rows if row.subject == BASE}
    several = len({row.concept for row in results.rows}) > 1
    return [
        {
            "metric": metric_name(row.metric),
            "group": f"{row.concept}: {group_name(row.group)}" if several else group_name(row.group),
            "without": value_text(before.get((row.concept, row.metric, row.group, row.detector))),
            "value": value_text(row),
            "interval": interval_text(row),
            "n": f"{row.n:,}",
        }
        for row in results.rows
        if row.subject == results.subject
    ]


def escaped(text: Any) -> str:
    """Any text on one line, with every character that Markdown could interpret as an entity."""
    line = " ".join(str(text).split()).translate(_ENTITIES)
    return re.sub(r"(?<=\d)&#46;(?=\d)", ".", line)  # keeps decimal points


def _is_hub_id(run: TrainedRun) -> bool:
    return bool(HUB_ID.fullmatch(run.base_name)) and not Path(run.base_name).exists()


def _sampler(sampler: dict[str, Any]) -> str:
    if "steps" not in sampler:
        return ""
    name, guidance = sampler.get("name", "a sampler"), sampler.get("guidance_scale")
    return f"{name}, {sampler['steps']} steps" + (f", guidance {guidance}" if guidance is not None else "")
