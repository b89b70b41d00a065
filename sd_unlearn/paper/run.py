"""`paper run`: train one model, generate images from it and measure them.

Each stage leaves its files in the run folder, so that an interrupted run resumes and a finished one is not repeated.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState

from sd_unlearn import __version__
from sd_unlearn.errors import UsageError
from sd_unlearn.io.files import atomic_path, check_writable, timestamp, write_json, write_text
from sd_unlearn.io.lock import locked, remove_leftovers
from sd_unlearn.io.own_files import PAPER as PAPER_FILES
from sd_unlearn.io.own_files import delete_own, is_free, kind_of, mark
from sd_unlearn.io.reading import file_sha256, read_json, read_yaml
from sd_unlearn.io.run_folder import CHECKPOINT_DIR, CONFIG, RESULTS, TRAINING
from sd_unlearn.metrics.fidelity import InceptionFidelity
from sd_unlearn.models.device import choose_precision
from sd_unlearn.paper import stable_diffusion
from sd_unlearn.paper.ddpm.datasets import found_sha256, load_dataset
from sd_unlearn.paper.ddpm.sample import PARTS_DIR, from_bytes, generate_all, load_samples, make_sampler
from sd_unlearn.paper.ddpm.split import split
from sd_unlearn.paper.ddpm.train import TrainingJob, train
from sd_unlearn.paper.ddpm.unet import PIPELINE_DIR, load_network
from sd_unlearn.paper.experiments import CLASSES, DIGITS, TEXT_EXPERIMENTS, Counts, Experiment, Size, find_experiment
from sd_unlearn.paper.judge import score
from sd_unlearn.paper.judge.classifier import Classifier, get_classifier
from sd_unlearn.paper.options import RunOptions
from sd_unlearn.paper.printing import kept_after_interruption
from sd_unlearn.paper.settings import ExperimentSettings, default_settings, resolve, variant_of
from sd_unlearn.results import Row, as_json
from sd_unlearn.training import checkpoint
from sd_unlearn.training.provenance import PACKAGES, commit
from sd_unlearn.training.trainer import PATIENCE

SHEET, SAMPLING = "samples.png", "sampling.json"
CLASSIFIERS = "classifiers"  # next to the runs: all runs on a dataset share one
WEIGHTS = f"{PIPELINE_DIR}/unet/diffusion_pytorch_model.safetensors"


def run_experiment(name: str, options: RunOptions) -> Path:
    """Run any experiment as far as it is not finished. Returns the record: results.json or paper.json.

    Raises:
        UsageError, UnlearnError: invalid options or files, wherever possible before anything heavy loads.
        Interrupted: Ctrl-C during training; a checkpoint was saved.
    """
    if name in TEXT_EXPERIMENTS:
        return stable_diffusion.run_with_options(name, options) / stable_diffusion.PAPER
    return run_ddpm(name, options) / RESULTS


def run_ddpm(name: str, options: RunOptions) -> Path:
    """Run a DDPM experiment as far as it is not finished. Returns its folder. Raises as `run_experiment`."""
    experiment = find_experiment(name)
    options = dataclasses.replace(options, mixed_precision=choose_precision(options.mixed_precision))
    settings, counts, size = resolve(experiment, options)
    folder = folder_of(experiment, options)
    check_writable(folder, "--output_dir")
    config = {"experiment": name, "size": size, "seed": options.seed, **as_json(settings)}
    check_same_run(folder, config, options.overwrite)
    if (folder / RESULTS).is_file() and not options.overwrite:
        check_same_data(folder / RESULTS, found_sha256(experiment.dataset, options.data_root))
        print(f"{folder} is finished. Add --overwrite to run it again.", file=sys.stderr)
        return folder
    check_fid_weights(experiment, options)
    with locked(folder, "--output_dir"):
        check_same_run(folder, config, options.overwrite)  # again: another process may have started one since
        return _run_stages(experiment, settings, size, counts, config, options)


def _run_stages(
    experiment: Experiment,
    settings: ExperimentSettings,
    size: Size,
    counts: Counts,
    config: dict[str, Any],
    options: RunOptions,
) -> Path:
    """`run_ddpm` once the options are checked, while no other process uses the run folder."""
    folder = folder_of(experiment, options)
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)  # the others wait for the first process
    with state.main_process_first():  # which may download
        data = load_dataset(experiment.dataset, options.data_root)
    names = CLASSES[experiment.dataset]
    normal, sensitive, missing = (
        [names.index(n) for n in group] for group in (experiment.normal, experiment.sensitive, settings.missing)
    )
    images = split(data.labels, normal, sensitive, counts, options.seed, missing, settings.num_negative)
    if state.is_main_process:
        for place in (folder, folder / CHECKPOINT_DIR, folder / PARTS_DIR):
            remove_leftovers(place)
        mark(folder, "paper")
        if options.overwrite:
            delete_own(folder, PAPER_FILES)
        write_text(folder / CONFIG, yaml.safe_dump(config, sort_keys=False))
    state.wait_for_everyone()
    job = TrainingJob(experiment, settings, size, options.seed, data, images, folder, options.checkpointing_steps)
    with kept_after_interruption(folder):
        cost = _train(job)
        device = str(state.device)
        cost["sampling_seconds"] = _generate(job, options.sample_batch_size, device)
        if state.is_main_process:
            classifier = get_classifier(data, job.side, size, 0, device, options.output_dir / CLASSIFIERS)
            rows = _measure(job, classifier, options, device)
            _record(job, cost, classifier, rows)
        state.wait_for_everyone()
    return folder


def folder_of(experiment: Experiment, options: RunOptions) -> Path:
    """The run folder; equal settings have the same one.

    Raises:
        UsageError: as resolve.
    """
    settings, _, size = resolve(experiment, options)
    variant = variant_of(settings, default_settings(experiment, settings, size), size, options.seed)
    return options.output_dir / experiment.name / variant


def check_same_run(folder: Path, config: dict[str, Any], overwrite: bool) -> None:
    """
    Raises:
        UsageError: the folder holds another run or files of another kind.
    """
    if is_free(folder):
        return
    file = folder / CONFIG
    before = read_yaml(file, "--output_dir") if file.is_file() else {}
    if kind_of(folder) != "paper" and before.get("experiment") != config["experiment"]:
        raise UsageError(f"--output_dir: {folder} holds files but is not a `paper` run. Choose another folder.")
    if overwrite or not before:
        return
    changed = [key for key in config if before.get(key) != config[key]]
    if changed:
        key = changed[0]
        raise UsageError(
            f"{folder} holds a run with {key} {before.get(key)}, but this one has {config[key]}. Choose another "
            "--output_dir, or add --overwrite to start again."
        )


def check_same_data(record: Path, sha256: str | None) -> None:
    """Refuse to continue a run on other images. record: results.json or training.json; sha256: None if unknown.

    Raises:
        UsageError
    """
    before = read_json(record).get("data_sha256")  # older training records have none
    if before and sha256 and before != sha256:
        raise UsageError(
            f"{record.parent} holds a run on other images than --data_root has now. Choose another --output_dir, or "
            "add --overwrite to start again."
        )


def fidelity_of(experiment: Experiment) -> score.Fidelity:
    """The network whose features the FID uses."""
    return "digits" if CLASSES[experiment.dataset] == DIGITS else "inception"


def check_fid_weights(experiment: Experiment, options: RunOptions) -> None:
    """Load (or download) the Inception weights before hours of training rather than after.

    Raises:
        UsageError, UnlearnError: as InceptionFidelity.
    """
    if fidelity_of(experiment) == "inception":
        InceptionFidelity(options.inception_weights)


def _train(job: TrainingJob) -> dict[str, Any]:
    """Train unless finished. Returns the cost.

    Raises:
        UsageError: as check_same_data.
    """
    record = job.folder / TRAINING
    if not record.is_file():
        unlabeled, labeled = job.counts["normal"] + job.counts["mixed_in"], job.counts["positive"]
        images = f"{unlabeled:,} unlabeled and {labeled:,} labeled sensitive images"
        print(f"{job.folder}: {job.settings.max_train_steps:,} steps on {images}.", file=sys.stderr)
        cost = train(job)
        if PartialState().is_main_process:
            write_json(record, cost | {"data_sha256": job.data.sha256})
            checkpoint.delete_all(job.folder)  # large, and no longer needed
        PartialState().wait_for_everyone()
    check_same_data(record, job.data.sha256)
    return {key: value for key, value in read_json(record).items() if key != "data_sha256"}


def _generate(job: TrainingJob, batch_size: int, device: str) -> float:
    """Generate the images unless finished. Returns the seconds that it took."""
    settings, record = job.settings, job.folder / SAMPLING
    if not record.is_file():
        started = time.monotonic()
        unet, schedule = load_network(str(job.folder / PIPELINE_DIR), job.side, job.experiment.channels)
        sampler = make_sampler(settings.sampler, schedule, settings.num_inference_steps)
        count, network = settings.num_images, unet.eval().to(device)
        generate_all(network, sampler, job.folder, count, job.seed, batch_size, settings.conditions)
        if PartialState().is_main_process:
            write_json(record, {"seconds": round(time.monotonic() - started, 1)})
        PartialState().wait_for_everyone()
    return float(read_json(record)["seconds"])


def _measure(job: TrainingJob, classifier: Classifier, options: RunOptions, device: str) -> list[Row]:
    """The metrics of the generated images; also writes samples.png."""
    images, normal = from_bytes(load_samples(job.folder)), job.experiment.normal
    rows = score.measure(
        images,
        job.data,
        normal,
        classifier,
        fidelity_of(job.experiment),
        inception_weights=options.inception_weights,
        device=device,
    )
    shown = images[: score.MAX_SHOWN]
    sheet = score.image_grid(shown, ~classifier.is_normal(shown, normal))
    with atomic_path(job.folder / SHEET) as temporary:
        sheet.save(temporary, "PNG")
    return rows


def _record(job: TrainingJob, cost: dict[str, Any], classifier: Classifier, rows: list[Row]) -> None:
    """Write results.json, the last file of a run."""
    record = {
        "schema_version": 1,
        "kind": "paper",
        "experiment": job.experiment.name,
        "size": job.size,
        "seed": job.seed,
        "settings": as_json(job.settings) | ({"betas": cost["betas"]} if cost.get("betas") else {}),
        "counts": job.counts,
        "classifier": classifier.record(job.experiment.normal),
        "rows": [dataclasses.asdict(row) for row in rows],
        "cost": {k: v for k, v in cost.items() if k != "betas"},
        "data_sha256": job.data.sha256,
        "weights_sha256": file_sha256(job.folder / WEIGHTS),
        "version": __version__,
        "versions": {p: version(p) for p in PACKAGES},
        "commit": commit(),
        "created": timestamp(),
    }
    write_json(job.folder / RESULTS, record)
