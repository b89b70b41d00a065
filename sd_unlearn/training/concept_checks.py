"""Whether a training can work with its concepts and their images. Imports no torch (see preflight.py)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from sd_unlearn.choices import CLOSED_FORM
from sd_unlearn.config.loop import STEPS_OF_EACH
from sd_unlearn.config.train import TrainConfig
from sd_unlearn.data.concept import Concept
from sd_unlearn.data.dataset import Example, scan, set_names
from sd_unlearn.data.render_job import plan_images
from sd_unlearn.data.turns import make_turns
from sd_unlearn.errors import UsageError
from sd_unlearn.io.run_folder import UNLABELED


def check_concept(config: TrainConfig, concept: Concept) -> None:
    """Refuse a concept that is replaced with itself, if nothing would be erased.

    Raises:
        UsageError
    """
    by_teacher = config.objective == "pu" and (config.target, config.caption_mode) == ("teacher", "both")
    if not (by_teacher or config.objective == "anchor" or config.objective in CLOSED_FORM):
        return
    if concept.is_replaced_with_itself:
        hint = ", or use --target noise" if by_teacher else ""
        raise UsageError(
            f'--concept "{concept.name}": caption and generic prompt are both "{concept.caption}", so nothing would be '
            f"erased. Change the generic prompt (generic in the concept file, or --anchor){hint}."
        )


def check_several(config: TrainConfig, concept: Concept) -> None:
    """Refuse options for a single concept, and fewer steps than concepts.

    Raises:
        UsageError
    """
    count = len(concept.parts)
    if count == 1:
        return
    if config.positives is not None:
        raise UsageError(
            f"--positives {config.positives} is for one concept. Put the photos of each of several into a data folder, "
            f"--data_dir: {', '.join(set_names(concept)[:3])}."
        )
    if config.beta_sweep is not None:
        raise UsageError(f"--beta_sweep {config.beta_sweep} is for one concept. Train each alone, or leave it out.")
    steps = config.max_train_steps
    if config.objective not in CLOSED_FORM and steps is not None and steps < count:
        raise UsageError(
            f"--max_train_steps {steps} is less than the {count} concepts, of which each step serves "
            f"one. Use at least {STEPS_OF_EACH * count}, or erase fewer concepts."
        )


def describe_few_steps(config: TrainConfig, concept: Concept) -> list[str]:
    """A line if --max_train_steps leaves each of several concepts few steps."""
    count = len(concept.parts)
    steps = config.max_train_steps
    if count == 1 or steps is None or steps >= STEPS_OF_EACH * count:
        return []
    return [
        f"Warning: --max_train_steps {steps} gives each of {count} concepts about {steps // count} steps. With fewer "
        f"than {STEPS_OF_EACH} each ({STEPS_OF_EACH * count} together), concepts may not be erased."
    ]


def check_counts(config: TrainConfig, concept: Concept, data_dir: Path) -> None:
    """Refuse a rendering that leaves a folder with fewer images than a training needs.

    Raises:
        UsageError
    """
    folders = dict(zip((part.caption for part in concept.parts), set_names(concept), strict=True))
    counts: Counter[str] = Counter()
    for name, prompt, images in plan_images(concept, config):
        counts[folders[prompt] if name == "positive" else UNLABELED] += images
    for folder, images in counts.items():
        is_used = folder == UNLABELED or config.positives is None
        if images < 2 and is_used:
            key = "unlabeled" if folder == UNLABELED else "positive"
            raise UsageError(
                f"{data_dir / folder} would hold 1 image, but training needs at least 2. Raise --num_{key}, or {key} "
                "under images in the concept file."
            )


def scan_own(config: TrainConfig, concept: Concept, data_dir: Path) -> list[Example]:
    """The user's own images.

    Raises:
        UsageError: as scan; there are no unlabeled images for one of several concepts.
    """
    own = scan(data_dir, concept, config.eta, config.positives)
    for turn in make_turns(concept, own, [0.0] * len(concept.parts)):
        if not any(example.group in ("generic", "mixed_in") for example in turn.examples):
            raise UsageError(
                f"--data_dir {data_dir}: all images in {UNLABELED} have captions of the other concepts or the group "
                f"keep, so there are none for {turn.concept.name}. Add images of {turn.concept.generic!r}."
            )
    return own
