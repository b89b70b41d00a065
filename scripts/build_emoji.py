"""Train the bundled base `emoji` and its classifier from scratch, then measure them and write their model card.

    python scripts/build_emoji.py                       # hours on two cores; needs npm
    python scripts/build_emoji.py --only table          # only measure the bundled files
    python scripts/build_emoji.py --from_bundled        # train another denoiser on the bundled VAE and text encoder
    python scripts/build_emoji.py --reader_seed 1 --reader_channels 24 48 96 160   # a second classifier, not bundled
    python scripts/build_emoji.py --reader_seed 2 --reader_without noto            # one that never saw a style

The stages (drawings, reader, vae, pool, text, denoiser, assemble, table) save their results in --work_dir. A finished
stage is not repeated. The trainings save a checkpoint every five minutes, so an interrupted build resumes there with
the same result. To train longer, remove the stage's results and give more steps: it continues from the state before its
learning rate fell. The denoiser is trained in two parts: emoji_models.py has their settings.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from base_training import Settings, save_half, save_pipeline, trained_pipeline
from diffusers import AutoencoderKL
from emoji_data import Drawings, compose, load_drawings, place
from emoji_models import (
    PREDICTION,
    Pool,
    encode_pool,
    make_tokenizer,
    train_denoiser,
    train_reader,
    train_text,
    train_vae,
)
from emoji_table import table
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel

from sd_unlearn.metrics.emoji import AXES, BACKGROUNDS, CHANNELS, SIZE, STYLES, load_reader

ASSETS = Path(__file__).parent.parent / "sd_unlearn" / "assets"
BASE, READER = "emoji", "emoji_reader"  # folders of the bundled files
STAGES = ("drawings", "reader", "vae", "pool", "text", "denoiser", "assemble", "table")
RESULTS = {  # stage -> its last file in --work_dir; a stage that has it is finished
    "drawings": "drawings.pt",
    "reader": "reader.safetensors",
    "vae": "vae/config.json",
    "pool": "pool.pt",
    "text": "text_encoder/config.json",
    "denoiser": "unet/config.json",
}


def reader_name(args: argparse.Namespace) -> str:
    """The name of a classifier's files: the bundled one has seed 0."""
    return f"reader-{args.reader_seed}" if args.reader_seed else "reader"


def build_reader(args: argparse.Namespace) -> None:
    name = reader_name(args)
    settings = Settings(args.reader_steps, 0.02, weight_decay=5e-3, ema_decay=0.998, seed=args.reader_seed, muon=True)
    drawings = load_drawings(args.work_dir)
    if args.reader_without:
        seen = drawings.styles != STYLES.index(args.reader_without)
        drawings = Drawings(*(part[seen] for part in drawings))
    network = train_reader(drawings, settings, args.work_dir, tuple(args.reader_channels), name)
    save_file(network.state_dict(), args.work_dir / f"{name}.safetensors", {"without": args.reader_without})


def build_vae(args: argparse.Namespace) -> None:
    settings = Settings(args.vae_steps, lr=0.02, weight_decay=0, muon=True)
    train_vae(load_drawings(args.work_dir), settings, args.work_dir).save_pretrained(args.work_dir / "vae")


def build_pool(args: argparse.Namespace) -> None:
    vae = AutoencoderKL.from_pretrained(args.work_dir / "vae").eval()
    torch.save(tuple(encode_pool(vae, load_drawings(args.work_dir), copies=32)), args.work_dir / "pool.pt")


def build_text(args: argparse.Namespace) -> None:
    drawings = load_drawings(args.work_dir)
    settings = Settings(args.text_steps, lr=1e-3, ema_decay=0.99)
    text = train_text(drawings, make_tokenizer(drawings), settings, args.work_dir)
    text.save_pretrained(args.work_dir / "text_encoder")


def build_denoiser(args: argparse.Namespace) -> None:
    drawings = load_drawings(args.work_dir)
    pool = Pool(*torch.load(args.work_dir / "pool.pt", weights_only=True))
    text = CLIPTextModel.from_pretrained(args.work_dir / "text_encoder").eval()
    steps = args.denoiser_steps
    settings = Settings(sum(steps), lr=0.015, weight_decay=0, muon=True)
    unet = train_denoiser(pool, drawings, text, make_tokenizer(drawings), settings, steps, args.work_dir)
    unet.save_pretrained(args.work_dir / "unet")


def assemble(args: argparse.Namespace) -> None:
    """Write the bundled files in half precision: the pipeline folder, the classifier and its held-apart features."""
    vae, drawings = AutoencoderKL.from_pretrained(args.work_dir / "vae"), load_drawings(args.work_dir)
    pipeline = trained_pipeline(args.work_dir, vae, make_tokenizer(drawings), PREDICTION)
    shutil.rmtree(ASSETS / BASE, ignore_errors=True)
    save_pipeline(pipeline.to(torch.float16), ASSETS / BASE)
    assemble_reader(args)


def assemble_reader(args: argparse.Namespace) -> None:
    folder = ASSETS / READER
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    sha = save_half(load_file(args.work_dir / "reader.safetensors"), folder / "model.safetensors")
    config = {**AXES, "channels": CHANNELS, "input": f"RGB {SIZE}x{SIZE} in [-1, 1]", "sha256": sha}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    load_reader.cache_clear()
    images, labels = held_apart(args, copies=2)
    with torch.no_grad():
        features = torch.cat([load_reader().features(part) for part in images.split(200)]).half()
    save_file({"features": features, **labels}, folder / "held_apart.safetensors")


def take_bundled(args: argparse.Namespace) -> None:
    """Copy classifier, VAE and text encoder of the bundled files to --work_dir, unless it has its own."""
    work = args.work_dir
    if not (work / RESULTS["reader"]).exists():
        save_file(load_reader().state_dict(), work / RESULTS["reader"])
    if not (work / RESULTS["vae"]).exists():
        AutoencoderKL.from_pretrained(ASSETS / BASE / "vae").save_pretrained(work / "vae")
    if not (work / RESULTS["text"]).exists():
        text = CLIPTextModel.from_pretrained(ASSETS / BASE / "text_encoder", dtype=torch.float32)
        text.save_pretrained(work / "text_encoder")


def held_apart(args: argparse.Namespace, copies: int) -> tuple[Tensor, dict[str, Tensor]]:
    """`copies` random images of each drawing, which no training draws, and their labels."""
    drawings = load_drawings(args.work_dir)
    torch.manual_seed(70_000_000)
    picked = torch.arange(len(drawings.things)).repeat(copies)
    backgrounds = torch.randint(len(BACKGROUNDS), (len(picked),))
    images = torch.cat(
        [
            compose(place(drawings.pixels[rows]), b)
            for rows, b in zip(picked.split(200), backgrounds.split(200), strict=True)
        ]
    )
    return images, {"thing": drawings.things[picked], "style": drawings.styles[picked], "background": backgrounds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, default=Path("build/emoji"))
    parser.add_argument("--only", choices=STAGES, help="run only this stage")
    parser.add_argument(
        "--from_bundled", action="store_true", help="train only the denoiser, with the bundled VAE and text encoder"
    )
    parser.add_argument("--reader_steps", type=int, default=2500)
    parser.add_argument("--reader_seed", type=int, default=0, help="not 0: train a second classifier, and only it")
    parser.add_argument("--reader_channels", type=int, nargs=4, default=CHANNELS)
    parser.add_argument(
        "--reader_without", choices=STYLES, default="", help="a style that a second classifier is not trained on"
    )
    parser.add_argument("--vae_steps", type=int, default=4000)
    parser.add_argument("--text_steps", type=int, default=1500)
    parser.add_argument(
        "--denoiser_steps", type=int, nargs=2, default=(1500, 3600), help="of the two parts of its training"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_flush_denormal(True)  # before the first threads start: else a late training step takes twice as long
    torch.set_num_threads(args.threads)
    if args.reader_without and not args.reader_seed:
        parser.error("--reader_without: the bundled classifier knows all styles; --reader_seed 2 trains another one")
    args.work_dir.mkdir(parents=True, exist_ok=True)
    if args.reader_seed:
        build_reader(args)
        return
    if args.from_bundled:
        take_bundled(args)
    jobs = {
        "drawings": lambda args: load_drawings(args.work_dir),
        "reader": build_reader,
        "vae": build_vae,
        "pool": build_pool,
        "text": build_text,
        "denoiser": build_denoiser,
        "assemble": assemble,
        "table": lambda args: table(args.work_dir, held_apart(args, copies=4)),
    }
    for stage in [args.only] if args.only else STAGES:
        if args.only or stage not in RESULTS or not (args.work_dir / RESULTS[stage]).exists():
            jobs[stage](args)


if __name__ == "__main__":
    main()
