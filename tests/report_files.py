"""A results.json as an evaluation of several LoRAs writes it, with small images."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFilter

from sd_unlearn.io.files import write_json

CONCEPTS = (("seven", "seven"), ("brad-pitt", "Brad Pitt"), ("red-ink", "red ink"))
READER, FACES = "digits-reader sha256:abcdef", "facenet vggface2 t=0.71"
STRENGTHS = (0.5, 1.0, 1.5)


def wilson(value: float, n: int) -> tuple[float, float]:
    z = 1.96
    middle, wide = value + z * z / (2 * n), z * math.sqrt(value * (1 - value) / n + z * z / (4 * n * n))
    return (middle - wide) / (1 + z * z / n), (middle + wide) / (1 + z * z / n)


def row(concept: str, subject: str, metric: str, group: str, value: float | None, n: int = 200, **rest: Any) -> dict:
    low, high = (None, None) if value is None else wilson(min(1.0, value), n)
    return {
        "concept": concept,
        "subject": subject,
        "metric": metric,
        "group": group,
        "value": value,
        "n": n,
        "low": low,
        "high": high,
        "detector": READER,
        "interval": "wilson",
        "note": "",
        "seeds": None,
    } | rest


def rows_of(slug: str, subject: str, strength: float, gentle: float) -> list[dict[str, Any]]:
    """Metrics that change with the strength as those of a real LoRA do; a lower `gentle` forgets and harms less."""
    leak = round(200 * 0.96 * math.exp(-6.5 * strength * gentle)) / 200
    kept = 1.004 - 0.03 * strength**2 * gentle
    return [
        row(slug, subject, "leakage", "direct", leak, seeds=[leak, leak + 0.005]),
        row(slug, subject, "leakage", "held_out", min(0.9, 2 * leak + 0.01)),
        row(slug, subject, "leakage", "generic", leak / 10),
        row(slug, subject, "clean_replacement", "direct", 0.97, interval="bootstrap"),
        row(
            slug,
            subject,
            "retention",
            "kept",
            kept,
            900,
            low=kept - 0.012,
            high=kept + 0.011,
            interval="paired-bootstrap",
        ),
        row(
            slug,
            subject,
            "drift",
            "kept",
            0.02 + 0.05 * strength,
            900,
            low=0.02 + 0.045 * strength,
            high=0.02 + 0.055 * strength,
            interval="bootstrap",
        ),
    ]


def paint(place: Path, side: int, seed: int) -> Path:
    """A soft image with something like a face at FACE and as much detail as a photo."""
    draw = random.Random(seed)
    image = Image.effect_noise((side // 4, side // 4), 60).resize((side, side), Image.Resampling.BICUBIC)
    tint = tuple(draw.randrange(90, 255) for _ in range(3))
    made = Image.composite(Image.new("RGB", image.size, tint), Image.new("RGB", image.size, (20, 24, 32)), image)
    pen = ImageDraw.Draw(made)
    pen.ellipse([side * v for v in FACE], fill=(224, 180, 150), outline=(90, 50, 30), width=max(1, side // 60))
    for eye in (0.43, 0.57):
        pen.ellipse([side * (eye - 0.03), side * 0.36, side * (eye + 0.03), side * 0.42], fill=(30, 20, 20))
    made = made.filter(ImageFilter.GaussianBlur(side / 256))
    place.parent.mkdir(parents=True, exist_ok=True)
    made.save(place)
    return place


FACE = (0.34, 0.22, 0.66, 0.66)


def make_many(folder: Path, side: int = 96, each: int = 3, **changes: Any) -> dict[str, Any]:
    """Write a results.json of 3 concepts x 2 LoRAs x 3 strengths, with `each` pairs per group, LoRA and strength."""
    subjects: list[dict[str, Any]] = [{"id": "base", "name": "digits", "what": "base"}]
    rows, differences, pairs = [], [], []
    for c, (slug, _) in enumerate(CONCEPTS):
        rows += [
            row(slug, "base", "leakage", "direct", 0.965),
            row(slug, "base", "leakage", "held_out", 0.9),
            row(slug, "base", "leakage", "generic", 0.1),
            row(slug, "base", "accuracy", "kept", 0.97, 900),
        ]
        for gentle, kind in ((1.0, "teacher"), (0.45, "noise")):
            for strength in STRENGTHS:
                name = f"{slug}-{kind}"
                subject = f"{name}@{strength:g}"
                subjects.append(
                    {
                        "id": subject,
                        "name": name,
                        "what": "lora",
                        "strength": strength,
                        "forgets": slug,
                        "sha256": f"{c}{kind[0]}".encode().hex().ljust(64, "0"),
                        "training": {"beta": 0.1, "rank": 8},
                        "cost": {"seconds": 41.2 + c, "steps": 400, "device": "cpu"},
                    }
                )
                mine = rows_of(slug, subject, strength, gentle)
                if slug == "brad-pitt":
                    mine.append(row(slug, subject, "face_rate", "direct", 0.9, detector=FACES))
                rows += mine
                leak = mine[0]["value"]
                differences += [
                    {
                        "concept": slug,
                        "metric": "leakage",
                        "group": "direct",
                        "subject": subject,
                        "against": "base",
                        "value": leak - 0.965,
                        "n": 200,
                        "low": leak - 0.99,
                        "high": leak - 0.93,
                        "p": 1e-9,
                        "p_holm": 6e-9,
                        "detector": READER,
                        "interval": "paired-bootstrap",
                    },
                    {
                        "concept": slug,
                        "metric": "retention",
                        "group": "kept",
                        "subject": subject,
                        "against": "base",
                        "value": mine[4]["value"] - 1,
                        "n": 900,
                        "low": mine[4]["low"] - 1,
                        "high": mine[4]["high"] - 1,
                        "p": 0.2 if strength < 1 else 0.001,
                        "p_holm": 0.6 if strength < 1 else 0.006,
                        "detector": READER,
                        "interval": "paired-bootstrap",
                    },
                ]
                pairs += pairs_of(folder, slug, subject, leak, side, each)
    results = {
        "schema_version": 2,
        "created": "2026-11-22T10:00:00+00:00",
        "version": "0.2.0",
        "tier": "quick",
        "base": {"name": "digits", "kind": "sd1", "sha256": "ab" * 32, "resolution": side},
        "sampler": {"name": "DDIM", "steps": 25, "guidance_scale": 3, "zero_terminal_snr": False},
        "seeds": {"evaluate": [2_000_000_000, 3_000_000_000], "seeds": [0, 1]},
        "concepts": [
            {
                "slug": slug,
                "name": name,
                "kind": "person" if "pitt" in slug else "object",
                "sha256": "cd" * 32,
                "caption": f"a picture of {name}",
                "generic": "a picture",
                "prompts": {"direct": [f"a picture of {name}"]},
            }
            for slug, name in CONCEPTS
        ],
        "subjects": subjects,
        "cards": [
            {
                "detector": READER,
                "metrics": ["leakage", "accuracy"],
                "about": "The bundled reader of digit and ink.",
                "version": "0.2.0",
                "weights": "sha256:abcdef",
                "threshold": "the likeliest class",
                "limits": "Reads every picture as some digit, also one of nothing.",
                "extra": {"accuracy": "99.1 %"},
            },
            {
                "detector": FACES,
                "metrics": ["face_rate"],
                "about": "Finds faces and compares them with references.",
                "version": "facenet-pytorch 2.5.3",
                "weights": "vggface2",
                "threshold": "0.71, at a false-accept rate of 1 %",
                "limits": "Misses faces smaller than 20 pixels.",
                "extra": {},
            },
        ],
        "rows": rows,
        "differences": differences,
        "pairs": pairs,
        "skipped": [{"subject": subjects[1]["id"], "path": "images/lost.png", "why": "truncated file"}],
    } | changes
    write_json(folder / "results.json", results)
    return results


def pairs_of(folder: Path, slug: str, subject: str, leak: float, side: int, each: int) -> list[dict[str, Any]]:
    made = []
    for group, prompt in (("direct", f"a picture of {slug}"), ("alike", "a picture of someone else")):
        for i in range(each):
            base = Path("images") / "base" / f"{slug}-{group}-{i}.png"
            image = Path("images") / subject / f"{slug}-{group}-{i}.png"
            for number, place in enumerate((base, image)):
                if not (folder / place).is_file():
                    paint(folder / place, side, hash((i, number)) % 1000)
            leaks, lost = group == "direct" and i < leak * each, group == "alike" and i == 0 and leak == 0
            made.append(
                {
                    "concept": slug,
                    "subject": subject,
                    "group": group,
                    "prompt": prompt,
                    "seed": 2_000_000_000 + i,
                    "base": base.as_posix(),
                    "image": image.as_posix(),
                    "expected": slug if group == "direct" else "else",
                    "base_read": slug if group == "direct" else "else",
                    "image_read": slug if leaks or (group == "alike" and lost) else "else",
                    "leak": leaks,
                    "lost": lost,
                    "faces": [list(FACE)] if "pitt" in slug else [],
                    "base_faces": [list(FACE)] if "pitt" in slug else [],
                }
            )
    return made
