import importlib.util
import math
from pathlib import Path

import pytest
import torch
from conftest import Recorder, rng

import sde_utils as su

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


def test_committed_results_are_complete():
    results = measure.read(measure.RESULTS, measure.DEPTHS)
    for name, calls in measure.CALLS.items():
        for key in measure.SDES:
            assert {str(c) for c in calls} <= results["quality"][key][name].keys()
    assert max(results["quality of twice as many"].values()) < 6


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("no/such.json", None, "folder that exists"),
        (".", None, "folder that exists"),
        ("broken.json", '{"real": {', "broken.json"),
        ("list.json", "[1, 2]", "list.json"),
        ("other.json", '{"name": "sde_utils"}', "other.json"),
        ("flat.json", '{"real": 0.5}', "flat.json"),
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


def test_quality_is_written_and_a_run_cut_short_goes_on(tmp_path, monkeypatch):
    """From the first line to the last, with a few digits, calls and two epochs."""
    images, labels = su.mnist(split="train")
    held_out, held_labels = su.mnist(split="test")
    digits = measure.Digits(images[::2], labels[::2], held_out, held_labels)
    learn = measure.classifier
    monkeypatch.setattr(measure, "classifier", lambda x, y: learn(x, y, epochs=2))
    monkeypatch.setattr(measure, "CALLS", dict.fromkeys(measure.CALLS, (2,)))
    monkeypatch.setattr(measure, "SAMPLES", 20)
    results = measure.Results(tmp_path / "found.json", measure.DEPTHS)
    prior = su.IsotropicMixture(torch.zeros(1, 1, 28, 28), 0.36)
    measure.measure_quality(results, prior, digits, ["VP"])
    found = measure.read(tmp_path / "found.json", measure.DEPTHS)
    assert found["quality"]["VP"].keys() == measure.CALLS.keys()
    assert found["real"]["accuracy on held-out digits"] > 0.5
    assert found["real"]["40 training digits"] < found["quality of twice as many"]["VP"]
    results = measure.Results(tmp_path / "found.json", measure.DEPTHS)
    monkeypatch.setattr(measure, "generate", lambda *_: pytest.fail("it is there already"))
    measure.measure_quality(results, prior, digits, ["VP"])
    assert measure.read(tmp_path / "found.json", measure.DEPTHS) == found
