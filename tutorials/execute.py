"""Run notebooks from top to bottom and write them back with clean outputs.

    python tutorials/execute.py                                  all of them, at full budget
    python tutorials/execute.py tutorials/00_quickstart.ipynb    one

A notebook whose cell fails is left as it was. Progress bars, messages on stderr and execution times
are not kept, so that a diff shows what changed. Needs the extra `tutorials`.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

FOLDER = Path(__file__).resolve().parent
_CONVERGED = re.compile(r" *Neural network successfully converged after \d+ epochs\.")  # by sbi
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def execute(notebook: Any, timeout: int = 1200) -> None:
    """Run it in a folder that holds nothing but a link to the data; `timeout` in s per cell.

    Raises:
        CellExecutionError: If a cell fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "data").symlink_to(FOLDER / "data")
        where = {"metadata": {"path": folder}}
        # A shell's MPLBACKEND=Agg, as tests want it, would leave the notebook without its figures.
        env = {key: value for key, value in os.environ.items() if key != "MPLBACKEND"}
        client = NotebookClient(notebook, timeout=timeout, startup_timeout=180, resources=where)
        client.execute(env=env)


def names_of(name: str, until: str, replace: tuple[str, str] = ("", "")) -> dict[str, Any]:
    """Run a notebook's cells in this process, and return what they define.

    Args:
        name: The notebook's file, in this folder, which becomes the working directory: that is
            where the notebook finds its data.
        until: The cell that defines this name is the last one.
        replace: A piece of code, and what to run instead of it.
    """
    notebook = nbformat.read(FOLDER / name, as_version=4)
    namespace: dict[str, Any] = {}
    os.chdir(FOLDER)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            exec(cell.source.replace(*replace) if replace[0] else cell.source, namespace)
        if until in namespace:
            break
    return namespace


def clean(notebook: Any) -> None:
    """Drop what differs from run to run or belongs to the machine."""
    notebook.metadata = nbformat.from_dict(
        {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    )
    for index, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{index:02}"
        cell.metadata = nbformat.from_dict({})
        if cell.cell_type == "code":
            cell.outputs = _clean_outputs(cell.outputs)


def _clean_outputs(outputs: list[Any]) -> list[Any]:
    """Printed text as one stream without bars, and figures without their objects' addresses."""
    kept: list[Any] = []
    for output in outputs:
        data = output.get("data", {})
        if output.get("name") == "stderr" or "application/vnd.jupyter.widget-view+json" in data:
            continue
        if output.output_type == "stream":
            lines = [line.strip("\r").rsplit("\r", 1)[-1] for line in output.text.split("\n")]
            output.text = _CONVERGED.sub("", "\n".join(line.rstrip() for line in lines))
            if not output.text.strip():
                continue
            if kept and kept[-1].output_type == "stream":
                kept[-1].text += output.text
                continue
        if "image/png" in data and "text/plain" in data:
            data["text/plain"] = "<Figure>"
        kept.append(output)
    return kept


def main() -> int:
    """Execute the notebooks asked for; 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all")
    failed = 0
    for path in parser.parse_args().notebooks or sorted(FOLDER.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        start = time.perf_counter()
        try:
            execute(notebook)
        except CellExecutionError as error:
            print(f"{path.name}: FAILED, left as it was\n{error}", file=sys.stderr)
            failed = 1
            continue
        clean(notebook)
        nbformat.write(notebook, path)
        print(f"{path.name}: {time.perf_counter() - start:.0f} s", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
