"""`paper run`: one model trained, drawn from and judged -> <output_dir>/<experiment>/<variant>/results.json.

The stages meet on disk, so a run that was killed goes on where it was, and one that is finished is not done again.
"""

from __future__ import annotations

import dataclasses
import shutil
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
from sd_unlearn.io.files import check_writable, file_sha256, read_json, read_yaml, write_json, write_text
from sd_unlearn.io.run_folder import CONFIG, RESULTS, TRAINING
from sd_unlearn.metrics.fidelity import InceptionFidelity
from sd_unlearn.paper.ddpm.datasets import load_dataset
from sd_unlearn.paper.ddpm.sample import as_pictures, draw_all, load_samples, make_sampler
from sd_unlearn.paper.ddpm.split import split
from sd_unlearn.paper.ddpm.train import TrainingJob, train
from sd_unlearn.paper.ddpm.unet import PIPELINE_DIR, load_network
from sd_unlearn.paper.experiments import CLASSES, DIGITS, Experiment, find_experiment
from sd_unlearn.paper.judge import score
from sd_unlearn.paper.judge.classifier import Classifier, get_classifier
from sd_unlearn.paper.options import RunOptions
from sd_unlearn.paper.settings import ExperimentSettings, plain_settings, resolve, variant_of
from sd_unlearn.results import Row
from sd_unlearn.training.provenance import PACKAGES, commit
from sd_unlearn.training.trainer import PATIENCE

SHEET, SAMPLING = "samples.png", "sampling.json"
CLASSIFIERS = "classifiers"  # beside the runs: all runs of a dataset share one
WEIGHTS = f"{PIPELINE_DIR}/unet/diffusion_pytorch_model.safetensors"


def run(name: str, options: RunOptions) -> Path:
    """Do what is missing of one run. Returns its folder, which then holds results.json.

    Raises:
        UsageError, UnlearnError: what is wrong, checked before anything heavy loads wherever that is possible.
        Interrupted: Ctrl-C while training; a checkpoint was saved.
    """
    experiment = find_experiment(name)
    settings, counts, size = resolve(experiment, options)
    folder = folder_of(experiment, options)
    check_writable(folder, "--output_dir")
    told = {"experiment": name, "size": size, "seed": options.seed, **_plain(settings)}
    check_same(folder, told, options.overwrite)
    if (folder / RESULTS).is_file() and not options.overwrite:
        print(f"{folder} is finished; --overwrite starts over.", file=sys.stderr)
        return folder
    check_distance(experiment, options)
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)  # the first process judges alone
    with state.main_process_first():  # which may download
        data = load_dataset(experiment.dataset, options.data_root)
    names = CLASSES[experiment.dataset]
    normal, sensitive, missing = (
        [names.index(n) for n in group] for group in (experiment.normal, experiment.sensitive, settings.missing)
    )
    images = split(data.labels, normal, sensitive, counts, options.seed, missing, settings.num_negative)
    if state.is_main_process:
        if options.overwrite:
            shutil.rmtree(folder, ignore_errors=True)
        write_text(folder / CONFIG, yaml.safe_dump(told, sort_keys=False))
    state.wait_for_everyone()
    job = TrainingJob(experiment, settings, size, options.seed, data, images, folder, options.checkpointing_steps)
    cost = _train(job)
    device = str(state.device)
    cost["sampling_seconds"] = _draw(job, options.sample_batch_size, device)
    if state.is_main_process:
        classifier = get_classifier(data, job.side, size, 0, device, options.output_dir / CLASSIFIERS)
        rows = _judge(job, classifier, options, device)
        _record(job, cost, classifier, rows)
    state.wait_for_everyone()
    return folder


def folder_of(experiment: Experiment, options: RunOptions) -> Path:
    """Where a run of these options lies; the same for the same settings.

    Raises:
        UsageError: as resolve.
    """
    settings, _, size = resolve(experiment, options)
    variant = variant_of(settings, plain_settings(experiment, settings, size), size, options.seed)
    return options.output_dir / experiment.name / variant


def check_same(folder: Path, told: dict[str, Any], overwrite: bool) -> None:
    """Refuse a folder of another run or of something else.

    Raises:
        UsageError
    """
    if overwrite or not folder.is_dir() or not any(folder.iterdir()):
        return
    config = folder / CONFIG
    if not config.is_file():
        raise UsageError(f"--output_dir: {folder} holds files that are no run of `paper`; name another place.")
    before = read_yaml(config, "--output_dir")
    changed = [key for key in told if before.get(key) != told[key]]
    if changed:
        key = changed[0]
        raise UsageError(
            f"{folder} holds a run with {key} {before.get(key)}, and this one has {told[key]}. Name another "
            "--output_dir, or add --overwrite to start over."
        )


def distance_of(experiment: Experiment) -> score.Fidelity:
    """Whose features the distance to real pictures is measured by."""
    return "digits" if CLASSES[experiment.dataset] == DIGITS else "inception"


def check_distance(experiment: Experiment, options: RunOptions) -> None:
    """Fetch what the distance needs before hours of training rather than after.

    Raises:
        UsageError, UnlearnError: as InceptionFidelity.
    """
    if distance_of(experiment) == "inception":
        InceptionFidelity(options.inception_weights)


def _train(job: TrainingJob) -> dict[str, Any]:
    """The cost of the training, which is done unless it is finished."""
    record = job.folder / TRAINING
    if not record.is_file():
        unlabeled, labeled = job.counts["normal"] + job.counts["mixed_in"], job.counts["positive"]
        images = f"{unlabeled:,} unlabeled and {labeled:,} labeled sensitive images"
        print(f"{job.folder}: {job.settings.max_train_steps:,} steps on {images}.", file=sys.stderr)
        cost = train(job)
        if PartialState().is_main_process:
            write_json(record, cost)
            shutil.rmtree(job.folder / "checkpoints", ignore_errors=True)  # large, and nobody goes on from here
        PartialState().wait_for_everyone()
    return dict(read_json(record))


def _draw(job: TrainingJob, batch_size: int, device: str) -> float:
    """The seconds that the pictures took; no network is loaded where they are drawn already."""
    settings, record = job.settings, job.folder / SAMPLING
    if not record.is_file():
        started = time.monotonic()
        unet, schedule = load_network(str(job.folder / PIPELINE_DIR), job.side, job.experiment.channels)
        sampler = make_sampler(settings.sampler, schedule, settings.num_inference_steps)
        count, network = settings.num_images, unet.eval().to(device)
        draw_all(network, sampler, job.folder, count, job.seed, batch_size, settings.conditions)
        if PartialState().is_main_process:
            write_json(record, {"seconds": round(time.monotonic() - started, 1)})
        PartialState().wait_for_everyone()
    return float(read_json(record)["seconds"])


def _judge(job: TrainingJob, classifier: Classifier, options: RunOptions, device: str) -> list[Row]:
    """What the classifier and the features say of the pictures; also the contact sheet."""
    pictures, normal = as_pictures(load_samples(job.folder)), job.experiment.normal
    rows = score.judge(
        pictures,
        job.data,
        normal,
        classifier,
        distance_of(job.experiment),
        inception_weights=options.inception_weights,
        device=device,
    )
    shown = pictures[: score.MOST_SHOWN]
    sheet = score.picture_grid(shown, ~classifier.is_normal(shown, normal))
    temporary = job.folder / f".{SHEET}"
    sheet.save(temporary, "PNG")
    temporary.replace(job.folder / SHEET)
    return rows


def _record(job: TrainingJob, cost: dict[str, Any], classifier: Classifier, rows: list[Row]) -> None:
    """results.json, the last file of a run."""
    record = {
        "schema_version": 1,
        "kind": "paper",
        "experiment": job.experiment.name,
        "size": job.size,
        "seed": job.seed,
        "settings": _plain(job.settings) | ({"betas": cost["betas"]} if cost.get("betas") else {}),
        "counts": job.counts,
        "classifier": classifier.record(job.experiment.normal),
        "rows": [dataclasses.asdict(row) for row in rows],
        "cost": {k: v for k, v in cost.items() if k != "betas"},
        "data_sha256": job.data.sha256,
        "weights_sha256": file_sha256(job.folder / WEIGHTS),
        "version": __version__,
        "versions": {p: version(p) for p in PACKAGES},
        "commit": commit(),
        "created": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
    }
    write_json(job.folder / RESULTS, record)


def _plain(settings: ExperimentSettings) -> dict[str, Any]:
    """The settings as JSON has them."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(settings).items()}
