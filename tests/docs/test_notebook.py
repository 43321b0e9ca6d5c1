"""The notebook runs from top to bottom, and its network survives quantization."""

import ast
import os

import pytest

from tests.docs.pages import ROOT

NOTEBOOK = ROOT / "docs" / "digits_to_onnx.ipynb"


def test_notebook_goes_from_training_to_onnxruntime(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="needs pip install '.[dev]'")
    nbclient = pytest.importorskip("nbclient", reason="needs pip install '.[dev]'")
    # The kernel is to import this checkout, wherever it runs.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "the notebook is kept without outputs"
    notebook.cells.append(nbformat.v4.new_code_cell("print([lightning_calibtip.__file__, accuracy, agreement])"))
    notebook.cells.insert(0, nbformat.v4.new_code_cell("import lightning_calibtip"))
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    file, accuracy, agreement = ast.literal_eval(notebook.cells[-1].outputs[0].text)
    assert file.startswith(str(ROOT))
    assert accuracy["float"] > 0.9 and accuracy["W8A8"] > accuracy["float"] - 0.02
    assert accuracy["W4A8"] > accuracy["float"] - 0.05
    assert agreement > 0.98 and accuracy["ONNX Runtime"] == pytest.approx(accuracy["W4A8"], abs=0.02)
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    assert "QLinearConv" in printed and (tmp_path / "runs" / "digits" / "report.html").exists()
