"""The networks of the bundled base and their training. Used by build_digits.py."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from base_training import learn_tokenizer, make_scheduler, make_text_encoder
from diffusers import AutoencoderKL, UNet2DConditionModel
from digits_data import caption, garbage, paint, wobble
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import trange
from transformers import CLIPTokenizer

from sd_unlearn.metrics.digits import DIGITS, INKS, DigitReader

MAX_TOKENS = 24
TEXT_WIDTH = 64


def cosine(optimizer: torch.optim.Optimizer, steps: int, warmup: int = 100) -> torch.optim.lr_scheduler.LRScheduler:
    def factor(step: int) -> float:
        progress = min(1.0, max(0.0, (step - warmup) / max(1, steps - warmup)))
        return min(1.0, (step + 1) / warmup) * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * progress)).item())

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def minibatches(strokes: Tensor, labels: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield (strokes, digits, inks) forever, without replacement within an epoch. Inks are random."""
    while True:
        for index in torch.randperm(len(strokes)).split(size):
            if len(index) == size:
                yield strokes[index], labels[index], torch.randint(len(INKS), (size,))


def train_reader(strokes: Tensor, labels: Tensor, steps: int) -> DigitReader:
    """Train the classifier of digit and ink by cross-entropy.

    One image in seven shows no digit; its target is the uniform distribution, so that a high probability means a clean
    digit.
    """
    reader = DigitReader().train()
    average = AveragedModel(reader, multi_avg_fn=get_ema_multi_avg_fn(0.998), use_buffers=True)
    optimizer = torch.optim.AdamW(reader.parameters(), lr=2e-3, weight_decay=2e-2)
    schedule = cosine(optimizer, steps)
    batches = minibatches(strokes, labels, 96)
    uniform = torch.full((1, len(DIGITS)), 1 / len(DIGITS))
    for _ in trange(steps, desc="reader"):
        x, digit, ink = next(batches)
        if random.random() < 0.75:  # the others stay as sharp as the originals
            x = wobble(x, degrees=12, scale=0.15, shift=0.1, shear=0.25)
        if random.random() < 0.3:  # images from a VAE decoder are slightly blurred
            x = 0.5 * x + 0.5 * F.avg_pool2d(x, 3, stride=1, padding=1)
        bad = garbage(x[:16], digit[:16])
        images = torch.cat([paint(x, ink), paint(bad, ink[:16])])
        images = images + torch.randn_like(images) * 0.04 * torch.rand(len(images), 1, 1, 1)
        digit_logits, ink_logits = reader(images)
        loss = F.cross_entropy(digit_logits[:96], digit) + F.cross_entropy(ink_logits[:96], ink)
        loss = loss + F.cross_entropy(digit_logits[96:], uniform.expand(16, -1)) / 6
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        average.update_parameters(reader)
    return cast(DigitReader, average.module).eval()


def train_vae(strokes: Tensor, labels: Tensor, steps: int, factor: int = 4) -> AutoencoderKL:
    """Train a VAE with factor 4 and 4 latent channels, or 8 and 16. Its scaling factor gives latents unit variance."""
    blocks = {4: 3, 8: 4}[factor]
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=(16, 32, 64, 64)[:blocks],
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=32,
        latent_channels=factor**2 // 4,
        mid_block_add_attention=False,
    )
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule = cosine(optimizer, steps)
    batches = minibatches(strokes, labels, 48)
    bar = trange(steps, desc="vae")
    for step in bar:
        x, _, ink = next(batches)
        images = paint(wobble(x), ink)
        posterior = vae.encode(images).latent_dist
        loss_pixels = F.l1_loss(vae.decode(posterior.sample()).sample, images)
        loss = loss_pixels + 2e-5 * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            bar.set_postfix(l1=f"{loss_pixels.item():.4f}")
    vae.eval()
    with torch.no_grad():
        x, _, ink = next(minibatches(strokes, labels, min(1000, len(strokes))))
        latents = vae.encode(paint(x, ink)).latent_dist.sample()
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    return vae


def make_tokenizer() -> CLIPTokenizer:
    """A tokenizer learned on captions."""
    rng = random.Random(0)
    corpus = [caption(rng.randrange(10), rng.randrange(5), rng) for _ in range(20_000)]
    return learn_tokenizer(corpus, vocab_size=900, min_frequency=60, max_tokens=MAX_TOKENS)


def make_unet(width: float = 1.0, channels: int = 4, side: int = 8) -> UNet2DConditionModel:
    """width: of its layers, relative to the bundled base's. channels, side: of the latents."""
    return UNet2DConditionModel(
        sample_size=side,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(int(64 * width), int(96 * width)),
        layers_per_block=1,
        norm_num_groups=16 if width >= 1 else 8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
    )


@torch.no_grad()
def encode_pool(vae: AutoencoderKL, strokes: Tensor, labels: Tensor, copies: int) -> tuple[Tensor, Tensor, Tensor]:
    """Encode every digit in every ink, with `copies` random distortions each: (scaled latents [N, C, H, W], digits
    [N], inks [N])."""
    latents, digits, inks = [], [], []
    for _ in trange(copies, desc="latents"):
        for ink in range(len(INKS)):
            for x, y in zip(strokes.split(500), labels.split(500), strict=True):
                tint = torch.full((len(x),), ink)
                latents.append(vae.encode(paint(wobble(x), tint)).latent_dist.sample() * vae.config.scaling_factor)
                digits.append(y)
                inks.append(tint)
    return torch.cat(latents), torch.cat(digits), torch.cat(inks)


def train_denoiser(
    pool: tuple[Tensor, Tensor, Tensor],
    tokenizer: CLIPTokenizer,
    steps: int,
    out: Path,
    batch: int = 128,
    *,
    width: float = 1.0,
    prediction_type: str = "epsilon",
) -> None:
    """Train text encoder and UNet together by noise prediction (Ho et al. 2020, equation 14), or by v-prediction.

    Their moving average is saved in the folder `out`.
    """
    text, scheduler = make_text_encoder(tokenizer, TEXT_WIDTH, layers=2), make_scheduler(prediction_type)
    unet = make_unet(width, *pool[0].shape[1:3])
    nets = nn.ModuleList([text, unet])
    averages = [copy.deepcopy(network).eval().requires_grad_(False) for network in (text, unet)]
    average = nn.ModuleList(averages)
    optimizer = torch.optim.AdamW(nets.parameters(), lr=1.5e-3, weight_decay=1e-3, betas=(0.9, 0.99))
    schedule = cosine(optimizer, steps, warmup=300)
    latents, digits, inks = pool
    rng, smooth = random.Random(1), 0.0
    bar = trange(steps, desc="denoiser")
    for step in bar:
        pick = torch.randint(len(latents), (batch,))
        captions = [caption(int(d), int(i), rng) for d, i in zip(digits[pick], inks[pick], strict=True)]
        ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        unique, back = ids.unique(dim=0, return_inverse=True)
        x0, noise = latents[pick], torch.randn(batch, *latents.shape[1:])
        t = torch.randint(1000, (batch,))
        predicted = unet(scheduler.add_noise(x0, noise, t), t, text(unique)[0][back]).sample
        target = noise if prediction_type == "epsilon" else scheduler.get_velocity(x0, noise, t)
        loss = F.mse_loss(predicted, target)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(nets.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        decay = min(0.999, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(nets.parameters()), 1 - decay)
        smooth = loss.item() if step == 0 else 0.99 * smooth + 0.01 * loss.item()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{smooth:.4f}")
        if (step + 1) % 1000 == 0 or step + 1 == steps:
            for network, name in zip(averages, ("text_encoder", "unet"), strict=True):
                network.save_pretrained(out / name)
