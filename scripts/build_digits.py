"""Train the bundled base `digits` and its classifier from scratch, then measure them and write their model card.

    python scripts/build_digits.py                    # about an hour and a half on two cores
    python scripts/build_digits.py --only table       # only measure the bundled files
    python scripts/build_digits.py --without seven    # a model that never saw a seven: about 40 minutes on one core
    python scripts/build_digits.py --width 0.25       # with a quarter of the UNet's width
    python scripts/build_digits.py --kind sd3         # digits-sd3, the same data as a Stable Diffusion 3

The stages (reader, vae, denoiser, assemble, table) save their results in --work_dir. A finished stage is not repeated,
so an interrupted build resumes at the stage that was interrupted.

--kind sd3 trains two text encoders and a transformer on the same data (digits_sd3.py) and keeps the bundled classifier,
tokenizer and VAE. Its training saves its state every few minutes and resumes from there.

--without trains text encoder and UNet again, with the same seeds and settings, on no image and no caption of one digit
or ink. The bundled tokenizer and VAE are kept, which no method of unlearning changes. The result is a pipeline folder,
<work_dir>/pipeline: what an attack gets out of a model that never knew the concept.

--width, --vae_factor and --prediction_type train other bases on the same data in the same way, to find out whether
settings that were tuned on `digits` carry over. The four options can be combined.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from base_training import file_rows, save_half, save_pipeline, trained_pipeline
from diffusers import AutoencoderKL, StableDiffusion3Pipeline, StableDiffusionPipeline
from digits_data import load_digits, paint
from digits_models import (
    encode_pool,
    make_tokenizer,
    train_denoiser,
    train_reader,
    train_vae,
)
from digits_sd3 import Networks, Pool, flow_pipeline, shift_latents, train_flow
from digits_variants import Variant, add_options, build_variant
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTokenizer

from sd_unlearn.metrics.digits import DIGITS, INKS, DigitReader, load_reader

ASSETS = Path(__file__).parent.parent / "sd_unlearn" / "assets"
STAGES = ("reader", "vae", "denoiser", "assemble", "table")
Draw = Callable[[str, int, int], Tensor]  # images [count, 3, 32, 32] for (prompt, count, seed)
TableRow = tuple[str, float, int, str]  # what is measured, a share, the number of images, the target


def build_reader(work: Path, steps: int) -> None:
    strokes, labels, _, _ = load_digits()
    save_file(train_reader(strokes, labels, steps).state_dict(), work / "reader.safetensors")


def build_vae(work: Path, steps: int) -> None:
    strokes, labels, _, _ = load_digits()
    train_vae(strokes, labels, steps).save_pretrained(work / "vae")


def build_denoiser(work: Path, steps: int) -> None:
    strokes, labels, _, _ = load_digits()
    pool = encode_pool(AutoencoderKL.from_pretrained(work / "vae").eval(), strokes, labels, copies=4)
    train_denoiser(pool, make_tokenizer(), steps, work)


def build_sd3(work: Path, steps: int) -> None:
    """Train text encoders and transformer of digits-sd3. `work` holds its state and the VAE with shift and scale."""
    bundled = StableDiffusionPipeline.from_pretrained(ASSETS / "digits")
    if not (work / "pool.safetensors").exists():
        strokes, labels, _, _ = load_digits()
        latents, digits, inks = encode_pool(bundled.vae.eval(), strokes, labels, copies=2)
        latents = shift_latents(bundled.vae, latents / bundled.vae.config.scaling_factor)
        bundled.vae.save_pretrained(work / "vae")
        save_file({"latents": latents, "digits": digits, "inks": inks}, work / "pool.safetensors")
    vae = AutoencoderKL.from_pretrained(work / "vae").eval()

    def progress(networks: Networks) -> str:
        draw = partial(generate, flow_pipeline(networks, vae, bundled.tokenizer), max_sequence_length=1)
        digits, inks = read_as_asked(draw)
        return f"read as asked: digits {digits:.1%}, inks {inks:.1%}"

    train_flow(Pool(**load_file(work / "pool.safetensors")), bundled, steps, work, progress)


def assemble_sd3(work: Path, _: int) -> None:
    """Write the folder of digits-sd3 in half precision: 6 MB."""
    folder = ASSETS / "digits" / "tokenizer"
    tokenizer, vae = CLIPTokenizer.from_pretrained(folder), AutoencoderKL.from_pretrained(work / "vae")
    pipeline = flow_pipeline(Networks.load(work, tokenizer), vae, tokenizer).to(torch.float16)
    shutil.rmtree(ASSETS / "digits-sd3", ignore_errors=True)
    pipeline.save_pretrained(ASSETS / "digits-sd3")
    for name in ("tokenizer", "tokenizer_2"):  # with the two files of transformers 4, see `assemble`
        shutil.copytree(folder, ASSETS / "digits-sd3" / name, dirs_exist_ok=True)
    for config in (ASSETS / "digits-sd3").rglob("config.json"):  # without the paths of this machine
        content = json.loads(config.read_text())
        content.pop("_name_or_path", None)
        config.write_text(json.dumps(content, indent=2) + "\n")


def assemble(work: Path, _: int) -> None:
    """Write the bundled files: the pipeline folder, the classifier (in half precision) and the held-out features."""
    pipeline = trained_pipeline(work, AutoencoderKL.from_pretrained(work / "vae"), make_tokenizer())
    base, reader_dir, reader = ASSETS / "digits", ASSETS / "digits_reader", load_file(work / "reader.safetensors")
    for folder in (base, reader_dir):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    save_pipeline(pipeline, base)
    sha = save_half(reader, reader_dir / "model.safetensors")
    config = {"digits": DIGITS, "inks": INKS, "input": "RGB 32x32 in [-1, 1]", "sha256": sha}
    (reader_dir / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    load_reader.cache_clear()
    images, digits, inks = held_out_images()
    with torch.no_grad():
        features = load_reader().features(images).half()
    save_file({"features": features, "digit": digits, "ink": inks}, reader_dir / "held_apart.safetensors")


def held_out_images() -> tuple[Tensor, Tensor, Tensor]:
    """The 700 held-out digits, each in every ink: images [3500, 3, 32, 32], digits [3500], inks [3500]."""
    torch.manual_seed(7)
    _, _, strokes, labels = load_digits()
    inks = torch.arange(len(INKS)).repeat_interleave(len(strokes))
    return paint(strokes.repeat(len(INKS), 1, 1, 1), inks), labels.repeat(len(INKS)), inks


@torch.no_grad()
def read(reader: DigitReader, images: Tensor) -> tuple[Tensor, Tensor]:
    """The digit and ink that the classifier predicts for each image."""
    digit, ink = reader(images)
    return digit.argmax(1), ink.argmax(1)


def generate(pipeline: Any, prompt: str, count: int, seed: int, **options: Any) -> Tensor:
    """Images [count, 3, 32, 32] in [-1, 1]: 25 steps of the pipeline's sampler, guidance scale 3, as in evaluations."""
    generator = torch.Generator().manual_seed(seed)
    images = pipeline(
        [prompt] * count, num_inference_steps=25, guidance_scale=3.0, generator=generator, output_type="pt", **options
    ).images
    return images * 2 - 1


def table(work: Path, _: int) -> None:
    """Measure the bundled files and write the results into the model card."""
    reader = load_reader()
    images, digits, inks = held_out_images()
    digit, ink = read(reader, images)
    rows = [
        ("classifier, digit, held-out images", (digit == digits).float().mean().item(), len(digits), ">= 98.5 %"),
        ("classifier, ink, held-out images", (ink == inks).float().mean().item(), len(inks), ">= 99.5 %"),
    ]
    pipeline = StableDiffusionPipeline.from_pretrained(ASSETS / "digits")
    pipeline.set_progress_bar_config(disable=True)
    draw = partial(generate, pipeline)
    write_card(work, ASSETS / "digits", [*rows, *prompt_rows(draw), *generic_rows(draw)])


def table_sd3(work: Path, _: int) -> None:
    """Measure the files of digits-sd3 and write the results into its model card."""
    without_t5 = {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = StableDiffusion3Pipeline.from_pretrained(ASSETS / "digits-sd3", dtype=torch.float32, **without_t5)
    pipeline.set_progress_bar_config(disable=True)
    draw = partial(generate, pipeline, max_sequence_length=1)
    digits, inks = read_as_asked(partial(generate, pipeline))
    default = [
        ("generated: digits, with 256 tokens of zeros", digits, 100, ">= 95 %"),
        ("generated: inks, with 256 tokens of zeros", inks, 50, ">= 95 %"),
    ]
    write_card(work, ASSETS / "digits-sd3", [*prompt_rows(draw), *generic_rows(draw), *default])


def read_as_asked(draw: Draw) -> tuple[float, float]:
    """The shares of digits and of inks read as asked, of ten images for each."""
    shares = [value for _, value, *_ in prompt_rows(draw, count=10)]
    digits, inks = shares[: len(DIGITS)], shares[len(DIGITS) :]
    return sum(digits) / len(digits), sum(inks) / len(inks)


def prompt_rows(draw: Draw, count: int = 100) -> list[TableRow]:
    """How often images of each digit and ink are read as asked."""
    reader, rows = load_reader(), []
    for expected, name in enumerate(DIGITS):
        digit, _ = read(reader, draw(f"a photo of the digit {name}", count, expected))
        rows.append((f"generated: digit {name}", (digit == expected).float().mean().item(), count, ">= 95 %"))
    for expected, name in enumerate(INKS):
        _, ink = read(reader, draw(f"a photo of a handwritten digit in {name} ink", count, 100 + expected))
        rows.append((f"generated: {name} ink", (ink == expected).float().mean().item(), count, ">= 95 %"))
    return rows


def generic_rows(draw: Draw) -> list[TableRow]:
    """The shares of the digits and inks among 400 images of the generic prompt."""
    images = torch.cat([draw("a photo of a handwritten digit", 100, 200 + i) for i in range(4)])
    digit, ink = read(load_reader(), images)
    rows = [
        (f"generic prompt: {n}", (digit == i).float().mean().item(), 400, "3 % to 25 %") for i, n in enumerate(DIGITS)
    ]
    return rows + [
        (f"generic prompt: {n}", (ink == i).float().mean().item(), 400, "8 % to 35 %") for i, n in enumerate(INKS)
    ]


def write_card(work: Path, base: Path, rows: list[TableRow]) -> None:
    """Print the table and write the model card of a base, given its folder."""
    lines = ["| | measured | n | target |", "|---|---|---|---|"]
    lines += [f"| {name} | {value:.1%} | {n} | {target} |" for name, value, n, target in rows]
    print("\n".join(lines))
    is_sd3 = base.name == "digits-sd3"
    hashes = file_rows(base.parent, (base.name,) if is_sd3 else (base.name, "digits_reader"))
    seconds = {s: (work / f"{s}.seconds").read_text() for s in STAGES if (work / f"{s}.seconds").exists()}
    template = (Path(__file__).parent / ("digits_sd3_card.md" if is_sd3 else "digits_card.md")).read_text()
    card = template.replace("@TABLE@", "\n".join(lines)).replace("@HASHES@", "\n".join(hashes))
    card = card.replace(
        "@TIMES@", ", ".join(f"{s} {int(t) / 60:.0f} min" for s, t in seconds.items()) or "not recorded"
    )
    (base / "README.md").write_text(card)


def seed_stage(stage: str) -> None:
    torch.manual_seed(STAGES.index(stage))
    random.seed(STAGES.index(stage))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=["sd1", "sd3"], default="sd1", help="the layout: digits, or digits-sd3")
    parser.add_argument("--work_dir", type=Path, help="default: build/<base>, e.g. build/digits-without-seven")
    parser.add_argument("--only", choices=STAGES, help="run only this stage, even if it is finished")
    add_options(parser)
    parser.add_argument("--reader_steps", type=int, default=4000)
    parser.add_argument("--vae_steps", type=int, default=4000)
    parser.add_argument("--denoiser_steps", type=int, help="default: 4500, for --kind sd3 3400")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    variant = Variant(args.without, args.width, args.vae_factor, args.prediction_type)
    args.work_dir = args.work_dir or Path("build", "digits-sd3" if args.kind == "sd3" else variant.name)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    args.denoiser_steps = args.denoiser_steps or (3400 if args.kind == "sd3" else 4500)
    if args.kind == "sd3" and (variant != Variant() or args.only in ("reader", "vae")):
        parser.error("--kind sd3 has no variants, and no stages reader and vae.")
    if variant != Variant():
        seed_stage("denoiser")
        build_variant(variant, args.work_dir, args.vae_steps, args.denoiser_steps)
        return
    jobs = {"reader": build_reader, "vae": build_vae, "denoiser": build_denoiser, "assemble": assemble, "table": table}
    if args.kind == "sd3":
        jobs = {"denoiser": build_sd3, "assemble": assemble_sd3, "table": table_sd3}
    for stage in [args.only] if args.only else jobs:
        done = args.work_dir / f"{stage}.seconds"
        if done.exists() and not args.only and stage not in ("assemble", "table"):
            continue
        seed_stage(stage)
        started = time.monotonic()
        jobs[stage](args.work_dir, getattr(args, f"{stage}_steps", 0))
        if stage not in ("assemble", "table"):
            done.write_text(str(int(time.monotonic() - started)))


if __name__ == "__main__":
    main()
