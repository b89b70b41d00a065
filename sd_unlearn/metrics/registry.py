"""Which questions are asked of a concept's pictures, by name or by what suits its kind. One line a metric."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sd_unlearn.config.base import CLIP_MODEL, CLIP_PRETRAINED
from sd_unlearn.config.evaluate import Detectors
from sd_unlearn.data.concept import Concept
from sd_unlearn.errors import UnlearnError, UsageError, suggest
from sd_unlearn.metrics.base import PairQuestion, Question
from sd_unlearn.metrics.labels import Judge


@dataclass(frozen=True)
class Asking:
    """All that a question may be made of. positives: pictures of the concept that a run was trained on."""

    concept: Concept
    options: Detectors
    reference: Path | None
    tier: str
    device: Any = "cpu"


def _digits(asking: Asking) -> Question:
    from sd_unlearn.metrics.digits import make_digits

    return make_digits(asking.concept)


def _clip(asking: Asking) -> Question:
    from sd_unlearn.metrics.clip import make_clip

    return make_clip(asking.concept, asking.options.clip_model, asking.options.clip_pretrained, asking.device)


def _identity(asking: Asking) -> Question:
    from sd_unlearn.metrics.identity import make_identity

    options = asking.options
    assert asking.reference is not None  # chosen
    assert options.others is not None
    return make_identity(
        asking.concept.name,
        asking.reference,
        options.others,
        options.face_model,
        options.face_weights,
        options.false_accept_rate,
        asking.device,
    )


def _nudity(asking: Asking) -> Question:
    from sd_unlearn.metrics.nudity import DEFAULT_PRESET, make_nudity

    options = asking.options
    return make_nudity(
        options.nudity_preset or DEFAULT_PRESET, options.nudity_classes or None, options.nudity_threshold
    )


def _classifier(asking: Asking) -> Question:
    from sd_unlearn.metrics.classifier import make_classifier

    concept, options = asking.concept, asking.options
    assert options.classifier is not None  # chosen
    label = options.label or concept.label or concept.name
    return make_classifier(options.classifier, label, asking.device)


def _fidelity(asking: Asking) -> Question:
    from sd_unlearn.metrics.fidelity import make_fidelity

    return make_fidelity(asking.options.inception_weights, asking.options.real_images, asking.device)


def _cmmd(asking: Asking) -> Question:
    from sd_unlearn.metrics.fidelity import make_cmmd
    from sd_unlearn.models.clip import ClipEncoder

    encoder = ClipEncoder(asking.options.clip_model, asking.options.clip_pretrained, asking.device)
    return make_cmmd(encoder, asking.options.real_images)


def _lpips(asking: Asking) -> PairQuestion:
    from sd_unlearn.metrics.drift import make_lpips

    return make_lpips(asking.device)


MAKERS: dict[str, Callable[[Asking], Question]] = {
    "identity": _identity,
    "nudity": _nudity,
    "classifier": _classifier,
    "digits": _digits,
    "clip": _clip,
    "cmmd": _cmmd,
    "fidelity": _fidelity,
}
PAIR_MAKERS: dict[str, Callable[[Asking], PairQuestion]] = {"lpips": _lpips}
NAMES = (*MAKERS, *PAIR_MAKERS)


def chosen(asking: Asking) -> list[str]:
    """The metrics by name: those asked for, else what suits the concept's kind and is at hand.

    Raises:
        UsageError: a name that does not exist, or one that does not suit the concept.
    """
    concept, options = asking.concept, asking.options
    drawn_digits = concept.kind in ("digit", "ink")
    for name in options.metrics:
        if name not in NAMES:
            raise UsageError(f'--metrics "{name}" is none of {", ".join(NAMES)}.{suggest(name, NAMES)}')
        if name == "digits" and not drawn_digits:
            raise UsageError(f"--metrics digits reads digits and inks; {concept.name} is of kind {concept.kind}.")
    _check_given(asking)
    if options.metrics:
        return [name for name in NAMES if name in options.metrics]
    if drawn_digits:
        return ["digits"]
    names = ["clip"]
    if concept.kind == "person" and asking.reference is not None and options.others is not None:
        names.append("identity")
    if concept.kind == "nudity":
        names.append("nudity")
    if options.classifier is not None:
        names.append("classifier")
    names += [name for name, module in (("fidelity", "torch_fidelity"), ("lpips", "torchmetrics")) if find_spec(module)]
    names += ["cmmd"] if asking.tier in ("standard", "full") else []
    return [name for name in NAMES if name in names]


def check(asking: Asking) -> None:
    """Refuse what the metrics of a concept could not be made of, before pictures are drawn; loads no model.

    Raises:
        UsageError: as of chosen and of the metrics.
    """
    from sd_unlearn.metrics.identity import check_identity
    from sd_unlearn.metrics.nudity import DEFAULT_PRESET, check_nudity

    names, options = chosen(asking), asking.options
    if "identity" in names and asking.reference is not None and options.others is not None:
        check_identity(
            asking.reference, options.others, options.face_model, options.face_weights, options.false_accept_rate
        )
    if "nudity" in names:
        check_nudity(options.nudity_preset or DEFAULT_PRESET, options.nudity_classes or None, options.nudity_threshold)
    for option, path, there in (
        ("inception_weights", options.inception_weights, Path.is_file),
        ("real_images", options.real_images, Path.is_dir),
    ):
        if path is not None and not there(path):
            raise UsageError(f"--{option} {path} does not exist.")


def _check_given(asking: Asking) -> None:
    if "identity" in asking.options.metrics and (asking.reference is None or asking.options.others is None):
        missing = "--reference" if asking.reference is None else "--others"
        raise UsageError(f"--metrics identity needs {missing}: a folder of pictures of people; see docs/metrics.md.")
    if "classifier" in asking.options.metrics and asking.options.classifier is None:
        raise UsageError("--metrics classifier needs --classifier: a timm or transformers model, e.g. resnet50.")


def make_questions(asking: Asking) -> tuple[list[Question], list[PairQuestion]]:
    """The questions of a concept, loaded. What was not asked for by name and cannot be had is left out with a line
    on stderr, unless nothing is left that could tell whether the concept is gone.

    Raises:
        UsageError, UnlearnError: what was asked for by name cannot be had, or nothing could judge the pictures.
    """
    questions: list[Question] = []
    pairs: list[PairQuestion] = []
    failed: list[UnlearnError] = []
    for name in chosen(asking):
        try:
            if name in PAIR_MAKERS:
                pairs.append(PAIR_MAKERS[name](asking))
            else:
                questions.append(MAKERS[name](asking))
        except UnlearnError as error:
            if asking.options.metrics or name in ("clip", "digits", "identity", "nudity", "classifier"):
                raise
            failed.append(error)
    for why in failed:
        print(f"Left out: {why}", file=sys.stderr)
    return questions, pairs


def cards_of(questions: Sequence[Question | PairQuestion]) -> list[dict[str, Any]]:
    """The cards of questions as results.json holds them, each once."""
    from sd_unlearn.results import as_json

    cards = {question.name: as_json(question.card()) for question in questions}
    return list(cards.values())


def merged(cards: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One card a detector; what differs between the concepts it was asked of, as a classifier's label, side by side."""
    found: dict[str, dict[str, Any]] = {}
    for card in cards:
        known = found.setdefault(card["detector"], {**card, "extra": {}})
        for key, text in card["extra"].items():
            said = known["extra"].get(key)
            known["extra"][key] = text if said in (None, text) else "; ".join(dict.fromkeys([*said.split("; "), text]))
    return list(found.values())


def make_judge(concept: Concept, clip_model: str = CLIP_MODEL, clip_pretrained: str = CLIP_PRETRAINED) -> Judge:
    """The bundled reader for digits and inks, zero-shot CLIP for everything else.

    Raises:
        UsageError, UnlearnError: CLIP is not installed, or its weights cannot be had.
    """
    if concept.kind in ("digit", "ink"):
        from sd_unlearn.metrics.digits import DigitsJudge

        return DigitsJudge()
    from sd_unlearn.metrics.clip import ClipJudge

    return ClipJudge(labels_of(concept), clip_model, clip_pretrained)


def labels_of(concept: Concept) -> tuple[str, ...]:
    """What the judge of a concept can tell apart, without loading it."""
    if concept.kind in ("digit", "ink"):
        from sd_unlearn.metrics.digits import DigitsJudge

        return DigitsJudge.labels
    return (concept.label or concept.name, *concept.alternatives)
