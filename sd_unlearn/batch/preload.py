"""Imported once by the process from which tasks on a CPU are forked: everything that takes seconds to import."""

# ruff: noqa: E402, F401

from sd_unlearn.io.noise import silence_warnings

silence_warnings()  # before the libraries are imported, which print messages

from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from transformers import CLIPTextModel, CLIPTokenizer

import sd_unlearn.attacks.runner
import sd_unlearn.data.encoding
import sd_unlearn.evaluation.evaluate
import sd_unlearn.export.write
import sd_unlearn.models.loading
import sd_unlearn.report.report
import sd_unlearn.training.setup
import sd_unlearn.training.trainer
