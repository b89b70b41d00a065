"""`sd-unlearn attack` from the command line to results.json."""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from attack_cases import SMALL
from evaluation_runs import make_run
from PIL import Image

from sd_unlearn.attacks import noise_prediction
from sd_unlearn.attacks import runner as command
from sd_unlearn.attacks.registry import ATTACKS
from sd_unlearn.cli import main
from sd_unlearn.io.files import write_json
from sd_unlearn.io.reading import read_json
from sd_unlearn.launch import heartbeat
from sd_unlearn.results import read_results

FLAGS = ["--num_inference_steps", "2", "--render_batch_size", "8"]


@pytest.fixture(scope="module")
def made(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("made") / "seven", tiny_base)


@pytest.fixture
def run(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder, with budgets that take no time."""
    small = {
        name: dataclasses.replace(attack, budgets=dict.fromkeys(attack.budgets, SMALL[name]))
        for name, attack in ATTACKS.items()
    }
    monkeypatch.setattr(command, "ATTACKS", small)
    return shutil.copytree(made, tmp_path / "runs" / "seven")


def attack(run: Path, *flags: str) -> int:
    return main(["attack", "--run", str(run), *FLAGS, *flags])


def entries(run: Path) -> dict[tuple[str, str], dict[str, Any]]:
    return {(e["subject"], e["attack"]): e for e in read_json(run / "results.json")["attacks"]}


def test_results_hold_every_try_with_ceiling_and_interval(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert attack(run, "--attacks", "finetune", "noise") == 0
    results = read_results(run)
    rows = {(row.subject, row.group): row for row in results.rows if row.metric == "attack"}
    assert set(rows) == {(s, a) for s in ("base", "seven") for a in ("finetune", "noise")}
    for (subject, name), entry in entries(run).items():
        row = rows[subject, name]
        assert row.value == max(one["value"] for one in entry["tries"])
        assert row.low is not None
        assert row.high is not None
        assert row.low <= row.value <= row.high
        assert row.n == 2
        assert row.concept == "seven"
        assert all((run / image).is_file() for image in entry["images"])
    assert [one["step"] for one in entries(run)["seven", "finetune"]["tries"]] == [1, 2]
    out = capsys.readouterr().out
    assert "finetune" in out
    assert "from the base" in out


def test_what_was_done_is_not_done_again(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert attack(run, "--attacks", "strength") == 0
    first = (run / "results.json").read_text()

    def fail(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(command, "carry_out", fail)
    assert attack(run, "--attacks", "strength") == 0
    assert json.loads(first)["attacks"] == read_json(run / "results.json")["attacks"]
    assert attack(run, "--attacks", "strength", "--seed", "1") == 1  # other seeds are other attacks


def test_an_interrupted_attack_resumes(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = command.carry_out, list[str]()

    def interrupted(task: Any, target: Any) -> None:
        calls.append(task.attack.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        original(task, target)

    monkeypatch.setattr(command, "carry_out", interrupted)
    assert attack(run, "--attacks", "noise", "strength", "--no_ceiling") == 130
    assert not (run / "results.json").exists()
    assert attack(run, "--attacks", "noise", "strength", "--no_ceiling") == 0
    assert calls == ["noise", "strength", "strength"]


def out_of_memory(*_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_an_attack_that_runs_out_of_memory_does_not_end_the_others(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(noise_prediction, "noise_loss", out_of_memory)
        assert attack(run, "--attacks", "soft", "strength", "--no_ceiling") == 1
        printed = capsys.readouterr()
        assert "strength" in printed.out
        assert "Failed: the attack soft on seven. Out of memory while computing the gradients" in printed.err
        assert "Error: 1 attack failed: soft on seven. Out of memory" in printed.err
        assert set(entries(run)) == {("seven", "strength")}
        [failed] = read_results(run).failed_attacks
        assert (failed.concept, failed.subject, failed.attack) == ("seven", "seven", "soft")
        assert attack(run, "--attacks", "soft", "--no_ceiling", "--fail_if", "attack.soft>0.5") == 3
        assert not list(Path().rglob("*.failed"))
    assert attack(run, "--attacks", "soft", "--no_ceiling") == 0
    assert set(entries(run)) == {("seven", "strength"), ("seven", "soft")}
    assert not read_results(run).failed_attacks


def test_an_attack_fails_with_any_of_its_restarts(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the others found may be less than what the attack can find."""
    original = command.carry_out

    def fails_again(task: Any, target: Any) -> None:
        original(task, target) if task.restart == 0 else out_of_memory()

    settings = dataclasses.replace(SMALL["token"], restarts=2)
    token = dataclasses.replace(ATTACKS["token"], budgets={"quick": settings})
    monkeypatch.setattr(command, "ATTACKS", {**command.ATTACKS, "token": token})
    monkeypatch.setattr(command, "carry_out", fails_again)
    assert attack(run, "--attacks", "token", "noise", "--no_ceiling") == 1
    assert set(entries(run)) == {("seven", "noise")}


def test_any_other_error_ends_the_command(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(command, "carry_out", fails)
    assert attack(run, "--attacks", "soft", "noise") == 1
    assert not (run / "results.json").exists()


def test_the_first_process_reports_what_failed_in_another(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--attacks", "strength", "soft", "--no_ceiling"]
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with monkeypatch.context() as patch:
        patch.setattr(noise_prediction, "noise_loss", out_of_memory)
        assert attack(run, *flags) == 0
    monkeypatch.setenv("RANK", "0")
    assert attack(run, *flags) == 1
    assert set(entries(run)) == {("seven", "strength")}
    assert [failed.attack for failed in read_results(run).failed_attacks] == ["soft"]


def test_the_first_process_waits_as_long_as_another_works(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One attack may take longer than the time after which a silent process counts as stopped."""
    flags, original, alive = ["--attacks", "noise", "strength", "--no_ceiling"], command.carry_out, list[Path]()

    def watched(task: Any, target: Any) -> None:
        alive.extend(Path().rglob("process-*.alive"))
        original(task, target)

    monkeypatch.setattr(command, "carry_out", watched)
    monkeypatch.setattr(command, "TIMEOUT", 2.0)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert attack(run, *flags) == 0
    [beats] = alive
    assert beats.name == "process-1.alive"
    assert not beats.exists()
    [done] = Path().rglob("strength-*/restart-0")
    aside = done.rename(done.with_name("aside"))

    def work() -> None:
        with heartbeat(beats, every=0.1):
            time.sleep(6)
            aside.rename(done)

    other = threading.Thread(target=work)
    monkeypatch.setenv("RANK", "0")
    other.start()
    try:
        assert attack(run, *flags) == 0
    finally:
        other.join()
    assert set(entries(run)) == {("seven", "noise"), ("seven", "strength")}
    done.rename(aside)
    assert attack(run, *flags) == 1  # a process that has stopped


def test_evaluate_and_attack_add_to_the_same_results(run: Path) -> None:
    evaluate = ["evaluate", "--run", str(run), *FLAGS, "--num_images", "2", "--num_keep_images", "1"]
    assert attack(run, "--attacks", "noise") == 0
    assert main(evaluate) == 0
    assert attack(run, "--attacks", "strength") == 0
    metrics = {(row["metric"], row["group"]) for row in read_json(run / "results.json")["rows"]}
    assert {("attack", "noise"), ("attack", "strength"), ("leakage", "direct")} <= metrics
    assert main(["report", "--run", str(run)]) == 0


def test_attacks_belong_to_the_lora_at_strength_1_whatever_its_name(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Evaluated at several strengths it is called "seven at 1"."""
    evaluate = ["evaluate", "--run", str(run), *FLAGS, "--num_images", "1", "--num_keep_images", "1"]
    assert attack(run, "--attacks", "noise") == 0
    assert main([*evaluate, "--strengths", "0.5", "1"]) == 0
    assert set(entries(run)) == {("base", "noise"), ("seven at 1", "noise")}
    assert attack(run, "--attacks", "completion") == 0
    assert {subject for subject, _ in entries(run)} == {"base", "seven at 1"}
    assert [subject.id for subject in read_results(run).compared] == ["seven at 0.5", "seven at 1"]
    assert main(["report", "--run", str(run)]) == 0
    assert main(evaluate) == 0
    assert set(entries(run)) == {(s, a) for s in ("base", "seven") for a in ("noise", "completion")}
    rows = [row for row in read_results(run).rows if row.metric == "attack"]
    assert {(row.subject, row.group) for row in rows} == set(entries(run))
    assert main([*evaluate, "--strengths", "0.5"]) == 0
    capsys.readouterr()
    assert attack(run, "--attacks", "noise") == 2
    assert "no results of seven with its present weights at strength 1" in capsys.readouterr().err


def test_a_lora_with_two_names_is_attacked_once(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(run, run.parent / "again")
    both = ["--lora", str(run), str(run.parent / "again"), "--output_dir", "both", *FLAGS]
    assert main(["attack", *both, "--attacks", "strength", "--no_ceiling"]) == 0
    assert set(entries(Path("both"))) == {("seven", "strength"), ("again", "strength")}
    few = ["--num_images", "1", "--groups", "direct", "--strengths", "0.5", "1"]
    assert main(["evaluate", "--lora", str(run), "--output_dir", "both", *FLAGS, *few]) == 0
    assert set(entries(Path("both"))) == {("seven at 1", "strength")}
    assert main(["attack", *both, "--attacks", "noise", "--no_ceiling"]) == 0
    assert set(entries(Path("both"))) == {("seven at 1", "strength"), ("seven at 1", "noise")}


def test_attacks_on_other_weights_are_dropped(run: Path, tiny_base: Path) -> None:
    assert attack(run, "--attacks", "strength") == 0
    make_run(run, tiny_base, seed=1)
    assert attack(run, "--attacks", "strength") == 2  # results.json is of other weights
    evaluate = ["evaluate", "--run", str(run), *FLAGS, "--num_images", "2", "--num_keep_images", "1"]
    assert main(evaluate) == 0
    assert read_json(run / "results.json")["attacks"] == []


def add_retention(run: Path, subject: str = "seven", value: float | None = 1.0) -> None:
    """As if an evaluation had found that the LoRA keeps the base's abilities."""
    results = read_json(run / "results.json")
    row = {"metric": "retention", "group": "kept", "subject": subject, "value": value, "n": 100, "concept": "seven"}
    results["rows"] = [old for old in results["rows"] if old["metric"] != "retention"] + [row]
    write_json(run / "results.json", results)


def test_conditions_on_attacks(run: Path) -> None:
    assert attack(run, "--attacks", "strength") == 0
    add_retention(run)
    assert attack(run, "--attacks", "strength", "--fail_if", "attack.strength>=0") == 3
    assert attack(run, "--attacks", "strength", "--fail_if", "attack.strength>=1") == 0
    assert attack(run, "--attacks", "strength", "--fail_if", "attack.soft>0.5") == 3  # not measured
    assert attack(run, "--attacks", "strength", "--fail_if", "attack.sift>0.5") == 2


def test_no_condition_on_attacks_passes_without_retention(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A LoRA that generates only noise resists every attack."""
    assert attack(run, "--attacks", "strength", "--fail_if", "attack.strength>=1") == 3
    said = capsys.readouterr().err
    assert "seven on seven: cannot tell, because retention is not known" in said
    assert "Run sd-unlearn evaluate first." in said
    add_retention(run, value=None)
    assert attack(run, "--attacks", "strength", "--fail_if", "attack.strength>=1") == 3


@pytest.mark.parametrize("fault", ["flat", "unreadable", "missing"])
def test_attack_images_that_show_nothing_are_a_problem(
    run: Path, fault: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = command.carry_out

    def broken(task: Any, target: Any) -> None:
        original(task, target)
        file = task.folder / "00-0000.png"
        if fault == "flat":
            Image.new("RGB", (32, 32)).save(file)
        elif fault == "unreadable":
            file.write_bytes(b"x")
        else:
            file.unlink()

    monkeypatch.setattr(command, "carry_out", broken)
    assert attack(run, "--attacks", "completion") == 0
    assert "No verdict will be given on seven. Of 3 images of the attack completion 1" in capsys.readouterr().err
    add_retention(run)
    assert attack(run, "--attacks", "completion", "--fail_if", "attack.completion>=1") == 3
    assert "cannot tell for seven on seven: Of 3 images of the attack completion" in capsys.readouterr().err
    monkeypatch.setattr(command, "carry_out", original)
    assert attack(run, "--attacks", "noise") == 0  # the problem is kept with its attack
    [problem] = read_results(run).problems  # and none is of the base
    assert (problem.subject, problem.kind, problem.group, problem.share) == ("seven", fault, "completion", 1 / 3)
    evaluate = ["evaluate", "--run", str(run), *FLAGS, "--num_images", "1", "--num_keep_images", "1"]
    assert main([*evaluate, "--strengths", "0.5", "1", "--fail_if", "attack.noise>=1"]) == 3
    of_attacks = [problem for problem in read_results(run).problems if problem.group == "completion"]
    assert [problem.subject for problem in of_attacks] == ["seven at 1"]
    for folder in run.parent.parent.rglob("completion-*"):
        shutil.rmtree(folder)
    assert attack(run, "--attacks", "completion") == 0
    assert "completion" not in [problem.group for problem in read_results(run).problems]


def test_the_conditions_of_the_evaluation_are_kept(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They do not decide the exit code of the attack, which has its own."""
    for problems in ("base_problems", "retention_problems"):  # the tiny base shows no concept, and few images are made
        monkeypatch.setattr(f"sd_unlearn.evaluation.score.{problems}", lambda *_: [])
    evaluate = ["evaluate", "--run", str(run), *FLAGS, "--num_images", "1", "--num_keep_images", "1"]
    assert main([*evaluate, "--fail_if", "leakage>=0", "drift>100"]) == 3
    of_evaluation = read_results(run).conditions
    assert attack(run, "--attacks", "noise") == 0
    assert read_results(run).conditions == of_evaluation
    assert attack(run, "--attacks", "noise", "--fail_if", "attack.noise>=0", "drift>100") == 3
    assert "attack.noise>=0" in capsys.readouterr().err
    found = {outcome.condition: outcome.holds for outcome in read_results(run).conditions}
    assert found == {"leakage>=0": True, "drift>100": False, "attack.noise>=0": True}
    assert attack(run, "--attacks", "noise", "--fail_if", "drift>100") == 0
    assert "Passed 1 of 1" in capsys.readouterr().out


def test_a_lora_that_an_evaluation_left_out_does_not_fail_the_attack(run: Path) -> None:
    Path("bad.safetensors").write_bytes(b"bad")
    few = ["--num_images", "1", "--groups", "direct"]
    output = ["--output_dir", "both", *FLAGS]
    assert main(["evaluate", "--lora", str(run), "bad.safetensors", *few, *output, "--keep_going"]) == 1
    assert main(["attack", "--lora", str(run), *output, "--attacks", "strength", "--no_ceiling"]) == 0
    assert len(read_results(Path("both")).failed) == 1


def test_the_floor_is_attacked_too(run: Path, v_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert attack(run, "--attacks", "noise", "finetune", "--floor", str(v_base)) == 0
    assert {subject for subject, _ in entries(run)} == {"base", "floor", "seven"}
    results = read_results(run)
    assert [subject.id for subject in results.compared] == ["seven"]
    add_retention(run)
    assert attack(run, "--attacks", "noise", "--floor", str(v_base), "--fail_if", "attack.noise>=1") == 0
    assert main(["report", "--run", str(run)]) == 0
    assert attack(run, "--attacks", "noise", "--floor", "nowhere.safetensors") == 2


def test_floors_are_not_mixed_up(run: Path, v_base: Path, tiny_base: Path) -> None:
    assert attack(run, "--attacks", "noise", "--floor", str(v_base)) == 0
    assert attack(run, "--attacks", "strength", "quantisation", "--floor", str(tiny_base)) == 0
    assert {name for subject, name in entries(run) if subject == "floor"} == {"quantisation"}
    [floor] = [s for s in read_json(run / "results.json")["subjects"] if s["id"] == "floor"]
    assert floor["name"] == tiny_base.name
    evaluate = ["evaluate", "--run", str(run), *FLAGS, "--num_images", "2", "--num_keep_images", "1"]
    assert main(evaluate) == 0
    assert {subject for subject, _ in entries(run)} == {"base", "floor", "seven"}
    assert floor in read_json(run / "results.json")["subjects"]


def test_the_floor_is_attacked_with_the_images_of_the_base(
    run: Path, v_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So what was done to it as a base of its own, with its own images, is not reused."""
    attacked, original = list[str](), command.carry_out

    def watched(task: Any, target: Any) -> None:
        attacked.append(task.model.id)
        original(task, target)

    monkeypatch.setattr(command, "carry_out", watched)
    alone = ["--concept", str(run / "concept.yaml"), "--pretrained_model_name_or_path", str(v_base), *FLAGS]
    assert main(["attack", *alone, "--attacks", "finetune", "--output_dir", "alone"]) == 0
    assert attack(run, "--attacks", "finetune", "--floor", str(v_base), "--no_ceiling") == 0
    assert attacked == ["base", "floor", "seven"]


def test_attacks_are_not_added_to_images_of_other_settings(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert attack(run, "--attacks", "strength") == 0
    before = (run / "results.json").read_text()
    assert attack(run, "--attacks", "noise", "--guidance_scale", "2") == 2
    assert "guidance_scale" in capsys.readouterr().err
    assert (run / "results.json").read_text() == before


def test_attacks_are_not_added_to_results_of_another_threshold(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused before the first attack: both would stand under one card."""
    assert attack(run, "--attacks", "strength") == 0
    results = read_json(run / "results.json")
    results["cards"][0]["threshold"] = "score >= 0.45"
    write_json(run / "results.json", results)
    monkeypatch.setattr(command, "carry_out", pytest.fail)
    assert attack(run, "--attacks", "noise") == 2
    assert "another threshold of digits-reader" in capsys.readouterr().err


def test_an_evaluation_with_other_settings_leaves_attacks_out_and_says_so(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert attack(run, "--attacks", "strength", "--no_ceiling") == 0
    few = ["--num_images", "1", "--groups", "direct", "--num_inference_steps", "3"]
    assert main(["evaluate", "--run", str(run), *few]) == 0
    results = read_json(run / "results.json")
    assert results["attacks"] == [row for row in results["rows"] if row["metric"] == "attack"] == []
    assert "earlier attacks with steps 2 (now 3) (strength on seven). Repeat them" in capsys.readouterr().err


def test_another_concept_is_added(run: Path, tiny_base: Path) -> None:
    text = (run / "concept.yaml").read_text().replace("seven", "three")
    Path("three.yaml").write_text(text)
    for concept in (str(run / "concept.yaml"), "three.yaml"):
        alone = ["--concept", concept, "--pretrained_model_name_or_path", str(tiny_base), *FLAGS]
        assert main(["attack", *alone, "--attacks", "noise", "--output_dir", "both"]) == 0
    found = read_json(Path("both/results.json"))
    assert [concept["slug"] for concept in found["concepts"]] == ["seven", "three"]
    assert [entry["concept"] for entry in found["attacks"]] == ["three", "seven"]


def test_images_that_the_attacker_brings(run: Path, photos: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder = photos() / "1_positive"
    assert attack(run, "--attacks", "inversion", "--no_ceiling", "--attacker_images", str(folder)) == 0
    assert attack(run, "--attacks", "inversion", "--attacker_images", "nowhere") == 2
    assert "--attacker_images nowhere is not a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--attacks", "sofft"], "--attacks sofft is not one of"),
        (["--budget", "huge"], "--budget"),
        (["--metrics", "lpips"], "--metrics lpips cannot tell"),
        (["--real_images", "."], "--real_images . is for --metrics fidelity or cmmd, which attack does not run"),
        (["--metrics", "digits", "fidelity", "--inception_weights", "w.pth"], "--inception_weights w.pth is for"),
        (["--seed", "-1"], "--seed"),
    ],
)
def test_errors(run: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert attack(run, *flags) == 2
    assert message in capsys.readouterr().err


def test_nothing_to_attack(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["attack"]) == 2
    assert "Nothing" in capsys.readouterr().err


def test_a_base_can_be_attacked_without_a_lora(
    run: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "of-base"
    command = ["attack", "--concept", str(run / "concept.yaml"), "--pretrained_model_name_or_path", str(tiny_base)]
    assert main([*command, "--attacks", "noise", *FLAGS, "--output_dir", str(output)]) == 0
    assert set(entries(output)) == {("base", "noise")}
    assert "noise" in capsys.readouterr().out
    assert main([*command, "--attacks", "noise", *FLAGS, "--no_ceiling"]) == 2  # neither base, floor nor LoRA
    assert main(["attack", *FLAGS]) == 2
