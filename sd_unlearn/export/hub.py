"""--push_to_hub: LoRA, card and report in one commit on the Hugging Face hub. The token stays with huggingface_hub."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sd_unlearn.errors import UnlearnError, UsageError
from sd_unlearn.export.model_card import HUB_ID
from sd_unlearn.export.trained_run import Run
from sd_unlearn.io.run_folder import RESULTS

REPORTS = ("report.html", "report.md")


def check(repo_id: str) -> str:
    """The repository's id, checked before anything is written.

    Raises:
        UsageError: no id of a repository, or no token is known.
    """
    from huggingface_hub import get_token

    if not HUB_ID.fullmatch(repo_id):
        raise UsageError(f"--push_to_hub {repo_id} is no repository of the hub. Name one as owner/name.")
    if not get_token():
        raise UsageError(f"--push_to_hub {repo_id} needs a token: set HF_TOKEN, or log in with hf auth login.")
    return repo_id


def push(repo_id: str, run: Run, files: Sequence[Path], *, private: bool) -> None:
    """Upload files, under their own names, and the run's report; the repository is made if it is not there.

    Raises:
        UnlearnError: the hub refuses or cannot be reached, or the repository is public where a private one was
            asked for. The message never holds the token.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    paths = [*files, *reports(run)]
    api = HfApi()
    try:
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise UnlearnError(
                f"--push_to_hub {repo_id} is there already and public, and --private does not change that. "
                "Make it private on the hub, or name another."
            )
        operations = [CommitOperationAdd(path.name, str(path)) for path in paths]
        api.create_commit(repo_id, operations, commit_message=f"Forget {run.concept.slug}")
    except UnlearnError:
        raise
    except Exception as error:  # the client and its transports have dozens of their own
        raise UnlearnError(
            f"--push_to_hub {repo_id} failed: {_reason(error, get_token())} The files are written; the same command "
            "uploads them again."
        ) from None  # the chain would hold requests with their headers
    print(f"Uploaded {len(paths)} files to {api.endpoint}/{repo_id}", file=sys.stderr)


def reports(run: Run) -> list[Path]:
    """The report, where it was made from these results. Not of nudity: it shows what was to be forgotten."""
    if run.results is None or run.concept.kind == "nudity":
        return []
    judged = (run.folder / RESULTS).stat().st_mtime
    found = [run.folder / name for name in REPORTS]
    return [path for path in found if path.is_file() and path.stat().st_mtime >= judged]


def _reason(error: Any, token: str | None) -> str:
    """What went wrong in one line, without the token."""
    text = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
    return (text.replace(token, "***") if token else text) + "."
