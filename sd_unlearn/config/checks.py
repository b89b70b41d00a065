"""Validate configs before anything loads: the range of each option, then options that do not fit together."""

import dataclasses

from sd_unlearn.choices import CLOSED_FORM, ObjectiveName
from sd_unlearn.config.evaluate import EvaluateConfig
from sd_unlearn.config.options import check_ranges
from sd_unlearn.config.train import TARGETS_OF, TrainConfig
from sd_unlearn.errors import UsageError

# The options that a closed-form objective uses; all others are about images or training steps. Of the data folder,
# `evaluate` may use the images of a person.
CLOSED_FORM_OPTIONS = {
    "data_dir",
    *("concept", "anchor", "kind", "objective", "output_dir", "overwrite", "dry_run", "config", "debug"),
    *("pretrained_model_name_or_path", "vae", "prediction_type", "variant", "single_file_config", "allow_pickle"),
    *("drop_t5", "offload", "rece_epochs", "erase_weight", "null_space_threshold"),
}


def check_train(config: TrainConfig) -> None:
    """Validate the options of `train`.

    Raises:
        UsageError: naming the option, its value and what is allowed.
    """
    check_ranges(config)
    if config.objective in CLOSED_FORM:
        _check_closed_form(config)
        _check_own_options(config)
        return
    _check_own_options(config)
    if config.num_positive is not None and config.num_positive < 2:
        raise UsageError(f"--num_positive {config.num_positive} must be at least 2 for training.")
    if config.method == "full":
        _check_full(config)
    _check_objective(config)
    if config.quantize_base:
        _check_quantized(config)
    if config.offload and config.use_dora:
        raise UsageError("--offload does not work with --use_dora, which needs the base's weights. Leave one out.")
    _check_probe(config)
    if config.force_resume and config.resume_from_checkpoint is None:
        raise UsageError("--force_resume needs --resume_from_checkpoint: give a checkpoint, or latest.")
    if config.overwrite and config.resume_from_checkpoint is not None:
        raise UsageError("--overwrite starts over and --resume_from_checkpoint resumes: give one of them, not both.")


def check_evaluate(config: EvaluateConfig) -> None:
    """Validate the options of `evaluate`.

    Raises:
        UsageError: naming the option, its value and what is allowed.
    """
    check_ranges(config)
    if len(set(config.seed)) < len(config.seed) or not config.seed:
        raise UsageError(f"--seed {' '.join(map(str, config.seed))}: give each seed once.")
    if config.prompt_category is not None and config.prompt_set is None:
        raise UsageError(f"--prompt_category {config.prompt_category} chooses from --prompt_set: add it, e.g. i2p.")


def _check_closed_form(config: TrainConfig) -> None:
    """Options of images, steps and the shape of the LoRA mean nothing to a closed-form objective."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in CLOSED_FORM_OPTIONS and value != field.default:
            flag = f"--{'' if value else 'no_'}{field.name}" if isinstance(value, bool) else f"--{field.name} {value}"
            raise UsageError(
                f"{flag}: --objective {config.objective} is computed in closed form, without images, "
                "training steps or random numbers, and does not use it. Leave it out."
            )


def _check_full(config: TrainConfig) -> None:
    """--method full trains the UNet itself, so options of a LoRA do not apply."""
    for name in ("use_dora", "train_text_encoder", "lora_dropout", "lora_targets", "rank", "lora_alpha", "offload"):
        if getattr(config, name) != getattr(TrainConfig, name):
            raise UsageError(f"--{name} is for --method lora; --method full trains the UNet itself.")


def _check_quantized(config: TrainConfig) -> None:
    """A quantized base must stay frozen, and its weights cannot be read or compiled as others can."""
    option = f"--quantize_base {config.quantize_base}"
    if config.method == "full":
        raise UsageError(f"{option} is for --method lora; --method full trains the UNet itself. Leave one of them out.")
    if config.use_dora:
        raise UsageError(
            f"{option} does not work with --use_dora, which needs the base's weights. Leave one of them out."
        )
    if config.torch_compile:
        raise UsageError(f"{option} does not work with --torch_compile. Leave one of them out.")


def _check_probe(config: TrainConfig) -> None:
    """Options that use the result of a probe need one."""
    for name in ("early_stopping_patience", "stop_when_forgotten"):
        if getattr(config, name) and not config.probe_steps:
            raise UsageError(f"--{name} needs probes: add --probe_steps, e.g. 50.")
    if config.probe == "leakage" and not config.probe_steps:
        raise UsageError("--probe leakage needs an interval: add --probe_steps, e.g. 50.")
    if config.stop_when_forgotten and config.probe != "leakage":
        raise UsageError(f"--stop_when_forgotten needs --probe leakage; --probe is {config.probe}.")


# Options of single objectives, and the objectives that use them.
OWN_OPTIONS: dict[str, tuple[ObjectiveName, ...]] = {
    "erase_guidance": ("esd-x", "esd-u"),
    "forget_weight": ("neggrad",),
    "retain": ("esd-x", "esd-u", "anchor"),
    "teacher_reuse": ("pu",),
    "rece_epochs": ("rece",),
    "erase_weight": ("uce", "rece"),
    "null_space_threshold": ("speed",),
}
# Options that are about unlabeled images and positives under the same caption, which only the risks have.
RISK_OPTIONS = ("correction", "push", "beta_sweep", "caption_mode", "share_timesteps")


def unused_options(objective: ObjectiveName) -> set[str]:
    """Options that do not affect a training with this objective, so that its record leaves them out."""
    others = {name for name, users in OWN_OPTIONS.items() if objective not in users}
    return others if objective in ("pu", "supervised", "unsupervised") else others | {*RISK_OPTIONS, "eta", "beta"}


def _check_own_options(config: TrainConfig) -> None:
    """Options of another objective must not be given."""
    for name, users in OWN_OPTIONS.items():
        if config.objective not in users and getattr(config, name) != getattr(TrainConfig, name):
            flag = "--no_retain" if name == "retain" else f"--{name} {getattr(config, name)}"
            *others, last = users
            named = f"{', '.join(others)} or {last}" if others else last
            raise UsageError(f"{flag} is for --objective {named}; --objective is {config.objective}.")


def _check_objective(config: TrainConfig) -> None:
    """Options that an objective does not use must not be given."""
    if config.robust and config.train_text_encoder:
        raise UsageError(
            "--robust learns the input of a text encoder that does not change. Leave out --robust or "
            "--train_text_encoder."
        )
    _check_needs_teacher(config)
    if config.objective in ("supervised", "unsupervised"):
        _check_baseline(config)
    elif config.objective != "pu":
        _check_other_method(config)


def _check_needs_teacher(config: TrainConfig) -> None:
    """Without the base as the teacher, its predictions are neither asked for nor exceeded."""
    if config.target == "teacher":
        return
    given = {name: getattr(config, name) for name in ("push", "unconditional", "teacher_reuse")}
    for name, value in given.items():
        if value != getattr(TrainConfig, name) and (name, value) != ("teacher_reuse", 1):
            raise UsageError(f"--{name} {value:g} needs --target teacher; --target is noise. Leave it out.")


def _check_other_method(config: TrainConfig) -> None:
    """Methods of other papers have no bracket; most have targets that the base predicts, and ESD its own layers."""
    method = f"--objective {config.objective}"
    for name in RISK_OPTIONS:
        value = getattr(config, name)
        if value != getattr(TrainConfig, name):
            flag = "--no_share_timesteps" if name == "share_timesteps" else f"--{name} {value}"
            raise UsageError(f"{flag} is for --objective pu, supervised or unsupervised; {method} does not use it.")
    if config.beta is not None:
        raise UsageError(f"--beta {config.beta}: {method} does not depend on beta. Leave it out.")
    if config.eta not in (TrainConfig.eta, 0):
        raise UsageError(f"--eta {config.eta:g} is for --objective pu; {method} does not use it.")
    if config.target == "noise" and config.objective != "neggrad":
        raise UsageError(
            f"{method} needs --target teacher: the base predicts what the keep images learn. To train without keep "
            "images, as in the paper, use --no_retain."
        )
    targets = TARGETS_OF.get(config.objective)
    if targets is None:
        return
    if config.method == "full":
        raise UsageError(f"{method} trains a LoRA on some layers; --method full trains the whole UNet.")
    if config.lora_targets not in (None, targets):
        raise UsageError(f"--lora_targets {config.lora_targets}: {method} trains {targets}. Leave it out.")


def _check_baseline(config: TrainConfig) -> None:
    """The paper's baselines have neither a teacher nor a bracket."""
    baseline = f"--objective {config.objective}"
    if config.target == "teacher":
        raise UsageError(
            f"{baseline} needs --target noise: with --target teacher, which is the base's own prediction, unlabeled "
            "images have no gradient."
        )
    if config.correction != "abs":
        raise UsageError(
            f"--correction {config.correction} is for --objective pu; {baseline} has no bracket to correct."
        )
    if config.objective == "unsupervised" and config.beta_sweep is not None:
        raise UsageError(f"--beta_sweep {config.beta_sweep}: {baseline} does not depend on beta. Leave it out.")
