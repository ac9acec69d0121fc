"""The notebooks run, and what is committed is one clean execution of the code beside it."""

import ast
import json
import re

import nbformat
import pytest
from notebooks import FEWER, NOTEBOOKS, SOLUTIONS, execute, fingerprint

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
PRIVATE = r"(/(home|root|work|tmp|Users)/|site-packages|Warning)"


@pytest.mark.slow
@pytest.mark.parametrize("path", SOLUTIONS, ids=lambda p: p.stem)
def test_solutions_run(path):
    """From top to bottom, counts turned down, as the lectures in the browser's and Colab's tests.

    What came of the full counts is what is committed.
    """
    assert all(c.execution_count for c in execute(path, fewer=True).cells if c.cell_type == "code")


def test_what_is_turned_down_is_there():
    paths = NOTEBOOKS + SOLUTIONS
    every = " ".join(p.read_text(encoding="utf-8").replace('\\"', '"') for p in paths)
    assert not [count for count in FEWER if count not in every]


@each
def test_stub_and_answer_share_their_functions(path):
    """Each function that an exercise gives stands in the solutions as it is."""
    cells = nbformat.read(path, 4).cells
    starts = [i for i, c in enumerate(cells) if re.match(r"\*\*\d\. ", c.source)]
    solved = path.parent / "solutions" / path.name.replace("example", "solutions")
    answers = "\n".join(c.source for c in nbformat.read(solved, 4).cells)
    given = []
    for i in starts:
        stub = cells[i + 1].source
        defined = [node for node in ast.parse(stub).body if isinstance(node, ast.FunctionDef)]
        given += [ast.get_source_segment(stub, node) for node in defined]
    assert len(given) >= 4
    assert not [function for function in given if function not in answers]


@pytest.mark.parametrize("path", NOTEBOOKS + SOLUTIONS, ids=lambda p: p.stem)
def test_committed_state(path):
    text = path.read_text()
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    outputs = [o for c in code for o in c.outputs]
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1))
    remedy = "code changed after it was executed: python tests/notebooks.py"
    assert notebook.metadata.executed == fingerprint(notebook), remedy
    assert notebook.metadata.kernelspec.name == "python3"
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert not re.search(PRIVATE, json.dumps(notebook.cells))
    assert len(text) < 2e6


@pytest.mark.parametrize("path", NOTEBOOKS + SOLUTIONS, ids=lambda p: p.stem)
def test_code_cells_are_short_and_narrow(path):
    code = [c.source for c in nbformat.read(path, 4).cells if c.cell_type == "code"]
    assert max(len(source.splitlines()) for source in code) <= 30
    assert max(len(line) for source in code for line in source.splitlines()) <= 100


@each
def test_figures_are_small_described_and_one_moves(path):
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    figures = [o for c in cells for o in c.outputs if "image/png" in o.get("data", {})]
    assert len(figures) >= 10
    for figure in figures:
        moves = "Animation" in figure.metadata["image/png"]["alt"]
        assert len(figure.data["image/png"]) * 3 / 4 < (250_000 if moves else 150_000)
        assert len(figure.metadata["image/png"]["alt"]) > 30
    assert sum("Animation" in f.metadata["image/png"]["alt"] for f in figures) == 1


@each
def test_every_exercise_has_an_answer(path):
    """Its statement stands in the solutions word for word, then code that printed or drew."""
    exercises = [c.source for c in nbformat.read(path, 4).cells if re.match(r"\*\*\d\. ", c.source)]
    solved = path.parent / "solutions" / path.name.replace("example", "solutions")
    solutions = nbformat.read(solved, 4).cells
    starts = [i for i, c in enumerate(solutions) if re.match(r"\*\*\d\. ", c.source)]
    assert 3 <= len(exercises) <= 5
    for exercise in exercises:
        place = next(i for i, c in enumerate(solutions) if c.source == exercise)
        end = next((i for i in starts if i > place), len(solutions))
        answer = solutions[place + 1 : end]
        assert any(c.cell_type == "code" and c.outputs for c in answer)
        assert answer[-1].cell_type == "markdown"


def test_both_have_the_same_sections():
    headings = []
    for path in NOTEBOOKS:
        words = [c.source for c in nbformat.read(path, 4).cells if c.cell_type == "markdown"]
        headings.append(re.findall(r"^#{2,3} .*", "\n".join(words), re.M))
    assert len(NOTEBOOKS) == 2
    assert headings[0] == headings[1]


def test_what_both_say_is_said_once():
    """Cells tagged `shared` are the same, in the same order; no other cell is in both lectures."""
    shared, own = [], []
    for path in NOTEBOOKS:
        cells = nbformat.read(path, 4).cells
        tagged = [c.source for c in cells if "shared" in c.metadata.get("tags", [])]
        shared.append(tagged)
        own.append({c.source for c in cells} - set(tagged))
    assert shared[0] == shared[1]
    assert len(shared[0]) > 50
    assert not own[0] & own[1]
