"""Skipped steps change nothing; learning rate schedules; the moving average; 8-bit optimizer state."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sd_unlearn.config.loop import Optimizing
from sd_unlearn.config.train import TrainConfig
from sd_unlearn.errors import UsageError
from sd_unlearn.models.counting import LiveBytes
from sd_unlearn.training.optim import (
    GuardedSteps,
    MovingAverage,
    make_optimizer,
    make_schedule,
    set_first_scale,
    set_rates,
)
from sd_unlearn.training.preflight import check_bitsandbytes


def parameters(count: int = 5000) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(count)), nn.Parameter(torch.randn(3, 4))]


def give_gradients(found: list[nn.Parameter], seed: int, bad: float | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    for parameter in found:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    if bad is not None:
        assert found[0].grad is not None
        found[0].grad[7] = bad
    return nn.utils.clip_grad_norm_(found, 1.0)


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_step_with_a_gradient_that_is_not_finite_changes_nothing(kind: str, bad: float) -> None:
    """Good, bad, bad, good gives the same weights, moments and step count as good, good."""
    if kind == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    ends = []
    for gradients in ([(1, None), (2, bad), (3, bad), (4, None)], [(1, None), (4, None)]):
        found = parameters()
        options = Optimizing(optimizer=kind, learning_rate=0.1)  # type: ignore[arg-type]
        guarded = GuardedSteps(make_optimizer(found, options), None, torch.device("cpu"))
        counts = []
        for seed, value in gradients:
            guarded.step(give_gradients(found, seed, value))
            counts.append(guarded.skipped.tolist())
            assert all(p.grad is None or not p.grad.any() for p in found)
        ends.append([p.detach().clone() for p in found])
        last = counts
        if len(gradients) == 4:
            assert last == [[0, 0], [1, 1], [2, 2], [2, 0]]
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))
    assert not torch.equal(ends[0][0], parameters()[0])


def test_eight_bit_state_is_a_quarter_of_the_size() -> None:
    pytest.importorskip("bitsandbytes")
    sizes = {}
    for kind in ("adamw", "adamw8bit"):
        found = parameters(100_000)
        optimizer = make_optimizer(found, Optimizing(optimizer=kind))  # type: ignore[arg-type]
        give_gradients(found, 0)
        optimizer.step()
        tensors = [v for v in optimizer.state[found[0]].values() if isinstance(v, torch.Tensor)]
        sizes[kind] = sum(t.numel() * t.element_size() for t in tensors)
    assert sizes["adamw8bit"] < 0.3 * sizes["adamw"]


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
def test_the_memory_that_is_reserved_is_that_of_the_first_step(kind: str) -> None:
    if kind == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    found = parameters(100_000)
    optimizer = make_optimizer(found, Optimizing(optimizer=kind))  # type: ignore[arg-type]
    with LiveBytes() as reserved:
        GuardedSteps(optimizer, None, torch.device("cpu")).reserve()
    give_gradients(found, 0)
    optimizer.step()
    tensors = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    assert reserved.peak == pytest.approx(sum(t.numel() * t.element_size() for t in tensors), rel=0.05)
    assert reserved.now == 0


def test_a_missing_optimizer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sd_unlearn.training.preflight.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"--optimizer adamw8bit needs bitsandbytes: pip install"):
        check_bitsandbytes(TrainConfig(optimizer="adamw8bit"))
    with pytest.raises(UsageError, match=r"--quantize_base nf4 needs bitsandbytes: .*'\.\[8bit\]'"):
        check_bitsandbytes(TrainConfig(quantize_base="nf4"))
    check_bitsandbytes(TrainConfig(quantize_base="int8"))


@pytest.mark.parametrize(
    ("name", "early", "middle", "end"),
    [
        ("cosine", 0.5, 0.5, 0.0),
        ("linear", 0.5, 0.5, 0.0),
        ("constant", 1.0, 1.0, 1.0),
        ("constant_with_warmup", 0.5, 1.0, 1.0),
    ],
)
def test_schedules(name: str, early: float, middle: float, end: float) -> None:
    options = Optimizing(lr_scheduler=name, lr_warmup_steps=10, max_train_steps=110, learning_rate=1.0)  # type: ignore[arg-type]
    optimizer = make_optimizer(parameters(), options)
    schedule, rates = make_schedule(optimizer, options), []
    for _ in range(110):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    rates.append(schedule.get_last_lr()[0])
    assert (rates[5], rates[60], rates[110]) == pytest.approx((early, middle, end), abs=1e-6)


def test_set_rates_applies_the_options_at_the_current_step() -> None:
    found = parameters()
    old, new = (
        Optimizing(lr_scheduler="linear", lr_warmup_steps=0, max_train_steps=10, learning_rate=rate, weight_decay=rate)
        for rate in (1.0, 0.5)
    )
    optimizer = make_optimizer(found, old)
    schedule = make_schedule(optimizer, old)
    for _ in range(4):
        optimizer.step()
        schedule.step()
    before = optimizer.state_dict()["param_groups"]
    set_rates(optimizer, schedule, old)
    assert optimizer.state_dict()["param_groups"] == before
    set_rates(optimizer, schedule, new)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"], schedule.get_last_lr()) == (pytest.approx(0.3), 0.5, [group["lr"]])
    optimizer.step()
    schedule.step()
    assert group["lr"] == pytest.approx(0.25)


def test_the_moving_average_equals_the_formula() -> None:
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    average = MovingAverage([parameter], 0.5)
    expected = 0.0
    for step in range(1, 30):
        parameter.data.fill_(step)
        average.update()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert average.averages[0].item() == pytest.approx(expected, rel=1e-12)
    average.swap()
    assert (parameter.item(), average.averages[0].item()) == (pytest.approx(expected), 29)
    average.swap()
    assert (parameter.item(), average.averages[0].item()) == (29, pytest.approx(expected))
    again = MovingAverage([parameter], 0.5)
    again.load_state_dict(average.state_dict())
    assert (again.steps, again.averages[0].item()) == (29, average.averages[0].item())


@pytest.mark.parametrize("sums", [True, False])
def test_the_first_gradient_of_a_sum_does_not_overflow_in_half_precision(sums: bool) -> None:
    latents = torch.zeros(2, 4, 64, 64)  # of SD 1.5
    weight = nn.Parameter(torch.zeros(latents[0].numel()))
    scaler = torch.amp.GradScaler("cpu")
    set_first_scale(None, "sum", latents)  # without fp16 there is none
    set_first_scale(scaler, "sum" if sums else "mean", latents)
    assert scaler.get_scale() == (4 if sums else 65536)
    loss = (weight.half().float() - 1).square().sum()
    scaler.scale(loss).backward()
    assert weight.grad is not None
    assert bool(torch.isfinite(weight.grad).all()) == sums
