import json
import math

import pytest
import torch
from conftest import Recorder, rng

from sde_utils import VPSDE, IsotropicMixture, Observation, evaluate, mnist
from sde_utils.operators import Downsampling


@pytest.mark.parametrize("key", evaluate.SDES)
@pytest.mark.parametrize("name", evaluate.CALLS)
def test_samplers_make_the_calls_they_are_billed_for(name, key):
    prior = Recorder(IsotropicMixture(torch.zeros(1, 1, 4, 4), 0.3))
    sde = evaluate.SDES[key]
    for calls in evaluate.CALLS[name][:2]:
        prior.calls = 0
        evaluate.generate(sde, prior, name, calls, sde.prior((2, 1, 4, 4), generator=rng()), rng(1))
        assert abs(prior.calls - calls) <= 1


def test_judge_knows_right_from_too_narrow():
    """Draws like the truth cover 90 % of its pixels, to 3 standard errors of 400 draws of 784 pixels; the same draws shrunk do not."""
    x = torch.randn(401, 1, 28, 28, generator=rng(2))
    obs = Observation(Downsampling(4), Downsampling(4)(x[:1])[0], 0.25)
    seen = evaluate.judge(x[1:], x[:1], obs)
    assert seen["coverage"] == pytest.approx(0.9, abs=3 * math.sqrt(0.09 / 784) + 0.01)
    assert seen["psnr_mean"] > seen["psnr_draw"]
    assert seen["residual"] == pytest.approx(math.sqrt(2), abs=0.15)
    assert evaluate.judge(0.5 * x[1:], x[:1], obs)["coverage"] < 0.7


@pytest.mark.parametrize("method", evaluate.METHODS)
def test_methods_agree_with_a_gaussian_posterior(method):
    """Prior N(0, 0.36) per pixel, means over 4 x 4: the observed part of the draws' mean against exact, in the prior's sd.

    Annealed forgets that A Aᵀ = 1/16 and is 16 times too wide until late: it must be nearer than the prior's mean, the others within 0.2.
    """
    prior = IsotropicMixture(torch.zeros(1, 1, 28, 28), 0.36)
    prior.sigma_data = 0.6
    operator = Downsampling(4)
    truth = prior.sample(1, rng(3))
    obs = Observation(operator, operator(truth)[0], 0.05)
    x = evaluate.solve(VPSDE(), prior, method, obs, 32, 40, rng(4))
    exact = prior.posterior(obs)
    error = (operator(x.mean(0, keepdim=True)) - operator(exact.means)).square().mean().sqrt()
    spread = operator(prior.sample(400, rng(5))).std()
    print(f"{method}: error of the observed mean {float(error / spread):.2f} of the prior's sd")
    assert error < (1.0 if method == "Annealed" else 0.2) * spread


def test_exact_problem_needs_no_network():
    digits, labels = mnist(split="train")
    keep = torch.arange(0, 4750, 50)
    found = evaluate.exact_problem(VPSDE(), digits[keep], labels[keep], mnist(split="test")[0][102:103], rng(6))
    assert all(0 <= value <= 1 for value in found.values())
    assert found["200 exact draws"] < 0.15
    assert found["twisted SMC, 1600 particles"] < 0.2


def test_committed_results_are_complete():
    results = json.loads(evaluate.RESULTS.read_text())
    for name, calls in evaluate.CALLS.items():
        for key in evaluate.SDES:
            assert {str(c) for c in calls} <= results["quality"][key][name].keys()
    for task in evaluate.TASKS:
        assert results["problems"][task].keys() == set(evaluate.METHODS)
    assert "200 exact draws" in results["exact"]
    assert max(results["quality of twice as many"].values()) < 6
