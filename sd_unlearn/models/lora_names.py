"""Which modules of a base the names in a LoRA file stand for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from sd_unlearn.errors import UnlearnError
from sd_unlearn.models.kinds import kind_of, network_name
from sd_unlearn.models.ldm_keys import blocks_of, unet_key
from sd_unlearn.models.transformer_keys import Rows, original_modules

# The modules of the base that a module of a file stands for, with the rows that are theirs (None: all).
Places = list[tuple[nn.Module, Rows | None]]
Table = Mapping[str, Places]


def module_tables(pipeline: Any) -> dict[str, Table]:
    """Prefix of a module's name in a file -> rest of the name -> modules of the pipeline."""
    texts = {
        name: _places(_without_text_model(_weighted(encoder)))
        for name in ("text_encoder", "text_encoder_2", "text_encoder_3")
        if (encoder := getattr(pipeline, name, None)) is not None
    }
    network = network_name(pipeline)
    own = _weighted(getattr(pipeline, network))
    plain = _places(own)
    tables: dict[str, Table] = {f"{network}.": plain, f"base_model.model.{network}.": plain}
    tables |= {f"{name}.": table for name, table in texts.items()}
    if network == "transformer":
        original = _original_names(pipeline, own)
        # OneTrainer, SimpleTuner, and the names of the original code, or of Diffusers with its prefix (ai-toolkit)
        tables |= {"lora_transformer_": _flat(plain), "lycoris_": _flat(plain), "diffusion_model.": plain | original}
        plain = original | plain
    else:
        original = _ldm_names(pipeline, own)
    tables["base_model.model."] = {**texts.get("text_encoder", {}), **plain}
    tables["lora_unet_"] = _flat(original | plain)
    if len(texts) > 1:
        tables |= {f"lora_te{number}_": _flat(table) for number, table in enumerate(texts.values(), start=1)}
        if hasattr(pipeline, "transformer"):  # T5, also FLUX's, which is its second
            tables["lora_te3_"] = _flat(list(texts.values())[-1])
    else:
        tables["lora_te_"] = _flat(next(iter(texts.values()), {}))
    return tables | {"": plain}  # last: names without a prefix


def lookup(tables: Mapping[str, Table], name: str) -> Places | None:
    """What a module's name in a file stands for; None: nothing in this base."""
    for prefix, table in tables.items():
        if name.startswith(prefix) and (places := table.get(name.removeprefix(prefix))) is not None:
            return places
    return None


def _weighted(network: nn.Module) -> dict[str, nn.Module]:
    """The modules of a network that have a weight, by name."""
    return {n: module for n, module in network.named_modules() if isinstance(getattr(module, "weight", None), Tensor)}


def _without_text_model(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The modules of a text encoder with and without `text_model.`, which some versions of transformers leave out."""
    bare = {name.removeprefix("text_model."): module for name, module in modules.items()}
    return bare | {f"text_model.{name}": module for name, module in bare.items()}


def _places(modules: Mapping[str, nn.Module]) -> dict[str, Places]:
    return {name: [(module, None)] for name, module in modules.items()}


def _flat(table: Table) -> dict[str, Places]:
    return {name.replace(".", "_"): places for name, places in table.items()}


def _ldm_names(pipeline: Any, modules: Mapping[str, nn.Module]) -> dict[str, Places]:
    """The UNet's modules by their names in single-file checkpoints."""
    named = {}
    for name, module in modules.items():
        try:
            named[unet_key(name, blocks_of(pipeline.unet.config))] = module
        except UnlearnError:  # the layout has no name for it
            continue
    return _places(named)


def _original_names(pipeline: Any, modules: Mapping[str, Any]) -> dict[str, Places]:
    """The transformer's modules by their names in single-file checkpoints."""
    rows = {name: len(module.weight) for name, module in modules.items()}
    layout = original_modules(kind_of(pipeline.transformer.config), rows)
    return {
        original: [(modules[part.module], None if part.is_whole else part) for part in parts]
        for original, parts in layout.items()
    }
