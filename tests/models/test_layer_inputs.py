"""The recorded moments of layers' inputs, compared with inputs that were collected by hand."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from flow_kinds import FlowKinds
from torch import Tensor, nn
from torch.nn.functional import unfold

from sd_unlearn.models.base import load_base
from sd_unlearn.models.layer_inputs import LayerInputs, rows_of_prompts
from sd_unlearn.models.sampling import Sampler, generate_images

pytestmark = pytest.mark.usefixtures("one_thread")


class Block(nn.Module):
    """Keys and values get one tensor, `own` an equal one, `late` the same one after it was changed in place."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("key", "value", "own", "late"):
            setattr(self, name, nn.Linear(4, 3, bias=False))
        self.conv = nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, x: Tensor) -> None:  # [images, 4, h, w]
        tokens = x.flatten(2).movedim(1, -1).contiguous()
        for layer in (self.key, self.value):
            layer(tokens)
        self.own(tokens.clone())
        tokens += 1
        self.late(tokens)
        self.conv(x)


def recorded(calls: list[Tensor], **changes: Any) -> tuple[LayerInputs, dict[str, Tensor]]:
    block = Block()
    layers = {name: layer for name, layer in block.named_modules() if name}
    torch.manual_seed(0)
    downs = {"conv": torch.randn(2, 4 * 9)}
    inputs = LayerInputs(layers, dict.fromkeys(layers) | changes.pop("groups", {}), downs)
    options = {"weights": dict.fromkeys(layers, 1.0), "factors": {}, "rows": lambda x: x} | changes
    with torch.no_grad(), inputs.recording(**options) as products:
        for x in calls:
            block(x)
    return inputs, products


def images(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 4, 5, 5, generator=torch.Generator().manual_seed(seed))


def moment(x: Tensor) -> Tensor:
    """The sum over images [images, 4, h, w] of the mean x x' of their positions."""
    tokens = x.flatten(2).movedim(1, -1)
    return torch.stack([rows.T @ rows / len(rows) for rows in tokens]).sum(0)


def test_moments_add_up_over_calls_with_their_weights() -> None:
    first, second = images(3), images(1, seed=1)
    inputs, _ = recorded([first, second], weights={"key": 0.5, "late": 1.0})
    assert torch.allclose(inputs.total("key"), 0.5 * (moment(first) + moment(second)), atol=1e-5)
    assert torch.allclose(inputs.total("late"), moment(first + 1) + moment(second + 1), atol=1e-5)


def test_layers_share_a_matrix_if_they_get_the_same_tensor() -> None:
    inputs, _ = recorded([images(2), images(2)])
    assert inputs.total("key") is inputs.total("value")
    assert inputs.total("key") is not inputs.total("own")
    assert torch.allclose(inputs.total("key"), inputs.total("own"))
    apart, _ = recorded([images(2)], groups={"key": "another"})
    assert apart.total("key") is not apart.total("value")


def test_products_are_those_of_the_factors() -> None:
    factor = torch.randn(2, 4)
    inputs, products = recorded([images(2), images(3, seed=1)], factors={"value": factor, "conv": torch.eye(2)})
    assert torch.allclose(products["value"], factor @ inputs.total("value"), atol=1e-5)
    assert torch.allclose(products["conv"], inputs.total("conv"), atol=1e-5)
    assert products.keys() == {"value", "conv"}


def test_a_convolution_is_seen_through_its_downs() -> None:
    x = images(2)
    inputs, _ = recorded([x])
    z = (inputs.downs["conv"] @ unfold(x, 3, padding=1)).unflatten(2, (5, 5))
    assert torch.allclose(inputs.total("conv"), moment(z), rtol=1e-4)


def test_half_precision_is_not_rounded_further() -> None:
    x = images(2).bfloat16()
    layer = nn.Conv2d(4, 3, 3, padding=1).bfloat16()
    inputs = LayerInputs({"conv": layer}, {"conv": None}, {"conv": torch.randn(2, 4 * 9)})
    with torch.no_grad(), inputs.recording({"conv": 1.0}, {}, lambda x: x):
        layer(x)
    z = (inputs.downs["conv"] @ unfold(x.float(), 3, padding=1)).unflatten(2, (5, 5))
    assert torch.allclose(inputs.total("conv"), moment(z), rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("tiny", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"),
        ("sd35", "context_embedder"),
        ("z-image", "cap_embedder.1"),
        ("flux2-klein-base", "context_embedder"),
        ("qwen-image", "txt_in"),
    ],
)
def test_the_rows_of_prompts_leave_out_the_empty_caption(
    tiny_base: Path, flow_kinds: FlowKinds, name: str, layer: str
) -> None:
    base = load_base(str(tiny_base if name == "tiny" else flow_kinds.folder(name)), device="cpu")

    def captions(guidance: float, of_prompts: bool) -> list[Tensor]:
        """What the layer gets in each pass, without passes of no rows."""
        found: list[Tensor] = []
        with rows_of_prompts(base) as rows:
            hook = base.network.get_submodule(layer).register_forward_pre_hook(
                lambda _, inputs: found.append(rows(inputs[0]) if of_prompts else inputs[0])
            )
            generate_images(base, ["a", "b"], [0, 1], Sampler(2, guidance, 2, 64))
            hook.remove()
        return [x for x in found if len(x)]

    alone = captions(0.0, of_prompts=False)
    guided = captions(3.0, of_prompts=True)
    assert len(alone) == len(guided) == 2
    for x, y in zip(alone, guided, strict=True):
        assert torch.allclose(x, y, atol=1e-6)
    assert sum(map(len, captions(3.0, of_prompts=False))) > sum(map(len, guided))


def test_what_an_attempt_recorded_before_it_failed_does_not_count() -> None:
    block, x = Block(), images(2)
    inputs = LayerInputs({"key": block.key}, {"key": None}, {})
    for fails in (False, True, False):
        with contextlib.suppress(MemoryError), torch.no_grad(), inputs.recording({"key": 1.0}, {}, lambda x: x):
            block(x)
            if fails:
                raise MemoryError
    assert torch.allclose(inputs.total("key"), 2 * moment(x), atol=1e-5)
