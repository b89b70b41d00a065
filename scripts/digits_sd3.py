"""The base `digits-sd3`: the data of `digits` in the layout of Stable Diffusion 3. Used by build_digits.py --kind sd3.

Transformer and both text encoders are trained together by flow matching (Esser et al. 2024): x_s = (1 - s) x0 + s n,
target n - x0, and s from the logit-normal distribution of their equation 19 (location 0, scale 1).

There is no T5 encoder. Diffusers then appends `max_sequence_length` tokens of zeros (256 by default) to the caption,
ComfyUI appends none. They are all alike and stay so in every block, hence n of them act as one whose attention logit is
raised by log(n). The training draws n for each example, so the model works with any number at the cost of one token.
"""

from __future__ import annotations

import copy
import math
import random
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
)
from digits_data import caption
from digits_models import MAX_TOKENS, cosine
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

TEXT_WIDTHS = (64, 32)  # different, so that a mistake in their order is an error
JOINT_WIDTH = 128  # wider than both encoders together, as in SD 3: the pipeline pads the caption with zeros
HEADS, HEAD_WIDTH, LAYERS = 3, 32, 5
MOST_EMPTY_TOKENS = 512
CHECKPOINT = "checkpoint.pt"


class Pool(NamedTuple):
    """The training images as latents, scaled and shifted to unit variance and zero mean."""

    latents: Tensor  # [N, 4, 8, 8]
    digits: Tensor  # [N]
    inks: Tensor  # [N]


class Networks(nn.Module):
    """What is trained: both text encoders and the transformer."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.text_encoder, self.text_encoder_2 = (make_text_encoder(tokenizer, width) for width in TEXT_WIDTHS)
        nn.init.eye_(self.text_encoder.text_projection.weight)  # as in SD 3, whose single files leave it out
        self.text_encoder.text_projection.requires_grad_(False)
        self.transformer = make_transformer()

    def start_from(self, text_encoder: nn.Module) -> None:
        """Begin with the text encoder of `digits` as the first one: it already tells captions apart."""
        state = {f"text_model.{name.removeprefix('text_model.')}": v for name, v in text_encoder.state_dict().items()}
        missing, unexpected = self.text_encoder.load_state_dict(state, strict=False)
        assert missing == ["text_projection.weight"], missing
        assert not unexpected, unexpected

    def encode(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids [B, L] -> tokens [B, L, JOINT_WIDTH], pooled [B, sum of TEXT_WIDTHS], as the pipeline does."""
        outputs = [encoder(ids, output_hidden_states=True) for encoder in (self.text_encoder, self.text_encoder_2)]
        tokens = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        pooled = torch.cat([output.text_embeds for output in outputs], dim=-1)
        return F.pad(tokens, (0, JOINT_WIDTH - tokens.shape[-1])), pooled

    def parts(self) -> dict[str, Any]:
        """The networks by name, each with Diffusers' or Transformers' own functions to save and load it."""
        return dict(self.named_children())

    def save(self, folder: Path) -> None:
        for name, network in self.parts().items():
            network.save_pretrained(folder / name)

    @classmethod
    def load(cls, folder: Path, tokenizer: CLIPTokenizer) -> Networks:
        """What `save` wrote."""
        networks = cls(tokenizer)
        for name, network in networks.parts().items():
            setattr(networks, name, type(network).from_pretrained(folder / name))
        return networks.eval()


def make_text_encoder(tokenizer: CLIPTokenizer, width: int) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            hidden_act="gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_transformer() -> SD3Transformer2DModel:
    """A transformer of joint blocks with normalized queries and keys, as in SD 3.5 Large.

    Modulations and output start at zero (Peebles and Xie 2023, section 3.2), so that each block starts as the identity.
    """
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=LAYERS,
        attention_head_dim=HEAD_WIDTH,
        num_attention_heads=HEADS,
        joint_attention_dim=JOINT_WIDTH,
        caption_projection_dim=HEADS * HEAD_WIDTH,
        pooled_projection_dim=sum(TEXT_WIDTHS),
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
            if name == "proj_out" or "norm" in name:
                nn.init.zeros_(module.weight)
    return transformer


def flow_pipeline(networks: Networks, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> StableDiffusion3Pipeline:
    """The networks as a pipeline. The shift of the sampler's noise levels is 1: larger ones are for larger images."""
    pipeline = StableDiffusion3Pipeline(
        transformer=networks.transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0),
        vae=vae,
        text_encoder=networks.text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=networks.text_encoder_2,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def shift_latents(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Give the VAE the shift and scale of SD 3, (z - shift) * scale, and apply them to latents z [N, 4, 8, 8]."""
    shift, scale = round(latents.mean().item(), 5), round(1 / latents.std().item(), 5)
    vae.register_to_config(shift_factor=shift, scaling_factor=scale)
    return (latents - shift) * scale


class EmptyTokens(TorchFunctionMode):
    """Let the last key of every attention count as n keys. log_counts [B]: log(n), minus infinity for none."""

    def __init__(self, log_counts: Tensor) -> None:
        super().__init__()
        self.log_counts = log_counts

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is F.scaled_dot_product_attention:
            key = args[1]
            bias = key.new_zeros(len(key), 1, 1, key.shape[2])
            bias[..., -1] = self.log_counts[:, None, None]
            kwargs["attn_mask"] = bias.expand(-1, 1, args[0].shape[2], -1)
        return function(*args, **kwargs)


def random_log_counts(count: int) -> Tensor:
    """log(n) for `count` examples: no token of zeros in a third of them, else log-uniform up to MOST_EMPTY_TOKENS."""
    logs = torch.rand(count) * math.log(MOST_EMPTY_TOKENS)
    return torch.where(torch.rand(count) < 1 / 3, -torch.inf, logs)


def flow_loss(nets: Networks, x0: Tensor, ids: Tensor) -> Tensor:
    """The mean squared error of the predicted velocity for latents x0 [B, 4, 8, 8] and token ids [B, L]."""
    unique, back = ids.unique(dim=0, return_inverse=True)
    tokens, pooled = (text[back] for text in nets.encode(unique))
    tokens = torch.cat([tokens, tokens.new_zeros(len(tokens), 1, JOINT_WIDTH)], dim=1)
    s, noise = torch.randn(len(x0)).sigmoid(), torch.randn_like(x0)
    noisy = torch.lerp(x0, noise, s[:, None, None, None])
    with EmptyTokens(random_log_counts(len(x0))):
        velocity = nets.transformer(noisy, tokens, pooled, s * 1000).sample
    return F.mse_loss(velocity, noise - x0)


def shortened(ids: Tensor, end: int) -> Tensor:
    """Token ids [B, 24] without the positions at which every caption has ended; in every fourth batch as they are."""
    longest = int((ids != end).sum(1).max())
    return ids if random.random() < 0.25 else ids[:, : longest + 1]


def train_flow(
    pool: Pool, bundled: StableDiffusionPipeline, steps: int, out: Path, measure: Any, batch: int = 64, every: int = 250
) -> None:
    """Train the networks and save their moving average in the folder `out`. bundled: the base `digits`.

    Every `every` steps the state is saved, from which an interrupted training resumes. After every fourth of them,
    `measure` is called with the average; it returns what to print.
    """
    tokenizer = bundled.tokenizer
    nets = Networks(tokenizer)
    nets.start_from(bundled.text_encoder)
    average = copy.deepcopy(nets).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(nets.parameters(), lr=1.5e-3, weight_decay=1e-3, betas=(0.9, 0.99))
    schedule = cosine(optimizer, steps, warmup=200)
    rng, first = random.Random(1), 0
    parts: dict[str, Any] = {"nets": nets, "average": average, "optimizer": optimizer, "schedule": schedule}
    if (out / CHECKPOINT).exists():
        state = torch.load(out / CHECKPOINT, weights_only=False)  # our own file; it holds the state of `random`
        for name, part in parts.items():
            part.load_state_dict(state[name])
        rng.setstate(state["captions"])
        random.setstate(state["random"])
        torch.set_rng_state(state["torch"])
        first = state["step"]
    smooth, started = 0.0, time.monotonic()
    for step in range(first + 1, steps + 1):
        pick = torch.randint(len(pool.latents), (batch,))
        captions = [caption(int(d), int(i), rng) for d, i in zip(pool.digits[pick], pool.inks[pick], strict=True)]
        ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        loss = flow_loss(nets, pool.latents[pick], shortened(ids, tokenizer.eos_token_id))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(nets.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            decay = min(0.998, step / (step + 9))
            torch._foreach_lerp_(list(average.parameters()), list(nets.parameters()), 1 - decay)
        smooth = 0.98 * smooth + 0.02 * loss.item() if smooth else loss.item()
        if step % 50 == 0:
            seconds = (time.monotonic() - started) / (step - first)
            print(f"step {step}: loss {smooth:.4f}, {seconds:.2f} s a step", flush=True)
        if step % every == 0 or step == steps:
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= {"captions": rng.getstate(), "random": random.getstate(), "torch": torch.get_rng_state()}
            state["step"] = step
            torch.save(state, out / f"{CHECKPOINT}.new")
            (out / f"{CHECKPOINT}.new").replace(out / CHECKPOINT)
            average.save(out)
        if step % (4 * every) == 0 or step == steps:
            print(f"step {step}: {measure(average)}", flush=True)
