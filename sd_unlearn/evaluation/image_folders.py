"""Folders of ready pictures, of any method: what each picture was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sd_unlearn.data.concept import Concept, Prompt
from sd_unlearn.errors import UsageError, suggest
from sd_unlearn.evaluation.prompts import GROUPS, Shot, prompts_of
from sd_unlearn.io.files import read_jsonl_lines
from sd_unlearn.io.run_folder import IMAGE_SUFFIXES, METADATA


@dataclass(frozen=True)
class Ready:
    """Pictures and what they show. planned: they are those of the plan, in its order, to be compared one by one."""

    name: str
    folder: Path
    shots: list[Shot]
    paths: list[Path]
    planned: bool


def split_name(given: str, option: str) -> tuple[str | None, Path]:
    """[name=]folder.

    Raises:
        UsageError: no such folder.
    """
    name, equals, rest = given.partition("=")
    named = bool(equals) and not Path(given).is_dir()
    folder = Path(rest if named else given)
    if not folder.is_dir():
        raise UsageError(f"{option} {given}: {folder} is no folder.")
    return (name if named else None), folder


def read_ready(given: str, concept: Concept, planned: Sequence[Shot], alone: bool = True) -> Ready:
    """The pictures of a folder of --images.

    With any file of the plan they are the plan's, and those that are missing are counted as such. Else metadata.jsonl
    says what each was asked for, or the folder it lies in (direct/, held_out/, ...) does. Where the concept is not the
    only one (`alone`), metadata must say it, because a picture asks for one of them.

    Raises:
        UsageError: no folder, no pictures in any of these forms, or metadata that names none.
    """
    name, folder = split_name(given, "--images")
    name = name or folder.resolve().name
    paths = [folder / shot.file_name for shot in planned]
    if any(path.is_file() for path in paths):
        there = sum(path.is_file() for path in paths)
        if 2 * there < len(paths):  # what was not drawn would be taken for forgotten
            raise UsageError(
                f"--images {folder} holds {there:,} of the {len(paths):,} pictures asked for. Ask for what was "
                "drawn: --groups, --num_images, --num_keep_images; or draw the rest of --write_plan."
            )
        return Ready(name, folder, list(planned), paths, planned=True)
    if (folder / METADATA).is_file():
        found = _by_metadata(folder, concept, alone)
    elif alone or not any((folder / group).is_dir() for group in GROUPS):
        found = _by_folder(folder, concept)
    else:
        raise UsageError(
            f"--images {folder}: folders do not say which of several concepts a picture was asked for. Judge one "
            f"--concept at a time, or add a {METADATA} with file_name, text, group and concept."
        )
    if not found:
        raise UsageError(
            f"--images {folder} holds no pictures whose prompts can be told: give them the names of --write_plan, add "
            f"a {METADATA} (file_name, text, group), or sort them into folders {', '.join(GROUPS)}."
        )
    return Ready(name, folder, [shot for shot, _ in found], [path for _, path in found], planned=False)


def _by_metadata(folder: Path, concept: Concept, alone: bool) -> list[tuple[Shot, Path]]:
    known = {prompt.text: (group, prompt) for group in reversed(GROUPS) for prompt in prompts_of(concept, group)}
    found = []
    for number, line in read_jsonl_lines(folder / METADATA).items():
        where, text = f"{folder / METADATA} line {number}", line.get("text", line.get("prompt"))
        if not isinstance(line.get("file_name"), str) or not isinstance(text, str):
            raise UsageError(f"{where} needs file_name and text.")
        if not alone and "concept" not in line:
            raise UsageError(f"{where} needs a concept: several are judged, and a picture was asked for one of them.")
        if line.get("concept", concept.slug) != concept.slug:
            continue
        group = line.get("group") or (known[text][0] if text in known else None)
        if group not in GROUPS:
            raise UsageError(
                f'{where}: group "{group}" is none of {", ".join(GROUPS)}, and "{text}" is no prompt of the concept '
                f"file.{suggest(str(group), GROUPS)}"
            )
        prompt = known[text][1] if text in known and known[text][0] == group else Prompt(text)
        seed = line.get("seed")
        seed = seed if isinstance(seed, int) else number
        found.append((Shot(group, prompt, seed), folder / line["file_name"]))
    return found


def _by_folder(folder: Path, concept: Concept) -> list[tuple[Shot, Path]]:
    found = []
    for group in GROUPS:
        files = sorted(p for p in (folder / group).glob("**/*") if p.suffix.lower() in IMAGE_SUFFIXES)
        prompts = prompts_of(concept, group)
        # Which of several prompts a picture is of cannot be told: then it is of none that says what it should show.
        prompt = prompts[0] if len(prompts) == 1 else Prompt("")
        found += [(Shot(group, prompt, number), path) for number, path in enumerate(files)]
    return found
