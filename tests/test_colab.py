"""A notebook opened by its badge, where nothing of the repository is.

The set-up cell fetches the package and leaves the rest as it is. What is installed is the
checkout's HEAD, as pip would get it from GitHub; changes that are not committed are not seen.
"""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import nbformat
import pytest
from notebooks import JAPANESE, NOTEBOOKS, READ, ROOT, execute, turn_down
from packaging.requirements import Requirement

ADDRESS = "https://github.com/UedaKenji/FI6_inverse_diffusion_model"
each = pytest.mark.parametrize("path", READ, ids=lambda p: p.stem)

# before the set-up cell runs where the package is there: another pip is an error
NO_PIP = """
import subprocess
def refuse(command, *args, run=subprocess.run, **options):
    assert "pip" not in command, "the set-up cell installs what is there already"
    return run(command, *args, **options)
subprocess.run = refuse
"""


def setup_cell(notebook):
    return next(c for c in notebook.cells if c.cell_type == "code" and "find_spec" in c.source)


def git(*arguments):
    return subprocess.run(
        ["git", "-C", ROOT, "-c", "safe.directory=*", *arguments],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


@pytest.fixture
def colab(tmp_path, monkeypatch):
    """An environment as Colab has it. Returns its interpreter, which is also the kernel "python3".

    All packages of the running environment are there, outside the new one so that pip cannot touch
    them, except this one. `google.colab` is an empty package. git, under a configuration of its
    own, takes the checkout for the repository's address.
    """
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("needs git, and a checkout")
    preinstalled = tmp_path / "preinstalled"
    preinstalled.mkdir()
    for folder in [Path(p) for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]:
        for entry in folder.iterdir():
            ours = "sde_utils" in entry.name or entry.suffix in (".pth", ".egg-link")
            if not ours and not (preinstalled / entry.name).exists():
                (preinstalled / entry.name).symlink_to(entry)
    # not find_spec: it would tell setuptools' import hook that pip is about to run here
    pip = any(importlib.metadata.distributions(name="pip"))
    venv.create(tmp_path / "venv", with_pip=not pip)
    scheme = {"base": str(tmp_path / "venv"), "platbase": str(tmp_path / "venv")}
    packages = Path(
        sysconfig.get_path(
            "purelib", "venv" if "venv" in sysconfig.get_scheme_names() else None, scheme
        )
    )
    (packages / "preinstalled.pth").write_text(f"{preinstalled}\n")
    (packages / "google" / "colab").mkdir(parents=True)
    (packages / "google" / "colab" / "__init__.py").touch()
    python = tmp_path / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    kernel = tmp_path / "jupyter" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    command = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(
        json.dumps({"argv": command, "display_name": "Colab", "language": "python"})
    )
    configuration = tmp_path / "gitconfig"
    for key, value in ((f"url.{ROOT.as_uri()}.insteadOf", ADDRESS), ("safe.directory", "*")):
        subprocess.run(["git", "config", "--file", configuration, key, value], check=True)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(configuration))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    return python


def installed(python):
    """The distributions inside the environment of `python` with their versions, as a set.

    Those that it only sees are left out.
    """
    code = (
        "import importlib.metadata as m, json; print(json.dumps("
        "[[d.name, d.version, str(d.locate_file(''))] for d in m.distributions()]))"
    )
    found = json.loads(
        subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout
    )
    return {
        (name.replace("-", "_"), version)
        for name, version, folder in found
        if Path(folder).is_relative_to(python.parent.parent)
    }


@pytest.mark.slow
@each
def test_alone_in_an_empty_folder(path, colab, tmp_path):
    """Every cell runs, with counts turned down, the set-up cell twice.

    Added: `sde_utils` at the checkout's HEAD, by git. Not added or replaced: anything else.
    """
    folder = tmp_path / "content"
    folder.mkdir()
    notebook = turn_down(nbformat.read(path, as_version=4))
    again = nbformat.v4.new_code_cell(NO_PIP + setup_cell(notebook).source)
    notebook.cells.insert(notebook.cells.index(setup_cell(notebook)) + 1, again)
    where = (
        "import google.colab, numpy, torch\n"
        "print(*[m.__file__ for m in (su, torch, numpy)], sep='\\n')"
    )
    notebook.cells.append(nbformat.v4.new_code_cell(where))
    nbformat.write(notebook, folder / path.name)
    before, head = installed(colab), git("rev-parse", "HEAD")
    assert subprocess.run([colab, "-c", "import torch, google.colab"], cwd=folder).returncode == 0
    assert (
        subprocess.run(
            [colab, "-c", "import sde_utils"], cwd=folder, capture_output=True
        ).returncode
        == 1
    )

    executed = execute(folder / path.name)

    code = [c for c in executed.cells if c.cell_type == "code"]
    assert all(c.execution_count for c in code)
    assert sum("image/png" in o.get("data", {}) for c in code for o in c.outputs) >= 10
    assert [p.name for p in folder.iterdir()] == [path.name]
    after = installed(colab)
    assert before <= after
    assert [name for name, version in after - before] == ["sde_utils"]
    ours, *others = (Path(line) for line in code[-1].outputs[-1].text.split())
    assert ours.is_relative_to(colab.parent.parent)
    assert all(other.is_relative_to(tmp_path / "preinstalled") for other in others)
    origin = json.loads(
        next(ours.parent.parent.glob("sde_utils-*.dist-info/direct_url.json")).read_text()
    )
    assert origin["url"] == ADDRESS
    assert origin["vcs_info"]["commit_id"] == head


@pytest.mark.slow
def test_says_what_is_missing_where_git_is_not(colab, tmp_path, monkeypatch):
    """The set-up cell fails, and pip's word for why is on the reader's screen."""
    monkeypatch.setenv("PATH", str(tmp_path))
    cell = setup_cell(nbformat.read(NOTEBOOKS[0], as_version=4))
    ran = subprocess.run([colab, "-c", cell.source], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 1
    assert "Cannot find command 'git'" in ran.stderr
    assert "ModuleNotFoundError" not in ran.stderr


@pytest.mark.slow
@each
def test_set_up_installs_nothing_in_a_checkout(path):
    """From the repository's root the package is found, and no pip is started."""
    cell = setup_cell(nbformat.read(path, as_version=4))
    ran = subprocess.run(
        [sys.executable, "-c", NO_PIP + cell.source], cwd=ROOT, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("torch ")


def test_requirements_are_lower_bounds():
    """So that a torch or numpy that is there already satisfies them, however new."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert lines
    assert {s.operator for line in lines for s in Requirement(line).specifier} == {">="}


@pytest.mark.parametrize("path", NOTEBOOKS + JAPANESE, ids=lambda p: str(p.relative_to(ROOT)))
def test_set_up_cells_get_this_repository(path):
    """The set-up cell and the badge name one repository, and the badge this notebook."""
    notebook = nbformat.read(path, as_version=4)
    assert f"git+{ADDRESS}" in setup_cell(notebook).source
    address = ADDRESS.replace("https://github.com", "https://colab.research.google.com/github")
    assert f"({address}/blob/main/{path.relative_to(ROOT).as_posix()})" in notebook.cells[0].source
