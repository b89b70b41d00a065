"""What each of two processes does to compare its gradient; a module of its own, so that new processes can import it."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from gradient_cases import ALL_CASES, PU, Linear, step
from torch import Tensor

from sd_unlearn.config.batching import Batching
from sd_unlearn.config.train import TrainConfig
from sd_unlearn.data.batch import Batch
from sd_unlearn.objectives.pu import PUObjective
from sd_unlearn.training.gradients import accumulate_gradients
from sd_unlearn.training.memory import OutOfMemoryInStep
from sd_unlearn.training.trainer import _choose_batching

TWO_PROCESSES = {name: ALL_CASES[name] for name in ("pu", "all", "capped")} | {
    "supervised": replace(PU, risk="supervised")
}
# of two processes whose devices have different memory; both must use the smaller one
PLANNED = (
    Batching(micro_batch_size=4, gradient_checkpointing=False, teacher_batch_size=8, render_batch_size=4),
    Batching(micro_batch_size=4, gradient_checkpointing=True, teacher_batch_size=2, render_batch_size=1),
)


def one_of_two_processes(correction: str, folder: str) -> None:
    """What each of the two does."""
    accelerator = Accelerator(cpu=True)
    for (name, case), micro_batches in product(TWO_PROCESSES.items(), (1, 2)):
        model, batch = accelerator.prepare(Linear()), step(5.0, case, processes=2)
        mine = batch.only(batch.timesteps % 2 == accelerator.process_index)
        size = len(mine.label) // micro_batches
        logs, _ = accumulate_gradients(accelerator, model, model, case.objective(correction), mine, size, None)
        if accelerator.is_main_process:
            assert accelerator.num_processes == 2
            torch.save((model.module.weight.grad, logs), f"{folder}/{name}-{micro_batches}.pt")
    check_out_of_memory(accelerator, case.objective(correction), step(5.0, case, processes=2))
    if accelerator.is_main_process:
        Path(folder, "out-of-memory").touch()
    chosen = _choose_batching(TrainConfig(), accelerator, PLANNED[accelerator.process_index], None)
    Path(folder, f"batching-{accelerator.process_index}").write_text(repr(chosen))
    accelerator.wait_for_everyone()


def check_out_of_memory(accelerator: Accelerator, objective: PUObjective, batch: Batch) -> None:
    """One of two processes runs out of memory, and both notice instead of waiting for each other."""
    model = accelerator.prepare(Linear())

    def losses(part: Batch) -> Tensor:
        if accelerator.process_index == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return model(part)

    with pytest.raises(OutOfMemoryInStep, match="another process|CUDA"):
        accumulate_gradients(accelerator, model, losses, objective, batch, 4)
