"""Noising, targets, per-example losses and timesteps against their closed forms."""

from __future__ import annotations

import pytest
import torch

from sd_unlearn.models.diffusion import (
    Diffusion,
    add_noise,
    min_snr_weight,
    per_example_loss,
    sample_positions,
    training_target,
)

ALPHAS = torch.tensor([1.0, 0.64, 0.36, 0.0])  # square roots 1, 0.8, 0.6, 0


def sample_timesteps(count: int, steps: int, generator: torch.Generator, bias: float = 0.0) -> torch.Tensor:
    return Diffusion(torch.empty(steps)).at(sample_positions(count, generator, bias))


def test_noising_by_hand() -> None:
    x0, noise = torch.full((4, 2, 3, 3), 2.0), torch.full((4, 2, 3, 3), 5.0)
    got = add_noise(x0, noise, torch.arange(4), ALPHAS)
    want = [2.0, 0.8 * 2 + 0.6 * 5, 0.6 * 2 + 0.8 * 5, 5.0]
    assert got.shape == x0.shape
    for image, value in zip(got, want, strict=True):
        assert torch.allclose(image, torch.tensor(value))


def test_each_example_has_its_own_timestep() -> None:
    x0, noise = torch.randn(3, 4), torch.randn(3, 4)
    both = add_noise(x0, noise, torch.tensor([2, 1, 2]), ALPHAS)
    for i, t in enumerate((2, 1, 2)):
        assert torch.equal(both[i : i + 1], add_noise(x0[i : i + 1], noise[i : i + 1], torch.tensor([t]), ALPHAS))


def test_variance_is_preserved() -> None:
    rng = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(20_000, 4, generator=rng) for _ in range(2))
    for t in range(4):
        got = add_noise(x0, noise, torch.full((20_000,), t), ALPHAS)
        assert got.var().item() == pytest.approx(1, abs=0.02)


def test_half_precision_latents_are_noised_in_float32() -> None:
    x0 = torch.ones(2, 4, dtype=torch.float16)
    assert add_noise(x0, torch.ones(2, 4), torch.tensor([1, 2]), ALPHAS).dtype == torch.float32


def test_targets() -> None:
    """With x_t and v, both x_0 = a x_t - s v and eps = s x_t + a v come back (Salimans & Ho 2022, appendix D)."""
    x0, noise, t = torch.randn(4, 2, 3), torch.randn(4, 2, 3), torch.arange(4)
    noisy = add_noise(x0, noise, t, ALPHAS)
    v = training_target(x0, noise, t, ALPHAS, "v_prediction")
    a, s = ALPHAS.sqrt().view(4, 1, 1), (1 - ALPHAS).sqrt().view(4, 1, 1)
    assert torch.allclose(a * noisy - s * v, x0, atol=1e-6)
    assert torch.allclose(s * noisy + a * v, noise, atol=1e-6)
    assert torch.equal(training_target(x0, noise, t, ALPHAS, "epsilon"), noise)
    with pytest.raises(ValueError, match="sample"):
        training_target(x0, noise, t, ALPHAS, "sample")  # type: ignore[arg-type]


def test_noising_and_targets_agree_with_diffusers() -> None:
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(beta_schedule="scaled_linear")
    x0, noise, t = torch.randn(5, 4, 8, 8), torch.randn(5, 4, 8, 8), torch.tensor([0, 1, 500, 900, 999])
    assert torch.allclose(add_noise(x0, noise, t, theirs.alphas_cumprod), theirs.add_noise(x0, noise, t), atol=1e-6)
    v = training_target(x0, noise, t, theirs.alphas_cumprod, "v_prediction")
    assert torch.allclose(v, theirs.get_velocity(x0, noise, t), atol=1e-6)


def test_loss_is_per_example_and_sum_is_mean_times_elements() -> None:
    predicted, target = torch.zeros(3, 4, 8, 8), torch.zeros(3, 4, 8, 8)
    predicted[1], predicted[2, 0, 0, 0] = 2.0, 3.0
    assert per_example_loss(predicted, target).tolist() == [0, 4 * 256, 9]
    predicted, target = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    total, mean = per_example_loss(predicted, target, "sum"), per_example_loss(predicted, target, "mean")
    assert total.shape == (3,)
    assert torch.allclose(total, mean * 4 * 8 * 8)


def test_loss_does_not_overflow_in_half_precision() -> None:
    predicted = torch.full((1, 4, 64, 64), 40.0, dtype=torch.float16)  # 16,384 * 1,600 is above float16's 65,504
    assert per_example_loss(predicted, torch.zeros_like(predicted)).item() == pytest.approx(16_384 * 1600)


@pytest.mark.parametrize("count", [1, 7, 32])
def test_timesteps_are_stratified_in_range_and_uniform_in_each_place(count: int) -> None:
    rng, steps = torch.Generator().manual_seed(0), 1000
    draws = torch.stack([sample_timesteps(count, steps, rng) for _ in range(2000)])
    assert draws.dtype == torch.long
    assert draws.min() >= 0
    assert draws.max() < steps
    slices = (draws * count // steps).sort(1).values  # rounding down may move a draw over a slice's lower edge
    assert ((slices - torch.arange(count)).abs() <= 1).all()
    assert (slices == torch.arange(count)).float().mean() > 0.95
    for place in (0, count - 1):
        tenths = torch.bincount(draws[:, place] * 10 // steps, minlength=10)
        chi_square = ((tenths - 200.0) ** 2 / 200).sum().item()
        assert chi_square < 33.7  # 9 degrees of freedom: passed by chance once in 10,000


def test_stratified_batch_means_vary_less_than_independent_ones() -> None:
    rng = torch.Generator().manual_seed(0)
    means = torch.stack([sample_timesteps(16, 1000, rng).float().mean() for _ in range(500)])
    assert means.std() < 0.2 * (1000 / 12**0.5) / 16**0.5


def test_timesteps_follow_their_generator_alone() -> None:
    first = sample_timesteps(8, 1000, torch.Generator().manual_seed(3))
    torch.manual_seed(99)
    assert torch.equal(first, sample_timesteps(8, 1000, torch.Generator().manual_seed(3)))
    assert not torch.equal(first, sample_timesteps(8, 1000, torch.Generator().manual_seed(4)))


@pytest.mark.parametrize("bias", [0.0, 1.0, 2.5])
def test_biased_timesteps_have_a_density_of_t_to_the_bias(bias: float) -> None:
    draws = sample_timesteps(100_000, 1000, torch.Generator().manual_seed(0), bias).float() / 1000
    for share in (0.25, 0.5, 0.9):
        assert (draws < share).float().mean().item() == pytest.approx(share ** (1 + bias), abs=2e-3)


def test_min_snr_weights_by_hand() -> None:
    """SNRs of ALPHAS: infinite, 16 / 9, 9 / 16, 0."""
    t = torch.arange(4)
    assert torch.allclose(min_snr_weight(t, ALPHAS, 1.0, "epsilon"), torch.tensor([0, 9 / 16, 1, 1]))
    assert torch.allclose(min_snr_weight(t, ALPHAS, 1.0, "v_prediction"), torch.tensor([0, 0.36, 0.36, 0]))
    assert torch.equal(min_snr_weight(t[[2, 0, 2]], ALPHAS, 1.0, "epsilon"), torch.tensor([1.0, 0, 1]))
    with pytest.raises(ValueError, match="sample"):
        min_snr_weight(t, ALPHAS, 1.0, "sample")  # type: ignore[arg-type]


@pytest.mark.parametrize("gamma", [0.5, 5.0, 20.0])
def test_min_snr_weights_agree_with_the_papers_formula(gamma: float) -> None:
    schedule = torch.linspace(0.999, 0.001, 500, dtype=torch.float64)
    t, snr = torch.arange(500), schedule / (1 - schedule)
    for prediction_type, divisor in (("epsilon", snr), ("v_prediction", snr + 1)):
        got = min_snr_weight(t, schedule, gamma, prediction_type)  # type: ignore[arg-type]
        assert torch.allclose(got.double(), snr.clamp(max=gamma) / divisor, rtol=1e-4)


def test_a_loss_weighed_by_min_snr_is_the_same_in_epsilon_and_v() -> None:
    """Both are min(SNR, gamma) |x_0 error|^2, which is what the two weights are for."""
    x0, noise, off, t = torch.randn(2, 4), torch.randn(2, 4), 0.1 * torch.randn(2, 4), torch.tensor([1, 2])
    a, s = ALPHAS[t].sqrt().view(2, 1), (1 - ALPHAS[t]).sqrt().view(2, 1)
    found = []
    for kind, error in (("epsilon", -off * a / s), ("v_prediction", -off / s)):  # of a network that says x_0 + off
        target = training_target(x0, noise, t, ALPHAS, kind)  # type: ignore[arg-type]
        weight = min_snr_weight(t, ALPHAS, 1.0, kind)  # type: ignore[arg-type]
        found.append(weight * per_example_loss(target + error, target))
    assert torch.allclose(found[0], found[1], rtol=1e-4)
    assert torch.allclose(found[0], torch.tensor([1.0, 9 / 16]) * off.square().sum(1), rtol=1e-4)
