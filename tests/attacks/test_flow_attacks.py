"""Attacks on flow-matching bases: the same images again, an unchanged model; and which attacks do not work there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest
import torch
from attack_cases import SMALL, make_target
from flow_kinds import FlowKinds

from sd_unlearn.attacks.base import needs_one_vocabulary
from sd_unlearn.attacks.inversion import invert
from sd_unlearn.attacks.noise_prediction import noise_loss, sample_batch
from sd_unlearn.attacks.registry import ATTACKS
from sd_unlearn.attacks.runner import _supported
from sd_unlearn.attacks.token import position
from sd_unlearn.config.attack import AttackConfig
from sd_unlearn.data.encoding import encode_captions
from sd_unlearn.errors import UsageError
from sd_unlearn.models.base import Base, load_base, network_sha256
from sd_unlearn.models.learned_prompt import LearnedPrompt, embedding_table, learned_positions, tokenizers

pytestmark = pytest.mark.usefixtures("one_thread")
BASES = {"sd3-without-t5": set(ATTACKS) - {"noise"}}
BASES |= dict.fromkeys(
    ("flux-dev", "z-image", "flux2-dev", "flux2-klein-base", "qwen-image"),
    set(ATTACKS) - {"noise", "prefix", "hard", "ring"},
)


def loaded(flow_kinds: FlowKinds, name: str) -> Base:
    base = load_base(str(flow_kinds.folder(name)), device="cpu")
    base.own_resolution = 64  # Qwen-Image's configuration has none
    return base


@pytest.fixture(scope="module")
def cached(flow_kinds: FlowKinds) -> Callable[[str], Base]:
    """Bases that attacks have in common, because an attack leaves them unchanged."""
    return cache(partial(loaded, flow_kinds))


@pytest.mark.parametrize(("name", "attack"), [(name, attack) for name, own in BASES.items() for attack in sorted(own)])
def test_an_attack_repeats_and_leaves_the_model_unchanged(
    cached: Callable[[str], Base], name: str, attack: str
) -> None:
    base = cached(name)
    target = make_target(base)
    before = network_sha256(base.network, *base.text_encoders)
    found = [list(ATTACKS[attack].run(target, SMALL[attack], 0)) for _ in range(2)]
    images = [np.stack([np.asarray(image) for outcome in one for image in outcome.images]) for one in found]
    assert np.array_equal(*images)
    assert network_sha256(base.network, *base.text_encoders) == before
    assert not any(parameter.requires_grad for parameter in base.network.parameters())


def test_attacks_that_do_not_work_are_left_out_or_refused(
    flow_kinds: FlowKinds, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, wanted in (BASES | {"sd35": BASES["flux-dev"]}).items():
        record = loaded(flow_kinds, name).describe()
        assert set(_supported(AttackConfig(), record, list(ATTACKS))) == wanted
    assert "Left out: the attack noise, because a base of kind sd3 is not sampled with DDIM" in capsys.readouterr().err
    with pytest.raises(
        UsageError, match="--attacks ring does not work on sd35: CLIP and T5 do not have the same tokens"
    ):
        _supported(AttackConfig(attacks=["ring"]), record, ["ring"])
    assert not needs_one_vocabulary({"kind": "sd1"})


@pytest.mark.parametrize("name", ["z-image", "flux2-dev", "flux2-klein-base", "qwen-image"])
def test_the_learned_token_and_prompt_are_in_the_chat_template(flow_kinds: FlowKinds, name: str) -> None:
    base = loaded(flow_kinds, name)
    (tokenizer,), conditioning = tokenizers(base), base.conditioning
    ids, _ = conditioning.tokenized(base.pipeline.tokenizer, "an image of x in red")
    place = position(base.pipeline.tokenizer, "an image of ", " in red", conditioning)
    assert ids[place] == tokenizer("x", add_special_tokens=False).input_ids[0]
    prompt = LearnedPrompt(base, "an image of x in red", [[place]])
    plain = encode_captions(base, ["an image of x in red"])
    assert torch.allclose(prompt.encode(), plain, atol=1e-6)
    prompt.start_from(lambda own: own("z", add_special_tokens=False).input_ids)
    assert torch.allclose(prompt.encode(), encode_captions(base, ["an image of z in red"]), atol=1e-5)
    whole = LearnedPrompt(base, "red", learned_positions(base, "red"))
    assert len(whole.positions[0]) == (
        511 if name.startswith("flux2") else sum(conditioning.tokenized(tokenizer, "red")[1]) - 1
    )
    (gradient,) = torch.autograd.grad(whole.encode().square().sum(), whole.vectors)
    assert gradient.any(1).all()


def test_the_learned_token_is_at_its_place_in_every_tokenizer(flow_kinds: FlowKinds) -> None:
    base = loaded(flow_kinds, "sd35")
    places = [[position(own, "an image of ", " in red")] for own in tokenizers(base)]
    assert places == [[10], [10], [12]]  # CLIP: start token, letters without spaces; T5: no start token, spaces
    prompt = LearnedPrompt(base, "an image of x in red", places)
    plain = encode_captions(base, ["an image of x in red"])
    assert torch.allclose(prompt.encode().float(), plain.float(), atol=1e-6)
    prompt.start_from(lambda own: own("z", add_special_tokens=False).input_ids)
    assert torch.allclose(prompt.encode(), encode_captions(base, ["an image of z in red"]), atol=1e-5)
    loss = prompt.encode().square().sum()
    gradients = torch.autograd.grad(loss, prompt.vectors)
    assert all(gradient.any() for gradient in gradients)  # T5's, too
    assert embedding_table(base.pipeline.text_encoder_3).weight.shape == (300, 24)


@pytest.mark.parametrize("name", ["sd3", "flux-schnell"])
def test_inversion_of_a_straight_flow_is_exact(
    flow_kinds: FlowKinds, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a constant velocity, Euler's steps end one velocity away, however they are spaced."""
    target = make_target(loaded(flow_kinds, name))
    velocity = torch.full_like(target.positives.mean, 0.5)
    monkeypatch.setattr("sd_unlearn.models.denoiser.Denoiser.predict", lambda *_: velocity)
    text = encode_captions(target.base, ["seven"])
    assert torch.allclose(invert(target, target.positives.mean, text), target.positives.mean + velocity, atol=1e-5)


def test_timesteps_are_those_of_the_resolution(flow_kinds: FlowKinds, monkeypatch: pytest.MonkeyPatch) -> None:
    """FLUX's depend on it: images of --resolution are attacked and inverted as they are generated."""
    target = make_target(loaded(flow_kinds, "flux-dev"))
    target = replace(target, sampler=replace(target.sampler, resolution=1024))
    process = target.base.process(1024)
    assert process.at(torch.tensor([0.5])) != target.base.process().at(torch.tensor([0.5]))
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(
        "sd_unlearn.models.denoiser.Denoiser.predict",
        lambda _, noisy, at, __: seen.append(at) or torch.zeros_like(noisy),
    )
    batch = sample_batch(target.positives, 2, torch.Generator().manual_seed(0))
    text = encode_captions(target.base, ["seven"])
    noise_loss(target, batch, text)
    assert torch.equal(seen.pop(), process.at(batch.position))
    invert(target, target.positives.mean[:1], text)
    assert torch.equal(torch.cat(seen), process.at(torch.linspace(0, 1, target.sampler.steps + 1))[:-1])
