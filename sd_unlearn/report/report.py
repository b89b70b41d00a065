"""`sd-unlearn report`: results.json -> report.html (one file with its images), report.md, results.csv. No torch."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from sd_unlearn.config.base import ReportConfig
from sd_unlearn.config.options import check_ranges
from sd_unlearn.data.concept import Concept
from sd_unlearn.data.layout import BASELINES
from sd_unlearn.data.several import read_concepts
from sd_unlearn.errors import UsageError
from sd_unlearn.io import run_folder
from sd_unlearn.io.files import write_text
from sd_unlearn.io.lock import remove_leftovers
from sd_unlearn.io.own_files import check_own_reports
from sd_unlearn.io.paths import public_name
from sd_unlearn.io.reading import read_json, read_jsonl, read_yaml
from sd_unlearn.report import charts, compare, metric_cards, reproduce, training_curves
from sd_unlearn.report.attacks import attack_note, attack_sections, failures
from sd_unlearn.report.before_after import before_after, with_known_faces
from sd_unlearn.report.cases import Case, cases_of
from sd_unlearn.report.certificate import certificate
from sd_unlearn.report.csv_table import rows_csv
from sd_unlearn.report.examples import examples
from sd_unlearn.report.formatting import GONE, finite, is_rate, listed
from sd_unlearn.report.headline import answers
from sd_unlearn.report.jinja import environment, script
from sd_unlearn.report.lines import Line
from sd_unlearn.report.metric_names import explanations
from sd_unlearn.report.preview import preview
from sd_unlearn.results import Results, read_results

HTML, MARKDOWN, TABLE, CERTIFICATE = "report.html", "report.md", "results.csv", "certificate.html"
NOT_ATTACKED = (
    "Only the prompts listed were tried. Other words, input images, or prompts optimized to find the concept may bring "
    "it back (sd-unlearn attack tries)."
)
ATTACKED = (
    "Only the prompts and attacks listed were tried. Stronger attacks, with more steps or another start, may bring "
    "more back."
)
FORGETS = {  # by SubjectEntry.method
    "LoRA": "The LoRA does the forgetting. At weight 0, or without the file, the base generates the concept as before: "
    "this does not protect against anyone who has the base.",
    "safe latent diffusion": "Safe latent diffusion only guides the sampling. Without it the base generates the "
    "concept as before: this does not protect against anyone who has the base.",
    "": "Images were given. How they were generated, and what other images of the same model show, is not known.",
}
LIMITS = (
    "The detector is a program and makes errors. It also looked at the base's images, so compare the two columns "
    "rather than trust a single value.",
    NOT_ATTACKED,
    "An interval covers the random choice of images. It covers neither the detector's errors nor what another training "
    "seed would have given.",
)
HOLDS_FOR = {
    "LoRA": "The values hold for this base, sampler and guidance scale. Other bases, and other LoRAs loaded together "
    "with this one, were not tried.",
    "safe latent diffusion": "The values hold for this base, sampler and guidance scale. Other bases were not tried.",
}
LIMIT_OF_SEVERAL = (
    "A LoRA chosen because it looks best among many will look a little worse on new images. Evaluate it again with "
    "another --seed."
)
T = TypeVar("T")


def run(config: ReportConfig) -> Path:
    """Write report.html, report.md and results.csv (and certificate.html) into the folder of a results.json.

    Returns:
        Path of report.html.

    Raises:
        UsageError: --run is missing or not a folder, results.json or another file of the run is missing or damaged,
            --blur_faces has no faces to blur, or a file of the user's has the name of a report.
        UnlearnError: the folder cannot be written.
    """
    if config.run is None:
        raise UsageError("--run is missing. Give the folder of a finished evaluation, e.g. --run runs/seven.")
    check_ranges(config)
    folder = Path(config.run)
    results = read_results(folder)
    _check_current(folder, results)
    content = context(folder, results, config)
    html, text = environment(escape=True), environment(escape=False)
    # render everything before the first file is replaced
    files = {
        TABLE: rows_csv(({}, row) for row in results.rows),
        MARKDOWN: text.get_template("report.md.j2").render(content),
        HTML: html.get_template("report.html.j2").render(content),
    }
    if config.certificate:
        pages = certificate(folder, results, content["cases"])
        files = {CERTIFICATE: html.get_template("certificate.html.j2").render(pages), **files}
    check_own_reports(folder, files)
    remove_leftovers(folder, list(files))
    for name, rendered in files.items():
        write_text(folder / name, rendered)
    if content["without_faces"]:
        names = ", ".join(content["without_faces"])
        print(f"--blur_faces left out the images of {names}: no face detector was run on them.", file=sys.stderr)
    if config.certificate:
        print(f"Certificate: {folder / CERTIFICATE}", file=sys.stderr)  # stdout holds only the report's path
    return folder / HTML


def _check_current(folder: Path, results: Results) -> None:
    """Refuse results that were measured on other weights than the run folder now holds.

    Raises:
        UsageError: names both hashes.
    """
    try:
        current = run_folder.weights_sha256(folder)
    except UsageError:
        return  # not a run folder: an evaluation of several LoRAs
    measured = {subject.sha256 for subject in results.compared if subject.what == "lora" and subject.sha256}
    if measured and current not in measured:
        raise UsageError(
            f"{folder / run_folder.RESULTS} was measured on other weights (SHA-256 {min(measured)[:12]}) than the run "
            f"holds now ({current[:12]}). Run sd-unlearn evaluate --run {shlex.quote(str(folder))} again."
        )


def context(folder: Path, results: Results, config: ReportConfig) -> dict[str, Any]:
    """Everything the templates show. It does not depend on the time of writing.

    Raises:
        UsageError: a file of the run is damaged, or only the base was evaluated.
    """
    cases = cases_of(results)
    if not cases:
        raise UsageError(f"{folder / run_folder.RESULTS} evaluates only the base, so there is nothing to report.")
    single = cases[0] if len(cases) == 1 else None
    training = _training(folder) if single else {}
    one = _details(folder, single, results, training) if single else None
    cards = metric_cards.cards_of(results)
    concepts = compare.summary(cases)
    shown = [single] if single else [row.best for row in concepts if row.best]
    attacks = attack_sections(results, cases, folder, config.blur_faces)
    pictured, faceless = with_known_faces(results) if config.blur_faces else (results, [])
    title = (single.verdict, single.explanation) if single else compare.headline(cases)
    return {
        "title": heading(cases, one["concept"] if one else None),
        "one": one,
        "cases": cases,
        "results": results,
        "base": reproduce.base_record(training.get("base"), results.base),
        "verdict": title[0],
        "explanation": title[1],
        "gone": GONE,
        "bar_end": max([1.0, *(end for case in cases for end in _bar_ends(case.lines))]),
        "terms": explanations(row.metric for row in results.rows),
        "summary": concepts,
        "reasons": [] if single else compare.reasons(cases),
        "table": compare.table(results, cases),
        "differences": compare.differences(results),
        "charts": charts.charts(cases),
        "pairs": before_after(pictured, folder, config.max_pairs, config.blur_faces),
        "without_faces": faceless,
        "examples": examples(pictured, folder, shown, config.blur_faces),
        "example_concepts": {row.concept.slug: row.concept.name for row in concepts},
        # no detector looked for faces on the preview, so it is left out if faces must be hidden
        "preview": one["preview"] if one and not config.blur_faces else None,
        "attacks": attacks,
        "failed_attacks": failures(results),
        "attack_note": attack_note(attacks[0]) if single and attacks else "",
        "cards": cards,
        "anchors": {card.detector: card.id for card in cards},
        "commands": reproduce.commands(folder, results.attacks),
        "facts": reproduce.run_record(results, single, training),
        "limits": _limits(results, single is not None),
        "script": script(),
    }


def _limits(results: Results, is_single: bool) -> list[str]:
    """What the values do not say. With attacks, that only these were tried."""
    methods = {subject.method for subject in results.compared}
    limits = [ATTACKED if limit == NOT_ATTACKED and results.attacks else limit for limit in LIMITS]
    limits = [*(text for method, text in FORGETS.items() if method in methods), *limits]
    limits += [text for method, text in HOLDS_FOR.items() if method in methods][:1]  # that of LoRAs says more
    return limits if is_single else [*limits, LIMIT_OF_SEVERAL]


def heading(cases: Sequence[Case], concept: Concept | None) -> str:
    """The title of the page. concept: that of the run, which spells the name as the user did."""
    if concept:
        return f"Forgetting “{concept.name}”"
    names = list(dict.fromkeys(case.concept.name for case in cases))
    return f"Forgetting {len(names)} concepts" if len(names) > 3 else f"Forgetting {listed(names)}"


def _training(folder: Path) -> dict[str, Any]:
    """The content of training.json; empty without one."""
    training = _optional(folder / run_folder.TRAINING, read_json) or {}
    mappings = ("base", "seeds", "cost", "versions")
    if not isinstance(training, dict) or not all(isinstance(training.get(k) or {}, dict) for k in mappings):
        raise UsageError(f"{folder / run_folder.TRAINING} is not the record of a training. Run sd-unlearn train again.")
    return training


def _details(folder: Path, case: Case, results: Results, training: dict[str, Any]) -> dict[str, Any]:
    """What the page of a single LoRA shows from the files of its run, if the folder is a run.

    Raises:
        UsageError: a file is damaged; names it.
    """
    log = _optional(folder / run_folder.METRICS, read_jsonl) or []
    trained = _optional(folder / run_folder.CONCEPT, read_concepts)
    parts = trained.parts if trained else ()
    concept = next((part for part in parts if part.slug == case.concept.slug), None)  # it can be evaluated on another
    beta = (case.subject.training or {}).get("beta", training.get("beta"))
    beta = beta if isinstance(beta, int | float) and 0 < beta < 1 else None
    objective, target = ((case.subject.training or {}).get(key, training.get(key)) for key in ("objective", "target"))
    return {
        "concept": concept,
        "preview": preview(folder, trained),
        "settings": _settings(folder),
        "beta": beta,
        "baseline": objective if objective in BASELINES else None,
        "is_teacher": target == "teacher",
        "answers": answers(case, case.subject.cost or training.get("cost") or {}),
        "curves": training_curves.training_charts(log, None if target == "teacher" else beta),
    }


def _settings(folder: Path) -> dict[str, Any]:
    """The options of the training, paths without the user's folders; empty without config.yaml."""
    settings = _optional(folder / run_folder.CONFIG, lambda path: read_yaml(path, "--run")) or {}
    return {key: _public(value) for key, value in settings.items()}


def _public(value: Any) -> Any:
    """An option without the user's folders, also in lists and in name=/folder."""
    if isinstance(value, list):
        return [_public(item) for item in value]
    if not isinstance(value, str):
        return value
    name, equals, path = value.partition("=")
    public = public_name(value)
    return f"{name}={public_name(path)}" if equals and public == value else public


def _optional(path: Path, read: Callable[[Path], T]) -> T | None:
    return read(path) if path.is_file() else None


def _bar_ends(lines: Sequence[Line]) -> list[float]:
    """Every rate and interval end, to scale the bars: a retention can exceed 1."""
    rows = [row for line in lines for row in (line.base, line.lora) if row and is_rate(row)]
    return [v for row in rows for v in (row.value, row.high) if finite(v)]
