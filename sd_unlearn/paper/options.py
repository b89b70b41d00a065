"""What the `paper` commands can be told. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Group

from sd_unlearn.choices import Correction, Reduction
from sd_unlearn.config.base import option
from sd_unlearn.config.train import Method
from sd_unlearn.paper.experiments import Sampler, Size

ObjectiveName = Literal["pu", "pnu", "supervised", "unsupervised"]

WHAT = Group("What is run", sort_key=0)
DATA = Group("The data", sort_key=1)
RECIPE = Group("Training (default: the experiment's, see paper list)", sort_key=2)
DRAWN = Group("Drawing and judging", sort_key=3)
PLACES = Group("Places", sort_key=4)


@dataclass(kw_only=True)
class Shared:
    """What one run and many have in common."""

    size: Annotated[
        Size | None,
        option(
            "paper: its own network and schedule, for a GPU. tiny: minutes on a CPU. Default: tiny for mnist5k.",
            WHAT,
        ),
    ] = None
    method: Annotated[
        Method, option("Of text-to-image models: train the whole UNet, as the paper does, or a LoRA.", WHAT)
    ] = "full"
    correction: Annotated[
        Correction, option("abs (the paper's), nn (max(0, .) with Kiryo's step) or none (uPU).", WHAT)
    ] = "abs"
    eta: Annotated[float, option("With pnu: weight in (0, 1] of the images known to be normal.", WHAT)] = 0.5
    conditional: Annotated[
        bool,
        option(
            "Tell the network a class that does not give away what is sensitive: a digit's pair (0 or 1, ...).",
            WHAT,
        ),
    ] = False

    contamination: Annotated[
        float | None,
        option(
            "True share of sensitive images among the unlabeled ones. Default: the paper's 1 in 11. 0, for "
            "unsupervised: the best there could be.",
            DATA,
        ),
    ] = None
    missing: Annotated[
        str | None,
        option("Sensitive classes that no labeled image shows, e.g. 9 or bird,cat; unlabeled images still do.", DATA),
    ] = None
    num_negative: Annotated[
        int | None, option("With pnu: images known to be normal. Default: as many as labeled sensitive ones.", DATA)
    ] = None

    epochs: Annotated[
        int | None,
        option("Passes over the unlabeled images, as many as there are at the paper's contamination.", RECIPE),
    ] = None
    max_train_steps: Annotated[int | None, option("Optimizer steps, in place of --epochs.", RECIPE)] = None
    train_batch_size: Annotated[
        int | None, option("Unlabeled images of a step; the labeled ones, a third as many, come on top.", RECIPE)
    ] = None
    learning_rate: Annotated[float | None, option("After warm-up.", RECIPE)] = None
    reduction: Annotated[
        Reduction | None, option("Per-example loss as sum over the pixels (the likelihood) or mean.", RECIPE)
    ] = None
    snr_gamma: Annotated[
        float | None,
        option(
            "Min-SNR weights of timesteps (Hang et al. 2023): they move the push to where it is decided what a "
            "picture shows; 0: all weigh the same, as in the paper. Default: 5 at tiny size, 0 else.",
            RECIPE,
        ),
    ] = None
    max_ratio: Annotated[
        float | None,
        option(
            "Of pu and pnu: a labeled image whose loss is this many times (1 or more) that of an unlabeled one at the "
            "same timestep and noise is pushed no further; 0: no bound, as in the paper. Default: 4 at tiny size, 0 "
            "else.",
            RECIPE,
        ),
    ] = None
    mixed_precision: Annotated[
        Literal["no", "fp16", "bf16"], option("Arithmetic of the network in training.", RECIPE)
    ] = "no"
    pretrained_model_name_or_path: Annotated[
        str | None, option("What to fine-tune, in place of the experiment's base: a DDPM's hub id or folder.", RECIPE)
    ] = None
    checkpointing_steps: Annotated[
        int, option("Everything needed to go on is saved every so many steps; a killed run goes on by itself.", RECIPE)
    ] = 500

    num_images: Annotated[int | None, option("Pictures drawn, for the rate and the distance.", DRAWN)] = None
    sampler: Annotated[Sampler | None, option("ddpm or ddim.", DRAWN)] = None
    num_inference_steps: Annotated[int | None, option("Sampler steps.", DRAWN)] = None
    sample_batch_size: Annotated[int, option("Pictures drawn at once.", DRAWN)] = 250
    inception_weights: Annotated[
        Path | None, option("File of InceptionV3 for fid-inception. Default: fetched by torch-fidelity.", DRAWN)
    ] = None

    data_root: Annotated[Path, option("Where datasets lie, or are downloaded to.", PLACES)] = Path("data/paper")
    output_dir: Annotated[Path, option("The runs go to <output_dir>/<experiment>/<variant>.", PLACES)] = Path(
        "runs/paper"
    )
    overwrite: Annotated[bool, option("Start over, whatever is finished.", PLACES)] = False
    json: Annotated[bool, option("Print results.json instead of a summary.", PLACES)] = False
    config: Annotated[Path | None, option("YAML file with these options as keys.", PLACES)] = None
    debug: Annotated[bool, option("Show tracebacks.", PLACES)] = False


@dataclass(kw_only=True)
class RunOptions(Shared):
    """Train, draw and judge one model: one row of a table."""

    objective: Annotated[
        ObjectiveName,
        option(
            "pu: the paper's. unsupervised: on the unlabeled images alone; supervised: unlabeled images taken for "
            "normal, the labeled ones pushed away; pnu: pu with some images known to be normal.",
            WHAT,
        ),
    ] = "pu"
    beta: Annotated[
        float | Literal["known", "estimate"] | None,
        option(
            "Prior in (0, 1); known: the true share; estimate: found while training. Default: the paper's 0.1; of "
            "text-to-image models the true share.",
            WHAT,
        ),
    ] = None
    seed: Annotated[
        int, option("Of the split, the weights and the noise; the paper's tables average over seeds.", WHAT)
    ] = 42


@dataclass(kw_only=True)
class SweepOptions(Shared):
    """Many runs, each finished one skipped: every combination of the lists."""

    objective: Annotated[str, option("One or several objectives, e.g. unsupervised,supervised,pu.", WHAT)] = "pu"
    beta: Annotated[
        str, option("One or several betas, e.g. 0.05,0.1,0.15,0.2,0.25; known and estimate are betas, too.", WHAT)
    ] = ""
    seed: Annotated[str, option("One or several seeds, e.g. 42,43,44.", WHAT)] = "42"


@dataclass(kw_only=True)
class TableOptions:
    """Finished runs as the paper's tables."""

    runs: Annotated[Path, option("Folder of the runs, or of their collected results.")] = Path("runs/paper")
    output_dir: Annotated[
        Path | None, option("Also write table.md, runs.csv and the plots there. Default: <runs>/tables.")
    ] = None
    update: Annotated[
        Path | None, option("Renew the tables between the markers of this Markdown document, and its plots.")
    ] = None
    collect: Annotated[
        Path | None, option("Copy every results.json there (some kB each): tables can be rebuilt from them alone.")
    ] = None
    config: Annotated[Path | None, option("YAML file with these options as keys.")] = None
    debug: Annotated[bool, option("Show tracebacks.")] = False
