"""Metrics and prompt groups as people read them: name, explanation, unit and direction of each."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple


class Metric(NamedTuple):
    """How a metric is presented."""

    name: str
    about: str
    is_rate: bool = True  # printed as a percentage
    higher_is_better: bool = False
    is_share: bool = False  # always between 0 and 1
    of_concept: bool = False  # measures the concept itself, so it does not apply to LoRAs that erase another one
    gives_verdict: bool = False  # the share of images that show the concept


# In the order of the tables. Keys are names of results.json without a model: cmmd-ViT-L-14 is "cmmd" (`known_as`).
METRICS = {
    "leakage": Metric(
        "Leakage",
        "share of images in which the detector still finds the concept",
        is_share=True,
        of_concept=True,
        gives_verdict=True,
    ),
    "leakage_top5": Metric(
        "Leakage, top 5",
        "share of images for which the concept is among the five most probable classes",
        is_share=True,
        of_concept=True,
    ),
    "attack": Metric(
        "Attack",
        "share of an attack's trials that brought the concept back, of its best try",
        is_share=True,
        of_concept=True,
    ),
    "confusion": Metric(
        "Confusion", "share of images in which the person is found although somebody else was requested", is_share=True
    ),
    "clean_replacement": Metric(
        "Clean replacement",
        "share of clear images of something else, relative to the base with the generic prompt",
        higher_is_better=True,
        of_concept=True,
    ),
    "accuracy": Metric(
        "Accuracy", "share of images that show what the prompt asks for", higher_is_better=True, is_share=True
    ),
    "retention": Metric(
        "Retention",
        "accuracy with the LoRA divided by accuracy without it, on the same seeds; can exceed 100 %",
        higher_is_better=True,
    ),
    "face_rate": Metric("Face rate", "share of images with at least one face", higher_is_better=True, is_share=True),
    "non_sensitive_rate": Metric("Non-sensitive rate", "1 - leakage", is_share=True),
    "nudity": Metric(
        "Nudity",
        "share of images with at least one exposed body part detected",
        is_share=True,
        of_concept=True,
        gives_verdict=True,
    ),
    "detections": Metric(
        "Detections", "exposed body parts detected per image, on average", is_rate=False, of_concept=True
    ),
    "fid-digits": Metric(
        "FID (digits)",
        "Fréchet distance to real digits, in the features of the digit reader; lower is better",
        is_rate=False,
    ),
    "kid-digits": Metric(
        "KID (digits)",
        "kernel distance to real digits, in features of the digit reader; lower is better, but its size has no meaning "
        "by itself: compare it with the base's",
        is_rate=False,
    ),
    "fid-emoji": Metric(
        "FID (emoji)",
        "Fréchet distance to new placements of real emoji, in the features of the emoji reader; lower is better",
        is_rate=False,
    ),
    "kid-emoji": Metric(
        "KID (emoji)",
        "kernel distance to new placements of real emoji, in features of the emoji reader; lower is better, but its "
        "size has no meaning by itself: compare it with the base's",
        is_rate=False,
    ),
    "fid-inception": Metric(
        "FID", "Fréchet distance to the base's images, in Inception features; lower is closer", is_rate=False
    ),
    "fid-inception-real": Metric("FID, real", "the same distance to real images", is_rate=False),
    "kid-inception": Metric(
        "KID", "kernel distance to the base's images, in Inception features; lower is closer", is_rate=False
    ),
    "kid-inception-real": Metric("KID, real", "the same distance to real images", is_rate=False),
    "cmmd": Metric("CMMD", "distance to the base's images, in CLIP features; lower is closer", is_rate=False),
    "cmmd-real": Metric("CMMD, real", "the same distance to real images", is_rate=False),
    "clip_score": Metric(
        "CLIP score",
        "100 times the cosine similarity of image and prompt, on average; higher is closer",
        is_rate=False,
        higher_is_better=True,
    ),
    "drift": Metric(
        "Drift", "distance between an image with and without the LoRA, on average; 0 means unchanged", is_rate=False
    ),
    "lpips": Metric(
        "LPIPS", "perceptual distance between an image with and without the LoRA; 0 means unchanged", is_rate=False
    ),
}
PRESENCE = tuple(name for name, metric in METRICS.items() if metric.gives_verdict)
REPORT_ONLY = ("kid-digits", "kid-emoji")  # its size has no meaning by itself; the report's full table explains it
GROUPS = {
    "direct": ("by name", "prompts that name the concept, as in training"),
    "held_out": ("other wordings", "prompts for the concept that were not used in training"),
    "generic": ("generic prompt", "a prompt that does not name the concept"),
    "alike": ("look-alikes", "concepts that look or sound similar and should be kept"),
    "general": ("anything else", "unrelated prompts that should be kept"),
    "kept": ("all kept prompts", "look-alikes and anything else together"),
    "prefix": ("adversarial prefix", "tokens before the prompt, found by gradient"),
    "hard": ("free tokens", "a prompt of free tokens, found by gradient"),
    "token": ("learned token", "one learned token in place of the concept's name"),
    "soft": ("learned prompt", "a prompt whose token embeddings are learned"),
    "ring": ("concept direction", "a prompt near the generic one plus the concept's direction"),
    "noise": ("more sampling noise", "sampling with more noise than usual"),
    "inversion": ("inverted image", "sampling from an inverted image of the concept"),
    "completion": ("half an image given", "completing half an image of the concept"),
    "finetune": ("fine-tuning on the concept", "a new LoRA trained on images of the concept"),
    "benign": ("fine-tuning on other images", "a new LoRA trained on unrelated images"),
    "strength": ("other LoRA strength", "the LoRA at 0.8, 0.9 and 1.1"),
    "quantisation": ("fewer bits per weight", "the merged weights in fp16, int8 and 4 bits"),
}


def known_as(metric: str) -> str:
    """The key of METRICS that a metric of results.json belongs to, or the metric's own name if it is unknown.

    Some metrics carry the model in their name: cmmd-ViT-L-14 is "cmmd", cmmd-ViT-L-14-real is "cmmd-real".
    """
    if metric in METRICS:
        return metric
    family, _, model = metric.partition("-")
    real = f"{family}-real"
    key = real if model.endswith("-real") and real in METRICS else family
    return key if model and key in METRICS else metric


def model_of(metric: str) -> str:
    """The model in a metric's name: ViT-L-14 of cmmd-ViT-L-14; empty for metrics without one."""
    key = known_as(metric)
    return "" if metric == key or key not in METRICS else metric.partition("-")[2].removesuffix("-real")


def metric_name(metric: str) -> str:
    """A metric as people read it, with its model: CMMD (ViT-L-14). An unknown metric keeps its name."""
    known, model = METRICS.get(known_as(metric)), model_of(metric)
    return metric if known is None else f"{known.name} ({model})" if model else known.name


def group_name(group: str) -> str:
    """A prompt group as people read it; an unknown group keeps its name."""
    return GROUPS[group][0] if group in GROUPS else group


def presence_order(kind: str, measured: Collection[str]) -> tuple[str, ...]:
    """The metrics of PRESENCE that detect a concept of a kind, the one that gives the verdict first.

    NudeNet's is the first for nudity, and for results that do not record the kind. It detects no other concept: a nude
    person is not the person. Of kind `other` the concept may be one of nudity, if no other detector looked for it.

    Args:
        measured: The metrics there are.
    """
    if kind in ("", "nudity"):
        return "nudity", "leakage"
    return ("nudity",) if kind == "other" and "leakage" not in measured else ("leakage",)


def metric_rank(metric: str) -> int:
    """Place of a metric in the order of METRICS; unknown metrics come last."""
    return _place(METRICS, known_as(metric))


def group_rank(group: str) -> int:
    """Place of a prompt group in the order of GROUPS; unknown groups come last."""
    return _place(GROUPS, group)


def explanations(metrics: Iterable[str]) -> list[tuple[str, str]]:
    """(name, explanation) of each known metric, once."""
    known = dict.fromkeys(metric for metric in metrics if known_as(metric) in METRICS)
    return [(metric_name(metric), METRICS[known_as(metric)].about) for metric in known]


def _place(names: Iterable[str], name: str) -> int:
    order = list(names)
    return order.index(name) if name in order else len(order)
