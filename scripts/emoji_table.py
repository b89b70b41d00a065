"""Measure the bundled base `emoji` and its classifier, and write the model card. Used by build_emoji.py."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from base_training import file_rows, training_seconds
from diffusers import StableDiffusionPipeline
from emoji_captions import STYLE_NAMES, with_article
from emoji_data import as_images, contact_sheet, things
from emoji_models import PARTS
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from sd_unlearn.metrics.emoji import ASSETS, AXES, BACKGROUNDS, CATEGORIES, STYLES, THINGS, EmojiReader, load_reader
from sd_unlearn.models.sampling import BASE_SAMPLERS
from sd_unlearn.models.source import EMOJI

Row = tuple[str, float, int, str]  # what is measured, its share, of how many images, the target
BATCH = 100
CARD = Path(__file__).parent / "emoji_card.md"
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "emoji.png"
SHOWN = (  # on the picture
    *("cat", "tiger", "dog", "wolf", "owl", "pistol", "knife", "bomb", "cigarette", "beer", "old man", "Santa Claus"),
    *("mage", "detective", "guitar", "rocket"),
)
OF_EACH_THING, OF_EACH_STYLE, OF_EACH_BACKGROUND, OF_EACH_CATEGORY, GENERIC = 8, 50, 25, 10, 300


def table(work: Path, held: tuple[Tensor, dict[str, Tensor]]) -> None:
    """Measure the bundled files, print the table and write the model card.

    held: images that no network was trained on, and their label on each axis.
    """
    pipeline = StableDiffusionPipeline.from_pretrained(ASSETS / "emoji")
    pipeline.set_progress_bar_config(disable=True)
    reader = load_reader()
    rows = reader_rows(reader, held) + base_rows(pipeline, reader, work)
    draw_styles(work).save(PICTURE)
    lines = ["| | measured | n | target |", "|---|---|---|---|"]
    lines += [f"| {name} | {value:.1%} | {n} | {target} |" for name, value, n, target in rows]
    print("\n".join(lines))
    minutes = {name: training_seconds(name, work) for name in ("reader", "vae", "text", *(part.name for part in PARTS))}
    times = ", ".join(f"{name} {seconds / 60:.0f} min" for name, seconds in minutes.items() if seconds)
    card = CARD.read_text().replace("@TABLE@", "\n".join(lines)).replace("@TIMES@", times or "not recorded")
    card = card.replace("@HASHES@", "\n".join(file_rows(ASSETS, ("emoji", "emoji_reader"))))
    (ASSETS / "emoji" / "README.md").write_text(card.replace("@THINGS@", ", ".join(THINGS)))


def draw_styles(work: Path) -> Image.Image:
    """The things of SHOWN in columns and the styles in rows, from the images of every thing in every style."""
    grid = torch.load(work / "pictures" / "grid.pt", weights_only=True).unflatten(0, (len(THINGS), len(STYLES)))
    chosen = grid[[THINGS.index(name) for name in SHOWN]].transpose(0, 1)
    return contact_sheet(as_images(chosen.flatten(0, 1).float() / 127), len(SHOWN))


@torch.no_grad()
def read(reader: EmojiReader, images: Tensor) -> dict[str, Tensor]:
    """The probabilities [N, labels] of each axis."""
    parts = [reader(part) for part in images.split(200)]
    return {axis: torch.cat(logits).softmax(1) for axis, logits in zip(AXES, zip(*parts, strict=True), strict=True)}


def reader_rows(reader: EmojiReader, held: tuple[Tensor, dict[str, Tensor]]) -> list[Row]:
    images, labels = held
    found = read(reader, images)
    targets = {"thing": ">= 97 %", "style": ">= 99 %", "background": ">= 99 %"}
    rows: list[Row] = [
        (f"classifier, {a}, held-apart images", share(found[a].argmax(1) == labels[a]), len(images), targets[a])
        for a in AXES
    ]
    torch.manual_seed(1)
    garbage = {"quarters swapped": images.roll((32, 32), (2, 3)), "pixel noise": torch.rand(500, 3, 64, 64) * 2 - 1}
    for what, bad in garbage.items():
        certain = read(reader, bad)["thing"].amax(1) >= 0.9
        rows.append((f"classifier, {what}: a thing with p >= 0.9", share(certain), len(bad), "<= 5 %"))
    return rows


def base_rows(pipeline: StableDiffusionPipeline, reader: EmojiReader, work: Path) -> list[Row]:
    """The shares of images that the reader reads as asked."""
    pictures = work / "pictures"
    pictures.mkdir(exist_ok=True)

    def asked(name: str, prompts: Sequence[str], columns: int = 25) -> dict[str, Tensor]:
        batches = [list(prompts[i : i + BATCH]) for i in range(0, len(prompts), BATCH)]
        images = torch.cat(
            [generate(pipeline, b, seed) for seed, b in enumerate(tqdm(batches, desc=name, mininterval=5))]
        )
        contact_sheet(as_images(images[:1000]), columns).save(pictures / f"{name}.png")
        torch.save((images * 127).round().char(), pictures / f"{name}.pt")
        return {axis: p.argmax(1) for axis, p in read(reader, images).items()}

    started = time.monotonic()
    generate(pipeline, ["an emoji"] * BATCH, 0)
    print(f"{BATCH} images in {time.monotonic() - started:.1f} s with {torch.get_num_threads()} threads")
    return [
        *thing_rows(asked),
        *style_rows(asked),
        *background_rows(asked),
        *category_rows(asked),
        *generic_rows(asked),
    ]


Asked = Callable[..., dict[str, Tensor]]


def thing_rows(asked: Asked) -> list[Row]:
    wanted = torch.arange(len(THINGS)).repeat_interleave(OF_EACH_THING)
    right = asked("things", [f"an emoji of {things()[n].with_article()}" for n in wanted])["thing"] == wanted
    of_each = right.view(-1, OF_EACH_THING).float().mean(1)
    worst = [f"{THINGS[n]} {of_each[n]:.0%}" for n in of_each.argsort()[:10]]
    print("Worst things:", ", ".join(worst))
    foreign = [f"un emoji de {thing.translations['es']}" for thing in things()]
    foreign += [f"ein Emoji: {thing.translations['de']}" for thing in things()]
    both = asked("languages", foreign)["thing"] == torch.arange(len(THINGS)).repeat(2)
    return [
        ("generated: things, read as asked", share(right), len(right), ">= 90 %"),
        ("things of which at least half are read as asked", share(of_each >= 0.5), len(of_each), ""),
        ("things in German and Spanish", share(both), len(both), ""),
    ]


def style_rows(asked: Asked) -> list[Row]:
    names = [STYLE_NAMES[style][0] for style in STYLES]
    wanted = torch.arange(len(STYLES)).repeat_interleave(OF_EACH_STYLE)
    right = asked("styles", [f"an emoji in the {names[n]} style" for n in wanted])["style"] == wanted
    thing, style = (
        axis.flatten() for axis in torch.meshgrid(torch.arange(len(THINGS)), torch.arange(len(STYLES)), indexing="ij")
    )
    pairs = zip(thing.tolist(), style.tolist(), strict=True)
    grid = asked(
        "grid", [f"an emoji of {things()[t].with_article()} in the {names[s]} style" for t, s in pairs], len(STYLES) * 4
    )
    return [
        ("generated: styles", share(right), len(right), ">= 95 %"),
        ("every thing in every style: thing", share(grid["thing"] == thing), len(thing), ">= 90 %"),
        ("every thing in every style: style", share(grid["style"] == style), len(style), ">= 95 %"),
    ]


def background_rows(asked: Asked) -> list[Row]:
    wanted = torch.arange(len(BACKGROUNDS)).repeat_interleave(OF_EACH_BACKGROUND)
    found = asked("backgrounds", [f"an emoji on a {BACKGROUNDS[n]} background" for n in wanted])["background"]
    return [("generated: backgrounds", share(found == wanted), len(wanted), ">= 95 %")]


def category_rows(asked: Asked) -> list[Row]:
    wanted = [category for category in CATEGORIES for _ in range(OF_EACH_CATEGORY)]
    found = asked("categories", [f"an emoji of {with_article(category)}" for category in wanted])["thing"].tolist()
    right = torch.tensor([AXES["thing"][n] in CATEGORIES[category] for n, category in zip(found, wanted, strict=True)])
    return [("generated: categories", share(right), len(right), "")]


def generic_rows(asked: Asked) -> list[Row]:
    found = asked("generic", ["an emoji"] * GENERIC)
    counts = {axis: torch.bincount(found[axis], minlength=len(labels)) / GENERIC for axis, labels in AXES.items()}
    return [
        ("generic prompt: things that appear", share(counts["thing"] > 0), len(THINGS), ">= 70 %"),
        ("generic prompt: the most frequent thing", counts["thing"].max().item(), GENERIC, "<= 5 %"),
        ("generic prompt: the rarest style", counts["style"].min().item(), GENERIC, ">= 5 %"),
        ("generic prompt: the rarest background", counts["background"].min().item(), GENERIC, ">= 5 %"),
    ]


def share(of: Tensor) -> float:
    return of.float().mean().item()


def generate(pipeline: StableDiffusionPipeline, prompts: list[str], seed: int) -> Tensor:
    """One image per prompt, [B, 3, h, w] in [-1, 1], with the sampler of evaluations."""
    sampler, generator = BASE_SAMPLERS[EMOJI], torch.Generator().manual_seed(seed)
    options = {"num_inference_steps": sampler.steps, "guidance_scale": sampler.guidance_scale, "output_type": "pt"}
    return pipeline(prompts, generator=generator, **options).images * 2 - 1
