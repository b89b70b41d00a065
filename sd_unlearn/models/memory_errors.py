"""Recognize errors that mean "out of memory", and free memory after one."""

from __future__ import annotations

from sd_unlearn.errors import OutOfMemory, reason

# What accelerate's `should_reduce_batch_size` does not know: libraries that could not allocate their workspace, and
# CUDA calls outside torch's allocator.
_TEXTS = (
    "out of memory",
    "ALLOC_FAILED",  # CUBLAS_STATUS_ALLOC_FAILED, CUDNN_STATUS_ALLOC_FAILED
    "ALLOCATION_FAILED",  # CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED
    "unable to find an engine to execute this computation",  # cuDNN, if no algorithm's workspace fits
    "DefaultCPUAllocator: not enough memory",  # Windows
)

# Options of all commands with a base that need less memory, for errors where the kind of the base is not known.
SMALLER = "--mixed_precision fp16 (bf16 for SD 3, FLUX, Z-Image and Qwen-Image), --offload or a lower --resolution"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: by torch, by Python, or by CUDA, cuDNN, cuBLAS or the CPU allocator in a RuntimeError."""
    if isinstance(error, MemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    import torch
    from accelerate.utils.memory import should_reduce_batch_size

    if isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error):
        return True
    return any(text in str(error) for text in _TEXTS)


def shortage_behind(error: BaseException) -> OutOfMemory | None:
    """The message for an error that was, or was caused by, a lack of memory; None for any other error."""
    cause: BaseException | None = error
    while cause and not is_out_of_memory(cause):
        cause = cause.__cause__
    if cause is None:
        return None
    return OutOfMemory(
        f"Out of memory: {reason(cause)}. Close other programs that use this memory, or make the work smaller: "
        f"{SMALLER}; in train also a lower --train_batch_size and --gradient_checkpointing. Finished images and "
        "checkpoints are kept."
    )


def free_memory() -> None:
    """Collect garbage and return torch's unused memory to the device.

    Call it outside the `except` block: until the block ends, the error's traceback keeps the tensors of every frame.
    """
    from accelerate.utils.memory import clear_device_cache

    clear_device_cache(garbage_collection=True)
