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
    assert english.count("\n## ") == japanese.count("\n## ")
    assert english.count("\n|") == japanese.count("\n|")
    for pattern in (r"arXiv:[\d.]+", r"https://\S+?(?=[)\s])", r"-?\d+\.\d+"):
        assert sorted(re.findall(pattern, english)) == sorted(re.findall(pattern, japanese)), (
            pattern
        )


@pytest.mark.parametrize(
    "path",
    [*READMES, ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md"],
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
    """The posterior's shares sum to one; the evidence is that of weighted draws of the prior."""
    code = blocks(READMES[0])["python"]
    assert len(code.strip().splitlines()) == 10
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    numbers = [float(v) for v in re.findall(r"-?\d\.\d+(?:e-?\d+)?", done.stdout)]
    assert len(numbers) == 21
    assert sum(numbers[:20]) == pytest.approx(1, abs=0.01)
    assert numbers[20] == pytest.approx(evidence(), abs=0.3)


def evidence():
    import torch

    import sde_utils as su

    obs = su.Observation(lambda x: x[:, 0] * x[:, 1], -0.2, 0.1)
    return float(
        su.weighted_posterior(
            su.swiss_roll_density(), obs, 200_000, torch.Generator().manual_seed(0)
        )[2]
    )


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


def test_the_picture_moves():
    with Image.open(ROOT / "docs" / "posterior.png") as picture:
        assert picture.n_frames > 10
        first = picture.convert("RGB").tobytes()
        picture.seek(picture.n_frames - 1)
        assert picture.convert("RGB").tobytes() != first


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
