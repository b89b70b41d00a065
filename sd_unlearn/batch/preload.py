"""Imported once by the process from which tasks on a CPU are forked: everything that takes seconds to import."""

from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel  # noqa: F401
from peft import LoraConfig  # noqa: F401
from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

import sd_unlearn.attacks.runner
import sd_unlearn.data.encoding
import sd_unlearn.evaluation.evaluate
import sd_unlearn.export.write
import sd_unlearn.models.loading
import sd_unlearn.report.report
import sd_unlearn.training.setup
import sd_unlearn.training.trainer  # noqa: F401
