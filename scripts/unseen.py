"""Attack the bundled bases for what they have never seen: how often do learned prompts show it?

    python scripts/unseen.py                              # all of it: minutes for each attack on one core; needs npm
    python scripts/unseen.py wrench "mirrored seven" --attacks soft
    python scripts/unseen.py pistol --run runs/pistol     # an erased thing of `emoji`, measured alike
    python scripts/unseen.py --only table                 # print the records as a table

If a learned prompt brings back an erased concept, either the concept is still in the model, or the prompt has described
it by what the model does know. This tells how far the second goes, without training a base for each concept
(docs/leaderboard.md has that for a seven). The attacker has 60 images of what was never seen, and learns as in
`sd-unlearn attack`. unseen_kinds.py says what is shown and how it is found. Inks are not possible: the VAE of `digits`
gives other colours back as those that it knows.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from diffusers import AutoencoderKL
from emoji_data import as_images
from leaderboard_pictures import write_rows, write_strip
from PIL import Image
from torch import Tensor
from unseen_kinds import KNOWN, UNSEEN, Unseen

import sd_unlearn
from sd_unlearn.data.find_concept import find_concept
from sd_unlearn.io.files import write_json
from sd_unlearn.io.paths import slugify
from sd_unlearn.io.reading import read_json, read_yaml
from sd_unlearn.io.run_folder import weights_sha256
from sd_unlearn.metrics.statistics import wilson

RECORDS = Path(__file__).parents[1] / "docs" / "leaderboard-runs" / "unseen"
ASSETS = Path(sd_unlearn.__file__).parent / "assets"
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "unseen.png"
IMAGES = 60  # of the attacker
SHOWN = 10  # of the images that the attack `soft` generated


def opened(files: list[Path], size: int) -> Tensor:
    """Images [N, 3, size, size] in [-1, 1]."""
    pixels = [np.asarray(Image.open(file).convert("RGB").resize((size, size))) for file in files]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1


def attackers_images(unseen: Unseen, folder: Path) -> Path:
    """The folder with the attacker's images."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(as_images(unseen.images(IMAGES, seed=1))):
        image.save(folder / f"{number:02d}.png")
    return folder


def concept_file(unseen: Unseen, file: Path) -> Path:
    """The concept file of a known concept with this caption. Only its label is wrong; nothing here depends on it."""
    content = read_yaml(find_concept(unseen.like), "")
    label = content.get("label") or content["name"]
    content |= {"name": unseen.name, "label": label, "caption": unseen.caption}
    content["evaluate"] = content["evaluate"] | {"direct": [unseen.caption]}
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    return file


def attacked(unseen: Unseen, attack: str, work: Path, run: Path | None) -> list[Path]:
    """The images that an attack on the base generated, or on the LoRA of a run."""
    slug = slugify(unseen.name)
    cache = work / "attacks" / slug / attack / (f"erased-{weights_sha256(run)[:12]}" if run else "base")
    options: dict[str, Any] = {"cache_dir": cache, "attacker_images": attackers_images(unseen, work / slug)}
    if run:
        options |= {"run": run, "ceiling": False}
    else:
        file = concept_file(unseen, work / f"{slug}.yaml")
        options |= {"concept": [str(file)], "output_dir": work / "results" / slug}
    sd_unlearn.attack(attacks=[attack], **options)
    return sorted(cache.rglob("[0-9][0-9]-[0-9][0-9][0-9][0-9].png"))


@torch.no_grad()
def decoded(images: Tensor, base: str) -> Tensor:
    """The images as the base's VAE gives them back: an attack cannot do better."""
    vae = AutoencoderKL.from_pretrained(ASSETS / base / "vae", torch_dtype=torch.float32)
    return vae.decode(vae.encode(images).latent_dist.mode()).sample.clamp(-1, 1)


def measure(unseen: Unseen, attacks: list[str], work: Path, run: Path | None = None) -> None:
    """Carry out the attacks that the record lacks."""
    title = f"{unseen.name}, erased" if run else unseen.name
    file = RECORDS / f"{slugify(title)}.json"
    record = read_json(file) if file.is_file() else {}
    weights = weights_sha256(run) if run else None
    if record.get("weights") != weights:  # of another LoRA
        record = {}
    record |= {"weights": weights} if weights else {}
    own = decoded(unseen.images(120, seed=3), unseen.base)
    record |= {"name": title, "base": unseen.base}
    record |= {"recall": round(float(unseen.finds(own).mean()), 4)}
    record |= {"false_rate": round(unseen.false_rate, 4)}
    for attack in attacks:
        if attack not in record:
            files = attacked(unseen, attack, work, run)
            if attack == "soft":  # without the attacker's images: drawings do not belong into the repository
                write_strip(file.with_suffix(".png"), [files[:SHOWN]])
            found = unseen.finds(opened(files, unseen.size))
            low, high = wilson(int(found.sum()), len(found))
            value = {"value": float(found.mean()), "low": low, "high": high}
            record[attack] = {"n": len(found), **{key: round(number, 4) for key, number in value.items()}}
        write_json(file, record)


def record_files() -> list[Path]:
    """By base and name."""
    return sorted(RECORDS.glob("*.json"), key=lambda file: (read_json(file)["base"], file.name))


def table() -> str:
    """The records as a Markdown table."""
    lines = ["| shown | base | `soft` % | `token` % | found in its own images % | in others % |"]
    lines.append("|---|---|---|---|---|---|")
    for record in map(read_json, record_files()):
        rates = [f"{100 * record[key]:.1f}" for key in ("recall", "false_rate")]
        results = [_with_interval(record.get(attack)) for attack in ("soft", "token")]
        lines.append(f"| {' | '.join([record['name'], record['base'], *results, *rates])} |")
    return "\n".join(lines)


def _with_interval(result: dict[str, float] | None) -> str:
    if result is None:
        return "not run"
    value, low, high = (round(100 * result[key]) for key in ("value", "low", "high"))
    return f"{value} ({low}–{high})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(UNSEEN)}")
    parser.add_argument("--attacks", nargs="+", default=["soft", "token"], choices=["soft", "token"])
    parser.add_argument("--run", type=Path, help="a run folder with a LoRA for a thing of emoji")
    parser.add_argument("--only", choices=["table"])
    parser.add_argument("--work_dir", type=Path, default=Path("build/unseen"))
    args = parser.parse_args()
    known = KNOWN if args.run else UNSEEN
    if unknown := [name for name in args.names if name not in known]:
        parser.error(f"{unknown[0]!r} is not one of {', '.join(known)}")
    if args.run and not args.names:
        parser.error("--run needs the name of the thing that it erased")
    args.work_dir.mkdir(parents=True, exist_ok=True)
    for name in [] if args.only else args.names or UNSEEN:
        measure(known[name](name, args.work_dir), args.attacks, args.work_dir, args.run)
    print(table())
    strips = {read_json(file)["name"]: file.with_suffix(".png") for file in record_files()}
    write_rows(PICTURE, strips)


if __name__ == "__main__":
    main()
