"""Whether a probe can run on the images and prompts there are. Imports no torch (see preflight.py)."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from sd_unlearn.config.base import CLIP_MODEL, CLIP_PRETRAINED
from sd_unlearn.config.train import TrainConfig
from sd_unlearn.data.concept import Concept, Prompt
from sd_unlearn.errors import UsageError, install_command
from sd_unlearn.metrics.classifier_of import bundled_metric, labels_of
from sd_unlearn.models.clip import check_clip

MIN_TO_HOLD_OUT = 4  # images of a kind, of which 2 are held out


def check_probe(config: TrainConfig, concept: Concept, groups: Sequence[str], positives: Sequence[int]) -> None:
    """Refuse a probe that could not run.

    Args:
        groups: The group of each training image.
        positives: The number of images in each set of positives.

    Raises:
        UsageError: too few images to hold some out; no keep prompt with labels of the classifier; no classifier.
        UnlearnError: the weights of the classifier cannot be downloaded.
    """
    if not config.probe_steps:
        return
    if config.probe == "ratio":
        if len(concept.parts) > 1:
            raise UsageError("--probe ratio is for one concept. Use --probe leakage, or leave out --probe_steps.")
        check_enough(*positives, groups.count("generic") + groups.count("mixed_in"))
        return
    classifiable_prompts(concept, labels_of(concept))
    if bundled_metric(concept):
        return  # the classifier is bundled
    if not find_spec("open_clip"):
        raise UsageError(f"--probe leakage needs open_clip: {install_command('clip')}, or use --probe ratio.")
    check_clip(CLIP_MODEL, CLIP_PRETRAINED)


def classifiable_prompts(concept: Concept, labels: Sequence[str]) -> list[Prompt]:
    """The keep prompts whose expected labels a classifier with these labels knows.

    Raises:
        UsageError: the classifier knows none of the keep prompts' labels.
    """
    asked = {part.label or part.name for part in concept.parts}
    prompts = [p for p in concept.keep_prompts if p.expect and {*p.expect, *asked} <= set(labels)]
    if not prompts:
        raise UsageError(
            f"--probe leakage: the classifier for {concept.name!r} knows the labels of none of its keep prompts. Use "
            f"--probe ratio, or put labels that it knows in the keep prompts' braces: {', '.join(labels)}."
        )
    return prompts


def check_enough(*counts: int) -> None:
    if min(counts) < MIN_TO_HOLD_OUT:
        raise UsageError(
            f"--probe ratio holds out images of every folder, but one has only {min(counts)}; at least "
            f"{MIN_TO_HOLD_OUT} are needed."
        )
