"""Flow matching against its formulas, the VAE's shift, FLUX's patches, and Diffusers' own scheduler and pipelines."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from flow_kinds import CHAT_KINDS, FLOW_KINDS, KIND_OF, FlowKinds, make_flux
from torch import Tensor

from sd_unlearn.data.encoding import encode_captions
from sd_unlearn.errors import UsageError
from sd_unlearn.models import lora
from sd_unlearn.models.base import load_base
from sd_unlearn.models.conditioning import FluxConditioning, from_patches, positions, to_patches
from sd_unlearn.models.denoiser import Denoiser
from sd_unlearn.models.diffusion import per_example_loss, sample_positions
from sd_unlearn.models.find_base import check_source
from sd_unlearn.models.flow import Flow, shift_of
from sd_unlearn.models.loading import load_pipeline
from sd_unlearn.models.recorded_base import load_recorded_base
from sd_unlearn.models.sampling import Sampler, default_sampler, generate_images
from sd_unlearn.models.source import Source
from sd_unlearn.models.vae import decode, encode
from sd_unlearn.risk import UNLABELED, corrected, pu_terms
from sd_unlearn.training.previews import ImageGenerator

pytestmark = pytest.mark.usefixtures("one_thread")
S = torch.tensor([0.0, 0.25, 0.5, 0.8, 1.0])
PROMPTS, SEEDS, FEW = ["a photo of the digit seven", "a digit"], [3, 4], Sampler(2, 5.0, 2)


def example(count: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, 4, 4, generator=generator), torch.randn(count, 3, 4, 4, generator=generator)


# -- the process --


def test_noising_and_target_by_hand() -> None:
    (x0, noise), flow = example(), Flow()
    noisy, velocity = flow.add_noise(x0, noise, 1000 * S), flow.target(x0, noise, 1000 * S)
    for row, s in enumerate(S.tolist()):
        assert torch.allclose(noisy[row], (1 - s) * x0[row] + s * noise[row])
    assert torch.equal(noisy[0], x0[0])
    assert torch.equal(noisy[-1], noise[-1])
    assert torch.equal(velocity, noise - x0)
    step = 0.1  # a step against the velocity is a step towards the image
    assert torch.allclose(noisy[2] - step * velocity[2], flow.add_noise(x0, noise, 1000 * (S - step))[2], atol=1e-6)


def test_errors_of_image_and_noise_are_the_loss_up_to_weights() -> None:
    (x0, noise), flow = example(), Flow()
    noisy, s = flow.add_noise(x0, noise, 1000 * S), S.view(-1, 1, 1, 1)
    predicted = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
    loss = per_example_loss(predicted, flow.target(x0, noise, 1000 * S))
    image, its_noise = noisy - s * predicted, noisy + (1 - s) * predicted
    assert torch.allclose(per_example_loss(image, x0), S**2 * loss, rtol=1e-4, atol=1e-4)
    assert torch.allclose(per_example_loss(its_noise, noise), (1 - S) ** 2 * loss, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 5.0])
def test_min_snr_weights(gamma: float) -> None:
    weight, s = Flow().snr_weight(1000 * S, gamma), S[1:]
    snr = ((1 - s) / s) ** 2
    assert torch.allclose(weight[1:], snr.clamp(max=gamma) * s**2)
    assert weight[0] == 0  # no noise: SNR is infinite
    assert weight[-1] == 0


def test_timesteps_of_each_density() -> None:
    u = torch.tensor([0.1, 0.5, 0.9])
    assert torch.allclose(Flow(3.0, "uniform").at(u), 1000 * u)
    assert torch.allclose(Flow(3.0).at(u), 1000 * 3 * u / (1 + 2 * u))
    assert torch.equal(Flow(1.0).at(u), Flow(1.0, "uniform").at(u))
    assert torch.allclose(
        Flow(3.0, "logit_normal").at(u), 1000 * torch.sigmoid(torch.tensor([-1.2815516, 0, 1.2815516]))
    )
    for sampling in ("shift", "uniform", "logit_normal"):
        ends = Flow(3.0, sampling).at(torch.tensor([0.0, 1.0]))  # type: ignore[arg-type]
        assert torch.allclose(ends, torch.tensor([0.0, 1000.0]))


def test_logit_normal_timesteps_are_distributed_as_those_of_diffusers() -> None:
    from diffusers.training_utils import compute_density_for_timestep_sampling

    theirs = compute_density_for_timestep_sampling(
        "logit_normal", 50_000, 0.0, 1.0, generator=torch.Generator().manual_seed(0)
    )
    ours = Flow(sampling="logit_normal").at(sample_positions(50_000, torch.Generator().manual_seed(0))) / 1000
    for share in (0.1, 0.3, 0.5, 0.9):
        assert ours.quantile(share).item() == pytest.approx(theirs.quantile(share).item(), abs=0.01)


@pytest.mark.parametrize("tokens", [256, 1024, 4096])
@pytest.mark.parametrize("dynamic", [False, True])
def test_shift_is_that_of_the_scheduler(tokens: int, dynamic: bool) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic)
    mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)  # as FluxPipeline computes it
    plain = np.linspace(1.0, 0.1, 10)
    scheduler.set_timesteps(sigmas=plain.tolist(), mu=mu if dynamic else None)
    shift = shift_of(scheduler.config, tokens)
    assert shift == pytest.approx(math.exp(mu) if dynamic else 3.0)
    assert torch.allclose(Flow(shift).at(torch.tensor(plain).float()), scheduler.timesteps, rtol=1e-5)


# -- the risk of a large latent --


def test_the_risk_of_65_536_summed_terms_is_finite_and_its_positive_term_vanishes() -> None:
    """16 channels of 64 x 64: l is in the tens of thousands, so exp(-l) is 0 and -log(1 - exp(-l)) too."""
    generator = torch.Generator().manual_seed(0)
    predicted = torch.randn(4, 16, 64, 64, generator=generator).requires_grad_()
    nll = per_example_loss(predicted, torch.randn(4, 16, 64, 64, generator=generator))
    assert (nll > 65_536).all()
    terms = pu_terms(nll, torch.tensor([UNLABELED, UNLABELED, 0, 0]), [0.2], torch.full((4,), 0.5))
    assert terms.positive == 0
    (gradient,) = torch.autograd.grad(corrected(terms, "abs"), predicted)
    assert gradient.isfinite().all()
    assert gradient.any()


# -- FLUX's patches --


def test_patches_are_those_of_the_pipeline() -> None:
    latents = torch.arange(2 * 4 * 6 * 8.0).view(2, 4, 6, 8)
    packed = FluxPipeline._pack_latents(latents, 2, 4, 6, 8)
    assert torch.equal(to_patches(latents), packed)
    assert torch.equal(from_patches(packed, 6, 8), latents)
    assert torch.equal(from_patches(packed, 6, 8), FluxPipeline._unpack_latents(packed, 48, 64, 8))
    ids = FluxPipeline._prepare_latent_image_ids(2, 3, 4, "cpu", torch.float32)
    assert torch.equal(positions(3, 4, latents), ids)


# -- loaded models --


@pytest.mark.parametrize("name", [name for name in FLOW_KINDS if name not in CHAT_KINDS])  # those: test_chat_kinds.py
def test_training_predicts_what_sampling_predicts(
    flow_kinds: FlowKinds, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The denoiser with cached captions calls the transformer as diffusers' pipeline does."""
    base = load_base(str(flow_kinds.folder(name)), device="cpu")
    conditioning: Any = base.conditioning
    calls: list[tuple[dict[str, Any], Tensor]] = []
    forward = base.network.forward

    def watched(**given: Any) -> Any:
        answer = forward(**given)
        calls.append((given, answer[0]))
        return answer

    monkeypatch.setattr(base.network, "forward", watched)
    monkeypatch.setattr("sd_unlearn.models.conditioning.GUIDANCE_IN_TRAINING", FEW.guidance_scale)
    generate_images(base, PROMPTS, SEEDS, FEW)
    given, predicted = calls[0]
    captions = PROMPTS if KIND_OF[name] == "flux" else ["", "", *PROMPTS]  # FLUX has no guidance by the empty caption
    noisy = conditioning.from_pipeline(given["hidden_states"], 8, 8)
    assert noisy.shape == (len(captions), 16, 8, 8)
    scale = 1000 if KIND_OF[name] == "flux" else 1
    with torch.no_grad():
        text = encode_captions(base, captions)
        ours = Denoiser.of(base, base.network).predict(noisy, given["timestep"] * scale, text)
    assert torch.allclose(ours, conditioning.from_pipeline(predicted, 8, 8), atol=1e-5)
    ours_given = calls[-1][0]
    for key in ("encoder_hidden_states", "pooled_projections", "guidance", "img_ids", "txt_ids"):
        wanted = given.get(key)
        assert wanted is None or torch.allclose(ours_given[key], wanted.expand_as(ours_given[key]), atol=1e-6), key
    assert (ours_given.get("guidance") is not None) == (name == "flux-dev")


@pytest.mark.parametrize("name", ["sd35", "flux-dev"])
def test_previews_are_generated_as_images_are(flow_kinds: FlowKinds, name: str) -> None:
    """From encoded captions, without the text encoders."""
    base = load_base(str(flow_kinds.folder(name)), device="cpu")
    wanted = np.stack([np.asarray(image) for image in generate_images(base, PROMPTS, SEEDS, FEW)]).astype(int)
    known = {text: encode_captions(base, [text])[0] for text in ("", *PROMPTS)}
    for encoder in base.properties.text_encoders:
        setattr(base.pipeline, encoder, None)
    generator = ImageGenerator(base, FEW, lambda texts: torch.stack([known[t] for t in texts]), base.network)
    found = np.stack([np.asarray(image) for image in generator.generate(PROMPTS, SEEDS)])
    assert np.abs(found - wanted).max() <= 1


@pytest.mark.parametrize("name", ["sd3", "flux-schnell"])
def test_latents_are_shifted_and_scaled_as_in_the_pipeline(flow_kinds: FlowKinds, name: str) -> None:
    base = load_base(str(flow_kinds.folder(name)), device="cpu")
    config = base.pipeline.vae.config
    assert config.shift_factor
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        posterior = base.pipeline.vae.encode(pixels).latent_dist
        mean, std = encode(base, [pixels[0]], lambda image: image, 1)
        assert torch.allclose(mean, (posterior.mean - config.shift_factor) * config.scaling_factor, atol=1e-6)
        assert torch.allclose(std, posterior.std * config.scaling_factor, atol=1e-6)
        theirs = base.pipeline.vae.decode(mean / config.scaling_factor + config.shift_factor).sample
    wanted = np.asarray(base.pipeline.image_processor.postprocess(theirs, output_type="pil")[0])
    assert np.array_equal(np.asarray(decode(base, mean)[0]), wanted)


def test_sd3_without_t5(flow_kinds: FlowKinds) -> None:
    """Of a folder without it, and with --drop_t5: its tokens are zeros. The base is loaded again as it was recorded."""
    whole, without = flow_kinds.folder("sd35"), load_base(str(flow_kinds.folder("sd3-without-t5")), device="cpu")
    base = load_base(Source(str(whole), drop_t5=True), device="cpu")
    for one in (base, without):
        assert one.pipeline.text_encoder_3 is None
        assert not encode_captions(one, ["seven"])[0, 24:-1].any()
    assert load_base(str(whole), device="cpu").text_encoder_sha256 != base.text_encoder_sha256
    again = load_recorded_base(base.describe(), device="cpu")
    assert again.describe() == base.describe()
    assert again.pipeline.text_encoder_3 is None
    with pytest.raises(UsageError, match="--drop_t5 is for Stable Diffusion 3 and 3.5"):
        check_source(Source(str(flow_kinds.folder("flux-dev")), drop_t5=True))


def test_published_samplers(flow_kinds: FlowKinds) -> None:
    known = {
        "stabilityai/stable-diffusion-3-medium-diffusers": (28, 7.0),
        "stabilityai/stable-diffusion-3.5-medium": (40, 4.5),
        "stabilityai/stable-diffusion-3.5-large": (28, 3.5),
        "stabilityai/stable-diffusion-3.5-large-turbo": (4, 0.0),
        "black-forest-labs/FLUX.1-dev": (28, 3.5),
        "black-forest-labs/FLUX.1-schnell": (4, 0.0),
        "black-forest-labs/FLUX.2-dev": (50, 4.0),
        "black-forest-labs/FLUX.2-klein-base-4B": (50, 4.0),
        "black-forest-labs/FLUX.2-klein-9B": (4, 1.0),
        "Qwen/Qwen-Image": (50, 4.0),
        "Tongyi-MAI/Z-Image": (50, 4.0),
        "Tongyi-MAI/Z-Image-Turbo": (8, 0.0),
        "someone/else": (50, 7.5),
    }
    local = {"sd3": (28, 7.0), "sd35": (40, 4.5), "flux-dev": (28, 3.5), "flux-schnell": (4, 0.0)}
    local |= {"z-image": (50, 4.0), "z-image-turbo": (8, 0.0)}
    local |= {"flux2-dev": (50, 4.0), "flux2-klein-base": (50, 4.0), "flux2-klein": (4, 1.0), "qwen-image": (50, 4.0)}
    known |= {str(flow_kinds.folder(name)): sampler for name, sampler in local.items()}
    for name, (steps, guidance) in known.items():
        assert (default_sampler(name).steps, default_sampler(name).guidance_scale) == (steps, guidance), name


def test_a_single_file_has_the_sampler_of_its_configuration(flow_kinds: FlowKinds, tmp_path: Path) -> None:
    file = tmp_path / "any-name.safetensors"
    file.touch()
    for name in ("flux-dev", "z-image-turbo"):
        source = Source(str(file), single_file_config=str(flow_kinds.folder(name)))
        assert default_sampler(source) == default_sampler(str(flow_kinds.folder(name)))


@pytest.mark.parametrize("name", ["sd35", "flux-dev"])
def test_lora_targets(flow_kinds: FlowKinds, name: str) -> None:
    """The attention projections and those of the text tokens; on request the feed-forward layers, too."""
    network = load_base(str(flow_kinds.folder(name)), device="cpu").network
    found = set(lora.network_targets(network, "attention"))
    block = "transformer_blocks.0.attn."
    assert {block + end for end in (*lora.ATTENTION, *lora.CONTEXT)} <= found
    single = {f"single_transformer_blocks.0.attn.{end}" for end in ("to_q", "to_k", "to_v")}
    second = {f"transformer_blocks.0.attn2.{end}" for end in lora.ATTENTION}
    assert (second if name == "sd35" else single) <= found
    more = set(lora.network_targets(network, "attention+mlp")) - found
    wanted = {f"transformer_blocks.0.{ff}.net.{end}" for ff in ("ff", "ff_context") for end in ("0.proj", "2")}
    of_single = {f"single_transformer_blocks.1.{end}" for end in ("proj_mlp", "proj_out")}
    assert wanted | (of_single if name == "flux-dev" else set()) <= more
    assert all(any(part in target for part in (".ff", "proj_mlp", "proj_out")) for target in more)
    for group in ("cross_attention", "not_cross_attention"):
        with pytest.raises(UsageError, match=f"--lora_targets {group} needs a base with cross-attention"):
            lora.network_targets(network, group)  # type: ignore[arg-type]


def test_other_folders_are_refused(flow_kinds: FlowKinds, tmp_path: Path) -> None:
    import json
    import shutil

    for file, changes, why in (
        ("transformer/config.json", {"in_channels": 384}, "384 channels instead of 64"),
        ("scheduler/scheduler_config.json", {}, None),
        (
            "model_index.json",
            {"scheduler": ["diffusers", "DDIMScheduler"]},
            "has the scheduler DDIMScheduler, but FluxPipel",
        ),
        (
            "transformer/config.json",
            {"joint_attention_dim": 99},
            "transformer takes text 99 wide, its text encoders give 24",
        ),
        ("model_index.json", {"_class_name": "StableDiffusion3Pipeline"}, "with a transformer of kind flux"),
    ):
        copy = shutil.copytree(flow_kinds.folder("flux-dev"), tmp_path / "copy")
        content = json.loads((copy / file).read_text())
        (copy / file).write_text(json.dumps(content | changes))
        if why:
            with pytest.raises(UsageError, match=why):
                check_source(Source(str(copy)))
        else:
            check_source(Source(str(copy)))
        shutil.rmtree(copy)


def test_schnell_reads_half_as_many_tokens() -> None:
    assert (FluxConditioning(8).length, FluxConditioning(8, embeds_guidance=True).length) == (256, 512)


def test_weights_stored_in_bf16_are_not_loaded_in_fp32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """12 billion weights take 48 GB in fp32. The hash is that of a load in full precision."""
    stored = make_flux().to(torch.bfloat16)
    stored.text_encoder.float()
    stored.save_pretrained(tmp_path / "bf16")
    loaded: list[set[torch.dtype]] = []

    def watched(source: Source, dtype: Any) -> Any:
        pipeline = load_pipeline(source, dtype)
        parts = (pipeline.transformer, pipeline.text_encoder)
        loaded.append({(name, next(part.parameters()).dtype) for name, part in enumerate(parts)})  # type: ignore[misc]
        return pipeline

    monkeypatch.setattr("sd_unlearn.models.base.load_pipeline", watched)
    half, full = (load_base(str(tmp_path / "bf16"), precision, "cpu") for precision in ("bf16", "no"))
    assert loaded == [{(0, torch.bfloat16), (1, torch.float32)}, {(0, torch.float32), (1, torch.float32)}]
    assert half.hashes == full.hashes
    assert half.network.dtype == half.pipeline.text_encoder.dtype == torch.bfloat16
