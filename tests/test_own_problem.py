"""Every block of docs/own_problem.md runs, and its Japanese twin has the same."""

import re
import subprocess
import sys

import pytest
from notebooks import ROOT

PAGES = [ROOT / "docs" / name for name in ("own_problem.md", "own_problem.ja.md")]


def blocks(path):
    return re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.slow
def test_the_blocks_run(tmp_path):
    """One after another, in one process, each with its own checks."""
    pytest.importorskip("diffusers")
    pytest.importorskip("deepinv")
    assert len(blocks(PAGES[0])) >= 10
    script = tmp_path / "own_problem.py"
    script.write_text("\n".join(blocks(PAGES[0])), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "MMPS: coverage" in done.stdout
    assert re.search(r"DPS: .*band: False", done.stdout)


def test_both_languages_have_the_same_code_and_formulas():
    english, other = (path.read_text(encoding="utf-8") for path in PAGES)
    assert blocks(PAGES[0]) == blocks(PAGES[1])
    english, other = (re.sub(r"```.*?```", "", t, flags=re.DOTALL) for t in (english, other))
    for pattern in (r"`[^`\n]+`", r"\$[^$\n]+\$"):
        assert set(re.findall(pattern, english)) == set(re.findall(pattern, other)), pattern
    for pattern in (r"^#+", r"^\|"):
        assert re.findall(pattern, english, re.M) == re.findall(pattern, other, re.M)
