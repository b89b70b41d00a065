"""`sd-unlearn fuse`: LoRAs that were trained apart become one, written as a run folder like that of a training.

Every linear layer of the UNet or transformer is fused in the same way (objectives/fusing.py), from the inputs that it
sees: of cross-attention's keys and values these are the token embeddings of the captions, of all other layers what they
get while images of the captions are generated. For a convolution, only what the down matrices of its LoRAs give for the
inputs is recorded.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING

from sd_unlearn.config.fuse import FuseConfig
from sd_unlearn.config.options import check_ranges
from sd_unlearn.config.paths import recorded
from sd_unlearn.data.concept import Concept
from sd_unlearn.data.several import together
from sd_unlearn.errors import UnlearnError, UsageError
from sd_unlearn.evaluation.loras import Lora, open_lora
from sd_unlearn.io.files import check_writable, write_json
from sd_unlearn.io.lock import locked, remove_leftovers
from sd_unlearn.io.own_files import check_no_foreign_weights, is_free, is_run
from sd_unlearn.io.run_folder import TRAINING, UNET_DIR
from sd_unlearn.launch import check_one_process
from sd_unlearn.models.base import Base, load_base
from sd_unlearn.models.device import choose_precision
from sd_unlearn.models.recorded_base import different_hash, existing_source
from sd_unlearn.models.zero_terminal_snr import use_zero_terminal_snr
from sd_unlearn.seeds import TRAIN_SEEDS, image_seed

if TYPE_CHECKING:
    from torch import Tensor

    from sd_unlearn.models.layer_inputs import LayerInputs
    from sd_unlearn.objectives.closed_form import Edit

MAX_PROMPTS = 64  # at most, of which images are generated


def run(config: FuseConfig) -> Path:
    """Fuse the LoRAs and write the run folder. Returns the folder.

    Raises:
        UsageError: fewer than two LoRAs, one without a concept or of another base, an output folder that is not free
            or that is one of the LoRAs, or options that contradict each other.
        UnlearnError: a LoRA cannot be fused, or the folder cannot be written.
    """
    check_options(config)
    loras = [open_lora(name, "fuse") for name in config.lora]
    concept = check_loras(loras)
    output = config.output_dir or Path("runs") / f"{concept.slug}-fused"
    check_output(output, config.overwrite, loras)
    first = next((lora for lora in loras if lora.is_run), None)
    if first is None:
        raise UsageError("fuse needs at least one run folder among the LoRAs, which says how to load the base.")
    with locked(output, "--output_dir"):
        check_output(output, config.overwrite, loras)  # again: another process may have finished since
        remove_leftovers(output)
        source = existing_source(first.training["base"], config.allow_pickle, config.pretrained_model_name_or_path)
        base = load_base(replace(source, offload=config.offload), choose_precision(config.mixed_precision))
        for lora in loras:
            if message := lora.other_base(base.hashes | {"name": base.name}):
                raise UsageError(f"{message} Fuse LoRAs of one base.")
        if any(lora.zero_terminal_snr for lora in loras):
            use_zero_terminal_snr(base)
        _fuse(config, loras, concept, base, output)
    return output


def check_options(config: FuseConfig) -> None:
    """Refuse several processes, fewer than two LoRAs, values out of range, and options that --method sum does not use.

    Raises:
        UsageError
    """
    check_one_process("fuse")
    if len(config.lora) < 2:
        raise UsageError("fuse takes two or more LoRAs: sd-unlearn fuse runs/seven runs/three.")
    check_ranges(config)
    for name in ("keep_weight", "num_images") if config.method == "sum" else ():
        if (value := getattr(config, name)) != getattr(FuseConfig, name):
            raise UsageError(f"--{name} {value:g} is for --method least_squares. Leave it out.")


def check_loras(loras: Sequence[Lora]) -> Concept:
    """The concepts of the LoRAs together.

    Raises:
        UsageError: one that does not name its concept or is not a LoRA, different bases or noise schedules.
    """
    for lora in loras:
        if not lora.concepts:
            raise UsageError(f"fuse: {lora.path} does not name the concept it unlearns. Give its run folder.")
        if (lora.path / UNET_DIR).is_dir():
            raise UsageError(f"fuse: {lora.path} was trained with --method full and is not a LoRA.")
        if different_hash(lora.base_hashes, loras[0].base_hashes):
            raise UsageError(f"fuse: {lora.name} was trained on another base than {loras[0].name}.")
    known = {lora.zero_terminal_snr for lora in loras} - {None}
    if len(known) > 1:
        raise UsageError("fuse: some of the LoRAs were trained with --zero_terminal_snr and some without.")
    return together([concept for lora in loras for concept in lora.concepts], "fuse")


def check_output(output: Path, overwrite: bool, loras: Sequence[Lora]) -> None:
    """Refuse a folder that holds files of others, a run without --overwrite, and the folder of one of the LoRAs.

    Raises:
        UsageError
    """
    check_writable(output, "--output_dir")
    folder = output.resolve()
    for lora in loras:
        own = lora.path.resolve()
        if own.is_relative_to(folder) or (lora.is_run and folder.is_relative_to(own)):
            raise UsageError(
                f"--output_dir {output} is, contains or lies inside {lora.path}, one of the LoRAs to fuse. Choose "
                "another folder."
            )
    if is_free(output) or (is_run(output) and overwrite):
        check_no_foreign_weights(output, "--output_dir")
        return
    hint = "add --overwrite" if is_run(output) else "choose another folder"
    raise UsageError(f"--output_dir {output} is not empty: {hint}.")


def _fuse(config: FuseConfig, loras: Sequence[Lora], concept: Concept, base: Base, output: Path) -> None:
    """Compute the fused LoRA and write the run folder: the record that marks it as finished last."""
    from sd_unlearn.models import lora as adapters
    from sd_unlearn.models.student import Student
    from sd_unlearn.training.closed_form import storage_errors
    from sd_unlearn.training.provenance import basic_record, device_name, open_run, peak_memory_mb

    started = time.monotonic()
    changes = [edits_of(lora, base) for lora in loras]
    fused = fuse_changes(config, loras, concept, base, changes)
    rank = config.rank or max(min(*edit.up.shape, *edit.down.shape) for edit in fused.values())
    stored = {name: edit.of_rank(rank) for name, edit in fused.items()}
    seconds = time.monotonic() - started
    errors = storage_errors(list(fused.values()), list(stored.values()))
    student = Student(adapters.attach_factors(base.network, {n: (e.down, e.up) for n, e in stored.items()}))
    settings = recorded(replace(config, output_dir=output, overwrite=False))
    open_run(output, concept, settings)
    student.save(output)
    record = basic_record(config, concept, base) | {
        "objective": "fuse",
        "fuse_method": config.method,
        "zero_terminal_snr": any(lora.zero_terminal_snr for lora in loras),
        "fused": [_part(lora) for lora in loras],
        "method": "lora",
        "rank": rank,
        "lora_alpha": float(rank),
        **errors,
        "cost": {
            "seconds": round(seconds, 1),
            "steps": 0,
            "peak_memory_mb": peak_memory_mb(),
            "device": device_name(base.device),
        },
    }
    write_json(output / TRAINING, record)
    print(
        f"Fused {len(loras)} LoRAs in {seconds:.1f} s (rank {rank}, truncation error "
        f"{errors['truncation_error']:.2g}): {output}.",
        file=sys.stderr,
    )


def _part(lora: Lora) -> dict[str, str | None]:
    """What the record says of a LoRA."""
    objective = lora.training.get("objective") or lora.header.get("sd_unlearn.objective")
    return {"name": lora.name, "sha256": lora.sha256, "objective": objective}


def fuse_changes(
    config: FuseConfig, loras: Sequence[Lora], concept: Concept, base: Base, changes: Sequence[Mapping[str, Edit]]
) -> dict[str, Edit]:
    """Layer -> its fused change; changes: of each LoRA. A layer that only some LoRAs change is fused from these."""
    import torch
    from torch import nn

    from sd_unlearn.models.layer_inputs import LayerInputs
    from sd_unlearn.objectives.fusing import least_squares, least_squares_in_span, summed

    names = list(dict.fromkeys(name for of_lora in changes for name in of_lora))
    sums = {name: summed([of_lora[name] for of_lora in changes if name in of_lora]) for name in names}
    if config.method == "sum":
        return sums
    having = {name: [k for k, of_lora in enumerate(changes) if name in of_lora] for name in names}
    layers = {name: base.network.get_submodule(name) for name in names}
    downs = {name: sums[name].down for name, layer in layers.items() if isinstance(layer, nn.Conv2d)}
    inputs, effects = LayerInputs(layers, {name: tuple(having[name]) for name in names}, downs), []
    for lora, of_lora in zip(loras, changes, strict=True):
        captions = [caption for part in lora.concepts for caption in part.captions]
        own = {n: torch.eye(len(downs[n])) if n in downs else edit.down for n, edit in of_lora.items()}
        with lora.applied_to(base, 1.0):
            effects.append(record_inputs(base, inputs, captions, config.num_images, dict.fromkeys(own, 1.0), own))
    if keep := [prompt.text for prompt in concept.keep_prompts]:
        weights = {name: config.keep_weight * len(having[name]) for name in names}
        record_inputs(base, inputs, keep, config.num_images, weights)
    fused = {}
    for name in names:
        solve = least_squares_in_span if name in downs else least_squares
        edits, seen = [changes[k][name] for k in having[name]], [effects[k][name] for k in having[name]]
        fused[name] = solve(edits, [each.to(base.device) for each in seen], inputs.total(name).to(base.device))
    return fused


def edits_of(lora: Lora, base: Base) -> dict[str, Edit]:
    """Layer of the UNet or transformer -> the LoRA's change, in float64. Kernels of convolutions are flattened.

    Raises:
        UnlearnError: the LoRA changes a text encoder, or is not a plain LoRA.
    """
    from torch import nn

    from sd_unlearn.models import lora as adapters
    from sd_unlearn.models.lora_change import find_modules
    from sd_unlearn.models.lora_file import read_lora_file
    from sd_unlearn.objectives.closed_form import Edit

    names = {id(module): name for name, module in base.network.named_modules()}
    files = adapters.read_run(lora.path) if lora.is_run else [read_lora_file(lora.path, "fuse")]
    edits = {}
    for file in files:
        for target in find_modules(base.pipeline, file.changes, f"fuse {lora.path}", base.name):
            parts, name = target.change.parts, names.get(id(target.module))
            is_plain = isinstance(target.module, nn.Linear | nn.Conv2d) and not set(parts) - {"up", "down", "alpha"}
            if name is None or not is_plain:
                raise UnlearnError(
                    f"fuse: {lora.path} changes {target.name}. Only LoRAs of the UNet or transformer can be fused: not "
                    "DoRA or text encoders."
                )
            scale, rows = 1.0 if target.change.scale is None else target.change.scale, target.change.rows
            up, down = (parts[part].double().to(base.device).flatten(1) for part in ("up", "down"))
            up = up if rows is None else rows.of(up)
            edits[name] = Edit(scale * up, down)
    return edits


def prompts_of_images(prompts: Sequence[str], images: int) -> list[str]:
    """The prompts of at least `images` images: each once or more; of a long list MAX_PROMPTS, evenly chosen."""
    chosen = prompts[:: -(-len(prompts) // MAX_PROMPTS)]
    return list(islice(cycle(chosen), max(images, len(chosen))))


def record_inputs(
    base: Base,
    inputs: LayerInputs,
    prompts: Sequence[str],
    images: int,
    weights: Mapping[str, float],
    own: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Record the inputs of layers while images of the prompts are generated; see `LayerInputs.recording`.

    images: how many, see `prompts_of_images`. own: the factors of the changes of a LoRA, whose effect on the empty
    caption of guidance is not recorded; without it, that caption is recorded like the prompts.
    """
    from sd_unlearn.models.layer_inputs import add_to, rows_of_prompts
    from sd_unlearn.models.sampling import default_sampler, sample

    sampler = default_sampler(base.source)
    asked = [
        (prompt, image_seed(TRAIN_SEEDS, 0, prompt, number))
        for number, prompt in enumerate(prompts_of_images(prompts, images))
    ]
    is_guided = base.guidance_of(sampler.guidance_scale) > 1
    count = len(asked) * (2 if is_guided and own is None else 1)
    shares = {name: weight / count for name, weight in weights.items()}

    def record(part: Sequence[tuple[str, int]]) -> dict[str, Tensor]:
        # Each attempt is recorded by itself: one that runs out of memory is repeated in smaller parts, and what it had
        # recorded must not count. One image at a time would avoid the copy of the matrices that this takes, but every
        # pass of the network sends them to the computer's memory, so that would take several times as long.
        with ExitStack() as stack:
            rows = stack.enter_context(rows_of_prompts(base)) if is_guided and own is not None else lambda x: x
            found = stack.enter_context(inputs.recording(shares, own or {}, rows))
            sample(base, [seed for _, seed in part], sampler, prompt=[prompt for prompt, _ in part])
        return found

    products: dict[str, Tensor] = {}
    for found in base.generating.map(record, asked, sampler.batch_size):
        for name, product in found.items():
            add_to(products, name, product)
    return products
