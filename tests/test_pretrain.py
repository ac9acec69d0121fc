"""`scripts/pretrain.py` as its user runs it, in a process of its own."""

import csv
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from sde_utils import load_denoiser

SCRIPT = Path(__file__).parent.parent / "scripts" / "pretrain.py"
COMMON = ["--widths", "8", "16", "--batch", "16", "--warmup", "5", "--precision", "no"]
COMMON += ["--save-every", "0", "--log-every", "5"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


def command(out, *more, steps=30, launch=()):
    return [sys.executable, *launch, SCRIPT, "--out", out, "--steps", str(steps), *COMMON, *more]


def run(*arguments, **options):
    line = command(*arguments, **options)
    return subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, check=False)


def logged(out):
    return [float(row["loss"]) for row in csv.DictReader((out / "log.csv").open())]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "made" / "whole"
    done = run(out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.slow
def test_a_run_leaves_what_it_should(whole):
    left = sorted(p.name for p in whole.iterdir())
    assert left == ["checkpoint.pt", "denoiser.safetensors", "log.csv", "samples.png"]
    assert len(logged(whole)) == 6
    assert logged(whole)[-1] < logged(whole)[0]
    denoiser = load_denoiser(whole / "denoiser.safetensors")
    assert denoiser.sigma_data == 0.6
    assert denoiser(torch.zeros(2, 1, 28, 28), 1.0).shape == (2, 1, 28, 28)
    with safe_open(whole / "denoiser.safetensors", framework="pt") as file:
        facts = json.loads(file.metadata()["sde_utils"])["facts"]
    known = {"out": "whole", "steps": 30, "batch": 16, "lr": 3e-3, "seed": 0, "widths": [8, 16]}
    assert facts | known | {"digits": 4750, "images": 480} == facts
    assert facts["seconds"] >= 0
    weights = load_file(whole / "denoiser.safetensors").values()
    assert {w.dtype for w in weights} == {torch.float16}


@pytest.mark.slow
def test_bf16_trains_to_the_same_losses_within_its_precision(whole, tmp_path):
    assert run(tmp_path, "--precision", "bf16").returncode == 0
    assert logged(tmp_path) == pytest.approx(logged(whole), rel=0.02)


@pytest.mark.slow
def test_killed_and_run_again_it_ends_bit_for_bit_the_same(whole, tmp_path):
    """SIGKILL twice, each time after some more steps; then to the end."""
    checkpoint, done = tmp_path / "checkpoint.pt", 0
    for kill in range(2):
        process = subprocess.Popen(
            command(tmp_path), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        now = done
        while process.poll() is None:
            time.sleep(0.01)
            now = torch.load(checkpoint, weights_only=True)["step"] if checkpoint.exists() else 0
            if now > done + kill:
                process.send_signal(signal.SIGKILL)
                process.wait()
        assert process.returncode == -signal.SIGKILL
        done = now
    assert done < 30
    assert run(tmp_path).returncode == 0
    a, b = (load_file(out / "denoiser.safetensors") for out in (whole, tmp_path))
    assert all(torch.equal(a[name], b[name]) for name in a)
    a, b = (torch.load(out / "checkpoint.pt", weights_only=True) for out in (whole, tmp_path))
    assert torch.equal(a["losses"], b["losses"])
    assert all(torch.equal(a["denoiser"][name], b["denoiser"][name]) for name in a["denoiser"])


@pytest.mark.slow
def test_two_processes_do_what_one_does(whole, tmp_path):
    """`accelerate launch` on two CPU processes (gloo): the same losses up to rounding.

    With its option --cpu instead of the environment's ACCELERATE_USE_CPU it would start one.
    """
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--dynamo_backend", "no", "--mixed_precision", "no"]
    launch += ["--main_process_port", "0"]
    done = run(tmp_path, launch=launch)
    assert done.returncode == 0, done.stderr
    one, two = (torch.load(out / "checkpoint.pt", weights_only=True) for out in (whole, tmp_path))
    torch.testing.assert_close(two["losses"], one["losses"], rtol=2e-3, atol=0)
    assert logged(tmp_path) == pytest.approx(logged(whole), rel=2e-3)
    odd = run(tmp_path / "odd", "--batch", "15", launch=launch)
    assert "--batch is a multiple of 2" in odd.stderr
    assert not (tmp_path / "odd").exists()


@pytest.mark.slow
def test_the_checkpoint_of_another_run_is_refused_and_left_alone(whole):
    before = (whole / "checkpoint.pt").read_bytes()
    done = run(whole, "--lr", "0.01")
    assert done.returncode != 0
    assert "lr = 0.003 there, 0.01 here" in done.stderr
    assert (whole / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize(
    "more",
    [
        ["--steps", "0"],
        ["--lr", "0"],
        ["--lr", "nan"],
        ["--ema", "1"],
        ["--batch", "0"],
        ["--warmup", "30"],
        ["--log-every", "0"],
        ["--save-every", "-1"],
        ["--seed", str(2**64)],
        ["--widths", "0"],
        ["--widths", "12", "16"],
        ["--widths", "8", "8", "8", "8"],
        ["--precision", "fp8"],
    ],
    ids=" ".join,
)
def test_bad_settings_are_named_and_leave_no_folder(more, tmp_path, capsys):
    read = runpy.run_path(str(SCRIPT))["read"]
    with pytest.raises(SystemExit), torch.random.fork_rng():
        read(["--out", str(tmp_path / "out"), "--steps", "30", "--warmup", "5", *more])
    assert more[0] in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    done = run(tmp_path / "file" / "out")
    assert done.returncode == 2
    assert "--out" in done.stderr.splitlines()[-1]
