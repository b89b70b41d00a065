"""What the scripts that train the bundled bases share: tokenizer, text encoder, schedule, training loop and saving."""

from __future__ import annotations

import copy
import json
import random
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sd_unlearn.io.files import atomic_path
from sd_unlearn.io.reading import file_sha256

SAVE_SECONDS = 300  # between two checkpoints of a training
DECAY = 0.25  # share of the steps of `fit`, at its end, in which the learning rate falls to zero


Network = TypeVar("Network", bound=nn.Module)


class Settings(NamedTuple):
    """Settings of `fit`."""

    steps: int
    lr: float
    weight_decay: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    warmup: int = 200
    ema_decay: float = 0.999
    seed: int = 0
    muon: bool = False  # for weights with two dimensions and more (Jordan et al. 2024); `lr` is then about 0.02


def make_optimizer(network: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """AdamW, or Muon with AdamW for biases and norms."""
    if not settings.muon:
        return torch.optim.AdamW(network.parameters(), settings.lr, settings.betas, weight_decay=settings.weight_decay)
    from timm.optim import Muon

    return Muon(
        network.parameters(),
        settings.lr,
        weight_decay=settings.weight_decay,
        nesterov=True,
        adjust_lr_fn="original",
        fallback_lr_scale=0.05,
        betas=settings.betas,
    )


def fit(name: str, network: Network, loss_of: Callable[[], Tensor], settings: Settings, work: Path) -> Network:
    """Train a network and return the moving average of its weights, in eval mode.

    Random numbers are seeded before each step by its number, and work/<name>.pt has the state of the last checkpoint.
    So an interrupted training resumes as if it had not been interrupted. work/<name>-before-decay.pt has the state
    before the learning rate falls: a finished training can be continued from there with more steps. work/<name>.jsonl
    has the loss.

    Args:
        loss_of: The loss of a random batch, from the global random generators of `torch` and `random`.
    """
    average = copy.deepcopy(network).eval().requires_grad_(False)
    optimizer = make_optimizer(network, settings)
    parts: list[Any] = [network, average, optimizer]
    done, spent, smooth, decay_from = 0, 0.0, None, int(settings.steps * (1 - DECAY))
    if state := _checkpoint(work, name, settings.steps):
        for part, saved in zip(parts, state["parts"], strict=True):
            part.load_state_dict(saved)
        done, spent, smooth = state["done"], state["seconds"], state["loss"]
    started = saved_at = time.monotonic()
    network.train()
    for step in tqdm(range(done, settings.steps), desc=name, initial=done, total=settings.steps, mininterval=5):
        torch.manual_seed(settings.seed * 1_000_003 + step)
        random.seed(settings.seed * 1_000_003 + step)
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * _factor(step, settings)
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        _follow(average, network, min(settings.ema_decay, (step + 1) / (step + 10)))
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        now = time.monotonic()
        if now - saved_at > SAVE_SECONDS or step + 1 in (decay_from, settings.steps):
            saved_at, seconds = now, spent + now - started
            state = {"parts": [part.state_dict() for part in parts], "done": step + 1}
            for file in (f"{name}.pt", *([f"{name}-before-decay.pt"] if step + 1 == decay_from else [])):
                with atomic_path(work / file) as temporary:
                    torch.save({**state, "steps": settings.steps, "seconds": seconds, "loss": smooth}, temporary)
            with (work / f"{name}.jsonl").open("a") as log:
                log.write(json.dumps({"step": step + 1, "loss": round(smooth, 5), "seconds": round(seconds)}) + "\n")
    return average


def _factor(step: int, settings: Settings) -> float:
    """Learning rate at a step relative to its peak: linear warm-up, constant, then linear decay to zero."""
    return min(1.0, (step + 1) / settings.warmup, (settings.steps - step) / (settings.steps * DECAY))


def _checkpoint(work: Path, name: str, steps: int) -> dict[str, Any] | None:
    """The state to resume from; the one before the decay if the last one decayed at another step."""
    for file in (work / f"{name}.pt", work / f"{name}-before-decay.pt"):
        state = torch.load(file, weights_only=True) if file.exists() else None
        if state and (state["steps"] == steps or state["done"] <= min(steps, state["steps"]) * (1 - DECAY)):
            return state
    return None


@torch.no_grad()
def _follow(average: nn.Module, network: nn.Module, decay: float) -> None:
    """Move the averaged weights towards the network's; buffers (of batch normalization) are copied."""
    torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1 - decay)
    for mine, theirs in zip(average.buffers(), network.buffers(), strict=True):
        mine.copy_(theirs)


def training_seconds(name: str, work: Path) -> float | None:
    """Seconds that `fit` has spent on a finished or interrupted training; None if it never saved."""
    checkpoint = work / f"{name}.pt"
    return torch.load(checkpoint, weights_only=True)["seconds"] if checkpoint.exists() else None


def typo(caption: str, rng: random.Random) -> str:
    """A caption with one letter left out, or two letters swapped."""
    at = rng.randrange(len(caption))
    if rng.random() < 0.5:
        return caption[:at] + caption[at + 1 :]
    return caption[:at] + caption[at : at + 2][::-1] + caption[at + 2 :]


def learn_tokenizer(corpus: Iterable[str], vocab_size: int, min_frequency: int, max_tokens: int) -> CLIPTokenizer:
    """CLIP's byte-pair encoding with merges learned on the captions. Every string can be encoded."""
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    fresh = CLIPTokenizer().backend_tokenizer
    learner.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    learner.pre_tokenizer = fresh.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=min_frequency,
            initial_alphabet=alphabet,
            end_of_word_suffix="</w>",
            show_progress=False,
        ),
    )
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    tokens = alphabet + [f"{letter}</w>" for letter in alphabet] + ["".join(pair) for pair in merges]
    vocabulary = {
        token: index for index, token in enumerate(dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"]))
    }
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=max_tokens)


def make_text_encoder(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPTextModel:
    """An untrained text encoder for as many tokens as the tokenizer returns."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            hidden_act="gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_scheduler(prediction_type: str = "epsilon") -> DDIMScheduler:
    """DDIM with the noise schedule of Stable Diffusion."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )


def trained_pipeline(
    work: Path, vae: AutoencoderKL, tokenizer: CLIPTokenizer, prediction_type: str = "epsilon"
) -> StableDiffusionPipeline:
    """The pipeline with the text encoder and UNet that were trained in `work`."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel.from_pretrained(work / "text_encoder"),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel.from_pretrained(work / "unet"),
        scheduler=make_scheduler(prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save_pipeline(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Write a pipeline folder for plain Diffusers and other software."""
    pipeline.save_pretrained(folder)
    # Diffusers loads weights in half precision as float32, transformers as the configuration says.
    config = folder / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
    # transformers 5 writes tokenizer.json only; transformers 4 and other UIs need these two files.
    bpe = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(bpe["vocab"], ensure_ascii=False))
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in bpe["merges"]]
    (folder / "tokenizer" / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs]) + "\n")


def save_half(weights: dict[str, Tensor], path: Path) -> str:
    """Write weights in half precision; returns the file's SHA-256."""
    save_file({k: v.half() if v.is_floating_point() else v for k, v in weights.items()}, path)
    return file_sha256(path)


def file_rows(assets: Path, folders: Iterable[str]) -> list[str]:
    """Rows of a Markdown table: size and SHA-256 of the weights in these folders of `assets`."""
    files = sorted(path for folder in folders for path in (assets / folder).rglob("*.safetensors"))
    return [
        f"| {file.relative_to(assets)} | {file.stat().st_size / 1e6:.2f} MB | `{file_sha256(file)}` |" for file in files
    ]
