"""Second moments E[x x'] of the inputs of layers, recorded while a base generates images.

Layers that get the same tensor (queries, keys and values of self-attention; keys and values of all cross-attentions)
share one matrix. The matrices are in float32 in the computer's memory.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from sd_unlearn.models.base import Base

Rows = Callable[[Tensor], Tensor]


@dataclass
class LayerInputs:
    """The sum of weighted moments of each layer, over all recordings.

    A row x is a token of an image. Of a convolution it is a position, as its downs see it: z = downs x in place of x,
    because the moments of whole patches would be too large.
    """

    layers: Mapping[str, nn.Module]  # linear layers and convolutions, by name
    groups: Mapping[str, Hashable]  # layers share a matrix only within a group: those that are recorded equally
    downs: Mapping[str, Tensor]  # of each convolution, [R, in * kernel]
    _sums: dict[str, Tensor] = field(default_factory=dict)
    _owners: dict[str, str] = field(default_factory=dict)  # layer -> the layer that its matrix is recorded at

    def total(self, name: str) -> Tensor:
        """The sum of the weighted moments of a layer's inputs, [in, in], of a convolution [R, R]; not to be changed."""
        return self._sums[self._owners[name]]

    @contextmanager
    def recording(
        self, weights: Mapping[str, float], factors: Mapping[str, Tensor], rows: Rows
    ) -> Iterator[dict[str, Tensor]]:
        """Record the layers that have a weight: add the weight times the sum over images of an image's mean x x'.

        Nothing is added if the block raises an error, so that a batch that ran out of memory can be repeated.

        factors: F of some layers, [r, in]. rows: selects from an input [images, ...] what is recorded.
        Yields, filled within the block: layer -> F times what is added to its sum, [r, in].
        """
        added: dict[str, Tensor] = {}
        products: dict[str, Tensor] = {}
        seen = WeakTensorKeyDictionary()

        def hook(name: str) -> Any:
            def record(module: Any, inputs: tuple[Any, ...]) -> None:
                owner, x = self._owner(name, inputs[0], seen), rows(inputs[0].detach()).float()
                images = len(x)
                if name in self.downs:
                    weight = self.downs[name].to(x).unflatten(1, module.weight.shape[1:])
                    x = module._conv_forward(x, weight, None).movedim(1, -1)
                x = x.flatten(0, -2)
                weighted = x * (weights[name] * images / max(1, len(x)))
                if owner == name:
                    add_to(added, name, weighted.T @ x)
                if name in factors:
                    add_to(products, name, (weighted @ factors[name].to(x).T).T @ x)

            return record

        with ExitStack() as stack:
            for name in weights:
                stack.callback(self.layers[name].register_forward_pre_hook(hook(name)).remove)
            yield products
        for name, moment in added.items():
            add_to(self._sums, name, moment)

    def _owner(self, name: str, x: Tensor, seen: Any) -> str:
        """The layer of the group that got this tensor first. seen: tensor -> (its version, group -> layer)."""
        if name in self.downs:
            return self._owners.setdefault(name, name)
        version, layers = seen.get(x, (None, {}))
        if version != x._version:  # a new tensor, or changed in place
            layers = {}
            seen[x] = x._version, layers
        found = layers.setdefault(self.groups[name], name)
        owner = self._owners.setdefault(name, found)
        assert owner in (name, found), f"{name} and {owner} do not always get the same input"
        return owner


def add_to(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    """Add a value to the sum of a layer, in the computer's memory. The first value becomes the sum itself."""
    value = value.cpu()
    sums[name] = sums[name].add_(value) if name in sums else value


@contextmanager
def rows_of_prompts(base: Base) -> Iterator[Rows]:
    """Within the block: selects the rows of the prompts where guidance also runs the network on the empty caption."""
    last, is_prompt = None, True

    def note(network: Any, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal last, is_prompt
        timestep = float(kwargs["timestep"][0])
        last, is_prompt = timestep, timestep != last

    if base.properties.prompts_in == "first pass":
        handle = base.network.register_forward_pre_hook(note, with_kwargs=True)
        try:
            yield lambda x: x if is_prompt else x[:0]
        finally:
            handle.remove()
    else:
        half = 0 if base.properties.prompts_in == "first half" else 1
        yield lambda x: x.chunk(2)[half]
