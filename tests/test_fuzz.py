"""Every reader of users' files: whatever the file holds, the answer is a result or an error of ours that names it."""

from __future__ import annotations

import io
import itertools
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cyclopts
import numpy as np
import pytest
import torch
from export_runs import evaluated, hand_run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from odd_content import byte_contents, json_contents, jsonl_contents, safetensors_contents, yaml_contents
from paper_runs import make_record
from PIL import Image
from report_results import make_results
from safetensors.torch import save

from sd_unlearn import cli, commands, sweep
from sd_unlearn.config.base import BaseOptions, RenderConfig, ReportConfig
from sd_unlearn.config.checks import check_train
from sd_unlearn.data import render, render_job
from sd_unlearn.data.concept import Concept
from sd_unlearn.data.dataset import scan
from sd_unlearn.data.encoding import load_pixels
from sd_unlearn.data.find_concept import read_concept
from sd_unlearn.data.prompt_sets import load_prompt_set
from sd_unlearn.data.render_settings import read_settings
from sd_unlearn.errors import UnlearnError, UsageError
from sd_unlearn.evaluation.detections import detect
from sd_unlearn.evaluation.image_folders import read_image_folder
from sd_unlearn.evaluation.loras import open_lora, open_run
from sd_unlearn.export.kohya import read_adapter
from sd_unlearn.export.metadata import own_header
from sd_unlearn.export.trained_run import read_run
from sd_unlearn.io.files import write_json
from sd_unlearn.io.images import open_image
from sd_unlearn.io.own_files import mark
from sd_unlearn.io.reading import read_json, read_jsonl
from sd_unlearn.metrics.classifier import make_classifier
from sd_unlearn.models import lora
from sd_unlearn.models.checkpoint_header import check_vae_file, kind_of_file, prediction_of_file, read_checkpoint_header
from sd_unlearn.models.find_base import find_base
from sd_unlearn.models.lora_file import PeftSettings, read_lora_file
from sd_unlearn.models.recorded_base import recorded_source
from sd_unlearn.models.source import DIGITS_DIR
from sd_unlearn.paper.experiments import EXPERIMENTS
from sd_unlearn.paper.run import check_same_run, folder_of
from sd_unlearn.paper.tables import records
from sd_unlearn.report import report
from sd_unlearn.report.terminal import format_table
from sd_unlearn.results import read_results
from sd_unlearn.training import checkpoint
from sd_unlearn.training.metrics_log import MetricsLog

EXAMPLES = 50
CONCEPT = Concept("seven", "a photo of the digit seven", "a photo of a digit")
CONCEPT_FILE = {
    "name": "seven",
    "caption": "a photo of the digit seven",
    "generic": "a photo of a digit",
    "kind": "digit",
    "keep": ["a photo of the digit {one,two}"],
    "betas": {"1_positive": 0.1},
    "images": {"positive": 4, "keep": 2},
    "evaluate": {"held_out": ["7"], "alike": ["{1,2}"]},
}
Read = Callable[[Path], object]
_numbers = itertools.count()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@contextmanager
def in_folder(place: Path, prepare: Callable[[Path], object]) -> Iterator[Path]:
    """A new folder that `prepare` fills."""
    folder = place / f"folder{next(_numbers)}"
    folder.mkdir()
    prepare(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def refusal(read: Read, folder: Path) -> str | None:
    """The message of our error; None if the file was read."""
    try:
        read(folder)
    except UnlearnError as error:
        return str(error)
    return None


def fuzz(
    place: Path,
    contents: st.SearchStrategy[bytes],
    name: str,
    read: Read,
    prepare: Callable[[Path], object] = lambda folder: None,
    examples: int = EXAMPLES,
    named: str = "",
) -> None:
    """Read `examples` contents of the file `name` of a prepared folder.

    named: what an error must contain; default: the file's name.
    """

    # derandomize: the same examples in every run, so that a failure is never a surprise of another change
    @settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(contents)
    def check(content: bytes) -> None:
        with in_folder(place, prepare) as folder:
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
            message = refusal(read, folder)
            assert message is None or (named or file.name) in message.encode("utf-8").decode()

    check()


# -- concepts and options --


def test_concept_files(place: Path) -> None:
    def read(folder: Path) -> None:
        concept = read_concept(folder / "x.yaml")
        groups = [concept.prompts(group) for group in ("direct", "held_out", "alike", "general")]
        assert concept.captions, (concept.slug, concept.keep_prompts, groups)

    fuzz(place, yaml_contents(CONCEPT_FILE), "x.yaml", read)


def test_config_files(place: Path) -> None:
    valid = {"concept": "seven", "rank": 8, "beta": 0.1, "learning_rate": 1e-3, "use_dora": False, "vae": "x/y"}

    def read(folder: Path) -> None:
        tokens = ["train", "--config", str(folder / "x.yaml")]
        try:
            commands.app.config = cli._as_config(*cli._config_file(tokens))
            _, bound, _ = commands.app.parse_args(tokens, exit_on_error=False, print_error=False)
        except cyclopts.CycloptsError as error:
            raise UsageError(cli._usage_message(error)) from None
        check_train(bound.arguments["config"])

    fuzz(place, yaml_contents(valid), "x.yaml", read, named=" ")


def test_config_files_of_paper(place: Path) -> None:
    valid = {"objective": "pu", "beta": 0.2, "train_batch_size": 8, "missing": "9", "conditional": True, "seed": 3}

    def read(folder: Path) -> None:
        tokens = ["paper", "run", "mnist5k-even", "--config", str(folder / "x.yaml")]
        try:
            commands.app.config = cli._as_config(*cli._config_file(tokens))
            _, bound, _ = commands.app.parse_args(tokens, exit_on_error=False, print_error=False)
        except cyclopts.CycloptsError as error:
            raise UsageError(cli._usage_message(error)) from None
        folder_of(EXPERIMENTS["mnist5k-even"], bound.arguments["config"])

    fuzz(place, yaml_contents(valid), "x.yaml", read, named=" ")


def test_settings_of_sweeps(place: Path) -> None:
    settings = {"concept": "seven", "factors": [0.5, 1.0], "beta": 0.1, "rank": 8, "target": "teacher"}

    def read(folder: Path) -> None:
        sweep.check_output(folder, settings, overwrite=False)

    def prepare(folder: Path) -> None:
        (folder / "factor-1").mkdir()
        mark(folder, "sweep")

    fuzz(place, yaml_contents(settings), "sweep.yaml", read, prepare, named="folder")


def test_settings_of_paper_runs(place: Path) -> None:
    config = {"experiment": "mnist5k-even", "size": "tiny", "seed": 42, "beta": 0.1, "missing": []}

    def read(folder: Path) -> None:
        check_same_run(folder, config, overwrite=False)

    fuzz(place, yaml_contents(config), "config.yaml", read, lambda folder: mark(folder, "paper"), named="folder")


# -- detectors --


def test_configs_of_classifiers(place: Path) -> None:
    timm = {"architecture": "test_resnet", "num_classes": 2, "pretrained_cfg": {"label_names": ["cat", "dog"]}}
    transformers = {"model_type": "resnet", "id2label": {"0": "cat", "1": "dog"}, "num_channels": 3, "depths": [1]}
    contents = st.one_of(json_contents(timm), json_contents(transformers))
    fuzz(
        place, contents, "config.json", lambda folder: make_classifier(str(folder), "cat"), examples=40, named="folder"
    )


class Brightness:
    name = "mean"

    def read(self, images: Sequence[Image.Image]) -> dict[str, NDArray]:
        return {"mean": np.array([np.asarray(image).mean() for image in images]), "boxes": np.zeros((len(images), 4))}


def test_caches_of_detectors(place: Path) -> None:
    """A damaged cache counts as empty: the detections are those of a run without one."""

    def prepare(folder: Path) -> None:
        for number in range(2):
            Image.new("RGB", (8, 8), (number, number, number)).save(folder / f"{number}.png")

    def read(folder: Path) -> Any:
        found, failed = detect(Brightness(), [folder / "0.png", folder / "1.png"], "a", folder, "t")
        assert not failed
        return found.output["mean"].tolist()

    def check(folder: Path) -> None:
        assert read(folder) == [0, 1]

    with in_folder(place, prepare) as folder:
        read(folder)
        (file,) = (folder / "readings").iterdir()
        valid = file.read_bytes()
    arrays: list[dict[str, Any]] = [{}, {"mean": 1}, {"file_names": np.array(3)}]
    arrays.append({"file_names": np.array(["0.png"]), "mean": np.zeros(2)})
    for odd in arrays:
        np.savez(memory := io.BytesIO(), **odd)
        with in_folder(place, prepare) as folder:
            (folder / "readings").mkdir()
            (folder / "readings" / file.name).write_bytes(memory.getvalue())
            check(folder)
    fuzz(place, byte_contents(valid), f"readings/{file.name}", check, prepare)


# -- data folders --


def photos(folder: Path) -> None:
    for kind in ("0_unlabeled", "1_positive"):
        (folder / kind).mkdir()
        for number in range(2):
            Image.new("RGB", (8, 8), (number, 9, 9)).save(folder / kind / f"{number}.png")


def test_captions(place: Path) -> None:
    lines = [{"file_name": "0.png", "text": "a seven", "group": "generic"}, {"file_name": "1.png", "text": "a"}]
    fuzz(place, jsonl_contents(lines), "0_unlabeled/metadata.jsonl", lambda folder: scan(folder, CONCEPT), photos)


def test_manifests(place: Path) -> None:
    manifest = {"schema_version": 1, "base": {"name": "digits"}, "counts": {"generic": 2}}
    fuzz(
        place, json_contents(manifest), "manifest.json", lambda folder: read_settings(folder / "manifest.json"), photos
    )


class _Loads(Exception):
    pass


def test_settings_of_rendered_folders(place: Path) -> None:
    def load() -> Any:
        raise _Loads

    def read(folder: Path) -> None:
        source = find_base(BaseOptions(pretrained_model_name_or_path="digits"))
        job = render_job.make_job(CONCEPT, RenderConfig(data_dir=folder, num_unlabeled=2, num_positive=2), source)
        try:
            render.render_concept(job, load)
        except _Loads:
            pass

    fuzz(place, json_contents({"concept": "seven", "seed": 0, "plan": [["generic", "x", 1]]}), "settings.json", read)


def test_images_with_a_plan_of_their_own(place: Path) -> None:
    lines = [{"file_name": "0.png", "text": "a photo of the digit seven", "group": "direct", "seed": 3}]
    fuzz(
        place,
        jsonl_contents(lines),
        "images/metadata.jsonl",
        lambda folder: [open_image(path) for path in read_image_folder(str(folder / "images"), CONCEPT, []).paths],
        named=" ",
    )


# -- images --


def encoded(format: str, mode: str = "RGB", **options: Any) -> bytes:
    memory = io.BytesIO()
    Image.effect_noise((16, 16), 60).convert(mode).save(memory, format, **options)
    return memory.getvalue()


@pytest.mark.filterwarnings("ignore::UserWarning")  # of Pillow, for damaged TIFF files
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "AVIF", "GIF", "TIFF", "BMP"])
def test_image_files(place: Path, format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"exif": exif} if format in ("PNG", "JPEG", "WEBP", "AVIF") else {}
    extra = [encoded("PNG", "LA"), encoded("PNG", "P"), encoded("PNG", "1")] if format == "PNG" else []
    valid = [encoded(format, **options), *extra]
    fuzz(place, byte_contents(*valid), "x.png", lambda folder: load_pixels(folder / "x.png", 8), examples=100)


# -- runs --


def test_results(place: Path) -> None:
    def read(folder: Path) -> None:
        format_table(read_results(folder))
        report.run(ReportConfig(run=folder, certificate=True))

    fuzz(place, json_contents(make_results()), "results.json", read, examples=80)


@pytest.mark.parametrize("name", ["metrics.jsonl", "training.json", "concept.yaml", "config.yaml"])
def test_files_of_a_reported_run(place: Path, name: str) -> None:
    training = {"base": {"name": "digits"}, "seeds": {"train": [5, 6]}, "cost": {"seconds": 3}, "versions": {"a": "1"}}
    contents = {
        "metrics.jsonl": jsonl_contents(
            [{"step": step, "mean_u": 2.0, "mean_s": 3.0, "ratio": 1.5} for step in (1, 2)]
        ),
        "training.json": json_contents(training),
        "concept.yaml": yaml_contents(CONCEPT_FILE),
        "config.yaml": yaml_contents({"concept": "seven", "beta": 0.1, "rank": 8}),
    }

    def prepare(folder: Path) -> None:
        write_json(folder / "results.json", make_results())

    fuzz(place, contents[name], name, lambda folder: report.run(ReportConfig(run=folder)), prepare, examples=20)


def test_metrics_of_a_resumed_run(place: Path) -> None:
    def read(folder: Path) -> None:
        with MetricsLog(folder, "", 5, 10, SimpleNamespace(is_main_process=True)):  # type: ignore[arg-type]
            pass

    fuzz(place, jsonl_contents([{"step": 1, "loss": 2.0}, {"step": 9}]), "metrics.jsonl", read)


def training_of(place: Path) -> Any:
    with in_folder(place, hand_run) as folder:
        return read_json(folder / "training.json") | {"cost": {"steps": 3}, "versions": {"torch": "2"}, "seed": 0}


def test_training_records(place: Path) -> None:
    def read(folder: Path) -> None:
        lora = open_run(folder)
        str((lora.base_name, lora.base_hashes, lora.zero_terminal_snr))
        recorded_source(lora.training["base"])
        own_header(read_run(folder))

    fuzz(place, json_contents(training_of(place)), "training.json", read, evaluated, examples=100)


def test_adapter_configs(place: Path) -> None:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3.0, "target_modules": ["to_q"], "bias": "none"}
    config |= {"rank_pattern": {"to_.*": 2}, "alpha_pattern": {"to_q": 3.0}, "use_dora": False}
    tensors = {
        f"base_model.model.to_q.lora_{side}.weight": torch.ones(shape) for side, shape in (("A", (2, 4)), ("B", (4, 2)))
    }

    def prepare(folder: Path) -> None:
        (folder / "adapter").mkdir()
        (folder / "adapter" / "adapter_model.safetensors").write_bytes(save(tensors))

    def read(folder: Path) -> None:
        read_adapter(folder / "adapter")

    def load(folder: Path) -> None:
        lora.read_run(folder)

    fuzz(place, json_contents(config), "adapter/adapter_config.json", read, prepare, named="adapter")
    fuzz(place, json_contents(config), "adapter/adapter_config.json", load, prepare, named="adapter", examples=40)


def test_a_rank_of_hundreds_of_digits_is_refused() -> None:
    """Found by a longer run of the test above."""
    settings = PeftSettings(2, 3.0, {"to_.*": -(10**400)})
    with pytest.raises(UnlearnError, match=r"x\.json: to_q has rank 2, but the settings say -1000"):
        settings.alpha_of("to_q", 2, "x.json")


def test_adapter_weights(place: Path) -> None:
    with in_folder(place, hand_run) as folder:
        valid = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    name = "adapter/adapter_model.safetensors"
    fuzz(place, safetensors_contents(valid), name, lambda folder: read_adapter(folder / "adapter"), hand_run)


def test_checkpoint_identities(place: Path) -> None:
    identity = {"--rank": 8, "base": "ab", "processes": 1}
    fuzz(
        place,
        json_contents({"step": 5, **identity}),
        "checkpoint.json",
        lambda folder: checkpoint.check_same(folder, identity, forced=False),
        named="folder",
    )


def test_run_records(place: Path) -> None:
    def read(folder: Path) -> None:
        run = records.read_run(folder / "mnist5k-even" / "a" / "results.json")
        assert run is None or (run.metrics, run.beta, run.variant)

    fuzz(place, json_contents(make_record()), "mnist5k-even/a/results.json", read)


# -- weights --


def test_lora_files(place: Path) -> None:
    tensors = {"lora_unet_x.lora_up.weight": torch.ones(2, 2), "lora_unet_x.alpha": torch.tensor(2.0)}
    valid = save(tensors, {"sd_unlearn.concept": "seven", "sd_unlearn.base": "digits"})

    def read(folder: Path) -> None:
        lora = open_lora(str(folder / "x.safetensors"))
        assert lora.sha256, (lora.base_name, lora.zero_terminal_snr)
        read_lora_file(folder / "x.safetensors", "--lora")

    fuzz(place, safetensors_contents(valid), "x.safetensors", read, examples=100)


CHECKPOINT = {
    "model.diffusion_model.input_blocks.0.0.weight": torch.ones(8, 4, 3, 3),
    "model.diffusion_model.input_blocks.1.1.proj_in.weight": torch.ones(8, 8, 1, 1),
    "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.ones(8, 768),
    "cond_stage_model.transformer.text_model.x": torch.ones(2),
    "first_stage_model.decoder.conv_in.weight": torch.ones(2),
}


def read_header(file: Path) -> None:
    header = read_checkpoint_header(file, "--vae", allow_pickle=True)
    prediction_of_file(header, kind_of_file(header))
    check_vae_file(header)


def test_checkpoint_headers(place: Path) -> None:
    valid = save(CHECKPOINT, {"modelspec.prediction_type": "epsilon"})
    fuzz(place, safetensors_contents(valid), "x.safetensors", lambda folder: read_header(folder / "x.safetensors"))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.float8_e4m3fn, torch.float64, torch.complex64])
@pytest.mark.parametrize("shape", [(), (0, 2), (2, 0), (3,), (3, 3), (1, 1, 1, 1, 1)])
def test_loras_of_other_shapes_and_types(tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for name in ("lora_down.weight", "lora_up.weight", "alpha"):
        tensors = {
            "x.lora_down.weight": torch.ones(2, 4),
            "x.lora_up.weight": torch.ones(4, 2),
            "x.alpha": torch.ones(()),
        }
        tensors = {f"lora_unet_{key}": value for key, value in tensors.items()}
        (tmp_path / "x.safetensors").write_bytes(save(tensors | {f"lora_unet_x.{name}": torch.ones(shape).to(dtype)}))
        message = refusal(lambda _: read_lora_file(tmp_path / "x.safetensors", "--lora"), tmp_path)
        assert message is None or "x.safetensors" in message


@pytest.mark.parametrize("shape", [(), (3,), (0,), (4, 0), (1, 1, 1, 1, 1)])
@pytest.mark.parametrize("name", CHECKPOINT)
def test_checkpoints_of_other_shapes(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    (tmp_path / "x.safetensors").write_bytes(save(CHECKPOINT | {name: torch.ones(shape)}))
    options = BaseOptions(pretrained_model_name_or_path=str(tmp_path / "x.safetensors"))
    message = refusal(lambda _: find_base(options), tmp_path)
    assert message is None or "x.safetensors" in message


def test_pickles(place: Path) -> None:
    memory = io.BytesIO()
    torch.save({"state_dict": CHECKPOINT, "step": 3}, memory)
    fuzz(place, byte_contents(memory.getvalue()), "x.ckpt", lambda folder: read_header(folder / "x.ckpt"), examples=40)


@pytest.mark.parametrize("content", [{1: torch.ones(2)}, [1], {"state_dict": {"state_dict": 3}}, torch.ones(2)])
def test_pickles_of_something_else(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(UsageError, match=r"x\.ckpt"):
        read_header(tmp_path / "x.ckpt")


@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json", "text_encoder/config.json"])
def test_configurations_of_a_base(place: Path, name: str) -> None:
    valid = read_json(DIGITS_DIR / name)

    def prepare(folder: Path) -> None:
        for file in DIGITS_DIR.rglob("*.json"):
            copy = folder / "base" / file.relative_to(DIGITS_DIR)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, copy)

    def read(folder: Path) -> None:
        find_base(BaseOptions(pretrained_model_name_or_path=str(folder / "base")))

    fuzz(place, json_contents(valid), f"base/{name}", read, prepare, named="base")


# -- prompt sets --


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "txt"])
def test_prompt_sets(place: Path, suffix: str) -> None:
    rows = [{"prompt": "a photo", "seed": 3}, {"prompt": 'a "cat", sitting', "seed": 4}]
    table = b'prompt,seed\na photo,3\n"a ""cat"", sitting",4\n'
    contents = jsonl_contents(rows) if suffix == "jsonl" else byte_contents(table, b"prompt\n" + b"x" * 140_000)
    fuzz(place, contents, f"x.{suffix}", lambda folder: load_prompt_set(folder / f"x.{suffix}"))


def test_the_fuzz_finds_readers_that_check_nothing(place: Path) -> None:
    """The test of this test: a reader that takes keys for granted is caught."""
    with pytest.raises((KeyError, TypeError, AttributeError, AssertionError)):
        fuzz(place, json_contents({"a": {"b": 1}}), "x.json", lambda folder: read_json(folder / "x.json")["a"]["b"] + 1)
    with pytest.raises((KeyError, TypeError)):
        fuzz(
            place,
            jsonl_contents([{"a": 1}]),
            "x.jsonl",
            lambda folder: [r["a"] + 1 for r in read_jsonl(folder / "x.jsonl")],
        )
