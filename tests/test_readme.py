"""Every code block of the READMEs runs, both languages have the same, and their links exist."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import yaml
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
READMES = [ROOT / "README.md", ROOT / "README.ja.md"]
PAGES = ("CONTRIBUTING.md", "benchmarks/README.md", "docs/own_problem.md", "docs/own_problem.ja.md")
BLOCK = re.compile(r"(?:<!-- (\w+) -->\n)?```(\w+)\n(.*?)```", re.DOTALL)


def blocks(path):
    return {
        name or language: code
        for name, language, code in BLOCK.findall(path.read_text(encoding="utf-8"))
    }


def test_both_languages_have_the_same_code_tables_and_references():
    english, japanese = (path.read_text(encoding="utf-8") for path in READMES)
    assert blocks(READMES[0]) == blocks(READMES[1])
    assert set(blocks(READMES[0])) == {"run", "test", "python"}
    assert english.count("\n|") == japanese.count("\n|")
    for pattern in (r"arXiv:[\d.]+", r"\]\(https://\S+?(?=[)\s])", r"-?\d+\.\d+"):
        assert sorted(re.findall(pattern, english)) == sorted(re.findall(pattern, japanese)), (
            pattern
        )


@pytest.mark.parametrize("path", READMES, ids=lambda p: p.name)
def test_tables_are_those_that_the_benchmark_wrote(path):
    """All rows of all of them, in their order."""
    results = (ROOT / "benchmarks" / "results.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in results if line.startswith("|")]
    folded = "".join(re.findall(r"</summary>(.*?)</details>", path.read_text("utf-8"), re.DOTALL))
    assert [line for line in folded.splitlines() if line.startswith("|")] == rows


@pytest.mark.parametrize(
    "path",
    [*READMES, *(ROOT / name for name in PAGES)],
    ids=lambda p: p.name,
)
def test_links_lead_somewhere(path):
    links = re.findall(r"\]\(([^)#]+)", path.read_text(encoding="utf-8"))
    mine = [link for link in links if "://" not in link]
    colab = [
        link.split("/blob/main/")[1] for link in links if "colab.research.google.com/github" in link
    ]
    assert mine or path.parent.name == "benchmarks"
    for link in mine + colab:
        assert (path.parent / link).exists(), link


def test_the_ten_lines_run():
    """They print a share in the wrong piece for each method; only weights make it small."""
    code = blocks(READMES[0])["python"]
    assert len([line for line in code.splitlines() if line]) == 10
    done = subprocess.run(
        [sys.executable, "-c", f"import torch; torch.manual_seed(1)\n{code}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    wrong = {name: float(v) for name, v in re.findall(r"(.+) (\d\.\d+)", done.stdout)}
    assert set(wrong) == {"DPS", "MMPS", "twisted SMC"}
    assert wrong["twisted SMC"] < 0.1  # as many exact draws: about 0.03
    assert min(wrong["DPS"], wrong["MMPS"]) > 0.15


@pytest.mark.slow
def test_the_run_command_opens_the_notebooks(tmp_path):
    """As it stands, in a fresh clone and a fresh environment.

    Then the server answers and lists both notebooks.
    """
    subprocess.run(
        ["git", "-c", f"safe.directory={ROOT}", "clone", "-q", str(ROOT), str(tmp_path / "clone")],
        check=True,
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [
        "c = get_config()",
        "c.ServerApp.open_browser = False",
        "c.ServerApp.allow_root = True",
        "c.IdentityProvider.token = 'reader'",
    ]
    (tmp_path / "jupyter_server_config.py").write_text(
        "\n".join([*options, f"c.ServerApp.port = {port}"])
    )
    environment = os.environ | {"JUPYTER_CONFIG_DIR": str(tmp_path)}
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            blocks(READMES[0])["run"],
            shell=True,
            cwd=tmp_path / "clone",
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            for _ in range(900):
                time.sleep(1)
                assert server.poll() is None, (tmp_path / "log").read_text()[-2000:]
                try:
                    with urlopen(
                        f"http://127.0.0.1:{port}/api/contents?token=reader", timeout=5
                    ) as answer:
                        names = {entry["name"] for entry in json.load(answer)["content"]}
                    break
                except (URLError, ConnectionError, TimeoutError):
                    continue
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(timeout=30)
    assert {"VE-SDE_example.ipynb", "VP-SDE_example.ipynb"} <= names


def test_the_picture_moves_and_its_still_is_the_last_frame():
    with Image.open(ROOT / "docs" / "posterior.png") as picture:
        assert picture.n_frames > 10
        still = picture.convert("RGB").tobytes()
        picture.seek(1)
        assert picture.convert("RGB").tobytes() != still
        picture.seek(picture.n_frames - 1)
        assert picture.convert("RGB").tobytes() == still


def test_the_parts_have_the_lecture_s_pictures():
    sys.path.insert(0, str(ROOT / "docs"))
    from parts import figures

    found = figures()
    assert len(found) == 3
    for name, png in found.items():
        assert (ROOT / "docs" / name).read_bytes() == png, "python docs/parts.py"


def test_citation_file():
    """What the Citation File Format 1.2.0 requires, and that it agrees with the package."""
    import sde_utils

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["cff-version"] == "1.2.0"
    assert all(
        {"name"} <= author.keys() or {"family-names", "given-names"} <= author.keys()
        for author in citation["authors"]
    )
    assert citation["version"] == sde_utils.__version__
    assert citation["license"] == "MIT"
