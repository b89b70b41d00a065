"""Training data of the bundled base `emoji`: things drawn by six hands, fetched from npm, on plain backgrounds.

Each package holds the emoji of one set as SVG, in the format of Iconify (https://iconify.design), with their Unicode
code points. npm must be installed. No drawing is part of this repository.
"""

from __future__ import annotations

import csv
import io
import json
import subprocess
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from sd_unlearn.metrics.emoji import ASSETS, BACKGROUNDS, SIZE, STYLES

PACKAGES = {  # style -> package of the npm scope @iconify-json
    "twemoji": "twemoji@1.2.5",
    "noto": "noto@1.2.9",
    "fluent": "fluent-emoji@1.2.7",
    "fluent flat": "fluent-emoji-flat@1.2.6",
    "openmoji": "openmoji@1.2.29",
    "emojione": "emojione@1.2.3",
}
NAMED_BY = {"fluent": "fluent flat", "emojione": "twemoji"}  # sets without code points -> a set with the same names
OTHER_NAMES = {  # in EmojiOne, which is older
    "1f52b": "pistol",
    "1f916": "robot-face",
    "1f621": "pouting-face",
    "1f470": "bride-with-veil",
}
BACKGROUND_RGB = {
    "white": (0.96, 0.96, 0.96),
    "grey": (0.58, 0.58, 0.60),
    "black": (0.12, 0.12, 0.14),
    "red": (0.80, 0.22, 0.22),
    "yellow": (0.96, 0.84, 0.30),
    "green": (0.36, 0.68, 0.36),
    "blue": (0.30, 0.50, 0.88),
    "pink": (0.96, 0.66, 0.80),
}
TONES = {"light": "1f3fb", "medium": "1f3fd", "dark": "1f3ff"}  # skin tones, besides the yellow of emoji
DRAWN = 128  # pixels that drawings are rendered at; they are placed on images of half that size
SPAN = 0.86  # of the image's width, taken by a drawing


@dataclass(frozen=True)
class Thing:
    """What an emoji shows: its code point and names."""

    code: str
    name: str
    article: str
    category: str
    synonyms: tuple[str, ...]
    translations: dict[str, str]  # de, fr, es, it

    def with_article(self, name: str | None = None) -> str:
        """The name, or a synonym, with its article: "an apple", "Santa Claus", "scissors"."""
        if name is None or not self.article:
            return f"{self.article} {name or self.name}".strip()
        return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


class Drawings(NamedTuple):
    """Rendered emoji. Indices are of THINGS, STYLES and TONES; tone -1: the yellow one, or no person."""

    pixels: Tensor  # [N, 4, 128, 128] RGBA with premultiplied alpha, uint8
    things: Tensor  # [N]
    styles: Tensor  # [N]
    tones: Tensor  # [N]


@cache
def things() -> tuple[Thing, ...]:
    """The things of assets/emoji_things.csv, in its order."""
    with (ASSETS / "emoji_things.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    names = [(row, tuple(filter(None, row["synonyms"].split("/")))) for row in rows]
    return tuple(
        Thing(r["code"], r["name"], r["article"], r["category"], s, {k: r[k] for k in ("de", "fr", "es", "it")})
        for r, s in names
    )


def fetch(style: str, folder: Path) -> dict[str, str]:
    """A style's drawings, downloaded unless `folder` has them: code points ("1f575-1f3fb") -> SVG."""
    icons, names = _package(style, folder)
    if style in NAMED_BY:
        names = _package(NAMED_BY[style], folder)[1]
        names |= {code: name for code, name in OTHER_NAMES.items() if names.get(code) not in icons["icons"]}
    known = {*icons["icons"], *icons.get("aliases", {})}
    return {code: _svg(icons, name) for code, name in names.items() if name in known}


@cache
def _package(style: str, folder: Path) -> tuple[dict, dict[str, str]]:
    """The icons of a package, and the names of its emoji by code points (of sets that list them)."""
    package = f"@iconify-json/{PACKAGES[style]}"
    archive = folder / f"{package[1:].replace('/', '-').replace('@', '-')}.tgz"
    if not archive.exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", "--silent", "--pack-destination", folder, package], check=True)
    with tarfile.open(archive) as tar:
        chars = json.loads(_read(tar, "package/chars.json")) if style not in NAMED_BY else {}
        return json.loads(_read(tar, "package/icons.json")), {c.replace("-fe0f", ""): n for c, n in chars.items()}


def _read(tar: tarfile.TarFile, name: str) -> bytes:
    file = tar.extractfile(name)
    assert file is not None
    return file.read()


_BOX = (("left", 0), ("top", 0), ("width", 16), ("height", 16))  # of an icon, else of its set, else Iconify's default


def _svg(icons: dict, name: str) -> str:
    """One icon of an Iconify set as an SVG file, centred on a square."""
    while name not in icons["icons"]:
        name = icons["aliases"][name]["parent"]
    icon = icons["icons"][name]
    box = [icon.get(key, icons.get(key, default)) for key, default in _BOX]
    view = " ".join(map(str, box))
    side = f'width="{DRAWN}" height="{DRAWN}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {side} viewBox="{view}">{icon["body"]}</svg>'


def draw(svg: str) -> Tensor:
    """Render an SVG in its own size: RGBA [4, height, width] with premultiplied alpha, uint8."""
    import resvg_py  # needed to build the base only

    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True))
    rgba = torch.from_numpy(np.array(Image.open(io.BytesIO(png)).convert("RGBA"))).permute(2, 0, 1).float()
    rgba[:3] *= rgba[3:] / 255
    return rgba.round().byte()


def load_drawings(work: Path) -> Drawings:
    """All things in all styles, persons also in three skin tones where a set has them; rendered once."""
    file = work / "drawings.pt"
    if not file.exists():
        torch.save(tuple(_draw_all(work)), file)
    return Drawings(*torch.load(file, weights_only=True))


def _draw_all(work: Path) -> Drawings:
    pixels, labels = [], []
    for style, name in enumerate(STYLES):
        svgs = fetch(name, work / "npm")
        for number, thing in enumerate(tqdm(things(), desc=name)):
            codes = [thing.code, *(f"{thing.code}-{tone}" for tone in TONES.values() if thing.category == "person")]
            for tone, code in enumerate(codes, start=-1):
                if code in svgs:
                    pixels.append(draw(svgs[code]))
                    labels.append((number, style, tone))
    return Drawings(torch.stack(pixels), *torch.tensor(labels).unbind(1))


def place(drawings: Tensor, degrees: float = 5, zoom: float = 0.05, shift: float = 0.03) -> Tensor:
    """Turn, zoom and shift drawings [B, 4, 128, 128] (uint8) at random: [B, 4, 64, 64] in [0, 1].

    shift: of the image's width, at most, as zoom is of the drawing's.
    """
    n, full = len(drawings), drawings.float() / 255
    angle = torch.deg2rad((torch.rand(n) * 2 - 1) * degrees)
    scale = 1 / (SPAN * (1 + (torch.rand(n) * 2 - 1) * zoom))
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = torch.cos(angle) * scale
    theta[:, 1, 0] = torch.sin(angle) * scale
    theta[:, 0, 1] = -theta[:, 1, 0]
    theta[:, :, 2] = (torch.rand(n, 2) * 2 - 1) * 2 * shift * scale[:, None]
    grid = F.affine_grid(theta, [n, 4, 2 * SIZE, 2 * SIZE], align_corners=False)
    return F.avg_pool2d(F.grid_sample(full, grid, align_corners=False), 2)


def compose(placed: Tensor, backgrounds: Tensor, jitter: float = 0.015) -> Tensor:
    """Put RGBA [B, 4, h, w] on plain backgrounds: RGB [B, 3, h, w] in [-1, 1].

    backgrounds: numbers of BACKGROUNDS [B], or colours [B, 3] in [0, 1].
    """
    known = torch.tensor([BACKGROUND_RGB[name] for name in BACKGROUNDS])
    colours = known[backgrounds] if backgrounds.dim() == 1 else backgrounds
    colours = (colours + torch.randn(len(placed), 3) * jitter).clamp(0, 1)[:, :, None, None]
    return (placed[:, :3] + colours * (1 - placed[:, 3:])) * 2 - 1


def sampling_weights(drawings: Drawings) -> Tensor:
    """[N] weights with which all pairs of thing and style are drawn equally often, with or without skin tones."""
    pair = drawings.things * len(STYLES) + drawings.styles
    return 1 / torch.bincount(pair)[pair]


def garbage(placed: Tensor) -> Tensor:
    """RGBA [B, 4, h, w] that shows no thing: quarters swapped, two things overlaid or joined, blobs, or nothing.

    placed: things as `place` returns them; each is combined with its neighbour.
    """
    n, _, h, w = placed.shape
    other = placed.roll(1, 0)
    quarters = placed.roll((h // 2, w // 2), (2, 3))
    joined = torch.cat([placed[..., : w // 2], other[..., w // 2 :]], 3)
    blobs = F.avg_pool2d(torch.randn(n, 4, h + 8, w + 8), 9, stride=1)
    blobs = (blobs / blobs.std() + 0.3).clamp(0, 1)
    blobs[:, :3] *= blobs[:, 3:]
    kinds = torch.stack([quarters, (placed + other) / 2, joined, blobs, torch.zeros_like(placed)])
    return kinds[torch.arange(n) % len(kinds), torch.arange(n)]


def as_images(images: Tensor) -> list[Image.Image]:
    """Images [B, 3, h, w] in [-1, 1] for saving."""
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(array) for array in pixels]


def contact_sheet(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """The images in rows."""
    side = images[0].width
    sheet = Image.new("RGB", (columns * side, -(-len(images) // columns) * side), "white")
    for number, image in enumerate(images):
        sheet.paste(image, (number % columns * side, number // columns * side))
    return sheet
