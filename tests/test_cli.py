"""The command line: exit codes, names, errors of one line before anything loads, and no files left behind."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import tree
from rich.console import Console

from sd_unlearn import __version__, cli, commands, sweep
from sd_unlearn.config.base import RenderConfig
from sd_unlearn.config.train import TrainConfig
from sd_unlearn.data import render
from sd_unlearn.io.noise import SHOW
from sd_unlearn.paper import commands as paper
from sd_unlearn.training import trainer

Run = Callable[..., SimpleNamespace]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """run("train", "--beta", "2") -> code, out, err; a refusal is one line, a failure ends with one."""

    monkeypatch.setenv("COLUMNS", "160")  # the width of the help
    monkeypatch.setenv(SHOW, "")  # --debug sets it

    def call(*arguments: str) -> SimpleNamespace:
        capsys.readouterr()
        code = cli.main(list(arguments))
        out, err = capsys.readouterr()
        if code in (1, 2):
            before, last = err.splitlines()[:-1], err.splitlines()[-1]
            assert last.startswith("Error: ")
            assert not any(line.startswith(("Error", "Traceback")) for line in before)
            assert "bug in sd-unlearn" not in last
            assert not before or code == 1
            assert out == ""
        return SimpleNamespace(code=code, out=out, err=err)

    return call


@pytest.fixture
def configs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[TrainConfig | RenderConfig]]:
    """Commands only record their configs."""
    notes: list[TrainConfig | RenderConfig] = []
    for module in (trainer, render):
        monkeypatch.setattr(module, "run", lambda config: notes.append(config) or Path("done"))
    return notes  # type: ignore[return-value]


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test if a model is loaded."""

    def load(*_: object) -> None:
        pytest.fail("a model was loaded")

    for module in (trainer, render):
        monkeypatch.setattr(module, "load_base", load)


# -- help, names, values --


def test_help_and_version(run: Run) -> None:
    for arguments in (["--help"], [], ["-h"]):
        found = run(*arguments)
        assert found.code == 0
        assert all(command in found.out for command in ("render", "train", "evaluate", "export", "report"))


def test_version_lists_the_packages_that_matter(run: Run) -> None:
    lines = run("--version").out.splitlines()
    assert lines[0] == f"sd-unlearn {__version__}"
    assert lines[1:] == [f"{package} {version(package)}" for package in ("torch", "diffusers", "peft")]


def test_python_m_sd_unlearn_is_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["sd-unlearn", "rendr"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("sd_unlearn", run_name="__main__")
    assert caught.value.code == 2


@pytest.mark.parametrize("command", list(commands.COMMANDS))
def test_help_all_shows_every_option(run: Run, command: str) -> None:
    found = run(command, "--help_all")
    assert found.code == 0
    for name in commands.COMMANDS[command].__dataclass_fields__:
        assert re.search(rf"--{name}\b", found.out)


@pytest.mark.parametrize(
    ("command", "first"),
    [
        ("train", ("mixed_precision", "dry_run", "resume_from_checkpoint", "overwrite")),
        ("render", ("mixed_precision", "dry_run")),
        ("evaluate", ("mixed_precision", "dry_run", "others", "reference", "fail_if")),
    ],
)
def test_help_shows_the_first_group_only(run: Run, command: str, first: Sequence[str]) -> None:
    short, everything = run(command, "--help").out, run(command, "--help-all").out
    assert re.findall(r"─ ([A-Z][\w ]+) ─", short) == ["Start here"]
    assert "--help_all" in short
    assert "--help_all" not in everything
    assert len(short.splitlines()) < 40
    assert len(short.splitlines()) < len(everything.splitlines())
    for name in ("concept", "pretrained_model_name_or_path"):
        assert re.search(rf"--{name}\b", short)
    for name in first:
        assert re.search(rf"--{name}\b", short)
    assert "--seed" not in short
    assert "--seed" in everything


@pytest.mark.parametrize("command", ["", "batch", "concepts"])
def test_examples_in_the_help_are_indented_alike(run: Run, command: str) -> None:
    examples = re.findall(r"^( *)sd-unlearn \w.*  \w", run(*command.split(), "--help").out, re.MULTILINE)
    assert len(examples) >= 3
    assert set(examples) == {"  "}


@pytest.mark.parametrize("command", [*commands.COMMANDS, *(f"paper {name}" for name in paper.COMMANDS)])
def test_help_in_a_narrow_terminal_breaks_no_option_name(
    run: Run, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr(commands.app, "_console", Console(width=80))
    text = run(*command.split(), "--help_all").out
    for name in (commands.COMMANDS | paper.COMMANDS)[command.split()[-1]].__dataclass_fields__:
        assert re.search(rf"--{name}\s", text)
    assert all(len(line) <= 80 for line in text.splitlines())


@pytest.mark.parametrize("text", [commands.HELP, paper.HELP])
def test_the_examples_in_the_help_fit_a_narrow_terminal(text: str) -> None:
    assert max(map(len, text.splitlines())) <= 80


def test_start_here_of_train(run: Run) -> None:
    names = (
        "concept pretrained_model_name_or_path dry_run anchor kind data_dir mixed_precision push max_train_steps "
        "resume_from_checkpoint positives output_dir overwrite"
    )
    assert re.findall(r"│ (?:CONCEPT )?--(\w+)", run("train", "--help").out) == names.split()


@pytest.mark.parametrize("command", ["export", "report"])
def test_commands_with_few_options_show_all_of_them(run: Run, command: str) -> None:
    assert run(command, "--help").out == run(command, "--help_all").out


def test_flags_named_as_in_diffusers_scripts(run: Run) -> None:
    text = run("train", "--help_all").out
    for name in (
        "concept pretrained_model_name_or_path data_dir output_dir seed resolution rank lora_alpha learning_rate "
        "train_batch_size max_train_steps beta correction mixed_precision config debug"
    ).split():
        assert f"--{name}" in text


def test_importing_the_command_line_imports_nothing_heavy() -> None:
    code = (
        "import sys; from sd_unlearn.cli import main; "
        "main(['train', '--help']); main(['--version']); print(list(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = done.stdout.splitlines()[-1]
    assert "'cyclopts'" in modules
    for heavy in ("torch", "numpy", "diffusers", "transformers", "peft", "accelerate", "PIL"):
        assert f"'{heavy}'" not in modules


def test_values_arrive_with_their_types(run: Run, configs: list[TrainConfig]) -> None:
    assert run("train", "--concept", "Brad Pitt", "--beta", "0.25", "--rank=4", "--data_dir", "my data").code == 0
    (config,) = configs
    assert (config.concept, config.beta, config.rank, config.data_dir) == ("Brad Pitt", 0.25, 4, Path("my data"))
    assert config == TrainConfig(concept="Brad Pitt", beta=0.25, rank=4, data_dir=Path("my data"))


@pytest.mark.parametrize("command", ["train", "render"])
def test_the_concept_may_be_the_first_argument(run: Run, configs: list[TrainConfig], command: str) -> None:
    Path("run.yaml").write_text("concept: nine\n")
    for arguments in (["seven"], ["--seed", "0", "seven"], ["seven", "--config", "run.yaml"]):
        assert run(command, *arguments).code == 0
        assert configs.pop().concept == "seven"


def test_beta_may_be_a_number_or_the_word_estimate(run: Run, configs: list[TrainConfig]) -> None:
    Path("run.yaml").write_text("beta: estimate\n")
    for arguments in (["--beta", "estimate"], ["--config", "run.yaml"]):
        assert run("train", "--concept", "seven", *arguments).code == 0
        assert configs.pop().beta == "estimate"


@pytest.mark.parametrize("option", ["--no_share_timesteps", "--no-share-timesteps"])
def test_a_default_that_is_on_can_be_turned_off(run: Run, configs: list[TrainConfig], option: str) -> None:
    assert run("train", "--concept", "seven", option).code == 0
    assert configs[0].share_timesteps is False


def test_hyphens_are_accepted(run: Run, configs: list[TrainConfig]) -> None:
    assert run("train", "--max-train-steps", "7", "--pretrained-model-name-or-path=a-b/c-d").code == 0
    assert configs[0].max_train_steps == 7
    assert configs[0].pretrained_model_name_or_path == "a-b/c-d"  # a value keeps its hyphens


def test_results_go_to_stdout(run: Run, configs: list[TrainConfig]) -> None:
    found = run("render", "--concept", "seven")
    assert (found.out, found.err) == ("done\n", "")


# -- the config file --


def test_config_file_values_are_used_and_the_command_line_wins(run: Run, configs: list[TrainConfig]) -> None:
    settings = {
        "concept": "Brad Pitt",
        "beta": 0.3,
        "rank": 2,
        "correction": "nn",
        "data_dir": "d",
        "overwrite": True,
        "anchor": None,
        "debug": False,
        "learning_rate": 1e-4,
    }
    Path("run.yaml").write_text(yaml.safe_dump(settings))
    for arguments in (["--config", "run.yaml", "--rank", "4"], ["--rank=4", "--config=run.yaml"]):
        assert run("train", *arguments).code == 0
        config = configs.pop()
        assert (config.concept, config.beta, config.rank, config.correction) == ("Brad Pitt", 0.3, 4, "nn")
        assert (config.data_dir, config.overwrite, config.anchor) == (Path("d"), True, None)
        assert config.learning_rate == 1e-4
    assert run("train", "--concept", "seven").code == 0
    assert configs.pop().beta is None  # the file of one call is forgotten by the next


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_resolved_config_is_a_config_file(run: Run, configs: list[TrainConfig], overwrite: bool) -> None:
    from sd_unlearn.config.paths import as_dict

    config = TrainConfig(concept="seven", beta=0.1, overwrite=overwrite, output_dir=Path("runs/x"), guidance_scale=3)
    Path("config.yaml").write_text(yaml.safe_dump(as_dict(config)))
    assert run("train", "--config", "config.yaml").code == 0
    assert configs == [config] or configs[0].config == Path("config.yaml")
    configs[0].config = None
    assert configs == [config]


def test_no_in_a_config_file_is_text(run: Run, configs: list[TrainConfig]) -> None:
    Path("run.yaml").write_text("concept: seven\nmixed_precision: no\n")
    assert run("train", "--config", "run.yaml").code == 0
    assert configs.pop().mixed_precision == "no"


def test_unknown_config_key(run: Run) -> None:
    Path("run.yaml").write_text("concept: seven\nlearning_rat: 1\n")
    found = run("train", "--config", "run.yaml")
    assert found.code == 2
    assert '--config run.yaml: unknown key "learning_rat". Did you mean "learning_rate"?' in found.err


def test_a_key_of_another_command_is_refused(run: Run) -> None:
    Path("run.yaml").write_text("concept: seven\nrank: 4\n")
    assert 'unknown key "rank"' in run("render", "--config", "run.yaml").err


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("- a\n", "run.yaml must hold keys"),
        ("", "run.yaml must hold keys"),
        ("a: [", "run.yaml is not valid YAML"),
        ("rank: much\n", "rank"),
        ("rank: 7.5\n", "7.5"),
        ("rank: true\n", "rank"),
        ("debug: true\nrank: much\n", "rank"),
        ("correction: absolute\n", "correction"),
        ("beta: 2\n", "--beta 2"),
        ("beta: 1\n", "--beta 1 must be above 0 and below 1"),
        ("beta: guess\n", "beta"),
        ("rank: [1, 2]\n", "rank"),
        ("concept: {a: b}\n", "concept"),
        ("max_train_steps: many\n", "max_train_steps"),
        ("overwrite: perhaps\n", "overwrite"),
        ("concept: &a [*a]\n", "run.yaml is not valid YAML: a list or mapping holds itself"),
        ("concept: &a {a: *a}\n", "run.yaml is not valid YAML: a list or mapping holds itself"),
        ('concept: "\\ud800"\n', "run.yaml is not valid YAML: it holds the text"),
        ("concept: !!binary aGk=\n", "run.yaml: concept must be text"),
        ("rank: 2024-01-01\n", "run.yaml: rank must be text, a number"),
        ("a: " + 3000 * "[", "run.yaml is not valid YAML"),
        ("rank: " + 5000 * "9", "run.yaml is not valid YAML"),
        ("\ufeffbeta: .nan\n", "--beta nan must be a finite number"),
        ("1: 2\n", 'unknown key "1"'),
    ],
)
@pytest.mark.usefixtures("no_model")
def test_a_wrong_config_file_is_refused(run: Run, content: str, expected: str) -> None:
    Path("run.yaml").write_text(content)
    found = run("train", "--config", "run.yaml", *([] if content.startswith("concept") else ["--concept", "seven"]))
    assert found.code == 2
    assert expected in found.err
    assert tree(Path()) == {"run.yaml"}


# -- refusals: one line, code 2, nothing left behind --

USAGE = [
    (["rendr"], "rendr"),
    (["train", "--concept", "seven", "--rnak", "4"], "--rnak"),
    (["train", "--concept", "seven", "surplus"], '--concept "surplus" has no file'),
    (["train", "seven", "nin"], '--concept "nin" has no file'),
    (["train", "--concept"], "--concept"),
    (["train", "--concept", "seven", "--rank", "four"], "four"),
    (["train", "--concept", "seven", "--rank", "7.5"], 'Invalid value for --rank: unable to convert "7.5" into int'),
    (["evaluate", "--run", "runs/x", "--seed", "0", "1.5"], 'Invalid value for --seed: unable to convert "1.5"'),
    (["ui", "--port", "7860.5"], "7860.5"),
    (["train", "--concept", "seven", "--correction", "absolute"], "absolute"),
    (["train", "--rnak", "4", "--debug"], "--rnak"),
    (["train", "--concept", "seven", "--mixed_precision", "fp8"], "fp8"),
    (["train", "--config", "nowhere.yaml"], "--config nowhere.yaml: No such file"),
    (["train", "--config", "."], "--config ."),
    (["train"], "--concept is missing"),
    (["render", "--concept", ""], "--concept is missing"),
    (["train", "--concept", "sevn"], 'Did you mean "seven"?'),
    (["train", "--concept", "sevn"], "--anchor"),
    (["train", "--concept", "sevn"], "brad-pitt, cat, church, "),
    (["render", "--concept", "../../etc/passwd"], "--anchor"),
    (["train", "--concept", "x", "--anchor", ""], "--anchor"),
    (["train", "--concept", "nowhere.yaml"], "--concept nowhere.yaml"),
    *((["train", "--concept", "seven", "--beta", beta], f"--beta {beta}") for beta in ("0", "1", "-0.1", "1.5", "nan")),
    (["train", "--concept", "seven", "--beta", "guess"], "--beta"),
    (["train", "--concept", "seven", "--rank", "0"], "--rank 0"),
    (["train", "--concept", "seven", "--lora_alpha", "0"], "--lora_alpha 0"),
    (["train", "--concept", "seven", "--max_train_steps", "0"], "--max_train_steps 0"),
    (["train", "--concept", "seven", "--learning_rate", "-1"], "--learning_rate -1"),
    (["train", "--concept", "seven", "--learning_rate", "nan"], "--learning_rate nan"),
    (["train", "--concept", "seven", "--max_grad_norm", "0"], "--max_grad_norm 0"),
    (["train", "--concept", "seven", "--train_batch_size", "0"], "--train_batch_size 0"),
    (["train", "--concept", "seven", "--push", "0"], "--push 0"),
    (["train", "--concept", "seven", "--objective", "supervised"], "supervised needs --target noise"),
    (["train", "--concept", "seven", "--objective", "unsupervised"], "unsupervised needs --target noise"),
    (
        ["train", "--concept", "seven", "--objective", "supervised", "--target", "noise", "--correction", "nn"],
        "--correction nn is for --objective pu",
    ),
    (
        ["train", "--concept", "seven", "--objective", "unsupervised", "--target", "noise", "--beta_sweep", "1,2"],
        "does not depend on beta",
    ),
    (["train", "--concept", "seven", "--target", "noise", "--push", "3"], "--push 3 needs --target teacher"),
    (["train", "--concept", "seven", "--target", "noise", "--unconditional", "0.5"], "--unconditional 0.5 needs"),
    (["train", "--concept", "seven", "--method", "full", "--rank", "4"], "--rank is for --method lora"),
    (["train", "--concept", "seven", "--method", "full", "--offload"], "--offload is for --method lora"),
    (["train", "--concept", "seven", "--use_dora", "--offload"], "--offload does not work with --use_dora"),
    (["train", "--concept", "seven", "--objective", "esd-x", "--push", "3"], "--push 3.0 is for --objective pu"),
    (["train", "--concept", "seven", "--objective", "esd-u", "--beta_sweep", "1,2"], "esd-u does not use it"),
    (["train", "--concept", "seven", "--objective", "anchor", "--correction", "nn"], "--correction nn is for"),
    (["train", "--concept", "seven", "--objective", "neggrad", "--eta", "0.3"], "--eta 0.3 is for --objective pu"),
    (["train", "--concept", "seven", "--objective", "neggrad", "--beta", "estimate"], "does not depend on beta"),
    (
        ["train", "--concept", "seven", "--objective", "esd-u", "--beta", "0.2"],
        "--beta 0.2: --objective esd-u does not",
    ),
    (["train", "--concept", "seven", "--objective", "anchor", "--caption_mode", "own"], "--caption_mode own is for"),
    (["train", "--concept", "seven", "--objective", "esd-x", "--no_share_timesteps"], "--no_share_timesteps is for"),
    (["train", "--concept", "seven", "--objective", "esd-x", "--target", "noise"], "esd-x needs --target teacher"),
    (["train", "--concept", "seven", "--objective", "esd-u", "--method", "full"], "esd-u trains a LoRA"),
    (
        ["train", "--concept", "seven", "--objective", "esd-x", "--lora_targets", "attention"],
        "esd-x trains",
    ),
    (
        ["train", "--concept", "seven", "--objective", "anchor", "--erase_guidance", "1"],
        "--erase_guidance 1.0 is for",
    ),
    (
        ["train", "--concept", "seven", "--objective", "pu", "--forget_weight", "2"],
        "--forget_weight 2.0 is",
    ),
    (["train", "--concept", "seven", "--objective", "uce", "--rece_epochs", "2"], "--rece_epochs 2 is for"),
    (
        ["train", "--concept", "seven", "--objective", "neggrad", "--no_retain"],
        "for --objective esd-x, esd-u or anchor",
    ),
    (["train", "--concept", "seven", "--eta", "1.1"], "--eta 1.1"),
    (["train", "--concept", "seven", "--eta", "-0.1"], "--eta -0.1"),
    (["train", "--concept", "seven", "--eta", "nan"], "--eta nan"),
    (["train", "--concept", "seven", "--unconditional", "-0.1"], "--unconditional -0.1"),
    (["train", "--concept", "seven", "--timestep_bias", "-1"], "--timestep_bias -1"),
    (["train", "--concept", "seven", "--gradient_accumulation_steps", "0"], "--gradient_accumulation_steps 0"),
    (["train", "--concept", "seven", "--effective_batch_size", "3"], "--effective_batch_size 3 is too small"),
    (
        "train --concept seven --effective_batch_size 40 --train_batch_size 8 --gradient_accumulation_steps 4".split(),
        "--effective_batch_size 40 differs from --train_batch_size 8 x --gradient_accumulation_steps 4 x 1 process",
    ),
    (["train", "--concept", "seven", "--train_batch_size", "64"], "--train_batch_size 64 is more than the 40 images"),
    (["train", "--concept", "seven", "--lr_warmup_steps", "-1"], "--lr_warmup_steps -1"),
    (["train", "--concept", "seven", "--validation_steps", "-1"], "--validation_steps -1"),
    (["train", "--concept", "seven", "--snr_gamma", "0"], "--snr_gamma 0"),
    (["train", "--concept", "seven", "--zero_terminal_snr"], "--zero_terminal_snr needs a base that predicts v"),
    (["train", "--concept", "seven", "--report_to", "mlflow"], "--report_to"),
    (["train", "--concept", "seven", "--eta", "1.5"], "--eta 1.5"),
    (["train", "--concept", "seven", "--lora_dropout", "1"], "--lora_dropout 1"),
    (["train", "--concept", "seven", "--ema_decay", "1"], "--ema_decay 1"),
    (["train", "--concept", "seven", "--snr_gamma", "0"], "--snr_gamma 0"),
    (["train", "--concept", "seven", "--weight_decay", "-1"], "--weight_decay -1"),
    (["train", "--concept", "seven", "--checkpointing_steps", "-1"], "--checkpointing_steps -1"),
    (["train", "--concept", "seven", "--checkpoints_total_limit", "0"], "--checkpoints_total_limit 0"),
    (["train", "--concept", "seven", "--method", "full", "--use_dora"], "--use_dora is for --method lora"),
    (["train", "--concept", "seven", "--method", "full", "--quantize_base", "int8"], "--quantize_base int8 is for"),
    (["train", "--concept", "seven", "--use_dora", "--quantize_base", "nf4"], "does not work with --use_dora"),
    (["train", "--concept", "seven", "--torch_compile", "--quantize_base", "nf4"], "not work with --torch_compile"),
    (["train", "--concept", "seven", "--method", "full", "--train_text_encoder"], "--train_text_encoder"),
    (["train", "--concept", "seven", "--early_stopping_patience", "2"], "add --probe_steps"),
    (["train", "--concept", "seven", "--stop_when_forgotten", "--probe_steps", "5"], "needs --probe leakage"),
    (["train", "--concept", "seven", "--probe", "leakage"], "add --probe_steps"),
    (["train", "--concept", "seven", "--method", "full", "--lora_dropout", "0.1"], "--lora_dropout is for --method"),
    (["train", "--concept", "seven", "--method", "full", "--lora_targets", "cross_attention"], "--lora_targets is for"),
    (["train", "--concept", "seven", "--force_resume"], "--force_resume needs --resume_from_checkpoint"),
    (["train", "--concept", "seven", "--overwrite", "--resume_from_checkpoint", "latest"], "give one of them"),
    (["train", "--concept", "seven", "--resume_from_checkpoint", "nowhere"], "nowhere is not a checkpoint"),
    (["train", "--concept", "seven", "--num_positive", "-2"], "--num_positive -2"),
    (["train", "--concept", "seven", "--num_positive", "1"], "--num_positive 1"),
    (["render", "--concept", "seven", "--num_positive", "0"], "--num_positive"),
    (["render", "--concept", "seven", "--resolution", "0"], "--resolution 0"),
    (["render", "--concept", "seven", "--resolution", "33"], "--resolution 33"),
    (["render", "--concept", "seven", "--render_batch_size", "0"], "--render_batch_size 0"),
    (["render", "--concept", "seven", "--num_inference_steps", "-3"], "--num_inference_steps -3"),
    (["train", "--concept", "seven", "--seed", "-1"], "--seed -1"),
    (["train", "--concept", "seven", "--seed", "5000000000"], "--seed 5000000000"),
    (["train", "--concept", "seven", "--pretrained_model_name_or_path", "./none"], "--pretrained_model_name_or_path"),
    (["render", "--concept", "seven", "--pretrained_model_name_or_path", "none"], "digits"),
    (["render", "--concept", "seven", "--pretrained_model_name_or_path", "/no/such/model"], "/no/such/model"),
    (["evaluate"], "--run runs/seven"),
    (["evaluate", "--lora", "nowhere"], "--lora nowhere"),
    (["evaluate", "--lora", "a", "--fail_if", "leak"], "--fail_if"),
    (["attack"], "Nothing to attack. Give a run folder (--run runs/seven), LoRAs (--lora A B), or --concept"),
    (["attack", "--concept", "seven", "--no_ceiling"], "Nothing to attack"),
    (["concepts", "show", "sevn"], '"sevn" has no concept file. Did you mean "seven"? sd-unlearn concepts lists all'),
    (["export"], "--run"),
    (["report"], "--run"),
    *(([command, "--run", "nowhere"], "--run nowhere") for command in ("evaluate", "export", "report")),
]


@pytest.mark.parametrize(
    ("arguments", "expected"), USAGE, ids=lambda x: " ".join(x)[-60:] if isinstance(x, list) else ""
)
@pytest.mark.usefixtures("no_model")
def test_wrong_usage(run: Run, arguments: list[str], expected: str) -> None:
    found = run(*arguments)
    assert found.code == 2
    assert expected in found.err
    assert tree(Path()) == set()


def test_an_option_that_is_nearly_right_is_named(run: Run) -> None:
    assert "--rank" in run("train", "--rnak", "4").err
    assert "render" in run("rendr").err


@pytest.mark.parametrize("content", ["{}", "{", '{"_class_name": "FluxPipeline"}', "[]", None])
@pytest.mark.usefixtures("no_model")
def test_a_folder_that_is_not_a_supported_model(run: Run, content: str | None) -> None:
    Path("model").mkdir()
    if content is not None:
        Path("model/model_index.json").write_text(content)
    before = tree(Path())
    found = run("render", "--concept", "seven", "--pretrained_model_name_or_path", "model")
    assert found.code == 2
    assert "--pretrained_model_name_or_path model" in found.err
    assert tree(Path()) == before


@pytest.mark.usefixtures("no_model")
def test_a_damaged_model_file_is_refused(run: Run) -> None:
    Path("model.safetensors").write_bytes(b"x")
    found = run("train", "--concept", "seven", "--pretrained_model_name_or_path", "model.safetensors")
    assert found.code == 2
    assert tree(Path()) == {"model.safetensors"}


def test_a_hub_model_without_a_network(run: Run) -> None:
    found = run("train", "--concept", "brad-pitt", "--pretrained_model_name_or_path", "no-such-owner/no-such-model")
    lines = found.err.splitlines()
    assert found.code == 1
    assert "--pretrained_model_name_or_path no-such-owner/no-such-model" in lines[-1]
    assert "digits" in lines[-1]
    assert tree(Path()) == set()


@pytest.mark.parametrize("command", ["render", "train"])
@pytest.mark.usefixtures("no_model")
def test_places_that_cannot_be_written(run: Run, tiny_base: Path, command: str) -> None:
    Path("file").write_text("in the way")
    options = ["--concept", "seven", "--pretrained_model_name_or_path", str(tiny_base)]
    for place in ("file", "file/deeper"):
        found = run(command, *options, "--data_dir", place)
        assert found.code in (1, 2)
        assert f"--data_dir {place}" in found.err
        if command == "train":
            found = run(command, *options, "--output_dir", place)
            assert found.code == 2
            assert f"--output_dir {place}" in found.err
    assert tree(Path()) == {"file"}


@pytest.mark.usefixtures("no_model")
def test_own_photos_are_checked_before_a_model_loads(run: Run, photos: Callable[..., Path]) -> None:
    folder = photos(unlabeled=1)
    before = tree(Path())
    found = run("train", "--concept", "seven", "--data_dir", str(folder))
    assert found.code == 2
    assert f"--data_dir {folder}" in found.err
    assert tree(Path()) == before


# -- strange names stay inside --


@pytest.mark.parametrize(
    "name", ["../x", "../../../tmp/x", "a/b", "/etc/x", "🙂", "\"q\" 'r'", "x.y", "--", "{a}", "a\tb"]
)
def test_strange_names_stay_inside_the_data_folder(
    run: Run, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    inside = tmp_path / "deep" / "down"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    found = run(
        "render",
        f"--concept={name}",
        "--anchor",
        "a man",
        "--pretrained_model_name_or_path",
        str(tiny_base),
        "--num_keep",
        "0",
        "--num_inference_steps",
        "1",
        "--num_unlabeled",
        "1",
        "--num_mixed_in",
        "1",
        "--num_positive",
        "2",
    )
    assert found.code == 0
    assert "is used without a file, as kind other" in found.err
    (folder,) = (inside / "data").iterdir()
    assert found.out.strip() == str(folder.relative_to(inside))
    assert tree(tmp_path) - {"deep", "deep/down", "deep/down/data"} == {
        f"deep/down/data/{folder.name}{rest}" for rest in {"", *(f"/{p}" for p in tree(folder))}
    }
    texts = (folder / "1_positive" / "metadata.jsonl").read_text(encoding="utf-8")
    assert yaml.safe_load(texts.splitlines()[0])["text"] == f"a photo of {' '.join(name.split())}"


# -- failures --


def test_failures_have_code_one_and_interruptions_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from sd_unlearn.errors import UnlearnError

    def failing(error: BaseException) -> None:
        def fail(config: RenderConfig) -> Path:
            raise error

        monkeypatch.setattr(render, "run", fail)

    failing(UnlearnError("The disk is full."))
    found = run("render", "--concept", "seven")
    assert (found.code, found.err) == (1, "Error: The disk is full.\n")
    failing(KeyboardInterrupt())
    found = run("render", "--concept", "seven")
    assert found.code == 130
    assert "Run the same command again to continue." in found.err


def test_an_unforeseen_error_is_one_line_and_a_traceback_only_with_debug(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(config: RenderConfig) -> Path:
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr(render, "run", fail)
    monkeypatch.setenv(SHOW, "")
    assert cli.main(["render", "--concept", "seven"]) == 1
    err = capsys.readouterr().err
    assert "--debug" in err
    assert "Traceback" not in err
    assert err.count("\n") == 1
    Path("run.yaml").write_text("concept: seven\ndebug: true\n")
    for arguments in (["--concept", "seven", "--debug"], ["--config", "run.yaml"]):
        assert cli.main(["render", *arguments]) == 1
        assert "Traceback" in capsys.readouterr().err


def test_every_command_accepts_debug(run: Run) -> None:
    for command in (["concepts"], ["concepts", "show", "seven"], ["--version"], ["paper", "list"]):
        assert run(*command, "--debug").code == 0
    assert "--debug" in run("--help").out


@pytest.mark.parametrize(
    ("arguments", "saved", "advice"),
    [
        ("train seven", "Saved.", "Saved. Add --resume_from_checkpoint latest to continue."),
        ("train seven --resume_from_checkpoint=latest", "Saved.", "Saved. Run the same command again to continue."),
        ("train seven --overwrite", "Saved.", "Saved. Replace --overwrite with --resume_from_checkpoint latest to"),
        ("train seven --overwrite", "", "Interrupted. Run the same command again to continue."),
        ("train seven --beta_sweep 1,2", "Kept.", "Kept. Run the same command again to continue."),
        ("train seven --beta_sweep 1,2 --overwrite", "Kept.", "Kept. Run the same command again without --overwrite"),
        ("train --config run.yaml", "Kept.", "Kept. Run the same command again without --overwrite to continue."),
    ],
)
def test_what_to_do_after_ctrl_c(
    run: Run, monkeypatch: pytest.MonkeyPatch, arguments: str, saved: str, advice: str
) -> None:
    def interrupt(config: TrainConfig) -> Path:
        raise KeyboardInterrupt(*filter(None, [saved]))

    Path("run.yaml").write_text("concept: seven\nbeta_sweep: 1,2\noverwrite: true\n")
    for module in (trainer, sweep):
        monkeypatch.setattr(module, "run", interrupt)
    found = run(*arguments.split())
    assert found.code == 130
    assert advice in found.err


def test_train_py_is_the_train_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, configs: list[TrainConfig]
) -> None:
    script = Path(cli.__file__).parent.parent / "train.py"
    for arguments, code in ((["--beta", "much"], 2), (["--beta", "0.5"], 0)):
        monkeypatch.setattr(sys, "argv", ["train.py", "--concept", "seven", *arguments])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(script), run_name="__main__")
        assert caught.value.code == code
    assert [(c.concept, c.beta) for c in configs] == [("seven", 0.5)]
    assert "much" in capsys.readouterr().err
