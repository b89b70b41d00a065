"""Which files in a folder sd-unlearn wrote: nothing else is ever deleted or replaced.

A folder is recognized by its marker, which only sd-unlearn writes. Deleting a run removes the names listed here and
then the folders that are empty.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from sd_unlearn import __version__
from sd_unlearn.errors import UsageError
from sd_unlearn.io.files import timestamp, write_json
from sd_unlearn.io.lock import HOLDER, LOCK
from sd_unlearn.io.paths import concept_slug
from sd_unlearn.io.reading import read_json, read_yaml_value
from sd_unlearn.io.run_folder import (
    ADAPTER_DIR,
    BEST_DIR,
    CALIBRATION,
    CHECKPOINT_DIR,
    CONCEPT,
    CONFIG,
    DIFFUSERS_FILE,
    EVALUATION,
    EXPORT_DIR,
    METRICS,
    PROBE,
    RESULTS,
    TEXT_ADAPTER_DIR,
    TRAINING,
    UNET_DIR,
)

MARKER = ".sd-unlearn-run"
# Files that `report`, a sweep and `paper table` write -> what each of them contains near its beginning, and a file of
# the user's does not.
REPORT = {
    "report.html": r"<title>[^<]* sd-unlearn report</title>",
    "report.md": r"\A(<!-- Written by sd-unlearn|# Forgetting (“|\d+ concepts))",
    "results.csv": r"\A(\w+,)*metric,group,subject,value,n,",
    "certificate.html": r"<title>[^<]*certificate[^<]* sd-unlearn</title>",
}
SWEEP_REPORT = {
    "sweep.html": r"<title>[^<]* sd-unlearn sweep</title>",
    "sweep.md": r"\A# Forgetting “[^\n]*”: how strongly\?",
    "sweep.csv": r"\Afactor,beta,push,metric,group,subject,value,n,",
}
PAPER_TABLES = {
    "table.md": r"\A# Results of the paper's experiments\n",
    "runs.csv": r"\Afile,experiment,size,seed,",
    "groups.csv": r"\Aexperiment,size,objective,",
}
_REPORTS = REPORT | SWEEP_REPORT | PAPER_TABLES
LATER = (RESULTS, EVALUATION, CALIBRATION, *REPORT, "paper.json")
_BEGINNING = 1 << 16  # bytes
CARD = "README.md"  # the model card of an export
_SEAL = "<!-- Written by sd-unlearn. SHA-256 of the text above: "
_ADAPTER = r"adapter_config\.json|adapter_model\.(safetensors|bin)|README\.md"
# Folders that are replaced as a whole -> the names of the files in them.
_WEIGHTS = {
    ADAPTER_DIR: _ADAPTER,
    TEXT_ADAPTER_DIR: _ADAPTER,
    UNET_DIR: r"config\.json|diffusion_pytorch_model.*\.safetensors(\.index\.json)?",
}
_SHA8 = "[0-9a-f]{8}"
# Regular expressions of the paths, relative to the folder, of what a training and the later commands write.
_RUN = (
    *(re.escape(name) for name in (TRAINING, CONFIG, CONCEPT, METRICS, *LATER)),
    *(f"{folder}/({names})" for folder, names in _WEIGHTS.items()),
    rf"{CHECKPOINT_DIR}/step-\d+/(checkpoint\.json|state\.pt|weights\.safetensors)",
    r"previews/step-\d+\.png",
    rf"images/[^/]+/([a-z0-9-]+-{_SHA8}-\d+\.png|{_SHA8}-[^/]+)",
    r"tensorboard/(.*/)?(events\.out\.tfevents\.[^/]+|hparams\.yml)",
)
RUN = (*_RUN, *(f"{BEST_DIR}/{path}" for path in (*_RUN, re.escape(PROBE))))
SWEEP = (r"sweep\.(yaml|json|html|md|csv)", *(rf"factor-[^/]+/{path}" for path in (*RUN, re.escape(MARKER))))
PAPER = (
    *RUN,
    r"sampl(es\.npz|es\.png|ing\.json)",
    r"samples-parts/\d+-\d+\.npy",
    r"pipeline/(.*/)?(model_index|config|scheduler_config)\.json",
    r"pipeline/(.*/)?diffusion_pytorch_model\.safetensors",
)
CHECKPOINT = (r"checkpoint\.json|state\.pt|weights\.safetensors",)


Kind = Literal["run", "sweep", "evaluation", "paper"]


def mark(folder: Path, kind: Kind) -> None:
    """Write the marker unless the folder has it."""
    if kind_of(folder) != kind:
        created = timestamp()
        write_json(folder / MARKER, {"schema_version": 1, "kind": kind, "version": __version__, "created": created})


def mark_evaluation(folder: Path) -> None:
    """Mark a folder that an evaluation writes into, unless it is marked already or belongs to a run."""
    if not kind_of(folder) and not is_run(folder):
        mark(folder, "evaluation")


def kind_of(folder: Path) -> str | None:
    """What sd-unlearn made the folder for, according to its marker; None without one."""
    try:
        marker = read_json(folder / MARKER)
    except UsageError:
        return None
    return str(marker.get("kind")) if isinstance(marker, dict) else None


def is_run(folder: Path) -> bool:
    """Whether sd-unlearn trained in a folder: it has the marker or, in older ones, what a training leaves."""
    checkpoints = (folder / CHECKPOINT_DIR).glob("step-*/checkpoint.json")
    older = (folder / CONCEPT).is_file() and ((folder / TRAINING).is_file() or any(checkpoints))
    return kind_of(folder) == "run" or older


def is_free(folder: Path) -> bool:
    """Whether a folder is missing or empty, apart from locks and temporary files of killed processes."""
    return not folder.is_dir() or all(_is_temporary(path.name) for path in folder.iterdir())


def _is_temporary(name: str) -> bool:
    return name in (LOCK, HOLDER) or re.fullmatch(r"\..+\.\d+@.+\.(tmp|old)", name, re.DOTALL) is not None


def check_no_foreign_weights(folder: Path, option: str) -> None:
    """Refuse files of others in the folders that a training replaces as a whole.

    Raises:
        UsageError
    """
    for parent in (folder, folder / BEST_DIR):
        for name, own in _WEIGHTS.items():
            place = parent / name
            for path in place.iterdir() if place.is_dir() else []:
                if not re.fullmatch(own, path.name) and not _is_temporary(path.name):
                    raise UsageError(
                        f"{option} {folder}: sd-unlearn did not write {path}, and the folder {place.name} would be "
                        "replaced. Move the file elsewhere."
                    )


def is_own_report(file: Path) -> bool:
    """Whether sd-unlearn wrote a report or table, judging by its content. file: named as one of them."""
    try:
        with file.open("rb") as opened:
            beginning = opened.read(_BEGINNING).decode("utf-8", "replace")
    except OSError:
        return False
    return re.search(_REPORTS[file.name], beginning) is not None


def sealed(card: str) -> str:
    """A model card with a last line by which `is_own_card` recognizes it, unless it was changed."""
    return f"{card}{_SEAL}{hashlib.sha256(card.encode()).hexdigest()} -->\n"


def is_own_card(file: Path) -> bool:
    """Whether a model card is as `export` wrote it; False for any other file and for a missing one."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    return text == sealed(text.rpartition(_SEAL)[0])


def check_own_reports(folder: Path, names: Iterable[str], option: str = "--run") -> None:
    """Refuse to replace files of the user's that have the names of a report or table. option: that names the folder.

    Raises:
        UsageError
    """
    for file in (folder / name for name in names):
        if file.exists() and not is_own_report(file):
            raise UsageError(
                f"{option} {folder} holds {file.name}, which sd-unlearn did not write. Rename or move it: it would be "
                "replaced."
            )


def delete_own(folder: Path, patterns: Sequence[str]) -> None:
    """Delete the files whose paths match one of the patterns, and then the folders that are empty.

    Everything else stays, and so do links to folders and what they lead to.
    """
    own = re.compile("|".join(f"({pattern})" for pattern in (*patterns, *_exports(folder))), re.DOTALL)
    entered: list[Path] = []
    for path in list(_files(folder, entered)):
        if own.fullmatch(path.relative_to(folder).as_posix()) and not _is_changed(path):
            path.unlink()
    for place in reversed(entered):
        with contextlib.suppress(OSError):  # not empty
            place.rmdir()


def _is_changed(file: Path) -> bool:
    """Whether a file that is named as a report or model card of ours is another one, or was changed."""
    if file.name == CARD and file.parent.name == EXPORT_DIR:
        return not is_own_card(file)
    return file.name in _REPORTS and not is_own_report(file)


def _files(folder: Path, entered: list[Path]) -> Iterator[Path]:
    """The files under a folder, training.json first: without it a run is not finished."""
    for path in sorted(folder.iterdir(), key=lambda p: (p.name != TRAINING, p.name)) if folder.is_dir() else []:
        if path.is_dir() and not path.is_symlink():
            entered.append(path)
            yield from _files(path, entered)
        elif not path.is_dir():
            yield path


def _exports(folder: Path) -> tuple[str, ...]:
    """Patterns of what `export` wrote into a run folder; the file for ComfyUI is named after the concept."""
    try:
        concept = read_yaml_value(folder / CONCEPT, "--output_dir")
        # the name of several concepts is cut, as training.json has it
        name = read_json(folder / TRAINING)["concept"] if isinstance(concept, list) else concept["name"]
        slug = concept_slug(str(name))
    except (UsageError, KeyError, TypeError):
        return ()
    files = (DIFFUSERS_FILE, f"{slug}.safetensors", CARD, "pairs.png", "comfyui-workflow.json")
    names = "|".join(map(re.escape, files))
    return tuple(f"{parent}{EXPORT_DIR}/({names})" for parent in ("", f"{BEST_DIR}/"))


def check_evaluation_folder(folder: Path, option: str) -> None:
    """Refuse a folder with results.json, evaluate.yaml or images/ that sd-unlearn did not write. Changes nothing.

    Raises:
        UsageError
    """
    if kind_of(folder) or is_run(folder) or _has_own_results(folder):
        return
    for name in (RESULTS, EVALUATION, "images"):
        if (folder / name).exists():
            raise UsageError(
                f"{option} {folder} holds {name}, which sd-unlearn did not write and would replace. Choose another "
                "folder."
            )


def _has_own_results(folder: Path) -> bool:
    try:
        results = read_json(folder / RESULTS)
    except UsageError:
        return False
    return isinstance(results, dict) and {"schema_version", "subjects", "rows"} <= results.keys()
