"""A new LoRA: reproducible, and without an effect on other random numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sd_unlearn.config.objective import Weights
from sd_unlearn.models.lora import attach


def test_a_new_lora_leaves_random_numbers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the CPU, and those of GPUs, from which every process draws its own dropout."""
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("a GPU was seeded"))
    networks = [nn.Sequential(nn.Linear(4, 4)) for _ in range(2)]
    before = torch.random.get_rng_state()
    first, again = (attach(network, Weights(rank=2), ["0"], seed=1) for network in networks)
    assert torch.equal(torch.random.get_rng_state(), before)
    name = "base_model.model.0.lora_A.default.weight"
    assert torch.equal(first.get_parameter(name), again.get_parameter(name))
