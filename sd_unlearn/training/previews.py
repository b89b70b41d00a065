"""Pictures of the student while it trains: previews to look at, and the fixed-seed set that a probe judges."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sd_unlearn.data.concept import Concept
from sd_unlearn.io.run_folder import PREVIEW_DIR
from sd_unlearn.models.base import Base
from sd_unlearn.models.conditioning import unpack
from sd_unlearn.models.sampling import Sampler, save_image
from sd_unlearn.seeds import TRAIN_SEEDS, image_seed


@dataclass(frozen=True)
class Painter:
    """Draws with the student's networks from embeddings, so that no text encoder need be kept.

    embed: captions -> [N, tokens, width]. The VAE waits on the CPU between two drawings.
    """

    base: Base
    sampler: Sampler
    embed: Callable[[Sequence[str]], Tensor]
    network: Any  # the network that is trained: set to evaluation mode while it draws

    @torch.no_grad()
    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        """A picture of each prompt from its own seed."""
        images: list[Image.Image] = []
        pipeline, training = self.base.pipeline, self.network.training
        self.network.eval()
        pipeline.vae.to(self.base.device)
        try:
            for start in range(0, len(prompts), self.sampler.batch_size):
                chunk = slice(start, start + self.sampler.batch_size)
                images += self._chunk(list(prompts[chunk]), list(seeds[chunk]))
        finally:
            self.network.train(training)
            pipeline.vae.to("cpu")
        return images

    def _chunk(self, prompts: list[str], seeds: list[int]) -> list[Image.Image]:
        dtype, device = self.base.pipeline.unet.dtype, self.base.device
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        shown, empty = (self.embed(texts).to(device, dtype) for texts in (prompts, [""] * len(prompts)))
        told = {"prompt_embeds": shown, "negative_prompt_embeds": empty}
        if width := self.base.pooled_width:
            told["prompt_embeds"], told["pooled_prompt_embeds"] = unpack(shown, width)
            told["negative_prompt_embeds"], told["negative_pooled_prompt_embeds"] = unpack(empty, width)
        return self.base.pipeline(
            **told,
            generator=generators,
            num_inference_steps=self.sampler.steps,
            guidance_scale=self.sampler.guidance_scale,
            height=self.sampler.resolution,
            width=self.sampler.resolution,
        ).images

    def preview(self, concept: Concept, seed: int, run: Path, step: int) -> None:
        """A grid of fixed seeds: a row each for the concept, the generic prompt and two prompts that must stay."""
        prompts, columns = preview_prompts(concept), 4 if self.base.resolution > 64 else 8
        cells = [(prompt, image_seed(TRAIN_SEEDS, seed, prompt, i)) for prompt in prompts for i in range(columns)]
        images = self.draw([prompt for prompt, _ in cells], [number for _, number in cells])
        side = images[0].width
        grid = Image.new("RGB", (columns * side, len(prompts) * side))
        for i, image in enumerate(images):
            grid.paste(image, (i % columns * side, i // columns * side))
        (run / PREVIEW_DIR).mkdir(exist_ok=True)
        save_image(grid, run / PREVIEW_DIR / f"step-{step:06d}.png")


def preview_prompts(concept: Concept) -> list[str]:
    """The prompts of a preview's rows."""
    return [concept.caption, concept.generic, *(p.text for p in concept.keep_prompts[:2])]
