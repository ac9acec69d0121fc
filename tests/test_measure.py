import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import Recorder, rng

import sde_utils as su
from sde_utils.operators import Downsampling

SCRIPT = Path(__file__).parents[1] / "scripts" / "measure.py"
spec = importlib.util.spec_from_file_location("measure", SCRIPT)
measure = importlib.util.module_from_spec(spec)
spec.loader.exec_module(measure)


@pytest.mark.parametrize("key", measure.SDES)
@pytest.mark.parametrize("name", measure.CALLS)
def test_samplers_make_the_calls_they_are_billed_for(name, key):
    """Exactly; Heun and predictor-corrector, two calls a step and one at the end, one less."""
    prior = Recorder(su.IsotropicMixture(torch.zeros(1, 1, 4, 4), 0.3))
    prior.sigma_data, sde = math.sqrt(0.3), measure.SDES[key]
    for calls in measure.CALLS[name][:2]:
        prior.calls = 0
        x = sde.prior((2, 1, 4, 4), generator=rng())
        measure.generate(sde, prior, name, calls, x, rng(1))
        odd = name in ("Heun", "predictor–corrector")
        assert prior.calls == (calls - 1 + calls % 2 if odd else calls)


@pytest.mark.parametrize("key", measure.SDES)
@pytest.mark.parametrize("name", measure.CALLS)
def test_samplers_reach_a_gaussian(name, key):
    """N(0, 0.36): the variance of 1,000 draws of 16 pixels at the most calls, within 4 %.

    Its standard error is 1.1 %. Ancestral steps are of order 1, 8 % at 100 calls and 4 % at 200.
    """
    prior, sde = su.IsotropicMixture(torch.zeros(1, 1, 4, 4), 0.36), measure.SDES[key]
    x = sde.prior((1000, 1, 4, 4), generator=rng(2))
    x = measure.generate(sde, prior, name, measure.CALLS[name][-1], x, rng(3))
    print(f"{name}, {key}: variance over the exact one {float(x.var()) / 0.36:.3f}")
    assert float(x.var()) == pytest.approx(0.36, rel=0.1 if name == "ancestral" else 0.04)


def test_judge_knows_right_from_too_narrow():
    """Draws like the truth cover 90 % of its pixels, to 3 standard errors of 400 draws of 784
    pixels; the same draws shrunk do not."""
    x = torch.randn(401, 1, 28, 28, generator=rng(2))
    obs = su.Observation(Downsampling(4), Downsampling(4)(x[:1])[0], 0.25)
    seen = measure.judge(x[1:], x[:1], obs)
    assert seen["coverage"] == pytest.approx(0.9, abs=3 * math.sqrt(0.09 / 784) + 0.01)
    assert seen["psnr_mean"] > seen["psnr_draw"]
    assert seen["residual"] == pytest.approx(math.sqrt(2), abs=0.15)
    assert measure.judge(0.5 * x[1:], x[:1], obs)["coverage"] < 0.7


@pytest.mark.parametrize("method", measure.METHODS)
def test_methods_agree_with_a_gaussian_posterior(method):
    """Prior N(0, 0.36) per pixel, means over 4 x 4: the observed part of the draws' mean against
    exact, in the prior's sd.

    Annealed forgets that A Aᵀ = 1/16 and is 16 times too wide until late: it must be nearer than
    the prior's mean, the others within 0.2.
    """
    prior = su.IsotropicMixture(torch.zeros(1, 1, 28, 28), 0.36)
    operator = Downsampling(4)
    truth = prior.sample(1, rng(3))
    obs = su.Observation(operator, operator(truth)[0], 0.05)
    x = measure.solve(su.VPSDE(), prior, method, obs, 32, 40, rng(4))
    exact = prior.posterior(obs)
    error = (operator(x.mean(0, keepdim=True)) - operator(exact.means)).square().mean().sqrt()
    spread = operator(prior.sample(400, rng(5))).std()
    print(f"{method}: error of the observed mean {float(error / spread):.2f} of the prior's sd")
    assert error < (1.0 if method == "Annealed" else 0.2) * spread


@pytest.mark.slow
def test_exact_problem_needs_no_network():
    images, labels = su.mnist(split="train")
    keep = torch.arange(0, 4750, 50)
    truth = su.mnist(split="test")[0][102:103]
    found = measure.exact_problem(su.VPSDE(), images[keep], labels[keep], truth, rng(6))
    assert all(0 <= value <= 1 for value in found.values())
    assert found["200 exact draws"] < 0.15
    assert found["twisted SMC, 1600 particles"] < 0.2


def test_committed_results_are_complete():
    results = measure.read(measure.RESULTS, measure.DEPTHS)
    for name, calls in measure.CALLS.items():
        for key in measure.SDES:
            assert {str(c) for c in calls} <= results["quality"][key][name].keys()
    for task in measure.TASKS:
        assert results["problems"][task].keys() == set(measure.METHODS)
    assert "200 exact draws" in results["exact"]
    assert max(results["quality of twice as many"].values()) < 6


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("no/such.json", None, "folder that exists"),
        (".", None, "folder that exists"),
        ("broken.json", '{"exact": {', "broken.json"),
        ("list.json", "[1, 2]", "list.json"),
        ("other.json", '{"name": "sde_utils"}', "other.json"),
        ("flat.json", '{"exact": 0.5}', "flat.json"),
        ("/proc/measures.json", None, "cannot be written"),
    ],
)
def test_a_wrong_out_is_refused_before_any_work(
    tmp_path, monkeypatch, capsys, name, content, message
):
    if name.startswith("/proc") and not Path("/proc/self").exists():
        pytest.skip("no folder here that nobody can write to")
    monkeypatch.setattr(su, "load_pretrained", lambda name: pytest.fail("work has begun"))
    monkeypatch.setattr(su, "mnist", lambda **_: pytest.fail("work has begun"))
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit):
        measure.main(["--out", str(path)])
    assert message in capsys.readouterr().err
    assert content is None or path.read_text() == content
    assert [p.name for p in tmp_path.iterdir()] == ([] if content is None else [name])


def test_a_run_cut_short_goes_on(tmp_path, monkeypatch):
    """What was found is kept, and not asked for again; --fresh forgets it."""
    path, asked = tmp_path / "found.json", []

    def solve(sde, denoiser, method, obs, draws, steps, generator):
        asked.append(method)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return torch.randn(draws, 1, 28, 28, generator=generator)

    monkeypatch.setattr(measure, "solve", solve)
    monkeypatch.setattr(measure, "PROBLEMS", 1)
    run = ["--out", str(path), "--parts", "problems"]
    with pytest.raises(KeyboardInterrupt):
        measure.main(run)
    found = json.loads(path.read_text())
    assert found["problems"]["inpainting"].keys() == {"Annealed", "DPS"}
    measure.main(run)
    total = len(measure.TASKS) * len(measure.METHODS)
    assert asked == ["Annealed", "DPS", "MMPS", *(list(measure.METHODS) * 4)[2:]]
    whole = measure.read(path, measure.DEPTHS)
    assert whole["problems"]["inpainting"]["DPS"] == found["problems"]["inpainting"]["DPS"]
    measure.main([*run, "--fresh"])
    assert len(asked) == total + 1 + total
    assert measure.read(path, measure.DEPTHS) == whole
    assert [p.name for p in tmp_path.iterdir()] == ["found.json"]


def test_quality_and_exact_are_written(tmp_path, monkeypatch):
    """Both parts from the first line to the last, with a few digits, calls and two epochs."""
    images, labels = su.mnist(split="train")
    held_out, held_labels = su.mnist(split="test")
    digits = measure.Digits(images[::2], labels[::2], held_out, held_labels)
    learn = measure.classifier
    monkeypatch.setattr(measure, "classifier", lambda x, y: learn(x, y, epochs=2))
    monkeypatch.setattr(measure, "CALLS", dict.fromkeys(measure.CALLS, (2,)))
    monkeypatch.setattr(measure, "SAMPLES", 20)
    monkeypatch.setattr(measure, "STEPS", 8)
    results = measure.Results(tmp_path / "found.json", measure.DEPTHS)
    prior = su.IsotropicMixture(torch.zeros(1, 1, 28, 28), 0.36)
    measure.measure_quality(results, prior, digits, ["VP"])
    found = measure.read(tmp_path / "found.json", measure.DEPTHS)
    assert found["quality"]["VP"].keys() == measure.CALLS.keys()
    assert found["real"]["accuracy on held-out digits"] > 0.5
    assert found["real"]["40 training digits"] < found["quality of twice as many"]["VP"]
    monkeypatch.setattr(measure, "exact_problem", lambda *_: {"exact draws": 0.25})
    measure.measure_exact(results, digits)
    assert measure.read(tmp_path / "found.json", measure.DEPTHS)["exact"] == {"exact draws": 0.25}
