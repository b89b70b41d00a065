"""Recognize errors that mean "out of memory", and free memory after one."""

from __future__ import annotations

# What accelerate's `should_reduce_batch_size` does not know: libraries that could not allocate their workspace, and
# CUDA calls outside torch's allocator.
_TEXTS = (
    "out of memory",
    "ALLOC_FAILED",  # CUBLAS_STATUS_ALLOC_FAILED, CUDNN_STATUS_ALLOC_FAILED
    "ALLOCATION_FAILED",  # CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED
    "unable to find an engine to execute this computation",  # cuDNN, if no algorithm's workspace fits
    "DefaultCPUAllocator: not enough memory",  # Windows
)


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


def free_memory() -> None:
    """Collect garbage and return torch's unused memory to the device.

    Call it outside the `except` block: until the block ends, the error's traceback keeps the tensors of every frame.
    """
    from accelerate.utils.memory import clear_device_cache

    clear_device_cache(garbage_collection=True)
