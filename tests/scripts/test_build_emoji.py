"""The data, captions, concept files and trainings of the bundled base emoji."""

from __future__ import annotations

import random
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from emoji_files import CAT, PISTOL, write_packages
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from sd_unlearn.data.find_concept import read_concept
from sd_unlearn.metrics.emoji import AXES, BACKGROUNDS, CATEGORIES, READER, STYLES, THINGS

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("resvg_py")
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))


@pytest.fixture
def work(tmp_path: Path) -> Iterator[Path]:
    """A work folder with small packages."""
    import emoji_data

    write_packages(tmp_path / "npm", emoji_data.PACKAGES, tuple(emoji_data.NAMED_BY))
    yield tmp_path
    emoji_data._package.cache_clear()


def test_labels_are_unique_and_every_thing_is_named_in_five_languages() -> None:
    from emoji_data import things

    assert max(Counter(READER.labels).values()) == 1
    assert max(Counter(thing.code for thing in things()).values()) == 1
    assert [thing.name for thing in things()] == list(THINGS)
    assert all(all(thing.translations.values()) for thing in things())
    assert 100 <= len(THINGS) <= 200
    assert len(STYLES) >= 6
    assert [thing.with_article() for thing in things() if thing.name in ("axe", "scissors", "wine")] == [
        "an axe",
        "scissors",
        "a glass of wine",
    ]


def test_drawings_are_found_by_code_point_or_by_the_names_of_another_set(work: Path) -> None:
    from emoji_data import fetch, load_drawings

    for style in STYLES:
        svgs = fetch(style, work / "npm")
        assert set(svgs) == {CAT, "1f575", "1f575-1f3ff", PISTOL}, style
    drawings = load_drawings(work)
    assert drawings.pixels.shape == (4 * len(STYLES), 4, 128, 128)
    cat, dark = drawings.pixels[0], drawings.pixels[drawings.tones == 2][0]
    assert cat[:, 40, 64].tolist() == [255, 0, 0, 255]  # centred on a square, though the icon is 16 x 8
    assert cat[:, 10, 64].tolist() == [0, 0, 0, 0]
    assert dark[:, 40, 64].tolist() == [0, 0, 0, 255]
    assert Counter(drawings.tones.tolist()) == {-1: 3 * len(STYLES), 2: len(STYLES)}
    assert torch.equal(load_drawings(work).pixels, drawings.pixels)


def test_pairs_of_thing_and_style_are_drawn_equally_often(work: Path) -> None:
    from emoji_data import load_drawings, sampling_weights

    drawings = load_drawings(work)
    weights = sampling_weights(drawings)
    assert weights[drawings.things == THINGS.index("cat")].tolist() == [1.0] * len(STYLES)
    assert weights[drawings.things == THINGS.index("detective")].tolist() == [0.5] * 2 * len(STYLES)


def test_images_show_the_drawing_on_its_background() -> None:
    from emoji_data import BACKGROUND_RGB, compose, place

    torch.manual_seed(0)
    square = torch.zeros(8, 4, 128, 128, dtype=torch.uint8)
    square[:, 0, 32:96, 32:96] = square[:, 3, 32:96, 32:96] = 255
    backgrounds = torch.arange(8)
    images = compose(place(square), backgrounds)
    assert images.shape == (8, 3, 64, 64)
    expected = torch.tensor([BACKGROUND_RGB[name] for name in BACKGROUNDS]) * 2 - 1
    assert (images[:, :, 0, 0] - expected).abs().max() < 0.15
    assert (images[:, :, 32, 32] - torch.tensor([1.0, -1, -1])).abs().max() < 1e-4
    still = place(square, degrees=0, zoom=0, shift=0)
    share = still[0, 3].mean().item()
    assert share == pytest.approx((0.5 * 0.86) ** 2, rel=0.03)
    assert not torch.allclose(place(square)[0], place(square)[1])


def test_garbage_shows_no_whole_thing() -> None:
    from emoji_data import garbage

    placed = torch.rand(10, 4, 64, 64)
    bad = garbage(placed)
    assert bad.shape == placed.shape
    assert bad[4].abs().max() == bad[9].abs().max() == 0
    assert all((bad[i] - placed[i]).abs().mean() > 0.1 for i in range(10))
    assert torch.equal(bad[2][..., :32], placed[2][..., :32])
    assert torch.equal(bad[2][..., 32:], placed[1][..., 32:])


def test_captions_are_seeded_and_name_what_the_image_shows() -> None:
    from emoji_captions import Label, caption

    label = Label(THINGS.index("detective"), STYLES.index("openmoji"), BACKGROUNDS.index("blue"), tone=2)

    def captions(seed: int) -> list[str]:
        rng = random.Random(seed)
        return [caption(label, rng) for _ in range(4000)]

    texts = captions(0)
    assert texts == captions(0)
    assert texts != captions(1)
    share = {text: count / len(texts) for text, count in Counter(texts).items()}
    assert share[""] == pytest.approx(0.1, abs=0.02)
    for plain in ("an emoji", "an emoji of a person", "an emoji in the OpenMoji style", "un emoji : détective"):
        assert plain in share
    for word, least, most in (
        ("detective", 0.4, 0.7),
        ("OpenMoji", 0.25, 0.5),
        ("blue", 0.15, 0.35),
        ("dark", 0.2, 0.5),
    ):
        assert least < sum(s for text, s in share.items() if word in text) < most, word
    wrong = ("Noto", "Twemoji", " cat", "light skin", "red background")
    assert not [text for text in share if any(word in text for word in wrong)]
    assert not [text for text in share if "{" in text]


def test_a_share_of_the_captions_can_name_everything() -> None:
    from emoji_captions import STYLE_NAMES, Label, caption

    label = Label(THINGS.index("guitar"), STYLES.index("noto"), BACKGROUNDS.index("red"))
    rng = random.Random(0)
    for full, least, most in ((1.0, 0.9, 1.0), (0.5, 0.5, 0.65), (0.0, 0.05, 0.2)):
        texts = [caption(label, rng, full) for _ in range(1000)]
        named = (STYLE_NAMES["noto"], ("red", "rot", "rouge", "rojo", "ross"))
        share = sum(all(any(word in text for word in words) for words in named) for text in texts) / 1000
        assert least <= share <= most, full
    assert [caption(label, random.Random(n)) for n in range(50)] == [
        caption(label, random.Random(n), 0) for n in range(50)
    ]


@pytest.mark.parametrize(("shift", "median"), [(1.0, 500), (3.0, 750), (20.0, 952)])
def test_a_higher_shift_trains_at_more_noise(shift: float, median: int) -> None:
    from emoji_models import _timesteps

    timesteps = _timesteps(4000, shift)
    assert abs(timesteps.median().item() - median) <= 1
    assert 0 <= timesteps.min() < timesteps.max() == 999


def test_a_tokenizer_of_the_captions_holds_the_longest(work: Path) -> None:
    from emoji_captions import Label, caption
    from emoji_data import load_drawings
    from emoji_models import MAX_TOKENS, make_tokenizer

    tokenizer, rng = make_tokenizer(load_drawings(work)), random.Random(2)
    label = Label(THINGS.index("detective"), STYLES.index("fluent flat"), BACKGROUNDS.index("yellow"), tone=1)
    lengths = [len(tokenizer(caption(label, rng)).input_ids) for _ in range(500)]
    assert max(lengths) <= MAX_TOKENS
    assert len(tokenizer("a word that no caption has").input_ids) > 2


@pytest.mark.parametrize("muon", [False, True])
def test_an_interrupted_training_ends_as_an_uninterrupted_one(
    muon: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import base_training

    if muon:
        pytest.importorskip("timm")
    monkeypatch.setattr(base_training, "SAVE_SECONDS", -1.0)  # after every step
    settings = base_training.Settings(steps=6, lr=0.1, warmup=2, muon=muon)

    def train(work: Path, settings: base_training.Settings, stop: int | None = None) -> list[torch.Tensor]:
        torch.manual_seed(0)
        network, calls = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1)), Counter()

        def loss_of() -> torch.Tensor:
            if calls["steps"] == stop:
                raise KeyboardInterrupt
            calls["steps"] += 1
            return (network(torch.randn(8, 3)) - random.random()).square().mean()

        work.mkdir(exist_ok=True)
        return list(base_training.fit("net", network, loss_of, settings, work).state_dict().values())

    whole = train(tmp_path / "whole", settings)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", settings, stop=4)
    resumed = train(tmp_path / "cut", settings)
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
    assert base_training.training_seconds("net", tmp_path / "cut") > 0
    assert len((tmp_path / "cut" / "net.jsonl").read_text().splitlines()) == 6

    longer = settings._replace(steps=12)
    once, continued = train(tmp_path / "once", longer), train(tmp_path / "whole", longer)
    assert all(torch.equal(a, b) for a, b in zip(once, continued, strict=True))


def test_concept_files_are_what_the_script_writes(tmp_path: Path) -> None:
    from emoji_concepts import BUNDLED, concept_file

    from sd_unlearn.io.paths import slugify

    for label in BUNDLED:
        name, text = concept_file(label)
        assert (ROOT / "prompts" / f"{slugify(name)}.yaml").read_text(encoding="utf-8") == text
    for label in ("axe", "noto", "white", "animal", "wine"):
        (tmp_path / "concept.yaml").write_text(concept_file(label)[1], encoding="utf-8")
        concept = read_concept(tmp_path / "concept.yaml")
        assert concept.label == label
        expected = {word for prompt in concept.keep_prompts for word in prompt.expect}
        assert expected == {*THINGS, *STYLES, *BACKGROUNDS} - {label, *CATEGORIES.get(label, ())}


def test_the_basis_of_latents_follows_pixels_and_keeps_what_is_decoded() -> None:
    from diffusers import AutoencoderKL
    from emoji_models import use_pixel_distances

    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=2).eval()
    with torch.no_grad():
        vae.post_quant_conv.weight[:, 0] *= 30  # the first channel matters more
    images = torch.rand(4, 3, 16, 16)
    before, mean = vae.decode(vae.encode(images).latent_dist.mean).sample, vae.encode(images).latent_dist.mean
    use_pixel_distances(vae, images)
    posterior = vae.encode(images).latent_dist
    assert torch.allclose(vae.decode(posterior.mean).sample, before, atol=1e-3)
    ratio_before, ratio = (z[:, 0].std() / z[:, 1].std() for z in (mean, posterior.mean))
    assert ratio > 3 * ratio_before
    assert posterior.var.flatten(2).std(dim=2).max() < 1e-6


@pytest.mark.slow
def test_all_stages_on_three_things(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each network is trained for a step; the files load with plain Diffusers, and the table is written."""
    import build_emoji
    import emoji_table
    from diffusers import StableDiffusionPipeline

    from sd_unlearn.metrics import emoji

    assets = tmp_path / "assets"
    for module in (build_emoji, emoji_table):
        monkeypatch.setattr(module, "ASSETS", assets)
    monkeypatch.setattr(emoji, "READER_DIR", assets / "emoji_reader")
    for name in ("OF_EACH_THING", "OF_EACH_STYLE", "OF_EACH_BACKGROUND", "OF_EACH_CATEGORY", "GENERIC"):
        monkeypatch.setattr(emoji_table, name, 1)
    monkeypatch.setattr(emoji_table, "BATCH", 20)
    monkeypatch.setattr(emoji_table, "things", lambda: emoji_things()[:3])
    monkeypatch.setattr(emoji_table, "THINGS", THINGS[:3])
    monkeypatch.setattr(emoji_table, "SHOWN", THINGS[1:3])
    monkeypatch.setattr(emoji_table, "PICTURE", tmp_path / "emoji.png")
    from emoji_data import things as emoji_things

    for extra in (["--reader_seed", "1", "--reader_channels", "8", "8", "16", "16"], []):
        steps = [f"--{stage}_steps=1" for stage in ("reader", "vae", "text", "layout", "denoiser")]
        monkeypatch.setattr("sys.argv", ["build_emoji.py", "--work_dir", str(work), "--threads=1", *steps, *extra])
        build_emoji.main()
    pipeline = StableDiffusionPipeline.from_pretrained(assets / "emoji")
    assert pipeline("an emoji", num_inference_steps=1, output_type="np").images.shape == (1, 64, 64, 3)
    assert {p.dtype for part in (pipeline.unet, pipeline.text_encoder) for p in part.parameters()} == {torch.float32}
    size = sum(path.stat().st_size for path in assets.rglob("*") if path.is_file())
    assert size < 30e6
    card = (assets / "emoji" / "README.md").read_text()
    assert "CC BY-SA 4.0" in card
    assert "@" not in card.split("---", 2)[2].replace("@iconify-json", "")
    assert Image.open(tmp_path / "emoji.png").size == (2 * 64, len(STYLES) * 64)
    fresh = Namespace(work_dir=tmp_path / "fresh")
    fresh.work_dir.mkdir()
    build_emoji.take_bundled(fresh)
    finished = [s for s, file in build_emoji.RESULTS.items() if (fresh.work_dir / file).is_file()]
    assert finished == ["reader", "vae", "text"]
    weights = load_file(fresh.work_dir / "reader.safetensors")
    assert all(torch.equal(weights[k], v.to(weights[k])) for k, v in emoji.load_reader().state_dict().items())
    images, labels = build_emoji.held_apart(Namespace(work_dir=work), copies=1)
    assert set(labels) == set(AXES)
    assert len(images) == len(labels["thing"]) == 4 * len(STYLES)
    emoji.load_reader.cache_clear()
