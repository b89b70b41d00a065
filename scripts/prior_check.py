"""Check `--beta estimate` on sets of known contamination, drawn by the bundled base, and print the table.

    python scripts/prior_check.py                  # 5 minutes of drawing the first time, then 3
    python scripts/prior_check.py --positives 20   # what few positives do

Every draw takes its positives and its unlabeled images, some of which show the concept, from one pool, none twice. The
pool is kept in build/prior_check. The last line is no mixture but what `render` makes: the concept as the generic
prompt draws it by itself, its share counted by the bundled judge.
"""

from __future__ import annotations

import argparse
import sys
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from sd_unlearn.data.dataset import Example, encode_images
from sd_unlearn.data.embeddings import embed
from sd_unlearn.data.prior import Embedded, Estimate, estimate_beta
from sd_unlearn.metrics.digits import DigitsJudge
from sd_unlearn.models.base import DIGITS, Base, load_base
from sd_unlearn.models.sampling import ImageRequest, Sampler, default_sampler, generate_missing
from sd_unlearn.seeds import EVALUATE_SEEDS, image_seed

POOL = Path("build/prior_check")
GENERIC, GENERIC_COUNT, CONCEPT_COUNT = "a photo of a handwritten digit", 1800, 1500


def paths(prompt: str, count: int, folder: Path) -> list[Path]:
    """The pictures of a prompt, drawn unless they are there."""
    usual = default_sampler(DIGITS)
    requests = [
        ImageRequest(folder / f"{n:05d}.png", prompt, image_seed(EVALUATE_SEEDS, 0, prompt, n)) for n in range(count)
    ]
    generate_missing(base, requests, Sampler(usual.steps, usual.guidance_scale, usual.batch_size), folder.name)
    return [request.path for request in requests]


@cache
def base() -> Base:
    return load_base(DIGITS, device="cpu")


def pool(digit: str, count: int) -> tuple[Embedded, np.ndarray]:
    """Embeddings of the concept's pictures and of the generic prompt's, and which of the latter show the concept."""
    concept = paths(f"a photo of the digit {digit}", count, POOL / digit)
    generic = paths(GENERIC, GENERIC_COUNT, POOL / "generic")
    examples = [
        *(Example(path, digit, "positive") for path in concept),
        *(Example(path, GENERIC, "generic") for path in generic),
    ]
    latents, _ = encode_images(base(), examples, base().resolution, POOL / "cache")
    shown = DigitsJudge().read([Image.open(path) for path in generic]).shows(digit)
    return embed(base(), examples, latents), shown


def row(name: str, truth: float, found: list[tuple[Estimate, Estimate]]) -> str:
    """A line of the table: for either method the mean, mean error, mean absolute error and intervals with the truth."""
    cells = []
    for estimates in zip(*found, strict=True):
        betas = np.array([e.beta for e in estimates])
        held = sum(e.low <= truth <= e.high for e in estimates)
        cells += [
            f"{betas.mean():.3f}",
            f"{betas.mean() - truth:+.3f}",
            f"{np.abs(betas - truth).mean():.3f}",
            f"{held} of {len(estimates)}",
        ]
    return f"| {name} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--digit", default="seven", help="the concept, e.g. nine, which is harder (default: seven)")
    parser.add_argument("--positives", type=int, default=200)
    parser.add_argument("--unlabeled", type=int, default=500)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--pool", type=int, default=CONCEPT_COUNT, help="pictures of the concept to draw from")
    parser.add_argument("--contamination", type=float, nargs="+", default=[0.05, 0.1, 0.2, 0.4])
    asked = parser.parse_args()
    images, shown = pool(asked.digit, asked.pool)
    others = images.unlabeled[~shown]

    def one(seed: int, share: float | None) -> tuple[Estimate, Estimate]:
        rng = np.random.default_rng(seed)
        concept = rng.permutation(images.positive)
        positive, rest = concept[: asked.positives], concept[asked.positives :]
        hidden = 0 if share is None else round(share * asked.unlabeled)
        more = rng.permutation(images.unlabeled if share is None else others)[: asked.unlabeled - hidden]
        unlabeled = np.concatenate([rest[:hidden], more])
        return estimate_beta(Embedded(images.name, images.why, positive, unlabeled))

    print(
        f"{asked.digit}: {asked.positives} positives, {asked.unlabeled} unlabeled, {asked.draws} draws; {images.name}"
    )
    print("| truth | BBE mean | error | absolute | holds truth | Elkan-Noto mean | error | absolute | holds truth |")
    print("|---|---|---|---|---|---|---|---|---|")
    for share in asked.contamination:
        print(row(f"{share:.0%}", share, [one(seed, share) for seed in range(asked.draws)]), flush=True)
    drawn = float(shown.mean())
    print(row(f"{drawn:.1%}, generic prompt", drawn, [one(seed, None) for seed in range(asked.draws)]))


if __name__ == "__main__":
    sys.exit(main())
