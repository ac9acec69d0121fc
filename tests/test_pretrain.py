import csv
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from sde_utils import load_denoiser, pretrain

COMMON = ["--widths", "8", "16", "--batch", "16", "--warmup", "5", "--precision", "no", "--save-every", "0", "--log-every", "5"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def command(out, steps, *more):
    return ["-m", "sde_utils.pretrain", "--out", str(out), "--steps", str(steps), *COMMON, *more]


def losses(out):
    return [float(row["loss"]) for row in csv.DictReader((out / "log.csv").open())]


def run(out, steps, *more):
    return subprocess.run([sys.executable, *command(out, steps, *more)], env=ENVIRONMENT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    done = run(out, 30)
    assert done.returncode == 0, done.stderr
    return out


def test_a_run_leaves_what_it_should(whole):
    assert sorted(p.name for p in whole.iterdir()) == ["checkpoint.pt", "denoiser.safetensors", "log.csv", "samples.png"]
    assert len(losses(whole)) == 6
    assert losses(whole)[-1] < losses(whole)[0]
    assert load_denoiser(whole / "denoiser.safetensors")(torch.zeros(2, 1, 28, 28), 1.0).shape == (2, 1, 28, 28)


@pytest.mark.slow
def test_killed_and_run_again_it_ends_bit_for_bit_the_same(whole, tmp_path):
    """SIGKILL twice, each time after some more checkpoints; then to the end."""
    for kill in range(2):
        process = subprocess.Popen(
            [sys.executable, *command(tmp_path, 30)], env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        before = losses(tmp_path) if (tmp_path / "log.csv").exists() else []
        while process.poll() is None:
            time.sleep(0.01)
            if (tmp_path / "log.csv").exists() and len(losses(tmp_path)) >= len(before) + 1 + kill:
                process.send_signal(signal.SIGKILL)
                process.wait()
        assert process.returncode == -signal.SIGKILL
    assert run(tmp_path, 30).returncode == 0
    a, b = (load_file(out / "denoiser.safetensors") for out in (whole, tmp_path))
    assert all(torch.equal(a[name], b[name]) for name in a)
    a, b = (torch.load(out / "checkpoint.pt", weights_only=True) for out in (whole, tmp_path))
    assert all(torch.equal(a["denoiser"][name], b["denoiser"][name]) for name in a["denoiser"])
    assert losses(whole) == losses(tmp_path)


@pytest.mark.slow
def test_two_processes_do_what_one_does(whole, tmp_path):
    """`accelerate launch` with two CPU processes (gloo): the same losses up to rounding."""
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1", "--dynamo_backend", "no"]
    launch += ["--mixed_precision", "no", "--main_process_port", "0"]
    done = subprocess.run([sys.executable, *launch, *command(tmp_path, 30)], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path) == pytest.approx(losses(whole), rel=2e-3)


def test_foreign_and_broken_checkpoints_are_refused_and_left_alone(whole, tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes((whole / "checkpoint.pt").read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a checkpoint"):
        pretrain.main(command(tmp_path, 30)[2:])
    assert (tmp_path / "checkpoint.pt").stat().st_size == 1000
    torch.save({"weights": torch.zeros(3)}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="not a checkpoint"):
        pretrain.main(command(tmp_path, 30)[2:])
    before = (whole / "checkpoint.pt").read_bytes()
    with pytest.raises(ValueError, match=r"lr = 0\.003 there, 0\.01 here"):
        pretrain.main(command(whole, 60, "--lr", "0.01")[2:])
    assert (whole / "checkpoint.pt").read_bytes() == before


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path):
    """Files limited to 10 kB in a child process: the error says what to do, the old checkpoint is still there."""
    pretrain.write({"step": 1}, tmp_path / "checkpoint.pt")
    code = (
        "import resource, torch, pathlib\nfrom sde_utils import pretrain\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        f"pretrain.write({{'x': torch.zeros(100_000)}}, pathlib.Path({str(tmp_path / 'checkpoint.pt')!r}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "free some space" in done.stderr
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True) == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 10_000


def test_bad_settings_are_refused(tmp_path):
    for more, name in [(["--steps", "0"], "steps"), (["--lr", "0"], "lr"), (["--ema", "1"], "ema"), (["--batch", "0"], "batch")]:
        with pytest.raises(ValueError, match=name):
            pretrain.parse(["--out", str(tmp_path), *more])
    assert pretrain.learning_rate(0, 1000, 10) == pytest.approx(0.1)
    assert [pretrain.learning_rate(i, 1000, 10) for i in (9, 500, 700)] == [1, 1, 1]
    assert pretrain.learning_rate(850, 1000, 10) == pytest.approx(0.5)
