"""The images of a training with their captions, encoded, and each concept's share among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sd_unlearn.config.train import TrainConfig
from sd_unlearn.data.batches import EncodedImages
from sd_unlearn.data.concept import Concept
from sd_unlearn.data.dataset import Example, scan
from sd_unlearn.data.encoding import describe_long_captions, encode_each, encode_images, tokenize
from sd_unlearn.data.photos import CACHE_DIR
from sd_unlearn.data.prior import Prior
from sd_unlearn.data.turns import Turn, make_turns
from sd_unlearn.models.base import Base
from sd_unlearn.models.sampling import check_resolution
from sd_unlearn.training.betas import resolve_betas
from sd_unlearn.training.checkpoint import ESTIMATED, saved_betas
from sd_unlearn.training.probe import probe_prompts


@dataclass(frozen=True)
class Data:
    """The encoded training data. Training on it needs neither the VAE nor the text encoder."""

    images: EncodedImages
    betas: dict[str, float]  # share of each set of positives, or of several concepts, among the unlabeled images
    prior: Prior  # the source of the betas
    turns: Sequence[Turn]  # of each concept
    note: str = ""  # a line to print about the captions

    @property
    def beta(self) -> float | None:
        """Of all sets together; None for several concepts, which have one each."""
        return sum(self.betas.values()) if len(self.turns) == 1 else None

    @property
    def estimated(self) -> dict[str, dict[str, float]]:
        """What a checkpoint records, besides the identity, of a run with --beta estimate."""
        return {ESTIMATED: self.betas} if self.prior.source == "estimated" else {}

    def counts(self) -> str:
        """The number of images of each kind, in words."""
        examples = self.images.examples
        positive, negative = (sum(getattr(e, f"is_{kind}") for e in examples) for kind in ("positive", "negative"))
        known = f", {negative} known to be normal" if negative else ""
        return f"{len(examples) - positive - negative} unlabeled and {positive} positive images{known}"


def read_data(
    config: TrainConfig,
    concept: Concept,
    base: Base,
    encode_batch_size: int,
    resume: Path | None = None,
    own: Sequence[Example] = (),
) -> Data:
    """Scan the data folder, encode images (cached) and captions, and determine beta.

    resume: a checkpoint, which has the betas if they are estimated. own: the user's own images, which were scanned
    already; none if the folder was rendered.

    Raises:
        UsageError: invalid images, captions or betas, or a resolution that the base cannot have.
    """
    assert config.data_dir is not None
    if config.resolution:  # checked again: the kind of a Hub id is known only once it is loaded
        check_resolution(config.resolution, base.properties, base.name)
    examples = list(own) or scan(config.data_dir, concept, config.eta, config.positives)
    resolution = config.resolution or base.resolution
    mean, std = encode_images(base, examples, resolution, config.data_dir / CACHE_DIR, encode_batch_size)
    betas, prior = resolve_betas(config, concept, base, examples, mean)
    if resume and config.beta == "estimate" and not config.force_resume:
        betas = saved_betas(resume, betas)
    turns = make_turns(concept, examples, list(betas.values()))
    generics = (part.generic for part in concept.parts)
    captions = ["", *generics, *concept.captions, *concept.preview_prompts, *(e.caption for e in examples)]
    if probe_name(config) == "leakage":
        captions += probe_prompts(concept)
    captions = list(dict.fromkeys(captions))
    if config.train_text_encoder:
        text = dict(zip(captions, tokenize(base, captions), strict=True))
    else:
        text = encode_each(base, captions)
    images = EncodedImages(examples, mean, std, text)
    note = describe_long_captions(base, [e.caption for e in examples])
    return Data(images, betas, prior, turns, note)


def probe_name(config: TrainConfig) -> str:
    """Which evaluation runs during training, or none."""
    return config.probe if config.probe_steps else "none"
