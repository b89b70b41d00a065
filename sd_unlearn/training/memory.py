"""What training does when memory runs out: all processes notice, and the user learns what needs less memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from sd_unlearn.choices import Precision
from sd_unlearn.config.batching import Batching
from sd_unlearn.config.train import TrainConfig
from sd_unlearn.errors import UnlearnError, counted, reason
from sd_unlearn.launch import process_count
from sd_unlearn.models.kinds import KINDS
from sd_unlearn.models.memory_errors import free_memory, is_out_of_memory

if TYPE_CHECKING:  # torch takes seconds to import, and trainer.py refuses wrong options without it
    from accelerate import Accelerator

T = TypeVar("T")


class OutOfMemoryInStep(Exception):
    """Memory ran out in this or in another process."""


class CannotRepeat(UnlearnError):
    """Memory ran out, and the step cannot be repeated in smaller parts."""


def together(accelerator: Accelerator, action: Callable[[], T]) -> T:
    """Run an action without communication in every process, and agree on whether memory ran out in one of them.

    With several processes this waits for the device.

    Raises:
        OutOfMemoryInStep: in every process. Torch's unused memory has been returned to the device.
    """
    import torch

    failure, result = "", None
    try:
        result = action()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        failure = reason(error)
    anywhere = bool(failure)
    if accelerator.num_processes > 1:
        anywhere = bool(accelerator.reduce(torch.tensor(float(anywhere), device=accelerator.device), "sum") > 0)
    if anywhere:
        result = None
        free_memory()  # here the error's traceback, which holds tensors, is gone
        raise OutOfMemoryInStep(failure or "in another process")
    return result  # type: ignore[return-value]


def describe_change(step: int, before: Batching, after: Batching) -> tuple[str, dict[str, float]]:
    """A line about how a step is repeated after memory ran out, and the values for metrics.jsonl."""
    how = f"{counted(after.micro_batch_size, 'image')} at once instead of {before.micro_batch_size}"
    if after.micro_batch_size == before.micro_batch_size:
        how = "gradient checkpointing" if not before.gradient_checkpointing else "one row of the teacher at once"
    names = ("micro_batch_size", "gradient_checkpointing", "teacher_batch_size")
    values = {name: getattr(after, name) for name in names}
    return f"Out of memory at step {step}: repeating it with {how}.", {"step": step, **values}


def remedies(config: TrainConfig, kind: str, resolution: int, precision: Precision, on_gpu: bool) -> list[str]:
    """Options that would need less memory than those of this training, in words.

    kind: of the base, a key of KINDS. resolution, precision: of this training; on_gpu: whether it runs on a GPU.
    """
    is_lora = config.method == "lora"
    may_offload = process_count() == 1 or bool(config.quantize_base and not config.train_text_encoder)
    half = "bf16" if KINDS[kind].is_flow else "fp16"  # large transformers overflow in fp16
    found = {
        "leave out --train_text_encoder": config.train_text_encoder,
        "--method lora": not is_lora,
        "--attention sdpa": config.attention == "eager",
        f"--mixed_precision {half}": precision == "no" and on_gpu,
        f"a lower --resolution (now {resolution})": True,
        "--quantize_base nf4": is_lora and not (config.quantize_base or config.use_dora or config.torch_compile),
        "--offload": is_lora and on_gpu and may_offload and not (config.offload or config.use_dora),
        "--optimizer adamw8bit": config.optimizer == "adamw",
        f"a lower --rank (now {config.rank})": is_lora and config.rank > 4,
    }
    return [words for words, applies in found.items() if applies]
