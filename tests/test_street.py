"""The whole street on the bundled base, as a user types it; few images and steps, so figures mean nothing here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from sd_unlearn.cli import main
from sd_unlearn.models.base import load_base
from sd_unlearn.models.sampling import BASE_SAMPLERS, Sampler, generate_images
from sd_unlearn.models.source import DIGITS_DIR
from sd_unlearn.models.student import apply_run

ROOT = Path(__file__).parent.parent
STEPS = 5
FEW = "--num_unlabeled 12 --num_positive 6 --num_keep 1 --max_train_steps 4 --effective_batch_size 8"


@pytest.fixture(scope="module")
def few_steps():
    """Images of the bundled base in a fifth of the usual steps; nobody looks at them here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BASE_SAMPLERS, "digits", Sampler(STEPS, 3.0, 100))
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory, few_steps):
    """A finished street in a folder of its own."""
    here = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("street"))
    try:
        train = ["train", "--concept", "seven", "--learning_rate", "0.01", *FEW.split(), "--validation_steps", "2"]
        assert main(train) == 0
        folder = Path("runs/seven").absolute()
        assert main(["evaluate", "--run", str(folder), "--num_images", "10", "--num_keep_images", "2"]) == 0
        assert main(["export", "--run", str(folder)]) == 0
        assert main(["report", "--run", str(folder)]) == 0
    finally:
        os.chdir(here)
    return folder


def test_every_room_leaves_its_files(run):
    expected = (
        "config.yaml",
        "concept.yaml",
        "metrics.jsonl",
        "training.json",
        "adapter/adapter_model.safetensors",
        "previews/step-000002.png",
        "results.json",
        "evaluate.yaml",
        "export/pytorch_lora_weights.safetensors",
        "export/seven.safetensors",
        "report.html",
        "report.md",
        "results.csv",
    )
    assert [name for name in expected if not (run / name).is_file()] == []
    assert not list(run.rglob("*.tmp"))


def test_results_hold_every_figure_of_the_protocol(run):
    results = json.loads((run / "results.json").read_text())
    rows = {(r["metric"], r["group"], r["subject"]) for r in results["rows"]}
    assert {("leakage", g, s) for g in ("direct", "held_out", "generic") for s in ("base", "seven")} <= rows
    assert {("retention", g, "seven") for g in ("alike", "general", "kept")} <= rows
    assert {("clean_replacement", "direct", "seven"), ("drift", "kept", "seven")} <= rows
    assert all(r["low"] <= r["value"] <= r["high"] for r in results["rows"] if r["interval"] == "wilson")
    assert results["schema_version"] == 2
    for pair in results["pairs"]:
        assert (run / pair["base"]).is_file()
        assert (run / pair["image"]).is_file()


def test_seeds_of_render_and_evaluation_are_disjoint(run):
    data = run.parent.parent / "data" / "seven"
    lines = [json.loads(x) for f in data.glob("*/metadata.jsonl") for x in f.read_text().splitlines()]
    results = json.loads((run / "results.json").read_text())
    assert not {x["seed"] for x in lines} & {p["seed"] for p in results["pairs"]}


def test_evaluating_again_draws_nothing_and_agrees(run, monkeypatch):
    monkeypatch.chdir(run.parent.parent)
    before = json.loads((run / "results.json").read_text())
    monkeypatch.setattr(
        "sd_unlearn.models.sampling.generate_images", lambda *_: pytest.fail("an image was drawn again")
    )
    assert main(["evaluate", "--run", str(run), "--num_images", "10", "--num_keep_images", "2"]) == 0
    after = json.loads((run / "results.json").read_text())
    assert after["rows"] == before["rows"]
    assert after["pairs"] == before["pairs"]


def test_exported_files_draw_what_the_training_process_draws(run):
    from diffusers import StableDiffusionPipeline

    ours, seeds, sampler = load_base("digits"), [1, 2, 3], Sampler(5, 3.0, 3)
    prompts = ["a photo of the digit seven"] * 3
    bare = np.stack([np.asarray(i) for i in generate_images(ours, prompts, seeds, sampler)])
    with apply_run(ours, run):
        wanted = np.stack([np.asarray(i) for i in generate_images(ours, prompts, seeds, sampler)])
    assert (bare != wanted).any()
    for file in ("pytorch_lora_weights.safetensors", "seven.safetensors"):
        fresh = load_base(str(DIGITS_DIR))
        assert isinstance(fresh.pipeline, StableDiffusionPipeline)
        fresh.pipeline.load_lora_weights(run / "export", weight_name=file)
        got = np.stack([np.asarray(i) for i in generate_images(fresh, prompts, seeds, sampler)])
        assert np.abs(got.astype(int) - wanted.astype(int)).max() <= 1  # a rounding step of 8 bits at most


def test_accelerate_launch_is_the_same_command(run, tmp_path):
    """The README's line: half precision asked for, full precision used on a CPU, said in one line, the same LoRA."""
    accelerate = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(ROOT / "accelerate_config.yaml"),
    ]
    data = run.parent.parent / "data" / "seven"
    options = ["--concept", "seven", "--data_dir", str(data), "--learning_rate", "0.01", *FEW.split()]
    options += ["--num_inference_steps", str(STEPS), "--validation_steps", "0"]  # the images that `run` rendered
    done = subprocess.run(
        [*accelerate, str(ROOT / "train.py"), *options, "--output_dir", "out"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    if "No CUDA device" in done.stderr:
        assert done.stderr.count("No CUDA device") == 1
        # Not to the byte: the launcher may give the process another number of threads, which sums in another order.
        here, there = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (run, tmp_path / "out"))
        assert here.keys() == there.keys()
        for name in here:
            assert (here[name] - there[name]).norm() <= 1e-3 * here[name].norm(), name
