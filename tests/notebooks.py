"""Execute notebooks in a fresh kernel and write them back in the state that is committed: `python tests/notebooks.py [NOTEBOOK ...]`."""

from __future__ import annotations

import hashlib
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(ROOT.glob("*_example.ipynb"))
SOLUTIONS = sorted(ROOT.glob("solutions/*.ipynb"))


def execute(path: Path, **knobs: object) -> nbformat.NotebookNode:
    """Run in the folder of the notebook; `knobs` replace the values of the knobs cell. Raises nbclient's error where a cell fails."""
    notebook = nbformat.read(path, as_version=4)
    if knobs:
        cell = next(c for c in notebook.cells if c.cell_type == "code" and c.source.startswith("SEED"))
        cell.source += "\n" + "\n".join(f"{name} = {value!r}" for name, value in knobs.items())
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}).execute()
    return notebook


def fingerprint(notebook: nbformat.NotebookNode) -> str:
    """Hash of the code cells, kept in the metadata of an execution: code edited afterwards no longer matches."""
    return hashlib.sha256("\0".join(c.source for c in notebook.cells if c.cell_type == "code").encode()).hexdigest()[:16]


def tidy(notebook: nbformat.NotebookNode) -> None:
    """Join what was printed in pieces, keep of a progress bar only its last state, drop time stamps and the kernel's particulars."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        outputs = []
        for output in cell.get("outputs", []):
            if output.output_type == "stream" and outputs and outputs[-1].get("name") == output.name:
                outputs[-1].text += output.text
            else:
                outputs.append(output)
        for output in outputs:
            if output.output_type == "stream":
                output.text = "\n".join(line.rsplit("\r", 1)[-1] for line in output.text.split("\n"))
        if cell.cell_type == "code":
            cell.outputs = outputs
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = nbformat.from_dict({"kernelspec": kernel, "language_info": {"name": "python"}} | {"executed": fingerprint(notebook)})


if __name__ == "__main__":
    for path in [Path(p) for p in sys.argv[1:]] or NOTEBOOKS + SOLUTIONS:
        began = time.perf_counter()
        executed = execute(path)
        cells = [
            (c.metadata.execution["shell.execute_reply"], c.metadata.execution["iopub.execute_input"], c.source.splitlines()[0])
            for c in executed.cells
            if c.cell_type == "code"
        ]
        tidy(executed)
        nbformat.write(executed, path)
        print(f"{path.name}: {time.perf_counter() - began:.1f} s", *("  {1} to {0}  {2}".format(*c) for c in cells), sep="\n")
