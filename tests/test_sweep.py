"""A sweep scales beta and push, trains and evaluates each run once, and resumes after a kill."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import tree

from sd_unlearn import cli, sweep
from sd_unlearn.config.checks import check_train
from sd_unlearn.config.evaluate import EvaluateConfig
from sd_unlearn.config.train import TrainConfig
from sd_unlearn.data.concept import Concept
from sd_unlearn.data.several import write_concepts
from sd_unlearn.errors import UsageError
from sd_unlearn.evaluation import evaluate
from sd_unlearn.io.files import write_json
from sd_unlearn.io.reading import read_json
from sd_unlearn.io.run_folder import weights_sha256
from sd_unlearn.models.sampling import BASE_SAMPLERS, Sampler
from sd_unlearn.report.sweep_record import Point
from sd_unlearn.training import trainer

Make = Callable[..., TrainConfig]


@pytest.fixture
def make(tiny_base: Path, concept_file: Path) -> Make:
    def of(sweep: str = "0.5,1,2", **changes: Any) -> TrainConfig:
        options = {"concept": str(concept_file), "pretrained_model_name_or_path": str(tiny_base), "report_to": "none"}
        return TrainConfig(**(options | {"beta_sweep": sweep} | changes))

    return of


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Replaces training and evaluation: records their configs and writes the files that mark them as done."""
    calls: list[tuple[str, Any]] = []

    monkeypatch.setattr(sweep, "find_metrics", lambda context: [])

    def train(config: TrainConfig, concept: Concept) -> Path:
        check_train(config)
        calls.append(("train", config))
        place = config.output_dir or Path()
        (place / "adapter").mkdir(parents=True, exist_ok=True)
        (place / "adapter/adapter_model.safetensors").write_text(f"{config.beta} {config.push}")
        write_concepts(place / "concept.yaml", concept)
        write_json(place / "training.json", {"beta": config.beta})
        return place

    def measure(config: EvaluateConfig) -> dict[str, Any]:
        calls.append(("evaluate", config))
        place = config.run or Path()
        rows = [
            {
                "concept": "brad-pitt",
                "metric": m,
                "group": g,
                "subject": s,
                "value": 0.5,
                "n": 10,
                "low": 0.4,
                "high": 0.6,
            }
            for m, g, s in (
                ("leakage", "direct", "base"),
                ("leakage", "direct", "lora"),
                ("retention", "kept", "lora"),
                ("fid-digits", "alike", "lora"),
            )
        ]
        results = {
            "schema_version": 2,
            "base": {"name": "tiny"},
            "concepts": [
                {"slug": "brad-pitt", "name": "Brad Pitt", "caption": "a photo of Brad Pitt", "generic": "a photo"}
            ],
            "subjects": [
                {"id": "base", "name": "tiny", "what": "base"},
                {"id": "lora", "name": place.name, "what": "lora", "sha256": weights_sha256(place)},
            ],
            "rows": rows,
        }
        write_json(place / "results.json", results)
        return results

    monkeypatch.setattr(trainer, "run", train)
    monkeypatch.setattr(evaluate, "run", measure)
    return calls


def names(calls: list[tuple[str, Any]]) -> list[str]:
    return [f"{verb} {(c.output_dir if verb == 'train' else c.run).name}" for verb, c in calls]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is not a number"),
        ("0.5,,1", "is not a number"),
        ("0.5;1", '"0.5;1" is not a number'),
        ("1,half", '"half" is not a number'),
        ("0,1", "0 must be a number above 0"),
        ("-1", "above 0"),
        ("nan", "above 0"),
        ("1,inf", "above 0"),
        ("0.5,1,0.50", "0.5 is given twice"),
        ("1,5", "5 times beta 0.3 (option) is 1.5"),
        ("1,2.5", None),
    ],
)
def test_invalid_factors_are_refused_and_nothing_is_written(
    done: list[Any], capsys: pytest.CaptureFixture[str], tiny_base: Path, concept_file: Path, text: str, expected: str
) -> None:
    options = ["--pretrained_model_name_or_path", str(tiny_base), "--report_to", "none", "--beta", "0.3"]
    before = tree(Path())
    code = cli.main(["train", "--concept", str(concept_file), *options, f"--beta_sweep={text}"])
    out, err = capsys.readouterr()
    if expected is None:
        assert (code, out) == (0, "runs/brad-pitt-sweep/sweep.html\n")
        return
    assert (code, done, tree(Path())) == (2, [], before)
    assert "--beta_sweep" in err
    assert expected in err


def test_factors_scale_beta_and_with_a_teacher_the_push() -> None:
    taught = sweep.scale([0.5, 1, 3], 0.1, 2.0, "teacher", "known")
    assert taught == [Point(0.5, 0.05, 1.0), Point(1, 0.1, 2.0), Point(3, 0.3, 6.0)]
    assert [p.push for p in sweep.scale([0.5, 3], 0.1, 2.0, "noise", "known")] == [2.0, 2.0]
    with pytest.raises(UsageError, match=r"2 times beta 0.5 \(known\) is 1, .* below 2"):
        sweep.scale([1, 2], 0.5, 2.0, "noise", "known")


def test_beta_is_determined_before_anything_is_rendered(
    make: Make, concept: Concept, photos: Callable[..., Path]
) -> None:
    assert sweep.beta_of(make(beta=0.3), concept, Path("data")) == (0.3, "option")
    assert sweep.beta_of(make(), concept, Path("data")) == (0.2, "known")  # 1 hidden of 5
    assert sweep.beta_of(make(num_unlabeled=1), concept, Path("data")) == (0.5, "known")
    assert sweep.beta_of(make(num_mixed_in=0), concept, Path("data")) == (0.1, "assumed")
    assert sweep.beta_of(make(), concept, photos()) == (0.1, "assumed")
    several = dataclasses.replace(concept, betas={"1_positive": 0.25, "1_positive_2": 0.125})
    assert sweep.beta_of(make(), several, Path("data")) == (0.375, "concept")
    assert sweep.beta_of(make(beta=0.3), several, Path("data")) == (0.3, "option")
    line = '{"file_name": "0.png", "text": "", "group": "%s"}\n'
    write_json(Path("data/manifest.json"), {})
    Path("data/0_unlabeled").mkdir()
    Path("data/0_unlabeled/metadata.jsonl").write_text("".join(line % g for g in ("mixed_in", "generic", "keep")))
    assert sweep.beta_of(make(), concept, Path("data")) == (0.5, "known")
    shown = dataclasses.replace(concept, generic_share=0.2)
    assert sweep.beta_of(make(), shown, Path("data")) == (0.6, "known")


def test_each_factor_is_trained_and_evaluated_and_the_record_is_written_last(
    make: Make, done: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    order, rename = [], Path.replace

    def watched(self: Path, target: Path) -> Path:
        order.append(Path(target).name)
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    page = sweep.run(make(output_dir=Path("out"), learning_rate=0.125))
    folders = ["factor-0.5", "factor-1", "factor-2"]
    assert names(done) == [f"{verb} {f}" for verb in ("train", "evaluate") for f in folders]
    configs = [c for verb, c in done if verb == "train"]
    scaled = [(c.beta, c.push, c.learning_rate) for c in configs]
    assert scaled == [(0.1, 1.25, 0.125), (0.2, 2.5, 0.125), (0.4, 5, 0.125)]
    assert all((c.beta_sweep, c.data_dir, c.overwrite) == (None, Path("data/brad-pitt"), False) for c in configs)
    assert [c for verb, c in done if verb == "evaluate"] == [EvaluateConfig(run=Path("out") / f) for f in folders]
    assert page == Path("out/sweep.html")
    assert order[-4:] == ["sweep.csv", "sweep.md", "sweep.html", "sweep.json"]
    record = read_json(Path("out/sweep.json"))
    assert (record["schema_version"], record["factors"], record["beta"], record["push"]) == (1, [0.5, 1, 2], 0.2, 2.5)
    assert [(r["folder"], r["beta"], r["push"]) for r in record["runs"]][0] == ("factor-0.5", 0.1, 1.25)
    assert {row["metric"] for run in record["runs"] for row in run["rows"]} == {"leakage", "retention"}
    assert record["runs"][0]["rows"][1]["high"] == 0.6


def test_a_run_that_was_also_evaluated_at_other_strengths(make: Make, done: list[Any]) -> None:
    page = sweep.run(make("1,2"))
    results = page.parent / "factor-1" / "results.json"
    found = read_json(results)
    full = found["subjects"][1]
    found["subjects"][1:] = [{**full, "id": "lora-0", "strength": 0.0}, {**full, "strength": 1.0}]
    found["rows"] += [{**row, "subject": "lora-0", "value": 1.0} for row in found["rows"] if row["subject"] == "lora"]
    write_json(results, found)
    done.clear()
    sweep.run(make("1,2"))
    assert done == []
    rows = read_json(page.parent / "sweep.json")["runs"][0]["rows"]
    assert {row["value"] for row in rows if row["subject"] == "lora"} == {0.5}


def test_results_of_another_concept_are_not_taken_and_of_other_settings_refused(make: Make, done: list[Any]) -> None:
    page = sweep.run(make("1,2"))
    results = page.parent / "factor-1" / "results.json"
    found = read_json(results)
    done.clear()
    other = {**found, "concepts": [{**found["concepts"][0], "slug": "eight"}]}
    write_json(results, {**other, "rows": [{**row, "concept": "eight"} for row in found["rows"]]})
    sweep.run(make("1,2"))
    assert names(done) == ["evaluate factor-1"]
    write_json(results, {**found, "sampler": {"steps": 5}})
    with pytest.raises(UsageError, match="factor-2 was evaluated with another sampler than .*delete its results.json"):
        sweep.run(make("1,2"))


def test_a_killed_sweep_resumes(make: Make, done: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    train, config = trainer.run, make(output_dir=Path("out"))

    def killed(asked: TrainConfig, concept: Concept) -> Path:
        if asked.output_dir and asked.output_dir.name == "factor-1":
            write_concepts(asked.output_dir / "concept.yaml", concept)
            raise KeyboardInterrupt
        return train(asked, concept)

    monkeypatch.setattr(trainer, "run", killed)
    with pytest.raises(KeyboardInterrupt, match=r"Finished factors are kept\."):
        sweep.run(config)
    assert not Path("out/sweep.json").exists()
    monkeypatch.setattr(trainer, "run", train)
    done.clear()
    sweep.run(config)
    evaluated = [f"evaluate factor-{x}" for x in ("0.5", "1", "2")]
    assert names(done) == ["train factor-1", "train factor-2", *evaluated]
    # The interrupted run resumes from its checkpoints, the other one starts.
    assert [c.resume_from_checkpoint for _, c in done[:2]] == ["latest", None]
    done.clear()
    sweep.run(make("0.5,1,2,4", output_dir=Path("out"), resume_from_checkpoint="latest", force_resume=True))
    assert names(done) == ["train factor-4", "evaluate factor-4"]
    done.clear()
    Path("out/factor-1/adapter/adapter_model.safetensors").write_text("another")
    sweep.run(config)
    assert names(done) == ["evaluate factor-1"]


def test_an_incomplete_run_folder_is_started_again(make: Make, done: list[Any]) -> None:
    sweep.run(make("1", output_dir=Path("out")))
    for path in ("training.json", "concept.yaml"):
        Path("out/factor-1", path).unlink()
    done.clear()
    sweep.run(make("1", output_dir=Path("out")))
    assert names(done) == ["train factor-1"]  # its results are of the same weights, so they stay
    assert done[0][1].resume_from_checkpoint is None


def test_a_sweep_with_other_settings_is_refused(make: Make, done: list[Any]) -> None:
    sweep.run(make("1", output_dir=Path("out")))
    for changes, match in (({"rank": 4}, "--rank 8, but this one has 4"), ({"beta": 0.3}, "--beta 0.2, but .* 0.3")):
        with pytest.raises(UsageError, match=match):
            sweep.run(make("1", output_dir=Path("out"), **changes))
    done.clear()
    sweep.run(make("2", output_dir=Path("out"), rank=4, overwrite=True))
    assert names(done) == ["train factor-2", "evaluate factor-2"]
    assert not Path("out/factor-1").exists()


def test_a_sweep_of_another_concept_or_other_images_is_refused(
    make: Make,
    done: list[Any],
    concept_file: Path,
    photos: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sweep.run(make("1", output_dir=Path("out")))
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "seed_in", lambda folder: 7)
        with pytest.raises(UsageError, match="generated with another --seed"):
            sweep.run(make("2", output_dir=Path("out")))
    written = concept_file.read_text()
    concept_file.write_text(written.replace("a photo of Brad Pitt]", "a painting of Brad Pitt]"))
    with pytest.raises(UsageError, match="of another concept, or its file has changed"):
        sweep.run(make("2", output_dir=Path("out")))
    concept_file.write_text(written)

    for option in ("data_dir", "positives"):
        folder = photos(unlabeled=12, positive=8, folder=option)
        own = {option: folder if option == "data_dir" else folder / "1_positive", "output_dir": Path(f"out-{option}")}
        own |= {"beta": 0.1, "effective_batch_size": 8}
        sweep.run(make("1", **own))
        (folder / "1_positive" / "0.png").write_bytes((folder / "1_positive" / "1.png").read_bytes())
        with pytest.raises(UsageError, match="on other images of your own"):
            sweep.run(make("2", **own))
    assert [name for name in names(done) if name.endswith("factor-2")] == []


@pytest.mark.parametrize(
    ("change", "different"),
    [
        ({"prompt_set": "i2p"}, "prompt set"),
        ({"concepts": [{"slug": "brad-pitt", "name": "B", "caption": "a", "generic": "b", "sha256": "2"}]}, "concept"),
        ({"sampler": {"steps": 5}}, "sampler"),
        ({"rows": "held_out"}, "number of images or group"),
    ],
)
def test_runs_that_were_evaluated_in_other_ways_are_not_compared(
    make: Make, done: list[Any], change: dict[str, Any], different: str
) -> None:
    page = sweep.run(make("1,2"))
    results = page.parent / "factor-1" / "results.json"
    found = read_json(results)
    if group := change.get("rows"):
        change = {"rows": [*found["rows"], {**found["rows"][0], "group": group}]}
    write_json(results, found | change)
    with pytest.raises(UsageError, match=f"factor-2 was evaluated with another {different}"):
        sweep.run(make("1,2"))


def test_a_dry_run_shows_the_factors_and_checks_them(
    tiny_base: Path, concept_file: Path, done: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--pretrained_model_name_or_path", str(tiny_base), "--report_to", "none", "--dry_run"]
    before = tree(Path())
    train = ["train", "--concept", str(concept_file), *options]
    assert cli.main([*train, "--beta_sweep", "0.5,1"]) == 0
    said = capsys.readouterr().out
    assert "2 trainings into runs/brad-pitt-sweep" in said
    assert "factor 0.5, beta 0.1, push 1.25" in said
    assert said.count("Plan: erase") == 1
    assert cli.main([*train, "--beta_sweep", "0.5,much"]) == 2
    assert (done, tree(Path())) == ([], before)


def test_a_sweep_evaluates_with_the_options_that_the_training_needed(
    make: Make, done: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "choose_precision", lambda given: given or "no")
    sweep.run(make("1", offload=True, mixed_precision="fp16", render_batch_size=2))
    [config] = [config for verb, config in done if verb == "evaluate"]
    assert (config.offload, config.mixed_precision, config.render_batch_size) == (True, "fp16", 2)


@pytest.mark.parametrize("overwrite", [False, True])
def test_another_kind_of_folder_is_refused(make: Make, done: list[Any], overwrite: bool) -> None:
    Path("out").mkdir()
    Path("out/config.yaml").write_text("concept: seven\n")
    with pytest.raises(UsageError, match="--output_dir out is not an sd-unlearn sweep folder"):
        sweep.run(make(output_dir=Path("out"), overwrite=overwrite))
    assert (done, tree(Path("out"))) == ([], {"config.yaml"})


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_of_the_user_with_the_name_of_the_report_stays(make: Make, done: list[Any], overwrite: bool) -> None:
    sweep.run(make(output_dir=Path("out")))
    done.clear()
    Path("out/sweep.md").write_text("my notes\n")
    with pytest.raises(UsageError, match=r"--output_dir out holds sweep\.md, which sd-unlearn did not write"):
        sweep.run(make(output_dir=Path("out"), overwrite=overwrite))
    assert (done, Path("out/sweep.md").read_text()) == ([], "my notes\n")


def test_settings_of_a_sweep_without_runs_do_not_bind_the_next(
    make: Make, done: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> Path:
        raise UsageError("no")

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "run", refuse)
        with pytest.raises(UsageError, match="no"):
            sweep.run(make(output_dir=Path("out")))
    sweep.run(make(output_dir=Path("out"), rank=4))
    assert len(done) == 6


def test_options_that_a_sweep_does_not_support_are_refused(
    make: Make, done: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="--resume_from_checkpoint there belongs to a single run"):
        sweep.run(make(resume_from_checkpoint="there"))
    with pytest.raises(UsageError, match="--beta estimate"):
        sweep.run(make(beta="estimate"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match=r"--beta_sweep runs as one process, not 2.*--beta and --push"):
        sweep.run(make())
    assert (done, Path("runs").exists()) == ([], False)


def test_a_sweep_of_the_bundled_base(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A real sweep, with too few images and steps for meaningful metrics."""
    monkeypatch.setitem(BASE_SAMPLERS, "digits", Sampler(3, 3.0, 100))
    monkeypatch.setattr(sweep, "EvaluateConfig", functools.partial(EvaluateConfig, num_images=2, num_keep_images=1))
    few = "--num_unlabeled 6 --num_positive 4 --num_keep 1 --max_train_steps 2 --validation_steps 0"
    options = [*few.split(), "--effective_batch_size", "8", "--learning_rate", "0.01", "--report_to", "none"]
    code = cli.main(["train", "--concept", "seven", "--beta_sweep", "0.5,2", *options])
    out, err = capsys.readouterr()
    assert (code, out) == (0, "runs/seven-sweep/sweep.html\n")
    assert err.count("rendering it first") == 1
    record = json.loads(Path("runs/seven-sweep/sweep.json").read_text())
    shas = [run["adapter_sha256"] for run in record["runs"]]
    assert len(set(shas)) == 2
    for run in record["runs"]:
        place = Path("runs/seven-sweep", run["folder"])
        training = read_json(place / "training.json")
        assert (training["beta"], training["push"]) == (run["beta"], run["push"])
        assert {r["metric"] for r in run["rows"]} == {"leakage", "clean_replacement", "retention", "drift"}
    page = Path("runs/seven-sweep/sweep.html").read_text(encoding="utf-8")
    shown = [path for p in record["pictures"] for path in (p["base"], *(shot["image"] for shot in p["shots"]))]
    assert {p["group"] for p in record["pictures"]} == {"direct", "held_out", "alike", "general"}
    assert all(Path("runs/seven-sweep", path).is_file() for path in shown)
    assert page.count("<img ") == len(shown)
    assert page.count("<circle") == 2
