"""The notebooks of the documentation run from their first to their last cell."""

import nbformat
import pytest
from nbclient import NotebookClient
from support.commands import ROOT


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shown"),
    [("search_your_videos", "text/html"), ("fine_tune_and_compare", "image/png")],
)
def test_a_notebook_runs(name, shown, tmp_path):
    notebook = nbformat.read(ROOT / "docs" / "notebooks" / f"{name}.ipynb", 4)
    for cell in notebook.cells:
        cell.source = cell.source.replace('"configs/shapes.py"', '"configs/shapes.py:smoke"')
    folder = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=folder).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any(shown in output.get("data", {}) for output in outputs)
