"""Seeds of generated images. Each purpose has its own range, so evaluation never uses noise seen in training."""

from __future__ import annotations

import hashlib

SEED_SPAN = 1_000_000_000
RENDER_SEEDS = (0, SEED_SPAN)
TRAIN_SEEDS = (SEED_SPAN, 2 * SEED_SPAN)
EVALUATE_SEEDS = (2 * SEED_SPAN, 3 * SEED_SPAN)
ATTACK_SEEDS = (3 * SEED_SPAN, 4 * SEED_SPAN)  # of an attacker's own images of the concept


def image_seed(span: tuple[int, int], seed: int, prompt: str, index: int) -> int:
    """Seed of the index-th image of a prompt, within the range `span`; independent of the other images."""
    digest = hashlib.blake2b(f"{seed}\0{prompt}\0{index}".encode(), digest_size=8).digest()
    return span[0] + int.from_bytes(digest, "big") % (span[1] - span[0])
