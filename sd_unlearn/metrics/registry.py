"""The list of metrics: how each is made and which concepts use it. One function and one table line per metric."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, cast

from sd_unlearn.config.evaluate import Detectors
from sd_unlearn.data.concept import Concept
from sd_unlearn.errors import UnlearnError, UsageError, install_command, suggest
from sd_unlearn.launch import print_once
from sd_unlearn.metrics.base import Metric, PairMetric
from sd_unlearn.metrics.classifier_of import bundled_metric
from sd_unlearn.models.source import DIGITS
from sd_unlearn.results import as_json


@dataclass(frozen=True)
class MetricContext:
    """What the metrics of one concept are made from."""

    concept: Concept
    options: Detectors
    reference: Path | None  # images of the person, for identity
    tier: str
    device: Any = "cpu"


def _digits(context: MetricContext) -> Metric:
    from sd_unlearn.metrics.digits import make_digits

    return make_digits(context.concept)


def _emoji(context: MetricContext) -> Metric:
    from sd_unlearn.metrics.emoji import make_emoji

    return make_emoji(context.concept)


def _clip(context: MetricContext) -> Metric:
    from sd_unlearn.metrics.clip import make_clip

    return make_clip(context.concept, context.options.clip_model, context.options.clip_pretrained, context.device)


def _identity(context: MetricContext) -> Metric:
    from sd_unlearn.metrics.identity import make_identity

    options = context.options
    assert context.reference is not None  # checked in choose_metrics
    assert options.others is not None
    return make_identity(
        context.concept.name,
        context.reference,
        options.others,
        options.face_model,
        options.face_weights,
        options.false_accept_rate,
        context.device,
    )


def _nudity(context: MetricContext) -> Metric:
    from sd_unlearn.metrics.nudity import DEFAULT_PRESET, make_nudity

    options = context.options
    preset = options.nudity_preset or DEFAULT_PRESET
    return make_nudity(preset, options.nudity_classes or None, options.nudity_threshold)


def _classifier(context: MetricContext) -> Metric:
    from sd_unlearn.metrics.classifier import make_classifier

    concept, options = context.concept, context.options
    assert options.classifier is not None  # checked in choose_metrics
    label = options.label or concept.label or concept.name
    return make_classifier(options.classifier, label, context.device)


def _fidelity(context: MetricContext) -> Metric:
    from sd_unlearn.metrics.fidelity import make_fidelity

    return make_fidelity(context.options.inception_weights, context.options.real_images, context.device)


def _cmmd(context: MetricContext) -> Metric:
    from sd_unlearn.metrics.fidelity import make_cmmd
    from sd_unlearn.models.clip import ClipEncoder

    encoder = ClipEncoder(context.options.clip_model, context.options.clip_pretrained, context.device)
    return make_cmmd(encoder, context.options.real_images)


def _lpips(context: MetricContext) -> PairMetric:
    from sd_unlearn.metrics.lpips import make_lpips

    return make_lpips(context.device)


def _find_faces(context: MetricContext) -> None:
    from sd_unlearn.metrics.faces import make_face_model
    from sd_unlearn.metrics.people import check_faces

    model = make_face_model(context.options.face_model, context.options.face_weights, context.device)
    for folder, option in ((context.reference, "--reference"), (context.options.others, "--others")):
        assert folder is not None  # checked in choose_metrics
        check_faces(folder, option, model)


def _find_clip(context: MetricContext) -> None:
    from sd_unlearn.models.clip import check_clip

    check_clip(context.options.clip_model, context.options.clip_pretrained)


class Maker(NamedTuple):
    """How a metric is made, and how its weights are found or downloaded before that."""

    make: Callable[[MetricContext], Metric | PairMetric]
    find: Callable[[MetricContext], object] | None = None  # None: by making it, where that takes seconds


MAKERS = {
    "identity": Maker(_identity, _find_faces),
    "nudity": Maker(_nudity),
    "classifier": Maker(_classifier),
    "digits": Maker(_digits),
    "emoji": Maker(_emoji),
    "clip": Maker(_clip, _find_clip),
    "cmmd": Maker(_cmmd, _find_clip),
    "fidelity": Maker(_fidelity),
    "lpips": Maker(_lpips),
}
NAMES = tuple(MAKERS)
PAIR_METRICS = ("lpips",)
OPTIONAL = ("fidelity", "cmmd", "lpips")  # skipped with a warning if unavailable and not given in --metrics
DETECTORS = tuple(name for name in NAMES if name not in OPTIONAL)  # tell whether an image shows the concept
IDENTIFYING = ("identity", "classifier")  # can tell people apart; CLIP cannot
READING = ("digits", "emoji", "classifier", "clip")  # read what retained prompts asked for, so they give retention


def choose_metrics(context: MetricContext) -> list[str]:
    """The names in --metrics, else the installed metrics that suit the concept's kind.

    Raises:
        UsageError: an unknown name, a metric that does not suit the concept or lacks an option it needs.
    """
    concept, options = context.concept, context.options
    bundled = bundled_metric(concept)
    for name in options.metrics:
        if name not in NAMES:
            raise UsageError(f'--metrics "{name}" is not one of {", ".join(NAMES)}.{suggest(name, NAMES)}')
        if name == DIGITS and bundled != DIGITS:
            raise UsageError(f"--metrics digits is for digits and inks; {concept.name} is of kind {concept.kind}.")
    _check_required_options(context)
    if options.metrics:
        return [name for name in NAMES if name in options.metrics]
    if bundled:
        return [bundled]
    names = ["clip"]
    if concept.kind == "person" and context.reference is not None and options.others is not None:
        names.append("identity")
    if concept.kind == "nudity":
        names.append("nudity")
    if options.classifier is not None:
        names.append("classifier")
    names += [name for name, module in (("fidelity", "torch_fidelity"), ("lpips", "torchmetrics")) if find_spec(module)]
    names += ["cmmd"] if context.tier in ("standard", "full") else []
    return [name for name in NAMES if name in names]


def check_metrics(context: MetricContext) -> list[str]:
    """Check the options of a concept's metrics before images are generated; loads no model. Returns their names.

    Raises:
        UsageError: as `choose_metrics`, or an option of a metric is invalid.
    """
    from sd_unlearn.metrics.identity import check_identity
    from sd_unlearn.metrics.nudity import DEFAULT_PRESET, check_nudity

    names, concept, options = choose_metrics(context), context.concept, context.options
    if "identity" in names and context.reference is not None and options.others is not None:
        check_identity(
            concept.name,
            context.reference,
            options.others,
            options.face_model,
            options.face_weights,
            options.false_accept_rate,
        )
    if "nudity" in names:
        check_nudity(options.nudity_preset or DEFAULT_PRESET, options.nudity_classes or None, options.nudity_threshold)
    if options.inception_weights is not None and not options.inception_weights.is_file():
        raise UsageError(f"--inception_weights {options.inception_weights} does not exist.")
    if options.real_images is not None and not options.real_images.is_dir():
        raise UsageError(f"--real_images {options.real_images} does not exist.")
    return names


def _check_required_options(context: MetricContext) -> None:
    options, concept, missing = context.options, context.concept, missing_folders(context)
    asked = "--metrics identity" if "identity" in options.metrics else None
    if concept.kind == "person" and not options.metrics:
        asked = "--others" if options.others is not None else "--reference" if options.reference else None
    if asked and missing:
        raise UsageError(f"{asked} needs {missing[0]} for {concept.name}. See docs/metrics.md.")
    if "classifier" in options.metrics and options.classifier is None:
        raise UsageError("--metrics classifier needs --classifier: a timm or transformers model, e.g. resnet50.")


def missing_folders(context: MetricContext) -> list[str]:
    """The options, with what they are, that identity needs and that are not given."""
    folders = {
        "--reference (a folder of photos of the person)": context.reference,
        "--others (a folder of photos of other people)": context.options.others,
    }
    return [option for option, folder in folders.items() if folder is None]


def find_metrics(context: MetricContext) -> list[str]:
    """The names of a concept's metrics, once their weights are found or downloaded.

    So missing weights are not discovered after hours of generating images. Unavailable optional metrics are skipped
    with a line on stderr.

    Raises:
        UsageError, UnlearnError: a metric of --metrics, or one that detects the concept, is not installed or its
            weights cannot be downloaded.
    """
    found = []
    for name in choose_metrics(context):
        make, find = MAKERS[name]
        try:
            (find or make)(context)
            found.append(name)
        except UnlearnError as error:
            if context.options.metrics or name not in OPTIONAL:
                raise
            print_once(f"Skipped metric {name}: {error}")
    return found


def find_detectors(context: MetricContext) -> list[str]:
    """`find_metrics` of the metrics that tell whether an image shows the concept; others are not looked for."""
    names = [name for name in choose_metrics(context) if name in DETECTORS]
    return find_metrics(replace(context, options=replace(context.options, metrics=names)))


def make_metrics(names: Sequence[str], context: MetricContext) -> tuple[list[Metric], list[PairMetric]]:
    """Load the metrics that `find_metrics` has found.

    Raises:
        UsageError, UnlearnError: the weights, or the images of a metric's folders, cannot be read.
    """
    made = {name: MAKERS[name].make(context) for name in names}
    metrics = [metric for name, metric in made.items() if name not in PAIR_METRICS]
    pair_metrics = [metric for name, metric in made.items() if name in PAIR_METRICS]
    return cast(list[Metric], metrics), cast(list[PairMetric], pair_metrics)


def missing_evidence(context: MetricContext, names: Sequence[str]) -> str | None:
    """Why the metrics of a concept cannot show that it is gone; None if they can."""
    concept = context.concept
    if concept.kind != "person" or "clip" not in names or set(names) & set(IDENTIFYING):
        return None
    return (
        f"Only CLIP looked for {concept.name}, and CLIP alone cannot identify a person. "
        f"Install a face model ({install_command('faces')}) and evaluate again with "
        f"{' and '.join(missing_folders(context))}."
    )


def metric_cards(metrics: Sequence[Metric | PairMetric]) -> list[dict[str, Any]]:
    """The metrics' cards as JSON, one per detector."""
    cards = {metric.name: as_json(metric.card()) for metric in metrics}
    return list(cards.values())


def merge_cards(cards: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One card per detector. Texts in `extra` that differ between concepts, e.g. labels, are joined by "; "."""
    merged: dict[str, dict[str, Any]] = {}
    for card in cards:
        first = merged.setdefault(card["detector"], {**card, "extra": {}})
        for key, text in card["extra"].items():
            known = first["extra"].get(key)
            first["extra"][key] = (
                text if known in (None, text) else "; ".join(dict.fromkeys([*known.split("; "), text]))
            )
    return list(merged.values())
