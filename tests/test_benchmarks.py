"""The comparison with other libraries runs, with those that are there."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_posteriors_are_scored_with_errors_and_particles_are_nearest(tmp_path):
    out = tmp_path / "results.md"
    command = [sys.executable, "-m", "benchmarks", "--parts", "b", "--quick", "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    distances, seconds = out.read_text(encoding="utf-8").split("### (b2)")
    lines = [line for line in distances.splitlines() if line.startswith("| sde_utils")]
    rows = {cells[0]: cells[1:] for cells in (line.strip("| ").split(" | ") for line in lines)}
    mean = {name.split(": ")[1]: float(cells[-2].split(" ± ")[0]) for name, cells in rows.items()}
    assert all(" ± " in cell for cells in rows.values() for cell in cells[:-1])
    for particles in ("twisted SMC (MMPS)", "tempered SMC"):
        assert mean[particles] < 0.7 * mean["MMPS"] < 0.7 * mean["DPS"]
    assert sum(name in seconds for name in rows) == len(rows)
