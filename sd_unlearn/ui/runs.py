"""What the page offers from the working folder: LoRAs, and finished runs with their verdicts. Needs no Gradio."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from itertools import islice
from pathlib import Path
from urllib.parse import quote

from safetensors import SafetensorError, safe_open

from sd_unlearn.calibration import read_calibration
from sd_unlearn.data.several import read_concepts
from sd_unlearn.errors import UnlearnError, UsageError
from sd_unlearn.io.own_files import REPORT, is_own_report
from sd_unlearn.io.paths import path_inside
from sd_unlearn.io.run_folder import CONCEPT, IMAGE_DIR, RESULTS, TRAINING, weights_sha256
from sd_unlearn.report.cases import cases_of
from sd_unlearn.report.formatting import value_text
from sd_unlearn.results import read_results

DEPTH = 5  # levels of folders that are searched: the comparison of a job list is in runs/batch/lists/NAME/comparison
MOST = 20_000  # folders that are searched
SKIPPED = {
    *("node_modules", "data", "__pycache__", "adapter", "text_encoder_adapter", "unet", "checkpoints", "export"),
    IMAGE_DIR,  # of an evaluation: thousands of files
}
LORA_TENSOR = re.compile(r"lora|hada_|lokr_|\.diff(_b)?$")
REPORTS = ("report.html", "certificate.html")  # files that the page opens


@dataclass(frozen=True)
class Finished:
    """A run or evaluation with results, as the list of runs shows it."""

    name: str  # path relative to the working folder
    verdicts: tuple[str, ...]  # one for each LoRA and concept
    report: str | None  # name of its report; None: not written yet


def inside(root: Path, name: str) -> Path:
    """The path of a file or folder of the working folder.

    Raises:
        UsageError: it lies outside, also by a link, or does not exist.
    """
    path = path_inside(root, name)
    if path is None:
        raise UsageError(f"{name} is not in the folder {root.name}, in which sd-unlearn ui was started.")
    return path


def find_loras(root: Path) -> list[str]:
    """Run folders with a finished training and LoRA files, as paths relative to the working folder."""
    runs, files = [], []
    for folder, names in _walk(root):
        if TRAINING in names:
            runs.append(_relative(root, folder))
        else:
            files += [_relative(root, folder / n) for n in names if n.endswith(".safetensors") and _is_lora(folder / n)]
    return [*sorted(runs), *sorted(files)]


def _is_lora(file: Path) -> bool:
    """Whether a file has tensors that only LoRAs have; only its header is read."""
    try:
        with safe_open(file, framework="np") as opened:
            return any(LORA_TENSOR.search(name) for name in opened.keys())
    except (SafetensorError, OSError):
        return False


def find_finished(root: Path) -> list[Finished]:
    """Every folder with a results.json, newest first."""
    folders = [folder for folder, names in _walk(root) if RESULTS in names]
    folders.sort(key=lambda folder: (folder / RESULTS).stat().st_mtime, reverse=True)
    return [_finished(root, folder) for folder in folders]


def report_file(root: Path, run: str, name: str) -> Path:
    """A report in a run folder.

    Raises:
        UsageError: it lies outside the working folder, or is not a report that sd-unlearn wrote.
    """
    file = inside(root, f"{run}/{name}")
    if name not in REPORTS or name not in REPORT or not is_own_report(file):
        raise UsageError(f"{run}/{name} is not a report of sd-unlearn.")
    return file


def calibrated_strength(root: Path, names: list[str]) -> float:
    """The strength to start with: the calibrated one of a single run, else 1."""
    if len(names) != 1:
        return 1.0
    try:
        folder = inside(root, names[0])
        if not folder.is_dir():
            return 1.0
        found = read_calibration(folder, weights_sha256(folder), read_concepts(folder / CONCEPT).slug)
    except UnlearnError:
        return 1.0
    return 1.0 if found is None or found.strength is None else found.strength


def as_table(finished: list[Finished]) -> str:
    """The list of runs as HTML; names are escaped."""
    if not finished:
        return "<p>No results yet. Evaluate a run: <code>sd-unlearn evaluate --run runs/NAME</code>.</p>"
    rows = []
    for run in finished:
        place = quote(run.name)
        link = f'<a href="/reports/{place}/{run.report}" target="_blank">open</a>' if run.report else ""
        link = link or f"<code>sd-unlearn report --run {escape(run.name)}</code>"
        verdicts = "<br>".join(map(escape, run.verdicts))
        rows.append(f"<tr><td>{escape(run.name)}</td><td>{verdicts}</td><td>{link}</td></tr>")
    head = "<tr><th>run</th><th>verdict</th><th>report</th></tr>"
    return f'<div class="runs"><table>{head}{"".join(rows)}</table></div>'


def _finished(root: Path, folder: Path) -> Finished:
    try:
        cases = cases_of(read_results(folder))
    except UnlearnError as error:
        return Finished(_relative(root, folder), (f"Cannot be read: {error}",), None)
    verdicts = []
    for case in cases:
        leakage, retention = case.presence, case.retention
        numbers = f"leakage {value_text(leakage.lora)}" if leakage else ""
        numbers += f"{', ' if numbers else ''}retention {value_text(retention.lora)}" if retention else ""
        verdicts.append(f"{case.concept.name}, {case.label}: {case.verdict}{f' ({numbers})' if numbers else ''}")
    report = next((name for name in REPORTS if is_own_report(folder / name)), None)
    return Finished(_relative(root, folder), tuple(verdicts), report)


def cut_note(root: Path) -> str:
    """Says so if the working folder has more folders than are searched; else ""."""
    if sum(1 for _ in _walk(root)) < MOST:
        return ""
    return (
        f"Only the first {MOST:,} folders were searched for LoRAs and results. Start `sd-unlearn ui` in a smaller one."
    )


def _walk(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """(folder, names of its files) of the working folder, at most MOST. Hidden folders and links are not entered."""
    for place, folders, files in islice(os.walk(root), MOST):
        folder = Path(place)
        depth = len(folder.relative_to(root).parts)
        folders[:] = sorted(n for n in folders if not n.startswith(".") and n not in SKIPPED) if depth < DEPTH else []
        yield folder, sorted(files)


def _relative(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix()
