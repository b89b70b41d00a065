"""A job list becomes tasks that are addressed by what determines them; everything wrong is refused before any runs."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from batch_runs import plan_of, write_concept_file, write_list
from conftest import tree

from sd_unlearn import cli
from sd_unlearn.batch.identity import _content, images_identity
from sd_unlearn.batch.plan import Plan, missing_tasks
from sd_unlearn.errors import UsageError
from sd_unlearn.models.source import DIGITS_DIR

JOBS = Path("jobs.yaml")


@pytest.fixture
def make(tiny_base: Path, tmp_path: Path) -> Callable[..., Plan]:
    def of(**content: Any) -> Plan:
        return plan_of(write_list(tmp_path / "jobs.yaml", tiny_base, **content))

    return of


def stages(plan: Plan) -> Counter[str]:
    return Counter(task.order.stage for task in plan.tasks.values())


def test_settings_and_grid_are_combined_and_share_rendered_images(make: Callable[..., Plan], tmp_path: Path) -> None:
    concepts = [write_concept_file(tmp_path, name) for name in ("Brad Pitt", "Tom Cruise")]
    settings = [{"name": "short", "max_train_steps": 2}, {"max_train_steps": 3}]
    plan = make(concepts=concepts, settings=settings, grid={"push": [1.0, 2.0], "seed": [0, 1]}, stages=["train"])
    assert stages(plan) == {"render": 2, "train": 16}  # seeds and settings train on the same images
    names = [job.setting for job in plan.lines if job.concept.name == "Brad Pitt"]
    assert names[0] == "short, push 1.0, seed 0"
    assert names[-1] == "max_train_steps 3, push 2.0, seed 1"
    assert not tree(tmp_path / "runs")  # planning writes nothing


def test_no_is_a_precision_in_yaml(make: Callable[..., Plan]) -> None:
    """YAML reads it as false."""
    plan = make(options={"mixed_precision": False}, stages=["evaluate"], evaluate={"mixed_precision": False})
    assert plan.tasks == make(options={"mixed_precision": "no"}, stages=["evaluate"]).tasks


def test_a_stage_brings_the_stages_that_it_needs(make: Callable[..., Plan]) -> None:
    assert list(stages(make(stages=["report"]))) == ["render", "train", "evaluate", "report"]
    assert list(stages(make(stages=["attack"]))) == ["render", "train", "attack"]
    assert list(stages(make(stages=["render"]))) == ["render"]
    everything = make(stages=["report", "export", "attack", "evaluate", "train"])
    for stage in ("report", "export"):  # both show leakage and attacks
        task = everything.tasks[everything.lines[0].tasks[stage]]
        assert {everything.tasks[need].order.stage for need in task.needs} == {"train", "evaluate", "attack"}


def test_an_address_depends_on_what_determines_the_result_only(make: Callable[..., Plan], tmp_path: Path) -> None:
    def ids(**content: Any) -> dict[str, str]:
        tasks: dict[str, str] = dict(make(stages=["train", "evaluate"], **content).lines[0].tasks)
        return tasks

    first = ids()
    assert ids(options={"checkpointing_steps": 1, "train_batch_size": 2}, name="other", workers=7) == first
    same, other = ids(options={"push": 2.5}), ids(options={"push": 3.0})  # 2.5 is the default
    assert same == first
    assert other["render"] == first["render"]
    assert (other["train"], other["evaluate"]) != (first["train"], first["evaluate"])
    evaluated = ids(evaluate={"num_images": 3})
    assert evaluated["train"] == first["train"]
    assert evaluated["evaluate"] != first["evaluate"]
    assert ids(options={"num_keep": 2})["render"] != first["render"]
    edited = tmp_path / "brad-pitt.yaml"
    plan = plan_of(tmp_path / "jobs.yaml")
    edited.write_text(edited.read_text().replace("a photo of a man", "a photo of a boy"))
    assert not set(plan_of(tmp_path / "jobs.yaml").tasks) & set(plan.tasks)


def test_a_base_is_identified_by_its_content(tiny_base: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_base, tmp_path / "copy")
    first = set(plan_of(write_list(JOBS, tiny_base)).tasks)
    assert set(plan_of(write_list(JOBS, copy)).tasks) == first
    other = shutil.copytree(tiny_base, tmp_path / "other")
    weights = other / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\1\2\3\4")
    assert not set(plan_of(write_list(JOBS, other)).tasks) & first
    assert not set(plan_of(write_list(JOBS, DIGITS_DIR)).tasks) & first


def test_own_photos_are_identified_by_their_content(
    make: Callable[..., Plan], photos: Callable[..., Path], tmp_path: Path
) -> None:
    folder = photos(unlabeled=4, positive=4)
    concept = {"name": write_concept_file(tmp_path, "Brad Pitt"), "data_dir": str(folder)}
    plan = make(concepts=[concept])
    assert stages(plan) == {"train": 1}  # nothing is rendered
    (folder / "cache").mkdir()
    (folder / "cache" / "latents.safetensors").write_text("of an earlier training")
    assert set(make(concepts=[concept]).tasks) == set(plan.tasks)


def test_a_folder_below_the_home_folder_is_identified_by_its_content(
    photos: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = photos(unlabeled=1, positive=2)
    monkeypatch.setenv("HOME", str(folder.parent))
    assert images_identity(f"~/{folder.name}") == images_identity(str(folder))
    assert images_identity(f"~/{folder.name}/1_positive") != images_identity(f"~/{folder.name}")


@pytest.mark.parametrize(
    ("stage", "options", "file"),
    [
        ("evaluate", {"prompt_set": "prompts.txt"}, "prompts.txt"),
        ("evaluate", {"others": "photos"}, "photos/a.txt"),
        ("evaluate", {"reference": "photos", "others": "others"}, "photos/a.txt"),
        ("evaluate", {"real_images": "photos"}, "photos/a.txt"),
        ("evaluate", {"classifier": "./weights.pth"}, "weights.pth"),
        ("evaluate", {"clip_pretrained": "weights.bin"}, "weights.bin"),
        ("evaluate", {"face_weights": "weights.onnx", "others": "others"}, "weights.onnx"),
        ("attack", {"others": "photos"}, "photos/a.txt"),
    ],
)
def test_a_stage_is_repeated_when_a_file_that_it_reads_has_changed(
    make: Callable[..., Plan], tmp_path: Path, stage: str, options: dict[str, Any], file: str
) -> None:
    def id_of(content: str) -> str:
        images_identity.cache_clear()  # a command reads each folder once
        _content.cache_clear()
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(content)
        return str(make(stages=[stage], **{stage: options}).lines[0].tasks[stage])

    (tmp_path / "others").mkdir()
    first = id_of("one")
    assert id_of("two") != first
    assert id_of("one") == first


def test_photos_of_one_person_are_not_those_of_another(make: Callable[..., Plan], tmp_path: Path) -> None:
    for name in ("brad", "tom", "others"):
        (tmp_path / name).mkdir()
    concepts = [write_concept_file(tmp_path, name) for name in ("Brad Pitt", "Tom Cruise", "Jane Doe")]
    shared: dict[str, Any] = {"concepts": concepts, "stages": ["evaluate"]}
    with pytest.raises(UsageError, match="--reference brad does not say whose photos"):
        make(**shared, evaluate={"reference": "brad"})
    with pytest.raises(UsageError, match="no concept brad is evaluated"):
        make(**shared, evaluate={"reference": ["brad=brad"]})
    with pytest.raises(UsageError, match="--label man would be the class of all 3 concepts"):
        make(**shared, evaluate={"label": "man"})
    plan = make(**shared, evaluate={"reference": ["brad-pitt=brad", "Tom Cruise=tom"], "others": "others"})
    given = [plan.tasks[job.tasks["evaluate"]].options.get("reference") for job in plan.lines]
    assert given == [[f"brad-pitt={tmp_path}/brad"], [f"tom-cruise={tmp_path}/tom"], None]


def test_concepts_come_from_a_csv_file(make: Callable[..., Plan], tmp_path: Path) -> None:
    table = tmp_path / "people.csv"
    table.write_text('name, anchor, kind\nJane Example, "a woman, smiling", person\nseven,,\n')
    plan = make(concepts=[str(table)])
    assert [job.concept.name for job in plan.lines] == ["Jane Example", "seven"]
    assert plan.lines[0].concept.generic == "a photo of a woman, smiling"
    assert plan.lines[0].concept.kind == "person"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"concept": ["seven"]}, 'unknown key "concept". Did you mean "concepts"?'),
        ({"concepts": []}, "concepts is empty"),
        ({"concepts": ["sevn"]}, 'Did you mean "seven"?'),
        (
            {"concepts": [{"name": "A", "anchr": "b"}]},
            'unknown key "anchr" in concepts[0]. Did you mean "anchor"? Known: anchor, data_dir, kind',
        ),
        ({"concepts": [7]}, "concepts[0] must be text (in quotes), not 7"),
        ({"concepts": ["people.csv"]}, "people.csv: No such file"),
        ({"options": {"rnak": 4}}, 'options: unknown key "rnak". Did you mean "rank"?'),
        ({"options": {"rank": 0}}, "--rank 0 must be above 0"),
        ({"options": {"rank": "four"}}, "rank must be int, not 'four'"),
        ({"options": {"rank": True}}, "rank must be int, not True"),
        ({"options": {"rank": 7.5}}, "rank must be int, not 7.5"),
        ({"stages": ["evaluate"], "evaluate": {"seed": [0, True]}}, "evaluate: seed must be list[int], not [0, True]"),
        ({"options": {"output_dir": "x"}}, "output_dir cannot be set here"),
        ({"grid": {"rank": []}}, "grid: rank has no values"),
        ({"grid": {"rank": [2]}, "settings": [{"rank": 4}]}, "rank is both in settings and in grid"),
        ({"settings": [{"rank": 4}, {"rank": 4}]}, '"rank 4" is there twice'),
        ({"stages": ["trian"]}, "stages[0]"),
        ({"stages": ["evaluate"], "evaluate": {"tier": "huge"}}, "evaluate: tier must be"),
        ({"stages": ["evaluate"], "evaluate": {"metrics": "fidelty"}}, "fidelty"),
        ({"stages": ["evaluate"], "evaluate": {"metrics": "identity"}}, "--metrics identity needs --others"),
        ({"stages": ["evaluate"], "evaluate": {"groups": ["direkt"]}}, 'evaluate: --groups "direkt"'),
        ({"stages": ["evaluate"], "evaluate": {"fail_if": "foo>1"}}, "there is no metric foo"),
        ({"stages": ["evaluate"], "evaluate": {"prompt_set": "none.csv"}}, "--prompt_set none.csv"),
        ({"stages": ["evaluate"], "evaluate": {"others": "none"}}, "--others none is not a folder"),
        ({"stages": ["evaluate"], "evaluate": {"reference": "none"}}, "none is not a folder"),
        ({"stages": ["evaluate"], "evaluate": {"real_images": "none"}}, "--real_images none"),
        ({"stages": ["attack"], "attack": {"attacks": ["sofft"]}}, "sofft"),
        ({"stages": ["attack"], "attack": {"attacker_images": "none"}}, "attack: --attacker_images none"),
        ({"stages": ["attack"], "attack": {"fail_if": ["attack.foo>1"]}}, "foo is not a prompt group"),
        ({"stages": ["attack"], "attack": {"others": "none"}}, "--others none"),
        ({"stages": ["attack"], "attack": {"metrics": "lpips"}}, "--metrics lpips cannot tell"),
        ({"stages": ["attack"], "attack": {"real_images": "."}}, "attack: --real_images . is for"),
        ({"stages": ["attack"], "attack": {"floor": "./none"}}, "attack: --floor ./none"),
        ({"stages": ["export"], "export": {"push_to_hub": "me/it"}}, "push_to_hub cannot be set here"),
        ({"stages": ["export"], "export": {"strength": 0.5}}, "export: --strength 0.5 is for --merge"),
        ({"stages": ["export"], "export": {"merge": "x.ckpt"}}, "export: --merge x.ckpt: a pickle can run code"),
        ({"stages": ["export"], "export": {"merge": "x/.."}}, "export: --merge x/.. names no file or folder"),
        (
            {"stages": ["export"], "export": {"pretrained_model_name_or_path": "x"}},
            "export: --pretrained_model_name_or_path x is for merge and DoRA",
        ),
        ({"stages": ["export"], "grid": {"use_dora": [True], "train_text_encoder": [True]}}, "Add merge to export"),
        ({"workers": 0}, "workers"),
        ({"ray": {"num_gpu": 1}}, 'unknown key "num_gpu" in ray. Did you mean "num_gpus"?'),
    ],
)
def test_mistakes_are_refused_before_anything_runs(
    make: Callable[..., Plan], tmp_path: Path, content: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError) as error:
        make(**content)
    assert message in str(error.value)
    assert not tree(tmp_path / "runs")


def test_a_whole_network_is_exported_as_a_checkpoint(make: Callable[..., Plan]) -> None:
    shared: dict[str, Any] = {"stages": ["export"], "options": {"method": "full", "rank": 8}}
    with pytest.raises(UsageError, match="export: --method full cannot be exported as LoRA files. Add merge"):
        make(**shared)
    plan = make(**shared, export={"merge": "whole.safetensors"})
    assert Path(plan.tasks[plan.lines[0].tasks["export"]].order.product).name == "whole.safetensors"


def test_a_list_may_be_of_people_and_of_other_concepts(make: Callable[..., Plan], tmp_path: Path) -> None:
    """Options of the metric identity apply to people only; in a list without people, they are refused."""
    person, stages = write_concept_file(tmp_path, "Brad Pitt"), ["evaluate", "attack"]
    (tmp_path / "people").mkdir()
    both = {"evaluate": {"others": "people"}, "attack": {"others": "people"}}
    plan = make(concepts=[person, "seven"], stages=stages, **both)
    given = {(t.concept.name, t.order.stage): "others" in t.options for t in plan.tasks.values()}
    assert {key for key, has_others in given.items() if has_others} == {("Brad Pitt", stage) for stage in stages}
    with pytest.raises(UsageError, match="--others people is for --metrics identity"):
        make(concepts=["seven"], stages=stages, **both)


def test_a_csv_file_with_a_mistake_names_the_line(make: Callable[..., Plan], tmp_path: Path) -> None:
    table = tmp_path / "people.csv"
    for text, message in (
        ("name,anhcor\nA,b\n", 'unknown key "anhcor". Did you mean "anchor"?'),
        ("name,anchor\nA,b\nC,d,e\n", "line 3 has more than the 2 columns of the first line"),
        ('name,anchor\nA,"b\n', "is not valid CSV after line 1"),
        ("name,kind\nA,planet\n", "line 2: kind"),
        ("name,anchor\n", "lists no concept"),
    ):
        table.write_text(text)
        with pytest.raises(UsageError) as error:
            make(concepts=[str(table)])
        assert message in str(error.value)


def test_images_are_rendered_again_only_for_a_training(make: Callable[..., Plan]) -> None:
    plan = make(stages=["train"])
    done = {task: task.startswith("train") for task in plan.tasks}
    assert missing_tasks(plan, done) == []  # the data folder was deleted after the training
    assert [t.order.stage for t in missing_tasks(plan, dict.fromkeys(plan.tasks, False))] == ["render", "train"]
    wanted = make(stages=["render", "train"])
    assert [task.order.stage for task in missing_tasks(wanted, done)] == ["render"]


def test_an_edit_in_closed_form_needs_no_images_except_to_recognize_a_person(
    make: Callable[..., Plan], tmp_path: Path
) -> None:
    (tmp_path / "people").mkdir()

    def planned(stages: list[str], **evaluate: Any) -> list[str]:
        return list(make(stages=stages, options={"objective": "uce"}, evaluate=evaluate).lines[0].tasks)

    assert planned(["train", "export"]) == ["train", "export"]
    assert planned(["render", "train"]) == ["render", "train"]
    assert planned(["evaluate"]) == ["train", "evaluate"]
    assert planned(["evaluate"], others="people") == ["render", "train", "evaluate"]
    assert planned(["evaluate"], others="people", reference="people") == ["train", "evaluate"]


def test_a_dry_run_lists_the_tasks_and_writes_nothing(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_list(tmp_path / "jobs.yaml", tiny_base, grid={"push": [1.0, 2.0]})
    before = tree(tmp_path)
    assert cli.main(["batch", str(path), "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "missing     train Brad Pitt (push 2.0)" in out
    assert "3 tasks of 2 jobs: 3 missing." in out
    assert tree(tmp_path) == before
    assert cli.main(["batch", str(path), "--address", "auto"]) == 2
    assert cli.main(["batch", str(tmp_path / "missing.yaml")]) == 2
    assert cli.main(["batch"]) == 2
