"""--push_to_hub: upload LoRA, model card and report to the Hugging Face hub. huggingface_hub handles the token."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from sd_unlearn.errors import UnlearnError, UsageError, reason
from sd_unlearn.export.model_card import HUB_ID
from sd_unlearn.export.trained_run import TrainedRun
from sd_unlearn.io.run_folder import RESULTS

REPORTS = ("report.html", "report.md")


def check(repo_id: str) -> str:
    """Check the value of --push_to_hub before anything is written, and return it.

    Raises:
        UsageError: it is not a valid repository id, or no token is set.
    """
    from huggingface_hub import get_token

    if not HUB_ID.fullmatch(repo_id):
        raise UsageError(f"--push_to_hub {repo_id} is not a repository id of the hub. Name one as owner/name.")
    if not get_token():
        raise UsageError(f"--push_to_hub {repo_id} needs a token: set HF_TOKEN, or log in with hf auth login.")
    return repo_id


def push(repo_id: str, run: TrainedRun, files: Sequence[Path], *, private: bool) -> None:
    """Upload files under their own names and the run's report in one commit. Creates the repository if needed.

    Raises:
        UnlearnError: the hub refuses or cannot be reached, or --private was given and the repository is public. The
            message never contains the token.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    paths = [*files, *reports(run)]
    api = HfApi()
    try:
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise UnlearnError(
                f"--push_to_hub {repo_id} already exists and is public; --private does not change that. "
                "Make it private on the hub, or choose another repository."
            )
        operations = [CommitOperationAdd(path.name, str(path)) for path in paths]
        api.create_commit(repo_id, operations, commit_message=f"Forget {run.concept.slug}")
    except UnlearnError:
        raise
    except Exception as error:  # the client and its transports raise dozens of types
        text, token = reason(error, limit=300), get_token()
        raise UnlearnError(
            f"--push_to_hub {repo_id} failed: {text.replace(token, '***') if token else text}. The files are written; "
            "run the same command again to upload them."
        ) from None  # the chained error could contain request headers with the token
    print(f"Uploaded {len(paths)} files to {api.endpoint}/{repo_id}", file=sys.stderr)


def reports(run: TrainedRun) -> list[Path]:
    """The run's report files if they are newer than its results. Empty for nudity, because a report shows images."""
    if run.results is None or run.shows_nudity:
        return []
    evaluated_at = (run.folder / RESULTS).stat().st_mtime
    files = [run.folder / name for name in REPORTS]
    return [path for path in files if path.is_file() and path.stat().st_mtime >= evaluated_at]
