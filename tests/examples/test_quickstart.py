"""The notebook examples/quickstart.ipynb runs from top to bottom."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"
# Images in a fifth of the usual steps: the test looks at their number, not at what they show.
QUICK = """\
from sd_unlearn.models.sampling import BASE_SAMPLERS, Sampler
BASE_SAMPLERS["digits"] = Sampler(5, 3.0, 100)
"""


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "clear the outputs before committing"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(QUICK))
    client.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()

    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output.get("text", "") for output in outputs if output.get("name") == "stdout")
    assert "leakage    direct    base" in printed
    images = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(images) == 5  # 3 positives and 2 pairs
    noise = "".join(output.get("text", "") for output in outputs if output.get("name") == "stderr")
    assert "\r" not in noise
    assert "Warning" not in noise
    assert (tmp_path / "runs" / "seven" / "report.html").is_file()
    assert (tmp_path / "runs" / "seven" / "export" / "README.md").is_file()
