"""Captions that bring the concept back, learned during training, so that it is forgotten under them, too (--robust).

Adversarial training as in AdvUnlearn (Zhang et al. 2024, arXiv 2405.15234) and STEREO (Srivatsan et al. 2024, arXiv
2408.16807): an inner loop searches embeddings under which the model predicts images of the concept again, and the outer
loop unlearns under them. Differences: all token embeddings of the prompt are learned (as in the attack `soft`); a pool
of prompts is searched in turn and never restarted; and the prompt searched last is the caption of one more caption
group, so that every objective uses it as any other caption. p_U = beta p_S + (1 - beta) p_N holds for the images seen
under it, too, so the PU risk has a bracket of its own for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor

from sd_unlearn.data.batch import Batch
from sd_unlearn.data.batches import EncodedImages
from sd_unlearn.data.concept import Concept
from sd_unlearn.data.layout import learned_caption
from sd_unlearn.data.repeated import Steps
from sd_unlearn.io.progress import say
from sd_unlearn.models.base import Base
from sd_unlearn.models.denoiser import Denoiser
from sd_unlearn.models.diffusion import sample_positions
from sd_unlearn.models.halving import HalvingBatches
from sd_unlearn.models.learned_prompt import LearnedPrompt, learned_positions

POOL = 6  # prompts
EVERY = 5  # training steps between two searches, each of the next prompt of the pool
SEARCH_STEPS = 10  # of Adam
START = 50  # training steps before the first search; until then the prompts are as they start
ROWS = 16  # images of the concept in a search step
LEARNING_RATE = 1.0  # of Adam, in units of the root mean square of the token embeddings
SCALE = 1024.0  # of the loss, so that small gradients survive half precision; Adam is invariant to it


@dataclass(frozen=True)
class Network:
    """What a search needs of the training: the student as it is at the moment, and how to run it."""

    base: Base  # with its text encoders
    denoiser: Denoiser  # of the student's own model, not of a DDP wrapper
    accelerator: Accelerator
    micro_batch_size: int


class LearnedCaption:
    """The learned caption of one concept: `name` in images.text, whose embedding changes during training.

    The first prompt of the pool starts from the concept's caption, the others from the caption plus noise. images: as
    the concept's steps take them; of several concepts, the first set of positives is the concept's own.
    """

    def __init__(self, concept: Concept, images: EncodedImages, network: Network, seed: int) -> None:
        self.name, self.images, self.network = learned_caption(concept), images, network
        self.positives = [n for n, e in enumerate(images.examples) if e.is_positive and e.positive_set == 0]
        self.generator = torch.Generator().manual_seed(seed)
        self.searches = HalvingBatches("searching captions for --robust")
        self.updates = 0
        self.pool = [self._new(concept.caption, noisy=n > 0) for n in range(POOL)]
        self._use(self.pool[0][0])

    def _new(self, caption: str, noisy: bool) -> tuple[LearnedPrompt, torch.optim.Adam]:
        base = self.network.base
        prompt = LearnedPrompt(base, caption, learned_positions(base, caption))
        if noisy:
            prompt.add_noise(self.generator)
        return prompt, prompt.optimizer(LEARNING_RATE)

    def update(self, step: int) -> None:
        """Search with the next prompt of the pool and use it. step: training steps so far, a multiple of EVERY."""
        prompt, optimizer = self.pool[self.updates % POOL]
        self.updates += 1
        if step >= START:
            for _ in range(SEARCH_STEPS):
                self._improve(prompt, optimizer)
            for vectors in prompt.vectors:  # rounding may differ between the processes
                vectors.data = broadcast(vectors.data)
        self._use(prompt)

    @torch.no_grad()
    def _use(self, prompt: LearnedPrompt) -> None:
        self.images.text[self.name] = prompt.encode()[0].float().cpu()

    def _improve(self, prompt: LearnedPrompt, optimizer: torch.optim.Adam) -> None:
        """A step towards predicting the noise of images of the concept."""
        network, process = self.network, self.network.denoiser.process
        device = network.accelerator.device
        order = torch.randperm(len(self.positives), generator=self.generator)[:ROWS]
        rows = torch.tensor(self.positives)[order]
        mean, std = self.images.mean[rows], self.images.std[rows]
        latents = mean + std * torch.randn(mean.shape, generator=self.generator)
        noise = torch.randn(mean.shape, generator=self.generator)
        timesteps = process.at(sample_positions(len(rows), self.generator)).to(device)
        given = latents.to(device), noise.to(device), timesteps
        noisy, target = process.add_noise(*given), process.target(*given)

        def gradient(numbers: Sequence[int]) -> tuple[Tensor, ...]:
            of = slice(numbers[0], numbers[-1] + 1)
            with network.accelerator.autocast():
                text = prompt.encode().expand(len(numbers), -1, -1)
                predicted = network.denoiser.predict(noisy[of], timesteps[of], text)
            loss = (predicted.float() - target[of]).square().flatten(1).mean(1).sum() / len(rows)
            return torch.autograd.grad(SCALE * loss, prompt.vectors)

        parts = list(self.searches.map(gradient, range(len(rows)), network.micro_batch_size))
        gradients = [torch.stack(of_vectors).sum(0) for of_vectors in zip(*parts, strict=True)]
        if all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
            for vectors, found in zip(prompt.vectors, gradients, strict=True):
                vectors.grad = found
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """Everything that later searches depend on, and the embedding that is used."""
        pool = [([v.detach().cpu() for v in prompt.vectors], opt.state_dict()) for prompt, opt in self.pool]
        used = self.images.text[self.name]
        return {"updates": self.updates, "generator": self.generator.get_state(), "pool": pool, "used": used}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Of prompts with as many tokens; otherwise (--force_resume with another caption) the search starts anew."""
        pool = [(prompt.vectors, vectors) for (prompt, _), (vectors, _) in zip(self.pool, state["pool"], strict=True)]
        if any([v.shape for v in own] != [v.shape for v in saved] for own, saved in pool):
            if self.network.accelerator.is_main_process:
                say("--robust: the search starts anew, because the concept's caption has another number of tokens.")
            return
        self.updates = state["updates"]
        self.generator.set_state(state["generator"])
        for (prompt, optimizer), (vectors, of_optimizer) in zip(self.pool, state["pool"], strict=True):
            for vector, saved in zip(prompt.vectors, vectors, strict=True):
                vector.data.copy_(saved)
            optimizer.load_state_dict(of_optimizer)
        self.images.text[self.name] = state["used"]


class RobustSteps:
    """The steps of a training, with the learned captions updated before every EVERY-th of them."""

    def __init__(self, steps: Steps, captions: Sequence[LearnedCaption]) -> None:
        self.steps, self.captions, self.count = steps, captions, 0

    @property
    def images_per_step(self) -> int:
        """Over all processes."""
        return self.steps.images_per_step

    def __iter__(self) -> Iterator[Batch]:
        while True:
            if self.count % EVERY == 0:
                self.captions[self.count // EVERY % len(self.captions)].update(self.count)
            self.count += 1
            yield next(iter(self.steps))

    def state_dict(self) -> dict[str, Any]:
        """Of steps and captions; load_state_dict makes the next step the one that would have followed."""
        captions = [caption.state_dict() for caption in self.captions]
        return {"steps": self.steps.state_dict(), "count": self.count, "captions": captions}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if len(state.get("captions", ())) == len(self.captions):  # not with --force_resume from a run without --robust
            self.count = state["count"]
            for caption, own in zip(self.captions, state["captions"], strict=True):
                caption.load_state_dict(own)  # first: steps that are sampled again take the embeddings from it
        self.steps.load_state_dict(state.get("steps", state))
