"""Names, shapes and headers of the exported LoRA files, and errors. The runs are made by hand, without training."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from export_runs import MODULES, SLUG, evaluation, exported, hand_run, read_header, training_record
from safetensors.torch import load_file

from sd_unlearn.config.base import ExportConfig
from sd_unlearn.data.concept import Concept
from sd_unlearn.data.several import write_concepts
from sd_unlearn.errors import UnlearnError, UsageError
from sd_unlearn.export import export, write
from sd_unlearn.io.files import write_json
from sd_unlearn.io.lock import host_id, locked
from sd_unlearn.io.run_folder import DIFFUSERS_FILE


def payload(file: Path) -> bytes:
    data = file.read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]


def test_names_shapes_and_alpha_of_the_kohya_file(tmp_path: Path) -> None:
    _, file = exported(hand_run(tmp_path / "run"))
    assert file == tmp_path / "run" / "export" / f"{SLUG}.safetensors"
    tensors = load_file(file)
    linear = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0"
    conv = "lora_unet_up_blocks_1_resnets_0_conv1"
    assert {key: tuple(value.shape) for key, value in tensors.items()} == {
        f"{linear}.lora_down.weight": (2, 6),
        f"{linear}.lora_up.weight": (5, 2),
        f"{linear}.alpha": (),
        f"{conv}.lora_down.weight": (2, 3, 3, 3),
        f"{conv}.lora_up.weight": (4, 2, 1, 1),
        f"{conv}.alpha": (),
    }
    assert {value.item() for key, value in tensors.items() if key.endswith(".alpha")} == {3.0}
    assert {value.dtype for value in tensors.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("kind", "prediction_type", "architecture", "version", "v2", "prediction"),
    [
        ("sd1", "epsilon", "stable-diffusion-v1/lora", "sd_v1", "False", "epsilon"),
        ("sd2", "epsilon", "stable-diffusion-v2-512/lora", "sd_v2", "True", "epsilon"),
        ("sd2", "v_prediction", "stable-diffusion-v2-768-v/lora", "sd_v2_v", "True", "v"),
        ("sdxl", "epsilon", "stable-diffusion-xl-v1-base/lora", "sdxl_base_v1-0", "False", "epsilon"),
    ],
)
def test_header_names_architecture_prediction_type_and_hash(
    tmp_path: Path, kind: str, prediction_type: str, architecture: str, version: str, v2: str, prediction: str
) -> None:
    record = training_record(2, 3.0, kind=kind, prediction_type=prediction_type)
    _, file = exported(hand_run(tmp_path, training=record))
    header, digest = read_header(file), hashlib.sha256(payload(file)).hexdigest()
    want = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture,
        "modelspec.prediction_type": prediction,
        "modelspec.resolution": "16x16",
        "modelspec.hash_sha256": f"0x{digest}",
        "sshs_model_hash": digest,
        "ss_base_model_version": version,
        "ss_v2": v2,
        "ss_network_module": "networks.lora",
        "ss_network_dim": "2",
        "ss_network_alpha": "3.0",
        "ss_output_name": SLUG,
    }
    assert {key: header.get(key) for key in want} == want
    assert header["modelspec.title"]
    assert header["modelspec.implementation"]
    assert "lora_adapter_metadata" not in header, "Diffusers refuses alpha keys together with it"
    assert "modelspec.date" not in header, (
        "the date is unknown, and the current date would change the file at every export"
    )


def test_the_header_names_the_text_encoder_of_the_base(tmp_path: Path) -> None:
    for file in exported(hand_run(tmp_path, training=training_record(2, 3.0, text_encoder_sha256="cd" * 32))):
        assert read_header(file)["sd_unlearn.base_text_encoder_sha256"] == "cd" * 32


def test_both_headers_hold_the_training_settings(tmp_path: Path) -> None:
    for file in exported(hand_run(tmp_path)):
        header = read_header(file)
        ours = {key.removeprefix("sd_unlearn."): header[key] for key in header if key.startswith("sd_unlearn.")}
        assert len(ours.pop("prompts_sha256")) == 64
        assert ours == {
            "concept": "Brad Pitt",
            "base": "tiny",
            "base_sha256": "ab" * 32,
            "rank": "2",
            "lora_alpha": "3.0",
            "beta": "0.25",
            "beta_source": "manifest",
            "correction": "abs",
            "caption_mode": "both",
            "version": "0.1.0",
            "config_sha256": "cd" * 32,
        }
        assert all(isinstance(value, str) for value in header.values())
        assert int.from_bytes(file.read_bytes()[:8], "little") < 1024 * 1024


def test_header_says_dynamic_if_ranks_differ(tmp_path: Path) -> None:
    conv = f"base_model.model.{MODULES[1]}.lora_"
    wider = {f"{conv}A.weight": torch.ones(3, 3, 3, 3), f"{conv}B.weight": torch.ones(4, 3, 1, 1)}
    _, file = exported(hand_run(tmp_path, tensors=wider, rank_pattern={"conv1": 3}))
    header, tensors = read_header(file), load_file(file)
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("Dynamic", "Dynamic")
    assert not [key for key in tensors if key.endswith(".alpha")]
    assert torch.equal(tensors["lora_unet_up_blocks_1_resnets_0_conv1.lora_up.weight"], torch.ones(4, 3, 1, 1))


@pytest.mark.parametrize("place", ["/home/somebody/models/tiny", "../somebody/tiny", "somebody/tiny.safetensors"])
def test_date_is_that_of_the_training_and_local_paths_stay_private(tmp_path: Path, place: str) -> None:
    record = training_record(2, 3.0, name=place) | {"created": "2026-11-22T10:00:00+00:00"}
    _, file = exported(hand_run(tmp_path, training=record))
    assert read_header(file)["modelspec.date"] == "2026-11-22T10:00:00+00:00"
    assert read_header(file)["sd_unlearn.base"] == Path(place).name
    written = [path.read_bytes() for path in (tmp_path / "export").iterdir()]
    assert not [data for data in written if b"somebody" in data]


def leakage_rows() -> list[dict[str, Any]]:
    shared = {"metric": "leakage", "group": "direct", "value": 0.01, "n": 200, "detector": "reader"}
    return [shared | {"subject": subject} for subject in ("base", "mine")]


def test_header_holds_results_of_this_adapter_only(tmp_path: Path) -> None:
    run = hand_run(tmp_path)
    results = evaluation(run, leakage_rows())
    write_json(run / "results.json", results)
    content = json.loads(read_header(exported(run)[1])["sd_unlearn.results"])
    rows = content.pop("rows")
    shared = {"sampler": results["sampler"], "seeds": results["seeds"]}
    assert content == {"detector": "reader", "problems": [], **shared}
    expected = leakage_rows()[1] | {"concept": SLUG, "subject": "lora"}
    assert [{key: row[key] for key in expected} for row in rows] == [expected]
    results["subjects"][1]["sha256"] = "00" * 32
    write_json(run / "results.json", results)
    assert "sd_unlearn.results" not in read_header(exported(run)[1])


def test_header_does_not_hold_results_on_another_base(tmp_path: Path) -> None:
    run = hand_run(tmp_path)
    own = training_record(2, 3.0)["base"]
    for base, is_own in (
        (own, True),
        (own | {"vae_sha256": "11" * 32}, True),  # training.json does not hold the VAE's hash
        (own | {"sha256": "11" * 32}, False),
    ):
        write_json(run / "results.json", evaluation(run, [], base=base))
        assert ("sd_unlearn.results" in read_header(exported(run)[1])) == is_own
    write_json(run / "training.json", training_record(2, 3.0, vae_sha256="22" * 32))
    write_json(run / "results.json", evaluation(run, [], base=own | {"vae_sha256": "11" * 32}))
    assert "sd_unlearn.results" not in read_header(exported(run)[1])


def test_exporting_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    run = hand_run(tmp_path / "run")
    first = [file.read_bytes() for file in exported(run)]
    again = [file.read_bytes() for file in exported(run)]
    elsewhere = [file.read_bytes() for file in exported(run, output_dir=tmp_path / "deep" / "folder")]
    assert first == again == elsewhere
    assert sorted(file.name for file in (run / "export").iterdir()) == [
        "README.md",
        f"{SLUG}.safetensors",
        "comfyui-workflow.json",
        DIFFUSERS_FILE,
    ]


# ---- errors ----


@pytest.mark.parametrize(
    ("gone", "names"),
    [
        ("training.json", "training.json"),
        ("concept.yaml", "concept.yaml"),
        ("adapter/adapter_config.json", "adapter_config.json"),
        ("adapter/adapter_model.safetensors", "adapter_model.safetensors"),
    ],
)
def test_a_missing_file_is_named(tmp_path: Path, gone: str, names: str) -> None:
    run = hand_run(tmp_path)
    (run / gone).unlink()
    with pytest.raises(UsageError, match=f"--run .*{names}"):
        exported(run)
    assert not (run / "export").exists()


def test_a_missing_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--run is missing"):
        export.run(ExportConfig())
    with pytest.raises(UsageError, match="--run .*nowhere does not exist"):
        exported(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"training": training_record(2, 3.0, kind="ddpm")}, UnlearnError, '"ddpm"'),
        ({"training": training_record(4, 3.0)}, UnlearnError, "mixes two trainings.*rank is 4 .*but 2"),
        ({"training": training_record(2, 2.0)}, UnlearnError, "mixes two trainings.*lora_alpha is 2.0"),
        ({"training": {"rank": 2}}, UsageError, '"base"'),
        ({"training": {"base": {"kind": "sd1", "name": "x"}, "rank": 2}}, UsageError, '"sha256" in base'),
        ({"training": {"base": {"kind": "sd1", "name": "x", "sha256": ""}, "rank": 2}}, UsageError, '"lora_alpha"'),
        (
            {"training": training_record(2, 3.0) | {"base": []}},
            UsageError,
            "training.json: base must hold keys .*--overwrite",
        ),
        ({"training": training_record(2, 3.0, kind=["sd1"])}, UsageError, "base.kind must be text"),
        ({"training": training_record(2, 3.0, unet={})}, UsageError, '"layers_per_block" in base.unet'),
        ({"use_dora": True}, UnlearnError, "DoRA"),
        ({"lora_bias": True}, UnlearnError, "lora_bias"),
        ({"bias": "all"}, UnlearnError, 'bias is "all"'),
        ({"peft_type": "LOHA"}, UnlearnError, "LOHA"),
        ({"r": None}, UsageError, "adapter_config.json: r must be .*Train the run again"),
        ({"rank_pattern": {"conv1": [2]}}, UsageError, "rank_pattern.conv1 must be"),
        ({"r": 3, "training": training_record(3, 3.0)}, UnlearnError, "rank 2.*say 3"),
        ({"drop": "conv1.lora_B"}, UnlearnError, "conv1 has only lora_A"),
        ({"drop": "lora"}, UsageError, "not a LoRA"),
        ({"tensors": {"base_model.model.x.lora_magnitude_vector": torch.ones(2)}}, UnlearnError, "magnitude_vector"),
        ({"tensors": {"base_model.model.x.lora_A.weight": torch.full((2, 3), torch.nan)}}, UnlearnError, "NaN"),
    ],
)
def test_an_unsupported_or_damaged_run_is_refused_with_its_reason(
    tmp_path: Path, change: dict[str, Any], error: type[UnlearnError], says: str
) -> None:
    run = hand_run(tmp_path, **change)
    with pytest.raises(error, match=says) as caught:
        exported(run)
    assert caught.type is error
    assert "\n" not in str(caught.value)
    assert not (run / "export").exists()


def test_an_unreadable_adapter_is_named(tmp_path: Path) -> None:
    run = hand_run(tmp_path)
    file = run / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UnlearnError, match=r"adapter_model\.safetensors is damaged"):
        exported(run)


@pytest.mark.parametrize("file", ["training.json", "adapter/adapter_config.json", "results.json"])
@pytest.mark.parametrize("content", ["{}", "[]", "null", "{", '"text"', '{"base": {"a": [1]}, "rows": 3}'])
def test_a_damaged_json_file_is_named_in_one_line(tmp_path: Path, file: str, content: str) -> None:
    run = hand_run(tmp_path)
    (run / file).write_text(content)
    with pytest.raises(UsageError, match=Path(file).name) as caught:
        exported(run)
    assert "\n" not in str(caught.value)


def test_an_oversized_header_is_refused(tmp_path: Path) -> None:
    run = hand_run(tmp_path)
    long = Concept(name="x" * 1024 * 1024, caption="a", generic="b")
    write_concepts(run / "concept.yaml", long)
    with pytest.raises(UnlearnError, match="header would take"):
        exported(run)


def test_an_output_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    run = hand_run(tmp_path / "run")
    (tmp_path / "file").write_text("not a folder")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UnlearnError, match="--output_dir .* cannot be written"):
            exported(run, output_dir=place)
    (tmp_path / "taken" / f"{SLUG}.safetensors").mkdir(parents=True)
    with pytest.raises(UnlearnError, match="is a folder"):
        exported(run, output_dir=tmp_path / "taken")
    assert [file.name for file in (tmp_path / "taken").iterdir()] == [f"{SLUG}.safetensors"]


@pytest.mark.parametrize("name", ["README.md", DIFFUSERS_FILE, f"{SLUG}.safetensors"])
def test_files_of_others_are_not_replaced(tmp_path: Path, name: str) -> None:
    """Nor are those of another concept's export, which have the same names."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_bytes(b"somebody's own")
    with pytest.raises(UsageError, match=f"{name} already exists.*--output_dir"):
        exported(hand_run(tmp_path / "run"), output_dir=tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == {name: b"somebody's own"}


def test_a_changed_card_is_not_replaced_and_a_missing_one_is_written_again(tmp_path: Path) -> None:
    run, card = hand_run(tmp_path), tmp_path / "export" / "README.md"
    exported(run)
    written = card.read_bytes()
    card.write_bytes(written + b"my notes\n")
    with pytest.raises(UsageError, match=r"README\.md was changed since it was exported.*--output_dir"):
        exported(run)
    assert card.read_bytes() == written + b"my notes\n"
    card.unlink()
    exported(run)
    assert card.read_bytes() == written
    for file in card.parent.glob("*.safetensors"):  # moved to where they are used
        file.unlink()
    exported(run)


def test_a_second_concept_does_not_replace_the_export_of_the_first(tmp_path: Path) -> None:
    exported(hand_run(tmp_path / "one"), output_dir=tmp_path / "out")
    write_concepts(hand_run(tmp_path / "two") / "concept.yaml", Concept("Angelina", "a photo of Angelina", "a woman"))
    with pytest.raises(UsageError, match="not an export of .Angelina."):
        exported(tmp_path / "two", output_dir=tmp_path / "out")
    exported(tmp_path / "one", output_dir=tmp_path / "out")


def test_files_follow_the_umask_and_leftovers_of_killed_exports_are_removed(tmp_path: Path) -> None:
    run, process = hand_run(tmp_path), subprocess.Popen(["true"])
    process.wait()
    (run / "export").mkdir()
    for name in (f"{SLUG}.safetensors", "thesis.txt"):
        (run / "export" / f".{name}.{process.pid}@{host_id()}.tmp").write_text("half")
    exported(run)
    names = {
        f"{SLUG}.safetensors",
        DIFFUSERS_FILE,
        "README.md",
        "comfyui-workflow.json",
        f".thesis.txt.{process.pid}@{host_id()}.tmp",
    }
    assert {path.name for path in (run / "export").iterdir()} == names
    (tmp_path / "new").touch()
    assert {path.stat().st_mode for path in (run / "export").iterdir()} == {(tmp_path / "new").stat().st_mode}


def test_a_picture_of_others_is_not_replaced_and_a_folder_in_use_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = hand_run(tmp_path)
    (run / "export").mkdir()
    (run / "export" / "pairs.png").write_text("mine")
    with pytest.raises(UsageError, match=r"pairs\.png already exists"):
        exported(run)
    (run / "export" / "pairs.png").unlink()
    monkeypatch.setattr(write, "WAIT", 0.1)
    with (
        locked(run / "export", "--output_dir"),
        pytest.raises(UnlearnError, match="--output_dir .* is in use by process"),
    ):
        exported(run)


def test_a_full_disk_leaves_the_earlier_export_intact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = hand_run(tmp_path)
    exported(run)
    before = {file: file.read_bytes() for file in (run / "export").iterdir()}
    hand_run(run, training=training_record(2, 3.0) | {"beta": 0.5})
    write = Path.write_bytes

    def full_disk(path: Path, data: bytes) -> int:
        if SLUG not in path.name:
            return write(path, data)
        write(path, data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(UnlearnError, match="No space left"):
        exported(run)
    assert {file: file.read_bytes() for file in (run / "export").iterdir()} == before
