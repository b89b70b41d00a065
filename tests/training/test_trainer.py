"""The whole of `train` on a base of a few thousand weights: what it writes, that seeds seed, that clipping clips."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import forked
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from conftest import CONCEPT_FILE, scheduled, tree
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from train_runs import few_layers, flags, logged, rendered

from sd_unlearn import cli
from sd_unlearn.config.base import ExportConfig
from sd_unlearn.config.train import TrainConfig
from sd_unlearn.data import dataset, prior
from sd_unlearn.data.batches import StratifiedBatches
from sd_unlearn.data.dataset import scan
from sd_unlearn.data.find_concept import read_concept
from sd_unlearn.data.prior import ASSUMED_BETA
from sd_unlearn.data.render_job import RenderJob
from sd_unlearn.errors import UnlearnError, UsageError
from sd_unlearn.evaluation.job import _reference_folder
from sd_unlearn.evaluation.loras import open_run
from sd_unlearn.export import export
from sd_unlearn.io.reading import read_json, read_jsonl
from sd_unlearn.io.run_folder import DATA_MANIFEST
from sd_unlearn.models import lora, sampling
from sd_unlearn.models.base import Base, load_base
from sd_unlearn.models.denoiser import Denoiser
from sd_unlearn.models.sampling import Sampler
from sd_unlearn.models.student import apply_run
from sd_unlearn.objectives import registry
from sd_unlearn.seeds import TRAIN_SEEDS
from sd_unlearn.training import preflight, setup, trainer
from sd_unlearn.training.metrics_log import COST

pytestmark = pytest.mark.usefixtures("one_thread")
ADAPTER = "adapter/adapter_model.safetensors"
SHORT = {"max_train_steps": 5}  # with 4, the linear and the cosine schedule have the same rates
Config = Callable[..., TrainConfig]


@pytest.fixture(scope="module", autouse=True)
def _quick_previews() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sd_unlearn.models.sampling.DEFAULT_SAMPLER", Sampler(2, 7.5, 16))
        yield


@pytest.fixture(scope="module")
def place(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a concept file and its rendered images. Training must not change them."""
    return rendered(tmp_path_factory.mktemp("place"), tiny_base, CONCEPT_FILE)


@pytest.fixture(scope="module")
def make_config(place: Path, tiny_base: Path) -> Config:
    """Options of a quick training on those images."""

    def make(output_dir: Path | str, **changes: object) -> TrainConfig:
        settings = {
            "concept": str(place / "brad.yaml"),
            "pretrained_model_name_or_path": str(tiny_base),
            "data_dir": place / "data",
            "output_dir": Path(output_dir),
            "num_inference_steps": 2,
            "rank": 2,
            "lora_alpha": 3.0,
            "max_train_steps": 12,
            "lr_warmup_steps": 2,
            "effective_batch_size": 8,
            "learning_rate": 1e-3,
            "validation_steps": 0,
            "report_to": "none",
        }
        return TrainConfig(**(settings | few_layers(changes) | changes))  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="module")
def trained(make_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with previews and a tracker. Do not change it."""
    output = tmp_path_factory.mktemp("runs") / "brad"
    return trainer.run(make_config(output, validation_steps=6, report_to="tensorboard"))


@pytest.fixture(scope="module")
def short(make_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps, enough for a setting to have an effect. Do not change it."""
    return trainer.run(make_config(tmp_path_factory.mktemp("short") / "brad", **SHORT))


def test_a_run_folder_holds_what_later_stages_need(trained: Path) -> None:
    found = {name for name in tree(trained) if not name.startswith("tensorboard")}
    assert found == {
        ".sd-unlearn-run",
        "adapter",
        "adapter/adapter_config.json",
        ADAPTER,
        "concept.yaml",
        "config.yaml",
        "metrics.jsonl",
        "previews",
        "previews/step-000000.png",
        "previews/step-000006.png",
        "previews/step-000012.png",
        "training.json",
    }
    (events,) = (path for path in (trained / "tensorboard").rglob("events.*") if b"mean_u" in path.read_bytes())
    assert all(key.encode() in events.read_bytes() for key in COST)


def test_by_default_the_lora_is_on_all_linear_and_convolutional_layers_and_is_trained(
    make_config: Config, loaded_base: Base
) -> None:
    run = trainer.run(make_config("run", lora_targets=None))
    tensors = load_file(run / ADAPTER)
    settings = read_json(run / "adapter" / "adapter_config.json")
    assert (settings["r"], settings["lora_alpha"]) == (2, 3.0)
    modules = {name.rsplit(".lora_", 1)[0] for name in tensors}
    layers = {n for n, m in loaded_base.network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    assert {name.removeprefix("base_model.model.") for name in modules} == layers
    assert len(tensors) == 2 * len(modules)
    ups = [value for name, value in tensors.items() if "lora_B" in name]
    assert all(value.abs().max() > 0 for value in ups)  # they start at zero
    assert all(value.isfinite().all() for value in tensors.values())
    assert all(value.dtype == torch.float32 for value in tensors.values())


def test_the_saved_lora_loads_into_a_fresh_base(trained: Path, loaded_base: Base) -> None:
    noisy, t, text = torch.ones(1, 4, 8, 8), torch.tensor([500]), torch.ones(1, 24, 16)
    unet = loaded_base.pipeline.unet
    with torch.no_grad():
        plain = unet(noisy, t, encoder_hidden_states=text).sample
        with apply_run(loaded_base, trained):
            assert (unet(noisy, t, encoder_hidden_states=text).sample - plain).abs().max() > 1e-6
            assert not any(p.requires_grad for p in unet.parameters())
            assert not unet.training
    with pytest.raises(UsageError, match="--run nowhere"), apply_run(loaded_base, Path("nowhere")):
        pass


def test_metrics_are_logged(trained: Path) -> None:
    lines = read_jsonl(trained / "metrics.jsonl")
    assert [line["step"] for line in lines] == [10, 12]
    for line in lines:
        assert {"mean_u", "mean_s", "ratio", "bracket", "negative_brackets", "loss", "lr", "grad_norm"} <= set(line)
        assert line["negative_brackets"] in (0, 1, 2)
        assert line["images_per_second"] > 0
        assert 0.05 < line["peak_memory_gib"] < 64  # of this process
        assert all(isinstance(value, float | int) for value in line.values())
        assert line["ratio"] == pytest.approx(line["mean_s"] / line["mean_u"])
        assert line["bracket"] == pytest.approx(line["mean_u"] - 0.2 * line["mean_s"], rel=1e-4)
    assert 0 <= lines[-1]["lr"] < lines[0]["lr"] < 1e-3


def test_the_training_record(trained: Path, tiny_base: Path) -> None:
    record = read_json(trained / "training.json")
    assert record["schema_version"] == 1
    assert record["concept"] == "brad-pitt"
    assert record["base"] == load_base(str(tiny_base), device="cpu").describe()
    assert (record["beta"], record["beta_source"]) == (0.2, "known")
    assert (record["push"], record["unconditional"]) == (2.5, 0.25)
    assert (record["rank"], record["lora_alpha"]) == (2, 3.0)
    assert (record["correction"], record["caption_mode"]) == ("abs", "both")
    assert len(record["config_sha256"]) == 64
    assert {"torch", "diffusers", "peft"} <= set(record["versions"])
    assert (record["cost"]["steps"], record["cost"]["images_seen"], record["cost"]["device"]) == (12, 96, "cpu")
    assert record["cost"]["peak_memory_mb"] > 0
    assert record["seeds"]["train"] == list(TRAIN_SEEDS)
    assert read_concept(trained / "concept.yaml").name == "Brad Pitt"


def test_previews_are_a_grid_of_fixed_seeds(trained: Path) -> None:
    grids = []
    for step in (0, 6, 12):
        with Image.open(trained / "previews" / f"step-{step:06d}.png") as image:
            assert image.size == (8 * 32, 4 * 32)  # the concept, the generic prompt and two keep prompts
            grids.append(image.tobytes())
    assert len(set(grids)) == 3


@pytest.mark.usefixtures("trained")
def test_training_does_not_change_the_images(place: Path) -> None:
    assert tree(place / "data") - {name for name in tree(place / "data") if name.startswith("cache")} == {
        "0_unlabeled",
        "1_positive",
        "manifest.json",
        "settings.json",
        "0_unlabeled/metadata.jsonl",
        "1_positive/metadata.jsonl",
        *(f"0_unlabeled/generic-{i:05d}.png" for i in range(4)),
        "0_unlabeled/mixed_in-00000.png",
        *(f"0_unlabeled/keep-{i:05d}.png" for i in range(4)),
        *(f"1_positive/positive-{i:05d}.png" for i in range(4)),
    }


def test_the_same_seed_gives_the_same_bytes(trained: Path, make_config: Config) -> None:
    """Whatever the state of the global generator, with previews at other steps; without any, see half precision."""
    torch.manual_seed(12345)
    again = trainer.run(make_config("again", validation_steps=5))
    assert (again / ADAPTER).read_bytes() == (trained / ADAPTER).read_bytes()
    assert logged(again) == logged(trained)


@pytest.mark.parametrize(
    "change",
    [
        {"caption_mode": "own"},
        {"reduction": "mean"},
        {"learning_rate": 1e-4},
        {"lora_alpha": 6.0},
        {"rank": 4},
        {"max_grad_norm": 1e-6},
        {"lr_warmup_steps": 9},
        {"target": "noise"},
        {"push": 1.0},
        {"unconditional": 0.0},
        {"timestep_bias": 1.0},
        {"share_timesteps": False},
        {"effective_batch_size": 16},
        {"lora_dropout": 0.5},
        {"use_dora": True},
        {"lora_targets": "cross_attention"},
        {"lora_targets": "attention+mlp"},
        {"lora_targets": None},
        {"train_text_encoder": True},
        {"optimizer": "adamw8bit"},
        {"quantize_base": "int8"},
        {"quantize_base": "nf4"},
        {"weight_decay": 0.9},
        {"lr_scheduler": "linear"},
        {"ema_decay": 0.9},
    ],
)
def test_every_setting_has_an_effect(short: Path, make_config: Config, change: dict[str, object]) -> None:
    other = trainer.run(make_config("other", **SHORT, **change))
    assert (other / ADAPTER).read_bytes() != (short / ADAPTER).read_bytes()


def test_beta_weighs_positives_with_the_noise_target_and_only_sets_the_sign_with_a_teacher(make_config: Config) -> None:
    def adapter(**settings: object) -> dict[str, torch.Tensor]:
        name = "-".join(f"{key}-{value}" for key, value in settings.items())
        return load_file(trainer.run(make_config(name, **SHORT, **settings)) / ADAPTER)

    def alike(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
        return all(torch.allclose(one[key], other[key], atol=1e-5) for key in one)

    assert alike(adapter(beta=0.2), adapter(beta=0.5))
    assert not alike(adapter(beta=0.2, target="noise"), adapter(beta=0.5, target="noise"))
    assert not alike(adapter(beta=0.99), adapter(beta=0.99, correction="none"))


@pytest.mark.parametrize("parts", [1, 2])
def test_each_objective_gives_another_lora_and_is_recorded(make_config: Config, parts: int) -> None:
    files = {}
    for objective in ("pu", "supervised", "unsupervised"):
        run = trainer.run(
            make_config(
                objective,
                **SHORT,
                objective=objective,
                target="noise",
                reduction="mean",
                gradient_share_steps=2,
                train_batch_size=8 // parts,
            )
        )
        files[objective] = (run / ADAPTER).read_bytes()
        assert read_json(run / "training.json")["objective"] == objective
        lines = read_jsonl(run / "metrics.jsonl")
        assert all(value is not None for line in lines for value in line.values())
        assert all(line["mean_s"] > 0 for line in lines)
        shares = [(line["share_positive"] > 0, line["share_s"] > 0) for line in lines if "share_u" in line]
        assert set(shares) == {(objective != "unsupervised", objective == "pu")}
    assert len(set(files.values())) == 3


def test_a_baseline_refuses_images_known_to_be_normal(
    photos: Callable[..., Path], concept_file: Path, tiny_base: Path
) -> None:
    folder = photos()
    (folder / "2_negative").mkdir()
    with pytest.raises(UsageError, match=r"2_negative .*--objective supervised .*--eta 0"):
        trainer.run(
            TrainConfig(
                concept=str(concept_file),
                pretrained_model_name_or_path=str(tiny_base),
                data_dir=folder,
                objective="supervised",
                target="noise",
            )
        )


def test_another_training_in_the_same_process_may_have_another_precision(
    make_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a notebook with a GPU; on a CPU every training is in full precision."""
    for precision in ("no", "bf16"):
        monkeypatch.setattr(trainer, "choose_precision", lambda given, chosen=precision: chosen)
        config = make_config(f"in-{precision}")
        assert trainer._make_accelerator(config, Path(str(config.output_dir)), None).mixed_precision == precision
    AcceleratorState._reset_state()


def test_another_seed_gives_another_lora_of_the_same_images(
    trained: Path, place: Path, make_config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    images = {path: path.read_bytes() for path in (place / "data").rglob("*.png")}
    other = trainer.run(make_config("run", seed=1))
    assert (other / ADAPTER).read_bytes() != (trained / ADAPTER).read_bytes()
    assert images == {path: path.read_bytes() for path in (place / "data").rglob("*.png")}
    assert f"{place / 'data'} was rendered with --seed 0 and is used as it is; --seed 1 " in capsys.readouterr().err


def test_an_unfinished_rendering_is_finished_with_its_own_seed(place: Path, make_config: Config) -> None:
    data = shutil.copytree(place / "data", Path("data"))
    lost = data / "1_positive" / "positive-00002.png"
    before = lost.read_bytes()
    lost.unlink()
    (data / DATA_MANIFEST).unlink()
    trainer.run(make_config("run", data_dir=data, max_train_steps=1, seed=7))
    assert lost.read_bytes() == before
    assert read_json(data / DATA_MANIFEST)["seeds"]["seed"] == 0


def test_the_resolved_config_repeats_the_run(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """config.yaml is a --config file with all defaults filled in. The concept is still the one of the given file, not
    another one of that name (prompts/brad-pitt.yaml)."""
    settings = yaml.safe_load((trained / "config.yaml").read_text())
    assert (settings["beta"], settings["unconditional"], settings["lora_alpha"]) == (0.2, 0.25, 3.0)
    assert settings["target"] == "teacher"
    assert cli.main(["train", "--config", str(trained / "config.yaml"), "--output_dir", "again"]) == 0
    assert capsys.readouterr().out == "again\n"
    assert (Path("again") / ADAPTER).read_bytes() == (trained / ADAPTER).read_bytes()


@pytest.mark.parametrize("target", ["teacher", "noise"])
def test_full_fine_tuning_trains_every_weight_of_the_unet(
    make_config: Config, tiny_base: Path, loaded_base: Base, target: str
) -> None:
    run = trainer.run(make_config("run", method="full", target=target, rank=TrainConfig.rank, lora_alpha=None))
    assert {p.name for p in run.iterdir()} == {
        ".sd-unlearn-run",
        "concept.yaml",
        "config.yaml",
        "metrics.jsonl",
        "training.json",
        "unet",
    }
    assert read_json(run / "training.json")["method"] == "full"
    before = {name: value.clone() for name, value in loaded_base.pipeline.unet.state_dict().items()}
    with apply_run(loaded_base, run):
        after = {name: value.clone() for name, value in loaded_base.pipeline.unet.state_dict().items()}
    still = [name for name in before if torch.equal(before[name], after[name])]
    assert not [name for name in still if "weight" in name]
    merged = export.run(ExportConfig(run=run, merge=Path("merged.safetensors")))
    assert merged == [Path("merged.safetensors")]


@pytest.mark.parametrize("limit", [1e-3, 0.1, 1e6])
def test_clipping_clips(make_config: Config, monkeypatch: pytest.MonkeyPatch, limit: float) -> None:
    norms, step = [], torch.optim.AdamW.step

    def watched(self: torch.optim.AdamW, *arguments: object, **options: object) -> object:
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.stack([g.norm() for g in gradients]).norm().item())
        assert len(gradients) == sum(len(group["params"]) for group in self.param_groups) > 0
        return step(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    run = trainer.run(make_config("clipped", max_grad_norm=limit, max_train_steps=10))
    (line,) = read_jsonl(run / "metrics.jsonl")
    assert len(norms) == 10
    assert max(norms) <= limit * 1.001
    assert norms[-1] == pytest.approx(min(limit, line["grad_norm"]), rel=1e-3)  # grad_norm is the norm before clipping
    assert limit == 1e6 or line["grad_norm"] > limit


@pytest.mark.parametrize("target", ["teacher", "noise"])
def test_training_moves_the_means_the_right_way(make_config: Config, target: str) -> None:
    """With positive brackets (a tiny beta) the loss of unlabeled and keep images falls: on the same batches it ends
    lower than in a run with a learning rate of almost zero."""
    runs = {
        rate: trainer.run(
            make_config(f"run-{rate}", beta=0.001, max_train_steps=60, learning_rate=rate, rank=4, target=target)
        )
        for rate in (1e-9, 0.03)
    }
    still, moved = (read_jsonl(run / "metrics.jsonl") for run in runs.values())
    if target == "noise":
        for before, after in zip(still[2:], moved[2:], strict=True):
            assert after["mean_u"] + after["mean_keep"] < before["mean_u"] + before["mean_keep"]
            assert after["mean_u"] < before["mean_u"]
    else:  # the run without training equals the teacher, and the other one stays near it
        assert all(line["mean_keep"] < 1e-6 for line in still)
        assert all(0 < line["mean_keep"] < 0.02 * line["mean_u"] for line in moved)
        assert all(line["spillover"] > 100 * before["spillover"] for before, line in zip(still, moved, strict=True))


@pytest.mark.parametrize("target", ["teacher", "noise"])
def test_the_keep_loss_of_a_new_lora_is_zero_with_a_teacher(make_config: Config, target: str) -> None:
    run = trainer.run(make_config("run", max_train_steps=1, target=target))
    (line,) = read_jsonl(run / "metrics.jsonl")
    if target == "teacher":
        assert line["mean_keep"] == pytest.approx(0, abs=1e-6)
        assert (line["moved"], line["spillover"]) == pytest.approx((0, 0), abs=1e-3)
    else:
        assert line["mean_keep"] > 1
        assert "moved" not in line


@pytest.mark.parametrize("target", ["teacher", "noise"])
def test_batches_use_the_teacher_and_embed_the_empty_caption(
    make_config: Config, loaded_base: Base, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    made: list[StratifiedBatches] = []

    def watched(*arguments: object, **options: object) -> StratifiedBatches:
        made.append(StratifiedBatches(*arguments, **options))  # type: ignore[arg-type]
        return made[0]

    monkeypatch.setattr(setup, "StratifiedBatches", watched)
    trainer.run(make_config("run", max_train_steps=1, target=target))
    (batches,) = made
    assert (batches.unconditional is not None) == (target == "teacher")
    want, _ = loaded_base.pipeline.encode_prompt("", "cpu", 1, do_classifier_free_guidance=False)
    assert torch.allclose(batches.images.text[""], want[0], atol=1e-5)


def test_a_finished_run_is_kept_without_overwrite(trained: Path, make_config: Config) -> None:
    output = shutil.copytree(trained, Path("mine"))
    before = {name: (output / name).stat().st_mtime_ns for name in tree(output)}
    with pytest.raises(UsageError, match=r"--output_dir mine .*--overwrite"):
        trainer.run(make_config(output))
    assert {name: (output / name).stat().st_mtime_ns for name in tree(output)} == before
    (output / "notes.txt").write_text("mine")
    shutil.move(output, "elsewhere")
    output.symlink_to("elsewhere")
    note = output / "notes.txt"
    trainer.run(make_config(output, overwrite=True, rank=1, lora_alpha=None))
    assert output.is_symlink()
    assert (output / ADAPTER).stat().st_mode & 0o777 == note.stat().st_mode & 0o777
    assert read_json(output / "training.json")["rank"] == 1
    assert read_json(output / "training.json")["lora_alpha"] == 1.0  # the rank, when it is not given
    assert not (output / "previews").exists()  # the earlier run was deleted
    assert note.read_text() == "mine"


@pytest.mark.parametrize("files", [["thesis.txt"], ["config.yaml", "thesis.txt"], ["config.yaml", "photos/me.jpg"]])
def test_a_folder_of_another_program_is_never_deleted(make_config: Config, files: list[str]) -> None:
    """Many projects have a config.yaml."""
    for name in files:
        Path("work", name).parent.mkdir(parents=True, exist_ok=True)
        Path("work", name).write_text("precious: true")
    for overwrite in (False, True):
        with contextlib.suppress(UsageError):  # both refusing and training next to the files are fine
            trainer.run(make_config("work", overwrite=overwrite, max_train_steps=1))
        assert Path("work", files[-1]).exists()


def test_an_interrupted_run_without_checkpoints_starts_again(
    make_config: Config, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = lora.save

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(lora, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.run(make_config("mine"))
    assert not Path("mine/training.json").exists()
    monkeypatch.setattr(lora, "save", save)
    trainer.run(make_config("mine"))
    assert Path("mine", ADAPTER).read_bytes() == (trained / ADAPTER).read_bytes()


def test_the_training_record_is_written_last(make_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    order, rename = [], Path.replace

    def watched(self: Path, target: Path) -> Path:
        order.append(Path(target).name)
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    trainer.run(make_config("mine", max_train_steps=1))
    assert order[-1] == "training.json"
    assert "adapter" in order


def test_folders_are_rendered_first(tiny_base: Path, concept_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.main(
        [
            "train",
            "--concept",
            str(concept_file),
            "--pretrained_model_name_or_path",
            str(tiny_base),
            "--num_inference_steps",
            "1",
            "--max_train_steps",
            "1",
            "--effective_batch_size",
            "5",
            "--validation_steps",
            "0",
        ]
    )
    out, err = capsys.readouterr()
    assert (code, out) == (0, "runs/brad-pitt\n")
    assert "data/brad-pitt is missing" in err
    assert Path("data/brad-pitt", DATA_MANIFEST).is_file()
    assert {p.name for p in Path().iterdir()} == {"brad.yaml", "data", "runs"}


def test_an_incomplete_rendering_is_finished_first(place: Path, make_config: Config) -> None:
    data = shutil.copytree(place / "data", Path("data"))
    lost = [data / DATA_MANIFEST, data / "0_unlabeled" / "metadata.jsonl", data / "1_positive" / "positive-00002.png"]
    before = lost[2].read_bytes()
    for path in lost:
        path.unlink()
    trainer.run(make_config("run", data_dir=data, max_train_steps=1))
    assert lost[2].read_bytes() == before
    assert lost[0].is_file()


def test_beta_follows_the_concept_file_and_the_images_that_are_left(place: Path, make_config: Config) -> None:
    """Also after the folder was rendered: one looks at its images before setting generic_share."""
    data = shutil.copytree(place / "data", Path("data"))
    (data / "0_unlabeled" / "generic-00003.png").unlink()
    metadata = data / "0_unlabeled" / "metadata.jsonl"
    lines = metadata.read_text().splitlines()
    metadata.write_text("\n".join(line for line in lines if "generic-00003.png" not in line))
    Path("brad.yaml").write_text((place / "brad.yaml").read_text() + "generic_share: 0.5\n")
    run = trainer.run(make_config("run", concept="brad.yaml", data_dir=data, max_train_steps=1))
    record = read_json(run / "training.json")
    assert (record["beta"], record["beta_source"]) == (0.625, "known")  # one mixed in and half of three
    assert not (data / "0_unlabeled" / "generic-00003.png").exists()


@pytest.mark.parametrize("own", [True, False])
def test_each_image_is_checked_once(
    photos: Callable[..., Path], make_config: Config, monkeypatch: pytest.MonkeyPatch, own: bool
) -> None:
    """The user's own before a model loads, generated ones after they were rendered."""
    opened: list[Path] = []
    monkeypatch.setattr(dataset, "open_image", opened.append)
    changes = {"data_dir": photos(unlabeled=4, positive=3)} if own else {}
    config = make_config("run", max_train_steps=1, **changes)
    trainer.run(config)
    assert max(Counter(opened).values()) == 1
    assert len(opened) == len(list(Path(str(config.data_dir)).rglob("*.png")))


def test_own_images(photos: Callable[..., Path], make_config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    folder = photos(unlabeled=4, positive=3)
    before = tree(folder)
    run = trainer.run(make_config("run", data_dir=folder, max_train_steps=2))
    err = capsys.readouterr().err
    assert f"4 unlabeled and 3 positive images, beta {ASSUMED_BETA:g} (assumed)" in err
    assert "rendering" not in err
    record = read_json(run / "training.json")
    assert (record["beta"], record["beta_source"]) == (ASSUMED_BETA, "assumed")
    assert {name for name in tree(folder) - before if not name.startswith("cache")} == set()


def test_own_photos_of_the_concept_replace_the_generated_ones(
    place: Path, make_config: Config, photos: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = photos(positive=5) / "1_positive"
    (folder / "0.txt").write_text("a photo of him")
    output = trainer.run(make_config("run", positives=folder, max_train_steps=2))
    err = capsys.readouterr().err
    assert f"{folder}: 5 images of the concept, 1 with own captions." in err
    assert re.search(r" 5 positive images, beta 0\.\d+ \(known\)", err)
    assert read_json(output / "training.json")["beta_source"] == "known"
    examples = scan(place / "data", read_concept(place / "brad.yaml"), positives=folder)
    assert {e.path.parent for e in examples if e.is_positive} == {folder}
    assert [e.caption for e in examples if e.is_positive] == ["a photo of him", *4 * ["a photo of Brad Pitt"]]
    lora = open_run(output)
    assert lora.concept is not None
    assert _reference_folder({}, lora.concept, [lora]) == folder


@pytest.mark.parametrize(
    ("name", "message"), [("nowhere", "is not a folder"), ("photos", "holds 0 images. At least 2")]
)
def test_a_wrong_folder_of_own_photos_is_refused_before_a_model_loads(
    make_config: Config, photos: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.setattr(trainer, "load_base", lambda *_: pytest.fail("loaded"))
    photos()
    with pytest.raises(UsageError, match=f"^--positives {name}.*{message}"):
        trainer.run(make_config("run", positives=Path(name)))


@pytest.mark.parametrize("target", ["teacher", "noise"])
def test_several_sets_of_positives_and_images_known_to_be_normal(
    photos: Callable[..., Path], place: Path, make_config: Config, capsys: pytest.CaptureFixture[str], target: str
) -> None:
    folder = photos(unlabeled=4, positive=3)
    options = {"data_dir": folder, "max_train_steps": 10, "target": target, "effective_batch_size": 24}
    plain = trainer.run(make_config("plain", **options)) / ADAPTER
    shutil.copytree(folder / "0_unlabeled", folder / "2_negative")
    (folder / "2_negative" / "3.png").unlink()
    assert (trainer.run(make_config("zero", **options, eta=0.0)) / ADAPTER).read_bytes() == plain.read_bytes()
    capsys.readouterr()
    normal = trainer.run(make_config("normal", **options))
    assert "4 unlabeled and 3 positive images, 3 known to be normal, beta 0.1" in capsys.readouterr().err
    assert (normal / ADAPTER).read_bytes() != plain.read_bytes()
    (line,) = read_jsonl(normal / "metrics.jsonl")
    assert line["mean_n"] > 0
    assert read_json(normal / "training.json")["betas"] == {"1_positive": 0.1}

    shutil.copytree(folder / "1_positive", folder / "1_positive_2")
    record = read_json(trainer.run(make_config("equal", **options, beta=0.3)) / "training.json")
    assert record["betas"] == {"1_positive": 0.15, "1_positive_2": 0.15}
    concept = (place / "brad.yaml").read_text() + "betas: {1_positive: 0.2, 1_positive_2: 0.1}\n"
    Path("betas.yaml").write_text(concept)
    run = trainer.run(make_config("betas", **options, concept="betas.yaml"))
    record = read_json(run / "training.json")
    assert record["betas"] == {"1_positive": 0.2, "1_positive_2": 0.1}
    assert (record["beta"], record["beta_source"]) == (pytest.approx(0.3), "concept")
    (line,) = read_jsonl(run / "metrics.jsonl")
    assert line["bracket"] == pytest.approx(line["mean_u"] - 0.3 * line["mean_s"], rel=1e-4)


def test_paraphrases_are_used_in_training(place: Path, make_config: Config) -> None:
    text = (place / "brad.yaml").read_text() + "paraphrases: ['Brad, {please,now}']\n"
    Path("brad.yaml").write_text(text)
    options = {"concept": "brad.yaml", "max_train_steps": 2}
    with pytest.raises(UsageError, match="--effective_batch_size 7 is too small"):
        trainer.run(make_config("small", **options, effective_batch_size=7))
    assert not Path("small").exists()
    adapters = []
    for mode, images in (("both", 11), ("shared", 8)):
        run = trainer.run(make_config(mode, **options, effective_batch_size=images, caption_mode=mode))
        assert read_json(run / "training.json")["cost"]["images_seen"] == 2 * images
        adapters.append((run / ADAPTER).read_bytes())
    without = trainer.run(make_config("without", max_train_steps=2, caption_mode="shared")) / ADAPTER
    assert adapters[1] == without.read_bytes()  # the shared caption ignores paraphrases


def test_a_batch_that_is_too_small_is_refused_before_anything_loads(
    make_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "load_base", None)
    Path("data", "2_negative").mkdir(parents=True)
    with pytest.raises(UsageError, match="--effective_batch_size 5 is too small"):
        trainer.run(make_config("run", effective_batch_size=5, data_dir=Path("data")))


def test_own_images_without_generic_ones_are_refused(photos: Callable[..., Path], make_config: Config) -> None:
    folder = photos(unlabeled=2, positive=2)
    lines = [json.dumps({"file_name": f"{i}.png", "text": "a dog", "group": "keep"}) for i in range(2)]
    (folder / "0_unlabeled" / "metadata.jsonl").write_text("\n".join(lines))
    with pytest.raises(UsageError, match="--data_dir"):
        trainer.run(make_config("run", data_dir=folder))
    assert not Path("run").exists()


def test_beta_is_estimated_on_request(make_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From 12 and 10 + 3 rendered images. The estimate, not the word, is recorded."""
    settings = {
        "data_dir": tmp_path / "data",
        "num_positive": 12,
        "num_unlabeled": 10,
        "num_mixed_in": 3,
        "max_train_steps": 1,
    }
    run = trainer.run(make_config("run", beta="estimate", **settings))
    record, err = read_json(run / "training.json"), capsys.readouterr().err
    used, other = record["beta_estimates"]
    assert (used["method"], other["method"]) == ("BBE", "Elkan-Noto")
    assert (used["n_positive"], used["n_unlabeled"]) == (12, 13)  # the keep images do not count
    assert 0 < used["low"] <= used["beta"] <= used["high"] < 1
    assert (record["beta"], record["beta_source"]) == (used["beta"], "estimated")
    assert yaml.safe_load((run / "config.yaml").read_text())["beta"] == used["beta"]
    assert f"beta by BBE: {used['beta']:.3f}" in err
    assert "Warning: beta" in err
    assert "32 pixels are too small for CLIP" in err
    assert f"beta {used['beta']:g} (estimated)" in err
    again = trainer.run(make_config("again", beta="estimate", **settings))
    assert read_json(again / "training.json")["beta_estimates"] == record["beta_estimates"]


def test_a_resumed_run_keeps_its_estimate(make_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On another device the estimate differs by rounding."""
    options = {"data_dir": tmp_path / "data", "num_positive": 12, "num_unlabeled": 10, "num_mixed_in": 3}
    options |= {"max_train_steps": 1, "checkpointing_steps": 1}
    run = trainer.run(make_config("run", beta="estimate", **options))
    beta = read_json(run / "training.json")["beta"]
    rounded = prior.BetaEstimate("BBE", beta + 1e-9, 0.0, 1.0, 12, 13, "pixels")
    monkeypatch.setattr(prior, "estimate_beta", lambda _: (rounded, rounded))
    (run / "training.json").unlink()
    trainer.run(make_config("run", beta="estimate", **options, resume_from_checkpoint="latest"))
    record = read_json(run / "training.json")
    assert (record["beta"], record["beta_source"]) == (beta, "estimated")
    trainer.run(make_config("given", beta=beta, **options))  # not estimated: the estimate is compared
    with pytest.raises(UsageError, match=f"--beta was {beta} and is {beta + 1e-9}"):
        trainer.run(make_config("given", beta="estimate", **options, resume_from_checkpoint="latest"))


def test_too_few_images_to_estimate_from_are_refused_before_a_model_is_loaded(
    make_config: Config, tmp_path: Path, photos: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "load_base", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(UsageError, match="--beta estimate: 4 .* 5 "):
        trainer.run(make_config("run", beta="estimate", data_dir=tmp_path / "data"))
    with pytest.raises(UsageError, match="--beta estimate: 2 .* 3 "):
        trainer.run(make_config("run", beta="estimate", data_dir=photos()))
    assert not (tmp_path / "data").exists()


def test_the_beta_option_takes_precedence(make_config: Config) -> None:
    record = read_json(trainer.run(make_config("run", beta=0.3, max_train_steps=1)) / "training.json")
    assert (record["beta"], record["beta_source"]) == (0.3, "option")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine can do fp16")
@pytest.mark.parametrize("by", ["option", "accelerate"])
def test_half_precision_falls_back_on_a_cpu_with_one_warning(
    make_config: Config, trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    options = {"mixed_precision": "fp16"} if by == "option" else {}
    if by == "accelerate":
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    run = trainer.run(make_config("run", **options))
    warnings = [line for line in capsys.readouterr().err.splitlines() if "fp16" in line]
    assert len(warnings) == 1
    assert "full precision" in warnings[0]
    assert (run / ADAPTER).read_bytes() == (trained / ADAPTER).read_bytes()
    assert logged(run) == logged(trained)


def test_processes_share_the_images_to_render_whatever_fits_into_their_memory(
    make_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[RenderJob] = []
    monkeypatch.setattr(trainer, "render_locked", lambda job, _: jobs.append(job))
    config = make_config("run", render_batch_size=None)
    for size in (16, 2):
        trainer._render(config, preflight.check_inputs(config, None), size, pytest.fail)
    assert [(job.share, job.sampler.batch_size) for job in jobs] == [(16, 16), (16, 2)]


def test_two_processes_render_and_train_as_one(tiny_base: Path, concept_file: Path) -> None:
    """As torchrun starts them: each draws its share of the images and takes its share of every step, and the LoRA is
    that of one process with the whole batch, in one piece or in micro-batches."""
    options = {
        "concept": concept_file,
        "pretrained_model_name_or_path": tiny_base,
        "num_inference_steps": 1,
        "max_train_steps": 3,
        "validation_steps": 0,
        "report_to": "none",
        "data_dir": "data",
        "learning_rate": 0.01,
        "guidance_scale": 7.5,
        "render_batch_size": 4,
        "lora_targets": "attention",  # with all layers, AdamW amplifies rounding
    }
    command = ["train", *flags(options)]
    logs = forked.run_pair(cli.main, [*command, "--output_dir", "run", "--effective_batch_size", "32"])
    record = read_json(Path("run/training.json"))
    assert (record["cost"]["processes"], record["cost"]["images_seen"]) == (2, 3 * 32)
    assert read_json(Path("data", DATA_MANIFEST))["counts"] == {"generic": 4, "mixed_in": 1, "keep": 4, "positive": 4}
    assert Path("run", ADAPTER).is_file()
    assert sum("Forgetting" in log for log in logs) == 1  # printed by one of them
    of_both = load_file(Path("run", ADAPTER))
    for name, options in {"one": ("32", "1"), "cut": ("16", "2"), "small": ("1", "32")}.items():
        size = ["--output_dir", name, "--train_batch_size", options[0], "--gradient_accumulation_steps", options[1]]
        assert cli.main([*command, *size]) == 0
        found = load_file(Path(name, ADAPTER))
        assert found.keys() == of_both.keys()
        ours, theirs = (torch.cat([value.flatten() for value in lora.values()]) for lora in (found, of_both))
        assert (ours - theirs).abs().max() <= 1e-5
        assert (ours - theirs).norm() <= 1e-4 * (ours.norm() + theirs.norm())
        assert ours.abs().max() > 1e-2


def test_divergence_is_reported_and_not_saved(make_config: Config) -> None:
    with pytest.raises(UnlearnError, match=r"diverged at step 12.*--learning_rate"):
        trainer.run(make_config("run", learning_rate=1e30))
    assert not Path("run/training.json").exists()
    assert not Path("run", ADAPTER).exists()


def test_a_tracker_that_is_not_installed_is_refused(make_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="--report_to wandb is not installed: pip install wandb"):
        trainer.run(make_config("run", report_to="wandb"))
    assert preflight.choose_tracker(None) is None
    assert preflight.choose_tracker("none") is None


@pytest.mark.parametrize("target", ["teacher", "noise"])
def test_noise_options_are_used_and_recorded(make_config: Config, v_base: Path, tmp_path: Path, target: str) -> None:
    place: dict[str, object] = {
        "pretrained_model_name_or_path": str(v_base),
        "data_dir": tmp_path / "data",
        "max_train_steps": 10,
        "target": target,
    }
    options = {"snr_gamma": 0.5, "zero_terminal_snr": True}
    plain = read_jsonl(trainer.run(make_config("plain", **place)) / "metrics.jsonl")
    settings = read_json(tmp_path / "data" / "settings.json")
    for name, value in options.items():
        run = trainer.run(make_config(name, **place, **{name: value}))
        (line,) = read_jsonl(run / "metrics.jsonl")
        assert line["mean_u"] != plain[0]["mean_u"]
        record = read_json(run / "training.json")
        assert {key: record[key] for key in options} == {
            "snr_gamma": None,
            "zero_terminal_snr": False,
            name: value,
        }
    assert read_json(tmp_path / "data" / "settings.json") == settings


def test_zero_terminal_snr_is_trained_on_but_not_rendered_with(
    make_config: Config, v_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, float] = {}
    generate, losses = sampling.generate_images, registry.example_losses

    def drawn(base: Base, *arguments: object) -> object:
        seen["rendered"] = base.pipeline.scheduler.alphas_cumprod[-1].item()
        return generate(base, *arguments)  # type: ignore[arg-type]

    def lost(denoiser: Denoiser, *arguments: object) -> Tensor:
        seen["trained"] = denoiser.process.alphas_cumprod[-1].item()
        return losses(denoiser, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(sampling, "generate_images", drawn)
    monkeypatch.setattr(registry, "example_losses", lost)
    trainer.run(
        make_config(
            "run",
            pretrained_model_name_or_path=str(v_base),
            data_dir=tmp_path / "data",
            max_train_steps=1,
            zero_terminal_snr=True,
        )
    )
    assert seen["rendered"] > 1e-3
    assert seen["trained"] == 0


@pytest.mark.parametrize("local", [True, False])
def test_zero_terminal_snr_is_refused_for_epsilon(
    make_config: Config, monkeypatch: pytest.MonkeyPatch, local: bool
) -> None:
    """Before the model loads if its files are local, after loading for one of the Hub."""
    if local:
        monkeypatch.setattr(trainer, "load_base", lambda *_: pytest.fail("the base was loaded"))
    else:
        monkeypatch.setattr(preflight, "check_zero_terminal_snr", lambda name: None)
    with pytest.raises(UsageError, match=r"--zero_terminal_snr .* predicts epsilon"):
        trainer.run(make_config("run", zero_terminal_snr=True))
    assert not Path("run").exists()


@pytest.mark.parametrize("target", ["teacher", "noise"])
def test_a_base_whose_own_schedule_ends_in_pure_noise(
    make_config: Config, v_base: Path, tmp_path: Path, target: str
) -> None:
    """Its last alphas_cumprod is 0, by which nothing may be divided."""
    own = scheduled(v_base, tmp_path / "base", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    assert load_base(str(own), device="cpu").pipeline.scheduler.alphas_cumprod[-1] == 0
    run = trainer.run(
        make_config(
            "run",
            pretrained_model_name_or_path=str(own),
            data_dir=tmp_path / "data",
            max_train_steps=10,
            snr_gamma=5.0,
            timestep_bias=200.0,
            target=target,
        )
    )
    (line,) = read_jsonl(run / "metrics.jsonl")
    assert line["grad_norm"] > 0


def test_checkpointing_trains_the_same_lora(
    trained: Path, make_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    losses = registry.example_losses

    def watched(denoiser: Denoiser, *arguments: object) -> Tensor:
        seen.append(any(getattr(m, "gradient_checkpointing", False) for m in denoiser.model.modules()))
        return losses(denoiser, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(registry, "example_losses", watched)
    run = trainer.run(make_config("run", gradient_checkpointing=True))
    assert all(seen)
    ours, theirs = (load_file(folder / ADAPTER) for folder in (run, trained))
    for name, value in theirs.items():
        assert torch.allclose(ours[name], value, atol=1e-5)


def test_v_prediction_bases_can_be_trained(tiny_base: Path, make_config: Config, tmp_path: Path) -> None:
    other = shutil.copytree(tiny_base, tmp_path / "v-base")
    schedule = other / "scheduler" / "scheduler_config.json"
    schedule.write_text(json.dumps(read_json(schedule) | {"prediction_type": "v_prediction"}))
    options = {"pretrained_model_name_or_path": str(other), "data_dir": tmp_path / "v-data", "max_train_steps": 2}
    record = read_json(trainer.run(make_config("run", **options)) / "training.json")
    assert record["base"]["prediction_type"] == "v_prediction"
    schedule.write_text(json.dumps(read_json(schedule) | {"prediction_type": "sample"}))
    with pytest.raises(UnlearnError, match="sample"):
        trainer.run(make_config("run-2", **options, seed=0))
