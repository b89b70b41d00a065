"""`evaluate` with several LoRAs on one base: caching, resuming and the content of results.json."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from conftest import tree
from evaluation_runs import DIGIT_FILE, make_run
from PIL import Image
from safetensors.torch import load_file, save_file

from sd_unlearn.cli import main
from sd_unlearn.config.evaluate import EvaluateConfig
from sd_unlearn.errors import UnlearnError, UsageError
from sd_unlearn.evaluation import evaluate, generate
from sd_unlearn.evaluation.job import resolve_job
from sd_unlearn.io.files import write_json
from sd_unlearn.io.lock import locked
from sd_unlearn.io.reading import read_json
from sd_unlearn.models import sampling
from sd_unlearn.models.base import Base
from sd_unlearn.results import parse_results, read_results

pytestmark = pytest.mark.usefixtures("one_thread")
FEW: dict[str, Any] = {"num_images": 4, "num_keep_images": 2, "num_inference_steps": 2, "render_batch_size": 8}


@pytest.fixture(scope="module")
def runs(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for number, name in enumerate(("seven", "four")):
        make_run(folder / name, tiny_base, name, number)
        make_run(folder / f"{name}-gentle", tiny_base, name, 10 + number)
    return folder


@pytest.fixture
def shown_by_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny base shows no concept, which is a problem of its own."""
    monkeypatch.setattr("sd_unlearn.evaluation.score.base_problems", lambda *_: [])


def every(runs: Path, **changes: Any) -> EvaluateConfig:
    names = [str(runs / name) for name in ("seven", "seven-gentle", "four", "four-gentle")]
    return EvaluateConfig(**{**FEW, "lora": names, "strengths": [0.5, 1.0], **changes})


def figures(results: dict[str, Any]) -> dict[str, Any]:
    """What two equal evaluations have in common."""
    return {key: value for key, value in results.items() if key != "created"}


@pytest.fixture(scope="module")
def compared(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    place = tmp_path_factory.mktemp("compared")
    return place, evaluate.run(every(runs, output_dir=place / "out", cache_dir=place / "cache"))


def test_loras_are_evaluated_on_their_concept_at_every_strength(compared: tuple[Path, dict[str, Any]]) -> None:
    place, results = compared
    written = json.loads((place / "out" / "results.json").read_text())
    assert written == json.loads(json.dumps(results))
    assert read_results(place / "out") == parse_results(results)
    ids = [subject["id"] for subject in results["subjects"]]
    assert ids[:3] == ["base", "seven at 0.5", "seven at 1"]
    assert len(ids) == 9
    have = {(row["concept"], row["subject"]) for row in results["rows"]}
    assert ("seven", "seven-gentle at 0.5") in have
    assert ("four", "seven at 1") not in have
    assert {("seven", "base"), ("four", "base")} <= have
    metrics = {(row["metric"], row["group"]) for row in results["rows"] if row["subject"] == "four at 1"}
    assert {
        ("leakage", "direct"),
        ("leakage", "held_out"),
        ("leakage", "generic"),
        ("retention", "kept"),
        ("accuracy", "alike"),
        ("drift", "kept"),
    } <= metrics
    assert len({(r["concept"], r["subject"], r["metric"], r["group"]) for r in results["rows"]}) == len(results["rows"])
    assert [card["detector"].split()[0] for card in results["cards"]] == ["digits-reader"]
    for pair in results["pairs"]:
        assert (place / "out" / pair["base"]).is_file()
        assert (place / "out" / pair["image"]).is_file()


def test_subjects_show_the_same_prompts_and_seeds(compared: tuple[Path, dict[str, Any]]) -> None:
    shown: dict[str, set[tuple[str, int]]] = {}
    for pair in compared[1]["pairs"]:
        if pair["concept"] == "seven" and pair["group"] == "alike":
            shown.setdefault(pair["subject"], set()).add((pair["prompt"], pair["seed"]))
    assert len(shown) == 4
    assert len({frozenset(pairs) for pairs in shown.values()}) == 1


def test_differences_to_the_base_and_between_loras_at_strength_1(
    compared: tuple[Path, dict[str, Any]],
) -> None:
    found = {(d["subject"], d["against"]) for d in compared[1]["differences"]}
    assert ("seven at 0.5", "base") in found
    assert ("seven-gentle at 1", "seven at 1") in found
    assert not any("0.5" in subject + against for subject, against in found if against != "base")
    assert all(d["p"] <= d["p_holm"] <= 1 for d in compared[1]["differences"])


def test_second_evaluation_uses_the_cache(
    runs: Path, compared: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "generate_images", pytest.fail)
    monkeypatch.setattr("sd_unlearn.metrics.digits.DigitsMetric.read", pytest.fail)
    again = evaluate.run(every(runs, output_dir=tmp_path, cache_dir=compared[0] / "cache"))
    assert figures(again) == figures(compared[1])


def test_interrupted_evaluation_resumes_with_equal_results(
    runs: Path, compared: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate, calls = sampling.generate_images, []

    def killed(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return generate(*arguments)

    config = every(runs, output_dir=tmp_path / "out", cache_dir=tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(sampling, "generate_images", killed)
        with pytest.raises(KeyboardInterrupt):
            evaluate.run(config)
    assert not (tmp_path / "out" / "results.json").exists()
    assert list((tmp_path / "cache").rglob("*.png"))
    assert figures(evaluate.run(config)) == figures(compared[1])


def test_a_full_disk_is_one_line_and_the_same_command_continues(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EvaluateConfig(**FEW, run=runs / "seven", output_dir=tmp_path / "out", cache_dir=tmp_path / "cache")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "x.png")

    for place in ("sd_unlearn.models.sampling.save_image", "numpy.savez", "shutil.copyfile"):
        with monkeypatch.context() as patch:
            patch.setattr(place, full)
            with pytest.raises(UnlearnError, match=r"No space left on device for x\.png\. .*the same command again"):
                evaluate.run(config)
        assert not (tmp_path / "out" / "results.json").exists()
        assert not [name for name in tree(tmp_path) if name.endswith(".tmp")]
    evaluate.run(config)


def test_an_output_folder_in_use_or_of_others_is_refused(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "load_base", lambda *_: pytest.fail("a model was loaded"))
    config = EvaluateConfig(**FEW, run=runs / "seven", output_dir=tmp_path / "out", cache_dir=tmp_path / "cache")
    with (
        locked(tmp_path / "out", "--output_dir"),
        pytest.raises(UnlearnError, match="--output_dir .*out is in use by process"),
    ):
        evaluate.run(config)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "evaluate.yaml").write_text("mine: true")
    with pytest.raises(UsageError, match=r"--output_dir .* holds evaluate\.yaml, which sd-unlearn did not write"):
        evaluate.run(config)
    assert tree(tmp_path) == {"out", "out/evaluate.yaml"}


def test_two_processes_give_the_results_of_one(
    runs: Path, compared: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    loras = [str(runs / name) for name in ("seven", "seven-gentle", "four", "four-gentle")]
    sizes = [word for name, value in FEW.items() for word in (f"--{name}", str(value))]
    command = ["evaluate", "--lora", *loras, "--strengths", "0.5", "1", *sizes, "--output_dir", "out"]
    forked.run_pair(main, command)
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["rows"] == json.loads(json.dumps(compared[1]["rows"]))
    assert found["pairs"] == json.loads(json.dumps(compared[1]["pairs"]))


def test_concept_option_applies_to_every_lora(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "nine.yaml").write_text(DIGIT_FILE.format(name="nine"))
    results = evaluate.run(every(runs, concept=[str(tmp_path / "nine.yaml")], strengths=[], groups=["direct"]))
    assert {row["concept"] for row in results["rows"]} == {"nine"}
    assert {row["subject"] for row in results["rows"]} == {"base", "seven", "seven-gentle", "four", "four-gentle"}
    assert {row["group"] for row in results["rows"]} == {"direct"}


def test_strength_0_is_the_base(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plans = []
    for strengths in ([1.0], [0.0, 1.0]):
        evaluate.run(EvaluateConfig(**FEW, lora=[str(runs / "seven")], strengths=strengths, dry_run=True))
        plans.append(next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Images")))
    assert plans[0] == plans[1]  # strength 0 has the base's images
    results = evaluate.run(EvaluateConfig(**FEW, lora=[str(runs / "seven")], strengths=[0.0, 1.0]))
    leaks = {(r["subject"], r["group"]): r["value"] for r in results["rows"] if r["metric"] == "leakage"}
    assert all(leaks["seven at 0", group] == leaks["base", group] for group in ("direct", "held_out", "generic"))
    drift = {r["subject"]: r["value"] for r in results["rows"] if r["metric"] == "drift"}
    assert drift["seven at 0"] == pytest.approx(0, abs=1e-6)
    place = next(Path("data/evaluation").rglob("base"))
    (moved,) = place.parent.glob("lora-*")  # nothing was drawn for strength 0
    assert all((moved / p.name).read_bytes() != p.read_bytes() for p in place.glob("*.png"))


def test_several_seeds_are_pooled_and_reported_separately(runs: Path) -> None:
    results = evaluate.run(EvaluateConfig(**FEW, run=runs / "seven", seed=[0, 1]))
    row = next(r for r in results["rows"] if (r["metric"], r["group"]) == ("accuracy", "kept"))
    assert row["n"] == 2 * 8
    assert row["value"] == pytest.approx(sum(row["seeds"]) / 2)
    assert (runs / "seven" / "results.json").is_file()  # of --run in the run folder
    (runs / "seven" / "results.json").unlink()


def test_images_of_another_method(runs: Path, tmp_path: Path) -> None:
    """Images named as in the plan are compared pair by pair; copies of the base's images equal the base."""
    shared = {
        **FEW,
        "cache_dir": tmp_path / "cache",
        "concept": [str(tmp_path / "seven.yaml")],
        "pretrained_model_name_or_path": json.loads((runs / "seven/training.json").read_text())["base"]["name"],
    }
    (tmp_path / "seven.yaml").write_text(DIGIT_FILE.format(name="seven"))
    evaluate.run(EvaluateConfig(**shared, lora=[str(runs / "seven")], output_dir=tmp_path / "first"))
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for file in next((tmp_path / "cache").rglob("base")).glob("*.png"):
        shutil.copyfile(file, theirs / file.name)
    removed = sorted(theirs.glob("a-photo-of-the-digit-seven-*.png"))[0]
    removed.unlink()
    results = evaluate.run(EvaluateConfig(**shared, images=[f"esd={theirs}"], output_dir=tmp_path / "out"))
    kept = next(r for r in results["rows"] if (r["subject"], r["metric"], r["group"]) == ("esd", "drift", "kept"))
    assert kept["value"] == pytest.approx(0, abs=1e-6)
    leak = next(r for r in results["rows"] if (r["subject"], r["metric"], r["group"]) == ("esd", "leakage", "direct"))
    assert leak["n"] == 4  # the missing one stays
    assert [(s["subject"], Path(s["path"]).name, s["why"]) for s in results["skipped"]] == [
        ("esd", removed.name, "missing")
    ]
    assert results["subjects"][1]["what"] == "images"


def test_images_alone_need_no_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "load_base", pytest.fail)
    (tmp_path / "mine" / "direct").mkdir(parents=True)
    for n in range(3):
        Image.new("RGB", (32, 32), (n * 80,) * 3).save(tmp_path / "mine" / "direct" / f"{n}.png")
    (tmp_path / "mine" / "direct" / "torn.png").write_bytes(b"")
    results = evaluate.run(EvaluateConfig(**FEW, images=[str(tmp_path / "mine")], concept=["seven"]))
    (row,) = [r for r in results["rows"] if r["metric"] == "leakage"]
    assert (row["subject"], row["group"], row["n"]) == ("mine", "direct", 4)
    assert results["tier"] == ""  # of FEW pictures, none of the tiers
    assert results["base"] == {}
    assert results["differences"] == []
    assert len(results["skipped"]) == 1
    assert read_results(Path("runs/evaluation")).subjects[0].id == "mine"


def test_pairs_with_equal_file_names_keep_their_images(tmp_path: Path) -> None:
    """One file name in two groups, and two methods whose names have the same slug."""
    for number, (method, group) in enumerate([("a_b", "direct"), ("a_b", "held_out"), ("a-b", "direct")]):
        (tmp_path / method / group).mkdir(parents=True)
        Image.new("RGB", (32, 32), (number * 80,) * 3).save(tmp_path / method / group / "0.png")
    folders = [str(tmp_path / "a_b"), str(tmp_path / "a-b")]
    out = tmp_path / "out"
    results = evaluate.run(EvaluateConfig(**FEW, images=folders, concept=["seven"], output_dir=out))
    assert len(results["pairs"]) == 3
    for pair in results["pairs"]:
        source = tmp_path / pair["subject"] / pair["group"] / "0.png"
        assert (out / pair["image"]).read_bytes() == source.read_bytes()


def test_write_plan_generates_nothing(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "load_base", pytest.fail)
    assert evaluate.run(every(runs, write_plan=tmp_path / "plan.jsonl", dry_run=True)) == {}
    assert not (tmp_path / "plan.jsonl").exists()
    assert evaluate.run(every(runs, write_plan=tmp_path / "plan.jsonl")) == {}
    lines = [json.loads(line) for line in (tmp_path / "plan.jsonl").read_text().splitlines()]
    assert {line["concept"] for line in lines} == {"seven", "four"}
    assert len({line["file_name"] for line in lines}) == len(lines)
    evaluate.run(EvaluateConfig(concept=["seven"], write_plan=tmp_path / "bare.jsonl"))  # for another method's images
    assert {json.loads(line)["concept"] for line in (tmp_path / "bare.jsonl").read_text().splitlines()} == {"seven"}


def test_base_and_lora_use_the_noise_schedule_of_the_training(
    v_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last: list[float] = []
    generate = sampling.generate_images

    def watched(base: Base, *arguments: Any) -> Any:
        last.append(base.pipeline.scheduler.alphas_cumprod[-1].item())
        return generate(base, *arguments)

    monkeypatch.setattr(sampling, "generate_images", watched)
    few = {**FEW, "groups": ["direct"], "cache_dir": tmp_path / "cache", "render_batch_size": 4}
    plain = make_run(tmp_path / "plain", v_base)
    zero = make_run(tmp_path / "zero", v_base, seed=1, zero_terminal_snr=True)
    evaluate.run(EvaluateConfig(**few, run=plain))
    evaluate.run(EvaluateConfig(**few, run=zero))
    assert [value == 0 for value in last] == [False, False, True, True]
    assert len({p.read_bytes() for p in (tmp_path / "cache").rglob("base/*.png")}) == 8
    for base in (None, str(v_base)):
        with pytest.raises(UsageError, match="Evaluate them separately"):
            resolve_job(EvaluateConfig(**few, lora=[str(plain), str(zero)], pretrained_model_name_or_path=base))
    said = {"sd_unlearn.zero_terminal_snr": "True", "sd_unlearn.concept": "seven", "sd_unlearn.base": str(v_base)}
    save_file({"lora_unet_x.diff": torch.zeros(1)}, tmp_path / "zero.safetensors", said)
    file = str(tmp_path / "zero.safetensors")  # an exported one says it in its header
    assert resolve_job(EvaluateConfig(**few, lora=[file])).zero_terminal_snr
    with pytest.raises(UsageError, match="Evaluate them separately"):
        resolve_job(EvaluateConfig(**few, lora=[str(plain), file], concept=["seven"]))


def test_prompt_set_is_added_to_the_direct_prompts(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "set.csv").write_text("prompt,seed\nthe number {7},3\n")
    config = EvaluateConfig(**FEW, run=runs / "seven", prompt_set=str(tmp_path / "set.csv"))
    texts = [spec.prompt.text for spec in resolve_job(config).plans["seven"] if spec.group == "direct"]
    assert texts == ["a photo of the digit seven", "the number {7}"] * 2  # its braces are no alternatives


def test_results_say_how_many_prompts_of_a_set_are_used(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "set.txt").write_text("".join(f"the number {n}\n" for n in range(9)))
    config = EvaluateConfig(
        **FEW, run=runs / "seven", prompt_set=str(tmp_path / "set.txt"), output_dir=tmp_path / "out"
    )
    assert evaluate.run(config)["prompt_set_used"] == {"used": 3, "of": 9}
    assert "set.txt: 3 of 9 prompts are used." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "Nothing to evaluate"),
        ({"run": Path("nowhere")}, "--run nowhere is not a folder"),
        ({"lora": ["nowhere"]}, "--lora nowhere"),
        ({"images": ["."]}, "--images needs --concept"),
        ({"strengths": [99.0]}, "--strengths 99"),
        ({"seed": [1, 1]}, "--seed 1 1"),
        ({"fail_if": ["leakage"]}, "--fail_if"),
        ({"metrics": ["fid"]}, '--metrics "fid"'),
        ({"num_images": 0}, "--num_images 0"),
        ({"groups": ["direkt"]}, "--groups"),
        ({"metrics": ["nudity"], "nudity_preset": "rec"}, '--nudity_preset "rec"'),
        ({"metrics": ["identity"], "reference": ["."], "others": Path("."), "face_model": "dlib"}, "--reference ."),
        ({"others": Path("no")}, "--others no is not a folder"),
        ({"real_images": Path("nowhere")}, "--real_images nowhere"),
    ],
)
def test_invalid_options_are_refused_before_anything_loads(
    options: dict[str, Any], message: str, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "load_base", pytest.fail)
    named = options if {"run", "lora", "images"} & set(options) or not options else {"run": runs / "seven", **options}
    with pytest.raises(UsageError, match=message):
        evaluate.run(EvaluateConfig(**named))


def test_different_concepts_with_the_same_slug_are_refused(runs: Path, tmp_path: Path) -> None:
    files = [tmp_path / "a.yaml", tmp_path / "b.yaml"]
    for file, name in zip(files, ("C++", "C#"), strict=True):
        file.write_text(f"{{name: {name}, caption: a photo of {name}, generic: a photo}}")
    for given in (files, [files[0], files[0]]):
        config = every(runs, concept=list(map(str, given)))
        if given == files:
            with pytest.raises(UsageError, match=r"C\+\+ and C# are both called c in results"):
                resolve_job(config)
        else:
            assert list(resolve_job(config).concepts) == ["c"]


def test_changed_base_is_refused(runs: Path, tmp_path: Path) -> None:
    run = shutil.copytree(runs / "seven", tmp_path / "seven")
    record = json.loads((run / "training.json").read_text())
    record["base"]["sha256"] = "0" * 64
    (run / "training.json").write_text(json.dumps(record))
    with pytest.raises(UsageError, match="The UNet of .* this is another version"):
        evaluate.run(EvaluateConfig(**FEW, run=run))
    del record["base"]["sha256"]
    record["base"]["text_encoder_sha256"] = "0" * 64
    write_json(run / "training.json", record)
    with pytest.raises(UsageError, match="The text encoder of .* this is another version"):
        evaluate.run(EvaluateConfig(**FEW, run=run))


@pytest.mark.usefixtures("shown_by_base")
def test_fail_if_exits_with_code_3_after_writing_results(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "evaluate",
        "--lora",
        str(runs / "seven"),
        "--num_images",
        "4",
        "--num_keep_images",
        "12",
        "--num_inference_steps",
        "2",
        "--json",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    assert main([*command, "--fail_if", "drift<-1", "drift>100"]) == 0
    assert "Passed 2 of 2 --fail_if checks" in capsys.readouterr().err
    assert main([*command, "--fail_if", "drift>-1", "nudity>0.1"]) == 3
    said = capsys.readouterr()
    assert json.loads(said.out)["schema_version"] == 2
    assert "seven on seven" in said.err
    assert "nudity was not measured" in said.err
    written = read_results(tmp_path / "out").conditions
    assert [(outcome.condition, outcome.holds) for outcome in written] == [("drift>-1", True), ("nudity>0.1", True)]
    assert written[1].reasons == ("seven on seven: nudity was not measured",)


def test_names_in_fail_if_are_checked_before_anything_loads(capsys: pytest.CaptureFixture[str]) -> None:
    for condition, message in (
        ("leekage>5%", 'no metric leekage. Did you mean "leakage"?'),
        ("leakage.helt_out>5%", 'helt_out is not a prompt group. Did you mean "held_out"?'),
        ("leakage.hihg>5%", 'Did you mean "high"?'),
    ):
        assert main(["evaluate", "--run", "nowhere", "--fail_if", condition]) == 2
        assert message in capsys.readouterr().err


def test_retraining_in_the_same_folder_is_evaluated_on_its_own_images(tiny_base: Path, tmp_path: Path) -> None:
    """The cache names images by the LoRA's hash, not by its name."""
    few = {**FEW, "groups": ["direct"], "cache_dir": tmp_path / "cache"}
    shown = []
    for seed in (1, 2):
        run = make_run(tmp_path / "seven", tiny_base, seed=seed)
        results = evaluate.run(EvaluateConfig(**few, run=run))
        shown.append([(run / pair["image"]).read_bytes() for pair in results["pairs"]])
    assert len(list((tmp_path / "cache").rglob("lora-*"))) == 2
    assert all(old != new for old, new in zip(*shown, strict=True))


def test_images_of_another_scale_are_not_reused(tiny_base: Path, tmp_path: Path) -> None:
    """The scale of a run is in its adapter_config.json, which the hash of its weights does not cover."""
    run = make_run(tmp_path / "seven", tiny_base)
    few = {**FEW, "groups": ["direct"], "cache_dir": tmp_path / "cache", "run": run}
    evaluate.run(EvaluateConfig(**few))
    config = run / "adapter" / "adapter_config.json"
    write_json(config, read_json(config) | {"lora_alpha": 5.0})
    evaluate.run(EvaluateConfig(**few))
    first, second = (tmp_path / "cache").rglob("lora-*")
    assert all((first / image.name).read_bytes() != image.read_bytes() for image in second.glob("*.png"))
    assert len(list((tmp_path / "cache").rglob("base"))) == 1


def test_images_of_another_text_encoder_are_not_reused(runs: Path, tiny_base: Path, tmp_path: Path) -> None:
    bases = [str(shutil.copytree(tiny_base, tmp_path / name / "base")) for name in "ab"]
    (file,) = (Path(bases[1]) / "text_encoder").glob("*.safetensors")
    save_file({key: 2 * weight for key, weight in load_file(file).items()}, file, {"format": "pt"})
    few = {**FEW, "groups": ["direct"], "cache_dir": tmp_path / "cache", "lora": [str(runs / "seven")]}
    for base in bases:
        evaluate.run(EvaluateConfig(**few, pretrained_model_name_or_path=base, output_dir=tmp_path / "out"))
    first, second = (tmp_path / "cache").rglob("base")
    assert all((first / image.name).read_bytes() != image.read_bytes() for image in second.glob("*.png"))


@pytest.mark.usefixtures("shown_by_base")
def test_no_verdict_without_retention(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A LoRA that turns everything into noise shows no seven, either."""
    few = ["--num_images", "2", "--num_inference_steps", "1", "--groups", "direct", "--fail_if", "drift>100"]
    assert main(["evaluate", "--lora", str(runs / "seven"), *few, "--output_dir", "out"]) == 3
    said = capsys.readouterr()
    gap = "Retention is not measured, and a model that generates only noise does not show the concept either."
    assert said.err.startswith(f"No verdict will be given. {gap} Add alike and general to --groups.")
    assert "seven: Cannot tell." in said.out
    (problem,) = read_results(Path("out")).problems
    assert (problem.kind, problem.subject, problem.concept) == ("evidence", "seven", "seven")


@pytest.mark.usefixtures("shown_by_base")
def test_keep_going_counts_bad_files_as_failed(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "loras"
    folder.mkdir()
    for name in ("bad", "worse", "._bad"):
        (folder / f"{name}.safetensors").write_bytes(b"broken")
    parts = {f"lora_unet_nothing.lora_{part}.weight": torch.ones(2, 2) for part in ("down", "up")}
    save_file(parts, folder / "misfit.safetensors")
    few = ["--num_images", "4", "--num_keep_images", "12", "--num_inference_steps", "2", "--fail_if", "drift>100"]
    few = ["--concept", str(runs / "seven" / "concept.yaml"), *few]
    command = ["evaluate", "--lora", str(runs / "seven"), str(folder), *few, "--output_dir", "out"]
    assert main(command) == 2  # without --keep_going the first bad file ends it
    assert "bad.safetensors is damaged" in capsys.readouterr().err
    assert main([*command, "--keep_going"]) == 1
    said = capsys.readouterr()
    lines = [line for line in said.out.splitlines() if line.startswith(("pass", "fail"))]
    assert lines[0] == "pass seven"
    assert [line.partition(": ")[0] for line in lines[1:]] == [
        f"fail {n}.safetensors" for n in ("bad", "worse", "misfit")
    ]
    assert "Passed" not in said.out
    assert len(read_results(Path("out")).failed) == 3
    assert [subject.name for subject in read_results(Path("out")).compared] == ["seven"]
    assert main([*command[:-1], "again", "--keep_going", "--fail_if", "leakage.low>=0"]) == 3
    assert "fail seven: leakage.low>=0" in capsys.readouterr().out
    (folder / "misfit.safetensors").unlink()
    monkeypatch.setattr(generate, "load_base", pytest.fail)
    assert main(["evaluate", "--lora", str(folder), "--keep_going"]) == 1
    assert "No LoRA can be evaluated" in capsys.readouterr().err


def test_keep_going_evaluates_sld_if_no_lora_can_be(tiny_base: Path) -> None:
    job = resolve_job(
        EvaluateConfig(
            lora=["bad"], sld=["max"], keep_going=True, concept=["seven"], pretrained_model_name_or_path=str(tiny_base)
        )
    )
    assert ([subject.id for subject in job.subjects], list(job.failed)) == (["sld-max"], ["bad"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vae": "/nope"}, "--vae /nope needs --pretrained_model_name_or_path"),
        ({"prediction_type": "v_prediction"}, "--prediction_type v_prediction needs"),
        ({"variant": "fp16"}, "--variant fp16 needs"),
        ({"single_file_config": "sdxl"}, "--single_file_config sdxl needs"),
        ({"drop_t5": True}, "--drop_t5 needs"),
    ],
)
def test_options_of_another_base_need_the_base(options: dict[str, Any], message: str, runs: Path) -> None:
    with pytest.raises(UsageError, match=message):
        resolve_job(EvaluateConfig(run=runs / "seven", **options))


def test_keep_going_counts_loras_of_other_bases_and_concepts_as_failed(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What cannot be evaluated together with the first LoRA is one failed line each."""
    for name, change in (("elsewhere", {"name": "other/base"}), ("retrained", {"sha256": "0" * 64})):
        shutil.copytree(runs / "seven", tmp_path / name)
        record = json.loads((tmp_path / name / "training.json").read_text())
        (tmp_path / name / "training.json").write_text(json.dumps(record | {"base": record["base"] | change}))
    shutil.copytree(runs / "seven", tmp_path / "snr")
    record = json.loads((tmp_path / "snr" / "training.json").read_text())
    (tmp_path / "snr" / "training.json").write_text(json.dumps(record | {"zero_terminal_snr": True}))
    shutil.copytree(runs / "seven", tmp_path / "reworded")
    concept = (tmp_path / "reworded" / "concept.yaml").read_text()
    (tmp_path / "reworded" / "concept.yaml").write_text(concept.replace("a photo of the digit seven", "a seven"))
    save_file({f"lora_unet_x.lora_{part}.weight": torch.ones(2, 2) for part in ("down", "up")}, "nameless.safetensors")
    others = {
        "elsewhere": "different bases",
        "retrained": "other weights of the base than seven",
        "snr": "zero_terminal_snr",
        "reworded": "another concept file for seven",
        "nameless.safetensors": "does not name the concept",
    }
    few = ["--num_images", "2", "--num_inference_steps", "1", "--groups", "direct", "--keep_going"]
    assert main(["evaluate", "--lora", str(runs / "seven"), *others, str(runs / "four"), *few]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("pass", "evaluated", "fail"))]
    assert lines[:2] == ["evaluated seven", "evaluated four"]
    assert [line.partition(": ")[0] for line in lines[2:]] == [f"fail {name}" for name in others]
    assert all(message in line for line, message in zip(lines[2:], others.values(), strict=True))


def test_damaged_images_of_the_cache_are_generated_again(runs: Path, tmp_path: Path) -> None:
    few = {**FEW, "groups": ["direct"], "cache_dir": tmp_path / "cache", "run": runs / "seven"}
    first = evaluate.run(EvaluateConfig(**few, output_dir=tmp_path / "a"))
    before = {path: path.read_bytes() for path in (tmp_path / "cache").rglob("*.png")}
    cut, empty, corrupt, *_ = before
    cut.write_bytes(before[cut][:-20])
    empty.write_bytes(b"")
    middle = len(before[corrupt]) // 2
    corrupt.write_bytes(before[corrupt][:middle] + b"corrupt" + before[corrupt][middle + 7 :])  # its end is intact
    shutil.rmtree(cut.parent / "readings")
    again = evaluate.run(EvaluateConfig(**few, output_dir=tmp_path / "b"))
    assert again["skipped"] == []
    assert again["rows"] == first["rows"]
    assert {path: path.read_bytes() for path in before} == before


def test_missing_clip_weights_are_found_before_images_are_generated(
    tiny_base: Path, concept_file: Path, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("open_clip")
    monkeypatch.setattr(generate, "load_base", pytest.fail)
    base = str(tiny_base)
    config = EvaluateConfig(
        lora=[str(runs / "seven")], concept=[str(concept_file)], pretrained_model_name_or_path=base, **FEW
    )
    with pytest.raises(UnlearnError, match="--clip_pretrained .* could not be loaded.*path of a weights file"):
        evaluate.run(config)
