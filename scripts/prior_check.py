"""Check `--beta estimate` on image sets with a known share of the concept, and print a table.

    python scripts/prior_check.py                  # 5 minutes to generate images the first time, then 3 minutes
    python scripts/prior_check.py --positives 20   # with few positives

Each repetition samples positives and unlabeled images, some of which show the concept, from a pool of images of the
bundled base, without using an image twice. The pool is kept in build/prior_check. The last line of the table is not a
mixture but the case of `render`: images of the generic prompt, some of which show the concept. The bundled classifier
counts their share.
"""

from __future__ import annotations

import argparse
from functools import cache
from pathlib import Path

import numpy as np

from sd_unlearn.data.dataset import Example
from sd_unlearn.data.embeddings import Embedder
from sd_unlearn.data.encoding import encode_images
from sd_unlearn.data.prior import BetaEstimate, ImageEmbeddings, estimate_beta
from sd_unlearn.io.images import open_image
from sd_unlearn.metrics.digits import DigitsClassifier
from sd_unlearn.models.base import Base, load_base
from sd_unlearn.models.sampling import ImageRequest, default_sampler, generate_missing
from sd_unlearn.models.source import DIGITS
from sd_unlearn.seeds import EVALUATE_SEEDS, image_seed

POOL = Path("build/prior_check")
GENERIC, GENERIC_COUNT, CONCEPT_COUNT = "a photo of a handwritten digit", 1800, 1500


def paths(prompt: str, count: int, folder: Path) -> list[Path]:
    """Generate the images of a prompt that do not exist yet, and return the paths of all."""
    requests = [
        ImageRequest(folder / f"{n:05d}.png", prompt, image_seed(EVALUATE_SEEDS, 0, prompt, n)) for n in range(count)
    ]
    generate_missing(base, requests, default_sampler(DIGITS), folder.name)
    return [request.path for request in requests]


@cache
def base() -> Base:
    return load_base(DIGITS, device="cpu")


def pool(digit: str, count: int) -> tuple[ImageEmbeddings, np.ndarray]:
    """Embeddings of images of the concept and of the generic prompt, and which of the latter show the concept."""
    concept = paths(f"a photo of the digit {digit}", count, POOL / digit)
    generic = paths(GENERIC, GENERIC_COUNT, POOL / "generic")
    examples = [
        *(Example(path, digit, "positive") for path in concept),
        *(Example(path, GENERIC, "generic") for path in generic),
    ]
    latents, _ = encode_images(base(), examples, base().resolution, POOL / "cache")
    shown = DigitsClassifier().read([open_image(path) for path in generic]).shows(digit)
    return Embedder(base(), latents).embed(examples), shown


def row(name: str, truth: float, estimates: list[tuple[BetaEstimate, BetaEstimate]]) -> str:
    """A line of the table: for each method the mean, mean error, mean absolute error, and how many intervals hold the
    true share."""
    cells = []
    for method in zip(*estimates, strict=True):
        betas = np.array([estimate.beta for estimate in method])
        covered = sum(estimate.low <= truth <= estimate.high for estimate in method)
        cells += [
            f"{betas.mean():.3f}",
            f"{betas.mean() - truth:+.3f}",
            f"{np.abs(betas - truth).mean():.3f}",
            f"{covered} of {len(method)}",
        ]
    return f"| {name} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--digit", default="seven", help="the concept (default: seven; nine is harder)")
    parser.add_argument("--positives", type=int, default=200)
    parser.add_argument("--unlabeled", type=int, default=500)
    parser.add_argument("--draws", type=int, default=10, help="repetitions per share")
    parser.add_argument("--pool", type=int, default=CONCEPT_COUNT, help="images of the concept in the pool")
    parser.add_argument("--contamination", type=float, nargs="+", default=[0.05, 0.1, 0.2, 0.4])
    args = parser.parse_args()
    images, shown = pool(args.digit, args.pool)
    others = images.unlabeled[~shown]

    def one(seed: int, share: float | None) -> tuple[BetaEstimate, BetaEstimate]:
        rng = np.random.default_rng(seed)
        concept = rng.permutation(images.positive)
        positive, rest = concept[: args.positives], concept[args.positives :]
        hidden = 0 if share is None else round(share * args.unlabeled)
        more = rng.permutation(images.unlabeled if share is None else others)[: args.unlabeled - hidden]
        unlabeled = np.concatenate([rest[:hidden], more])
        return estimate_beta(ImageEmbeddings(images.name, images.why, positive, unlabeled))

    print(f"{args.digit}: {args.positives} positives, {args.unlabeled} unlabeled, {args.draws} draws; {images.name}")
    columns = "mean | error | absolute error | interval covers"
    print(f"| true share | BBE {columns} | Elkan-Noto {columns} |")
    print("|---|---|---|---|---|---|---|---|---|")
    for share in args.contamination:
        print(row(f"{share:.0%}", share, [one(seed, share) for seed in range(args.draws)]), flush=True)
    share = float(shown.mean())
    print(row(f"{share:.1%}, generic prompt", share, [one(seed, None) for seed in range(args.draws)]))


if __name__ == "__main__":
    main()
