"""beta of a training: of each set of positives of one concept, or of each of several concepts."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from functools import partial

from accelerate.utils import broadcast_object_list
from torch import Tensor

from sd_unlearn.config.train import TrainConfig
from sd_unlearn.data.concept import Concept
from sd_unlearn.data.dataset import Example, positive_sets, split_beta
from sd_unlearn.data.embeddings import Embedder
from sd_unlearn.data.prior import Prior, resolve_beta
from sd_unlearn.data.render_job import known_beta
from sd_unlearn.data.turns import make_turns
from sd_unlearn.io.run_folder import DATA_MANIFEST
from sd_unlearn.models.base import Base


def resolve_betas(
    config: TrainConfig, concept: Concept, base: Base, examples: Sequence[Example], latents: Tensor
) -> tuple[dict[str, float], Prior]:
    """beta of each set of positives of one concept, or of each of several concepts; and where it comes from."""
    assert config.data_dir is not None
    is_rendered = (config.data_dir / DATA_MANIFEST).is_file()

    def known_share(part: Concept, seen: Sequence[Example]) -> float | None:
        counts = Counter(example.group for example in seen)
        return known_beta(part.generic_share, counts) if is_rendered else None

    embedder = Embedder(base, latents)
    if len(concept.parts) == 1:
        prior = resolve_beta(config.beta, known_share(concept, examples), lambda: embedder.embed(examples))
        prior = broadcast_object_list([prior])[0]  # rounding may differ between devices: one beta for all
        sets = positive_sets(config.data_dir)
        shared, source = split_beta(concept, sets, prior.beta, prior.source)
        return dict(zip(sets, shared, strict=True)), dataclasses.replace(prior, source=source)
    priors = []
    for turn in make_turns(concept, examples, [0.0] * len(concept.parts)):
        embeddings = partial(embedder.embed, turn.examples)
        priors.append(resolve_beta(config.beta, known_share(turn.concept, turn.examples), embeddings))
    priors = broadcast_object_list(priors)
    of_all = dataclasses.replace(
        priors[0],
        source=", ".join(dict.fromkeys(prior.source for prior in priors)),
        estimates=tuple(estimate for prior in priors for estimate in prior.estimates),
        notes=tuple(f"{part.name}: {n}" for part, p in zip(concept.parts, priors, strict=True) for n in p.notes),
    )
    return {part.slug: prior.beta for part, prior in zip(concept.parts, priors, strict=True)}, of_all
