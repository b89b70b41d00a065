"""The options of the `paper` commands. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Group

from sd_unlearn.choices import Correction, Precision, Reduction
from sd_unlearn.config.base import Seed
from sd_unlearn.config.objective import Method
from sd_unlearn.config.options import POSITIVE, BatchSize, Count, InferenceSteps, Range, SomeImages, option
from sd_unlearn.config.paths import PathOptions
from sd_unlearn.paper.experiments import Sampler, Size

ObjectiveName = Literal["pu", "pnu", "supervised", "unsupervised"]

OBJECTIVE = Group("Objective and seed", sort_key=0)
VARIANT = Group("Variants", sort_key=1)
DATA = Group("Data", sort_key=2)
TRAINING = Group("Training (defaults: the experiment's, see paper list)", sort_key=3)
EVALUATION = Group("Generated images and metrics", sort_key=4)
FILES = Group("Files and output", sort_key=5)


@dataclass(kw_only=True)
class SharedOptions(PathOptions):
    """The options that `run` and `sweep` share."""

    size: Annotated[
        Size | None,
        option(
            "paper: the paper's network and schedule, for a GPU. tiny: minutes on a CPU. Default: tiny for mnist5k, "
            "else paper.",
            VARIANT,
        ),
    ] = None
    method: Annotated[
        Method, option("Text-to-image models only: train the whole UNet, as in the paper, or a LoRA.", VARIANT)
    ] = "full"
    correction: Annotated[
        Correction,
        option("How pu and pnu handle a negative bracket: abs (the paper's), nn (nnPU) or none (uPU).", VARIANT),
    ] = "abs"
    eta: Annotated[
        float,
        option(
            "pnu only: weight of the labeled normal images, in (0, 1].",
            VARIANT,
            Range(above=0, at_most=1, note="it is a weight, e.g. 0.5"),
        ),
    ] = 0.5
    conditional: Annotated[
        bool,
        option(
            "MNIST only: condition the network on the pair of the digit (0 or 1, 2 or 3, ...), which contains a normal "
            "and a sensitive one.",
            VARIANT,
        ),
    ] = False

    contamination: Annotated[
        float | None,
        option(
            "Share of sensitive images among the unlabeled ones. Default: the paper's 1/11. 0 (unsupervised only): "
            "a reference model that never saw a sensitive image.",
            DATA,
            Range(at_least=0, below=1, note="it is a share, e.g. 0.2"),
        ),
    ] = None
    missing: Annotated[
        str | None,
        option("Sensitive classes without labeled images, e.g. 9 or bird,cat; they stay in the unlabeled ones.", DATA),
    ] = None
    num_negative: Annotated[
        int | None,
        option("pnu only: number of labeled normal images. Default: as many as labeled sensitive ones.", DATA, Count),
    ] = None

    epochs: Annotated[
        int | None,
        option("Passes over the unlabeled images, counted at the paper's contamination.", TRAINING, Count),
    ] = None
    max_train_steps: Annotated[int | None, option("Optimizer steps; overrides --epochs.", TRAINING, Count)] = None
    train_batch_size: Annotated[
        int | None, option("Unlabeled images per step; a third as many labeled ones are added.", TRAINING, BatchSize)
    ] = None
    learning_rate: Annotated[float | None, option("Learning rate after warm-up.", TRAINING, POSITIVE)] = None
    reduction: Annotated[
        Reduction | None,
        option("Loss of an image: sum over its pixels (the likelihood, as in the paper) or mean.", TRAINING),
    ] = None
    snr_gamma: Annotated[
        float | None,
        option(
            "Min-SNR weights of the timesteps (Hang et al. 2023), which emphasize high noise; 0: equal weights, as in "
            "the paper. Default: 5 for tiny, else 0.",
            TRAINING,
            Range(at_least=0),
        ),
    ] = None
    max_ratio: Annotated[
        float | None,
        option(
            "pu and pnu only: cap a labeled image's loss at N times (1 or more) the loss of an unlabeled one at the "
            "same timestep and noise; 0: no cap, as in the paper. Default: 4 for tiny, else 0.",
            TRAINING,
            Range(at_least=0),
        ),
    ] = None
    mixed_precision: Annotated[Precision, option("Precision of the network during training.", TRAINING)] = "no"
    pretrained_model_name_or_path: Annotated[
        str | None, option("Model to fine-tune instead of the experiment's: hub id or folder.", TRAINING)
    ] = None
    checkpointing_steps: Annotated[
        int, option("Save a checkpoint every N steps; an interrupted run resumes from it.", TRAINING, Count)
    ] = 500

    num_images: Annotated[int | None, option("Images to generate for the metrics.", EVALUATION, SomeImages)] = None
    sampler: Annotated[Sampler | None, option("ddpm or ddim.", EVALUATION)] = None
    num_inference_steps: Annotated[
        int | None,
        option("Sampler steps.", EVALUATION, InferenceSteps),
    ] = None
    sample_batch_size: Annotated[int, option("Images generated at once.", EVALUATION, BatchSize)] = 250
    inception_weights: Annotated[
        Path | None,
        option("InceptionV3 weights for fid-inception. Default: downloaded by torch-fidelity.", EVALUATION),
    ] = None

    data_root: Annotated[Path, option("Folder of the datasets; missing ones are downloaded into it.", FILES)] = Path(
        "data/paper"
    )
    output_dir: Annotated[Path, option("Runs are written to <output_dir>/<experiment>/<variant>.", FILES)] = Path(
        "runs/paper"
    )
    overwrite: Annotated[bool, option("Discard an existing run and start again.", FILES)] = False
    json: Annotated[bool, option("Print results.json instead of a summary.", FILES)] = False
    config: Annotated[Path | None, option("YAML file with these options as keys.", FILES)] = None
    debug: Annotated[bool, option("Show tracebacks.", FILES)] = False


@dataclass(kw_only=True)
class RunOptions(SharedOptions):
    """Train and evaluate one model."""

    objective: Annotated[
        ObjectiveName,
        option(
            "pu: the paper's. unsupervised: unlabeled images only. supervised: treats unlabeled images as normal. pnu: "
            "pu with labeled normal images.",
            OBJECTIVE,
        ),
    ] = "pu"
    beta: Annotated[
        float | Literal["known", "estimate"] | None,
        option(
            "Assumed share of sensitive images among the unlabeled ones, in (0, 1); known: the true share; estimate: "
            "estimated during training. Default: the paper's 0.1; for text-to-image models the true share.",
            OBJECTIVE,
            Range(above=0, below=1, note="it is a share, e.g. 0.1"),
        ),
    ] = None
    seed: Annotated[int, option("Seed of the data split, the weights and the noise.", OBJECTIVE, Seed)] = 42


@dataclass(kw_only=True)
class SweepOptions(SharedOptions):
    """Every combination of the listed objectives, betas and seeds; finished runs are skipped."""

    objective: Annotated[str, option("Comma-separated objectives, e.g. unsupervised,supervised,pu.", OBJECTIVE)] = "pu"
    beta: Annotated[
        str, option("Comma-separated betas, e.g. 0.05,0.1,0.2; known and estimate are accepted.", OBJECTIVE)
    ] = ""
    seed: Annotated[str, option("Comma-separated seeds, e.g. 42,43,44.", OBJECTIVE)] = "42"


@dataclass(kw_only=True)
class TableOptions(PathOptions):
    """The tables of finished runs."""

    runs: Annotated[Path, option("Folder of the runs, or of their collected records.")] = Path("runs/paper")
    output_dir: Annotated[
        Path | None,
        option("Folder for table.md, runs.csv, groups.csv and the plots. Default: <runs>/tables."),
    ] = None
    update: Annotated[
        Path | None, option("Update the tables between the markers of this Markdown document, and its plots.")
    ] = None
    collect: Annotated[
        Path | None,
        option("Copy each run's record (some kB) there; tables can be built from the copies alone."),
    ] = None
    config: Annotated[Path | None, option("YAML file with these options as keys.")] = None
    debug: Annotated[bool, option("Show tracebacks.")] = False
