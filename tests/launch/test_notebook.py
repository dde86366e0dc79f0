"""The notebook of the demo, run from its first cell to its last."""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "launch/demo/demo.ipynb"


def test_the_notebook_trains_and_edits(tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells if cell.cell_type == "code")
    sizes = notebook.cells[1]
    assert sizes.source.startswith("pairs, steps, inference_steps = ")
    sizes.source = 'pairs, steps, inference_steps = 40, 4, 2\noutput = "run"'
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    pictures = [
        output.data["image/png"]
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 4  # pairs, edits in training, losses, edits
    assert (tmp_path / "run/model_index.json").exists()
