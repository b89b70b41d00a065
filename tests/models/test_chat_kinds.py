"""Kinds with a language model as text encoder, against Diffusers' own pipelines: FLUX.2, Z-Image, Qwen-Image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from flow_kinds import CHAT_KINDS, DISTILLED, FlowKinds
from torch import Tensor

from sd_unlearn.data.encoding import describe_long_captions, encode_captions
from sd_unlearn.errors import UsageError
from sd_unlearn.models import lora
from sd_unlearn.models.base import Base, load_base
from sd_unlearn.models.chat import INSTRUCTION, masked, with_padding, without_padding
from sd_unlearn.models.denoiser import Denoiser
from sd_unlearn.models.find_base import check_source
from sd_unlearn.models.footprint import StepOptions, count_inference, count_training, size_of
from sd_unlearn.models.kinds import channels_of
from sd_unlearn.models.latent_scale import LatentScale
from sd_unlearn.models.meta import build_meta_base, read_configs
from sd_unlearn.models.quantized import quantize_linear_layers
from sd_unlearn.models.sampling import Sampler, generate_images
from sd_unlearn.models.source import Source
from sd_unlearn.models.vae import decode, encode, posterior, use_tiles
from sd_unlearn.training.previews import ImageGenerator
from sd_unlearn.training.setup import default_unconditional

pytestmark = pytest.mark.usefixtures("one_thread")
# Captions of different lengths, one of them longer than the 32 tokens to which Z-Image's transformer pads
PROMPTS, SEEDS, FEW = (
    ["a digit", "a photo of the digit seven in red ink on a white background"],
    [3, 4],
    Sampler(2, 3.0, 2),
)


def loaded(flow_kinds: FlowKinds, name: str) -> Base:
    base = load_base(str(flow_kinds.folder(name)), device="cpu")
    base.own_resolution = 64  # Qwen-Image's configuration has none
    return base


def pixels(images: list[Any]) -> Any:
    return np.stack([np.asarray(image) for image in images]).astype(int)


@pytest.mark.parametrize("name", [*CHAT_KINDS, *DISTILLED])
@pytest.mark.parametrize("guidance", [0.0, 3.0])
def test_images_are_those_of_diffusers(flow_kinds: FlowKinds, name: str, guidance: float) -> None:
    """Of the pipeline as Diffusers loads it, with the same prompts, seeds, steps and guidance; also of one prompt."""
    base, plain = loaded(flow_kinds, name), DiffusionPipeline.from_pretrained(flow_kinds.folder(name))
    plain.set_progress_bar_config(disable=True)
    ours = pixels(generate_images(base, PROMPTS, SEEDS, Sampler(3, guidance, 2)))
    assert np.ptp(ours) > 0
    for n, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS, strict=True)):
        theirs = plain(
            prompt=prompt,
            num_inference_steps=3,
            **(
                {"true_cfg_scale": guidance, "negative_prompt": ""}
                if name == "qwen-image"
                else {"guidance_scale": guidance}
            ),
            height=64,
            width=64,
            generator=torch.Generator().manual_seed(seed),
        ).images
        assert np.abs(pixels(theirs)[0] - ours[n]).max() <= 1


@pytest.mark.parametrize("name", CHAT_KINDS)
def test_previews_are_generated_as_images_are(flow_kinds: FlowKinds, name: str) -> None:
    """From encoded captions, without the text encoder."""
    base = loaded(flow_kinds, name)
    wanted = pixels(generate_images(base, PROMPTS, SEEDS, FEW))
    known = {text: encode_captions(base, [text])[0] for text in ("", *PROMPTS)}
    base.pipeline.text_encoder = None
    generator = ImageGenerator(base, FEW, lambda texts: torch.stack([known[t] for t in texts]), base.network)
    assert np.abs(pixels(generator.generate(PROMPTS, SEEDS)) - wanted).max() <= 1


@pytest.mark.parametrize("name", CHAT_KINDS)
def test_training_predicts_the_velocity_that_sampling_follows(
    flow_kinds: FlowKinds, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of the scheduler from the denoiser's prediction is the pipeline's: the sign and the time are right."""
    base = loaded(flow_kinds, name)
    scheduler = base.pipeline.scheduler
    steps: list[tuple[Tensor, Tensor, Tensor]] = []
    step = scheduler.step

    def watched(velocity: Tensor, timestep: Tensor, latents: Tensor, **options: Any) -> Any:
        steps.append((velocity, timestep, latents))
        return step(velocity, timestep, latents, **options)

    monkeypatch.setattr(scheduler, "step", watched)
    generate_images(base, PROMPTS, SEEDS, Sampler(3, 1.0 if name == "flux2-dev" else 0.0, 2))  # as in training
    text = encode_captions(base, PROMPTS)
    for velocity, timestep, latents in steps:
        with torch.no_grad():
            ours = Denoiser.of(base, base.network).predict(
                base.conditioning.from_pipeline(latents, 8, 8), timestep.expand(2), text
            )
        assert torch.allclose(ours, base.conditioning.from_pipeline(velocity, 8, 8), atol=1e-5)


@pytest.mark.parametrize("name", CHAT_KINDS)
def test_a_batch_is_predicted_as_its_examples_one_by_one(flow_kinds: FlowKinds, name: str) -> None:
    base = loaded(flow_kinds, name)
    channels = channels_of(base.pipeline.vae.config)
    noisy = torch.randn(3, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    timesteps, text = torch.tensor([900.0, 500.0, 10.0]), encode_captions(base, [*PROMPTS, ""])
    denoiser = Denoiser.of(base, base.network)
    with torch.no_grad():
        together = denoiser.predict(noisy, timesteps, text)
        for n in range(3):
            alone = denoiser.predict(noisy[n : n + 1], timesteps[n : n + 1], text[n : n + 1])
            assert torch.allclose(together[n], alone[0], atol=1e-5)
    assert not torch.allclose(together[0], denoiser.predict(noisy, timesteps, text.flip(0))[0], atol=1e-3)


@pytest.mark.parametrize("name", CHAT_KINDS)
def test_captions_are_encoded_as_by_the_pipeline(flow_kinds: FlowKinds, name: str) -> None:
    """In any batch, and with a gradient, which attacks need."""
    base = loaded(flow_kinds, name)
    together = encode_captions(base, PROMPTS)
    for n, prompt in enumerate(PROMPTS):
        assert torch.allclose(encode_captions(base, [prompt])[0], together[n], atol=1e-5)
    network = base.network.config
    assert tuple(together.shape[1:]) == base.conditioning.shape_of(network, 0)
    theirs = base.pipeline.encode_prompt(list(PROMPTS))[0]
    ours = without_padding(together) if base.kind == "z-image" else together[:, : theirs.shape[1]]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, theirs, strict=True))


def test_padding_is_undone() -> None:
    rows = [torch.ones(2, 3), torch.ones(5, 3)]
    padded = with_padding(rows, 6)
    assert padded.shape == (2, 6, 3)
    assert all(torch.equal(a, b) for a, b in zip(rows, without_padding(padded), strict=True))
    tokens, mask = masked(padded)
    assert tokens.shape == (2, 5, 3)
    assert mask is not None
    assert mask.tolist() == [[True] * 2 + [False] * 3, [True] * 5]
    assert masked(padded[1:])[1] is None


@pytest.mark.parametrize("name", ["z-image", "flux2-dev", "flux2-klein", "qwen-image"])
def test_the_caption_is_cut_where_the_template_and_it_are_too_long(flow_kinds: FlowKinds, name: str) -> None:
    base = loaded(flow_kinds, name)
    (template,) = base.conditioning.token_counts(base.pipeline.tokenizer, [""])
    read = sum(base.conditioning.tokenized(base.pipeline.tokenizer, "")[1])
    assert read == template + (INSTRUCTION if name == "qwen-image" else 0)
    inside = "a" * (512 - template)
    assert not torch.equal(*encode_captions(base, [inside, inside[:-1] + "b"]))
    assert torch.allclose(*encode_captions(base, ["a" * 600 + end for end in "ab"]))
    assert not describe_long_captions(base, [inside])
    assert "longer than the 512 tokens" in describe_long_captions(base, [inside + "a"])


@pytest.mark.parametrize(
    ("name", "scales"),
    {
        "sd3": [1.0, 1.0, 4.0],
        "flux-dev": [1.0, 1.0, 1.0],
        "z-image": [1.0, 2.0, 5.0],  # f + g (f - u) = u + (1 + g) (f - u)
        "flux2-dev": [1.0, 1.0, 1.0],
        "flux2-klein-base": [1.0, 1.0, 4.0],
        "flux2-klein": [1.0, 1.0, 1.0],
        "qwen-image": [1.0, 1.0, 4.0],
    }.items(),
)
def test_guidance_is_that_of_the_pipelines_formula(flow_kinds: FlowKinds, name: str, scales: list[float]) -> None:
    """The s of u + s (f - u), on which the offset of held predictions depends."""
    base = loaded(flow_kinds, name)
    given = (0.0, 1.0, 4.0)
    assert [base.guidance_of(scale) for scale in given] == scales
    assert [default_unconditional(base, scale) for scale in given] == [0.25 if s > 1 else 0.0 for s in scales]


@pytest.mark.parametrize("name", [*CHAT_KINDS, *DISTILLED])
def test_training_samples_timesteps_as_the_pipeline_spaces_its_steps(flow_kinds: FlowKinds, name: str) -> None:
    base = loaded(flow_kinds, name)
    steps = 4 if base.is_distilled else 50
    base.network.forward = lambda **given: (given["hidden_states"],)  # only the steps matter
    if base.kind != "z-image":
        generate_images(base, PROMPTS[:1], SEEDS[:1], Sampler(steps, 1.0, 1))
    else:
        base.pipeline.scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist())
    spaced = torch.linspace(1, 1 / steps, steps)
    assert torch.allclose(base.process(64).at(spaced), base.pipeline.scheduler.timesteps, rtol=1e-4)


@pytest.mark.parametrize("name", CHAT_KINDS)
def test_latents_are_scaled_as_the_pipeline_scales_them(flow_kinds: FlowKinds, name: str) -> None:
    base = loaded(flow_kinds, name)
    vae = base.pipeline.vae
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = encode(base, [image[0]], lambda one: one, 1)
    with torch.no_grad():
        plain, deviation = posterior(vae, image)
    scale = LatentScale.of(vae, plain)
    assert torch.allclose(scale.undo(mean), plain, atol=1e-5)
    assert torch.allclose(std / scale.factor, deviation, atol=1e-5)
    if name.startswith("flux2"):  # the pipeline has a function for images that it is given
        theirs = base.pipeline._encode_vae_image(image, None)
        assert torch.allclose(base.conditioning.as_argument(mean), theirs, atol=1e-5)


@pytest.mark.parametrize("name", ["flux2-dev", "qwen-image"])
def test_the_vae_works_in_tiles_and_may_be_another(flow_kinds: FlowKinds, name: str) -> None:
    base = loaded(flow_kinds, name)
    latents = torch.randn(1, channels_of(base.pipeline.vae.config), 16, 16, generator=torch.Generator().manual_seed(0))
    whole = pixels(decode(base, latents))
    use_tiles(base, 8)
    assert base.vae_tile == 64
    tiled = pixels(decode(base, latents))
    assert tiled.shape == whole.shape
    assert 0 < np.abs(tiled - whole).mean() < 40
    folder = str(flow_kinds.folder(name))
    again = load_base(Source(folder, vae=folder), device="cpu")
    assert again.vae_sha256 == base.vae_sha256
    file = next((flow_kinds.folder(name) / "vae").glob("*.safetensors"))
    with pytest.raises(UsageError, match="use a folder or a Hub id"):
        load_base(Source(folder, vae=str(file)), device="cpu")


def test_lora_targets_of_qwen_image(flow_kinds: FlowKinds) -> None:
    network = loaded(flow_kinds, "qwen-image").network
    attention, both = (set(lora.network_targets(network, group)) for group in ("attention", "attention+mlp"))
    blocks = [f"transformer_blocks.{n}." for n in (0, 1, 2)]
    assert attention == {f"{block}attn.{end}" for block in blocks for end in (*lora.ATTENTION, *lora.CONTEXT)}
    ends = [f"{part}_mlp.net.{end}" for part in ("img", "txt") for end in ("0.proj", "2")]
    assert both - attention == {block + end for block in blocks for end in ends}


def test_lora_targets_of_flux2(flow_kinds: FlowKinds) -> None:
    """The single blocks have their attention fused with their feed-forward layers."""
    network = loaded(flow_kinds, "flux2-dev").network
    attention, both = (set(lora.network_targets(network, group)) for group in ("attention", "attention+mlp"))
    double = {f"transformer_blocks.0.attn.{end}" for end in (*lora.ATTENTION, *lora.CONTEXT)}
    single = {f"single_transformer_blocks.{n}.attn.{end}" for n in (0, 1) for end in ("to_qkv_mlp_proj", "to_out")}
    assert attention == double | single
    ends = [f"{ff}.linear_{end}" for ff in ("ff", "ff_context") for end in ("in", "out")]
    assert both - attention == {f"transformer_blocks.0.{end}" for end in ends}


def test_lora_targets_of_z_image(flow_kinds: FlowKinds) -> None:
    network = loaded(flow_kinds, "z-image").network
    attention = set(lora.network_targets(network, "attention"))
    blocks = ("noise_refiner.0", "context_refiner.0", "layers.0", "layers.1")
    assert attention == {f"{block}.attention.{end}" for block in blocks for end in lora.ATTENTION}
    more = set(lora.network_targets(network, "attention+mlp")) - attention
    assert more == {f"{block}.feed_forward.w{n}" for block in blocks for n in (1, 2, 3)}
    with pytest.raises(UsageError, match="--lora_targets cross_attention needs a base with cross-attention"):
        lora.network_targets(network, "cross_attention")


@pytest.mark.parametrize("name", CHAT_KINDS)
def test_a_quantized_network_predicts_nearly_the_same(flow_kinds: FlowKinds, name: str) -> None:
    """In bfloat16 without autocast, too, as previews are generated."""
    base = loaded(flow_kinds, name)
    noisy = torch.randn(2, channels_of(base.pipeline.vae.config), 8, 8, generator=torch.Generator().manual_seed(0))
    text, timesteps = encode_captions(base, PROMPTS), torch.tensor([900.0, 300.0])
    denoiser = Denoiser.of(base, base.network)
    with torch.no_grad():
        full = denoiser.predict(noisy, timesteps, text)
        base.network.to(torch.bfloat16)
        quantize_linear_layers(base.network, "int8")
        small = denoiser.predict(noisy.bfloat16(), timesteps, text.bfloat16())
    assert small.dtype == torch.bfloat16
    assert (small.float() - full).norm() < 0.1 * full.norm()


@pytest.mark.parametrize("name", ["flux2-dev", "flux2-klein-base"])
def test_a_quantized_network_in_half_precision_takes_inputs_in_full(flow_kinds: FlowKinds, name: str) -> None:
    """Its pipeline passes them: Diffusers takes the precision from the first parameter, which here is a scale."""
    base = load_base(str(flow_kinds.folder(name)), "bf16", device="cpu")
    noisy = torch.randn(2, channels_of(base.pipeline.vae.config), 8, 8, generator=torch.Generator().manual_seed(0))
    text, timesteps = encode_captions(base, PROMPTS), torch.tensor([900.0, 300.0])
    denoiser = Denoiser.of(base, base.network)
    with torch.no_grad():
        full = denoiser.predict(noisy.bfloat16(), timesteps, text).float()
        quantize_linear_layers(base.network, "int8")
        small = denoiser.predict(noisy, timesteps, text.float()).float()
    assert base.network.dtype == torch.float32
    assert (small - full).norm() < 0.1 * full.norm()
    assert len(generate_images(base, PROMPTS, SEEDS, Sampler(2, 3.0, 2, 64))) == 2


@pytest.mark.parametrize("name", CHAT_KINDS)
def test_memory_is_counted_from_the_configuration(flow_kinds: FlowKinds, name: str) -> None:
    configs = read_configs(Source(str(flow_kinds.folder(name))))
    base, meta = loaded(flow_kinds, name), build_meta_base(configs, torch.float32)
    for ours, theirs in ((meta.network, base.network), (meta.vae, base.pipeline.vae)):
        assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}
    assert meta.text_shape == tuple(encode_captions(base, [""]).shape[1:])
    assert (meta.channels, meta.pixels_per_latent) == (channels_of(base.pipeline.vae.config), 8)
    assert meta.resolution == (1024 if name == "qwen-image" else 64)
    inference = count_inference(configs, "no", 64)
    assert inference.text_encoders == size_of(base.pipeline.text_encoder)
    step = count_training(configs, StepOptions(rank=2), "no", 64)
    assert 0 < step.forward < step.activations
    assert 0 < step.checkpointed < step.activations


def test_folders_that_contradict_themselves_are_refused(flow_kinds: FlowKinds, tmp_path: Path) -> None:
    import json
    import shutil

    for file, changes, why in (
        ("transformer/config.json", {"cap_feat_dim": 99}, "takes text 99 wide, its text encoders give 16"),
        ("transformer/config.json", {"in_channels": 4}, "takes 4 channels instead of 16"),
        ("model_index.json", {"_class_name": "FluxPipeline"}, "is a FluxPipeline with a transformer of kind z-image"),
        ("model_index.json", {"_class_name": "ZImageOmniPipeline"}, "is a ZImageOmniPipeline"),
        ("model_index.json", {"scheduler": ["diffusers", "DDIMScheduler"]}, "ZImagePipeline needs FlowMatch"),
        ("transformer/config.json", {"joint_attention_dim": 99}, "takes text 33 wide, its text encoders give 16"),
        ("transformer/config.json", {"guidance_embeds": False}, "Flux2Pipeline with a transformer of kind flux2-klein"),
    ):
        name = "flux2-dev" if "joint" in str(changes) or "guidance" in str(changes) else "z-image"
        copy = shutil.copytree(flow_kinds.folder(name), tmp_path / "copy")
        content = json.loads((copy / file).read_text())
        (copy / file).write_text(json.dumps(content | changes))
        with pytest.raises(UsageError, match=why):
            check_source(Source(str(copy)))
        shutil.rmtree(copy)
