"""The networks of the bundled base `emoji` and their training. Used by build_emoji.py."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from base_training import Settings, fit, learn_tokenizer, make_scheduler, make_text_encoder
from diffusers import AutoencoderKL, UNet2DConditionModel
from emoji_captions import Label, caption
from emoji_data import TONES, Drawings, compose, garbage, place, sampling_weights
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from sd_unlearn.metrics.emoji import AXES, BACKGROUNDS, EmojiReader

MAX_TOKENS = 28
TEXT_WIDTH, TEXT_LAYERS = 160, 3
LATENT_CHANNELS = 16
READER_BATCH, VAE_BATCH, TEXT_BATCH, DENOISER_BATCH = 64, 16, 128, 64
GARBAGE = 15  # of a reader's batch: images that show no thing
PREDICTION = (
    "v_prediction"  # as Stable Diffusion 2: errors at high noise are not amplified, so a short training suffices
)
MAX_SNR = (
    5.0  # images with a higher signal-to-noise ratio weigh as much in x0 as this one (Hang et al. 2023, 2303.09556)
)


class Part(NamedTuple):
    """A part of the denoiser's training."""

    name: str
    shift: float  # of the timesteps, see _timesteps
    full: float  # share of further captions that name everything, see `caption`


PARTS = (Part("layout", 20.0, 1.0), Part("denoiser", 3.0, 0.4))


class Batch(NamedTuple):
    """Random images of drawings."""

    placed: Tensor  # [B, 4, 64, 64] RGBA in [0, 1]
    backgrounds: Tensor  # [B]
    picked: Tensor  # [B] indices of drawings


def random_batch(drawings: Drawings, size: int, **jitter: float) -> Batch:
    """jitter: the arguments of `place`."""
    picked = torch.multinomial(sampling_weights(drawings), size, replacement=True)
    return Batch(place(drawings.pixels[picked], **jitter), torch.randint(len(BACKGROUNDS), (size,)), picked)


def train_reader(drawings: Drawings, settings: Settings, work: Path, channels: Sequence[int], name: str) -> EmojiReader:
    """Train a classifier of thing, style and background by cross-entropy.

    Some images show no thing, a few of them no background either; their targets are uniform distributions.
    """
    torch.manual_seed(settings.seed)
    reader = EmojiReader(channels)

    def loss_of() -> Tensor:
        batch = random_batch(drawings, READER_BATCH, degrees=10, zoom=0.12, shift=0.06)
        bad = batch.placed.roll(7, 0)[:GARBAGE]
        images = compose(
            torch.cat([batch.placed, garbage(bad)]), torch.cat([batch.backgrounds, batch.backgrounds[:GARBAGE]])
        )
        images = torch.cat([images, _noise_images(3)])
        if random.random() < 0.4:  # images from a VAE decoder are slightly blurred
            images = torch.lerp(
                images, F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False), random.random()
            )
        images = images + torch.randn_like(images) * 0.05 * torch.rand(len(images), 1, 1, 1)
        thing, style, background = reader(images)
        targets = (drawings.things[batch.picked], drawings.styles[batch.picked], batch.backgrounds)
        shown = READER_BATCH + GARBAGE  # images with a background
        loss = sum(
            F.cross_entropy(x[:READER_BATCH], y) for x, y in zip((thing, style, background), targets, strict=True)
        )
        loss = loss + F.cross_entropy(background[READER_BATCH:shown], batch.backgrounds[:GARBAGE]) / 4
        unknown = (thing[READER_BATCH:], style[READER_BATCH:], background[shown:])
        return loss + sum(_from_uniform(logits) for logits in unknown) / 4

    return fit(name, reader, loss_of, settings, work)


def _noise_images(count: int) -> Tensor:
    """Coloured noise [count, 3, 64, 64], fine or smooth."""
    side = random.choice((4, 8, 16, 64))
    noise = F.interpolate(torch.randn(count, 3, side, side), size=64, mode="bicubic")
    return noise.clamp(-1, 1)


def _from_uniform(logits: Tensor) -> Tensor:
    """Cross-entropy to the uniform distribution, less its smallest value."""
    return -logits.log_softmax(1).mean() - torch.tensor(float(logits.shape[1])).log()


def make_vae() -> AutoencoderKL:
    """Factor 8: 64x64x3 pixels to 8x8x16 latents."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=64,
        latent_channels=LATENT_CHANNELS,
        mid_block_add_attention=False,
    )


def train_vae(drawings: Drawings, settings: Settings, work: Path) -> AutoencoderKL:
    """Train a VAE by the distance of pixels and of their differences to neighbours, then choose its latents' basis."""
    torch.manual_seed(settings.seed)
    vae = make_vae().to(memory_format=torch.channels_last)  # a sixth faster on CPUs

    def loss_of() -> Tensor:
        batch = random_batch(drawings, VAE_BATCH)
        images = compose(batch.placed, batch.backgrounds).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(images).latent_dist
            decoded = vae.decode(posterior.sample()).sample.float()
        edges = sum(F.l1_loss(decoded.diff(dim=d), images.diff(dim=d)) for d in (2, 3))
        return F.l1_loss(decoded, images) + edges + 2e-7 * posterior.kl().mean()

    vae = fit("vae", vae, loss_of, settings, work).to(memory_format=torch.contiguous_format)
    torch.manual_seed(settings.seed)
    batch = random_batch(drawings, 500)
    images = compose(batch.placed, batch.backgrounds)
    use_pixel_distances(vae, images[:100])
    with torch.no_grad():
        latents = vae.encode(images).latent_dist.sample()
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    return vae


@torch.no_grad()
def use_pixel_distances(vae: AutoencoderKL, images: Tensor) -> None:
    """Change the basis of the latents, so that equally large steps in any direction change the pixels equally.

    Else all channels have about the same variance, and a denoiser spends most of its capacity on details. The matrix
    M = E[J'J] of the decoder's Jacobian J is estimated with random signs at all positions; latents are multiplied by
    its square root. Both maps are folded into the VAE's 1x1 convolutions, and what it decodes stays the same.
    """
    posterior = vae.encode(images).latent_dist
    latents = posterior.mean
    signs, step = torch.randint(2, latents[:, :1].shape) * 2.0 - 1, 0.1 * latents.std()
    before, changes = vae.decode(latents).sample, []
    for channel in range(latents.shape[1]):
        moved = latents.clone()
        moved[:, channel] += step * signs[:, 0]
        changes.append(((vae.decode(moved).sample - before) / step).flatten())
    together = torch.stack(changes)
    values, vectors = torch.linalg.eigh(together @ together.T / together.shape[1])
    root = vectors @ values.clamp(min=values.max() * 1e-4).sqrt().diag() @ vectors.T
    variance = root.square() @ posterior.var.mean((0, 2, 3))
    encoder, decoder, width = vae.quant_conv, vae.post_quant_conv, latents.shape[1]
    encoder.weight[:width, :, 0, 0] = root @ encoder.weight[:width, :, 0, 0]
    encoder.bias[:width] = root @ encoder.bias[:width]
    encoder.weight[width:] = 0  # the posterior's variance becomes the same for all images and positions
    encoder.bias[width:] = variance.log()
    decoder.weight[:, :, 0, 0] = decoder.weight[:, :, 0, 0] @ root.inverse()


def make_tokenizer(drawings: Drawings) -> CLIPTokenizer:
    """A tokenizer learned on captions."""
    rng, count = random.Random(0), len(drawings.things)
    picks = [rng.randrange(count) for _ in range(40_000)]
    corpus = [caption(_label(drawings, pick, rng.randrange(len(BACKGROUNDS))), rng) for pick in picks]
    return learn_tokenizer(corpus, vocab_size=1600, min_frequency=20, max_tokens=MAX_TOKENS)


def _label(drawings: Drawings, picked: int, background: int) -> Label:
    return Label(int(drawings.things[picked]), int(drawings.styles[picked]), background, int(drawings.tones[picked]))


class LabelledText(nn.Module):
    """A text encoder that predicts from a caption what its image shows."""

    def __init__(self, text: CLIPTextModel) -> None:
        super().__init__()
        self.text = text
        self.heads = nn.ModuleList(nn.Linear(TEXT_WIDTH, n) for n in (*map(len, AXES.values()), len(TONES) + 1))

    def forward(self, ids: Tensor) -> list[Tensor]:
        """Token ids [B, L] -> logits of thing, style, background and skin tone (the first: yellow, or no person)."""
        pooled = self.text(ids).pooler_output
        return [head(pooled) for head in self.heads]


def train_text(drawings: Drawings, tokenizer: CLIPTokenizer, settings: Settings, work: Path) -> CLIPTextModel:
    """Train a text encoder to predict what a caption's image shows, by cross-entropy.

    As in Stable Diffusion, the denoiser is then trained on a frozen text encoder, whose outputs tell the things apart
    from its first step. A caption that does not name a style is as likely in each, so its best prediction is uniform.
    """
    torch.manual_seed(settings.seed)
    weights = sampling_weights(drawings)

    def loss_of() -> Tensor:
        picked = torch.multinomial(weights, TEXT_BATCH, replacement=True)
        backgrounds = torch.randint(len(BACKGROUNDS), (TEXT_BATCH,))
        ids = _caption_ids(drawings, tokenizer, picked, backgrounds)
        targets = (drawings.things[picked], drawings.styles[picked], backgrounds, drawings.tones[picked] + 1)
        return torch.stack([F.cross_entropy(x, y) for x, y in zip(network(ids), targets, strict=True)]).sum()

    network = LabelledText(make_text_encoder(tokenizer, TEXT_WIDTH, TEXT_LAYERS))
    return fit("text", network, loss_of, settings, work).text


def _caption_ids(
    drawings: Drawings, tokenizer: CLIPTokenizer, picked: Tensor, backgrounds: Tensor, full: float = 0.0
) -> Tensor:
    """Token ids [B, L] of random captions. picked, backgrounds: [B], as in Batch. full: see `caption`."""
    rows = zip(picked.tolist(), backgrounds.tolist(), strict=True)
    rng = cast(random.Random, random)  # the module has the functions of its global generator, which `fit` seeds
    captions = [caption(_label(drawings, *row), rng, full) for row in rows]
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


def make_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(96, 192),
        layers_per_block=1,
        norm_num_groups=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        resnet_time_scale_shift="scale_shift",  # learns faster than adding the time embedding
    )


class Pool(NamedTuple):
    """Encoded random images of every drawing."""

    latents: Tensor  # [N, 16, 8, 8], scaled, in half precision
    picked: Tensor  # [N] indices of drawings
    backgrounds: Tensor  # [N]


@torch.no_grad()
def encode_pool(vae: AutoencoderKL, drawings: Drawings, copies: int) -> Pool:
    """Encode `copies` random images of each drawing."""
    torch.manual_seed(11)
    picked = torch.arange(len(drawings.things)).repeat(copies)
    backgrounds = torch.randint(len(BACKGROUNDS), (len(picked),))
    latents = []
    for rows in tqdm(torch.arange(len(picked)).split(100), desc="latents", mininterval=5):
        images = compose(place(drawings.pixels[picked[rows]]), backgrounds[rows])
        latents.append((vae.encode(images).latent_dist.sample() * vae.config.scaling_factor).half())
    return Pool(torch.cat(latents), picked, backgrounds)


def train_denoiser(
    pool: Pool,
    drawings: Drawings,
    text: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    settings: Settings,
    steps: Sequence[int],
    work: Path,
) -> UNet2DConditionModel:
    """Train a UNet to predict v = alpha noise - sigma x0 (Salimans and Ho 2022, section 4).

    The first part has almost pure noise, and captions that name everything: what is left to learn is the image of each
    caption, which takes a tenth of the steps that it takes among all timesteps and captions. text: frozen. steps: of
    each of the PARTS.
    """
    torch.manual_seed(settings.seed)
    unet = make_unet()
    scheduler, weights = make_scheduler(PREDICTION), sampling_weights(drawings)[pool.picked]
    snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
    weight_of = (snr.clamp(max=MAX_SNR) + 1) / (snr + 1)  # a squared error of v is SNR + 1 times that of x0

    def loss_of(shift: float, full: float) -> Tensor:
        picks = torch.multinomial(weights, DENOISER_BATCH, replacement=True)
        ids = _caption_ids(drawings, tokenizer, pool.picked[picks], pool.backgrounds[picks], full)
        with torch.no_grad():
            states = text(ids)[0]
        x0 = pool.latents[picks].float()
        noise = torch.randn_like(x0)
        t = _timesteps(len(x0), shift)
        predicted = unet(scheduler.add_noise(x0, noise, t), t, states).sample
        velocity = scheduler.get_velocity(x0, noise, t)
        return ((predicted - velocity).square().mean((1, 2, 3)) * weight_of[t]).mean()

    for part, count in zip(PARTS, steps, strict=True):
        loss = partial(loss_of, part.shift, part.full)
        unet = fit(part.name, unet.requires_grad_(True), loss, settings._replace(steps=count), work)
    return unet


def _timesteps(count: int, shift: float) -> Tensor:
    """[count] long: stratified, with more noise for a higher shift (Esser et al. 2024, 2403.03206, equation 23)."""
    position = (torch.arange(count) + torch.rand(count)) / count
    return (1000 * shift * position / (1 + (shift - 1) * position)).long().clamp(max=999)
