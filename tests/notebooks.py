"""Execute notebooks in a fresh kernel, and write them back in the state that is committed.

`python tests/notebooks.py [NOTEBOOK ...]`
"""

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
JAPANESE = [ROOT / "ja" / path.name for path in NOTEBOOKS]
READ = [NOTEBOOKS[0], JAPANESE[1]]  # run as readers do; the code is the same in both languages


FEWER = {  # what makes the notebooks long, and what does instead to see that every cell runs
    "N_DATA = 20_000": "N_DATA = 5_000",
    "TRAIN_STEPS = 2_000": "TRAIN_STEPS = 20",
    "N_SAMPLES = 2_000": "N_SAMPLES = 100",
    "RUNS, POINTS = 4, 400": "RUNS, POINTS = 2, 50",
    "(2000, 2)": "(300, 2)",
    "400_000": "10_000",
    "50_000": "5_000",
    "(100, *shape)": "(20, *shape)",
    "(300, *shape)": "(50, *shape)",
    "(256, *shape)": "(32, *shape)",
    "(12, 1, 28, 28)": "(4, 1, 28, 28)",
    "(8, *shape)": "(3, *shape)",
    "counted, 2000)": "counted, 1200)",
    "x1[:200]": "x1[:40]",
    "observed[live], pool, 32": "observed[live], pool, 8",
    "prior.sample(2000, own)": "prior.sample(200, own)",
    "pool, 125, final": "pool, 50, final",
    "digits[::38]": "digits[::400]",
    "held_out[::2]": "held_out[::25]",
    "n=600, runs=4": "n=100, runs=2",
    "n=300)": "n=50)",
    "guided_draws(name, exact, 1200)": "guided_draws(name, exact, 600)",
    "(4000, 1)": "(2000, 1)",
    "4000, 2": "400, 2",  # from here on in the solutions only
    '"steps": 200': '"steps": 30',
    "(50, 200, 1000)": "(20, 30, 50)",
    "range(6)": "range(1)",
    "(24, 1, 28, 28)": "(8, 1, 28, 28)",
}


def turn_down(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Replace FEWER in the code cells, so that all of them run in a fraction of the time."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            for old, new in FEWER.items():
                cell.source = cell.source.replace(old, new)
    return notebook


def execute(path: Path, fewer: bool = False) -> nbformat.NotebookNode:
    """Run in the folder of the notebook, counts turned down if `fewer`.

    Raises nbclient's error where a cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    notebook = turn_down(notebook) if fewer else notebook
    place = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=place).execute()
    return notebook


def fingerprint(notebook: nbformat.NotebookNode) -> str:
    """Hash of the code cells, kept in an execution's metadata: code edited later has another."""
    code = "\0".join(c.source for c in notebook.cells if c.cell_type == "code")
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def tidy(notebook: nbformat.NotebookNode) -> None:
    """Join what was printed in pieces, and keep of a progress bar only its last state.

    Time stamps and the kernel's particulars are dropped.
    """
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        outputs = []
        for output in cell.get("outputs", []):
            stream = output.output_type == "stream"
            if stream and outputs and outputs[-1].get("name") == output.name:
                outputs[-1].text += output.text
            else:
                outputs.append(output)
        for output in outputs:
            if output.output_type == "stream":
                lines = output.text.split("\n")
                output.text = "\n".join(line.rsplit("\r", 1)[-1] for line in lines)
        if cell.cell_type == "code":
            cell.outputs = outputs
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    notebook.metadata = nbformat.from_dict(metadata | {"executed": fingerprint(notebook)})


def timings(notebook: nbformat.NotebookNode) -> list[str]:
    """A line for each code cell: begin, end, and its first line."""
    lines = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            stamps = cell.metadata.execution
            begin, end = stamps["iopub.execute_input"], stamps["shell.execute_reply"]
            lines.append(f"  {begin} to {end}  {cell.source.splitlines()[0]}")
    return lines


if __name__ == "__main__":
    for path in [Path(p) for p in sys.argv[1:]] or NOTEBOOKS + SOLUTIONS:
        began = time.perf_counter()
        executed = execute(path)
        lines = timings(executed)
        tidy(executed)
        nbformat.write(executed, path)
        print(f"{path.name}: {time.perf_counter() - began:.1f} s", *lines, sep="\n")
