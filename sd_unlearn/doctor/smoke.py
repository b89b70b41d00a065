"""A training of three steps and two images on the bundled base."""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from sd_unlearn.doctor.check import Check
from sd_unlearn.errors import UnlearnError, reason


def smoke_check() -> Check:
    """Render, train three steps and generate two images with the LoRA, on the bundled base."""
    start = time.monotonic()
    try:
        with tempfile.TemporaryDirectory() as folder, _silence():
            device = smoke_run(Path(folder))
    except (Exception, SystemExit) as error:
        return Check("Smoke run", "smoke run", "broken", f"{type(error).__name__}: {reason(error)}", True)
    seconds = time.monotonic() - start
    return Check("Smoke run", "smoke run", "ok", f"trained and generated images on {device} in {seconds:.0f} s", True)


def smoke_run(folder: Path) -> str:
    """Render images of the bundled base, train for three steps, generate two images. Returns the device."""
    from sd_unlearn.config.train import TrainConfig
    from sd_unlearn.evaluation.loras import open_run
    from sd_unlearn.models.base import load_base
    from sd_unlearn.models.sampling import Sampler, generate_images
    from sd_unlearn.models.source import DIGITS
    from sd_unlearn.training import trainer

    config = TrainConfig(
        concept="seven",
        pretrained_model_name_or_path=DIGITS,
        data_dir=folder / "data",
        output_dir=folder / "run",
        num_unlabeled=4,
        num_positive=2,
        num_keep=0,
        num_inference_steps=2,
        effective_batch_size=5,
        max_train_steps=3,
        validation_steps=0,
        report_to="none",
    )
    output = trainer.run(config)
    base = load_base(DIGITS)
    with open_run(output).applied_to(base, 1.0):
        images = generate_images(
            base, ["a photo of the digit seven", "a photo of the digit two"], [0, 1], Sampler(2, 3.0, 2)
        )
    if any(image.getextrema() == ((0, 0),) * 3 for image in images):
        raise UnlearnError("a generated image is black")
    return str(base.device)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Discard what the smoke run prints."""
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield
