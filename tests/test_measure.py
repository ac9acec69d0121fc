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


@pytest.fixture(scope="module")
def digits():
    return measure.Digits(*su.mnist(split="train"), *su.mnist(split="test"))


def logits(x):
    """In the place of a classifier: ten different scalars of an image."""
    return x.flatten(1)[:, 200:210] * 5


@pytest.mark.parametrize("thickness", [0.005, 0.1])
def test_an_exact_sampler_passes_the_measure(digits, thickness):
    """Truths and draws from exact posteriors of the training-digit mixture, thin and thick: the
    study's own function finds coverage 0.9 within 0.01 and ranks within the band of 99 %.

    160 truths of eight observations; the coverage's standard error is about 0.003.
    """
    prior, g = su.IsotropicMixture(digits.train, thickness**2), rng(2)
    rows = []
    for i in range(8):
        y = measure.four_rows(digits.held_out[30 * i : 30 * i + 1])
        y = y + torch.randn(y.shape, generator=g)
        obs = su.Observation(measure.four_rows, y[0], 1.0)
        posterior = prior.posterior(obs)
        for k in range(20):
            x = posterior.sample(measure.DRAWS + 1, g)
            rows.append(measure.judge(x[1:], x[:1], obs, digits, logits, k % 10, g))
    found = measure.columns(rows)
    covered = torch.tensor(found["coverage"])
    print(f"coverage {covered.mean():.4f} ± {covered.std() / len(rows) ** 0.5:.4f}")
    assert float(covered.mean()) == pytest.approx(0.9, abs=0.01)
    error, variance = (torch.tensor(found[name]).mean() for name in ("error", "variance"))
    assert float(error / variance) == pytest.approx(1, abs=0.1)
    low, high = su.ecdf_band(len(rows), measure.DRAWS, level=0.99, generator=rng(3))
    for name in ("brightness", "stroke", "class"):
        ranks = torch.tensor(found[f"rank of {name}"])
        ecdf = (ranks[:, None] <= torch.arange(measure.DRAWS)).double().mean(0)
        assert (ecdf >= low).all() and (ecdf <= high).all(), name  # noqa: PT018


def test_the_measure_sees_what_is_too_narrow_and_what_is_too_wide(digits):
    """Draws around their mean shrunk, or spread, by half: far from 0.9, on either side."""
    posterior, g = su.IsotropicMixture(digits.train, 0.01), rng(4)
    x = posterior.sample(20 * (measure.DRAWS + 1), g).unflatten(0, (20, -1))
    covered = {}
    for factor in (0.5, 1.0, 1.5):
        for truth, *draws in x:
            draws = torch.stack(draws)
            draws = draws.mean(0) + factor * (draws - draws.mean(0))
            row = measure.spread(draws, truth[None], digits.pixels, g)
            covered.setdefault(factor, []).append(row["coverage"])
    found = {factor: sum(values) / len(values) for factor, values in covered.items()}
    assert found[0.5] < 0.8
    assert found[1.0] == pytest.approx(0.9, abs=0.02)
    assert found[1.5] > 0.92


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
    x, told = measure.solve(su.VPSDE(), prior, method, obs, 32, 40, rng(4))
    assert told.keys() == ({"least effective", "ancestors"} if "SMC" in method else set())
    exact = prior.posterior(obs)
    error = (operator(x.mean(0, keepdim=True)) - operator(exact.means)).square().mean().sqrt()
    spread = operator(prior.sample(400, rng(5))).std()
    print(f"{method}: error of the observed mean {float(error / spread):.2f} of the prior's sd")
    assert error < (1.0 if method == "Annealed" else 0.2) * spread


def test_exact_problem_needs_no_network(digits):
    images, labels = digits.train[::50], digits.labels[::50]
    operator, noise = measure.EXACT["four rows, 1"]
    y = operator(digits.held_out[102:103]) + noise * torch.randn(1, 1, 4, 28, generator=rng(5))
    obs = su.Observation(operator, y[0], noise)
    found = measure.exact_problem(su.VPSDE(), images, labels, obs, rng(6))
    far = {name: row["total variation"] for name, row in found.items()}
    assert far["exact draws"] < 0.08
    for name in ("twisted SMC", "tempered SMC"):
        assert far[name] < 0.15
        assert abs(found[name]["log-evidence"]) < 0.5
    assert found["tempered SMC"]["calls"] > 100


def test_committed_results_are_complete():
    results = measure.read(measure.RESULTS)
    for name, calls in measure.CALLS.items():
        for key in measure.SDES:
            assert {str(c) for c in calls} <= results["quality"][key][name].keys()
    for truths in ("network", "held-out"):
        for name, (_, counts) in measure.CHAINS.items():
            for sigma in measure.SIGMAS:
                found = results["chains"][truths][str(sigma)][name]
                assert found.keys() == {str(n) for n in counts}
        for task in measure.TASKS:
            found = results["problems"][truths][task]
            assert found.keys() == set(measure.METHODS)
            sizes = {len(values) for row in found.values() for values in row.values()}
            assert sizes == {measure.PROBLEMS}
    for found in results["exact"].values():
        assert len(found["exact draws"]["total variation"]) == 4
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
        return torch.randn(draws, 1, 28, 28, generator=generator), {}

    monkeypatch.setattr(measure, "solve", solve)
    monkeypatch.setattr(measure, "PROBLEMS", 2)
    monkeypatch.setattr(measure, "classifier", lambda *_: logits)
    run = ["--out", str(path), "--parts", "problems"]
    with pytest.raises(KeyboardInterrupt):
        measure.main(run)
    found = json.loads(path.read_text())
    assert found["problems"]["network"]["inpainting"].keys() == {"Annealed", "DPS"}
    measure.main(run)
    total = 2 * 2 * len(measure.TASKS) * len(measure.METHODS)
    assert len(asked) == total + 1
    whole = measure.read(path)
    first = found["problems"]["network"]["inpainting"]["DPS"]
    again = whole["problems"]["network"]["inpainting"]["DPS"]
    assert {name: values[:1] for name, values in again.items()} == first
    measure.main([*run, "--fresh"])
    assert len(asked) == total + 1 + total
    assert measure.read(path) == whole
    assert [p.name for p in tmp_path.iterdir()] == ["found.json"]


def test_chains_are_written_and_of_a_gaussian_they_are_right(tmp_path, monkeypatch, digits):
    """Prior N(0, 0.36): moment-matched steps cover 0.9, fewer ancestral ones less."""
    monkeypatch.setattr(measure, "SIGMAS", (0.4,))
    monkeypatch.setattr(measure, "PROBLEMS", 8)
    prior = su.IsotropicMixture(torch.zeros(1, 1, 28, 28), 0.36)
    results = measure.Results(tmp_path / "found.json")
    held_out = prior.sample(40, rng(7))
    measure.measure_chains(results, prior, digits._replace(held_out=held_out))
    found = measure.read(tmp_path / "found.json")["chains"]
    for truths in ("network", "held-out"):
        rows = found[truths]["0.4"]
        covered = {
            (name, n): sum(row["coverage"]) / 8 for name in rows for n, row in rows[name].items()
        }
        assert covered["moment-matched", "16"] == pytest.approx(0.9, abs=0.02)
        assert covered["ancestral", "8"] < 0.8


def test_quality_and_exact_are_written(tmp_path, monkeypatch, digits):
    """Both parts from the first line to the last, with a few digits, calls and two epochs."""
    digits = digits._replace(train=digits.train[::2], labels=digits.labels[::2])
    learn = measure.classifier
    monkeypatch.setattr(measure, "classifier", lambda x, y: learn(x, y, epochs=2))
    monkeypatch.setattr(measure, "CALLS", dict.fromkeys(measure.CALLS, (2,)))
    monkeypatch.setattr(measure, "SAMPLES", 20)
    monkeypatch.setattr(measure, "STEPS", 8)
    results = measure.Results(tmp_path / "found.json")
    prior = su.IsotropicMixture(torch.zeros(1, 1, 28, 28), 0.36)
    measure.measure_quality(results, prior, digits, ["VP"])
    found = measure.read(tmp_path / "found.json")
    assert found["quality"]["VP"].keys() == measure.CALLS.keys()
    assert found["real"]["accuracy on held-out digits"] > 0.5
    assert found["real"]["40 training digits"] < found["quality of twice as many"]["VP"]
    row = {"exact draws": {"total variation": 0.25}}
    monkeypatch.setattr(measure, "exact_problem", lambda *_: row)
    measure.measure_exact(results, digits)
    measure.measure_exact(results, digits)  # all known
    found = measure.read(tmp_path / "found.json")["exact"]
    assert found.keys() == measure.EXACT.keys()
    assert found["four rows, 1"]["exact draws"] == {"total variation": 4 * [0.25]}
