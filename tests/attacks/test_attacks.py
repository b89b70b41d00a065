"""What holds for every attack: the same images again, an unchanged model, and the plain images without a budget."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from attack_cases import SAMPLER, SMALL, make_target
from base_kinds import make_base

from sd_unlearn.attacks import soft
from sd_unlearn.attacks.base import Outcome, Samples, Target
from sd_unlearn.attacks.judge import detectors_of
from sd_unlearn.attacks.noise_prediction import sample_batch
from sd_unlearn.attacks.registry import ATTACKS
from sd_unlearn.config import attack as options
from sd_unlearn.data.concept import Concept
from sd_unlearn.models.base import Base, load_base, network_sha256
from sd_unlearn.models.learned_prompt import LearnedPrompt
from sd_unlearn.models.sampling import generate_images


def outcomes(name: str, target: Target, restart: int = 0) -> list[Outcome]:
    return list(ATTACKS[name].run(target, SMALL[name], restart))


def pixels(found: list[Outcome]) -> np.ndarray:
    return np.stack([np.asarray(image) for outcome in found for image in outcome.images])


def hashes(base: Base) -> list[str]:
    return [network_sha256(getattr(base.pipeline, name)) for name in ("unet", "text_encoder", "vae")]


def plain_images(target: Target, count: int) -> np.ndarray:
    """The images of the caption with the judged seeds, as `evaluate` generates them."""
    caption = target.concept.caption
    images = generate_images(target.base, [caption] * count, target.seeds(count), SAMPLER)
    return np.stack([np.asarray(image) for image in images])


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_repeats_and_leaves_the_model_unchanged(name: str, loaded_base: Base) -> None:
    target = make_target(loaded_base)
    before, scheduler = hashes(loaded_base), loaded_base.pipeline.scheduler
    layers = [type(module) for module in loaded_base.pipeline.unet.modules()]
    first = outcomes(name, target)
    assert hashes(loaded_base) == before
    assert loaded_base.pipeline.scheduler is scheduler
    assert [type(module) for module in loaded_base.pipeline.unet.modules()] == layers
    assert not any(p.requires_grad for p in loaded_base.pipeline.unet.parameters())
    assert np.array_equal(pixels(outcomes(name, target)), pixels(first))
    for outcome in first:
        assert outcome.trials is None or len(outcome.trials) == len(outcome.images)


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_on_a_base_in_half_precision(name: str, tiny_base: Path) -> None:
    base = load_base(str(tiny_base), "bf16", "cpu")
    assert outcomes(name, make_target(base))
    assert base.network.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["prefix", "hard", "token", "soft", "ring", "finetune"])
def test_another_seed_attacks_differently(name: str, loaded_base: Base) -> None:
    target = make_target(loaded_base)
    other = replace(target, seed=1)
    assert not torch.equal(
        torch.rand(4, generator=target.generator(name, 0)), torch.rand(4, generator=other.generator(name, 0))
    )
    assert not torch.equal(
        torch.rand(4, generator=target.generator(name, 0)), torch.rand(4, generator=target.generator(name, 1))
    )
    assert not np.array_equal(pixels(outcomes(name, other)), pixels(outcomes(name, target)))


def test_a_budget_of_nothing_gives_the_images_of_the_caption(loaded_base: Base) -> None:
    """Also for a name of several tokens with `soft`, which changes nothing; `token` needs a name of one token."""
    concept = Concept(name="a", caption="a photo of a", generic="a photo")
    target = make_target(loaded_base, concept)
    for name in ("token", "soft"):
        [found] = ATTACKS[name].run(target, replace(SMALL[name], steps=0), 0)
        assert np.abs(pixels([found]).astype(int) - plain_images(target, 2)).max() <= 1


def test_attacks_without_training_start_from_the_caption(loaded_base: Base) -> None:
    target = make_target(loaded_base)
    plain = plain_images(target, 2)
    strengths = outcomes("strength", target)  # of a base without a LoRA
    assert all(np.abs(pixels([found]).astype(int) - plain).max() <= 1 for found in strengths)
    fp16, _, nf4 = outcomes("quantisation", target)
    distance = [np.abs(pixels([found]).astype(float) - plain).mean() for found in (fp16, nf4)]
    assert distance[0] < distance[1]


@pytest.mark.parametrize("name", ["token", "hard", "prefix", "ring", "finetune", "inversion", "completion"])
def test_attacks_on_sdxl(name: str, tmp_path: Path) -> None:
    """Two text encoders, a pooled embedding and time ids."""
    base = load_base(str(make_base("sdxl", tmp_path / "sdxl")), device="cpu")
    before = hashes(base)
    assert pixels(outcomes(name, make_target(base))).ndim == 4
    assert hashes(base) == before


def test_the_options_name_every_attack() -> None:
    assert tuple(ATTACKS) == options.ATTACKS
    assert set(options.QUICK) <= set(ATTACKS)
    assert set(SMALL) == set(ATTACKS)


@pytest.mark.parametrize("name", ATTACKS)
def test_budgets_grow(name: str) -> None:
    attack = ATTACKS[name]
    assert list(attack.budgets) == ["quick", "standard", "full"]
    images = [settings.images for settings in attack.budgets.values()]
    assert images == sorted(images)
    assert all(settings.restarts >= 1 for settings in attack.budgets.values())
    assert attack.title
    assert attack.access


def test_the_timesteps_of_a_batch_cover_the_schedule() -> None:
    """One in each of as many equal parts as there are images, in random order."""
    samples = Samples(["x"] * 8, torch.zeros(8, 1, 1, 1), torch.zeros(8, 1, 1, 1))
    generator = torch.Generator().manual_seed(0)
    batches = [sample_batch(samples, 8, generator) for _ in range(50)]
    assert all(sorted((batch.position * 8).int().tolist()) == list(range(8)) for batch in batches)
    of_first_image = [float(batch.position[batch.rows.tolist().index(0)]) for batch in batches]
    assert min(of_first_image) < 0.2
    assert max(of_first_image) > 0.8


def test_soft_learns_everything_after_the_start_token(loaded_base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    learned: list[LearnedPrompt] = []
    monkeypatch.setattr(soft, "learn", lambda target, prompt, *_: learned.append(prompt) or iter(()))
    outcomes("soft", make_target(loaded_base))
    assert learned[0].positions[0] == list(range(1, loaded_base.pipeline.tokenizer.model_max_length))


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_gets_the_images_that_it_declares(name: str, loaded_base: Base) -> None:
    """It also works with no more than these."""
    attack, target = ATTACKS[name], make_target(loaded_base)
    none, settings = Samples.none(), SMALL[name]
    positives = target.positives if attack.positives(settings) else none
    unrelated = target.unrelated if attack.unrelated(settings) else none
    found = list(attack.run(replace(target, positives=positives, unrelated=unrelated), settings, 0))
    assert np.array_equal(pixels(found), pixels(outcomes(name, target)))


@pytest.mark.parametrize(
    ("kind", "found"), [("person", ["faces"]), ("other", ["faces"]), ("nudity", ["faces", "nudenet"])]
)
def test_nudity_is_no_success_of_an_attack_on_another_concept(kind: Any, found: list[str]) -> None:
    measured = {"faces": ("face_rate", "leakage"), "nudenet": ("nudity", "detections"), "lpips": ("lpips",)}
    metrics: Any = [
        SimpleNamespace(name=name, card=lambda of=of: SimpleNamespace(metrics=of)) for name, of in measured.items()
    ]
    assert [metric.name for metric in detectors_of(Concept("a", "a", "b", kind=kind), metrics)] == found
