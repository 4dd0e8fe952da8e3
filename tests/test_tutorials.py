"""The tutorials run, in tiny budgets, and what is committed of them was executed without errors."""

import json
import re
import runpy
import warnings
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

_FOLDER = Path(__file__).parents[1] / "tutorials"
_NOTEBOOKS = sorted(_FOLDER.glob("*.ipynb"))
# Those that take longest are tried before a release, and whenever they are changed.
_LONG = (
    "02_benchmark_simulators",
    "04_structured_data_and_rounds",
    "05_hare_and_lynx",
    "06_reaction_times",
    "07_images",
)
_ALL = [
    pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * (path.stem in _LONG))
    for path in _NOTEBOOKS
]
_EACH = pytest.mark.parametrize("path", _NOTEBOOKS, ids=lambda path: path.stem)


def _cells(path, kind="code"):
    content = json.loads(path.read_text(encoding="utf-8"))
    return [cell for cell in content["cells"] if cell["cell_type"] == kind]


def _source(cell):
    return "".join(cell["source"])


def _outputs(path):
    return [output for cell in _cells(path) for output in cell["outputs"]]


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    monkeypatch.setenv("SBI_JEFFREYS_TUTORIAL_FAST", "1")
    monkeypatch.setenv("SBI_JEFFREYS_CACHE", str(tmp_path / "cache"))


@pytest.mark.slow
def test_the_first_runs_in_a_kernel_as_it_is_committed(tiny):
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("nbclient")
    execute = runpy.run_path(str(_FOLDER / "execute.py"))["execute"]
    execute(nbformat.read(_NOTEBOOKS[0], as_version=4), timeout=600)


@pytest.mark.parametrize("path", _ALL)
def test_it_runs_in_tiny_budgets(path, tiny, tmp_path, monkeypatch):
    # Here, without a kernel, which would import torch and sbi once more for each of them.
    (tmp_path / "data").symlink_to(_FOLDER / "data")
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    with warnings.catch_warnings(), plt.rc_context():
        warnings.simplefilter("ignore")
        for cell in _cells(path):
            exec(compile(_source(cell), path.name, "exec"), namespace)
    plt.close("all")


@_EACH
def test_what_is_committed_was_executed(path):
    assert all(cell["outputs"] or cell["execution_count"] for cell in _cells(path))
    outputs = _outputs(path)
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs)


@_EACH
def test_outputs_belong_to_the_run_from_top_to_bottom(path):
    counts = [cell["execution_count"] for cell in _cells(path)]
    assert counts == list(range(1, len(counts) + 1))


@_EACH
def test_nothing_of_the_machine_is_committed(path):
    text = re.sub(r'"image/png": "[^"]*"', "", path.read_text(encoding="utf-8"))
    assert not re.search(r"/(home|tmp|work|root|Users)/", text)
    assert not any("execution" in cell["metadata"] for cell in _cells(path))
    assert not [o for o in _outputs(path) if o.get("name") == "stderr"], "warnings or progress bars"


@_EACH
def test_it_is_short_and_ends_with_asserts(path):
    cells = _cells(path)
    lines = [line.strip() for cell in cells for line in _source(cell).splitlines()]
    assert len([line for line in lines if line and not line.startswith("#")]) < 100
    assert "assert " in _source(cells[-1])
    assert "SBI_JEFFREYS_TUTORIAL_FAST" in _source(cells[0])


@_EACH
def test_every_figure_is_followed_by_words(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    for cell, following in pairwise(cells):
        if any("image/png" in output.get("data", {}) for output in cell.get("outputs", [])):
            assert following["cell_type"] == "markdown", _source(cell)


def test_the_readme_names_every_tutorial():
    text = (_FOLDER / "README.md").read_text(encoding="utf-8")
    assert _NOTEBOOKS
    assert set(re.findall(r"\d\d_\w+\.ipynb", text)) == {path.name for path in _NOTEBOOKS}
